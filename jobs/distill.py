"""From a folder of images to a student in one command: `teachercache distill`, and `make demo` above it.

Two shipped recipes, `photos_cache` and `photos_student`, with keys that follow from the images, the device
and the disk. Both are written beside the student, complete: the same command goes on with them.
"""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
import yaml

from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.builder import BuildResult, prepare
from teachercache.cache_builder.builder import build as build_cache
from teachercache.cache_builder.plan import Plan
from teachercache.cache_builder.teachers import build_teacher, resolve_teachers
from teachercache.cache_builder.teachers.registry import teacher_parameters
from teachercache.jobs.recipes import SHIPPED, find_recipe
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import (
    CacheError,
    EmptySourceError,
    RecipeError,
    WeightsNotFoundError,
    in_a_line,
)
from teachercache.pipeline.places.durable import make_folder
from teachercache.pipeline.sources.keys import OK
from teachercache.pipeline.terminal import Terminal
from teachercache.pipeline.units import human_bytes
from teachercache.student.models.stem import Stem
from teachercache.student.saving import replacing, saving
from teachercache.student.training.checkpoint import newest_checkpoint
from teachercache.student.training.preflight import Preflight, preflight
from teachercache.student.training.run import RunResult
from teachercache.student.training.train import train as train_student
from teachercache.student.training.train_recipe import TrainRecipe, run_identity

BUILD, TRAIN = "photos_cache", "photos_student"
COMMANDS = {BUILD: "teachercache build", TRAIN: "accelerate launch jobs/train_student.py"}
_ON_CPU = {
    BUILD: [
        "teachers={dinov2: {preset: dinov2_small, grid: adjoint, codec: int8-hadamard},"
        " clip: {preset: openai_clip_base_patch32, codec: int8-hadamard}}",
        "views.num_views=2",
    ],
    TRAIN: [
        *("student.stem=vit_tiny_patch16_224", "schedule.max_steps=100", "mixed_precision=no"),
        *("global_batch_size=8", "batch_size_per_process=8"),
    ],
}
_LEAST_IMAGES = 4
_USED_MEMORY = 0.8  # of what is free: allocators and codecs take the rest
_KEPT = 24  # float32 values of a channel of a token: of one block forward, and of each block in training

Settings = Sequence[str]
LocalPath = str | os.PathLike[str]


def distill(
    images: LocalPath,
    *,
    cache: LocalPath | None = None,
    output: LocalPath | None = None,
    pretrained: bool = True,
    build: Settings = (),
    train: Settings = (),
) -> tuple[BuildResult, RunResult]:
    """Build a cache of `images` and train a small student from it; after any stop the same call goes on.

    `cache` and `output` are IMAGES.teachercache and IMAGES.student, beside the images, unless given; `build`
    and `train` are overrides of the two recipes. `pretrained`: weights from the Hub; without it random ones,
    for a trial. What stands in the way is raised before anything is written: as by `choose_recipes`, and
    `WeightsNotFoundError`. Later problems are those of `build` and `train`.
    """
    return follow(*choose_recipes(images, cache, output, pretrained, build, train))


def follow(build_recipe: BuildRecipe, train_recipe: TrainRecipe) -> tuple[BuildResult, RunResult]:
    """Build and train as `distill` does, once both are chosen."""
    console = Terminal()
    folder = Path(train_recipe.output)
    if not (folder / f"{TRAIN}.yaml").exists():
        _require_weights(build_recipe, train_recipe)
    with saving("What was chosen", folder, "it goes on"):
        make_folder(folder)
        for name, text in in_yaml(build_recipe, train_recipe).items():
            with replacing(folder / f"{name}.yaml") as file:
                file.write_text(text)
    console.rule("Teachers → cache")
    built = build_cache(build_recipe, console)
    if built.quarantined:
        names = f"teachercache inspect {build_recipe.cache}"
        console.print(f"{built.quarantined} images cannot be decoded and are left out: {names}")
    console.rule("Cache → student")
    trained = train_student(_in_steps(train_recipe, built.cache.valid_samples().size))
    if random := ", ".join(built.cache.spec.random_weights):
        console.print(f"Random weights: {random}. They only show that the parts work together.")
    if trained.student is not None:
        lines = usage(trained.student, built.cache)
        console.print(f"The student is in {trained.student}. Five lines of Python use it:\n\n{lines}\n")
        console.print(f"To change more: {BUILD}.yaml and {TRAIN}.yaml in {folder} state all that was done.")
    return built, trained


