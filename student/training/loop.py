"""The training loop: optimizer steps, checkpoints and measurements, whatever the objective is.

Nothing here has a state beside the model's, the optimizer's and FAMO's: batches, random seeds and the
learning rate are functions of the step. That is what makes a resumed run the same run.
"""

from __future__ import annotations

import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import get_total_norm

from teachercache.pipeline.errors import TrainingError
from teachercache.pipeline.loading.loader import Batch
from teachercache.pipeline.stop_request import StopRequest
from teachercache.student.losses.weighting import Losses
from teachercache.student.timing import StageTimer
from teachercache.student.training.checkpoint import save_checkpoint
from teachercache.student.training.run_log import RunLog
from teachercache.student.training.train_recipe import TrainRecipe

if TYPE_CHECKING:
    from teachercache.student.training.run import Run

_NAMED = 5


class Objective(Protocol):
    """What is minimised: called with the batches of a step, one of each input."""

    def __call__(self, batches: Sequence[Batch], timer: StageTimer) -> tuple[Tensor, dict[str, Tensor]]: ...

    def losses(self, batches: Sequence[Batch], timer: StageTimer) -> list[Losses]:
        """Of the teachers, for FAMO."""
        return []


@dataclass
class LoopResult:
    """`seconds` are sums over the `steps` that were taken, by stage."""

    next_step: int
    steps: int = 0
    last_loss: float | None = None
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    wall_s: float = 0.0
    interrupted: bool = False


@dataclass
class _Taken:
    """A step that the device may still be at; `done`, by the host's clock, once it was read."""

    step: int
    rows: list[list[NDArray]]
    timer: StageTimer
    names: list[str]
    values: Tensor

    def __post_init__(self) -> None:
        cuda = self.values.is_cuda
        self.values = self.values.to("cpu", non_blocking=cuda)  # into pinned memory
        self._sent = torch.cuda.current_stream().record_event() if cuda else None
        self.done = time.perf_counter()

    def read(self) -> dict[str, float]:
        if self._sent is not None:
            self._sent.synchronize()
            self.done = time.perf_counter()
        return dict(zip(self.names, self.values.tolist(), strict=True))


