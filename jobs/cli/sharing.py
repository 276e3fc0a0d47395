"""Verbs for the Hugging Face Hub: push a student or a cache, pull a cache."""

from typing import Annotated

import typer

from teachercache.jobs.cli.rearranging import Fraction, Keys, Levels, Teachers, fill, subset
from teachercache.jobs.cli.terminal import CacheArgument, StudentArgument, console

Repository = Annotated[
    str, typer.Argument(metavar="REPOSITORY", help="user/name on the Hub; made by a push if it is not there.")
]
Private = Annotated[bool, typer.Option("--private", help="Make a repository that only you see.")]
AcceptLicences = Annotated[
    bool, typer.Option("--accept-licences", help="Share what licences restrict: you did what they ask.")
]


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
    teachers: Teachers = None,
    levels: Levels = None,
    fraction: Fraction = None,
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
    keys: Keys = None,
    fraction: Fraction = None,
    teachers: Teachers = None,
    levels: Levels = None,
) -> None:
    """Fetch a cache from the Hugging Face Hub, or some teachers, levels or samples of it.

    Log in first for a private one. Run it again to continue after any stop.

    Example: `teachercache pull user/name /data/cache --teachers dinov2`
    """
    url = f"hf://datasets/{repository.removeprefix('hf://datasets/')}"
    subset(url, output, keys, fraction, teachers=teachers, levels=levels)
