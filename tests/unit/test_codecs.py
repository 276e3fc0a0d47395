import itertools
import math
import pickle
import re
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from docs.decode_with_numpy import decode
from teachercache.pipeline.codecs import Codec, Standing, codec_names, get_codec, torch_dtype
from teachercache.pipeline.codecs.dct import RINGS, SCALAR, Quantisation, allocate_bits
from teachercache.pipeline.codecs.fidelity import measure_fidelity
from teachercache.pipeline.codecs.quantizer import gaussian_distortion, gaussian_levels
from teachercache.pipeline.codecs.rings import RingQuantizer, nearest_path, ring_distortion, ring_levels
from teachercache.pipeline.errors import CodecError

INT_CODECS = [name for name in codec_names() if name.startswith("int")]
HADAMARD_CODECS = [f"int{bits}-hadamard" for bits in (8, 6, 5, 4, 3)]
each_codec = pytest.mark.parametrize("name", codec_names())
each_int_codec = pytest.mark.parametrize("name", INT_CODECS)


def features(rows: int = 3, levels: int = 2, grid: tuple[int, int] = (4, 6), width: int = 96) -> Tensor:
    """Channels of unlike means and deviations; every call gives the same values."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, levels, *grid, width, generator=generator)
    return x * (0.1 + torch.rand(width, generator=generator)) + 3 * torch.randn(width, generator=generator)


def smooth_features(rows: int, levels: int = 2, grid: int = 16, width: int = 256) -> Tensor:
    """Fields with a 1/f amplitude over the grid, mixed over the channels."""
    generator = torch.Generator().manual_seed(rows)
    noise = torch.randn(rows, levels, grid, grid, width, generator=generator)
    frequency = torch.fft.fftfreq(grid)
    radius = torch.hypot(frequency[:, None], frequency).clamp(min=1 / grid)
    fields: Tensor = torch.fft.ifft2(torch.fft.fft2(noise, dim=(2, 3)) / radius[..., None], dim=(2, 3)).real
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    return fields @ mixing


def calibrated(name: str, x: Tensor) -> Codec:
    return get_codec(name).calibrate(x)


@cache
def ready(name: str) -> Codec:
    """Calibrated on `features()`, once for all tests; none of them changes it."""
    return calibrated(name, features())


def relative_error(actual: Tensor, x: Tensor) -> float:
    deviation = x - x.mean((0, 2, 3), keepdim=True)
    return float((actual - x).norm() / deviation.norm())


@each_codec
def test_encoded_tensors_are_those_of_the_layout(name: str) -> None:
    x, codec = features(), ready(name)
    tensors, layout = codec.encode(x).tensors(), codec.layout(2, (4, 6), 96)
    assert get_codec(name).layout(2, (4, 6), 96) == layout  # a plan needs it before any calibration
    assert tensors.keys() == layout.keys()
    for key, tensor in tensors.items():
        assert tuple(tensor.shape) == (3, *layout[key].shape)
        assert tensor.dtype == torch_dtype(layout[key].dtype)
        assert len(layout[key].axes) == len(layout[key].shape)


@each_int_codec
@pytest.mark.parametrize("width", [96, 104, 384])
def test_decode_equals_the_numpy_reference(name: str, width: int) -> None:
    """To float32's rounding. The reference computes in float64 here, where it has none of its own: two sums
    in float32 of hundreds of products lie as far apart as both err together, by how each BLAS orders them."""
    x = features(width=width)
    codec = calibrated(name, x)
    encoded = codec.encode(x)
    arrays = {key: tensor.numpy() for key, tensor in encoded.tensors().items()}
    exact = decode(name, arrays, {key: table.double().numpy() for key, table in codec.state().items()})
    reference = decode(name, arrays, {key: table.numpy() for key, table in codec.state().items()})
    assert exact.dtype == np.float64
    assert reference.dtype == np.float32
    for decoded in (encoded.decode().numpy(), reference):
        np.testing.assert_allclose(decoded, exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("suffix", "bound"),
    [("", (0.01, 0.04, 0.07, 0.15, 0.3)), ("-hadamard", (0.0065, 0.026, 0.051, 0.098, 0.187))],
)
def test_error_of_each_rate_on_gaussian_features(suffix: str, bound: tuple[float, ...]) -> None:
    x = features(rows=4, width=256)
    for bits, most in zip((8, 6, 5, 4, 3), bound, strict=True):
        assert relative_error(calibrated(f"int{bits}{suffix}", x).encode(x).decode(), x) < most


@pytest.mark.parametrize("width", [384, 768, 1024])
def test_figures_of_int8_and_int4_with_outlier_channels_and_heavy_tails(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, width, generator=generator) ** 3
    x[..., :4] *= 100
    for name, ratio, mean, p1 in (("int8", 0.505, 0.9999, 0.9998), ("int4", 0.255, 0.995, 0.992)):
        fidelity = measure_fidelity(calibrated(f"{name}-hadamard", x), x)
        assert fidelity.float16_ratio <= ratio
        assert fidelity.cosine_mean >= mean
        assert fidelity.cosine_p1 >= p1


def test_rotation_saves_tokens_with_more_outliers_than_slots() -> None:
    x = features(width=256)
    x[..., 0, 0, ::32] += 40
    plain, rotated = (measure_fidelity(calibrated(name, x), x) for name in ("int4", "int4-hadamard"))
    assert plain.cosine_p1 < 0.985 < 0.992 < rotated.cosine_p1


@each_codec
def test_rows_are_encoded_alone(name: str) -> None:
    x, codec = features(), ready(name)
    together = codec.encode(x).tensors()
    for row in range(3):
        for key, tensor in codec.encode(x[row : row + 1]).tensors().items():
            assert torch.equal(tensor[0], together[key][row])


@each_codec
def test_no_rows(name: str) -> None:
    codec = ready(name)
    encoded = codec.encode(features()[:0])
    assert encoded.nbytes == 0
    assert encoded.decode(dtype=torch.float16).shape == (0, 2, 4, 6, 96)


@each_codec
def test_one_token_a_level(name: str) -> None:
    x = features(rows=64, levels=1, grid=(1, 1))
    assert relative_error(calibrated(name, x).encode(x).decode(), x) < 0.35


@each_codec
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_and_results_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    x = features().to(dtype)
    encoded = calibrated(name, x).encode(x)
    decoded = encoded.decode(dtype=dtype)
    assert decoded.dtype == dtype
    torch.testing.assert_close(decoded, encoded.decode().to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in INT_CODECS if "-" in name and "phi-s" not in name])
def test_channels_that_are_constant_in_the_sample_alone(name: str) -> None:
    x = torch.randn(4, 1, 4, 4, 1024, generator=torch.Generator().manual_seed(0))
    usual = relative_error(calibrated(name, x).encode(x).decode(), x)
    for constant, most in ((1, 1.6), (700, 32.0)):
        sample = x.clone()
        sample[..., :constant] = 0.5
        assert relative_error(calibrated(name, sample).encode(x).decode(), x) < most * usual


@pytest.mark.parametrize("name", [name for name in INT_CODECS if "dct" not in name])
def test_a_sample_without_any_variance_says_nothing(name: str) -> None:
    x = features()
    decoded = calibrated(name, torch.full_like(x, 3.0)).encode(x).decode()
    assert (decoded - x).norm() < 0.3 * x.norm()


@each_codec
def test_copies_to_the_cpu_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, copy = ready(name).encode(features()), Tensor.to

    def blocking(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not kwargs.get("non_blocking")
        return copy(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", blocking)
    encoded.decode("cpu")


@each_int_codec
def test_tokens_at_the_mean_come_back_as_the_mean(name: str) -> None:
    x, codec = features(), ready(name)
    mean = x.double().mean((0, 2, 3), keepdim=True).float().expand(1, 2, 4, 6, 96)
    torch.testing.assert_close(codec.encode(mean).decode(), mean, rtol=1e-5, atol=1e-5)


@each_int_codec
def test_constant_channels(name: str) -> None:
    x = features()
    x[..., 5] = 7.25
    decoded = calibrated(name, x).encode(x).decode()
    if not name.endswith("phi-s"):  # one scale for all channels: its error is the same in all
        others = x.std((0, 2, 3)).median()
        torch.testing.assert_close(decoded[..., 5], x[..., 5], rtol=0, atol=float(others) / 32)
    assert relative_error(decoded, x) < 0.3
    constant = torch.full((2, 1, 2, 2, 64), 3.0)
    torch.testing.assert_close(calibrated(name, constant).encode(constant).decode(), constant)


@each_int_codec
def test_state_survives_safetensors_and_decodes_the_same(name: str, tmp_path: Path) -> None:
    x, codec = features(), ready(name)
    encoded = codec.encode(x)
    save_file(codec.state(), tmp_path / "stats.safetensors")
    loaded = get_codec(name).load_state(load_file(tmp_path / "stats.safetensors"))
    again = loaded.encode(x)
    for key, tensor in encoded.tensors().items():
        assert torch.equal(again.tensors()[key], tensor)
    tensors = encoded.tensors()
    assert torch.equal(loaded.decode_tensors(tensors, "cpu", torch.float32), encoded.decode())


@each_int_codec
def test_encoded_rows_can_be_pickled(name: str) -> None:
    encoded = ready(name).encode(features())
    assert torch.equal(pickle.loads(pickle.dumps(encoded)).decode(), encoded.decode())  # noqa: S301


@pytest.mark.parametrize(
    "name", ["int8", "int3-hadamard", "int4-hadamard", "int4-phi-s", "int4-dct", "int3-rings"]
)
def test_decode_compiles_to_one_graph_that_gives_the_same(name: str) -> None:
    encoded = ready(name).encode(features())
    compiled = torch.compile(encoded.codec.decode_tensors, fullgraph=True, dynamic=False, backend="eager")
    actual = compiled(encoded.tensors(), "cpu", torch.float32)
    torch.testing.assert_close(actual, encoded.decode(), rtol=1e-5, atol=1e-5)


@each_int_codec
def test_autocast_and_inference_mode_change_nothing(name: str) -> None:
    x, codec = features(), ready(name)
    expected = codec.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        encoded = codec.encode(x)
        decoded = encoded.decode()
    for key, tensor in expected.tensors().items():
        assert torch.equal(encoded.tensors()[key], tensor)
    assert torch.equal(decoded, expected.decode())


@each_int_codec
def test_a_codec_that_is_not_calibrated_says_what_to_do(name: str) -> None:
    codec = get_codec(name)
    with pytest.raises(CodecError, match=r"not calibrated(.|\n)*calibrate\(features\)"):
        codec.encode(features())
    with pytest.raises(CodecError, match="not calibrated"):
        codec.decode_tensors({}, "cpu", torch.float32)
    with pytest.raises(CodecError, match="not calibrated"):
        codec.state()


@each_int_codec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_that_cannot_be_held_are_refused(name: str, value: float) -> None:
    codec = ready(name)
    x = features()
    x[1, 1, 2, 3, 4] = value
    with pytest.raises(CodecError, match="cannot hold"):
        codec.encode(x)
    if value != 1e30:
        with pytest.raises(CodecError, match="not all finite"):
            get_codec(name).calibrate(x)


@each_int_codec
def test_features_of_another_shape_are_refused(name: str) -> None:
    codec = ready(name)
    for x in (features(width=104), features(levels=3), features()[0]):
        with pytest.raises(CodecError, match="another shape"):
            codec.encode(x)
    with pytest.raises(CodecError, match="cannot be calibrated"):
        get_codec(name).calibrate(features()[:0])


@each_int_codec
def test_tables_of_another_codec_are_refused(name: str) -> None:
    state = ready(name).state()
    state.pop("mean")
    with pytest.raises(CodecError, match="not the tables"):
        get_codec(name).load_state(state)


@each_int_codec
def test_arrays_of_another_codec_or_shape_are_refused(name: str) -> None:
    codec = ready(name)
    tensors = codec.encode(features()).tensors()
    broken = [tensors | {"codes": tensors["codes"][..., 1:]}, tensors | {"scales": tensors["scales"].float()}]
    for arrays in (*broken, {}):
        with pytest.raises(CodecError, match="cannot decode"):
            codec.decode_tensors(arrays, "cpu", torch.float32)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CodecError, match=r"advised: f16, .*int4-hadamard.*; special: .*; experiment: int8, "):
        get_codec("int7")


def test_plans_try_what_is_advised_and_reports_less_of_it() -> None:
    assert codec_names("advised") == [
        *("f16", "int8-hadamard", "int6-hadamard", "int5-hadamard"),
        *("int4-hadamard", "int4-rings", "int4-dct", "int4-dct-rings", "int3-hadamard", "int3-dct-rings"),
    ]
    reported = [name for name in codec_names() if get_codec(name).reported]
    assert reported == ["f16", "int8-hadamard", "int4-hadamard", "int4-dct", "int3-hadamard"]


def test_the_page_names_every_codec_and_its_standing() -> None:
    page = (Path(__file__).parents[2] / "docs/codecs.md").read_text()
    stated = {row[1]: re.findall(r"`([\w-]+)`", row[2]) for row in re.finditer(r"\| (\w+) \| (.+?) \|", page)}
    for standing in get_args(Standing):
        assert stated[standing] == codec_names(standing)
    assert sorted(codec_names()) == sorted(itertools.chain(*map(codec_names, get_args(Standing))))


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_has_the_published_distortion(bits: int, distortion: float) -> None:
    assert gaussian_distortion(bits) == pytest.approx(distortion, rel=1e-3)  # Max 1960, Table 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_levels_are_a_fixed_point_on_samples(bits: int) -> None:
    levels = gaussian_levels(bits)
    samples = np.random.default_rng(0).standard_normal(400_000)
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, samples)
    assert np.mean((samples - levels[nearest]) ** 2) == pytest.approx(gaussian_distortion(bits), rel=0.02)
    middle = len(levels) // 2
    assert samples[nearest == middle].mean() == pytest.approx(levels[middle], rel=0.05)


def gaussian_tokens(width: int = 1024) -> Tensor:
    return torch.randn(64, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("width", [384, 1024])
def test_rings_come_within_half_a_decibel_of_the_bound_of_shannon(bits: int, width: int) -> None:
    tokens, quantizer = gaussian_tokens(width), RingQuantizer(torch.from_numpy(ring_levels(bits)))
    assert quantizer.bits == bits
    packed, scales = quantizer.quantise(tokens)
    assert packed.shape == (64, width * bits // 8)
    error = tokens - quantizer.dequantise(packed, width) * scales[:, None].float()
    distortion = (error.square().mean() / tokens.square().mean()).item()
    assert 10 * math.log10(distortion * 4**bits) < (0.7 if bits == 1 else 0.5)
    assert 10 * math.log10(distortion / ring_distortion(bits)) == pytest.approx(0, abs=0.25)


def test_the_search_of_rings_finds_the_best_of_all_paths() -> None:
    width = 8
    tokens = 3 * torch.randn(20, width, generator=torch.Generator().manual_seed(0))
    paths = torch.tensor(list(itertools.product((0, 1), repeat=width)))
    before = {i: torch.nn.functional.pad(paths, (i, 0))[:, :width] for i in (1, 4, 5, 6)}
    sign = 1 - 2 * (before[1] ^ before[4] ^ before[5])
    start = sign * (0.5 + 2 * (paths ^ before[6]))
    off = tokens[:, None] - start
    errors = (off - 4 * torch.round(off / 4)).square().sum(-1)
    found = (nearest_path(tokens)[:, None] == paths).all(-1).int().argmax(1)
    torch.testing.assert_close(errors.gather(1, found[:, None])[:, 0], errors.amin(1))


def test_tokens_that_are_not_gaussian_keep_to_the_bytes_of_rings() -> None:
    tokens = gaussian_tokens()
    tokens[0], tokens[1], tokens[2, 7:], tokens[3], tokens[4] = 0, 5, 0, 1e-3 * tokens[3], tokens[4] ** 5
    quantizer = RingQuantizer(torch.from_numpy(ring_levels(4)))
    packed, scales = quantizer.quantise(tokens)
    decoded = quantizer.dequantise(packed, 1024) * scales[:, None].float()
    error = (decoded - tokens).norm(dim=1) / tokens.norm(dim=1).clamp(min=1e-9)
    assert error[0] == 0
    assert error[[1, 3]].max() < 0.08
    assert error[[2, 4]].max() < 0.4


def test_phi_s_gives_every_channel_the_same_variance() -> None:
    x = features(rows=8, width=64)
    codec = calibrated("int8-phi-s", x)
    rotation, mean = codec.state()["rotation"][0], codec.state()["mean"][0]
    y = (x[:, 0].flatten(0, 2) - mean) @ rotation.T / codec.state()["std"][0]
    torch.testing.assert_close(y.square().mean(0), torch.ones(64), rtol=1e-4, atol=0)


def test_dct_beats_hadamard_on_smooth_fields_at_no_more_bytes() -> None:
    sample, x = smooth_features(8), smooth_features(4)
    fidelity = {}
    for name in ("int4-hadamard", "int4-dct"):
        fidelity[name] = measure_fidelity(calibrated(name, sample), x)
    assert fidelity["int4-dct"].row_bytes <= fidelity["int4-hadamard"].row_bytes
    assert fidelity["int4-dct"].relative_l2 < 0.85 * fidelity["int4-hadamard"].relative_l2
    assert fidelity["int4-dct"].cosine_p1 > fidelity["int4-hadamard"].cosine_p1


@pytest.mark.parametrize("bits", [3, 4])
def test_rings_take_a_quarter_off_the_error_of_each_transform(bits: int) -> None:
    sample, x = smooth_features(8), smooth_features(2)
    names = [f"int{bits}-{kind}" for kind in ("hadamard", "rings", "dct", "dct-rings")]
    plain, rings, dct, dct_rings = (measure_fidelity(calibrated(name, sample), x) for name in names)
    for better, worse in ((rings, plain), (dct_rings, dct)):
        assert better.row_bytes == worse.row_bytes
        assert better.relative_l2 < 0.75 * worse.relative_l2
        assert better.cosine_p1 > worse.cosine_p1


@pytest.mark.parametrize("name", ["int4-dct", "int4-dct-rings"])
def test_dct_keeps_quiet_tokens_beside_loud_ones(name: str) -> None:
    sample, x = smooth_features(8), smooth_features(4)
    x[:, :, 3, 5] *= 30
    assert measure_fidelity(calibrated(name, sample), x).cosine_p1 > 0.98


def test_dct_refuses_another_grid() -> None:
    with pytest.raises(CodecError, match="another shape"):
        calibrated("int4-dct", features()).encode(features(grid=(6, 4)))


@pytest.mark.parametrize("name", ["int4-dct", "int4-dct-rings", "int3-rings"])
def test_a_width_of_broken_bytes_is_refused(name: str) -> None:
    assert not get_codec(name).fits(100)
    with pytest.raises(CodecError, match="multiple of 8"):
        get_codec(name).layout(4, (24, 24), 100)


def test_bits_are_allocated_for_the_least_error() -> None:
    power = np.array([9.0, 1.0, 0.2, 0.01])
    bits = allocate_bits(power, budget=7)
    distortion = [gaussian_distortion(b) for b in range(9)]

    def error(candidate: tuple[int, ...]) -> float:
        return float(power @ [distortion[b] for b in candidate])

    candidates = [c for c in itertools.product(range(8), repeat=4) if sum(c) == 7]
    assert tuple(bits) == min(candidates, key=error)


def test_fidelity_of_a_lossless_codec() -> None:
    x = features()
    fidelity = measure_fidelity(get_codec("f32"), x)
    assert fidelity.relative_l2 == fidelity.raw_relative_l2 == 0
    assert fidelity.cosine_p1 == pytest.approx(1)
    assert (fidelity.row_bytes, fidelity.float16_ratio) == (x[0].nbytes, 2)


def test_fidelity_counts_cosines_of_standardised_tokens() -> None:
    x = features(rows=8)
    codec = calibrated("int3", x)
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True, correction=0)
    z, decoded = (x - mean) / std, (codec.encode(x).decode() - mean) / std
    cosines = torch.nn.functional.cosine_similarity(z, decoded, dim=-1)
    fidelity = measure_fidelity(codec, x)
    assert fidelity.cosine_mean == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert fidelity.cosine_p1 == pytest.approx(cosines.quantile(0.01).item(), abs=1e-3)
    assert fidelity.relative_l2 == pytest.approx(((z - decoded).norm() / z.norm()).item(), rel=1e-4)


@pytest.mark.parametrize("quantisation", [SCALAR, RINGS])
def test_the_levels_of_each_number_of_bits_are_as_many_as_are_read(quantisation: Quantisation) -> None:
    for bits in range(1, quantisation.most_bits + 1):
        assert quantisation.size(bits) == len(quantisation.levels(bits))
