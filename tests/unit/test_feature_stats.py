import random
from functools import reduce
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teachercache.pipeline.records.feature_stats import FeatureMoments


def features(rows: int = 12) -> Tensor:
    """Means far from zero beside small deviations, where float32 sums of squares would lose all digits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2, 3, 4, 8, generator=generator)
    return 1000 + x @ torch.randn(8, 8, generator=generator)


def two_pass(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens_SNC = x.double().transpose(0, 1).flatten(1, 3)
    mean = tokens_SNC.mean(1)
    centred = tokens_SNC - mean[:, None]
    return mean, centred.square().mean(1).sqrt(), centred.mT @ centred / centred.shape[1]


def require_close(moments: FeatureMoments, x: Tensor, rtol: float = 1e-7) -> None:
    mean, std, covariance = two_pass(x)
    assert moments.count == x[:, 0, ..., 0].numel()
    torch.testing.assert_close(moments.mean_SC, mean, rtol=rtol, atol=0)
    torch.testing.assert_close(moments.std_SC(), std, rtol=rtol, atol=0)
    if moments.products_SCC is not None:
        torch.testing.assert_close(moments.covariance_SCC(), covariance, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("covariance", [False, True])
def test_moments_equal_two_passes_in_float64(covariance: bool) -> None:
    require_close(FeatureMoments.of(features(), covariance), features())


def test_merging_shards_in_any_order_and_grouping_gives_the_moments_of_all() -> None:
    x = features()
    shards = [FeatureMoments.of(part, covariance=True) for part in x.split([1, 5, 2, 4])]
    for seed in range(5):
        random.Random(seed).shuffle(shards)
        require_close(reduce(FeatureMoments.merge, shards), x)
    a, b, c, d = shards
    require_close(a.merge(b).merge(c.merge(d)), x)


def test_merging_in_one_order_gives_the_same_bits() -> None:
    shards = [FeatureMoments.of(part) for part in features().split(3)]
    first, second = reduce(FeatureMoments.merge, shards), reduce(FeatureMoments.merge, shards)
    assert torch.equal(first.squares_SC, second.squares_SC)


def test_empty_moments_change_nothing() -> None:
    moments = FeatureMoments.of(features(), covariance=True)
    empty = FeatureMoments.empty(2, 8, covariance=True)
    for merged in (moments.merge(empty), empty.merge(moments)):
        require_close(merged, features())
    assert FeatureMoments.of(features()[:0]).count == 0
    assert not empty.merge(empty).std_SC().any()


def test_float16_features_are_summed_in_float64() -> None:
    x = torch.full((4, 1, 8, 8, 2), 60000.0).half()
    assert FeatureMoments.of(x).mean_SC.tolist() == [[60000.0, 60000.0]]


@pytest.mark.parametrize("covariance", [False, True])
def test_moments_survive_safetensors(tmp_path: Path, covariance: bool) -> None:
    moments = FeatureMoments.of(features(), covariance)
    save_file(moments.tensors(), tmp_path / "moments.safetensors")
    loaded = FeatureMoments.from_tensors(load_file(tmp_path / "moments.safetensors"))
    assert loaded.count == moments.count
    for name, tensor in moments.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)


def test_covariance_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match="covariance=True"):
        FeatureMoments.of(features()).covariance_SCC()
