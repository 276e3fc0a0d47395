"""SAK's ablations in miniature: Tables 3, 4 and 17 on synthetic scenes, from scratch, on a CPU.

    python -m benchmarks.mini_sak                  3 seeds; with two quiet cores less than 30 minutes
    python -m benchmarks.mini_sak --smoke          the same path in a minute, too short to mean anything
    python -m benchmarks.mini_sak --teacher-steps 4000 --stage-1-steps 4000 --stage-2-steps 4000 --scenes 5000

Of each seed everything is made anew, by the parts that the real thing runs on: scenes, three teachers with
different objectives (labels; hidden pixels; edges), caches of their features, students, scores. The teachers
learn from many scenes, whose labels only they see; stage 1 distils them on the same images; stage 2 learns
five tasks from the labels of fewer, other scenes. Similarity and scores are of scenes that nobody was trained
on. Students and teachers are one architecture of 0.3M parameters, the students' stem without pretraining.
The paper does not say whether, without paths, it compares the stem or what its aligners make of it: here are
both.

What is compared with the paper is the sign of a difference, seed by seed: the size of one on images of 64×64
pixels says nothing of ViT-B. "agrees": it has the paper's sign in every seed; "contradicts": the opposite in
every one; otherwise "undecided". By chance alone three seeds have one sign one time in four, so look at the
spread. A miniature that contradicts the paper is no proof against it.

Prints six tables and, last, one line of JSON, which is also written to OUTPUT/results.json. The same command
continues where it was interrupted.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.mini_teachers import IMAGE_SIZE, MINI_VIT, TEACHERS, MiniScenes, alikeness, train_teacher
from benchmarks.studies import Study, claim_folder, parse, run_all, spread
from teachercache import build, load_student
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.student.datasets.scenes import write_scenes
from teachercache.student.measuring.evaluate import evaluate
from teachercache.student.measuring.paper_results import PAPER, paper_rows
from teachercache.student.measuring.task_outputs import TASK_OUTPUTS
from teachercache.student.metrics import mtl_gain
from teachercache.student.similarity import representation_similarity
from teachercache.student.training.train import train
from teachercache.student.training.train_recipe import TrainRecipe

TASKS = ("semseg", "saliency", "normals", "depth", "boundary")  # parts of people are too small to be learnt
SCALE = (1.0, 1.5)  # of the views: a magnified window, never padding
RESULTS = "results.json"

LABELS_ALONE = {"teachers": [], "student": {"fusion": "sum"}}
STAGE_1: dict[str, dict[str, Any]] = {"paths": {}, "no paths": {"student": {"adapter_paths": False}}}
STAGE_2: dict[str, dict[str, Any]] = {  # as docs/recipes.md has the rows of the paper's tables
    "mor": {"init": "paths"},
    "sum": {"init": "paths", "student": {"fusion": "sum"}},
    "no paths": {"init": "no paths", "student": {"fusion": "sum", "adapter_paths": False}},
    "stage 1 alone": {"init": "paths", "distillation": {"weight": 0}},
    "stage 2 alone": {},
    "neither": LABELS_ALONE,
}
SINGLE_TASK = {f"single {task}": {**LABELS_ALONE, "tasks": [task]} for task in TASKS}

SIMILARITY = {  # of which student, and what its row is called
    "stem": ("no paths", "no paths: the stem itself"),
    "no paths": ("no paths", "no paths: through linear aligners"),
    "paths": ("paths", "paths"),
}
PAPER_SIMILARITY = {  # over its three teachers
    "no paths": PAPER["similarities"]["no adapter paths"]["mean"],
    "paths": PAPER["similarities"]["adapter paths"]["mean"],
}
PRINTED = {
    row.model: row.gain
    for table in (3, 4)
    for row in paper_rows("pascal_context", None, table)
    if row.gain is not None
}
PAPER_GAIN = {
    "no paths": PRINTED["no adapter paths, no routers"],
    "sum": PRINTED["adapter paths, summed"],
    "mor": PRINTED["adapter paths and routers"],
    "neither": PRINTED["neither stage 1 nor distillation"],
    "stage 2 alone": PRINTED["distillation, no stage 1"],
    "stage 1 alone": PRINTED["stage 1, no distillation in stage 2"],
}
PATHS_CLAIM = "paths nearer than"
CLAIMS = {  # Δm of the first above that of the second
    "MoR above sum (Table 3)": ("mor", "sum"),
    "MoR above no paths (Table 3)": ("mor", "no paths"),
    "no paths above sum (Table 3)": ("no paths", "sum"),
    "both above stage 1 alone (Table 4)": ("mor", "stage 1 alone"),
    "both above distillation in stage 2 alone (Table 4)": ("mor", "stage 2 alone"),
    "stage 1 above neither (Table 4)": ("stage 1 alone", "neither"),
    "distillation in stage 2 above neither (Table 4)": ("stage 2 alone", "neither"),
}


@dataclass(frozen=True)
class Settings:
    """All that decides the figures, beside the seed. Counts of scenes and of optimizer steps."""

    scenes: int = 1000
    labelled_scenes: int = 200
    held_out_scenes: int = 150
    views: int = 2
    batch_size: int = 16
    teacher_steps: int = 600
    stage_1_steps: int = 600
    stage_2_steps: int = 300
    learning_rate: float = 1e-3


SMOKE = Settings(
    scenes=16,
    labelled_scenes=8,
    held_out_scenes=4,
    views=1,
    batch_size=4,
    teacher_steps=3,
    stage_1_steps=3,
    stage_2_steps=2,
)


def main() -> None:
    arguments, settings = parse(__doc__ or "", Path("runs/mini_sak"), Settings(), SMOKE)
    claim_folder(arguments.output, settings)
    started = time.perf_counter()
    studies = [
        SeedStudy(arguments.output / f"seed_{seed}", seed, settings) for seed in range(arguments.seeds)
    ]
    run_all(studies, PHASES, arguments.processes)
    results = collect(studies) | {
        "wall_s": time.perf_counter() - started,
        "processes": arguments.processes,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    (arguments.output / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    print_results(results)


@dataclass(frozen=True)
class SeedStudy(Study):
    """All of one seed, in one folder. `CLS_TOKEN`: whether the teachers' class tokens are cached too."""

    seed: int
    settings: Settings

    CLS_TOKEN: ClassVar[bool] = False

    @property
    def many_scenes(self) -> Path:
        """Those of the teachers and of stage 1, and the ones that similarity is measured on."""
        return self.folder / "scenes" / "many"

    @property
    def labelled_scenes(self) -> Path:
        return self.folder / "scenes" / "labelled"

    def make_scenes(self, *_: str) -> None:
        settings = self.settings
        for number, (root, count) in enumerate(
            ((self.many_scenes, settings.scenes), (self.labelled_scenes, settings.labelled_scenes))
        ):
            write_scenes(root, count, settings.held_out_scenes, IMAGE_SIZE, seed=2 * self.seed + number)

    def make_teacher(self, name: str) -> dict[str, Any]:
        settings = self.settings
        return train_teacher(
            name,
            self.many_scenes,
            self._views(),
            settings.teacher_steps,
            settings.batch_size,
            len(TEACHERS) * self.seed + list(TEACHERS).index(name),
            self._checkpoint(name),
        )

    def make_cache(self, name: str) -> dict[str, Any]:
        root, split = {
            "many": (self.many_scenes, "train"),
            "held out": (self.many_scenes, "val"),
            "labelled": (self.labelled_scenes, "train"),
        }[name]
        views = self._views() if split == "train" else ViewPolicy(policy="multitask_eval", size=IMAGE_SIZE)
        recipe = {
            "cache": str(self._cache(name)),
            "source": str(root / "images" / split),
            "teachers": {
                teacher: {
                    "model": MINI_VIT,
                    "checkpoint": str(self._checkpoint(teacher)),
                    "cls_token": self.CLS_TOKEN,
                }
                for teacher in TEACHERS
            },
            "views": views,
            "rows_per_shard": 128,
            "runner": {"batch_size": 64, "decode_threads": 1},
        }
        cache = build(BuildRecipe.model_validate(recipe), Console(quiet=True)).cache
        features = cache.read(range(min(64, cache.num_rows)))
        last = {teacher: encoded.decode()[:, -1].flatten(0, 2) for teacher, encoded in features.items()}
        return {"rows": cache.num_rows, "alikeness": alikeness(last)}

    def distil(self, name: str) -> dict[str, Any]:
        """Stage 1, and how near the student comes to each teacher."""
        student = self._train(f"stage 1, {name}", "many", self.settings.stage_1_steps, STAGE_1[name])
        cache = FeatureCache.open(self._cache("held out"))
        loaded = load_student(student).to("cuda" if torch.cuda.is_available() else "cpu")
        found = representation_similarity(loaded, cache, batch_size=32, threads=1)
        for path in loaded.get_submodule("paths").children():
            path.aligners = nn.ModuleList()  # as wide as the teachers, the stem can be compared itself
        bare = representation_similarity(loaded, cache, batch_size=32, threads=1)
        return {
            "similarity": {teacher: similarity.mean for teacher, similarity in found.items()},
            "without aligners": {teacher: similarity.mean for teacher, similarity in bare.items()},
        }

    def learn(self, name: str) -> dict[str, Any]:
        """Stage 2, or a baseline, and what it scores for each of its tasks."""
        changes = dict((STAGE_2 | SINGLE_TASK)[name])
        student = dict(changes.pop("student", {}))
        if "init" in changes:
            student["init_from"] = str(self._run(f"stage 1, {changes.pop('init')}") / "student")
        dataset = {"kind": "scenes", "root": str(self.labelled_scenes)}
        changes |= {
            "student": student,
            "multitask": {"dataset": dataset, "tasks": changes.pop("tasks", TASKS)},
        }
        trained = self._train(name, "labelled", self.settings.stage_2_steps, changes)
        held_out = MiniScenes(self.labelled_scenes, "val")
        found = evaluate(load_student(trained), held_out, batch_size=32, threads=1)
        return {"scores": found.scores, "gates": found.gates, "parameters": found.parameters}

    def _train(self, name: str, cache: str, steps: int, changes: Mapping[str, Any]) -> Path:
        settings = self.settings
        schedule = "poly" if "multitask" in changes else "cosine"  # those of the shipped recipes
        recipe = {
            "cache": str(self._cache(cache)),
            "output": str(self._run(name)),
            "optimizer": {"lr": settings.learning_rate},
            "schedule": {"kind": schedule, "max_steps": steps, "warmup_steps": steps // 20, "final_lr": 0},
            "batch_size_per_process": settings.batch_size,
            "clip_norm": 10,
            "mixed_precision": "no",
            "seed": self.seed,
            "checkpoint_every_steps": 200,
            "log_every_steps": steps,
            "picture_every_steps": 0,
            "loader": {"threads": 1, "prefetch": 2},
        }
        student = {"stem": MINI_VIT, "pretrained": False} | changes.get("student", {})
        result = train(TrainRecipe.model_validate(recipe | dict(changes) | {"student": student}))
        if result.student is None:
            raise KeyboardInterrupt(f"{name} was interrupted; the same command continues it")
        return result.student

    def _views(self) -> ViewPolicy:
        return ViewPolicy(
            policy="multitask_train",
            num_views=self.settings.views,
            size=IMAGE_SIZE,
            seed=self.seed,
            scale=SCALE,
            photometric="color_jitter",
        )

    def _checkpoint(self, teacher: str) -> Path:
        return self.folder / "teachers" / f"{teacher}.safetensors"

    def _cache(self, name: str) -> Path:
        return self.folder / "caches" / name.replace(" ", "_")

    def _run(self, name: str) -> Path:
        return self.folder / "runs" / name.replace(",", "").replace(" ", "_")


PHASES: dict[str, Sequence[str]] = {
    "make_scenes": ["all"],
    "make_teacher": list(TEACHERS),
    "make_cache": ["many", "held out", "labelled"],
    "distil": list(STAGE_1),
    "learn": [*STAGE_2, *SINGLE_TASK],
}


def collect(studies: Sequence[SeedStudy]) -> dict[str, Any]:
    """Every figure as a list over the seeds, and what the claims of the paper come to."""

    def of(what: str, *keys: str) -> list[Any]:
        found: list[Any] = [study.result(what) for study in studies]
        for key in keys:
            found = [part[key] for part in found]
        return found

    similarity = {
        row: {
            teacher: of(f"distil, {student}", "without aligners" if row == "stem" else "similarity", teacher)
            for teacher in TEACHERS
        }
        for row, (student, _) in SIMILARITY.items()
    }
    for by_teacher in similarity.values():
        by_teacher["mean"] = [statistics.mean(values) for values in zip(*by_teacher.values(), strict=True)]
    scores = {row: {task: of(f"learn, {row}", "scores", task) for task in TASKS} for row in STAGE_2}
    single = {task: of(f"learn, single {task}", "scores", task) for task in TASKS}
    gain = {row: [_gain(scores[row], single, number) for number in range(len(studies))] for row in STAGE_2}
    sides: dict[str, tuple[Sequence[float], Sequence[float], float]] = {
        f"{PATHS_CLAIM} {what} (Table 17)": (
            similarity["paths"]["mean"],
            similarity[row]["mean"],
            PAPER_SIMILARITY["paths"] - PAPER_SIMILARITY["no paths"],
        )
        for row, what in (("stem", "the stem itself"), ("no paths", "linear aligners"))
    }
    for claim, (better, worse) in CLAIMS.items():
        sides[claim] = gain[better], gain[worse], PAPER_GAIN[better] - PAPER_GAIN[worse]
    return {
        "benchmark": "mini_sak",
        "settings": asdict(studies[0].settings),
        "seeds": [study.seed for study in studies],
        "teachers": {
            name: {
                task: {kind: of(f"make_teacher, {name}", kind, task) for kind in ("score", "guess")}
                for task in tasks
            }
            for name, tasks in TEACHERS.items()
        },
        "alikeness": {
            pair: of("make_cache, held out", "alikeness", pair)
            for pair in studies[0].result("make_cache, held out")["alikeness"]
        },
        "similarity": similarity,
        "scores": {**scores, "single": single},
        "gain": gain,
        "claims": {claim: compare(*values) for claim, values in sides.items()},
        "seconds": {
            f"{step}, {name}": of(f"{step}, {name}", "seconds")
            for step, names in PHASES.items()
            for name in names
        },
    }


def _gain(scores: Mapping[str, Sequence[float]], single: Mapping[str, Sequence[float]], seed: int) -> float:
    """Δm in percent against the single-task students of the same seed (SAK, Eq. 7)."""
    lower = [task for task in TASKS if TASK_OUTPUTS[task].lower_is_better]
    ours, theirs = ({task: row[task][seed] for task in TASKS} for row in (scores, single))
    return 100 * mtl_gain(ours, theirs, lower)


def compare(better: Sequence[float], worse: Sequence[float], paper: float) -> dict[str, Any]:
    """The differences over the seeds, beside the paper's (positive, as its claim has the better first)."""
    differences = [b - w for b, w in zip(better, worse, strict=True)]
    held = sum(difference > 0 for difference in differences)
    verdict = {len(differences): "agrees", 0: "contradicts"}.get(held, "undecided")
    if len(differences) == 1:
        verdict = "one seed says nothing"
    return {"differences": differences, "held": held, "paper": paper, "verdict": verdict}


def ignorant_teachers(teachers: Mapping[str, Any]) -> list[str]:
    """Those that in some seed do not beat a guess at one of their tasks."""
    return [
        name
        for name, tasks in teachers.items()
        if any(
            score <= guess
            for found in tasks.values()
            for score, guess in zip(found["score"], found["guess"], strict=True)
        )
    ]


def print_results(results: Mapping[str, Any]) -> None:
    console = Console(width=150)
    seeds, similarity, scores = len(results["seeds"]), results["similarity"], results["scores"]
    print(f"mean ± standard deviation over {seeds} seeds, each with scenes, teachers and students of its own")
    if ignorant := ignorant_teachers(results["teachers"]):
        print(f"No better than a guess: {', '.join(ignorant)}. This was too short to compare anything.")
    print()

    table = _table("The teachers on scenes they have not seen", "teacher", "its task", "score", "a guess")
    for name, tasks in results["teachers"].items():
        for task, found in tasks.items():
            table.add_row(name, _heading(task), spread(found["score"]), spread(found["guess"]))
    console.print(table)

    table = _table("How alike two teachers are", "teachers", "linear CKA of the last level (1: the same)")
    for pair, values in results["alikeness"].items():
        table.add_row(pair, spread(values, 3))
    console.print(table)

    table = _table("Table 17 in miniature: cosine to the teachers", "", *TEACHERS, "mean", "paper's mean")
    for row, (student, name) in SIMILARITY.items():
        cells = (spread(values, 3) for values in similarity[row].values())
        table.add_row(name, *cells, f"{PAPER_SIMILARITY[student]:.4f}")
    console.print(table)

    heads = *(_heading(task) for task in TASKS), "Δm %", "paper's"
    table = _table("Table 3 in miniature", "paths, fusion", "similarity", *heads)
    for row, name in {"no paths": "no paths", "sum": "paths, sum", "mor": "paths, MoR"}.items():
        near = similarity["no paths" if row == "no paths" else "paths"]["mean"]
        table.add_row(name, spread(near, 3), *_score_cells(results, row))
    table.add_row("single-task", "", *(spread(scores["single"][task]) for task in TASKS), "0", "0")
    console.print(table)

    table = _table("Table 4 in miniature", "distilled in", *heads)
    for row in ("neither", "stage 2 alone", "stage 1 alone", "mor"):
        table.add_row("both stages" if row == "mor" else row, *_score_cells(results, row))
    console.print(table)

    table = _table("What the paper claims", "", "difference", "seeds", "paper's", "verdict")
    for claim, found in results["claims"].items():
        digits = 3 if claim.startswith(PATHS_CLAIM) else 2
        table.add_row(
            claim,
            spread(found["differences"], digits, sign="+"),
            f"{found['held']} of {seeds}",
            f"{found['paper']:+.{digits}f}",
            found["verdict"],
        )
    console.print(table)
    print(json.dumps(results))


def _table(title: str, *heads: str) -> Table:
    return Table(*heads, title=title, title_justify="left")


def _heading(task: str) -> str:
    if task not in TASK_OUTPUTS:
        return "hidden pixels, % explained ↑"
    output = TASK_OUTPUTS[task]
    return f"{task} {output.metric} {output.unit} {'↓' if output.lower_is_better else '↑'}"


def _score_cells(results: Mapping[str, Any], row: str) -> list[str]:
    cells = [spread(results["scores"][row][task]) for task in TASKS]
    return [*cells, spread(results["gain"][row], sign="+"), f"{PAPER_GAIN[row]:+.2f}"]


if __name__ == "__main__":
    main()
