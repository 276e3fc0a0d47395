"""How well one linear layer reads depth out of frozen maps (SAK, Table 27: lin. 1 and lin. 4).

Follows DINOv2's protocol (Li et al., 2024): the class token is concatenated to every patch token, of the last
level or of all four, four times as fine; a linear layer gives weights of 256 depths, whose mean is predicted.
It learns with the scale-invariant loss, AdamW, and a cosine with a warm-up over a third.

B  images     D  width     h, w  grid of the tokens     H, W  the image     K  depths
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice

import numpy as np
import torch
from torch import Tensor, nn

from teachercache.pipeline.errors import RecipeError, require_known
from teachercache.pipeline.grids import upsample
from teachercache.pipeline.records.strict import Size
from teachercache.student.datasets import LabelledDataset
from teachercache.student.measuring.evaluate import batches, process_state
from teachercache.student.measuring.paper_results import PAPER, cell, markdown_table
from teachercache.student.metrics import RMSE
from teachercache.student.models.stem import Stem
from teachercache.student.models.student import NUM_LEVELS, Student
from teachercache.student.sak.model import SAK
from teachercache.student.training.train_recipe import ScheduleRecipe

_NEAREST_M, _FARTHEST_M, _DEPTHS = 0.001, 10.0, 256
_FINER = 4
_VARIANCE_SHARE = 0.85  # of the mean logarithm's square, which the scale-invariant loss forgives


@dataclass(frozen=True)
class DepthProbe:
    """`rmse_m`: metres, over all measured pixels of the test images. `levels`: 1 or 4."""

    name: str
    levels: int
    rmse_m: float
    steps: int
    train_images: int
    test_images: int


class FrozenMaps:
    """The maps of a stem, or of a student's path (`expert`: a teacher's name), for images of `size`.

    Four levels, each with the stem's class token, if any, concatenated to every patch token.

    Raises `RecipeError` for a student without a stem or an expert that it does not have.
    """

    def __init__(self, source: Student | Stem, size: Size, expert: str = "stem") -> None:
        if isinstance(source, Stem):
            require_known("expert of a bare stem", expert, ["stem"])
            self.stem, self._path = source, None
            mean, std = torch.tensor(source.mean), torch.tensor(source.std)
        elif isinstance(source, SAK):
            require_known("expert of this student", expert, source.experts)
            self.stem = source.stem
            self._path = None if expert == "stem" else source.paths[expert]
            mean, std = source.mean.flatten(), source.std.flatten()
        else:
            raise RecipeError(
                "Depth is probed on the maps of a stem and its paths.",
                got=f"a student of kind {source.kind}",
                expected="a student of kind sak, or a stem",
                do="choose one of these",
            )
        source.eval().requires_grad_(False)
        self.stem.resize(size)
        self.size = size
        self._mean_std = torch.stack([mean, std]).view(2, 1, 3, 1, 1)
        self.width = self.stem.width * (1 + self.stem.has_class_token)

    @torch.no_grad()
    def __call__(self, images_B3HW: Tensor) -> list[Tensor]:
        """uint8 images → four levels (B, `width`, h, w)."""
        mean, std = self._mean_std.to(images_B3HW.device)
        stem = self.stem
        tokens_BND = stem((images_B3HW.float() / 255 - mean) / std)
        path = self._path
        patches_BnD = path(tokens_BND, stem.num_prefix_tokens) if path else stem.levels(tokens_BND)
        maps = [patches.transpose(1, 2).unflatten(2, stem.grid) for patches in patches_BnD]
        if stem.has_class_token:
            maps = [
                torch.cat([map_, tokens_BND[block][:, 0, :, None, None].expand_as(map_)], dim=1)
                for map_, block in zip(maps, stem.level_depths, strict=True)
            ]
        return maps


class LinearDepth(nn.Module):
    """(B, C, h, w) → metres (B, H, W) of an image of `size`."""

    depths_K: Tensor

    def __init__(self, channels: int, size: Size) -> None:
        super().__init__()
        self.size = size
        self.linear = nn.Conv2d(channels, _DEPTHS, 1)
        self.register_buffer("depths_K", torch.linspace(_NEAREST_M, _FARTHEST_M, _DEPTHS))

    def forward(self, maps_BChw: Tensor) -> Tensor:
        # Resizing and a linear layer commute, and the map of 256 logits is the smaller one.
        logits = self.linear(maps_BChw)
        logits = upsample(logits, (logits.shape[2] * _FINER, logits.shape[3] * _FINER))
        share_BKhw = logits.relu() + 0.1
        share_BKhw = share_BKhw / share_BKhw.sum(1, keepdim=True)
        depth_B1hw = torch.einsum("bkhw,k->bhw", share_BKhw, self.depths_K)[:, None]
        return upsample(depth_B1hw, self.size)[:, 0]


def scale_invariant_loss(depth_BHW: Tensor, target_BHW: Tensor) -> Tensor:
    """√(mean(g²) - 0.85 · mean(g)²) of g = log d - log t, where t was measured (Eigen et al., 2014)."""
    measured = (target_BHW > _NEAREST_M) & (target_BHW < _FARTHEST_M)
    difference_N = depth_BHW[measured].clamp(min=_NEAREST_M).log() - target_BHW[measured].log()
    mean = difference_N.mean()
    return (difference_N.square().mean() - _VARIANCE_SHARE * mean.square()).clamp(min=1e-9).sqrt()


def depth_probe(
    maps: FrozenMaps,
    train: LabelledDataset,
    test: LabelledDataset,
    *,
    levels: int,
    name: str = "maps",
    steps: int = 38_400,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    seed: int = 0,
    threads: int = 2,
    progress: Callable[[str], object] | None = None,
) -> DepthProbe:
    """Train the layer on `levels` (1: the last, or 4) of `train`, half of it flipped, and measure on `test`.

    Raises `RecipeError` for a data set without depth and for another number of levels.
    """
    usable = all("depth" in data.tasks and data.keys for data in (train, test))
    if levels not in (1, NUM_LEVELS) or not usable:
        raise RecipeError(
            "Depth cannot be probed like this.",
            got=f"{levels} levels, on {train.name} and {test.name}",
            expected="1 or 4 levels, and images with depth",
            do="choose nyud or scenes, and 1 or 4",
        )
    torch.manual_seed(seed)
    device = process_state().device
    maps.stem.to(device)
    head = LinearDepth(maps.width * levels, maps.size).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = ScheduleRecipe(max_steps=steps, final_lr=0)
    order = np.random.default_rng(seed)
    epochs = (order.permutation(len(train.keys)).tolist() for _ in count())
    numbers = islice(chain.from_iterable(epochs), steps * batch_size)
    drawn = _batches(train, numbers, maps.size, batch_size, threads)
    for step, (images_B3HW, depth_BHW, nearer_B11) in enumerate(drawn):
        optimizer.param_groups[0]["lr"] = schedule.rate(step, learning_rate, (steps, max(1, steps // 3)))
        flipped_B = torch.rand(len(images_B3HW)) < 0.5
        images_B3HW[flipped_B] = images_B3HW[flipped_B].flip(-1)
        depth_BHW[flipped_B] = depth_BHW[flipped_B].flip(-1)
        features = torch.cat(maps(images_B3HW.to(device))[-levels:], dim=1)
        loss = scale_invariant_loss(head(features), (depth_BHW / nearer_B11).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress and step % 50 == 0:
            progress(f"{name}, lin. {levels}: step {step:,} of {steps:,}, loss {loss.item():.3f}")
    metric = RMSE()
    with torch.no_grad():
        all_of_it = _batches(test, range(len(test.keys)), maps.size, batch_size, threads)
        for images_B3HW, depth_BHW, nearer_B11 in all_of_it:
            predicted_BHW = head(torch.cat(maps(images_B3HW.to(device))[-levels:], dim=1)).cpu()
            metric.update(predicted_BHW * nearer_B11, depth_BHW)
    return DepthProbe(name, levels, metric.compute(), steps, len(train.keys), len(test.keys))


def depth_table(probes: list[DepthProbe]) -> str:
    """Markdown: the probes, and the paper's rows."""
    first = probes[0]
    data = f"{first.train_images:,} images to train, {first.test_images:,} to test, {first.steps:,} steps"
    rmse: dict[str, dict[int, float]] = {}
    for probe in probes:
        rmse.setdefault(probe.name, {})[probe.levels] = probe.rmse_m
    for name, values in PAPER["depth_probes"].items():
        rmse[f"*{name} (SAK, Table 27)*"] = dict(zip((1, NUM_LEVELS), values, strict=True))
    rows = ([name, cell(one.get(1), 3), cell(one.get(NUM_LEVELS), 3)] for name, one in rmse.items())
    return markdown_table([data, "lin. 1 RMSE (m ↓)", "lin. 4 RMSE (m ↓)"], rows)


def _batches(
    dataset: LabelledDataset, numbers: Iterable[int], size: Size, batch_size: int, threads: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Whole images as in `evaluate`: uint8 (B, 3, H, W), their depth (B, H, W) in the room's metres, and the
    magnification of each (B, 1, 1), by which it looks nearer."""
    for items in batches(dataset, ["depth"], numbers, size, batch_size, threads):
        magnification_B = torch.tensor([item.magnification for item in items])
        yield (
            torch.stack([item.image_3HW for item in items]),
            torch.stack([item.labels["depth"] for item in items]),
            magnification_B[:, None, None],
        )
