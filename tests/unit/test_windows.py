"""Windows of wide views: the same part of pixels, labels and maps, drawn by (seed, sample, epoch)."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import signals
from teachercache import FeatureCache, build, load_student, render_view
from teachercache.pipeline.crops import draw_window, uniforms
from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.grids import Places, gram, stored_form, upsample
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.records.spec import GridSpec, TeacherSpec
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.windows import cut, grid_in
from teachercache.student.datasets.scenes import write_scenes
from teachercache.student.similarity import representation_similarity
from teachercache.student.training.targets import target_of
from teachercache.student.training.train import train
from tests.make_cache import build_recipe, teacher_spec
from tests.train_recipes import logged, train_recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

WIDE = ViewPolicy(size=(32, 48), margin=32)
CPU = torch.device("cpu")
TINY: dict[str, Any] = {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "f32"}
TEACHERS = {
    "native": TINY,
    "fine": TINY | {"image_size": [96, 112]},  # 6×7 tokens on a view of 64×80: windows lie between them
    "adjoint": TINY | {"image_size": [96, 112], "grid": "adjoint"},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, train=6, val=1, size=(60, 90))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> FeatureCache:
    """Two wide views of each of six scenes, and real features of three small teachers on them."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    views = {"policy": "multitask_train", "num_views": 2, "size": [32, 48], "margin": 32}
    recipe = build_recipe(folder, scenes / "images/train", teachers=TEACHERS, views=views)
    return build(recipe, Console(quiet=True)).cache


def ramps(height: int, width: int) -> Tensor:
    """(1, 1, H, W, 2): the places of the tokens' centres, as shares of the view."""
    rows, columns = ((torch.arange(n) + 0.5) / n for n in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)[None, None]


def test_windows_are_drawn_evenly_by_seed_sample_and_epoch() -> None:
    drawn = [draw_window(WIDE, 0, f"s{i}", epoch) for i in range(100) for epoch in range(9)]
    counts = Counter(drawn)
    assert sorted(counts) == [(row, column) for row in (0, 16, 32) for column in (0, 16, 32)]
    assert min(counts.values()) > 60
    assert drawn != [draw_window(WIDE, 1, f"s{i}", epoch) for i in range(100) for epoch in range(9)]
    assert draw_window(WIDE, 5, "n01440764_10026", 7) == (32, 32), "a change would make seeds mean others"


def test_windows_and_crops_of_one_seed_are_not_of_the_same_numbers() -> None:
    policy = ViewPolicy(size=(32, 32), margin=32)
    rows = [draw_window(policy, policy.seed, f"s{i}", 0)[0] for i in range(300)]
    first = uniforms(policy.seed, [f"s{i}" for i in range(300)], np.array([0]))[:, 0, 0]
    assert abs(np.corrcoef(rows, first)[0, 1]) < 0.15


