"""What every kind of teacher needs to make weights or to load them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError

from pipeline.errors import WeightsNotFoundError
from pipeline.spec import TeacherSpec

WEIGHTS_NAME = "model.safetensors"

_ONE_AT_A_TIME = threading.Lock()  # torch's generator, and the libraries' classes, all threads share


@contextmanager
def seeded(random_seed: int) -> Iterator[None]:
    """Models made in here have the weights of the seed, whatever other threads make."""
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_seed)
        yield


def require_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")


def require_hub(repository: str) -> None:
    """Fail in seconds where `hf_hub_download` would retry for minutes before it gives up."""
    if isinstance(huggingface_hub.try_to_load_from_cache(repository, WEIGHTS_NAME), str):
        return
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, WEIGHTS_NAME))
    except EntryNotFoundError:
        return  # the hub answered; there may be other file names


def differing(keys: Sequence[tuple[str, str]]) -> str:
    """What to say of keys such as ("missing", "norm.weight")."""
    first = ", ".join(f"{what} {key}" for what, key in keys[:8])
    return f"{len(keys)} keys that differ: {first}"


def weights_not_found(spec: TeacherSpec, got: str, expected: str) -> WeightsNotFoundError:
    source = spec.checkpoint or "the Hugging Face hub"
    return WeightsNotFoundError(
        f"The pretrained weights of {spec.model} could not be had from {source}.",
        got=got,
        expected=f"{expected}, from a file or from a hub that answers",
        do="pass a file (teachers.<name>.checkpoint=/path/model.safetensors), "
        "or take random weights (teachers.<name>.pretrained=false)",
    )
