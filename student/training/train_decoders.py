"""Train decoders on the features of a student, or of teachers from a cache (KPU, "Implementation Details").

`train_decoders(recipe)` is what every process runs. Running it again goes on from the newest checkpoint.

    <output>/checkpoints/, metrics.jsonl, tensorboard/    as of other runs
    <output>/decoders/       the finished decoders, for `teachercache.student.decoders.model.load_decoders`
    <output>/student/        the student, where it learns along
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teachercache.pipeline.errors import extra

with extra("train"):
    from accelerate import Accelerator

from teachercache.pipeline.loading.loader import Batch
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.student.decoders.model import Decoders, load_student_at, require_divided, widths_of
from teachercache.student.losses.weighting import Losses
from teachercache.student.models.student import WEIGHTS_FILE, find_saved
from teachercache.student.timing import StageTimer
from teachercache.student.training.decoder_inputs import (
    CacheInput,
    DecoderSource,
    ImageInput,
    widths_of_teachers,
)
from teachercache.student.training.decoder_recipe import DecoderRecipe, decoder_run_identity
from teachercache.student.training.environment import accelerator_for, overruled
from teachercache.student.training.run import Run, RunResult, require_folder
from teachercache.student.training.run_lock import only_trainer


class DecoderResult(RunResult):
    def use(self, saved: Path) -> str:
        return f"measure each: teachercache evaluate-decoders {saved} NAME ROOT"


def train_decoders(recipe: DecoderRecipe) -> DecoderResult:
    """Train, or continue, the decoders that `recipe` states.

    Raises `RecipeError`, `SourceError` and `CacheError` for what stands in the way, `CheckpointError` when
    the output folder holds another run, one that lives, or no sound checkpoint of this one.
    """
    accelerator = accelerator_for(recipe)
    for line in overruled(recipe):
        accelerator.print(line)
    torch.manual_seed(recipe.seed)
    sources = _sources(recipe, accelerator)
    decoders = _decoders(recipe, sources)
    require_folder(Path(recipe.output))
    with only_trainer(accelerator, Path(recipe.output)) as require_held:
        identity = decoder_run_identity(recipe, _facts(recipe, sources))
        epoch = min(source.facts["samples"] / source.facts["images_per_step"] for source in sources.values())
        run = Run(recipe, accelerator, decoders, identity, epoch, require_held)

        def streams(stack: ExitStack) -> list[Iterator[Batch]]:
            return [source.batches(run.first_batch, stack) for source in sources.values()]

        done = run.go(DecoderObjective(recipe, run.model, sources, accelerator.device), streams)
        return run.finish(DecoderResult, done, "decoders", partial(_save, recipe, decoders))


def _sources(recipe: DecoderRecipe, accelerator: Accelerator) -> dict[str, DecoderSource]:
    place = accelerator.process_index, accelerator.num_processes
    if recipe.student is not None:
        require_divided(recipe.image_size)
        return {name: ImageInput(one, recipe, *place) for name, one in recipe.decoders.items()}
    return {
        name: CacheInput(one, recipe, *place, accelerator.device) for name, one in recipe.decoders.items()
    }


def _decoders(recipe: DecoderRecipe, sources: dict[str, DecoderSource]) -> Decoders:
    student = load_student_at(recipe.student, recipe.image_size) if recipe.student is not None else None
    widths = widths_of(student, recipe.image_size) if student is not None else None
    made_of, size = dict[str, Any](), recipe.image_size
    for name, one in recipe.decoders.items():
        source = sources[name]
        content: dict[str, Any] = {"kind": one.kind, "options": one.options, "dataset": one.dataset.kind}
        if isinstance(source, CacheInput):
            size, content["teachers"] = source.cache.spec.views.size, list(source.teachers)
            require_divided(size)
            widths = widths_of_teachers(source.cache, source.teachers)
        classes = {**source.dataset.tasks, **source.dataset.decoder_tasks}[source.task]
        assert widths is not None
        made_of[name] = {**content, "classes": classes, "widths": [widths.image, list(widths.maps)]}
    return Decoders(made_of, size, student, recipe.learns)


def _facts(recipe: DecoderRecipe, sources: dict[str, DecoderSource]) -> dict[str, Any]:
    facts: dict[str, Any] = {f"inputs.{name}": source.facts for name, source in sources.items()}
    if recipe.student is not None:
        facts["student_weights"] = LocalStorage(find_saved(recipe.student)).checksum(WEIGHTS_FILE)
    return facts


@dataclass
class DecoderObjective:
    """The weighted sum of all decoders' losses, in one forward pass, which is what DDP expects."""

    recipe: DecoderRecipe
    model: nn.Module
    sources: Mapping[str, DecoderSource]
    device: torch.device

    def __call__(self, batches: Sequence[Batch], timer: StageTimer) -> tuple[Tensor, dict[str, Tensor]]:
        with timer.stage("targets"):
            inputs = {}
            for (name, source), batch in zip(self.sources.items(), batches, strict=True):
                there = batch.map(partial(Tensor.to, device=self.device, non_blocking=True))
                inputs[name] = source.inputs(there), there.labels[source.task]
        with timer.stage("forward"):
            losses = self.model(inputs)
            decoders = self.recipe.decoders
            weighted = [decoders[name.partition("/")[0]].weight * loss for name, loss in losses.items()]
        return torch.stack(weighted).sum(), {f"loss/{name}": loss.detach() for name, loss in losses.items()}

    def losses(self, batches: Sequence[Batch], timer: StageTimer) -> list[Losses]:
        """None: no weighting learns from them."""
        return []


def _save(recipe: DecoderRecipe, decoders: Decoders, folder: Path, _: DecoderResult) -> None:
    student = recipe.student and str(find_saved(recipe.student).resolve())
    if recipe.learns:
        assert decoders.student is not None
        decoders.student.save_pretrained(folder.parent / "student")
        student = "../student"
    decoders.save_pretrained(folder, student)