def choose_recipes(
    images: LocalPath,
    cache: LocalPath | None,
    output: LocalPath | None,
    pretrained: bool,
    build: Settings,
    train: Settings,
) -> tuple[BuildRecipe, TrainRecipe]:
    """The recipes that `distill` follows, by the same arguments. Writes nothing.

    Raises `SourceError` where the images are not there or too few, and `RecipeError` for keys that make no
    sense, a place that cannot be written to, and teachers or a student that the memory cannot hold.
    """
    images = _absolute(images)
    cache = _absolute(cache or f"{images}.teachercache")
    output = _absolute(output or f"{cache.removesuffix('.teachercache')}.student")
    _require_place(cache, "--cache")
    _require_place(output, "--output")
    begun = Path(output, f"{TRAIN}.yaml").exists()  # the last that is written
    folder = Path(output) if begun else SHIPPED
    on_gpu = torch.cuda.is_available() and "runner.device=cpu" not in build
    chosen = {} if begun or on_gpu else _ON_CPU
    weights = f"pretrained={str(pretrained).lower()}"

    def builds(fitting: Settings = ()) -> BuildRecipe:
        keys = [f"source.path={images}", f"cache={cache}", *chosen.get(BUILD, ()), *fitting, *build]
        teachers = find_recipe(BuildRecipe, folder / f"{BUILD}.yaml", keys).teachers
        for name, teacher in teachers.items():
            of_it = ("teachers=", f"teachers.{name}=", f"teachers.{name}.pretrained=")
            is_said = any(key.startswith(of_it) and "pretrained" in key for key in build)
            if not teacher.checkpoint and not is_said:
                keys.append(f"teachers.{name}.{weights}")
        return find_recipe(BuildRecipe, folder / f"{BUILD}.yaml", keys)

    built = builds()
    drafted, spec, plan = prepare(built, Terminal(quiet=True))
    count = _sound(drafted.samples)
    if count < _LEAST_IMAGES:
        raise EmptySourceError(
            "There are too few images to learn from.",
            got=f"{count} in {images}",
            expected=f"at least {_LEAST_IMAGES}, and better hundreds",
            do="add images, or name the folder above: those in folders of any depth count",
        )
    if not begun:
        built = builds(_within_disk(built, plan))
    keys = [f"cache={cache}", f"output={output}", *chosen.get(TRAIN, ()), f"student.{weights}", *train]
    trained = _in_steps(find_recipe(TrainRecipe, folder / f"{TRAIN}.yaml", keys), count)
    _require_same_run(trained, count)
    found = preflight(trained, spec, num_samples=count)
    found.problems.require_none()
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    device, memory = ("the GPU", torch.cuda.mem_get_info()[0]) if on_gpu else ("this machine", machine)
    views, crops = fitting_batches(found, device, memory)
    runner = built.runner.model_copy(update={"batch_size": min(built.runner.batch_size, views)})
    return built.model_copy(update={"runner": runner}), _in_steps(trained, count, crops)


def _sound(samples: pa.Table) -> int:
    """How many images have a header that can be read."""
    return pc.sum(pc.equal(samples["status"], OK)).as_py() or 0


def _require_same_run(recipe: TrainRecipe, images: int) -> None:
    """Before a cache grows and a recipe is replaced, for a run that took steps. Raises `RecipeError`."""
    if newest_checkpoint(recipe.checkpoint_folder) is None:
        return
    with suppress(CacheError):  # the build says what is wrong with it
        begun = find_recipe(TrainRecipe, Path(recipe.output, f"{TRAIN}.yaml"), [])
        was, now = (run_identity(one, {}) for one in (begun, recipe))
        was["images"], now["images"] = _sound(FeatureCache.open(recipe.cache).samples), images
        if changed := [key for key in now if now[key] != was.get(key)]:
            raise RecipeError(
                f"The run in {recipe.output} began with other settings; nothing was changed.",
                got=", ".join(f"{key}={now[key]}" for key in changed),
                expected=", ".join(f"{key}={was.get(key)}" for key in changed),
                do="name another folder for a run of its own (--output FOLDER), or go on as before",
            )


def in_yaml(*recipes: BuildRecipe | TrainRecipe) -> dict[str, str]:
    """The text of a file for each recipe, by its name: all that it states, and the command that takes it."""
    stated = (recipe.model_dump(mode="json", exclude_unset=True) for recipe in recipes)
    return {
        name: f"# {name}.yaml: {command} FILE\n{yaml.safe_dump(one, sort_keys=False, allow_unicode=True)}"
        for (name, command), one in zip(COMMANDS.items(), stated, strict=True)
    }


