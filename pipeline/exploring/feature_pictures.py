"""Feature maps as pictures: principal components as colours, scalars as viridis, arrays as data URIs.

Shapes: H×W grid, C channels, N tokens. Pictures are uint8 (H, W, 3), one pixel a token.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = NDArray[np.uint8]

_CELL_INCHES, _DPI = 1.5, 110
_OUTLIER_SHARE = 0.01  # of the tokens at either end, which do not widen a colour's range


@dataclass(frozen=True)
class PcaBasis:
    """Three directions that become red, green and blue, learnt over the tokens of several images, so that
    equal colours mean equal features in all of them.

    Channels are standardised first, or the few outlier channels of ViTs would dominate the picture.
    """

    mean_C: Tensor
    std_C: Tensor
    axes_C3: Tensor
    low_3: Tensor
    high_3: Tensor

    @classmethod
    def fit(cls, tokens_NC: Tensor, like_N3: Tensor | None = None) -> Self:
        """`like_N3`: what another level made of the same tokens, whose colours the signs follow."""
        tokens_NC = finite(tokens_NC.float())
        std_C, mean_C = torch.std_mean(tokens_NC, 0, correction=0)
        unit_NC = torch.where(std_C > 0, (tokens_NC - mean_C) / std_C, 0)
        _, vectors_CC = torch.linalg.eigh(unit_NC.T @ unit_NC / len(unit_NC))
        axes_C3 = F.pad(vectors_CC.flip(1)[:, :3], (0, max(0, 3 - len(std_C))))
        largest_13 = axes_C3.gather(0, axes_C3.abs().argmax(0, keepdim=True))
        axes_C3 = axes_C3 * torch.where(largest_13 < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
        projected_N3 = unit_NC @ axes_C3
        if like_N3 is not None:
            signs_3 = torch.where((projected_N3 * like_N3).sum(0) < 0, -1.0, 1.0)
            axes_C3, projected_N3 = axes_C3 * signs_3, projected_N3 * signs_3
        low_3, high_3 = (projected_N3.quantile(q, 0) for q in (_OUTLIER_SHARE, 1 - _OUTLIER_SHARE))
        return cls(mean_C, std_C, axes_C3, low_3, high_3)

    def project(self, tokens_xC: Tensor) -> Tensor:
        """(..., 3): zero for the mean of the tokens that it was learnt over."""
        unit_xC = torch.where(self.std_C > 0, (finite(tokens_xC) - self.mean_C) / self.std_C, 0)
        return unit_xC @ self.axes_C3

    def picture(self, map_HWC: Tensor) -> Picture:
        colours_HW3 = (self.project(map_HWC) - self.low_3) / (self.high_3 - self.low_3).clamp_min(1e-12)
        return (colours_HW3.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def finite(values: Tensor) -> Tensor:
    """Zero in place of NaN and infinity, which would dominate the picture."""
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def token_norms(map_HWC: Tensor) -> Tensor:
    return torch.linalg.vector_norm(map_HWC, dim=-1)


def heat(values_HW: Tensor, low: float, high: float) -> Picture:
    """Scalars in viridis, which works for every kind of colour vision; grey where not finite."""
    from matplotlib import colormaps

    scaled_HW = ((values_HW - low) / max(high - low, 1e-12)).clamp(0, 1).double().numpy()
    return colormaps["viridis"].with_extremes(bad="grey")(scaled_HW, bytes=True)[..., :3]


def range_words(low: float, high: float) -> str:
    """`0.52 … 12.3`, with as many digits as tell them apart."""
    pairs = ((f"{low:.{digits}g}", f"{high:.{digits}g}") for digits in range(3, 8))
    return next((f"{least} … {most}" for least, most in pairs if least != most), f"constant {low:.3g}")


def picture_grid(columns: Sequence[tuple[str, Sequence[Picture]]], title: str) -> Figure:
    """Pictures in titled columns, one line per sample."""
    from matplotlib.figure import Figure

    num_lines = len(columns[0][1])
    size = (_CELL_INCHES * len(columns), _CELL_INCHES * num_lines + 0.9)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    axes = figure.subplots(num_lines, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns):
        axes[0, column].set_title(name, fontsize=8, parse_math=False)
        for line, picture in enumerate(pictures):
            axes[line, column].imshow(picture, interpolation="nearest")
            axes[line, column].set_axis_off()
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure


def figure_pixels(figure: Figure) -> Picture:
    """The pixels of the figure, as if saved to a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def png_uri(picture: Picture) -> str:
    """Lossless, for maps, which are small: browsers enlarge them."""
    return _uri(picture, "png", optimize=False)


def jpeg_uri(picture: Picture, quality: int = 85) -> str:
    """For photographs."""
    return _uri(picture, "jpeg", quality=quality)


def _uri(picture: Picture, kind: str, **options: int) -> str:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
