"""Massive activations: codecs keep them, and the channels and tokens that they are in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.signals import massive
from docs.decode_with_numpy import decode
from teachercache.pipeline.codecs import Codec, codec_names, get_codec
from teachercache.pipeline.codecs.fidelity import measure_fidelity
from teachercache.pipeline.codecs.outliers import LEAST_GAIN, num_slots, put_back, take_out, usual_moments
from teachercache.pipeline.errors import CodecError
from teachercache.pipeline.records.feature_stats import FeatureMoments

INT_CODECS = [name for name in codec_names() if name.startswith("int")]
INT4_CODECS = ["int4-hadamard", "int4-rings", "int4-dct", "int4-dct-rings", "int4-phi-s"]
each_int_codec = pytest.mark.parametrize("name", INT_CODECS)


def features(k: float, seed: int = 0, width: int = 768, grid: int = 12) -> Tensor:
    return massive(2, 2, (grid, grid), width, seed, k)


def calibrated(name: str, k: float, width: int = 768, grid: int = 12) -> Codec:
    return get_codec(name).calibrate(features(k, 0, width, grid))


@pytest.mark.parametrize("name", INT4_CODECS)
@pytest.mark.parametrize("k", [0.0, 10.0, 40.0, 200.0, 1000.0])
def test_figures_of_int4(name: str, k: float) -> None:
    fidelity = measure_fidelity(calibrated(name, k, grid=24), features(k, 1, grid=24))
    assert min(fidelity.cosine_mean, fidelity.raw_cosine_mean) >= 0.995
    assert min(fidelity.cosine_p1, fidelity.raw_cosine_p1) >= 0.992
    assert fidelity.float16_ratio <= 0.255


@pytest.mark.parametrize("name", INT4_CODECS)
@pytest.mark.parametrize("k", [200.0, 1000.0])
def test_other_channels_of_tokens_with_outliers_lose_no_more_than_those_of_others(
    name: str, k: float
) -> None:
    x = features(k, 1)
    is_outlier = x.abs() > 10
    decoded = calibrated(name, k).encode(x).decode()
    np.testing.assert_allclose(decoded[is_outlier], x[is_outlier], rtol=2**-10)
    others = x.masked_fill(is_outlier, 0), decoded.masked_fill(is_outlier, 0)
    loud = is_outlier.any(-1)
    cosines = F.cosine_similarity(*others, dim=-1)
    assert cosines[loud].min() >= 0.992
    assert cosines[loud].mean() >= cosines[~loud].mean() - 5e-4


@pytest.mark.parametrize("name", ["int8", "int8-hadamard", "int8-phi-s"])
def test_figures_of_int8(name: str) -> None:
    fidelity = measure_fidelity(calibrated(name, 200.0), features(200.0, 1))
    assert min(fidelity.cosine_mean, fidelity.raw_cosine_mean) >= 0.9999
    assert min(fidelity.cosine_p1, fidelity.raw_cosine_p1) >= 0.9998
    assert fidelity.float16_ratio <= 0.505


@pytest.mark.parametrize("width", [768, 1024])
@each_int_codec
def test_share_of_float16(name: str, width: int) -> None:
    bits = int(name[3])
    layout = get_codec(name).layout(4, (24, 24), width)
    nbytes = sum(array.row_nbytes for array in layout.values())
    assert nbytes / (4 * 24 * 24 * width * 2) <= bits / 16 + 0.005


@each_int_codec
def test_decode_equals_the_numpy_reference(name: str) -> None:
    codec = calibrated(name, 200.0, width=96)
    encoded = codec.encode(features(200.0, 1, width=96))
    arrays = {key: tensor.numpy() for key, tensor in encoded.tensors().items()}
    expected = decode(name, arrays, {key: table.numpy() for key, table in codec.state().items()})
    np.testing.assert_allclose(encoded.decode().numpy(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in INT_CODECS if get_codec(name).fits(5)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (1, 2, 1, 1, 2), (1, 1, 1, 3, 2), (3, 1, 2, 2, 5)])
def test_few_tokens_and_channels(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    decoded = get_codec(name).calibrate(x).encode(x).decode()
    assert torch.isfinite(decoded).all()
    assert (decoded - x).norm() < 0.5 * x.norm()


@pytest.mark.parametrize("name", INT4_CODECS)
def test_tokens_with_more_outliers_than_slots(name: str) -> None:
    x = features(0.0, 1)
    sample = x.clone()
    x[:, :, 5, 7, ::2] += 300
    decoded = get_codec(name).calibrate(sample).encode(x).decode()
    assert F.cosine_similarity(decoded, x, dim=-1).min() > 0.99


@each_int_codec
def test_features_of_any_strides(name: str) -> None:
    x = features(200.0, width=96)
    strided = x.movedim(-1, 2).contiguous().movedim(2, -1)
    codec = get_codec(name).calibrate(strided)
    for key, tensor in codec.encode(x).tensors().items():
        assert torch.equal(codec.encode(strided).tensors()[key], tensor)


def test_the_values_that_stand_out_most_are_taken() -> None:
    z = torch.randn(2, 3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    left = z.clone()
    places, values = take_out(left)
    assert places.shape == values.shape == (2, 3, num_slots(32))
    score = z.abs() / (1 + z.abs().mean(-1, keepdim=True))
    expected = score.flatten(2).topk(num_slots(32)).indices
    assert torch.equal(places.sort().values, expected.sort().values.int())
    assert torch.equal(values, z.flatten(2).gather(2, places.long()).half())
    assert torch.equal(left == 0, torch.zeros_like(z).flatten(2).scatter(2, expected, 1).view_as(z) == 1)


def test_a_loud_token_leaves_the_slots_to_others() -> None:
    z = torch.randn(1, 1, 4, 8, 64, generator=torch.Generator().manual_seed(0))
    z[..., 0, 0, :] *= 100
    z[..., 1:, :2, 3] = 50
    take_out(z)
    assert (z[..., 1:, :2, 3] == 0).sum() == num_slots(32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_damaged_place_stays_in_its_level(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 2, 1, 2, 3, dtype=dtype)
    put_back(x, torch.tensor([[[2**31 - 1], [-5]]], dtype=torch.int32), torch.ones(1, 2, 1))
    assert x.flatten().nonzero().flatten().tolist() == [5, 6]


def test_gaussian_channels_have_their_plain_moments() -> None:
    x = features(0.0) * torch.rand(768) + torch.randn(768)
    usual, plain = usual_moments(x, covariance=True), FeatureMoments.of(x, covariance=True)
    assert torch.equal(usual.mean_SC, plain.mean_SC)
    assert torch.equal(usual.std_SC(), plain.std_SC())
    torch.testing.assert_close(usual.covariance_SCC(), plain.covariance_SCC(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [200.0, 1000.0, 1e6])
def test_outliers_do_not_move_the_moments(k: float) -> None:
    ordinary, x = features(0.0), features(k)
    usual, expected = usual_moments(x, covariance=True), FeatureMoments.of(ordinary)
    assert (FeatureMoments.of(x).std_SC() > 10).sum() == 4
    torch.testing.assert_close(usual.mean_SC, expected.mean_SC, rtol=0, atol=0.05)
    torch.testing.assert_close(usual.std_SC(), expected.std_SC(), rtol=0.02, atol=0)
    variances = usual.covariance_SCC().diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(variances, expected.std_SC().square(), rtol=0.1, atol=0)


@pytest.mark.parametrize("share", [0.6, 0.3])
def test_a_second_mode_is_no_outlier(share: float) -> None:
    x = features(0.0)
    x[..., 5] += 500.0 * (torch.rand(x.shape[:-1], generator=torch.Generator().manual_seed(1)) < share)
    torch.testing.assert_close(usual_moments(x).std_SC(), FeatureMoments.of(x).std_SC())


def test_a_channel_that_is_mostly_constant_keeps_its_plain_moments() -> None:
    x = features(0.0)
    x[..., 5] = 1.5
    x[:, :, 3, 4, 5] = 90
    usual = usual_moments(x)
    torch.testing.assert_close(usual.std_SC(), FeatureMoments.of(x).std_SC())
    assert usual.std_SC()[0, 5] > LEAST_GAIN


def test_moments_of_one_token() -> None:
    x = torch.tensor([3.0, -1.0]).view(1, 1, 1, 1, 2)
    usual = usual_moments(x, covariance=True)
    assert usual.mean_SC.tolist() == [[3.0, -1.0]]
    assert not usual.std_SC().any()
    assert not usual.covariance_SCC().any()


@each_int_codec
def test_outliers_beyond_float16_are_refused(name: str) -> None:
    codec = calibrated(name, 0.0, width=96)
    x = features(0.0, width=96)
    x[0, 1, 2, 3, 4] = 1e6
    with pytest.raises(CodecError, match="cannot hold"):
        codec.encode(x)