def test_on_the_student_s_grid_a_window_is_a_slice() -> None:
    maps = torch.randn(3, 4, 4, 5, 8, dtype=torch.float64)
    windows = np.array([[0, 0], [16, 32], [32, 16]])
    found = cut(maps, windows, WIDE)
    for i, (row, column) in enumerate((windows // 16).tolist()):
        assert torch.equal(found[i], maps[i, :, row : row + 2, column : column + 3])


@pytest.mark.parametrize("grid", [(4, 5), (6, 7), (8, 10), (3, 3), (2, 2), (1, 1), (64, 80)])
def test_elsewhere_it_is_tokens_that_lie_in_it_and_their_places(grid: tuple[int, int]) -> None:
    """`ramps` of the view say where a token is; put into the window they are its place there."""
    windows = np.array([[row, column] for row in (0, 16, 32) for column in (0, 16, 32)])
    found = cut(ramps(*grid).expand(9, -1, -1, -1, -1), windows, WIDE)
    places = grid_in(grid, windows, WIDE, CPU)
    assert isinstance(places, Places)
    assert found.shape[2:4] == places.size == WIDE.seen_grid(grid)
    stored = torch.tensor(WIDE.stored_size)
    begin, share = torch.from_numpy(windows) / stored, torch.tensor(WIDE.size) / stored
    for axis, centres in enumerate(places):
        if grid[axis] > 1:
            assert (centres >= 0).all()
            assert (centres < 1).all()
        of_view = begin[:, axis, None] + centres * share[axis]
        assert torch.allclose(found[:, 0].select(2 - axis, 0)[..., axis], of_view.float(), atol=1e-6)


@pytest.mark.parametrize("grid", [(18, 24), (13, 21), (31, 16)])
def test_of_its_tokens_a_window_compares_what_the_whole_view_would(grid: tuple[int, int]) -> None:
    """But for those within half a patch of its edge, behind which the student sees nothing."""
    views, windows = ViewPolicy(size=(128, 128), margin=64), np.array([[16, 48], [0, 64], [64, 32]])
    student = torch.randn(3, 1, 12, 12, 5, dtype=torch.float64)
    of_view = upsample(student[:, 0].permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)[:, None]
    places = grid_in(grid, windows, views, CPU)
    assert isinstance(places, Places)
    in_window = upsample(cut(student, windows, views)[:, 0].permute(0, 3, 1, 2), places).permute(0, 2, 3, 1)
    inner = [(centres > 1 / 16) & (centres < 15 / 16) for centres in places]
    apart = (in_window - cut(of_view, windows, views)[:, 0]).abs().amax(-1)
    assert (apart * inner[0][:, :, None] * inner[1][:, None]).max() < 1e-12
    assert apart.max() > 0.1


def test_tokens_that_fill_the_window_are_sampled_as_they_always_were() -> None:
    student, windows = torch.randn(1, 8, 2, 3, dtype=torch.float64), np.array([[16, 32]])
    for grid in ((4, 5), (8, 10), (4, 15)):
        places, seen = grid_in(grid, windows, WIDE, CPU), WIDE.seen_grid(grid)
        assert torch.allclose(upsample(student, places), upsample(student, seen))
        assert torch.allclose(gram(student, places), gram(student, seen))


def adjoint_and_native(
    spec: TeacherSpec, maps: Tensor, windows: Any, views: ViewPolicy, student: Size = (4, 5)
) -> list[Any]:
    adjoint = spec.model_copy(update={"grid": GridSpec(kind="adjoint", size=student)})
    return [
        target_of(stored_form(maps, one.grid), None, one, np.array(windows), views) for one in (adjoint, spec)
    ]


def test_the_adjoint_of_a_window_is_exact_where_both_grids_are_one() -> None:
    spec = teacher_spec(width=8).model_copy(update={"native_grid": (4, 5)})
    maps, student = torch.randn(2, 4, 4, 5, 8), torch.randn(2, 8, 2, 3)
    adjoint, native = adjoint_and_native(spec, maps, [[0, 16], [32, 32]], WIDE)
    for distance in ("squared_error", "smooth_l1"):
        for cosine in ("flattened", "token"):
            found = adjoint.compare(1, student, cosine, distance)
            assert torch.stack(found).allclose(
                torch.stack(native.compare(1, student, cosine, distance)), 1e-4
            )


def test_the_norms_of_windows_are_shares_of_the_view_s() -> None:
    """‖t‖ itself where the window is the view, and less by what the upsampled map has outside."""
    spec = teacher_spec(width=8).model_copy(update={"native_grid": (6, 7)})
    maps = torch.randn(2, 4, 6, 7, 8)
    whole, _ = adjoint_and_native(spec, maps, [[0, 0], [0, 0]], ViewPolicy(size=(64, 80)))
    assert torch.allclose(whole.norms_BS, maps.flatten(2).norm(dim=2))
    part, _ = adjoint_and_native(spec, maps, [[0, 0], [16, 16]], WIDE)
    shares = [
        one.norms_BS[:, 0]
        / upsample(one.feature_maps_BSHWC[:, 0].permute(0, 3, 1, 2), one.grid).flatten(1).norm(dim=1)
        for one in (part, whole)
    ]
    assert torch.allclose(*shares)
    assert (shares[0] > 1).all()


@pytest.mark.parametrize("grid", [(18, 18), (32, 32)])
def test_the_adjoint_of_a_window_leads_where_the_teacher_s_own_tokens_lead(grid: tuple[int, int]) -> None:
    """Near the target, where it is hardest: by what a gradient shares with that from the native map."""
    views, windows = ViewPolicy(size=(192, 192), margin=64), np.array([[0, 16], [16, 48], [32, 32], [64, 0]])
    fields = signals.correlated(4, 1, grid, 64, seed=0)
    maps = (fields / fields.std() + signals.white(4, 1, grid, 64, seed=1)).double()
    maps = (maps - maps.mean((0, 2, 3), keepdim=True)) / maps.std((0, 2, 3), keepdim=True)
    spec = teacher_spec(width=64).model_copy(update={"native_grid": grid, "block_indices": (0,)})
    adjoint, native = adjoint_and_native(spec, maps, windows, views, (16, 16))
    near = adjoint.feature_maps_BSHWC[:, 0].permute(0, 3, 1, 2)
    noise = torch.randn(near.shape, generator=torch.Generator().manual_seed(0), dtype=near.dtype)
    student = (near + 0.3 * noise).requires_grad_()
    for cosine, least in (("flattened", 0.92), ("token", 0.87)):
        gradients = [
            torch.autograd.grad(target.compare(0, student, cosine, "squared_error")[0].mean(), student)[
                0
            ].flatten()
            for target in (adjoint, native)
        ]
        assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > least


def test_batches_hold_the_windows_of_pixels_and_whole_renders_for_teachers(cache: FeatureCache) -> None:
    sampler = ShardShuffleSampler(cache, batch_size_per_process=4, seed=3)
    with FeatureLoader(cache, sampler, seed=3, extra_sizes={(32, 48), (64, 80)}, threads=3) as loader:
        for step, batch in enumerate(islice(loader, 6)):
            assert set(batch.renders) == {(32, 48), (64, 80)}
            for i, (row, epoch) in enumerate(zip(batch.rows.tolist(), sampler.epochs(step), strict=True)):
                image, view = cache.image(int(cache.index.locate(row)[0])), cache.view(row)
                place = draw_window(cache.spec.views, 3, batch.sample_keys[i], int(epoch))
                assert tuple(batch.windows[i]) == place
                assert torch.equal(batch.images[i], render_view(image, view.window(place, (32, 48))))
                for size in batch.renders:  # as large as the student's, and yet of the whole view
                    assert torch.equal(batch.renders[size][i], render_view(image, view, size))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: FeatureCache, scenes: Path) -> Path:
    return run(cache, scenes, tmp_path_factory.mktemp("run") / "cached")


def run(cache: FeatureCache, scenes: Path, output: Path, **changes: Any) -> Path:
    changes = {
        "schedule": {"max_steps": 20},
        "optimizer": {"lr": 2e-5},
        "checkpoint_every_steps": 10,
        "multitask": {"dataset": {"kind": "scenes", "root": str(scenes)}},
    } | changes
    train(train_recipe(cache.storage.url, output, **changes))
    AcceleratorState._reset_state(reset_partial_state=True)
    return output


def test_online_teachers_give_the_losses_of_the_cache(
    cache: FeatureCache, scenes: Path, trained: Path, tmp_path: Path
) -> None:
    """With labels beside them, on windows that lie on tokens, between them, and on an adjoint grid."""
    online = run(cache, scenes, tmp_path / "online", features="online")
    assert len(logged(trained)) == 20
    assert logged(online) == pytest.approx(logged(trained), rel=1e-5)


def test_a_resumed_run_is_the_same_run(
    cache: FeatureCache, scenes: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "checkpoints/step_00000010", tmp_path / "checkpoints/step_00000010")
    shutil.copy(trained / "metrics.jsonl", tmp_path)
    run(cache, scenes, tmp_path)
    assert logged(tmp_path) == logged(trained)
    weights, expected = (load_file(folder / "student/model.safetensors") for folder in (tmp_path, trained))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


def test_students_are_drawn_and_measured_on_windows(
    cache: FeatureCache, scenes: Path, trained: Path, tmp_path: Path
) -> None:
    drawn = run(cache, scenes, tmp_path, schedule={"max_steps": 1}, picture_every_steps=1)
    assert len(list((drawn / "tensorboard").iterdir())) == 1
    student = load_student(trained / "student")
    found = representation_similarity(student, cache, threads=1)
    assert found.keys() == TEACHERS.keys()
    assert all(-1 <= similarity.mean <= 1 for similarity in found.values())


@pytest.mark.parametrize("features", ["cached", "online"])
def test_a_student_of_another_patch_is_refused(cache: FeatureCache, tmp_path: Path, features: str) -> None:
    student = {"stem": "vit_small_patch8_224", "pretrained": False}
    with pytest.raises(
        RecipeError, match=r"(?s)move by other steps.*\(4, 6\) tokens.*\(2, 3\), of 16 pixels"
    ):
        train(train_recipe(cache.storage.url, tmp_path, student=student, features=features))
