"""Codecs on a GPU give what they give on a CPU, up to the rounding of matrix products."""

import pytest
import torch

from teachercache.pipeline.codecs import codec_names, get_codec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", [name for name in codec_names() if name.startswith("int")])
def test_codes_of_the_gpu_decode_like_those_of_the_cpu(name: str) -> None:
    x = torch.randn(4, 2, 8, 8, 384, generator=torch.Generator().manual_seed(0))
    codec = get_codec(name).calibrate(x)
    on_cpu, on_gpu = codec.encode(x), codec.encode(x.cuda())
    torch.testing.assert_close(on_gpu.decode("cpu"), on_gpu.decode("cuda").cpu(), rtol=1e-4, atol=1e-4)
    same = (on_gpu.tensors()["codes"].cpu() == on_cpu.tensors()["codes"]).float().mean()
    has_ties = name.endswith("rings")  # near ones, between paths of a trellis
    assert same > (0.9 if has_ties else 0.999)
    errors = [(encoded.decode("cpu") - x).norm() for encoded in (on_cpu, on_gpu)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


@pytest.mark.parametrize("name", ["int8", "int4-hadamard", "int4-rings", "int4-dct"])
def test_compiled_decode_equals_eager_decode(name: str) -> None:
    x = torch.randn(4, 2, 8, 8, 384, device="cuda")
    encoded = get_codec(name).calibrate(x).encode(x)
    compiled = torch.compile(encoded.codec.decode_tensors, fullgraph=True, dynamic=False)
    actual = compiled(encoded.tensors(), "cuda", torch.float16)
    torch.testing.assert_close(actual, encoded.decode("cuda", torch.float16), rtol=2e-3, atol=2e-3)
