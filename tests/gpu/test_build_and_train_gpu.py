"""What a build writes on a GPU, and what a step reads there, is what a CPU gives, up to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from teachercache import FeatureCache, build
from teachercache.cache_builder.compute import DeviceCopies
from teachercache.pipeline.grids import adjoint, gram, nearest
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.student.losses.distillation import DistillationLoss
from teachercache.student.training.targets import CachedTargets, OnlineTargets
from tests.make_cache import build_recipe, make_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TINY = {"model": "test_vit", "pretrained": False, "precision": "float32", "cls_token": True}
TEACHERS = {
    "native": TINY | {"codec": "f32"},
    "adjoint": TINY | {"grid": "adjoint", "codec": "int4-hadamard"},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, images: Path) -> FeatureCache:
    recipe = build_recipe(tmp_path_factory.mktemp("gpu") / "cache", images, teachers=TEACHERS)
    return build(recipe, Console(quiet=True)).cache


def test_a_build_on_the_gpu_is_that_of_the_cpu(
    cache: FeatureCache, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = build_recipe(tmp_path / "cache", images, teachers=TEACHERS)
    on_cpu = build(recipe, Console(quiet=True)).cache
    rows = range(cache.spec.num_rows)
    for name in TEACHERS:
        one, other = (each.read(rows)[name].decode() for each in (cache, on_cpu))
        cosines = torch.nn.functional.cosine_similarity(one, other, dim=-1)
        assert cosines.min() > (0.9999 if name == "native" else 0.97)


def test_copies_arrive_before_they_are_used() -> None:
    copies = DeviceCopies(torch.nn.Linear(1, 1).cuda())
    for value in range(8):
        views = copies.start(torch.full((1 << 24,), value, dtype=torch.uint8))
        torch.cuda._sleep(10_000_000)
        copies.wait(views)
        assert int(views.max()) == int(views.min()) == value
        copies.synchronize()


def test_codes_leave_while_the_next_are_computed() -> None:
    copies = DeviceCopies(torch.nn.Linear(1, 1).cuda())
    pending = []
    for value in range(8):
        torch.cuda._sleep(10_000_000)
        codes, arrived = copies.to_host({"codes": torch.full((1 << 24,), value, device="cuda")})
        pending.append((codes["codes"], arrived))
    for value, (host, arrived) in enumerate(pending):
        arrived()
        assert host.is_pinned()
        assert int(host.max()) == int(host.min()) == value


def test_targets_on_the_gpu_are_those_on_the_cpu(cache: FeatureCache) -> None:
    sampler = ShardShuffleSampler(cache, batch_size_per_process=4)
    names, generator = list(TEACHERS), torch.Generator().manual_seed(0)
    online = OnlineTargets(cache, ["native"], torch.device("cuda"))
    with FeatureLoader(cache, sampler, extra_sizes=online.extra_sizes, pin_memory=True) as loader:
        batch = next(iter(loader))
        grid, width = cache.spec.teachers["native"].native_grid, cache.spec.teachers["native"].width
        levels = cache.spec.teachers["native"].num_levels
        maps = [torch.randn(4, width, *grid, generator=generator) for _ in range(levels)]
        losses = []
        for device in ("cpu", "cuda"):
            targets = CachedTargets(cache, names, torch.device(device))(batch)
            student = {name: [level.to(device) for level in maps] for name in names}
            losses.append(DistillationLoss()(student, targets).total.item())
        live = online(batch)["native"]
        cached = CachedTargets(cache, ["native"], torch.device("cuda"))(batch)["native"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(live.feature_maps_BSHWC, cached.feature_maps_BSHWC, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("resample", [adjoint, gram, nearest])
def test_grids_on_the_gpu_are_those_on_the_cpu(resample: object) -> None:
    maps = torch.randn(2, 8, 24, 24, generator=torch.Generator().manual_seed(0))
    assert callable(resample)
    torch.testing.assert_close(
        resample(maps.cuda(), (27, 27)).cpu(), resample(maps, (27, 27)), rtol=1e-4, atol=1e-4
    )
