"""Three small teachers that know different things, trained from scratch on synthetic scenes.

labels   which class each pixel is of
masked   images alone: the pixels of patches that are hidden (as SimMIM, Xie et al., 2022)
edges    where things end, and which thing stands out

All three are a `mini_vit`, learnt as the stem of a student without teachers, under one head for each task;
what is kept is a checkpoint as timm's own are, for a recipe's `teachers.<name>.checkpoint`.

B  images     H, W  the image     n  patch tokens     D  width
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer, _cfg
from torch import Tensor

from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.views import draw_view, render_view
from teachercache.student.datasets.labels import render_labels
from teachercache.student.datasets.scenes import Scenes
from teachercache.student.losses.tasks import MultiTaskLoss
from teachercache.student.measuring.evaluate import evaluate
from teachercache.student.measuring.task_outputs import TASK_OUTPUTS, update, value
from teachercache.student.sak.model import SAK

MINI_VIT = "mini_vit"
IMAGE_SIZE = (64, 64)
PATCH = 8
TEACHERS: dict[str, tuple[str, ...]] = {
    "labels": ("semseg",),
    "masked": ("pixels",),
    "edges": ("boundary", "saliency"),
}
"""By name: the tasks that it is trained for. `pixels` are the image's own."""

HIDDEN_SHARE, HIDDEN_SQUARE = 0.5, 2 * PATCH  # larger than a patch, or neighbours would give it away
LEARNING_RATE = 1e-3

default_cfgs = {MINI_VIT: _cfg(input_size=(3, *IMAGE_SIZE), num_classes=0)}


def mini_vit(pretrained: bool = False, **changes: Any) -> Any:
    """8 blocks of width 64, patches of 8 pixels: 0.3M parameters, and a grid of 8×8 for 64×64 pixels."""
    arguments = {
        "img_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "embed_dim": 64,
        "depth": 8,
        "num_heads": 2,
        "mlp_ratio": 3,
        "num_classes": 0,
    }
    return build_model_with_cfg(VisionTransformer, MINI_VIT, pretrained, **arguments | changes)


register_model(mini_vit)  # so that recipes of builds and of students find it by its name


class MiniScenes(Scenes):
    """The scenes, where a boundary may be one pixel off: .0075 of the diagonal is less than that."""

    boundary_distance = 1.01 / math.hypot(*IMAGE_SIZE)


def train_teacher(
    name: str, scenes: Path, policy: ViewPolicy, steps: int, batch_size: int, seed: int, checkpoint: Path
) -> dict[str, dict[str, float]]:
    """Train one of `TEACHERS` on the split "train" of `scenes`, seen in the views of `policy`.

    Returns what it scores on the split "val" for each of its tasks, and what a guess does that has not
    looked: {"score": {…}, "guess": {…}}; percent, and for `pixels` the share of the variance of hidden
    pixels that it explains, where a guess is the mean of the visible ones.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    tasks = {task: MiniScenes.tasks.get(task, 3) for task in TEACHERS[name]}
    teacher = SAK(MINI_VIT, {}, IMAGE_SIZE, tasks=tasks, fusion="sum").to(device)
    losses = MultiTaskLoss(tasks) if name != "masked" else None
    images_N3HW, labels = load_views(MiniScenes(scenes, "train"), TEACHERS[name], policy)
    optimizer = torch.optim.AdamW(teacher.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps + 1, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen_B = torch.randint(len(images_N3HW), (batch_size,), generator=generator)
        pixels_B3HW = teacher.normalize(images_N3HW[chosen_B].to(device))
        if losses is None:
            hidden_B1HW = hidden(batch_size, generator).to(device)
            predicted_B3HW = predict_hidden(teacher, pixels_B3HW, hidden_B1HW)
            loss = squared_error(predicted_B3HW, pixels_B3HW, hidden_B1HW)
        else:
            targets = {task: values[chosen_B].to(device) for task, values in labels.items()}
            loss = losses(teacher(pixels_B3HW), targets).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    save_checkpoint(teacher, checkpoint)
    teacher.eval()
    held_out = MiniScenes(scenes, "val")
    if losses is None:
        return {"score": {"pixels": explained_variance(teacher, held_out, seed)}, "guess": {"pixels": 0.0}}
    scores = evaluate(teacher, held_out, batch_size=32, threads=1).scores
    return {"score": scores, "guess": guess(held_out, TEACHERS[name], seed)}


def load_views(
    dataset: Scenes, tasks: tuple[str, ...], policy: ViewPolicy
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every view of every scene: uint8 (N, 3, H, W), and the labels of the tasks that have any."""
    images, labels = [], []
    for index, key in enumerate(dataset.keys):
        image = dataset.image(index)
        arrays = dataset.labels(index, [task for task in tasks if task in dataset.tasks])
        for number in range(policy.num_views):
            view = draw_view(policy, key, image.width, image.height, number)
            images.append(render_view(image, view))
            labels.append(render_labels(arrays, view))
    return torch.stack(images), {task: torch.stack([row[task] for row in labels]) for task in labels[0]}


