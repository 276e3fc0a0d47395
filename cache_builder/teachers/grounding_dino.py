"""The image side of GroundingDINO as a teacher, through transformers: no text model is made or loaded.

A student of KPU detects objects "by integrating GroundingDINO's decoder" (KPU, Inference): it has to produce
the input of everything after the image side (encoder, query selection, decoder), four maps of one width:

| block | stride | from                                           |
|-------|--------|------------------------------------------------|
| 0     | 8      | Swin's second stage, normed and projected      |
| 1     | 16     | its third                                      |
| 2     | 32     | its fourth                                     |
| 3     | 64     | its fourth, by a 3×3 convolution of stride 2   |

These maps are the blocks of this teacher, in the form in which `GroundingDinoModel` flattens them, before any
text. Their grids differ, so a teacher holds one map, and a build computes those of four such teachers in one
forward pass (docs/operations.md). Stages of Swin that a map does not need are cut off, and their weights do
not enter the hash.
"""

from collections.abc import Collection, Iterable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, Self

import huggingface_hub
import torch
from safetensors import safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from teachercache.cache_builder.teachers.teacher import (
    Architecture,
    Outputs,
    Teacher,
    TeacherFeatures,
    autocast,
    preprocess,
)
from teachercache.cache_builder.teachers.weights import (
    WEIGHTS_NAME,
    loading,
    require_file,
    require_hub,
    seeded,
)
from teachercache.pipeline.errors import TeacherInputError, extra
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.records.strict import Size

_OWNER = "IDEA-Research"
_SWINS = {  # width, depths, heads, side of a window and of the image
    "grounding-dino-tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 224),
    "grounding-dino-base": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12, 384),
}
_NUM_MAPS, _LAST_STRIDE = 4, 32
_IMAGE_SIDE = ("backbone.", "input_proj_vision.")
_EXPECTED = "every weight of the image side, in safetensors as transformers saves them"


