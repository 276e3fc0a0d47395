"""The kernel that decodes Hadamard codes: interpreted against its eager twin, and compiled for GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from teachercache.pipeline.codecs import Encoded, get_codec, kernels

triton = pytest.importorskip("triton")

from teachercache.pipeline.codecs import decode_kernel, quantized, rings_kernel  # noqa: E402

CODECS = [
    pytest.param("int4-hadamard", 384, id="24 × 16"),
    pytest.param("int8-hadamard", 48, id="a Paley matrix"),
    pytest.param("int3-hadamard", 40, id="codes in two bytes"),
    pytest.param("int5-hadamard", 64, id="powers of two"),
    pytest.param("int4-hadamard", 21, id="an odd width"),
]


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs here, through Triton's interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    for name in ("_decode", "_restore"):
        monkeypatch.setattr(decode_kernel, name, InterpretedFunction(getattr(decode_kernel, name).fn))
    monkeypatch.setattr(quantized, "has_kernel", lambda _: True)


def encoded(name: str, width: int, rows: int = 2) -> Encoded:
    """Rows of two levels of 3 × 3 tokens, one of which holds a massive activation."""
    x = torch.randn(rows, 2, 3, 3, width, generator=torch.Generator().manual_seed(0))
    x[:1, 0, 0, 0, 3] = 400
    return get_codec(name).calibrate(torch.cat([x, x + 1])).encode(x)


@pytest.mark.parametrize(("name", "width"), CODECS)
def test_it_decodes_as_eager_operations_do(name: str, width: int, request: pytest.FixtureRequest) -> None:
    one = encoded(name, width)
    eager = one.decode()
    request.getfixturevalue("on_the_cpu")
    torch.testing.assert_close(one.decode(), eager, rtol=1e-5, atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        got = one.decode(dtype=dtype)
        assert got.dtype == dtype
        half = 2 * torch.finfo(dtype).eps  # the interpreter cuts bfloat16 off
        torch.testing.assert_close(got.float(), eager, rtol=half, atol=half)


@pytest.mark.usefixtures("on_the_cpu")
def test_it_is_one_node_of_a_compiled_graph() -> None:
    one = encoded("int4-hadamard", 64)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(Encoded.decode, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(one, "cpu"), one.decode(), rtol=1e-5, atol=1e-5)
    assert sum("decode_hadamard" in name for name in graphs[0]) == 1


@pytest.mark.usefixtures("on_the_cpu")
def test_no_rows_and_damaged_places_do_not_end_the_process() -> None:
    one = encoded("int4-hadamard", 64, rows=1)
    assert one.decode().shape == (1, 2, 3, 3, 64)
    assert Encoded(one.codec, {name: array[:0] for name, array in one.arrays.items()}).decode().shape[0] == 0
    sound = one.decode()
    one.arrays["outlier_places"][0, 1, 0] = 2**31 - 1
    last: Tensor = one.decode()[0, 1].flatten()
    assert (last != sound[0, 1].flatten()).nonzero().flatten().tolist()[-1] == 9 * 64 - 1


@pytest.mark.parametrize(("capability", "dtype", "precision"), [(80, "bf16", "tf32"), (90, "fp32", "tf32x3")])
def test_it_compiles_for_gpus(
    capability: int, dtype: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An A100 and an H100, a ViT-L's 1024 channels: by tensor cores, in wide stores, spilling no register."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants: dict[str, int | str] = {"BITS": 4, "M": 32, "K": 32}
    constants |= {"PADDED_M": 32, "PADDED_K": 32, "TOKENS": 4, "PRECISION": precision}
    tensors = {"codes": "*u8", "scales": "*fp16", "out": f"*{dtype}"}
    tensors |= dict.fromkeys(("levels", "mean", "signed_std", "left", "right"), "*fp32")
    numbers = dict.fromkeys(("num_tokens", "num_blocks", "num_levels"), "i32")
    names = decode_kernel._decode.arg_names
    signature = {name: (tensors | numbers).get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in tensors}
    source = ASTSource(
        fn=decode_kernel._decode,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = made.asm["ptx"]
    assert re.search(r"mma\.sync|wgmma", text)
    assert "st.global.v4" in text
    assert ".local" not in text


def test_a_gpu_that_must_do_without_says_why_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "2.3.1")
    with pytest.warns(UserWarning, match="triton 2.3.1, expected 3.6"):
        assert not kernels.has_kernel(torch.device("cuda"))
    assert not kernels.has_kernel(torch.device("cpu"))


def test_a_switch_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.has_kernel(torch.device("cuda"))
    monkeypatch.setenv(kernels.TRITON_SWITCH, "0")
    with pytest.warns(UserWarning, match="TEACHERCACHE_TRITON=0"):
        assert not kernels.has_kernel(torch.device("cuda"))


def test_a_machine_without_a_c_compiler_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert kernels.compiles(gpu)
    assert not kernels.compiles(cpu)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    for answer in (kernels.has_kernel, kernels.compiles):
        with pytest.warns(UserWarning, match="no C compiler"):
            assert not answer(gpu)


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, launches = list[Tensor](), list[int]()

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    kernel = MagicMock()
    kernel.__getitem__.return_value = lambda *_, **__: launches.append(len(inside))
    for module, name in ((decode_kernel, "_decode"), (decode_kernel, "_restore"), (rings_kernel, "_nearest")):
        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(quantized, "has_kernel", lambda _: True)
    encoded("int4-hadamard", 64).decode()
    rings_kernel.nearest_rings(torch.ones(33, 8), torch.ones(33), torch.zeros(1, dtype=torch.int32), 4, 1.05)
    assert launches == [1, 1, 1, 1]
