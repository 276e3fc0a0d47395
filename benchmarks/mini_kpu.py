"""KPU's ablations in miniature: Tables 2 and 3, Figure 4 and the gap between teachers, on a CPU.

    python -m benchmarks.mini_kpu                  3 seeds; with two quiet cores less than 40 minutes
    python -m benchmarks.mini_kpu --smoke          the same path in two minutes, too short to mean anything

Of each seed everything is made anew, by the parts that the real thing runs on: the scenes, teachers and
caches of `mini_sak`, students, decoders, scores. The teacher that learns from images alone is the sentinel,
in DINOv2's place; that of labels is in CLIP's, that of edges in GroundingDINO's. Students distil on many
scenes without labels; then UPerNet, MaskDINO's decoder and a linear layer learn side by side, on frozen
features, from the labels of fewer scenes, and are measured on scenes that nobody was trained on. "Overall"
is the mean of mIoU, AP of masks, AP of boxes and top-1.

As in `mini_sak`, what is compared with the paper is the sign of a difference, seed by seed. Figure 4 prints
no numbers; the paper calls its differences negligible.

Prints five tables and, last, one line of JSON, which is also written to OUTPUT/results.json. The same command
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
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from timm.models import register_model

from benchmarks import mini_sak
from benchmarks.mini_sak import compare
from benchmarks.mini_teachers import IMAGE_SIZE, MINI_VIT, TEACHERS, MiniScenes, default_cfgs, mini_vit
from benchmarks.studies import claim_folder, parse, run_all, spread
from teachercache import load_student
from teachercache.pipeline.cache import FeatureCache
from teachercache.student.decoders.model import load_decoders
from teachercache.student.measuring.decoder_scores import evaluate_decoder
from teachercache.student.measuring.gap import largest_ratio, teacher_gap
from teachercache.student.training.decoder_recipe import DecoderRecipe
from teachercache.student.training.train_decoders import train_decoders

SENTINEL, CLIP, GROUNDING_DINO = "masked", "labels", "edges"
_CHECKPOINT = "MINI_SENTINEL"  # in the environment: of which weights `mini_sentinel` is
default_cfgs = {"mini_sentinel": default_cfgs[MINI_VIT]}

BASE_A = {"preservation": False, "unification": False, "reconstruction": False}
ROWS: dict[str, dict[str, Any]] = {  # as docs/recipes.md has the rows of the paper's tables
    "Base_a": {"teachers": [*TEACHERS], "student": BASE_A},
    "Base_b": {"student": {"unification": False, "reconstruction": False}},
    "Base_c": {"student": {"reconstruction": False}},
    "KPU": {},
    "CLIP alone": {"teachers": [CLIP]},
    "GroundingDINO alone": {"teachers": [GROUNDING_DINO]},
    "FAMO": {"distillation": {"weighting": "famo"}},
    "TeacherDrop": {"distillation": {"weighting": "teacher_drop"}},
}
SCORES = {
    "mIoU": ("semseg", "mIoU"),
    "AP_m": ("instances", "AP of masks"),
    "AP_b": ("instances", "AP of boxes"),
}
SCORES |= {"top-1": ("class", "top-1")}
PAPER: dict[str, tuple[float, float, float, float] | None] = {  # mIoU, AP_m, AP_b and top-1 of Tables 2 and 3
    "Base_a": (51.1, 44.4, 50.3, 81.9),
    "Base_b": (52.4, 46.8, 52.0, 84.4),
    "Base_c": (51.2, 46.4, 52.0, 84.0),
    "KPU": (52.8, 47.3, 52.9, 84.3),
    "CLIP alone": (52.8, 45.7, 51.4, 83.0),
    "GroundingDINO alone": (50.7, 47.0, 52.8, 81.5),
    "FAMO": None,
    "TeacherDrop": None,
}
PAPER_GAP = {"own": 33.4, "shared": 4.5}
CLAIMS = {  # overall of the first above that of the second
    "KPU above Base_b (Table 2)": ("KPU", "Base_b"),
    "Base_b above Base_a (Table 2)": ("Base_b", "Base_a"),
    "Base_b above Base_c (Table 2)": ("Base_b", "Base_c"),
    "KPU above Base_c (Table 2)": ("KPU", "Base_c"),
    "both teachers above CLIP alone (Table 3)": ("KPU", "CLIP alone"),
    "both teachers above GroundingDINO alone (Table 3)": ("KPU", "GroundingDINO alone"),
}


def mini_sentinel(pretrained: bool = False, **changes: Any) -> Any:
    """A `mini_vit`, with the sentinel's weights where they are asked for."""
    model = mini_vit(**changes)
    if pretrained:
        model.load_state_dict(load_file(os.environ[_CHECKPOINT]))
    return model


register_model(mini_sentinel)


@dataclass(frozen=True)
class Settings(mini_sak.Settings):
    """As of `mini_sak`; stage 2 are the decoders."""

    labelled_scenes: int = 400
    stage_1_steps: int = 200
    stage_2_steps: int = 200


SMOKE = Settings(**asdict(mini_sak.SMOKE))


