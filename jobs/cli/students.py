"""Verbs of students, from training to sharing, and of their labelled data."""

import dataclasses
import os
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import teachercache
from teachercache.jobs.cli.terminal import (
    CacheArgument,
    Images,
    Json,
    StudentArgument,
    StudentOption,
    console,
    names,
    print_result,
)
from teachercache.jobs.launch import EXIT_FAILED


def evaluate(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="What `train` or `train-decoders` wrote (…/student).")
    ],
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="One of docs/datasets.md, such as nyud.")],
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Its folder (docs/datasets.md).")],
    split: Annotated[str, typer.Option(help="Which part of it.")] = "val",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write scores, predictions and figures there.")
    ] = None,
    max_images: Annotated[int | None, typer.Option(min=1, help="Measure the first few images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one forward pass.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read and render.")] = 2,
    boundary_processes: Annotated[
        int, typer.Option(min=0, help="Processes that match boundaries beside the student.")
    ] = 0,
    cache: Annotated[
        str | None, typer.Option(help="A cache of these images, for models that read teachers' features.")
    ] = None,
    baseline: Annotated[
        list[Path] | None,
        typer.Option(help="scores.json of single-task students, for your Δm; repeat it. Else the paper's."),
    ] = None,
    paper: Annotated[
        Literal["sak", "kpu"] | None, typer.Option(help="The paper whose rows to show; kpu has decoders.")
    ] = None,
    table: Annotated[
        int | None, typer.Option(help="Show the rows of this table of the paper, such as 20 for γ.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a student's tasks on a labelled data set beside SAK's rows (B.4), or the decoders of this data
    set beside KPU's: mIoU, AP of boxes and masks as COCO has them, or top-1, at the size of the images.

    `accelerate launch -m teachercache.jobs.cli evaluate …` does the same with several processes.

    Example: `teachercache evaluate runs/stage2/student nyud /data/NYUDv2 -o runs/stage2/scores`
    Example: `teachercache evaluate runs/decoders/decoders coco /data/coco --paper kpu --table 2`
    """
    from teachercache.student.datasets import open_dataset
    from teachercache.student.decoders.model import require_paper
    from teachercache.student.measuring.decoder_scores import evaluate_decoders
    from teachercache.student.measuring.evaluate import evaluate as evaluate_student
    from teachercache.student.measuring.paper_results import read_baseline

    are_decoders = require_paper(student, paper)
    if are_decoders and (output or boundary_processes or baseline):
        raise typer.BadParameter("-o, --boundary-processes and --baseline are of students, not of decoders")
    opened = open_dataset(dataset, root, split)
    images = teachercache.FeatureCache.open(cache) if cache else None
    scores: Any
    if are_decoders:
        scores, told = evaluate_decoders(student, opened, table, images, max_images, batch_size, threads)
    else:
        single = read_baseline(baseline or [], opened.name)
        evaluation = evaluate_student(
            teachercache.load_student(student),
            opened,
            name=student,
            output=output,
            max_images=max_images,
            batch_size=batch_size,
            threads=threads,
            boundary_processes=boundary_processes,
            cache=images,
            baseline=single,
            table=table,
        )
        scores, told = evaluation.record(), evaluation.markdown(single, table)
    if os.environ.get("RANK", "0") == "0":
        print_result(scores, told, as_json)


def repsim(
    student: StudentArgument,
    cache: CacheArgument,
    teachers: Annotated[
        Any, typer.Option(parser=names, metavar="A,B", help="Teachers to compare; else all in common.")
    ] = None,
    stem: Annotated[
        bool, typer.Option("--stem", help="Compare the bare stem too, where widths agree: Table 17, row 1.")
    ] = False,
    max_samples: Annotated[int, typer.Option(min=1, help="Samples to average over.")] = 1000,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """Cosine similarity of a student's representations to its teachers' (SAK, Tables 3 and 17).

    Example: `teachercache repsim runs/base/student /data/cache --max-samples 50000`
    """
    from teachercache.jobs.inspection.tables import similarity_table
    from teachercache.student.similarity import representation_similarity

    similarities = representation_similarity(
        teachercache.load_student(student),
        teachercache.FeatureCache.open(cache, images),
        teachers,
        stem=stem,
        max_samples=max_samples,
    )
    record = {name: {"levels": one.levels, "mean": one.mean} for name, one in similarities.items()}
    print_result(record, similarity_table(similarities), as_json)


def gap(
    student: StudentArgument,
    caches: Annotated[
        list[str], typer.Argument(metavar="CACHE…", help="One or more caches of its teachers.")
    ],
    max_samples: Annotated[int | None, typer.Option(min=1, help="Samples to measure on; else all.")] = None,
    as_json: Json = False,
) -> None:
    """The gap between teachers: standard deviations in their own spaces and in a KPU's shared one.

    Example: `teachercache gap runs/kpu_base/student /data/clip_of_val /data/gdino_of_val`
    """
    from teachercache.jobs.inspection.tables import columns_table
    from teachercache.student.measuring.gap import Spread, largest_ratio, teacher_gap

    loaded, spreads = teachercache.load_student(student), dict[str, Spread]()
    for cache in caches:
        spreads |= teacher_gap(loaded, teachercache.FeatureCache.open(cache), max_samples=max_samples)
    spreads |= {"largest / smallest": largest_ratio(spreads)}
    columns = {
        name: {"own space": f"{spread.own:.4g}", "shared space": f"{spread.shared:.4g}"}
        for name, spread in spreads.items()
    }
    record = {name: spread._asdict() for name, spread in spreads.items()}
    print_result(record, columns_table("standard deviation", columns), as_json)


def probe(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="Caches, or with --student labelled images.")],
    test: Annotated[str, typer.Argument(metavar="TEST", help="Caches or labelled images to test on.")],
    student: StudentOption = None,
    teachers: Annotated[
        Any, typer.Option(parser=names, metavar="A,B", help="Teachers of the caches; or all.")
    ] = None,
    tokens: Annotated[
        Literal["cls", "mean"] | None, typer.Option(help="Use these features of a teacher alone; else both.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Input in pixels; else the student's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one forward pass or read.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read and render.")] = 2,
    as_json: Json = False,
) -> None:
    """Top-1 accuracy of a linear classifier on frozen features (SAK, Table 26).

    On a teacher's features straight from two caches, or with `--student` on two places with labelled images.
    `accelerate launch -m teachercache.jobs.cli probe …` does the same with several processes.

    Example: `teachercache probe /data/train /data/val --student runs/base/student --size 224`
    """
    from teachercache.pipeline.sources import open_source
    from teachercache.student.measuring.evaluate import process_state
    from teachercache.student.measuring.image_features import (
        CachedTeacherFeatures,
        StudentFeatures,
        require_other_images,
        require_same_teacher,
    )
    from teachercache.student.measuring.linear_probe import linear_probe, probe_table

    device, is_first = process_state().device, os.environ.get("RANK", "0") == "0"

    def pairs() -> Iterator[tuple[str, Any, Any]]:  # one after the other: each holds the labels of all images
        if student:
            loaded, square = teachercache.load_student(student).to(device), (size, size) if size else None
            first, second = (
                StudentFeatures(loaded, open_source(place), square, batch_size, threads)
                for place in (train, test)
            )
            yield student, first, second
            return
        caches = teachercache.FeatureCache.open(train), teachercache.FeatureCache.open(test)
        for name in teachers or caches[0].teachers:
            one, other = (CachedTeacherFeatures(cache, name, tokens, batch_size, threads) for cache in caches)
            require_same_teacher(one, other)
            yield name if one.spec.pretrained else f"{name} (random weights)", one, other

    probes = []
    with console.status("") if is_first else nullcontext() as status:
        for title, one, other in pairs():
            require_other_images(one.images, other.images)
            progress = status.update if status else None
            probes.append(linear_probe(one, other, name=title, progress=progress))
    if is_first:
        print_result([dataclasses.asdict(one) for one in probes], probe_table(probes), as_json)


def depth_probe(
    source: Annotated[
        str, typer.Argument(metavar="STUDENT", help="A student of kind sak, or the name of a timm ViT.")
    ],
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="nyud or scenes.")],
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Its folder (docs/datasets.md).")],
    expert: Annotated[str, typer.Option(help="Part of a student: stem, or a teacher's path.")] = "stem",
    size: Annotated[tuple[int, int], typer.Option(metavar="HEIGHT WIDTH", help="Pixels that it sees.")] = (
        448,
        576,
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the linear layer.")] = 38_400,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read and render.")] = 2,
    random_weights: Annotated[bool, typer.Option("--random", help="Random weights of a timm ViT.")] = False,
    as_json: Json = False,
) -> None:
    """RMSE of depth that a linear layer reads from frozen maps, of one level and of four (SAK, Table 27).

    Example: `teachercache depth-probe runs/base/student nyud /data/NYUDv2 --expert dinov2`
    """
    from teachercache.student.datasets import open_dataset
    from teachercache.student.measuring.depth_probe import FrozenMaps, depth_table
    from teachercache.student.measuring.depth_probe import depth_probe as probe_depth
    from teachercache.student.models.stem import Stem

    train, test = (open_dataset(dataset, root, split) for split in ("train", "val"))
    loaded = (
        teachercache.load_student(source)
        if Path(source).is_dir()
        else Stem(source, size, pretrained=not random_weights, sak_compat=True)
    )
    maps = FrozenMaps(loaded, size, expert)
    with console.status("") as status:
        probes = [
            probe_depth(
                maps,
                train,
                test,
                levels=levels,
                name=source if expert == "stem" else f"{source}, {expert}",
                steps=steps,
                batch_size=batch_size,
                threads=threads,
                progress=status.update,
            )
            for levels in (1, 4)
        ]
    print_result([dataclasses.asdict(one) for one in probes], depth_table(probes), as_json)


def remove_teacher(
    student: StudentArgument,
    teachers: Annotated[list[str], typer.Argument(metavar="TEACHER…", help="Teachers to remove.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FOLDER", help="Write the smaller student there.")
    ],
) -> None:
    """Remove teachers' paths from a student of stage 1 (SAK, D.4); what the others give stays, to the bit.

    To add a teacher, go on from the student with a cache of the new one: docs/recipes.md, Table 25.

    Example: `teachercache remove-teacher runs/base/student sam -o runs/base_without_sam/student`
    """
    from teachercache.student.hub import carry_card
    from teachercache.student.sak.model import SAK

    loaded = SAK.from_pretrained(student)
    before = sum(loaded.parameters_by_part().values())
    for name in teachers:
        loaded.remove_teacher(name)
    loaded.save_pretrained(output)
    carry_card(student, output, f"Removed since: {', '.join(teachers)}.")
    after = sum(loaded.parameters_by_part().values())
    typer.echo(f"{output}: teachers: {', '.join(loaded.teachers)}; {before:,} → {after:,} parameters")


def figure(
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="1 (its left half), 3 or 5.")],
    scores: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=FILE…", help="scores.json of your own evaluations.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("figure.png"),
    as_json: Json = False,
) -> None:
    """Draw a figure of SAK that compares models, of the paper's tables and your own scores beside them.

    Example: `teachercache figure 5 "mine, 25% of the data=runs/quarter/scores/scores.json" -o figure_5.png`
    """
    from teachercache.student.measuring.figures import comparison, comparison_figure, read_own

    own = [read_own(named) for named in scores or []]
    if not as_json:
        comparison_figure(number, own).savefig(output)
    print_result([dataclasses.asdict(panel) for panel in comparison(number, own)], output, as_json)


def import_reference(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A .pth of SAK's authors' code.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FOLDER", help="Write the student there.")
    ],
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="HEIGHT WIDTH", help="Input in pixels, if it is not a square."),
    ] = None,
) -> None:
    """Make a student of a checkpoint of SAK's authors, of either stage, and name what did not fit.

    The names and shapes of the checkpoint tell stem, teachers and tasks. What agrees is loaded; every other
    tensor is named with both shapes. Exits with status 1 where the student keeps random values.

    Example: `teachercache import-reference checkpoint.pth -o runs/authors/student --size 448 576`
    """
    from teachercache.student.sak.model import SAK
    from teachercache.student.sak.reference import load_reference, read_reference, reference_arguments

    tensors = read_reference(checkpoint)
    student = teachercache.build_student("sak", **reference_arguments(tensors, size))
    assert isinstance(student, SAK)
    unmatched = load_reference(student, tensors)
    student.save_pretrained(output)
    for one in unmatched:
        ours, theirs = ("none" if shape is None else shape for shape in one[1:])
        typer.echo(f"{one.kind}: {one.name}: {ours} in the student, {theirs} in the checkpoint")
    random = sum(one.shape is not None for one in unmatched)
    typer.echo(
        f"{output}: {student.config['stem']}, teachers: {', '.join(student.teachers) or 'none'}, "
        f"tasks: {', '.join(student.tasks) or 'none'}; {random or 'no'} tensors keep random values"
    )
    if random:
        raise typer.Exit(EXIT_FAILED)


def datasets(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="One of docs/datasets.md, such as nyud.")],
    root: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the data set was unpacked.")],
    link: Annotated[
        Path | None, typer.Option(help="Fill this folder with links to each split's images, to build from.")
    ] = None,
) -> None:
    """Name what a folder with a labelled data set has and lacks; docs/datasets.md says what belongs there.

    Exits with status 1 when something is missing.

    Example: `teachercache datasets pascal_context /data/PASCALContext --link /data/pascal_images`
    """
    from teachercache.jobs.inspection.tables import findings_table
    from teachercache.student.datasets import check_folder, dataset_class, open_dataset

    findings = check_folder(dataset_class(kind), root)
    console.print(findings_table(findings))
    if link is not None:
        for split in dataset_class(kind).LISTS:
            folder = open_dataset(kind, root, split).link_images(link)
            console.print(shlex.quote(f"source.path={folder}"))
    if any(finding.found < finding.expected for finding in findings):
        raise typer.Exit(EXIT_FAILED)