def usage(student: Path, cache: FeatureCache) -> str:
    """Five lines of Python that load the student and show it the first of the images."""
    (height, width), dataset = cache.spec.views.size, cache.spec.dataset
    path = cache.samples["path"][int(cache.valid_samples()[0])]
    photo = f"{dataset.location}/{path}" if dataset.kind == "image_folder" else "a.jpg"
    return f"""import numpy, torch, PIL.Image, teachercache
student = teachercache.load_student({str(student)!r})
photo = PIL.Image.open({photo!r}).convert("RGB").resize(({width}, {height}))
pixels = torch.from_numpy(numpy.array(photo)).permute(2, 0, 1)[None]
maps = student(student.normalize(pixels))  # {{teacher: 4 maps (1, channels, rows, columns)}}"""


def fitting_batches(found: Preflight, device: str, nbytes: int) -> list[int]:
    """How many images the teachers, and the student in training, take at once in the `nbytes` of a device.

    A rule of thumb: all teachers are loaded and one computes; the student has gradients and moments.
    Raises `RecipeError` where not even one image fits.
    """
    teachers, student = found.teachers.values(), found.student
    assert student is not None
    stem = student.get_submodule("stem")
    assert isinstance(stem, Stem)
    channels = max(math.prod(spec.native_grid) * spec.width for spec in teachers)
    learnt = sum(parameter.numel() for parameter in student.parameters())
    batches = []
    for what, state, image in (
        ("teachers do", 4 * sum(map(teacher_parameters, teachers)), 4 * _KEPT * channels),
        ("student does", 16 * learnt, 4 * _KEPT * math.prod(stem.grid) * stem.width * stem.depth),
    ):
        batches.append(int(nbytes * _USED_MEMORY - state) // image)
        if batches[-1] < 1:
            raise RecipeError(
                f"The {what} not fit into the memory.",
                got=f"{human_bytes(nbytes)} of {device}",
                expected=f"about {human_bytes((state + image) / _USED_MEMORY)}, for one image at a time",
                do="take smaller ones (--build teachers.NAME.preset=…, --train student.stem=…), leave one"
                " out (--build teachers.NAME=null), or run them without a GPU (--build runner.device=cpu)",
            )
    return batches


def _in_steps(recipe: TrainRecipe, images: int, crops: int | None = None) -> TrainRecipe:
    """`recipe` with steps of at most so many images, in micro-batches of at most `crops`."""
    size = recipe.batch_size_per_process
    whole = min(recipe.global_batch_size or size, images)
    size = next(n for n in range(min(size, crops or size), 0, -1) if whole % n == 0)
    return recipe.model_copy(update={"batch_size_per_process": size, "global_batch_size": whole})


def _require_weights(build: BuildRecipe, train: TrainRecipe) -> None:
    """Load, and so download, all that is pretrained, once. Raises `WeightsNotFoundError`."""
    try:
        for spec in resolve_teachers(build.teachers, build.views, build.sak_compat).values():
            if spec.pretrained:
                build_teacher(spec)
        if train.student.pretrained and train.student.stem and not train.student.init_from:
            Stem(train.student.stem, build.views.size, pretrained=True)
    except WeightsNotFoundError as error:
        raise WeightsNotFoundError(
            "Pretrained weights cannot be had, so nothing was begun.",
            got=in_a_line(error),
            expected="a Hugging Face Hub that answers, its cache (HF_HOME), or files",
            do="connect; name files (docs/own_images.md, Weights); or try without weights: --random-weights",
        ) from error


def _within_disk(recipe: BuildRecipe, plan: Plan) -> Settings:
    """Keys that keep a new cache within half of the free disk: fewer views, and at one view fewer bits."""
    if plan.free_bytes is None:
        return []
    views = plan.free_bytes // 2 // (plan.spec.dataset.num_samples * plan.bytes_per_row)
    smaller = [] if views else [f"teachers.{name}.codec=int4-hadamard" for name in recipe.teachers]
    return [f"views.num_views={max(1, min(views, recipe.views.num_views))}", *smaller]


def _absolute(place: LocalPath) -> str:
    """A URL, or a path from the root, through the links that were typed."""
    text = os.fspath(place)
    return text if "://" in text else os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111


def _require_place(place: str, option: str) -> None:
    above = next(folder for folder in (Path(place), *Path(place).parents) if folder.exists())
    is_fit = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    if not is_fit if "://" not in place else option == "--output":
        raise RecipeError(
            "Nothing can be written there, so nothing was begun.",
            got=f"{above}, for {place}",
            expected="a folder of this machine that this user can write to",
            do=f"name another place: {option} /path/of/yours",
        )
