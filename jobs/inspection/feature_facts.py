"""Numbers about features: channels that are dead or too loud, codecs, and how alike the teachers are.

Shapes: R rows, S levels, H×W grid, C channels, N tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.codecs.fidelity import Fidelity, compare
from teachercache.pipeline.errors import CodecError
from teachercache.pipeline.exploring.feature_pictures import finite
from teachercache.pipeline.exploring.map_reader import MapReader
from teachercache.pipeline.grids import pool
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.spec import GridSpec

_SHOWN_NORMS = (0.01, 0.99)  # quantiles; few tokens with huge norms must not take the range
_LOUD = 10.0  # times the energy of the median channel


@dataclass(frozen=True)
class LoudChannel:
    """A channel with far more energy (mean square) than the median one; `share` is of all energy."""

    channel: int
    mean: float
    std: float
    share: float


@dataclass(frozen=True)
class LevelFacts:
    """Statistics of one level of a teacher. `dead` channels never change; `not_finite` hold NaN
    or infinity somewhere; `loud` are sorted by energy. `norm_range` holds nearly all norms."""

    mean_C: Tensor
    std_C: Tensor
    norms_N: Tensor
    norm_range: tuple[float, float]
    dead: list[int]
    not_finite: list[int]
    loud: list[LoudChannel]


class FactCollector:
    """Takes the maps of a teacher row by row, and sums them up."""

    def __init__(self, levels: int, width: int) -> None:
        self._moments = FeatureMoments.empty(levels, width)
        self._not_finite_SC = torch.zeros(levels, width, dtype=torch.bool)
        self._norms: list[Tensor] = []

    def add(self, maps_SHWC: Tensor) -> None:
        self._not_finite_SC |= ~torch.isfinite(maps_SHWC).all(2).all(1)
        finite_SHWC = finite(maps_SHWC)
        self._moments = self._moments.merge(FeatureMoments.of(finite_SHWC[None]))
        self._norms.append(torch.linalg.vector_norm(finite_SHWC, dim=-1).flatten(1))

    def levels(self) -> list[LevelFacts]:
        norms_SN = torch.cat(self._norms, 1)
        return [
            _level_facts(*columns)
            for columns in zip(
                self._moments.mean_SC, self._moments.std_SC(), norms_SN, self._not_finite_SC, strict=True
            )
        ]


def _level_facts(mean_C: Tensor, std_C: Tensor, norms_N: Tensor, not_finite_C: Tensor) -> LevelFacts:
    energy_C = mean_C.square() + std_C.square()
    order = energy_C.argsort(descending=True).tolist()
    loud = [
        LoudChannel(c, mean_C[c].item(), std_C[c].item(), (energy_C[c] / energy_C.sum()).item())
        for c in order
        if energy_C[c] > _LOUD * energy_C.median()
    ]
    dead, not_finite = (torch.nonzero(mask)[:, 0].tolist() for mask in (std_C == 0, not_finite_C))
    ends = norms_N.quantile(torch.tensor(_SHOWN_NORMS)).tolist()
    return LevelFacts(mean_C, std_C, norms_N, (ends[0], ends[1]), dead, not_finite, loud)


@dataclass(frozen=True)
class CodecTrial:
    """One codec on some rows: what it loses, and 1 − cosine of every token, (R, S, H, W)."""

    codec: str
    fidelity: Fidelity
    error_RSHW: Tensor


def rows_to_learn_from(codec: str, rows: Sequence[int]) -> Sequence[int]:
    """As many of these rows as the codec's tables need. Raises `CodecError` where they are too few."""
    fewest, most = get_codec(codec).trial_rows
    if len(rows) < fewest:
        raise CodecError(
            f"{codec} cannot be learnt from {len(rows)} rows.",
            expected=f"{fewest} rows beside those that are compared",
            do="look at a cache of more samples, or choose a codec that asks for fewer",
        )
    return rows[:most]


def try_codec(
    name: str, reader: MapReader, teacher: str, others: Sequence[int], tried: Sequence[int]
) -> CodecTrial:
    """Encode and decode the `tried` rows of a teacher with tables learnt from others.

    Raises `CodecError` for values that the codec cannot hold, and where the others are too few.
    """
    calibration_RSHWC, maps_RSHWC = (
        finite(torch.stack([reader.maps(teacher, row) for row in rows]))
        for rows in (rows_to_learn_from(name, others), tried)
    )
    encoded = get_codec(name).calibrate(calibration_RSHWC).encode(maps_RSHWC)
    decoded_RSHWC = encoded.decode()
    return CodecTrial(
        name,
        compare(maps_RSHWC, decoded_RSHWC, encoded.nbytes // len(maps_RSHWC)),
        cosine_error(maps_RSHWC, decoded_RSHWC),
    )


def cosine_error(maps_xHWC: Tensor, others_xHWC: Tensor) -> Tensor:
    """1 − cosine of each token to its counterpart, without the cancellation of doing just that.

    1 − cos(a, b) = ‖â − b̂‖² / 2 for unit vectors â, b̂.
    """
    difference = F.normalize(maps_xHWC, dim=-1) - F.normalize(others_xHWC, dim=-1)
    return difference.square().sum(-1) / 2


def common_grid(maps_SHWC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (S, h·w, C) on a grid that all teachers share, so that tokens of one place can be compared."""
    if maps_SHWC.shape[1:3] == grid:
        return maps_SHWC.flatten(1, 2)
    return pool(maps_SHWC[None], GridSpec(kind="bilinear", size=grid))[0].flatten(1, 2)


def linear_cka(tokens_NC: Sequence[Tensor]) -> Tensor:
    """Linear CKA between any two of these sets of N tokens each, (K, K); channels may differ in number.

    Kornblith et al. 2019 with the unbiased HSIC of Song et al. 2012 (Eq. 5), since the biased one tends to 1
    when there are as many channels as tokens. N must be 4 or more.
    """
    grams_KNN = torch.stack([_centred_gram(tokens) for tokens in tokens_NC])
    hsic_KK = grams_KNN.flatten(1) @ grams_KNN.flatten(1).T
    scale_K = hsic_KK.diagonal().clamp_min(1e-30).sqrt()
    return hsic_KK / scale_K[:, None] / scale_K


def _centred_gram(tokens_NC: Tensor) -> Tensor:
    """U-centred Gram matrix with zero diagonal: the inner product of two of them is unbiased HSIC, scaled."""
    unit_NC = tokens_NC.float() / torch.linalg.vector_norm(tokens_NC).clamp_min(1e-30)
    count = len(unit_NC)
    gram_NN = (unit_NC @ unit_NC.T).fill_diagonal_(0)
    sums_N = gram_NN.sum(1)
    means_N = sums_N / (count - 2) - sums_N.sum() / (2 * (count - 1) * (count - 2))
    return (gram_NN - means_N - means_N[:, None]).fill_diagonal_(0)
