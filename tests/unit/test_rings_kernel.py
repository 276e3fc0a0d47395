"""The kernel that encodes rings: interpreted against its eager twin, and compiled for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from teachercache.pipeline.codecs import rings
from teachercache.pipeline.codecs.rings import RingQuantizer, ring_levels

triton = pytest.importorskip("triton")

from teachercache.pipeline.codecs import rings_kernel  # noqa: E402


@pytest.mark.parametrize("bits", [2, 4])
def test_it_gives_the_codes_of_its_twin(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent, constant, sparse and heavy-tailed tokens too, and those that fit at later tries."""
    from triton.runtime.interpreter import InterpretedFunction

    quantizer = RingQuantizer(torch.from_numpy(ring_levels(bits)))
    tokens = torch.randn(33, 8, generator=torch.Generator().manual_seed(0))
    tokens[0], tokens[1], tokens[2, 1:], tokens[3] = 0, 5, 0, tokens[3] ** 3
    codes, scales = quantizer.quantise(tokens)
    monkeypatch.setattr(rings_kernel, "_nearest", InterpretedFunction(rings_kernel._nearest.fn))
    monkeypatch.setattr(rings, "has_kernel", lambda _: True)
    got_codes, got_scales = quantizer.quantise(tokens)
    assert torch.equal(got_codes, codes)
    assert torch.equal(got_scales, scales)
    tokens[4, 2] = torch.inf
    assert quantizer.quantise(tokens[4:5])[1].isfinite().tolist() == [False]
    assert quantizer.quantise(tokens[:0])[0].shape == (0, bits)


@pytest.mark.parametrize(("capability", "tries"), [(80, 4), (90, 1)])
def test_it_compiles_for_gpus(
    capability: int, tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An A100 and an H100: all states stay in the registers of their thread, and none is spilled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = dict.fromkeys(("order", "num_left"), "*i64") | {"scales": "*fp16"}
    tensors |= dict.fromkeys(("tokens", "bases"), "*fp32")
    tensors |= dict.fromkeys(("rank_of_pair", "is_left", "choices", "ranks"), "*i32")
    numbers = dict.fromkeys(("width", "num_programs", "first", "rounds"), "i32") | {"growth": "fp32"}
    names = rings_kernel._nearest.arg_names
    signature = {name: (tensors | numbers).get(name, "constexpr") for name in names}
    constants = {(names.index("BITS"),): 4, (names.index("TRIES"),): tries, (names.index("THREADS"),): 32}
    source = ASTSource(fn=rings_kernel._nearest, signature=signature, constexprs=constants)
    options = {"num_warps": 1, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert ".local" not in made.asm["ptx"]
    assert made.metadata.shared <= 128  # to tell the tries of a token apart
