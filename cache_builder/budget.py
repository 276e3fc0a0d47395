"""Which grid and codec each teacher can have within a number of bytes, and what that costs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teachercache.cache_builder.calibrate import CalibrationSample, sample_features
from teachercache.cache_builder.plan import Plan, bytes_per_row
from teachercache.cache_builder.teachers import build_teacher
from teachercache.pipeline.codecs import codec_names, get_codec
from teachercache.pipeline.codecs.fidelity import Fidelity, compare, measure_fidelity
from teachercache.pipeline.errors import DiskSpaceError
from teachercache.pipeline.grids import stored_form, upsample
from teachercache.pipeline.records.spec import GridSpec, TeacherSpec
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.units import human_bytes

_OTHER_GRID = 1e-6  # in squared error: more than float16's rounding, less than any quantiser's

GRID_COSTS = {
    "native": "costs nothing",
    "adjoint": "exact for the flattened cosine and the squared error; "
    "an approximation for smooth-L1 and the token cosine (docs/benchmarks.md, Grids)",
    "bilinear": "an approximation for every loss (docs/benchmarks.md, Grids)",
}


@dataclass(frozen=True)
class Option:
    """One way to store a teacher; `spec` has its grid and codec. `fidelity` is the codec's on that grid,
    `grid_cosine` that of a pooled grid before it: the mean cosine of the tokens of U p and t."""

    spec: TeacherSpec
    fidelity: Fidelity
    grid_cosine: float = 1.0

    @property
    def bytes_per_row(self) -> int:
        return bytes_per_row(self.spec)

    @property
    def loss(self) -> float:
        """The mean squared error of tokens of unit norm, channels standardised, by grid and by codec; of two
        that are equal, the native grid has less.

        No relative L2 of all values: massive activations, which codecs keep, would hide the others' error.
        """
        other_grid = _OTHER_GRID if self.spec.grid.kind != "native" else 0
        return 2 * (1 - self.fidelity.cosine_mean) + 2 * (1 - self.grid_cosine) + other_grid

    def overrides(self, name: str) -> str:
        """The recipe keys that ask for it."""
        keys = [f"teachers.{name}.grid={self.spec.grid.kind}", f"teachers.{name}.codec={self.spec.codec}"]
        if self.spec.grid.size is not None:
            height, width = self.spec.grid.size
            keys.append(f'"teachers.{name}.grid_size=[{height},{width}]"')
        return " ".join(keys)


def candidates(
    teacher: TeacherSpec, student_grid: Size, num_rows: int, codecs: Sequence[str] | None = None
) -> list[TeacherSpec]:
    """Every grid with every codec: the teacher's own grid, and the smaller one where it is smaller.

    That is the recipe's, if it names one, else the adjoint on the student's. Without `codecs` they are the
    advised ones, without those for which the calibration sample of `num_rows` is too small, or the width
    unfit.
    """
    if codecs is None:
        advised = map(get_codec, codec_names("advised"))
        codecs = [c.name for c in advised if c.least_rows <= num_rows and c.fits(teacher.width)]
    other = teacher.grid if teacher.grid.size else GridSpec(kind="adjoint", size=student_grid)
    assert other.size is not None
    height, width = teacher.native_grid
    grids = [GridSpec(), *([other] if other.size[0] * other.size[1] < height * width else [])]
    return [teacher.model_copy(update={"grid": grid, "codec": codec}) for grid in grids for codec in codecs]


def measure(
    teachers: Mapping[str, Sequence[TeacherSpec]], sample: CalibrationSample, batch_size: int
) -> Iterator[tuple[str, list[Option]]]:
    """For one teacher after another, each of its candidates on the sample: native grid first, best first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, specs in teachers.items():
        teacher = build_teacher(specs[0], device=device)
        native_RSHWC = sample_features(teacher, sample, GridSpec(), batch_size).clone()
        found: list[Option] = []
        for grid in dict.fromkeys(spec.grid for spec in specs):
            stored_RSHWC = stored_form(native_RSHWC, grid)[0]
            kept = _grid_cosine(native_RSHWC, stored_RSHWC) if grid.kind == "bilinear" else 1.0
            options = []
            for spec in (one for one in specs if one.grid == grid):
                codec = get_codec(spec.codec).calibrate(stored_RSHWC)
                options.append(Option(spec, measure_fidelity(codec, stored_RSHWC), kept))
            found += sorted(options, key=lambda option: option.loss)
        yield name, found


def _grid_cosine(native_RSHWC: Tensor, pooled_RShwC: Tensor) -> float:
    rows, _, height, width, _ = native_RSHWC.shape
    pooled_NChw = pooled_RShwC.flatten(0, 1).permute(0, 3, 1, 2).float()
    seen_NHWC = upsample(pooled_NChw, (height, width)).permute(0, 2, 3, 1)
    return compare(native_RSHWC, seen_NHWC.unflatten(0, (rows, -1)), row_bytes=0).cosine_mean


def require_possible(teachers: Mapping[str, Iterable[TeacherSpec]], plan: Plan, budget: int) -> None:
    """Raises `DiskSpaceError` when not even the smallest candidates fit `budget` bytes; measures nothing."""
    least = plan.fixed_bytes + plan.spec.num_rows * sum(
        min(bytes_per_row(spec) for spec in specs) for specs in teachers.values()
    )
    if least > budget:
        raise DiskSpaceError(
            "No grid and codec fits this budget.",
            got=f"a budget of {human_bytes(budget)}",
            expected=f"at least {human_bytes(least)}: the smallest of every teacher, with statistics and "
            "copied images",
            do="raise the budget, or ask for fewer views or teachers",
        )


def choose(available: Mapping[str, Sequence[Option]], plan: Plan, budget: int) -> dict[str, Option]:
    """The options of least loss in all that keep the cache of `plan` within `budget` bytes (`total_bytes`).

    Exact: of all sums of options, those stay than which none has both fewer bytes and less loss. Raises
    `DiskSpaceError`.
    """
    require_possible({name: [o.spec for o in options] for name, options in available.items()}, plan, budget)
    per_row = (budget - plan.fixed_bytes) // plan.spec.num_rows
    best: list[tuple[int, float, dict[str, Option]]] = [(0, 0.0, {})]
    for name, options in available.items():
        sized = [(option.bytes_per_row, option.loss, {name: option}) for option in options]
        sums = [
            (used + nbytes, before + loss, chosen | option)
            for used, before, chosen in best
            for nbytes, loss, option in sized
        ]
        best = []
        for one in sorted(sums, key=lambda one: one[:2]):
            if one[0] <= per_row and (not best or one[1] < best[-1][1]):
                best.append(one)
    return best[-1][2]