def hidden(batch: int, generator: torch.Generator) -> Tensor:
    """(B, 1, H, W): True in squares of the same number in each image, chosen by chance."""
    height, width = (side // HIDDEN_SQUARE for side in IMAGE_SIZE)
    order = torch.rand(batch, height * width, generator=generator).argsort(1)
    squares = (order < HIDDEN_SHARE * height * width).view(batch, 1, height, width)
    return squares.repeat_interleave(HIDDEN_SQUARE, 2).repeat_interleave(HIDDEN_SQUARE, 3)


def predict_hidden(teacher: SAK, pixels_B3HW: Tensor, hidden_B1HW: Tensor) -> Tensor:
    predictions: Any = teacher(pixels_B3HW.masked_fill(hidden_B1HW, 0))
    predicted_B3HW: Tensor = predictions["pixels"]
    return predicted_B3HW


def squared_error(predicted_B3HW: Tensor, pixels_B3HW: Tensor, hidden_B1HW: Tensor) -> Tensor:
    """The mean over hidden pixels."""
    return ((predicted_B3HW - pixels_B3HW).square() * hidden_B1HW).sum() / (3 * hidden_B1HW.sum())


@torch.no_grad()
def explained_variance(teacher: SAK, dataset: Scenes, seed: int) -> float:
    """1 - (squared error) / (that of predicting each image's mean visible colour), in percent."""
    images_N3HW, _ = load_views(dataset, (), ViewPolicy(policy="multitask_eval", size=IMAGE_SIZE))
    hidden_N1HW = hidden(len(images_N3HW), torch.Generator().manual_seed(seed)).to(teacher.mean.device)
    pixels_N3HW = teacher.normalize(images_N3HW.to(teacher.mean.device))
    visible_N3HW = pixels_N3HW * ~hidden_N1HW
    mean_N311 = visible_N3HW.sum((2, 3), keepdim=True) / (~hidden_N1HW).sum((2, 3), keepdim=True)
    error = squared_error(predict_hidden(teacher, pixels_N3HW, hidden_N1HW), pixels_N3HW, hidden_N1HW)
    guessed = squared_error(mean_N311.expand_as(pixels_N3HW), pixels_N3HW, hidden_N1HW)
    return float(100 * (1 - error / guessed))


def guess(dataset: Scenes, tasks: tuple[str, ...], seed: int) -> dict[str, float]:
    """What each task's metric gives to the most frequent class, to "all of it", to noise as boundaries."""
    _, labels = load_views(dataset, tasks, ViewPolicy(policy="multitask_eval", size=IMAGE_SIZE))
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for task, label_NHW in labels.items():
        metric = TASK_OUTPUTS[task].new_metric(dataset.tasks[task], dataset.boundary_distance, None)
        if task == "boundary":
            estimate_NHW = torch.rand(label_NHW.shape, generator=generator)
        elif task == "saliency":
            estimate_NHW = torch.ones(label_NHW.shape)
        else:
            frequent = torch.bincount(label_NHW.flatten().long(), minlength=256)[: dataset.tasks[task]]
            estimate_NHW = torch.full_like(label_NHW, int(frequent.argmax()))
        update(metric, estimate_NHW, label_NHW)
        scores[task] = value(metric)
    return scores


def save_checkpoint(teacher: SAK, path: Path) -> None:
    """The stem as a checkpoint of `mini_vit`. The final norm, which raw block outputs do not pass, is new."""
    model = timm.create_model(MINI_VIT, img_size=IMAGE_SIZE)
    left_out, unknown = model.load_state_dict(teacher.stem.vit.state_dict(), strict=False)
    assert set(left_out) <= {"norm.weight", "norm.bias"}, left_out
    assert not unknown, unknown
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)


def alikeness(tokens_nD: Mapping[str, Tensor]) -> dict[str, float]:
    """Linear CKA (Kornblith et al., 2019) of each pair of teachers on the same patches.

    1 where one's tokens are the other's turned and scaled, 0 where nothing linear is shared.
    """
    centred = {name: (x_nD - x_nD.mean(0)).double() for name, x_nD in tokens_nD.items()}
    return {
        f"{a}, {b}": _shared(x_nD, y_nD) / math.sqrt(_shared(x_nD, x_nD) * _shared(y_nD, y_nD))
        for (a, x_nD), (b, y_nD) in combinations(centred.items(), 2)
    }


def _shared(x_nD: Tensor, y_nD: Tensor) -> float:
    return float((x_nD.T @ y_nD).square().sum())
