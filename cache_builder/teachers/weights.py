"""What every kind of teacher needs to make or load weights."""

import re
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor

from teachercache.pipeline.errors import WeightsNotFoundError
from teachercache.pipeline.records.spec import TeacherSpec

WEIGHTS_NAME = "model.safetensors"

_ENTRIES = ("teacher", "student", "model", "module", "encoder", "backbone")  # the first that fits is taken
_CHUNK = re.compile(r"\bblocks\.\d+(?=\.\d+\.)")  # DINOv2 trains blocks in chunks; a block keeps its number

_ONE_AT_A_TIME = threading.Lock()  # all threads share torch's generator and the libraries' classes


@contextmanager
def seeded(random_seed: int) -> Iterator[None]:
    """Models made inside get the seed's weights, whatever other threads do."""
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_seed)
        yield


@contextmanager
def loading(spec: TeacherSpec, expected: str) -> Iterator[list[tuple[str, str]]]:
    """Weights are loaded inside, and keys that differ noted in the list, such as ("missing", "norm.weight").

    Raises `WeightsNotFoundError` for these, and for whatever is raised inside.
    """
    wrong_keys: list[tuple[str, str]] = []
    with seeded(spec.random_seed):
        try:
            yield wrong_keys
        except Exception as reason:  # from the hub, the file system, safetensors or the libraries
            raise _not_found(spec, f"{type(reason).__name__}: {reason}", expected) from reason
    if wrong_keys:
        first = ", ".join(f"{what} {key}" for what, key in wrong_keys[:8])
        raise _not_found(spec, f"{len(wrong_keys)} keys that differ: {first}", expected)


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


def inner_weights(path: str | Path, names: Collection[str]) -> dict[str, Tensor] | None:
    """The weights of a model with these parameters from a training code's checkpoint, or None.

    They are in an entry of the file, such as `teacher` in DINO, iBOT and DINOv2, and share a prefix, such as
    `backbone.`; heads and anything else are left out. Only tensors and plain values are unpickled. Raises
    what reading the file does.
    """
    content = load_state_dict(str(path))
    entries = (content, *(content.get(entry) for entry in _ENTRIES))
    candidates = (_after_prefix(entry, names) for entry in entries if isinstance(entry, Mapping))
    return next((weights for weights in candidates if weights is not None), None)


def _after_prefix(entry: Mapping[str, Any], names: Collection[str]) -> dict[str, Tensor] | None:
    """The tensors after the prefix that gives most of the names, if there is one."""
    weights = {
        key: value for key, value in clean_state_dict(dict(entry)).items() if isinstance(value, Tensor)
    }
    if not any(_CHUNK.search(name) for name in names):
        weights = {_CHUNK.sub("blocks", key): value for key, value in weights.items()}
    parts = ((key.split("."), value) for key, value in weights.items())
    parameters, prefixes = set(names), Counter[str]()
    for path, _ in parts:
        prefixes.update(".".join(path[:i]) for i in range(len(path)) if ".".join(path[i:]) in parameters)
    (prefix, most), (_, next_most) = [*prefixes.most_common(2), ("", 0), ("", 0)][:2]
    if 2 * most < len(parameters) or most == next_most:
        return None
    start = f"{prefix}." if prefix else ""
    return {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}


def _content(path: Path) -> str:
    """Describe the content of a weights file."""
    try:
        content = load_state_dict(str(path))
    except Exception as reason:  # from torch, safetensors or the file system
        return f"cannot be read as weights ({type(reason).__name__})"
    entries = {name: value for name, value in content.items() if isinstance(value, Mapping)}
    groups = [f"{name}: {_tensors(value)}" for name, value in entries.items()] or [_tensors(content)]
    return f"holds {'; '.join(groups[:6])}"


def _tensors(entry: Mapping[str, Any]) -> str:
    names = [str(name) for name, value in entry.items() if isinstance(value, Tensor)]
    first = ", ".join([*names[:3], "…"] if len(names) > 3 else names)
    return f"{len(names)} tensors ({first})" if names else "no tensor"


def _not_found(spec: TeacherSpec, got: str, expected: str) -> WeightsNotFoundError:
    source = spec.checkpoint or "the Hugging Face hub"
    if spec.checkpoint and (path := Path(spec.checkpoint)).is_file():
        got = f"{got}; the file {_content(path)}"
    return WeightsNotFoundError(
        f"The pretrained weights of {spec.model} could not be loaded from {source}.",
        got=got,
        expected=f"{expected}, from a file or from a hub that answers",
        do="pass a file (teachers.<name>.checkpoint=/path/model.safetensors), "
        "or take random weights (teachers.<name>.pretrained=false)",
    )
