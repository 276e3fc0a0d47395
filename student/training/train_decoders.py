"""Train decoders on the features of a student, or of teachers from a cache (KPU, "Implementation Details").

`train_decoders(recipe)` is what every process runs. Running it again goes on from the newest checkpoint.

    <output>/checkpoints/, metrics.jsonl, tensorboard/    as of other runs
    <output>/decoders/       the finished decoders, for `teachercache.student.decoders.model.load_decoders`
    <output>/student/        the student, where it learns along
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teachercache.pipeline.errors import Problems, extra

with extra("train"):
    import accelerate  # noqa: F401 (what runs are made of imports it)

from teachercache.pipeline.loading.loader import Batch
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.student.decoders.model import Decoders
from teachercache.student.models.student import WEIGHTS_FILE, find_saved
from teachercache.student.timing import StageTimer
from teachercache.student.training.decoder_inputs import (
    DecoderSource,
    decoders_of,
    sources_of,
    steps_per_epoch,
)
from teachercache.student.training.decoder_recipe import DecoderRecipe, decoder_run_identity
from teachercache.student.training.environment import accelerator_for, overruled
from teachercache.student.training.loop import Objective
from teachercache.student.training.run import Run, RunResult, require_folder
from teachercache.student.training.run_lock import only_trainer
from teachercache.student.training.trackers import missing_trackers


def train_decoders(recipe: DecoderRecipe) -> RunResult:
    """Train, or continue, the decoders that `recipe` states.

    Raises `RecipeError`, `SourceError` and `CacheError` for what stands in the way, `CheckpointError` when
    the output folder holds another run, one that lives, or no sound checkpoint of this one.
    """
    accelerator = accelerator_for(recipe)
    for line in overruled(recipe):
        accelerator.print(line)
    Problems(missing_trackers(recipe.trackers)).require_none()
    torch.manual_seed(recipe.seed)
    sources = sources_of(recipe, accelerator.process_index, accelerator.num_processes, accelerator.device)
    decoders = decoders_of(recipe, sources)
    require_folder(Path(recipe.output))
    with only_trainer(accelerator, Path(recipe.output)) as require_held:
        identity = decoder_run_identity(recipe, _facts(recipe, sources))
        run = Run(recipe, accelerator, decoders, identity, steps_per_epoch(sources), require_held)

        def streams(stack: ExitStack) -> list[Iterator[Batch]]:
            return [source.batches(run.first_batch, stack) for source in sources.values()]

        done = run.go(DecoderObjective(recipe, run.model, sources, accelerator.device), streams)
        use = f"measure them: teachercache evaluate {recipe.saved} DATASET ROOT --paper kpu"
        return run.finish(done, use, partial(_save, recipe, decoders))


def _facts(recipe: DecoderRecipe, sources: dict[str, DecoderSource]) -> dict[str, Any]:
    facts: dict[str, Any] = {f"inputs.{name}": source.facts for name, source in sources.items()}
    if recipe.student is not None:
        facts["student_weights"] = LocalStorage(find_saved(recipe.student)).checksum(WEIGHTS_FILE)
    return facts


@dataclass
class DecoderObjective(Objective):
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


def _save(recipe: DecoderRecipe, decoders: Decoders, result: RunResult) -> None:
    student = recipe.student and str(find_saved(recipe.student).resolve())
    if recipe.learns:
        assert decoders.student is not None
        decoders.student.save_pretrained(result.output / "student")
        student = "../student"
    decoders.save_pretrained(recipe.saved, student)