class GroundingDinoTeacher(Teacher):
    shares_passes = True

    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__(spec)
        self.model = _create_model(spec).eval().requires_grad_(False)
        self.model.end_with(spec.block_indices[-1])

    def sharing(self, spec: TeacherSpec) -> Self:
        twin = deepcopy(self, {id(parameter): parameter for parameter in self.parameters()})
        twin.spec = spec
        twin.model.end_with(spec.block_indices[-1])
        return twin

    @classmethod
    def models(cls) -> Collection[str]:
        return _SWINS

    @classmethod
    def describe(cls, model: str) -> Architecture:
        patch = _LAST_STRIDE, _LAST_STRIDE
        return Architecture(model, patch, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    @classmethod
    def probe(cls, model: str, image_size: Size, global_feature: bool) -> Outputs:
        image_side, config = _image_side(), _config(model)
        try:
            with torch.device("meta"), torch.inference_mode():
                maps = image_side(config).eval()(torch.empty(1, 3, *image_size), range(_NUM_MAPS))
        except Exception as reason:  # from anywhere in torch
            raise TeacherInputError(
                f"transformers cannot run {model} at this image size.",
                got=f"{image_size}: {type(reason).__name__}: {reason}",
                expected=f"multiples of {_LAST_STRIDE}; it was made for a shorter side of 800",
                do="set image_size for this teacher",
            ) from reason
        blocks = tuple((m.shape[1], (m.shape[2], m.shape[3])) for m in maps)
        return Outputs(blocks=blocks, has_cls_token=False, global_width=None)

    def repeated_parts(self) -> Iterable[nn.Module]:
        """Stages: blocks, shifted or not, are more than torch keeps compiled."""
        return self.model.backbone.conv_encoder.model.swin.encoder.layers

    def features(self, pixels_B3HW: Tensor, specs: Sequence[TeacherSpec]) -> list[TeacherFeatures]:
        indices = [index for spec in specs for index in spec.block_indices]
        with torch.inference_mode(), autocast(self.spec, pixels_B3HW.device):
            maps = iter(self.model(preprocess(pixels_B3HW, self.spec), indices))
        stacked = [
            torch.stack([next(maps).permute(0, 2, 3, 1) for _ in spec.block_indices], 1) for spec in specs
        ]
        return [TeacherFeatures(maps_BSHWC, None, None) for maps_BSHWC in stacked]


def _modeling() -> Any:
    """transformers' GroundingDINO, imported only if a teacher needs it."""
    with extra("grounding-dino"):
        import transformers

        return transformers.models.grounding_dino.modeling_grounding_dino


def _config(model: str) -> Any:
    names = "embed_dim", "depths", "num_heads", "window_size", "image_size"
    swin = dict(zip(names, _SWINS[model], strict=True)) | {"model_type": "swin", "out_indices": [2, 3, 4]}
    return _modeling().GroundingDinoConfig(backbone_config=swin)


@cache
def _image_side() -> Any:
    """A class with the parts of `GroundingDinoModel` before its encoder, under the same names."""
    modeling = _modeling()
    base: Any = modeling.GroundingDinoPreTrainedModel

    class ImageSide(base):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            swin = modeling.GroundingDinoConvEncoder(config)
            self.backbone = modeling.GroundingDinoConvModel(swin, position_embedding=None)
            widths = swin.intermediate_channel_sizes
            convolutions = [nn.Conv2d(width, config.d_model, 1) for width in widths]
            convolutions.append(nn.Conv2d(widths[-1], config.d_model, 3, stride=2, padding=1))
            self.input_proj_vision = nn.ModuleList(
                nn.Sequential(convolution, nn.GroupNorm(32, config.d_model)) for convolution in convolutions
            )
            # Keys that older files lack or have in addition, as Swin's own class lists them.
            self._keys_to_ignore_on_load_missing = swin.model._keys_to_ignore_on_load_missing
            self._keys_to_ignore_on_load_unexpected = swin.model._keys_to_ignore_on_load_unexpected
            self.post_init()

        def end_with(self, index: int) -> None:
            """Drop the parts that no map up to this one needs."""
            swin = self.backbone.conv_encoder.model.swin
            swin.encoder.layers = swin.encoder.layers[: index + 2]
            swin.encoder.layers[-1].downsample = None
            swin.layernorm = nn.Identity()  # the last stage's, whose result is not used
            self.input_proj_vision = self.input_proj_vision[: index + 1]

        def forward(self, images_B3HW: Tensor, indices: Sequence[int]) -> list[Tensor]:
            """The maps (B, C, H, W) of these indices."""
            stages = self.backbone.conv_encoder.model(images_B3HW).feature_maps
            sources = (*stages, stages[-1])
            return [self.input_proj_vision[index](sources[index]) for index in indices]

    return ImageSide


def _create_model(spec: TeacherSpec) -> Any:
    """The model of `spec`, on the current default device. Raises `WeightsNotFoundError`."""
    image_side, config = _image_side(), _config(spec.model)
    if not spec.pretrained:
        with seeded(spec.random_seed):
            return image_side(config)
    with loading(spec, _EXPECTED) as wrong_keys:
        model, report = image_side.from_pretrained(
            None,
            config=config,
            state_dict=_read_image_side(_weights_file(spec)),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # or it would raise without naming them
            output_loading_info=True,
        )
        wrong_keys += [("missing", key) for key in sorted(report["missing_keys"])]
        wrong_keys += [("unexpected", key) for key in sorted(report["unexpected_keys"])]
        wrong_keys += [("misshapen", key) for key, *_ in sorted(report["mismatched_keys"])]
    return model


def _weights_file(spec: TeacherSpec) -> Path:
    """The checkpoint file, that in a checkpoint folder, or a download from the hub."""
    if spec.checkpoint:
        path = Path(spec.checkpoint)
        path = path / WEIGHTS_NAME if path.is_dir() else path
        require_file(path)
        return path
    repository = f"{_OWNER}/{spec.model}"
    require_hub(repository)
    return Path(huggingface_hub.hf_hub_download(repository, WEIGHTS_NAME))


def _read_image_side(path: Path) -> dict[str, Tensor]:
    """The image side's tensors of a whole model; the others are not read."""
    with safe_open(path, framework="pt") as file:
        names = {key.removeprefix("model."): key for key in file.keys()}  # noqa: SIM118
        return {name: file.get_tensor(key) for name, key in names.items() if name.startswith(_IMAGE_SIDE)}
