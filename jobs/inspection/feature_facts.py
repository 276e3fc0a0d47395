"""Numbers about features: channels that are dead or too loud, codecs, and how alike the teachers are.

Shapes: R rows, S levels, H×W grid, C channels, N tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.codecs.fidelity import Fidelity, compare
from teachercache.pipeline.errors import CodecError
from teachercache.pipeline.exploring.feature_pictures import finite, token_norms
from teachercache.pipeline.exploring.map_reader import MapReader
from teachercache.pipeline.records.feature_stats import FeatureMoments

_SHOWN_NORMS = (0.01, 0.99)  # quantiles; few tokens with huge norms must not take the range
_LOUD = 10.0  # times the energy of the median channel


@dataclass(frozen=True)
class LevelFacts:
    """Statistics of one level of a teacher. `share_C` is what each channel has of all energy (mean square);
    `loud` ones, sorted, have far more than the median. `dead` channels never change; `not_finite` hold NaN
    or infinity somewhere. `norm_range` holds nearly all norms."""

    mean_C: Tensor
    std_C: Tensor
    share_C: Tensor
    norms_N: Tensor
    norm_range: tuple[float, float]
    dead: list[int]
    not_finite: list[int]
    loud: list[int]


def level_facts(rows: Iterable[Tensor]) -> list[LevelFacts]:
    """Of the maps (S, H, W, C) of some rows, which are taken one by one. No level where there is no row."""
    moments, norms, finite_masks = [], [], []
    for maps_SHWC in rows:
        finite_SHWC = finite(maps_SHWC)
        moments.append(FeatureMoments.of(finite_SHWC[None]))
        norms.append(token_norms(finite_SHWC).flatten(1))
        finite_masks.append(torch.isfinite(maps_SHWC).flatten(1, 2).all(1))
    if not moments:
        return []
    whole = reduce(FeatureMoments.merge, moments)
    columns = whole.mean_SC, whole.std_SC(), torch.cat(norms, 1), torch.stack(finite_masks).all(0)
    return [_level_facts(*level) for level in zip(*columns, strict=True)]


def _level_facts(mean_C: Tensor, std_C: Tensor, norms_N: Tensor, finite_C: Tensor) -> LevelFacts:
    energy_C = mean_C.square() + std_C.square()
    is_loud_C = energy_C > _LOUD * energy_C.median()
    loud = [c for c in energy_C.argsort(descending=True).tolist() if is_loud_C[c]]
    dead, not_finite = (torch.nonzero(mask)[:, 0].tolist() for mask in (std_C == 0, ~finite_C))
    low, high = norms_N.quantile(torch.tensor(_SHOWN_NORMS)).tolist()
    return LevelFacts(mean_C, std_C, energy_C / energy_C.sum(), norms_N, (low, high), dead, not_finite, loud)


def try_codec(
    name: str, reader: MapReader, teacher: str, others: Sequence[int], tried: Sequence[int]
) -> tuple[Fidelity, Tensor]:
    """What a codec loses of the `tried` rows of a teacher, with tables learnt from others; 1 − cosine of
    every token, (R, S, H, W).

    Raises `CodecError` for values that the codec cannot hold, and where the others are too few.
    """
    codec = get_codec(name)
    fewest, most = codec.trial_rows
    if len(others) < fewest:
        raise CodecError(
            f"{name} cannot be learnt from {len(others)} rows.",
            expected=f"{fewest} rows beside those that are compared",
            do="look at a cache of more samples, or choose a codec that asks for fewer",
        )
    calibration_RSHWC, maps_RSHWC = (
        finite(torch.stack([reader.maps(teacher, row) for row in rows])) for rows in (others[:most], tried)
    )
    encoded = codec.calibrate(calibration_RSHWC).encode(maps_RSHWC)
    decoded_RSHWC = encoded.decode()
    fidelity = compare(maps_RSHWC, decoded_RSHWC, encoded.nbytes // len(maps_RSHWC))
    return fidelity, cosine_error(maps_RSHWC, decoded_RSHWC)


def cosine_error(maps_xHWC: Tensor, others_xHWC: Tensor) -> Tensor:
    """1 − cosine of each token to its counterpart, without the cancellation of doing just that.

    1 − cos(a, b) = ‖â − b̂‖² / 2 for unit vectors â, b̂.
    """
    difference = F.normalize(maps_xHWC, dim=-1) - F.normalize(others_xHWC, dim=-1)
    return difference.square().sum(-1) / 2


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
