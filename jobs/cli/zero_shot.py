"""Verbs that put a student in its teachers' place: `teachercache zeroshot …`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

import teachercache
from teachercache.jobs.cli.terminal import Json, StudentArgument, print_result

if TYPE_CHECKING:
    from teachercache.student.models.student import Student
    from teachercache.student.zero_shot.clip import Clip

app = typer.Typer(
    help="""A student in the place of CLIP or GroundingDINO: classes by name, boxes by prompt.

    Example: `teachercache zeroshot classify --help`""",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

ImagesArgument = Annotated[str, typer.Argument(metavar="IMAGES", help="A folder, tars or Parquet files.")]
Cache = Annotated[str | None, typer.Option(help="The student's cache, to refuse other weights.")]
OutputOption = typer.Option("-o", "--output", metavar="FOLDER", help="Write results there.")


@app.command()
def classify(
    student: StudentArgument,
    images: ImagesArgument,
    classes: Annotated[Path, typer.Option(help="One class a line: a name; or a label, a tab and a name.")],
    clip: Annotated[str, typer.Option(help="The whole CLIP: a name on the Hub, or a folder.")],
    templates: Annotated[Path | None, typer.Option(help="Lines such as: a photo of a {}.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The CLIP among the student's teachers.")] = None,
    cache: Cache = None,
    output: Annotated[Path | None, OutputOption] = None,
    as_json: Json = False,
) -> None:
    """What images show, by names of classes; top-1 and top-5 where folders are labels (KPU, Figure 3).

    Example: `teachercache zeroshot classify runs/kpu/student photos --classes names.txt --clip FOLDER`
    """
    from pyarrow import Table, csv

    from teachercache.pipeline.sources import open_source
    from teachercache.student.zero_shot import classification
    from teachercache.student.zero_shot.clip import Clip

    names = classification.read_classes(classes)
    wording = classification.read_templates(templates) if templates else classification.TEMPLATES
    loaded, whole = _load(student), Clip.load(clip)
    teacher = classification.require_clip(loaded, whole, teacher)
    _require_weights(cache, [teacher], whole)
    title, opened = _title(student, [teacher]), open_source(images)
    classified = classification.classify(loaded, opened, whole, names, wording, teacher=teacher, name=title)
    record = dataclasses.asdict(classified)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        (output / "classes.json").write_text(json.dumps(record, indent=2) + "\n")
        csv.write_csv(Table.from_pylist(classified.images), output / "classes.csv")
    print_result(record, classified.markdown(), as_json)


@app.command()
def detect(
    student: StudentArgument,
    images: ImagesArgument,
    detector: Annotated[str, typer.Option(help="The whole GroundingDINO: a name on the Hub, or a folder.")],
    output: Annotated[Path, OutputOption],
    prompt: Annotated[str, typer.Option(help='Such as "cat. dog."; else all annotated categories.')] = "",
    annotations: Annotated[Path | None, typer.Option(help="COCO annotations, to score boxes by AP.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Boxes that score less are left out.")] = 0.3,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Find what a prompt names in images; average precision with COCO's annotations (KPU, Figure 3).

    Example: `teachercache zeroshot detect runs/kpu/student photos --prompt "cat." --detector FOLDER -o found`
    """
    from teachercache.pipeline.sources import open_source
    from teachercache.student.zero_shot import detection
    from teachercache.student.zero_shot.detector import Detector, read_prompt

    truth = detection.CocoAnnotations(annotations) if annotations else None
    phrases = list(truth.categories) if truth and not prompt else read_prompt(prompt)
    loaded, whole, opened = _load(student), Detector.load(detector), open_source(images)
    teachers = detection.require_maps(loaded, whole)
    _require_weights(cache, teachers, detector)
    title = _title(student, teachers)
    detected = detection.detect(
        loaded, opened, whole, phrases, output, annotations=truth, threshold=threshold
    )
    told = ", ".join(f"{value:,} {what}" for what, value in detected.items() if isinstance(value, int))
    told += "".join(
        f"; {what} {value:.2f}" for what, value in detected.items() if isinstance(value, float) and value >= 0
    )
    print_result({"name": title, **detected}, f"{title}: {told}", as_json)


def _load(student: str) -> Student:
    from teachercache.student.measuring.evaluate import process_state

    return teachercache.load_student(student).to(process_state().device)


def _title(student: str, teachers: list[str]) -> str:
    """What results are called: those of a student of random teachers say so."""
    from teachercache.pipeline.sharing.licences import RANDOM
    from teachercache.student.hub import teacher_licences

    licences = teacher_licences(student)
    return f"{student} (random weights)" if RANDOM in map(licences.get, teachers) else student


def _require_weights(cache: str | None, teachers: list[str], whole: Clip | str) -> None:
    """Raises `CacheMismatchError` where these teachers of the cache have other weights than the vision tower
    of a CLIP, or than the detector of this name. Without a cache, says that nobody looked."""
    if cache is None:
        told = f"Weights were not compared with those of {', '.join(teachers)}: name the student's --cache."
        typer.echo(told, err=True)
        return
    from safetensors.torch import save_file
    from transformers.utils import cached_file

    from teachercache.cache_builder.teachers import build_teacher

    opened = teachercache.FeatureCache.open(cache)
    with TemporaryDirectory() as folder:
        file: str | None = f"{folder}/vision.safetensors"
        if not isinstance(whole, str):
            save_file(whole.vision_weights(), file)
        else:
            file = whole if Path(whole).is_file() else cached_file(whole, "model.safetensors")
        for name in opened.check_teachers(teachers):
            spec = opened.spec.teachers[name]
            build_teacher(spec.model_copy(update={"checkpoint": file, "pretrained": True}))
