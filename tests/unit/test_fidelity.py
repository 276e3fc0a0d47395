"""What a codec loses is measured over blocks of rows, as if it were measured at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.signals import massive
from teachercache.pipeline.codecs import Encoded, codec_names, get_codec
from teachercache.pipeline.codecs.fidelity import ROWS_AT_ONCE, Fidelity, compare, measure_fidelity
from teachercache.pipeline.codecs.normalisation import floored_std
from teachercache.pipeline.codecs.outliers import usual_moments


def at_once(x: Tensor, decoded: Tensor) -> list[float]:
    """The six errors, in float64 over whole tensors."""
    moments = usual_moments(x)
    mean, std = moments.mean_SC[:, None, None], floored_std(moments.std_SC())[:, None, None]
    errors = []
    for centre, scale in ((mean, std), (torch.zeros(()), torch.ones(()))):
        y, y_decoded = ((values.double() - centre) / scale for values in (x, decoded))
        cosines = F.cosine_similarity(y, y_decoded, dim=-1).flatten().sort().values
        relative_l2 = (y_decoded - y).norm() / y.norm()
        errors += [cosines.mean().item(), cosines[(len(cosines) - 1) // 100].item(), relative_l2.item()]
    return errors


def six(fidelity: Fidelity) -> list[float]:
    return [
        *(fidelity.cosine_mean, fidelity.cosine_p1, fidelity.relative_l2),
        *(fidelity.raw_cosine_mean, fidelity.raw_cosine_p1, fidelity.raw_relative_l2),
    ]


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("rows", [1, 2 * ROWS_AT_ONCE + 1])
def test_blocks_of_rows_give_what_all_rows_give(name: str, rows: int) -> None:
    x = 3 + massive(rows, 2, (4, 6), 64, seed=0)
    codec = get_codec(name).calibrate(x)
    encoded = codec.encode(x)
    fidelity = measure_fidelity(codec, x)
    np.testing.assert_allclose(six(fidelity), at_once(x, encoded.decode()), rtol=1e-6, atol=1e-6)
    assert fidelity == compare(x, encoded.decode(), encoded.nbytes // rows)


def test_few_rows_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = get_codec("int4-hadamard").calibrate(massive(2, 1, (4, 4), 64, seed=0))
    encode, sizes = codec.encode, []

    def spy(features_RSHWC: Tensor) -> Encoded:
        sizes.append(len(features_RSHWC))
        return encode(features_RSHWC)

    monkeypatch.setattr(codec, "encode", spy)
    measure_fidelity(codec, massive(2 * ROWS_AT_ONCE + 1, 1, (4, 4), 64, seed=1))
    assert sizes == [ROWS_AT_ONCE, ROWS_AT_ONCE, 1]


@pytest.mark.parametrize("name", [name for name in codec_names() if name != "f16"])
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_features_that_are_all_constant(name: str, value: float) -> None:
    x = torch.full((9, 2, 4, 4, 64), value)
    fidelity = measure_fidelity(get_codec(name).calibrate(x), x)
    assert six(fidelity) == [1.0, 1.0, 0.0, pytest.approx(1), pytest.approx(1), 0.0]


def test_zeros_that_are_not_decoded_to_zeros() -> None:
    x = torch.zeros(1, 1, 2, 2, 8)
    decoded = x.clone()
    decoded[0, 0, 0, 0, 0] = 2
    assert six(compare(x, decoded, 1))[3:] == [0.75, 0.0, pytest.approx(2 / 32**0.5)]


def test_moments_and_errors_take_any_dtype() -> None:
    kinds: list[Any] = [torch.float16, torch.bfloat16, torch.float64]
    for dtype in kinds:
        x = torch.randn(2, 1, 3, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert measure_fidelity(get_codec("f32"), x).relative_l2 == 0
