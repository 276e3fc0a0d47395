"""Counts of kernels, bytes and synchronisations: how they are made, and that the product's do not grow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_gpu import (
    BYTES_PER_S,
    CLOCK,
    LANES,
    LEAST_S,
    RING_INSTRUCTIONS,
    Roofline,
    Work,
    fake_gpu,
    give_fake_weights,
)
from benchmarks.inductor import fused, trained
from benchmarks.roofline import count_decode
from teachercache.cache_builder.teachers import resolve_teacher
from teachercache.cache_builder.teachers.teacher_recipe import TeacherRecipe
from teachercache.pipeline.codecs.quantizer import ScalarQuantizer
from teachercache.pipeline.codecs.rings import RingQuantizer, ring_levels

ROOT = Path(__file__).parents[2]
MEASURED = ("dinov2_small", "vit_small_patch16_224")  # of 12 blocks, each a batch of two views of 112²

MOST_KERNELS = {  # lower these where the code gets better
    ("build dinov2_small int4-hadamard", "forward"): 182,
    ("build dinov2_small int4-hadamard", "encode"): 135,
    ("build dinov2_small int4-hadamard", "statistics"): 21,
    ("build dinov2_small f16", "encode"): 9,
    ("build dinov2_small int4-rings", "encode"): 100,
    ("build dinov2_small int4-dct-rings", "encode"): 272,
    ("read dinov2_small int4-dct-rings", "decode"): 259,
    ("read dinov2_small int4-hadamard", "decode"): 2,
    ("read dinov2_small f16", "decode"): 0,
    ("step vit_small_patch16_224", "forward"): 490,
    ("step vit_small_patch16_224", "backward"): 737,
    ("step vit_small_patch16_224", "optimizer"): 5,
}
WAITS = {
    ("build dinov2_small int4-hadamard", "forward"): 1,  # for the clock
    ("build dinov2_small f16", "forward"): 1,
    ("build dinov2_small int4-rings", "forward"): 1,
    ("build dinov2_small int4-dct-rings", "forward"): 1,
}


def counted(work: Callable[[], object]) -> Work:
    roofline = Roofline()
    with FakeTensorMode(), roofline, roofline.stage("all"):
        work()
    return roofline.stages["all"]


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def test_a_product_reads_two_matrices_and_writes_one() -> None:
    work = counted(lambda: on_gpu(4, 8) @ on_gpu(8, 16))
    assert (work.kernels, work.flops) == (1, 2 * 4 * 8 * 16)
    assert work.nbytes == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert work.bound_s == LEAST_S


def test_bytes_bound_what_is_large() -> None:
    half = torch.bfloat16
    copy = counted(lambda: on_gpu(1 << 30, dtype=half).clone())
    assert copy.bound_s == pytest.approx(2 * 2 * (1 << 30) / 3.0e12)
    product = counted(lambda: on_gpu(8192, 8192, dtype=half) @ on_gpu(8192, 8192, dtype=half))
    assert product.bound_s == pytest.approx(2 * 8192**3 / 700e12)


def test_views_and_empty_memory_are_free() -> None:
    work = counted(lambda: on_gpu(4, 8).T.reshape(2, 16).view(32)[None].expand(3, 32).detach())
    assert (work.kernels, work.nbytes) == (1, 2 * 4 * 32)  # what reshape had to copy


def test_an_expanded_tensor_lies_in_memory_once() -> None:
    assert counted(lambda: on_gpu(1, 8).expand(1000, 8) + 1).nbytes == 4 * (8 + 8000)


def test_what_is_changed_in_place_is_read_and_written_and_what_is_overwritten_is_not_read() -> None:
    assert counted(lambda: on_gpu(10).add_(1)).nbytes == 80
    assert counted(lambda: on_gpu(10).zero_()).nbytes == 40
    assert counted(lambda: on_gpu(10).copy_(on_gpu(10))).nbytes == 80


def test_a_gather_reads_as_much_as_it_writes() -> None:
    picked = counted(lambda: on_gpu(1000, 8).index_select(0, on_gpu(2, dtype=torch.int64)))
    assert picked.nbytes == 2 * 4 * 16 + 16


def test_what_is_scattered_touches_the_places_that_it_sets() -> None:
    assert counted(lambda: on_gpu(1000).scatter_(0, on_gpu(10, dtype=torch.int64), 0)).nbytes == 10 * (8 + 4)
    put = counted(lambda: on_gpu(1000, 8).index_put_((on_gpu(2, dtype=torch.int64),), on_gpu(2, 8)))
    assert put.nbytes == 2 * 8 + 2 * 4 * 16


def test_copies_between_host_and_device_are_no_kernels() -> None:
    work = counted(lambda: (torch.empty(10).to("cuda"), on_gpu(5).cpu()))
    assert (work.kernels, work.to_device, work.to_host) == (0, 40, 20)
    assert work.bound_s == pytest.approx(60 / BYTES_PER_S)


def test_what_the_host_computes_is_not_counted() -> None:
    assert counted(lambda: torch.zeros(10).add(1).to("cuda")).kernels == 0


def test_asking_for_a_value_waits() -> None:
    assert counted(lambda: bool(on_gpu(10).isfinite().all())).synchronisations == 1
    assert counted(lambda: on_gpu(10).sum().item()).synchronisations == 1
    assert counted(lambda: on_gpu(10).sum()).synchronisations == 0


def test_an_index_on_the_host_is_a_copy_that_blocks() -> None:
    work = counted(lambda: on_gpu(100)[torch.zeros(3, dtype=torch.int64)])
    assert (work.kernels, work.synchronisations, work.to_device) == (1, 1, 24)


def test_stages_keep_their_own_counts() -> None:
    roofline = Roofline()
    with FakeTensorMode(), roofline, roofline.stage("outer"):
        on_gpu(2).neg()
        with roofline.stage("inner"):
            on_gpu(2).neg().neg()
        on_gpu(2).neg()
    assert {name: work.kernels for name, work in roofline.stages.items()} == {"outer": 2, "inner": 2}


def test_attention_in_three_dimensions_is_fused_only_when_asked_for() -> None:
    def attend(fused: bool, *shape: int) -> Work:
        q, bias = ((*shape, 64), (*shape, shape[-1]))
        with fake_gpu(fused):
            return counted(
                lambda: torch.nn.functional.scaled_dot_product_attention(
                    on_gpu(*q), on_gpu(*q), on_gpu(*q), attn_mask=on_gpu(*bias)
                )
            )

    assert attend(False, 2, 12, 16).kernels == attend(True, 24, 16).kernels == 1
    assert attend(False, 24, 16).kernels > 3


def test_compiled_operations_are_one_kernel_that_reads_once_and_writes_once() -> None:
    with fake_gpu() as fake, fake:
        work = fused(lambda x: ((2 * x + 1).relu() @ x.T).sum(), [on_gpu(64, 1024)])
    first, product = 2 * 4 * 64 * 1024, 4 * (2 * 64 * 1024 + 64 * 64)
    assert work.nbytes == pytest.approx(first + product + 4 * 64 * 64, rel=0.01)
    assert (work.by_kernel["mm"], work.flops) == (1, 2 * 64 * 64 * 1024)
    assert work.kernels <= 4  # a sum takes two


class Attention(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.register_buffer("scale", torch.full((64,), 0.5))

    def forward(self, x: Tensor, twice: bool) -> dict[str, Tensor]:
        q, k, v = self.qkv(x * self.scale).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return {"out": self.out(nn.functional.gelu(out)) * (2 if twice else 1)}


def test_a_compiled_module_and_its_gradient_are_counted_once_for_the_same_shapes() -> None:
    roofline = Roofline("cpu")
    with fake_gpu() as fake:
        with torch.device("meta"):
            module = Attention()
        give_fake_weights(module, fake, "cpu")
        run = trained(module, roofline)
        with fake, roofline, roofline.stage("forward"):
            for _ in range(2):
                out = run(torch.empty(4, 16, 64), twice=True)["out"]
            (10 * out).sum().backward()
    forward, backward = roofline.stages["forward"], roofline.stages["backward"]
    products = 2 * 4 * 16 * 64 * 256  # of the two layers
    attention = 4 * 4 * 2 * 16 * 16 * 32
    assert out.shape == (4, 16, 64)
    assert forward.flops == 2 * (products + attention)
    # Of both layers the gradient by the weights, of one that by its input; of attention two and a half times.
    assert backward.flops == 2 * (products + 2 * 4 * 16 * 64 * 64 + 5 * attention // 2)
    assert backward.by_kernel["mm"] == 2 * 3
    assert forward.kernels <= 2 * 7 + 3  # the last three are of the loss, which is not compiled
    assert forward.by_kernel["gelu"] == 0  # it is part of another kernel
    assert module.out.weight.grad is None


def test_scales_are_chosen_and_codes_packed_in_one_kernel_that_reads_tokens_once() -> None:
    tokens = 16 * 4 * 24 * 24  # a batch of a ViT-L
    with fake_gpu() as fake, fake:
        quantizer = ScalarQuantizer(on_gpu(16))
        work = fused(quantizer.quantise, [on_gpu(tokens, 1024)])
    assert work.kernels == 1
    assert work.nbytes == pytest.approx(tokens * (1024 * 4 + 512), rel=0.05)


def test_the_search_of_rings_is_counted_by_its_instructions_eager_and_compiled() -> None:
    tokens = 16 * 4 * 24 * 24
    roofline = Roofline()
    with fake_gpu() as fake, fake:
        quantizer = RingQuantizer(on_gpu(*ring_levels(4).shape))
        compiled = fused(quantizer.quantise, [on_gpu(tokens, 1024)])
        with roofline, roofline.stage("all"):
            quantizer.quantise(on_gpu(tokens, 1024))
    once = tokens * 1024 * RING_INSTRUCTIONS
    for work in (roofline.stages["all"], compiled):
        assert work.flops >= 1.4 * once
        assert work.bound_s > once / (LANES * CLOCK)
        assert work.synchronisations == 0


def test_the_outliers_are_restored_by_a_kernel_eager_and_compiled() -> None:
    recipe = TeacherRecipe(preset="dinov2_small", pretrained=False, grid="adjoint", codec="int4-hadamard")
    spec = resolve_teacher("dinov2_small", recipe, (112, 112))
    with fake_gpu() as fake:
        works = [count_decode(fake, spec, 2, compiles)[0] for compiles in (False, True)]
    assert [work.by_kernel["restore"] for work in works] == [1, 1]
    assert works[0].bound_s == pytest.approx(works[1].bound_s)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """In a process of its own: grids keep constants by their device, and those of fake devices are fake."""
    teacher, stem = MEASURED
    command = [sys.executable, "-m", "benchmarks.roofline", "--teachers", teacher, "--stem", stem]
    command += ["--size", "112", "--batch-size", "2"]
    command += ["--codecs", "int4-hadamard", "f16", "int4-rings", "int4-dct-rings"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    sections: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return sections


def test_the_product_launches_no_more_kernels(found: dict[str, Any]) -> None:
    kernels = {key: found["sections"][key[0]][key[1]]["kernels"] for key in MOST_KERNELS}
    assert {key: count for key, count in kernels.items() if count > MOST_KERNELS[key]} == {}


def test_the_product_waits_for_the_device_no_more_often(found: dict[str, Any]) -> None:
    stages = {(section, stage): work for section, s in found["sections"].items() for stage, work in s.items()}
    assert {key: work["waits"] for key, work in stages.items() if work["waits"] > WAITS.get(key, 0)} == {}


def test_what_goes_to_the_host_is_what_a_row_takes(found: dict[str, Any]) -> None:
    """f16: four levels of 7×7 tokens of 384 values, and a norm of each level."""
    written = found["sections"]["build dinov2_small f16"]["write"]["MB out"]
    assert written == pytest.approx(2 * (4 * 7 * 7 * 384 * 2 + 4 * 4) / 1e6)
    assert found["sections"]["read dinov2_small f16"]["decode"]["MB in"] < written
    assert found["facts"]["build / bare, int4-hadamard"] > found["facts"]["build / bare, f16"] > 1
