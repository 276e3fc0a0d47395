"""The training loop: optimizer steps, checkpoints and measurements, whatever the objective is.

Nothing here has a state beside the model's and the optimizer's: batches, random seeds and the
learning rate are functions of the step. That is what makes a resumed run the same run.
"""

from __future__ import annotations

import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from teachercache.pipeline.errors import TrainingError
from teachercache.pipeline.loading.loader import Batch
from teachercache.pipeline.stop_request import StopRequest
from teachercache.student.timing import StageTimer
from teachercache.student.training.checkpoint import save_checkpoint
from teachercache.student.training.run_log import RunLog
from teachercache.student.training.train_recipe import TrainRecipe

_NAMED = 5
Objective = Callable[[Batch, StageTimer], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class LoopResult:
    """`seconds` are sums over the `steps` that were taken, by stage."""

    next_step: int
    steps: int = 0
    last_loss: float | None = None
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    wall_s: float = 0.0
    interrupted: bool = False


class TrainingLoop:
    """Minimises `objective(batch, timer) -> (loss, terms to log)` on every process of `accelerator`.

    `not_finite` says what of the data of some rows is not finite.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: TrainRecipe,
        model: nn.Module,
        optimizer: Optimizer,
        objective: Objective,
        learning_rate: Callable[[int], float],
        run: Mapping[str, Any],
        not_finite: Callable[[NDArray], list[str]],
    ) -> None:
        self._accelerator = accelerator
        self._recipe = recipe
        self._model = model
        self._optimizer = optimizer
        self._objective = objective
        self._learning_rate = learning_rate
        self._run = run
        self._not_finite = not_finite
        self._rows: list[NDArray] = []
        self._timer = StageTimer(accelerator.device)

    def run(self, batches: Iterator[Batch], first_step: int, total_steps: int, log: RunLog) -> LoopResult:
        """Take the steps `first_step`, …, `total_steps - 1`, or fewer when SIGTERM comes.

        Raises `TrainingError` when the loss is no longer finite; checkpoints are older than that.
        """
        result = LoopResult(next_step=first_step)
        images_per_step = self._recipe.images_per_step(self._accelerator.num_processes)
        self._model.train()
        with StopRequest(signal.SIGTERM) as stop:  # heard of by every process in the same step
            while result.next_step < total_steps and not result.interrupted:
                step, started = result.next_step, time.perf_counter()
                values = self._step(step, batches, stop)
                seconds = self._timer.take()
                duration = time.perf_counter() - started
                result.interrupted = values.pop("stop") > 0
                if not math.isfinite(values["loss"]):
                    raise self._error(step, values["loss"])
                values["images_per_s"] = images_per_step / duration
                log.write(step, values | {f"seconds/{stage}": spent for stage, spent in seconds.items()})
                for stage, spent in seconds.items():
                    result.seconds[stage] += spent
                result.wall_s += duration
                result.last_loss = values["loss"]
                result.steps += 1
                result.next_step += 1
                due = result.next_step % self._recipe.checkpoint_every_steps == 0
                if due or result.interrupted or result.next_step == total_steps:
                    self._save(result.next_step)
        return result

    def _step(self, step: int, batches: Iterator[Batch], stop: StopRequest) -> dict[str, float]:
        """One optimizer step; returns what is logged, as means over micro-batches and processes."""
        rate = self._learning_rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        clip_norm = self._recipe.clip_norm or math.inf  # which clips nothing; the norm is still measured
        logged: list[dict[str, Tensor]] = []
        self._rows = []
        for micro_step in range(self._accelerator.gradient_accumulation_steps):
            batch = next(batches)
            self._rows.append(batch.rows)
            for stage, seconds in batch.seconds.items():
                self._timer.add(stage, seconds)
            torch.manual_seed(step_seed(self._recipe.seed, step, micro_step, self._accelerator.process_index))
            with self._accelerator.accumulate(self._model):
                loss, terms = self._objective(batch, self._timer)
                with self._timer.stage("backward"):
                    self._accelerator.backward(loss)
                with self._timer.stage("optimizer"):
                    if self._accelerator.sync_gradients:
                        parameters = self._model.parameters()
                        terms["grad_norm"] = self._accelerator.clip_grad_norm_(parameters, clip_norm)
                    self._optimizer.step()
                    self._optimizer.zero_grad()
            logged.append({"loss": loss.detach(), **terms})
        means = {
            name: torch.stack([row[name] for row in logged if name in row]).mean() for name in logged[-1]
        }
        means["stop"] = torch.tensor(float(stop.requested), device=self._accelerator.device)
        values = self._accelerator.reduce(torch.stack(list(means.values())), reduction="mean").tolist()
        return dict(zip(means, values, strict=True)) | {"lr": rate}

    def _save(self, step: int) -> None:
        if self._accelerator.is_main_process:
            model = self._accelerator.unwrap_model(self._model)
            folder, keep = self._recipe.checkpoint_folder, self._recipe.keep_checkpoints
            save_checkpoint(folder, step, model, self._optimizer, self._run, keep)
        self._accelerator.wait_for_everyone()

    def _error(self, step: int, loss: float) -> TrainingError:
        """Every process comes here in the same step, and each knows only its own rows."""
        found: list[str] = gather_object(self._not_finite(np.concatenate(self._rows)))
        if not found:
            return TrainingError(
                f"The loss is no longer finite at step {step}.",
                got=loss,
                expected="a finite number",
                do="lower optimizer.lr, set clip_norm or lengthen the warm-up, in a new output folder",
            )
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        return TrainingError(
            f"The loss is not finite at step {step}, since the data are not.",
            got="; ".join(found[:_NAMED]) + more,
            expected="finite features and labels: no codec writes others, so these were changed since",
            do=f"of features: teachercache verify {self._recipe.cache} --full, then teachercache repair "
            f"{self._recipe.cache}; labels: put the files back. Then run the same command again",
        )


def step_seed(*position: int) -> int:
    """A seed for (run's seed, step, micro-step, process), well mixed, so that no two share a stream."""
    return int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0])
