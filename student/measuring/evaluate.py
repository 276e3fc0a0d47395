"""Measure how well a student does its tasks on a split of a data set (SAK, B.4).

The student sees whole images (`multitask_eval`), labels follow them, and padding is not measured. Under
`accelerate launch` or `torchrun` every process takes its share of the images.

    <output>/scores.json      the scores, with student and data set
    <output>/scores.md        the same as a table, with rows of the paper
    <output>/predictions/     a folder for each task, one PNG for each image
    <output>/*.png            a panel of predictions, and the routers' gates
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import Problems, RecipeError
from teachercache.pipeline.ordered_map import ordered_map
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.terminal import Terminal, in_markdown, progress_bar
from teachercache.pipeline.views import draw_view, render_view
from teachercache.student.datasets import LabelledDataset
from teachercache.student.datasets.labels import render_labels
from teachercache.student.measuring.figures import gate_figure, prediction_figure
from teachercache.student.measuring.paper_results import (
    backbone_of,
    cell,
    markdown_table,
    paper_rows,
    single_task_scores,
)
from teachercache.student.measuring.task_outputs import TASK_OUTPUTS, further, gains, update, value
from teachercache.student.models.student import Student, StudentOutput
from teachercache.student.saving import replacing, saving
from teachercache.student.training.student_recipe import unfit_experts

PANEL_IMAGES = 4
_MEASURES_AGAIN = "it measures everything again"
_BATCHES_AHEAD = 2
Made = TypeVar("Made")


@dataclass(frozen=True)
class Evaluation:
    """`scores`: in percent, degrees (normals) and metres (depth), by task. `gates`: for each task the mean
    weight of each expert, (levels, experts), where the student has routers. `backbone`: "ViT-S", "ViT-B" or
    "ViT-L" for a student of one of the paper's sizes. `parameters`: the number used to predict. `further`:
    other measures of a task, by name, in percent: oisF and AP of boundaries, maxF as in the salient-object
    literature."""

    student: str
    backbone: str | None
    dataset: str
    split: str
    num_images: int
    parameters: int
    scores: dict[str, float]
    gates: dict[str, list[list[float]]]
    images_per_s: float
    processes: int = 1
    further: dict[str, dict[str, float]] = field(default_factory=dict)

    def gain(self, baseline: Mapping[str, float]) -> float:
        """Δm against a single-task baseline, in percent (SAK, Eq. 7), over the tasks that both have."""
        return float(np.mean([*gains(self.scores, baseline).values()]))

    def record(self) -> dict[str, Any]:
        """Everything, for JSON: null for the measures of a task without any label."""
        further = {task: _measured(measures) for task, measures in self.further.items()}
        return asdict(self) | {"scores": _measured(self.scores), "further": further}

    def markdown(self, baseline: Mapping[str, float] | None = None, table: int | None = None) -> str:
        """A table: this student and its own single-task `baseline`, if any, then rows of the paper
        (`paper_rows`) with the gains printed there.

        This student's gain refers to its own baseline, or else to the paper's for its size.
        """
        compared = baseline or single_task_scores(self.dataset, self.backbone) or {}
        against = "your baseline" if baseline else "the paper's single-task baseline of this size"
        data = f"on {self.dataset}, {self.split} ({self.num_images} images)"
        title = f"{in_markdown(self.student)} ({self.parameters / 1e6:.0f}M parameters)"
        gain = self.gain(compared) if compared.keys() >= self.scores.keys() else None
        rows = [(title, self.scores, gain)]
        if baseline:
            rows.append(("your baseline", dict(baseline), 0.0))
        for row in paper_rows(self.dataset, self.backbone, table):
            printed = row.gain if row.scores.keys() == self.scores.keys() else None
            rows.append((f"*{row.title}*", row.scores, printed))
        text = markdown_table(
            [data, *map(_head, self.scores), f"Δm %, yours against {against}" if compared else "Δm %"],
            [
                [name, *(cell(scores.get(t), 4 if t == "depth" else 2) for t in self.scores), cell(gain)]
                for name, scores, gain in rows
            ],
        )
        for task, others in self.further.items():
            measures = ", ".join(f"{name} {score:.2f}" for name, score in others.items())
            text += f"\n{TASK_OUTPUTS[task].title}, by other measures (%): {measures}\n"
        return text


def _measured(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: score if math.isfinite(score) else None for name, score in scores.items()}


def _head(task: str) -> str:
    how = TASK_OUTPUTS[task]
    return f"{how.title} {how.metric} ({how.unit} {'↓' if how.lower_is_better else '↑'})"


@torch.no_grad()
def evaluate(
    student: Student,
    dataset: LabelledDataset,
    *,
    name: str = "student",
    output: str | Path | None = None,
    max_images: int | None = None,
    batch_size: int = 4,
    threads: int = 2,
    boundary_processes: int = 0,
    cache: FeatureCache | None = None,
    baseline: Mapping[str, float] | None = None,
    table: int | None = None,
) -> Evaluation:
    """Measure every task that student and data set have in common, on the device that accelerate finds.

    `cache`: of the same images in `multitask_eval` views, for a student that works on teachers' features.
    `boundary_processes` match boundaries in parallel to the student, which is most of the work of that task.
    `baseline`: single-task scores to state gains against (`read_baseline`), instead of the paper's.
    `table`: show the rows of this table of the paper, instead of those of its comparisons.
    Every process gets the same result; the main one writes `output`.
    Raises `RecipeError` if there is no common task, no image, or no such table, `DiskSpaceError` or
    `CheckpointError` if `output` cannot be written.
    """
    tasks = [task for task in student.tasks if task in dataset.tasks]
    if not tasks:
        raise RecipeError(
            "Student and data set have no task in common.",
            got=f"a student of {', '.join(student.tasks) or 'no task (stage 1)'}",
            expected=f"some of {', '.join(dataset.tasks)}",
            do="evaluate a student of stage 2, on the data set it was trained for",
        )
    if not dataset.keys:
        raise RecipeError(
            "There are no images to evaluate on.",
            got=f"no key in the {dataset.split} split of {dataset.name}",
            expected="at least one",
            do="name another split, or check the data set with `teachercache datasets`",
        )
    if table is not None:
        paper_rows(dataset.name, None, table)
    if student.reads_features:
        _require_cache(student, cache, dataset.keys[:max_images])
    state, started = process_state(), time.perf_counter()
    student = student.to(state.device).eval()
    numbers = range(len(dataset.keys))[:max_images]
    mine = numbers[state.process_index :: state.num_processes]
    with ExitStack() as stack:
        executor = None
        if boundary_processes:
            pool = ProcessPoolExecutor(boundary_processes, mp_context=get_context("spawn"))
            executor = stack.enter_context(pool)
        metrics = {
            task: TASK_OUTPUTS[task].new_metric(dataset.tasks[task], dataset.boundary_distance, executor)
            for task in tasks
        }
        second_metrics = {t: named[1]() for t in tasks if (named := TASK_OUTPUTS[t].new_second) is not None}
        gates = dict[str, Tensor]()
        panel: list[tuple[EvaluatedItem, dict[str, NDArray]]] = []  # the first few, for a figure
        console = Terminal(stderr=True)
        hidden = not (state.is_main_process and console.is_terminal)
        progress = stack.enter_context(progress_bar(console, disable=hidden))
        bar = progress.add_task("evaluate", total=len(mine))
        for items in batches(dataset, tasks, mine, student.image_size, batch_size, threads):
            images_B3HW = torch.stack([item.image_3HW for item in items]).to(state.device)
            inputs: dict[str, Any] = {"full": True, "maps": False}
            if cache is not None and student.reads_features:
                inputs["features"] = _features(cache, student.teachers, items, state.device)
            outputs: StudentOutput = student(student.normalize(images_B3HW), **inputs)
            estimates = {t: TASK_OUTPUTS[t].estimate(outputs.predictions[t].float()) for t in tasks}
            if "depth" in estimates:
                nearer_B = estimates["depth"].new_tensor([item.magnification for item in items])
                estimates["depth"] *= nearer_B[:, None, None]
            for task in tasks:
                labels = torch.stack([item.labels[task] for item in items]).to(state.device)
                update(metrics[task], estimates[task], labels)
                if task in second_metrics:
                    update(second_metrics[task], estimates[task], labels)
            for task, gates_BSE in outputs.gates.items():
                gates[task] = gates.get(task, 0) + gates_BSE.double().sum(0).cpu()
            if output:
                arrays = {task: values.cpu().numpy() for task, values in estimates.items()}
                shown = [{task: values[i] for task, values in arrays.items()} for i in range(len(items))]
                panel += list(zip(items, shown, strict=True))[: PANEL_IMAGES - len(panel)]
                with saving("The predictions", Path(output), _MEASURES_AGAIN):
                    _save_predictions(Path(output) / "predictions", items, shown)
            progress.advance(bar, len(items))
        for metric in (*metrics.values(), *second_metrics.values()):
            metric.reduce(add_up)
    parts: list[dict[str, Tensor]] = gather_object([gates])  # some processes may have had no image
    for task in max(parts, key=len):
        gates[task] = torch.stack([part[task] for part in parts if part]).sum(0) / len(numbers)
    evaluation = Evaluation(
        student=name,
        backbone=backbone_of(student),
        dataset=dataset.name,
        split=dataset.split,
        num_images=len(numbers),
        parameters=student.num_parameters,
        scores={task: value(metric) for task, metric in metrics.items()},
        gates={task: gates_SE.tolist() for task, gates_SE in gates.items()},
        images_per_s=len(numbers) / (time.perf_counter() - started),
        processes=state.num_processes,
        further={t: more for t in tasks if (more := further(t, metrics[t], second_metrics.get(t)))},
    )
    if output and state.is_main_process:
        with saving("The scores", Path(output), _MEASURES_AGAIN):
            _write(evaluation, Path(output), student.experts, panel, evaluation.markdown(baseline, table))
    return evaluation


def process_state() -> PartialState:
    """This process among those that the launcher started."""
    return PartialState(cpu=not torch.accelerator.is_available())  # else CPUs silently work alone


def add_up(sums: Tensor) -> Tensor:
    """The sums of all processes, for `SumMetric.reduce`."""
    return reduce(sums.to(process_state().device), "sum").cpu()


@dataclass(frozen=True)
class EvaluatedItem:
    """A sample as the student sees it, its labels on the same pixels, with depth in the room's metres: a
    smaller image seems farther away by 1 / `magnification`, in predictions too."""

    key: str
    image_3HW: Tensor
    labels: dict[str, Tensor]
    magnification: float


def in_threads(
    make: Callable[[int], Made], numbers: Iterable[int], batch_size: int, threads: int
) -> Iterator[list[Made]]:
    """`make(number)` of every number, in order, `batch_size` at a time; the last batch may be smaller."""
    with ThreadPoolExecutor(threads, thread_name_prefix="make") as pool:
        made = ordered_map(pool, make, numbers, _BATCHES_AHEAD * batch_size)
        while batch := list(islice(made, batch_size)):
            yield batch


def batches(
    dataset: LabelledDataset,
    tasks: Sequence[str],
    numbers: Iterable[int],
    size: Size,
    batch_size: int,
    threads: int,
) -> Iterator[list[EvaluatedItem]]:
    """Samples in order, which threads make a few batches ahead."""
    policy = ViewPolicy(policy="multitask_eval", size=size)

    def make(number: int) -> EvaluatedItem:
        image, key = dataset.image(number), dataset.keys[number]
        view = draw_view(policy, key, image.width, image.height, 0)
        labels = render_labels(dataset.labels(number, tasks, measured=True), view, size)
        if "depth" in labels:
            labels["depth"] *= view.magnification
        return EvaluatedItem(key, render_view(image, view, size), labels, view.magnification)

    return in_threads(make, numbers, batch_size, threads)


def _require_cache(student: Student, cache: FeatureCache | None, keys: Sequence[str]) -> None:
    expected = f"a cache of {', '.join(student.teachers)} with multitask_eval views of {student.image_size}"
    got = "no cache"
    if cache is not None:
        names = cache.check_teachers(student.teachers)
        Problems(unfit_experts({name: cache.spec.teachers[name] for name in names})).require_none()
        got = f"{cache.spec.views.policy} views of {cache.spec.views.size}"
        if got == f"multitask_eval views of {student.image_size}":
            missing = sorted(set(keys).difference(cache.samples["key"].to_pylist()))
            if not missing:
                return
            got = f"a cache without {len(missing)} of these images, such as {missing[0]}"
    raise RecipeError(
        "This student works on its teachers' features of the images.",
        got=got,
        expected=expected,
        do="build one from the images of this split, and pass it as --cache",
    )


def _features(
    cache: FeatureCache, teachers: list[str], items: Sequence[EvaluatedItem], device: torch.device
) -> dict[str, Tensor]:
    """(B, S, H, W, C) for each teacher."""
    rows = cache.index.rows([cache.find(item.key, whole=True) for item in items], 0)
    return {name: encoded.decode(device) for name, encoded in cache.read(rows, teachers).items()}


def _save_predictions(folder: Path, items: list[EvaluatedItem], estimates: list[dict[str, NDArray]]) -> None:
    """One PNG per task and sample: class indices, probabilities · 255, or depth in millimetres (16 bits);
    normals as colours."""
    for item, by_task in zip(items, estimates, strict=True):
        for task, estimate in by_task.items():
            path = folder / task / f"{item.key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(TASK_OUTPUTS[task].encode(estimate)).save(path)


def _write(
    evaluation: Evaluation,
    folder: Path,
    experts: Sequence[str],
    panel: Sequence[tuple[EvaluatedItem, dict[str, NDArray]]],
    markdown: str,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = json.dumps(evaluation.record(), indent=2, allow_nan=False)
    for name, text in (("scores.json", f"{record}\n"), ("scores.md", markdown)):
        with replacing(folder / name) as file:
            file.write_text(text)
    images = [item.image_3HW.permute(1, 2, 0).numpy() for item, _ in panel]
    labels = {task: [item.labels[task].numpy() for item, _ in panel] for task in evaluation.scores}
    estimates = {task: [shown[task] for _, shown in panel] for task in evaluation.scores}
    prediction_figure(images, labels, estimates).savefig(folder / "predictions.png")
    if evaluation.gates:
        gates = {task: np.array(gates_SE) for task, gates_SE in evaluation.gates.items()}
        gate_figure(gates, experts).savefig(folder / "gates.png")