class DeviceBatches:
    """On a GPU, copies run on a stream of their own: while the host is a step ahead, the next batch arrives
    beside the step that is computed. Elsewhere a batch stays as it is, for those who use it to move."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """`batch` on its way to the device: what this thread computes from now on comes after."""
        if self._stream is None:
            return batch
        computing = torch.cuda.current_stream(self._device)

        def copy(tensor: Tensor) -> Tensor:
            copied = tensor.to(self._device, non_blocking=True)
            copied.record_stream(computing)  # which may use it until it is done, whoever lets it go
            return copied

        with torch.cuda.stream(self._stream):
            copied = batch.map(copy)
        computing.wait_stream(self._stream)
        return copied


@dataclass
class TrainingLoop:
    """Minimises `objective(batches, timer) -> (loss, terms to log)` on every process of `run`.

    `not_finite`: what of the data of some rows is not finite, by input. FAMO learns from each step, for which
    the batches are looked at again.
    """

    run: Run
    objective: Objective
    not_finite: Sequence[Callable[[NDArray], list[str]]] = ()

    def __post_init__(self) -> None:
        self.recipe, self.accelerator, self.model = self.run.recipe, self.run.accelerator, self.run.model
        self._on_device = DeviceBatches(self.accelerator.device)

    def take_steps(self, batches: Iterator[Sequence[Batch]], log: RunLog) -> LoopResult:
        """Those that are left of the run, or fewer when SIGTERM or Ctrl-C comes.

        What a step gave is read when the next one is under way, so that no GPU waits for the host; a run may
        thus stop a step later. Raises `TrainingError` when the loss is no longer finite; checkpoints are
        older than that.
        """
        result = LoopResult(next_step=self.run.first_step)
        late: _Taken | None = None
        self.model.train()
        self._clock = time.perf_counter()
        with StopRequest(signal.SIGTERM, signal.SIGINT) as stop:  # heard of by every process in the same step
            while result.next_step < self.run.total_steps and not result.interrupted:
                taken = self._step(result.next_step, batches, stop)
                result.next_step += 1
                if late is not None:
                    self._finish(late, result, log)
                late, last = taken, result.next_step == self.run.total_steps
                saves = last or result.next_step % self.recipe.checkpoint_every_steps == 0
                if saves or result.interrupted or log.looks(taken.step):  # what needs this step's student
                    self._finish(taken, result, log)
                    late = None
                    if saves or result.interrupted:
                        self._save(result.next_step)
                    self._clock = time.perf_counter()
        return result

    def _step(self, step: int, batches: Iterator[Sequence[Batch]], stop: StopRequest) -> _Taken:
        """One optimizer step; what it gives are means over micro-batches and processes."""
        for group in self.run.optimizer.param_groups:
            group["lr"] = self.run.learning_rate(step)
        timer, device = StageTimer(self.accelerator.device), self.accelerator.device
        rows, logged, norms = list[list[NDArray]](), list[Tensor](), list[Tensor]()
        for micro_step in range(self.accelerator.gradient_accumulation_steps):
            inputs = [self._on_device(batch) for batch in next(batches)]
            rows.append([batch.rows for batch in inputs])
            for stage, seconds in [one for batch in inputs for one in batch.seconds.items()]:
                timer.add(stage, seconds)
            seed = step_seed(self.recipe.seed, step, micro_step, self.accelerator.process_index)
            torch.manual_seed(seed)
            with self.accelerator.accumulate(self.model):
                loss, terms = self.objective(inputs, timer)
                with timer.stage("backward"):
                    self.accelerator.backward(loss)
                with timer.stage("optimizer"):
                    if self.accelerator.sync_gradients:
                        norms.append(self._clip())
                    self.run.optimizer.step()
                    self.run.optimizer.zero_grad()
            if self.run.famo is not None:
                torch.manual_seed(seed)
                self.run.famo.update(self.objective.losses(inputs, timer))
            logged.append(torch.stack([loss.detach(), *terms.values()]))
        stopping = torch.full((), float(stop.requested), device=device)  # a copy from the host would block
        values = torch.cat([torch.stack(logged).mean(0), torch.stack([*norms, stopping])])
        values = self.accelerator.reduce(values, reduction="mean")
        return _Taken(step, rows, timer, ["loss", *terms, "grad_norm", "stop"], values)

    def _clip(self) -> Tensor:
        """Clip the gradients, unless `clip_norm` is 0; returns the norm that they had."""
        parameters = list(self.model.parameters())
        if self.recipe.clip_norm:
            return self.accelerator.clip_grad_norm_(parameters, self.recipe.clip_norm)
        return get_total_norm([one.grad for one in parameters if one.grad is not None])

    def _finish(self, taken: _Taken, result: LoopResult, log: RunLog) -> None:
        """Read what a step gave, which waits until it is done, and log it."""
        values, seconds = taken.read(), taken.timer.take()
        result.interrupted |= values.pop("stop") > 0
        if not math.isfinite(values["loss"]):
            raise self._error(taken.step, values["loss"], taken.rows)
        duration, self._clock = taken.done - self._clock, taken.done
        values["images_per_s"] = self.recipe.images_per_step(self.accelerator.num_processes) / duration
        values["lr"] = self.run.learning_rate(taken.step)
        log.write(taken.step, values | {f"seconds/{stage}": spent for stage, spent in seconds.items()})
        for stage, spent in seconds.items():
            result.seconds[stage] += spent
        result.wall_s += duration
        result.last_loss = values["loss"]
        result.steps += 1

    def _save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            folder, keep = self.recipe.checkpoint_folder, self.recipe.keep_checkpoints
            save_checkpoint(folder, step, model, self.run.optimizer, self.run.identity, keep, self.run.famo)
        self.accelerator.wait_for_everyone()

    def _error(self, step: int, loss: float, rows: list[list[NDArray]]) -> TrainingError:
        """Every process comes here in the same step, and each knows only its own rows."""
        by_input = zip(self.not_finite, zip(*rows, strict=True), strict=False)  # or none is asked
        found: list[str] = gather_object(
            [line for look, some in by_input for line in look(np.concatenate(some))]
        )
        if not found:
            return TrainingError(
                f"The loss is no longer finite at step {step}.",
                got=loss,
                expected="a finite number",
                do="lower optimizer.lr, set clip_norm or lengthen the warm-up, in a new output folder",
            )
        assert isinstance(self.recipe, TrainRecipe)
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        return TrainingError(
            f"The loss is not finite at step {step}, since the data are not.",
            got="; ".join(found[:_NAMED]) + more,
            expected="finite features and labels: no codec writes others, so these were changed since",
            do=f"of features: teachercache verify {self.recipe.cache} --full, then teachercache repair "
            f"{self.recipe.cache}; labels: put the files back. Then run the same command again",
        )


def step_seed(*position: int) -> int:
    """A seed for (run's seed, step, micro-step, process), well mixed, so that no two share a stream."""
    return int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0])
