"""Which grid and codec each teacher can have within a number of bytes, and what that costs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from cache_builder.calibrate import CalibrationSample, sample_features
from cache_builder.plan import bytes_per_row, human_bytes
from cache_builder.teachers import build_teacher
from pipeline.codecs import get_codec
from pipeline.codecs.fidelity import Fidelity, measure_fidelity
from pipeline.errors import DiskSpaceError, RecipeError
from pipeline.spec import GridSpec, Size, TeacherSpec

CODECS = ("f16", "int8-hadamard", "int6-hadamard", "int5-hadamard", "int4-hadamard", "int3-hadamard")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}


@dataclass(frozen=True)
class Option:
    """One way to store a teacher; `spec` has its grid and codec."""

    spec: TeacherSpec
    bytes_per_row: int
    fidelity: Fidelity

    def overrides(self, name: str) -> str:
        """The recipe keys that ask for it."""
        keys = [f"teachers.{name}.grid={self.spec.grid.kind}", f"teachers.{name}.codec={self.spec.codec}"]
        if self.spec.grid.size is not None:
            height, width = self.spec.grid.size
            keys.append(f'"teachers.{name}.grid_size=[{height},{width}]"')
        return " ".join(keys)


def parse_bytes(text: str) -> int:
    """ "6TB", "500 GB", "4.5e12" → bytes (decimal units). Raises `RecipeError`."""
    match = re.fullmatch(r"\s*([0-9.]+(?:E[0-9]+)?)\s*([KMGTP]?)B?\s*", text.upper())
    try:
        return int(float(match[1]) * _UNITS[match[2]]) if match else int(text)
    except ValueError:
        raise RecipeError(
            "A budget must be a number of bytes.", got=repr(text), expected="such as 6TB"
        ) from None


def options(
    teachers: Mapping[str, TeacherSpec],
    sample: CalibrationSample,
    student_grid: Size,
    batch_size: int,
    codecs: Sequence[str] = CODECS,
) -> Iterator[tuple[str, list[Option]]]:
    """For one teacher after another, every codec on the sample, best first.

    The grid is the adjoint one where the teacher's is the finer (it is smaller, and exact for SAK's
    flattened cosine and the squared error), else the teacher's own.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, spec in teachers.items():
        finer = spec.native_grid[0] * spec.native_grid[1] > student_grid[0] * student_grid[1]
        grid = GridSpec(kind="adjoint", size=student_grid) if finer else GridSpec()
        features_RSHWC = sample_features(build_teacher(spec, device=device), sample, grid, batch_size).clone()
        found = []
        for codec in codecs:
            stored = spec.model_copy(update={"grid": grid, "codec": codec})
            fidelity = measure_fidelity(get_codec(codec).calibrate(features_RSHWC), features_RSHWC)
            found.append(Option(stored, bytes_per_row(stored), fidelity))
        yield name, sorted(found, key=lambda option: option.fidelity.relative_l2)


def choose(available: Mapping[str, Sequence[Option]], num_rows: int, budget: int) -> dict[str, Option]:
    """The options whose squared errors add up to least, among those that fit `budget` bytes together.

    Raises `DiskSpaceError` when not even the smallest fit.
    """
    fitting = [
        combination
        for combination in itertools.product(*available.values())
        if num_rows * sum(option.bytes_per_row for option in combination) <= budget
    ]
    if not fitting:
        least = num_rows * sum(min(o.bytes_per_row for o in options) for options in available.values())
        raise DiskSpaceError(
            "No grid and codec fits this budget.",
            got=f"a budget of {human_bytes(budget)}",
            expected=f"at least {human_bytes(least)}, the smallest of every teacher",
            do="raise the budget, or ask for fewer views or teachers",
        )
    best = min(fitting, key=lambda combination: sum(o.fidelity.relative_l2**2 for o in combination))
    return dict(zip(available, best, strict=True))
