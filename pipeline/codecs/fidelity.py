"""What a codec costs: how far its features are from the originals, and how many bytes they take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.codecs.base import Codec
from pipeline.codecs.normalisation import floored_std
from pipeline.feature_stats import FeatureMoments


@dataclass(frozen=True)
class Fidelity:
    """Cosines are of single tokens: their mean, and the value that 1% of them fall below.

    `cosine_*` and `relative_l2` (‖x̂ − x‖ / ‖x‖ over all values) are taken after each channel of each level
    is standardised (as the codecs do it), so that a channel of large variance does not hide the others;
    `raw_*` are of the features as they are.
    """

    cosine_mean: float
    cosine_p1: float
    relative_l2: float
    raw_cosine_mean: float
    raw_cosine_p1: float
    raw_relative_l2: float
    row_bytes: int
    float16_ratio: float


@torch.no_grad()
def measure_fidelity(codec: Codec, features_RSHWC: Tensor) -> Fidelity:
    """Encode, decode and compare these rows; the codec must be calibrated."""
    encoded = codec.encode(features_RSHWC)
    decoded_RSHWC = encoded.decode(features_RSHWC.device, torch.float32)
    return compare(features_RSHWC, decoded_RSHWC, encoded.nbytes // len(features_RSHWC))


def compare(features_RSHWC: Tensor, decoded_RSHWC: Tensor, row_bytes: int) -> Fidelity:
    moments = FeatureMoments.of(features_RSHWC)
    mean, std = moments.mean_SC.float()[:, None, None], floored_std(moments.std_SC()).float()[:, None, None]

    def standardised(x_RSHWC: Tensor) -> Tensor:
        return (x_RSHWC - mean) / std

    original_RSHWC = features_RSHWC.float()
    return Fidelity(
        *_errors(standardised(original_RSHWC), standardised(decoded_RSHWC)),
        *_errors(original_RSHWC, decoded_RSHWC),
        row_bytes=row_bytes,
        float16_ratio=row_bytes / (2 * features_RSHWC[0].numel()),
    )


def _errors(original: Tensor, decoded: Tensor) -> tuple[float, float, float]:
    """Mean and first percentile of the tokens' cosines, and the relative L2 error."""
    cosines = F.cosine_similarity(original, decoded, dim=-1).flatten().double()
    lowest = cosines.kthvalue(1 + (len(cosines) - 1) // 100).values
    error = torch.linalg.vector_norm(decoded - original) / torch.linalg.vector_norm(original)
    return cosines.mean().item(), lowest.item(), error.item()