def main() -> None:
    arguments, settings = parse(__doc__ or "", Path("runs/mini_kpu"), Settings(), SMOKE)
    claim_folder(arguments.output, settings)
    started = time.perf_counter()
    studies = [KpuStudy(arguments.output / f"seed_{seed}", seed, settings) for seed in range(arguments.seeds)]
    run_all(studies, PHASES, arguments.processes)
    results = collect(studies) | {"wall_s": time.perf_counter() - started, "cpus": os.cpu_count()}
    (arguments.output / mini_sak.RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    print_results(results)


@dataclass(frozen=True)
class KpuStudy(mini_sak.SeedStudy):
    """All of one seed, in one folder."""

    CLS_TOKEN = True  # which x is compared with

    def distil(self, name: str) -> dict[str, Any]:
        os.environ[_CHECKPOINT] = str(self._checkpoint(SENTINEL))
        row = {"teachers": [CLIP, GROUNDING_DINO]} | ROWS[name]
        row["student"] = {"kind": "kpu", "stem": "mini_sentinel", "pretrained": True} | row.get("student", {})
        trained = self._train(f"distil {name}", "many", self.settings.stage_1_steps, row)
        if name not in ("KPU", "Base_c"):
            return {}
        spreads = teacher_gap(load_student(trained), FeatureCache.open(self._cache("held out")), threads=1)
        return {"gap": largest_ratio(spreads)._asdict()}

    def learn(self, name: str) -> dict[str, Any]:
        """Decoders on the student's frozen features, and what they score."""
        settings, data = self.settings, {"kind": "scenes", "root": str(self.labelled_scenes)}
        options = {"width": 32, "heads": 2, "encoder_layers": 2, "layers": 3, "queries": 30, "denoising": 20}
        decoders: dict[str, dict[str, Any]] = {
            "semseg": {"kind": "upernet", "options": {"width": 32, "auxiliary_width": 16}},
            "instances": {"kind": "mask_dino", "options": {**options, "points": 512}},
            "class": {"kind": "linear"},
        }
        shared = {"dataset": data, "batch_size_per_process": max(2, settings.batch_size // 2)}
        recipe = {
            "student": str(self._run(f"distil {name}") / "student"),
            "image_size": IMAGE_SIZE,
            "output": str(self._run(f"decoders {name}")),
            "decoders": {task: shared | one for task, one in decoders.items()},
            "optimizer": {"lr": settings.learning_rate},
            "schedule": {"max_steps": settings.stage_2_steps, "final_lr": 0},
            "clip_norm": 1,
            "mixed_precision": "no",
            "seed": self.seed,
            "checkpoint_every_steps": 200,
            "log_every_steps": settings.stage_2_steps,
            "loader": {"threads": 1},
        }
        result = train_decoders(DecoderRecipe.model_validate(recipe))
        if result.saved is None:
            raise KeyboardInterrupt(f"{name} was interrupted; the same command continues it")
        loaded, held_out = load_decoders(result.saved), MiniScenes(self.labelled_scenes, "val")
        found = {
            task: evaluate_decoder(loaded, task, held_out, batch_size=16, threads=1) for task in decoders
        }
        scores = {score: found[task][name_of_it] for score, (task, name_of_it) in SCORES.items()}
        return {"scores": scores | {"overall": statistics.mean(scores.values())}}


PHASES: dict[str, Sequence[str]] = {
    "make_scenes": ["all"],
    "make_teacher": list(TEACHERS),
    "make_cache": ["many", "held out"],
    "distil": list(ROWS),
    "learn": list(ROWS),
}


def collect(studies: Sequence[KpuStudy]) -> dict[str, Any]:
    """Every figure as a list over the seeds, and what the claims of the paper come to."""
    names = [*SCORES, "overall"]
    scores = {
        row: {name: [study.result(f"learn, {row}")["scores"][name] for study in studies] for name in names}
        for row in ROWS
    }
    gap = {
        row: {
            space: [study.result(f"distil, {row}")["gap"][space] for study in studies] for space in PAPER_GAP
        }
        for row in ("KPU", "Base_c")
    }
    claims = {
        claim: compare(
            scores[better]["overall"], scores[worse]["overall"], _overall(better) - _overall(worse)
        )
        for claim, (better, worse) in CLAIMS.items()
    }
    claims["the gap is smaller in the shared space"] = compare(
        gap["KPU"]["own"], gap["KPU"]["shared"], PAPER_GAP["own"] - PAPER_GAP["shared"]
    )
    return {
        "benchmark": "mini_kpu",
        "settings": asdict(studies[0].settings),
        "seeds": [study.seed for study in studies],
        "scores": scores,
        "gap": gap,
        "claims": claims,
    }


def _overall(row: str) -> float:
    return statistics.mean(PAPER[row] or ())


def print_results(results: Mapping[str, Any]) -> None:
    console, seeds = Console(width=150), len(results["seeds"])
    print(
        f"mean ± standard deviation over {seeds} seeds, each with scenes, teachers and students of its own\n"
    )
    parts = {"Table 2": list(ROWS)[:4], "Table 3": ["CLIP alone", "GroundingDINO alone", "KPU"]}
    parts["Figure 4"] = ["KPU", "FAMO", "TeacherDrop"]
    for title, rows in parts.items():
        heads = *(f"{name} % ↑" for name in SCORES), "overall", "paper's"
        table = Table("", *heads, title=f"{title} in miniature", title_justify="left")
        for row in rows:
            paper = f"{_overall(row):.2f}" if PAPER[row] else "–"
            table.add_row(row, *(spread(values) for values in results["scores"][row].values()), paper)
        console.print(table)
    table = Table(
        "the largest σ / the smallest", "own spaces", "shared space", title="The gap", title_justify="left"
    )
    for row, spaces in results["gap"].items():
        table.add_row(row, *(spread(spaces[space]) for space in PAPER_GAP))
    table.add_row("the paper's KPU", *(str(ratio) for ratio in PAPER_GAP.values()))
    console.print(table)
    table = Table(
        "", "difference", "seeds", "paper's", "verdict", title="What the paper claims", title_justify="left"
    )
    for claim, found in results["claims"].items():
        differences = spread(found["differences"], sign="+")
        held = f"{found['held']} of {seeds}"
        table.add_row(claim, differences, held, f"{found['paper']:+.2f}", found["verdict"])
    console.print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
