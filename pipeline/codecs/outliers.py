"""Massive activations: single values so large that nothing else of their token would survive beside them.

Sun et al. 2024, "Massive Activations in Large Language Models", finds them in CLIP and DINOv2 too.
Calibration leaves them out, and encoding stores the values of each level that stand out most by themselves;
docs/codecs.md says why.

Shapes: R rows, S levels, H×W grid of N tokens, C channels, K slots of a level.
"""

import torch
from torch import Tensor

from teachercache.pipeline.records.feature_stats import FeatureMoments

TOKENS_PER_SLOT = 8
# Outliers are further from the median than so many deviations, are no more than there are slots for, and
# without them the std is so much smaller. The rest is a distribution with heavy tails or two modes.
REACH = 32.0
LEAST_GAIN = 4.0
MOST_OUTLIERS = 1 / TOKENS_PER_SLOT
_DEVIATION_OF_MAD = 1.4826  # of a Gaussian
_MEDIAN_TOKENS = 1024  # the median of so many is within 4% of a deviation


def num_slots(num_tokens: int) -> int:
    """K, how many values of a level are stored by themselves."""
    return -(-num_tokens // TOKENS_PER_SLOT)


def take_out(z_RSHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Sets the K values of each level that stand out most to zero, in place; z is contiguous.

    Returns their places in the flat level, int32 (R, S, K), and the values, float16 (R, S, K). A value stands
    out by its magnitude, in tokens that are loud altogether by its magnitude beside theirs. One
    that float16 cannot hold is infinite there.
    """
    width = z_RSHWC.shape[-1]
    z_RSNC = z_RSHWC.flatten(2, 3)
    slots = num_slots(z_RSNC.shape[2])
    magnitude_RSNC = z_RSNC.abs()
    loudness_RSN1 = 1 + magnitude_RSNC.mean(-1, keepdim=True)
    largest_RSN1 = magnitude_RSNC.amax(-1, keepdim=True) / loudness_RSN1
    # The K values lie in the K tokens with the largest values, so only those are searched.
    tokens_RSK = largest_RSN1.squeeze(-1).topk(slots, -1).indices
    candidates_RSKC = magnitude_RSNC.take_along_dim(tokens_RSK[..., None], 2)
    candidates_RSKC /= loudness_RSN1.take_along_dim(tokens_RSK[..., None], 2)
    found_RSK = candidates_RSKC.flatten(2).topk(slots, -1).indices
    places_RSK = tokens_RSK.take_along_dim(found_RSK // width, 2) * width + found_RSK % width
    z_RSn = z_RSNC.flatten(2)
    values_RSK = z_RSn.take_along_dim(places_RSK, 2).half()
    z_RSn.scatter_(2, places_RSK, 0)
    return places_RSK.int(), values_RSK


def put_back(features_RSHWC: Tensor, places_RSK: Tensor, values_RSK: Tensor) -> None:
    """Sets features at these places of their levels, in place.

    A place beyond the level is damage, and sets its end: on a GPU it would end the process.
    """
    rows, levels, height, width, channels = features_RSHWC.shape
    length = height * width * channels
    starts_RS1 = length * torch.arange(rows * levels, device=places_RSK.device).view(rows, levels, 1)
    index_RSK = places_RSK.clamp(0, length - 1) + starts_RS1
    # On a CPU, scatter_ takes a thousand times as long for float16.
    features_RSHWC.view(-1)[index_RSK.flatten()] = values_RSK.to(features_RSHWC.dtype).flatten()


def usual_moments(features_RSHWC: Tensor, covariance: bool = False) -> FeatureMoments:
    """Mean and std of each channel over the values that are no outliers, on the features' device.

    Channels without outliers have their plain moments, as do those whose median absolute deviation is zero.
    The covariance counts outliers as values at the median.
    """
    plain = FeatureMoments.of(features_RSHWC)
    centre_SC, reach_SC = _median_and_reach(features_RSHWC)
    num_usual_SC, within = _moments_within(features_RSHWC, centre_SC, reach_SC)
    shift_SC = within.count / num_usual_SC * within.mean_SC
    squares_SC = within.squares_SC + within.count * within.mean_SC.square()  # about the median
    variance_SC = (squares_SC / num_usual_SC - shift_SC.square()).clamp(min=0)
    has_outliers_SC = (
        (reach_SC > 0)
        & (num_usual_SC >= (1 - MOST_OUTLIERS) * plain.count)
        & (plain.std_SC() > LEAST_GAIN * variance_SC.sqrt())
    )
    products_SCC = None
    if covariance:
        reach_SC = reach_SC.where(has_outliers_SC, torch.inf)
        products_SCC = _moments_within(features_RSHWC, centre_SC, reach_SC, covariance)[1].products_SCC
    return FeatureMoments(
        plain.count,
        torch.where(has_outliers_SC, centre_SC + shift_SC, plain.mean_SC),
        torch.where(has_outliers_SC, plain.count * variance_SC, plain.squares_SC),
        products_SCC,
    )


def _median_and_reach(features_RSHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel (S, C), float32, over some thousand tokens."""
    rows, _, height, width, _ = features_RSHWC.shape
    generator = torch.Generator().manual_seed(0)
    chosen_N = torch.randperm(rows * height * width, generator=generator)[:_MEDIAN_TOKENS]
    row_N, y_N, x_N = torch.unravel_index(chosen_N.to(features_RSHWC.device), (rows, height, width))
    tokens_SCN = features_RSHWC[row_N, :, y_N, x_N].permute(1, 2, 0).float().contiguous()
    centre_SC = tokens_SCN.median(-1).values
    mad_SC = tokens_SCN.sub_(centre_SC[..., None]).abs_().median(-1).values
    return centre_SC, REACH * _DEVIATION_OF_MAD * mad_SC


def _moments_within(
    features_RSHWC: Tensor, centre_SC: Tensor, reach_SC: Tensor, covariance: bool = False
) -> tuple[Tensor, FeatureMoments]:
    """How many values (S, C) are in reach, and the moments of x − centre with zeros for the others."""
    _, levels, _, _, width = features_RSHWC.shape
    within = FeatureMoments.empty(levels, width, covariance).to(features_RSHWC.device)
    num_usual_SC = torch.zeros_like(within.mean_SC)
    for row_RSHWC in features_RSHWC.split(1):
        offsets_RSHWC = row_RSHWC.float() - centre_SC[:, None, None]
        is_usual = offsets_RSHWC.abs() <= reach_SC[:, None, None]
        num_usual_SC += is_usual.sum((0, 2, 3))
        within = within.merge(FeatureMoments.of(offsets_RSHWC.masked_fill_(~is_usual, 0), covariance))
    return num_usual_SC, within
