"""What a codec costs: how far its features are from the originals, and how many bytes they take."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from teachercache.pipeline.codecs.codec import Codec
from teachercache.pipeline.codecs.normalisation import floored_std
from teachercache.pipeline.codecs.outliers import usual_moments

ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class Fidelity:
    """Cosines are of single tokens: their mean, and the value that 1% of them fall below.

    `cosine_*` and `relative_l2` (‖x̂ − x‖ / ‖x‖ over all values) are taken after each channel of each level
    is standardised (as the codecs do it), so that a channel of large variance does not hide the others;
    `raw_*` are of the features as they are. Where all features are zero, cosines of tokens that are decoded
    to zero are 1, and `relative_l2` is the root mean square error.
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
    """Encode, decode and compare these rows, a few at a time; the codec must be calibrated."""
    _, levels, *grid, width = features_RSHWC.shape
    layout = codec.layout(levels, (grid[0], grid[1]), width)
    row_bytes = sum(array.row_nbytes for array in layout.values())
    decoded = (
        codec.encode(rows_RSHWC).decode(features_RSHWC.device, torch.float32)
        for rows_RSHWC in features_RSHWC.split(ROWS_AT_ONCE)
    )
    return compare(features_RSHWC, decoded, row_bytes)


def compare(features_RSHWC: Tensor, decoded: Tensor | Iterable[Tensor], row_bytes: int) -> Fidelity:
    """`decoded`: the same rows, or blocks of `ROWS_AT_ONCE` of them."""
    if isinstance(decoded, Tensor):
        decoded = decoded.split(ROWS_AT_ONCE)
    moments = usual_moments(features_RSHWC)
    mean, std = moments.mean_SC.float()[:, None, None], floored_std(moments.std_SC()).float()[:, None, None]
    standardised, raw = _Errors(), _Errors()
    for original_RSHWC, decoded_RSHWC in zip(features_RSHWC.split(ROWS_AT_ONCE), decoded, strict=True):
        pair = original_RSHWC.float(), decoded_RSHWC.float()
        raw.add(*pair)
        standardised.add(*((x_RSHWC - mean) / std for x_RSHWC in pair))
    return Fidelity(
        *standardised.result(),
        *raw.result(),
        row_bytes=row_bytes,
        float16_ratio=row_bytes / (2 * features_RSHWC[0].numel()),
    )


class _Errors:
    """Sums over blocks of tokens, float32 within a block; of the cosines, all are kept."""

    def __init__(self) -> None:
        self._cosines: list[Tensor] = []
        self._squared_error, self._squares, self._count = 0.0, 0.0, 0

    def add(self, original: Tensor, decoded: Tensor) -> None:
        norms, decoded_norms = (torch.linalg.vector_norm(x, dim=-1) for x in (original, decoded))
        cosines = F.cosine_similarity(original, decoded, dim=-1)
        self._cosines.append(torch.where((norms == 0) & (decoded_norms == 0), 1, cosines).flatten())
        errors = torch.linalg.vector_norm(decoded - original, dim=-1)
        self._squared_error += errors.double().square().sum().item()
        self._squares += norms.double().square().sum().item()
        self._count += original.numel()

    def result(self) -> tuple[float, float, float]:
        """Mean and first percentile of the tokens' cosines, and the relative L2 error."""
        cosines = torch.cat(self._cosines).double()
        lowest = cosines.kthvalue(1 + (len(cosines) - 1) // 100).values
        relative_l2 = math.sqrt(self._squared_error / (self._squares or self._count))
        return cosines.mean().item(), lowest.item(), relative_l2
