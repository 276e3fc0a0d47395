"""What a target on the student's grid does to the gradient of the distillation losses.

    python -m benchmarks.grids

For each pair of grids, the gradient with respect to the student's map is compared to that from the teacher's
native map, for two students (random; near the target) and three kinds of targets (standardised channels; raw
ones of unlike means and deviations; a trained DINOv2-S, where its package is installed). Entries are
`cosine / relative error` of the gradient. Three targets: adjoint (‖t‖ and the map p = (UᵀU)⁺Uᵀt), pooled
(bilinear with antialiasing, compared on the student's grid), and for the flattened cosine also 4-bit codes
(int4-hadamard) of p and of Uᵀt.

All but the codes is computed in float64. Prints one table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks import signals, trained
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.grids import adjoint, interpolation_matrix, nearest, pool, upsample
from teachercache.pipeline.records.spec import GridSpec
from teachercache.pipeline.records.strict import Size
from teachercache.student.losses.distillation import AdjointPair

PAIRS: list[tuple[Size, Size]] = [  # (student, teacher)
    ((24, 24), (27, 27)),
    ((24, 24), (64, 64)),
    ((32, 32), (36, 36)),
    ((32, 32), (64, 64)),
    ((28, 36), (32, 41)),
    ((32, 32), (24, 24)),
]
BATCH, WIDTH = 4, 256

Loss = Callable[[Tensor], Tensor]  # of the student's map (B, C, h, w)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.parse_args()
    results = [
        {"student_grid": student, "teacher_grid": teacher, "target": kind, "student": state}
        | {name: _agreement(s, loss, native) for name, (loss, native) in losses(t, student).items()}
        for student, teacher in PAIRS
        for kind, t in targets(teacher).items()
        for state, s in students(t, student).items()
    ]
    Console(width=200).print(_table(results))
    print(json.dumps({"benchmark": "grids", "torch": torch.__version__, "results": results}))


def targets(grid: Size) -> dict[str, Tensor]:
    """(B, C, H, W): smooth fields with as much variance again in single tokens."""
    fields = signals.correlated(BATCH, 1, grid, WIDTH, seed=0)
    noise = signals.white(BATCH, 1, grid, WIDTH, seed=1)
    t = _channels_first(fields / fields.std() + noise).double()
    standardised = (t - t.mean((0, 2, 3), keepdim=True)) / t.std((0, 2, 3), keepdim=True)
    generator = torch.Generator().manual_seed(2)
    mean, log_std = torch.randn(2, WIDTH, 1, 1, generator=generator, dtype=t.dtype)
    found = {"standardised": standardised, "raw": (standardised + 2 * mean) * log_std.exp()}
    if not trained.missing():
        levels_BSHWC = trained.features(trained.DINOV2, BATCH, grid, seed=0)
        found["DINOv2-S"] = _channels_first(levels_BSHWC[:, -1:]).double()
    return found


def students(t: Tensor, grid: Size) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    deviation = t.std((0, 2, 3), keepdim=True)
    near = nearest(t, grid)
    noise = deviation * torch.randn(near.shape, generator=generator, dtype=t.dtype)
    return {"random": noise, "near": near + 0.3 * noise}


def losses(t: Tensor, student: Size) -> dict[str, tuple[Loss, Loss]]:
    """By name, a loss from a small target and the loss from the native one that it stands for."""
    teacher = (t.shape[-2], t.shape[-1])
    squared_norm = t.square().flatten(1).sum(1)
    small = nearest(t, student)
    pooled = _channels_first(pool(_channels_last(t), GridSpec(kind="bilinear", size=student)))
    ways = [interpolation_matrix(*sides).to(t.dtype) for sides in zip(student, teacher, strict=True)]
    rows, columns = (torch.linalg.pinv(way.T @ way, hermitian=True) for way in ways)
    coded_adjoint = rows @ _coded(adjoint(t, student)) @ columns

    def flattened(s: Tensor) -> Tensor:
        return F.cosine_similarity(upsample(s, teacher).flatten(1), t.flatten(1))

    def token(s: Tensor) -> Tensor:
        return F.cosine_similarity(upsample(s, teacher), t, dim=1).mean()

    def smooth_l1(s: Tensor) -> Tensor:
        return F.smooth_l1_loss(upsample(s, teacher), t)

    def pair(s: Tensor, target: Tensor) -> AdjointPair:
        return AdjointPair(s, target, squared_norm, teacher)

    def from_adjoint(target: Tensor) -> Loss:
        return lambda s: pair(s, target).flattened_cosine()

    return {
        "flattened: adjoint": (from_adjoint(small), flattened),
        "flattened: pooled": (lambda s: F.cosine_similarity(s.flatten(1), pooled.flatten(1)), flattened),
        "flattened: adjoint, int4": (from_adjoint(_coded(small)), flattened),
        "flattened: int4 of Uᵀt": (from_adjoint(coded_adjoint), flattened),
        "token: adjoint": (lambda s: pair(s, small).token_cosine().mean(), token),
        "token: pooled": (lambda s: F.cosine_similarity(s, pooled, dim=1).mean(), token),
        "smooth-L1: adjoint": (lambda s: pair(s, small).smooth_l1().mean(), smooth_l1),
        "smooth-L1: pooled": (lambda s: F.smooth_l1_loss(s, pooled), smooth_l1),
    }


def _coded(maps_BChw: Tensor) -> Tensor:
    features = _channels_last(maps_BChw)
    encoded = get_codec("int4-hadamard").calibrate(features).encode(features)
    return _channels_first(encoded.decode(dtype=maps_BChw.dtype))


def _channels_last(maps_BCHW: Tensor) -> Tensor:
    return maps_BCHW.permute(0, 2, 3, 1)[:, None]


def _channels_first(features_B1HWC: Tensor) -> Tensor:
    return features_B1HWC[:, 0].permute(0, 3, 1, 2)


def _agreement(s: Tensor, loss: Loss, native: Loss) -> dict[str, float]:
    actual, expected = (_gradient(s, function) for function in (loss, native))
    return {
        "cosine": F.cosine_similarity(actual, expected, dim=0).item(),
        "relative_error": ((actual - expected).norm() / expected.norm()).item(),
    }


def _gradient(s: Tensor, loss: Loss) -> Tensor:
    s = s.detach().requires_grad_()
    return torch.autograd.grad(loss(s).sum(), s)[0].flatten()


def _table(results: list[dict[str, Any]]) -> Table:
    names = [name for name, value in results[0].items() if isinstance(value, dict)]
    table = Table("grids", "target", "student", *names)
    for result in results:
        student, teacher = ("×".join(map(str, result[key])) for key in ("student_grid", "teacher_grid"))
        cells = (f"{result[name]['cosine']:.3f} / {result[name]['relative_error']:.1g}" for name in names)
        table.add_row(f"{student} → {teacher}", result["target"], result["student"], *cells)
    return table


if __name__ == "__main__":
    main()
