"""What every run does, whatever it trains: its optimizer, the checkpoint to go on from, the loop, its end."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import AdamW

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CheckpointError, RecipeError, extra

with extra("train"):
    from accelerate import Accelerator

from teachercache.pipeline.loading.loader import Batch
from teachercache.pipeline.places.durable import make_folder
from teachercache.student.losses.weighting import Famo
from teachercache.student.saving import saving
from teachercache.student.similarity import Similarity
from teachercache.student.timing import bottleneck
from teachercache.student.training.checkpoint import (
    DAMAGED_SUFFIX,
    load_newest,
    misnamed,
    require_output,
    set_aside,
)
from teachercache.student.training.decoder_recipe import AnyRecipe
from teachercache.student.training.loop import Objective, TrainingLoop
from teachercache.student.training.run_log import METRICS_FILE, RunLog, logged_steps


@dataclass(frozen=True)
class RunResult:
    """`saved`, where what was trained is, is None when SIGTERM or Ctrl-C ended the run; the same command then
    continues it. `use`: what to do with it.

    `steps` counts those of the whole run, earlier processes' included; `last_loss` is None where there
    was no step left to take. `images_per_s` is over all processes. `similarity`: to each teacher, after the
    last of these steps, of a run with `validation`.
    """

    output: Path
    saved: Path | None
    use: str
    steps: int
    last_loss: float | None
    images_per_s: float
    bottleneck: str
    similarity: Mapping[str, Similarity]

    @property
    def interrupted(self) -> bool:
        return self.saved is None

    def __str__(self) -> str:
        told = f"{self.bottleneck}\n{self.steps:,} steps, {self.images_per_s:.1f} img/s"
        if self.saved is None:
            return f"{told}; interrupted: the same command goes on from there"
        return f"{told}; {self.saved.name}: {self.saved}\n{self.use}"

    @property
    def student(self) -> Path | None:
        """What was trained, where that is a student."""
        return self.saved


@dataclass
class Run:
    """A run that trains `module`, on one process of `accelerator`, from the newest checkpoint on.

    `identity`: what decides its numbers. `steps_per_epoch`: of its first input. `require_held` raises where
    another run has taken the output folder.
    """

    recipe: AnyRecipe
    accelerator: Accelerator
    module: nn.Module
    identity: dict[str, Any]
    steps_per_epoch: float
    require_held: Callable[[], None]
    famo: Famo | None = None

    def __post_init__(self) -> None:
        schedule, rate = self.recipe.schedule, self.recipe.optimizer
        steps = schedule.steps(self.steps_per_epoch)
        self.total_steps = steps[0]
        self.learning_rate = partial(schedule.rate, peak=rate.lr, steps=steps)
        if self.accelerator.device.type == "cuda" and self.accelerator.num_processes > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.module)
        learning = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        optimizer = AdamW(learning, **rate.model_dump(), fused=True)
        with warnings.catch_warnings():  # accelerate 1.15 passes what torch 2.15 calls deprecated
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.model, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        self.first_step = self._resume()
        self.first_batch = self.first_step * self.recipe.gradient_accumulation_steps

    def go(
        self,
        objective: Objective,
        streams: Callable[[ExitStack], Sequence[Iterable[Batch]]],
        use: str,
        save: Callable[[RunResult], None],
        not_finite: Sequence[Callable[[NDArray], list[str]]] = (),
        pictures: Callable[[], Mapping[str, NDArray]] = dict,
        validate: Callable[[], dict[str, Similarity]] | None = None,
        cache: FeatureCache | None = None,
    ) -> RunResult:
        """Take the steps that are left, say what held the run up, and `save` what was trained after the last.

        `streams`: the batches of each input from `first_batch` on, which the stack closes. `use`: what to do
        with what was trained. The others are those of `TrainingLoop`, `RunLog` and `start_trackers`.
        """
        log = RunLog(self, pictures, validate, cache)
        with log, ExitStack() as stack:
            batches = zip(*streams(stack), strict=True)
            done = TrainingLoop(self, objective, not_finite).take_steps(batches, log)
        images = done.steps * self.recipe.images_per_step(self.accelerator.num_processes)
        result = RunResult(
            output=Path(self.recipe.output),
            saved=None if done.interrupted else self.recipe.saved,
            use=use,
            steps=done.next_step,
            last_loss=done.last_loss,
            images_per_s=images / done.wall_s if done.steps else 0.0,
            bottleneck=bottleneck(done.seconds, done.steps),
            similarity=log.similarity,
        )
        if result.saved is not None and self.accelerator.is_main_process:
            with saving(f"The finished {self.recipe.makes}", self.recipe.saved):
                save(result)
        self.accelerator.wait_for_everyone()
        self.accelerator.print(result)
        self.accelerator.end_training()
        return result

    def _resume(self) -> int:
        """Load the newest checkpoint of the output folder, if there is one; the first step to take."""
        folder = self.recipe.checkpoint_folder
        require_output(folder, self.recipe.resume)  # again: another run may just have ended
        first_step, damaged = load_newest(folder, self.module, self.optimizer, self.identity, self.famo)
        finished = self.recipe.saved.exists()
        taken = 0 if first_step else logged_steps(Path(self.recipe.output))
        if not first_step and (finished or taken > self.recipe.checkpoint_every_steps):
            raise CheckpointError(
                "This output holds a run that came further, and no checkpoint of it to continue from.",
                got=f"the {self.recipe.makes} of a finished run, {self.recipe.saved}"
                if finished
                else f"{taken} steps in {self.recipe.output}/{METRICS_FILE}",
                expected=f"checkpoints in {folder}, or an output without a run",
                do="put them back; to begin again choose another output, or move this one away",
            )
        steps = self.accelerator.gather(torch.tensor([first_step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise CheckpointError(
                "The processes of this run do not see the same checkpoints.",
                got=f"newest steps {steps}, by process",
                expected="one output folder that all machines share",
                do="put `output` on a shared file system",
            )
        if self.accelerator.is_main_process:
            for path, error in damaged.items():
                aside = set_aside(path).name
                print(f"{error}\n{path.name} is set aside as {aside}: going on from {first_step} steps.")
            if others := [name for name in misnamed(folder) if DAMAGED_SUFFIX not in name]:
                print(f"Ignored in {folder}, since these are not names of checkpoints: {', '.join(others)}.")
        return first_step


def require_folder(output: Path) -> None:
    try:
        make_folder(output)
    except OSError as error:
        raise RecipeError(
            "The output folder cannot be made.",
            got=f"{error.filename}: {error.strerror}",
            expected="a folder, or a place where this user can make one",
            do="choose another output",
        ) from error
