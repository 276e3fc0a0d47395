"""A teacher in a recipe: the keys under `teachers.<name>:`, and how they become a `TeacherSpec`."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from teachercache.cache_builder.teachers.registry import (
    Preset,
    find_preset,
    kind_of,
    passes,
)
from teachercache.cache_builder.teachers.teacher import RGB, Architecture, Outputs, Teacher, weights_hash
from teachercache.pipeline.errors import CacheMismatchError, TeacherError, TeacherInputError
from teachercache.pipeline.records.spec import GridKind, GridSpec, Precision, Resampling, TeacherSpec
from teachercache.pipeline.records.strict import Size, Strict
from teachercache.pipeline.records.view_policy import ViewPolicy

STUDENT_PATCH = 16

Pixels = Annotated[int, Field(ge=1)]


class TeacherRecipe(Strict):
    """One teacher, as a recipe states it. The preset or the library decides everything left out.

    Where blocks differ in shape (ConvNeXt, Swin, ResNet), `block_indices` are by default among those shaped
    as the last. A `checkpoint` is safetensors, or for timm a .pth of tensors and plain values, such as what a
    training code saves (`teacher`, behind `backbone.`). Positions are resampled with antialiasing as timm
    does it, or "plain" as most authors' code.
    """

    preset: str | None = Field(None, description="One of `teachercache presets`; or else the name says it.")
    model: str | None = Field(None, description="Any model of timm, or grounding-dino-tiny or -base.")
    image_size: Pixels | tuple[Pixels, Pixels] | None = Field(
        None, description="Its input in pixels: one number, or height and width."
    )
    block_indices: tuple[int, ...] | None = Field(
        None,
        description="The levels, from 0; by default the ends of the network's four quarters.",
    )
    grid: GridKind = Field("native", description="Stored: its own, SAK's adjoint, or pooled to grid_size.")
    grid_size: tuple[Pixels, Pixels] | None = Field(None, description="(height, width) in tokens.")
    codec: str = Field("f16", description="How features are stored; see `teachercache codecs`.")
    cls_token: bool = Field(False, description="Store the class token too.")
    global_feature: bool = Field(False, description="Store the feature of the whole image too.")
    pretrained: bool | None = Field(None, description="false: random weights, for trying things out.")
    checkpoint: str | None = Field(None, description="A local file of weights: safetensors or .pth.")
    precision: Precision = Field("float32", description="Precision of the forward pass.")
    mean: RGB | None = Field(None, description="Of red, green and blue; null: the model's own.")
    std: RGB | None = Field(None, description="Of red, green and blue; null: the model's own.")
    random_seed: int = Field(0, description="Seed of random weights.")
    resample_positions: Resampling = Field("antialias", description="How a ViT fits positions to image_size.")
    layer_scale: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Start of LayerScale in random weights; DINOv2's 1e-5 makes all levels alike."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.preset and self.model:
            raise ValueError(f"give preset or model, not both: got {self.preset!r} and {self.model!r}")
        if self.grid == "native" and self.grid_size:
            raise ValueError(f"grid 'native' takes no grid_size, got {self.grid_size}")
        if self.checkpoint and self.pretrained is False:
            raise ValueError("a checkpoint and pretrained=false contradict each other: leave one out")
        if self.resample_positions == "plain" and self.pretrained is False:
            raise ValueError("random weights have no positions to resample: leave resample_positions out")
        if self.layer_scale and self.pretrained is not False:
            raise ValueError("trained weights bring their LayerScale: leave layer_scale out")
        indices = self.block_indices
        if indices is not None and (not indices or indices[0] < 0 or sorted(set(indices)) != [*indices]):
            raise ValueError(f"block_indices must be 0-based and increasing, got {[*indices]}")
        return self


def resolve_teachers(
    recipes: Mapping[str, TeacherRecipe], views: ViewPolicy, sak_compat: bool = False
) -> dict[str, TeacherSpec]:
    """The specs of teachers that see these views, their margin included.

    Raises as `resolve_teacher`, and `TeacherInputError` where windows of the views cannot be cut out of a
    padded map or an adjoint grid.
    """
    own_grid = student_grid(views.stored_size, views.patch)
    specs = dict[str, TeacherSpec]()
    for name, recipe in recipes.items():
        spec = specs[name] = resolve_teacher(name, recipe, views.stored_size, sak_compat, views.patch)
        if views.margin and spec.is_padded:
            raise TeacherInputError(
                f"The map of teacher {name} is padded, so no window can be cut out of it.",
                got=f"views of {views.stored_size} with their margin, padded to {spec.image_size}",
                expected="views of the same aspect",
                do="set views.margin=0, choose square views, or leave sak_compat out",
            )
        if views.margin and spec.grid.kind == "adjoint" and spec.grid.size != own_grid:
            raise TeacherInputError(
                f"The adjoint grid of teacher {name} is not that of the views with their margin.",
                got=f"grid_size {spec.grid.size}",
                expected=f"{own_grid}, a token for each {views.patch} pixels of the student (views.patch)",
                do=f"leave out teachers.{name}.grid_size, and let views.patch be the student's",
            )
    return specs


def resolve_teacher(
    name: str,
    recipe: TeacherRecipe,
    view_size: Size,
    sak_compat: bool = False,
    patch: int = STUDENT_PATCH,
) -> TeacherSpec:
    """The complete spec of teacher `name` for views of `view_size` (height, width); needs no weights.

    The teacher sees the view at the nearest multiple of its patch (384 → 378 for patch 14). A preset
    with a `longest_side` (SAM, 1024) keeps the view's aspect: 448×576 becomes 800×1024. GroundingDINO's
    shorter side is 800, while the longer one is at most 1333: 384×384 becomes 800×800. `patch` is the
    student's, whose grid is stored where the recipe names a grid and no size.

    `sak_compat` reproduces the reference instead: ImageNet statistics for all, every teacher at the
    size of the view (a patch-14 teacher then drops the pixels that fill no patch), and SAM on the
    rendered view, enlarged and padded to a square.

    Raises `UnknownTeacherError`, or `TeacherInputError` for a size, block or output that the model
    does not have.
    """
    preset = find_preset(name, recipe.preset, recipe.model)
    kind = kind_of(preset.model)
    architecture = kind.describe(preset.model)
    image_size = _image_size(architecture, preset, recipe, view_size, sak_compat)
    outputs = kind.probe(architecture.model, image_size, recipe.global_feature)
    block_indices = recipe.block_indices or preset.block_indices or _default_blocks(outputs)
    width, native_grid = _common_shape(name, outputs, block_indices)
    _require_outputs(name, architecture, outputs, recipe)
    grid_size = recipe.grid_size or student_grid(view_size, patch)
    return TeacherSpec(
        model=architecture.model,
        pretrained=recipe.pretrained is not False,
        checkpoint=recipe.checkpoint,
        random_seed=recipe.random_seed,
        image_size=image_size,
        render_size=view_size if sak_compat else image_size,
        mean=recipe.mean or (IMAGENET_DEFAULT_MEAN if sak_compat else architecture.mean),
        std=recipe.std or (IMAGENET_DEFAULT_STD if sak_compat else architecture.std),
        block_indices=block_indices,
        native_grid=native_grid,
        width=width,
        grid=GridSpec() if recipe.grid == "native" else GridSpec(kind=recipe.grid, size=grid_size),
        codec=recipe.codec,
        cls_token=recipe.cls_token,
        global_width=outputs.global_width,
        precision=recipe.precision,
        resample_positions=recipe.resample_positions,
        layer_scale=recipe.layer_scale,
    )


def student_grid(view_size: Size, patch: int = STUDENT_PATCH) -> Size:
    """The token grid (h, w) of a student of this patch on views of this size, both in pixels."""
    return max(1, view_size[0] // patch), max(1, view_size[1] // patch)


def build_teacher(
    teacher: TeacherSpec | str, device: torch.device | str = "cpu", **overrides: Any
) -> Teacher:
    """A frozen teacher with its weights on `device`; its `spec` carries the `weights_hash`.

    For a name, `overrides` are the keys of a `TeacherRecipe`, and views have the default size:
    `build_teacher("dinov2_small", pretrained=False, image_size=224)`.

    Raises `WeightsNotFoundError`, and `CacheMismatchError` when a spec from a cache names other weights.
    """
    if isinstance(teacher, str):
        teacher = resolve_teacher(teacher, TeacherRecipe(**overrides), ViewPolicy.model_validate({}).size)
    elif overrides:
        raise TypeError(f"a TeacherSpec takes no overrides; got {', '.join(overrides)}")
    return build_teachers({"": teacher}, device)[""]


def build_teachers(
    specs: Mapping[str, TeacherSpec], device: torch.device | str = "cpu"
) -> dict[str, Teacher]:
    """As `build_teacher`; teachers that share a forward pass share its weights, which are read once."""
    _keep_float32()
    built = dict[str, Teacher]()
    for names in passes(specs):
        first = kind_of(specs[names[0]].model)(specs[names[0]])
        built |= {names[0]: first} | {name: first.sharing(specs[name]) for name in names[1:]}
        for name in names:
            _identify(built[name], specs[name])
        for name in names:  # once all are known by their bytes
            built[name].keep_rounded()
            built[name].to(device)
    return {name: built[name] for name in specs}


def _identify(built: Teacher, spec: TeacherSpec) -> None:
    built.weights_hash = weights_hash(built)
    if spec.weights_hash not in (None, built.weights_hash):
        raise CacheMismatchError(
            f"These are not the weights of {spec.model} that the cache was built with.",
            got=f"weights with hash {built.weights_hash}",
            expected=f"weights with hash {spec.weights_hash}",
            do="give the same checkpoint and library versions, or build another cache",
        )
    built.spec = spec.model_copy(update={"weights_hash": built.weights_hash})


def _keep_float32() -> None:
    """Variables that some container images set would silently put TF32 into float32 features."""
    torch.set_float32_matmul_precision("highest")  # TORCH_ALLOW_TF32_CUBLAS_OVERRIDE begins with "high"
    if value := os.environ.get("NVIDIA_TF32_OVERRIDE"):
        raise TeacherError(
            "An environment variable would change the arithmetic of teachers.",
            got=f"NVIDIA_TF32_OVERRIDE={value}",
            expected="the precision that each teacher's spec states",
            do="unset NVIDIA_TF32_OVERRIDE",
        )


def _image_size(
    architecture: Architecture, preset: Preset, recipe: TeacherRecipe, view_size: Size, sak_compat: bool
) -> Size:
    if recipe.image_size is not None:
        size = recipe.image_size if isinstance(recipe.image_size, tuple) else (recipe.image_size,) * 2
        nearest = _nearest_multiple(size, architecture.patch)
        if size != nearest and not sak_compat:
            raise TeacherInputError(
                f"{architecture.model} cannot cover this image size with whole patches.",
                got=f"image_size {size[0]}×{size[1]}",
                expected=f"multiples of {architecture.patch[0]}×{architecture.patch[1]} pixels",
                do=f"set image_size to [{nearest[0]}, {nearest[1]}], or leave it out to follow the views",
            )
        return size
    if preset.longest_side is None:
        return view_size if sak_compat else _nearest_multiple(view_size, architecture.patch)
    if sak_compat:
        side = preset.shortest_side or preset.longest_side
        return side, side
    scale = preset.longest_side / max(view_size)
    if preset.shortest_side is not None:
        scale = min(scale, preset.shortest_side / min(view_size))
    return _nearest_multiple((view_size[0] * scale, view_size[1] * scale), architecture.patch)


def _nearest_multiple(size: tuple[float, float], patch: Size) -> Size:
    height, width = (
        max(1, int(pixels / step + 0.5)) * step for pixels, step in zip(size, patch, strict=True)
    )
    return height, width


def _default_blocks(outputs: Outputs) -> tuple[int, ...]:
    """L/4, L/2, 3L/4 and L as 0-based positions, rounded up: 6, 13, 20, 26 of 27 blocks.

    L counts the blocks with the shape of the last one; in a plain ViT, that is all of them.
    """
    alike = [i for i, shape in enumerate(outputs.blocks) if shape == outputs.blocks[-1]]
    return tuple(sorted({alike[-(-len(alike) * quarter // 4) - 1] for quarter in (1, 2, 3, 4)}))


def _common_shape(name: str, outputs: Outputs, block_indices: tuple[int, ...]) -> tuple[int, Size]:
    """Width and grid that all requested blocks share."""
    last = len(outputs.blocks) - 1
    if block_indices[-1] > last:
        raise TeacherInputError(
            f"Teacher {name} has no block {block_indices[-1]}.",
            got=f"block_indices {[*block_indices]}",
            expected=f"positions from 0 to {last}",
            do="correct block_indices, or leave them out",
        )
    shapes = {outputs.blocks[index] for index in block_indices}
    if len(shapes) > 1:
        blocks = (
            f"{i}: width {width}, grid {grid[0]}×{grid[1]}" for i, (width, grid) in enumerate(outputs.blocks)
        )
        raise TeacherInputError(
            f"The levels of teacher {name} differ in width or grid.",
            got=f"block_indices {[*block_indices]} of {'; '.join(blocks)}",
            expected="blocks of the same width and the same grid",
            do=f"choose such block_indices, for example [{last}]; make a second teacher for other levels",
        )
    return shapes.pop()


def _require_outputs(name: str, architecture: Architecture, outputs: Outputs, recipe: TeacherRecipe) -> None:
    for key, what, there in (
        ("cls_token", "cls_token", outputs.has_cls_token),
        ("global_feature", "global_feature", outputs.global_width is not None),
        ("resample_positions", "map of learnt positions", architecture.has_positions),
        ("layer_scale", "LayerScale", architecture.has_layer_scale),
    ):
        requested, default = getattr(recipe, key), TeacherRecipe.model_fields[key].default
        if requested != default and not there:
            raise TeacherInputError(
                f"Teacher {name} has no {what}.",
                got=f"{key}: {str(requested).lower()} for {architecture.model}",
                expected=f"{key}: {str(default).lower()}",
                do=f"leave {key} out for this teacher",
            )
