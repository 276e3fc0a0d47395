"""Verbs that make a cache from others and compute nothing: merge, subset, convert; and on the Hugging Face
Hub: push a student or a cache, pull a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import teachercache
from teachercache.jobs.cli.terminal import CacheArgument, Images, StudentArgument, console, counting, names

if TYPE_CHECKING:
    from teachercache.pipeline.rearranging.rearrangement import Rearrangement

OutputOption = Annotated[str, typer.Option("-o", "--output", metavar="PLACE", help="A folder or URL.")]
KeysOption = Annotated[Path | None, typer.Option(help="A file with the key of a sample on each line.")]
FractionOption = Annotated[float | None, typer.Option(help="A random part of the samples.")]
Repository = Annotated[
    str, typer.Argument(metavar="REPOSITORY", help="user/name on the Hub; made by a push if it is not there.")
]
Private = Annotated[bool, typer.Option("--private", help="Make a repository that only you see.")]
AcceptLicences = Annotated[
    bool, typer.Option("--accept-licences", help="Share what licences restrict: you did what they ask.")
]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


TeachersOption = Annotated[Any, typer.Option(parser=names, metavar="A,B", help="Teachers to keep.")]
LevelsOption = Annotated[Any, typer.Option(parser=_numbers, metavar="0,-1", help="Levels to keep, from 0.")]


def merge(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE…", help="Two or more caches.")],
    output: OutputOption,
) -> None:
    """Merge caches of disjoint samples with the same specs into one; nothing is computed.

    Shards are hard-linked where possible, and otherwise copied. Run it again to continue after any stop.

    Example: `teachercache merge /data/part0 /data/part1 -o /data/cache`
    """
    from teachercache.pipeline.rearranging.merge import merge as merge_caches

    _rearrange(merge_caches(caches, output), "merging")


def subset(
    cache: CacheArgument,
    output: OutputOption,
    keys: KeysOption = None,
    fraction: FractionOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random part.")] = 0,
    teachers: TeachersOption = None,
    levels: LevelsOption = None,
) -> None:
    """Make a smaller cache of some samples, teachers or levels; nothing is computed.

    Example: `teachercache subset /data/cache -o /data/tenth --fraction 0.1 --teachers dinov2,sam`
    """
    from teachercache.pipeline.rearranging.subset import subset as take_subset

    chosen = None if keys is None else [line for line in keys.read_text().splitlines() if line]
    choice = {"keys": chosen, "fraction": fraction, "teachers": teachers, "levels": levels}
    _rearrange(take_subset(cache, output, seed=seed, **choice), "packing")


def convert(
    cache: CacheArgument,
    output: OutputOption,
    to: Annotated[
        Literal["webdataset", "zarr", "theia", "parquet", "lance"], typer.Option(help="What to write.")
    ],
    level: Annotated[int, typer.Option(help="theia, parquet, lance: which stored level.")] = -1,
    dataset: Annotated[str, typer.Option(help="theia: the name of the data set.")] = "imagenet",
    split: Annotated[str, typer.Option(help="theia: train, val or test.")] = "train",
    images: Images = None,
) -> None:
    """Write the rows of a cache to the other kind of store, or in the form that other programs read.

    Between webdataset and zarr only the store changes: the rows, records and content ids are the same.
    theia: what Theia's training code reads. Run it again to continue after any stop. parquet, lance: a line
    for each view, with its key and label, mean tokens and class tokens; a file of Parquet is what
    `datasets.load_dataset("parquet", data_files=FILE)` reads.

    Example: `teachercache convert /data/cache -o /data/tars --to webdataset`
    """
    from teachercache.pipeline.rearranging.convert import convert as convert_cache
    from teachercache.pipeline.rearranging.exports import export_lines, export_theia

    if to == "webdataset" or to == "zarr":
        _rearrange(convert_cache(cache, output, to), "converting")
    elif to == "theia":
        opened = teachercache.FeatureCache.open(cache, images)
        total = opened.valid_samples().size * opened.num_views * (len(opened.teachers) + 1)
        with counting("exporting", total) as step:
            count = export_theia(opened, output, dataset=dataset, split=split, level=level, progress=step)
        console.print(f"{output}/{dataset}: {count} samples of {', '.join(opened.teachers)}")
    else:
        with console.status("exporting"):
            count = export_lines(teachercache.FeatureCache.open(cache), output, to, level)
        console.print(f"{output}: {count} lines")


def push(
    student: StudentArgument,
    repository: Repository,
    private: Private = False,
    accept_licences: AcceptLicences = False,
) -> None:
    """Upload a student with its model card to the Hugging Face Hub, from where `load_student` loads it.

    Log in first: `hf auth login`, or set HF_TOKEN.

    Example: `teachercache push runs/base/student user/sak-base --private`
    """
    from teachercache.student.hub import push_to_hub

    console.print(push_to_hub(student, repository, private=private, accept_licences=accept_licences))


def push_cache(
    cache: CacheArgument,
    repository: Repository,
    teachers: TeachersOption = None,
    levels: LevelsOption = None,
    fraction: FractionOption = None,
    private: Private = False,
    accept_licences: AcceptLicences = False,
) -> None:
    """Upload a cache, or some of it, with its card to the Hugging Face Hub, from where it can be read.

    Log in first: `hf auth login`, or set HF_TOKEN. Run it again to continue after any stop.

    Example: `teachercache push-cache /data/cache user/name --teachers dinov2 --private`
    """
    from teachercache.pipeline.sharing.push import push_cache as to_hub

    choice = {"teachers": teachers, "levels": levels, "fraction": fraction, "private": private}
    address = to_hub(cache, repository, **choice, accept_licences=accept_licences, run=fill)
    console.print(address, soft_wrap=True)


def pull(
    repository: Repository,
    output: Annotated[str, typer.Argument(metavar="PLACE", help="A folder or URL.")],
    keys: KeysOption = None,
    fraction: FractionOption = None,
    teachers: TeachersOption = None,
    levels: LevelsOption = None,
) -> None:
    """Fetch a cache from the Hugging Face Hub, or some teachers, levels or samples of it.

    Log in first for a private one. Run it again to continue after any stop.

    Example: `teachercache pull user/name /data/cache --teachers dinov2`
    """
    url = f"hf://datasets/{repository.removeprefix('hf://datasets/')}"
    subset(url, output, keys, fraction, teachers=teachers, levels=levels)


def _rearrange(steps: Rearrangement, doing: str) -> None:
    cache = fill(steps, doing)
    console.print(
        f"{cache.storage.url}: {cache.num_samples} samples, {cache.num_rows} rows of "
        f"{', '.join(cache.teachers)}; {len(steps.steps)} shards written",
    )


def fill(steps: Rearrangement, doing: str = "laying out") -> teachercache.FeatureCache:
    with counting(doing, len(steps.steps)) as step:
        return steps.run(step)
