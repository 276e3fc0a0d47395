"""Verbs that put a student in its teachers' place: `teachercache zeroshot …`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

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
Output = typer.Option("-o", "--output", metavar="FOLDER", help="Write results there.")


@app.command()
def classify(
    student: StudentArgument,
    images: ImagesArgument,
    classes: Annotated[
        Path, typer.Option(help="A class a line: its name; or its label, a tab and its name.")
    ],
    clip: Annotated[str, typer.Option(help="The whole CLIP: a name on the Hub, or a folder.")],
    templates: Annotated[Path | None, typer.Option(help="Lines such as: a photo of a {}.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The CLIP among the student's teachers.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="The student's: CLIPs of other weights are refused.")
    ] = None,
    output: Annotated[Path | None, Output] = None,
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
    if cache:
        _require_weights(cache, teacher, whole)
    title, opened = _title(student, [teacher]), open_source(images)
    found = classification.classify(loaded, opened, whole, names, wording, teacher=teacher, name=title)
    record = dataclasses.asdict(found)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        (output / "classes.json").write_text(json.dumps(record, indent=2) + "\n")
        csv.write_csv(Table.from_pylist(found.images), output / "classes.csv")
    print_result(record, found.markdown(), as_json)


@app.command()
def detect(
    student: StudentArgument,
    images: ImagesArgument,
    detector: Annotated[str, typer.Option(help="The whole GroundingDINO: a name on the Hub, or a folder.")],
    output: Annotated[Path, Output],
    prompt: Annotated[str, typer.Option(help='Such as "cat. dog."; else all annotated categories.')] = "",
    annotations: Annotated[Path | None, typer.Option(help="COCO's, to score by average precision.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Boxes that score less are left out.")] = 0.3,
    as_json: Json = False,
) -> None:
    """Where images show what a prompt names; average precision with COCO's annotations (KPU, Figure 3).

    Example: `teachercache zeroshot detect runs/kpu/student photos --prompt "cat." --detector FOLDER -o found`
    """
    from teachercache.pipeline.sources import open_source
    from teachercache.student.zero_shot import detection
    from teachercache.student.zero_shot.coco import CocoAnnotations
    from teachercache.student.zero_shot.detector import Detector, read_prompt

    truth = CocoAnnotations(annotations) if annotations else None
    phrases = list(truth.categories) if truth and not prompt else read_prompt(prompt)
    loaded, whole, opened = _load(student), Detector.load(detector), open_source(images)
    title = _title(student, detection.require_maps(loaded, whole))
    found = detection.detect(loaded, opened, whole, phrases, output, annotations=truth, threshold=threshold)
    told = ", ".join(f"{value:,} {what}" for what, value in found.items() if isinstance(value, int))
    told += "".join(
        f"; {what} {value:.2f}" for what, value in found.items() if isinstance(value, float) and value >= 0
    )
    print_result({"name": title, **found}, f"{title}: {told}", as_json)


def _load(student: str) -> Student:
    from teachercache.student.build import load_student
    from teachercache.student.measuring.evaluate import process_state

    return load_student(student).to(process_state().device)


def _title(student: str, teachers: list[str]) -> str:
    """What results are called: those of a student of random teachers say so."""
    from teachercache.pipeline.sharing.licences import RANDOM
    from teachercache.student.hub import teacher_licences

    licences = teacher_licences(Path(student))
    return f"{student} (random weights)" if RANDOM in map(licences.get, teachers) else student


def _require_weights(cache: str, teacher: str, clip: Clip) -> None:
    """Raises `CacheMismatchError` for a CLIP whose vision tower is not the cache's teacher."""
    from safetensors.torch import save_file

    from teachercache.cache_builder.teachers import build_teacher
    from teachercache.pipeline.cache import FeatureCache

    opened = FeatureCache.open(cache)
    opened.check_teachers([teacher])
    with TemporaryDirectory() as folder:
        file = f"{folder}/vision.safetensors"
        save_file(clip.vision_weights(), file)
        build_teacher(
            opened.spec.teachers[teacher].model_copy(update={"checkpoint": file, "pretrained": True})
        )
