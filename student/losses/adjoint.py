"""Distillation losses from what is stored of a teacher on the adjoint grid: p and ‖t‖, no teacher map.

With U the bilinear upsampling from the student's grid to the teacher's, p is the student map whose upsampling
is nearest to t, so Uᵀt = UᵀU p: SAK's flattened cosine and the squared error follow exactly, in value and
gradient. Other losses see t only through U p, and are exact where the teacher's grid is the coarser one
(docs/codecs.md, Grids).

Shapes: B batch, C channels, h×w the student's grid; `grid` = (H, W) is the teacher's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from teachercache.pipeline.grids import Grid, gram, upsample
from teachercache.student.losses.cosine import cosine_similarity

_OF_A_MAP = (1, 2, 3)


class AdjointPair:
    """A student map s (B, C, h, w) with what is stored of the teacher map t that it is compared with: p
    (B, C, h, w), and ‖t‖² (B,).

    All is computed in at least float32, autocast or not, and what two losses need of it once.
    """

    def __init__(self, s_BChw: Tensor, p_BChw: Tensor, squared_norm_t_B: Tensor, grid: Grid) -> None:
        self._s_BChw, self._p_BChw, self._squared_norm_t_B = (
            one.to(torch.promote_types(one.dtype, torch.float32))
            for one in (s_BChw, p_BChw, squared_norm_t_B)
        )
        self._grid = grid
        # Filled in when they are asked for; the lock of a `cached_property` would end a compiled graph.
        self._products: tuple[Tensor, Tensor] | None = None
        self._upsampled: tuple[Tensor, Tensor] | None = None

    def flattened_cosine(self, eps: float = 1e-8) -> Tensor:
        """cos(U s, t) (B,), exact, over each sample's whole map: <p, UᵀU s> / (‖U s‖ ‖t‖).

        `eps` bounds each norm from below, as in `F.cosine_similarity`.
        """
        product_B, squared_norm_s_B = self._exact_products()
        norm_s_B, norm_t_B = (
            one.clamp(min=eps**2).sqrt() for one in (squared_norm_s_B, self._squared_norm_t_B)
        )
        return product_B / (norm_s_B * norm_t_B)

    def squared_error(self) -> Tensor:
        """‖U s − t‖² (B,), exact, summed over the map: ‖U s‖² − 2 <p, UᵀU s> + ‖t‖².

        The three terms cancel as s nears t, so in float32 the value keeps an error of about 1e-7·‖t‖²; the
        gradient 2 UᵀU (s − p) has no such loss.
        """
        product_B, squared_norm_s_B = self._exact_products()
        return squared_norm_s_B - 2 * product_B + self._squared_norm_t_B

    def token_cosine(self) -> Tensor:
        """cos(U s, t) of each teacher token (B, H, W), approximate: <U s, U p> / (‖U s‖ ‖U p‖ r).

        What a token loses of its norm is not known, only what they lose together: r = ‖t‖ / ‖U p‖.
        """
        student_BCHW, reached_BCHW = self._on_grid()
        squared_norm_reached_B = reached_BCHW.square().sum(_OF_A_MAP)
        share_B = (squared_norm_reached_B / self._squared_norm_t_B.clamp(min=1e-30)).sqrt()
        return cosine_similarity(student_BCHW, reached_BCHW, dim=1) * share_B[:, None, None]

    def smooth_l1(self) -> Tensor:
        """Smooth-L1 (beta = 1) of U s against U p (B,), approximate: the mean over a map's elements.

        Its gradient is exact where all differences to t and to U p are below 1.
        """
        return F.smooth_l1_loss(*self._on_grid(), reduction="none").mean(_OF_A_MAP)

    def _exact_products(self) -> tuple[Tensor, Tensor]:
        """<U s, t> and ‖U s‖² (B,); the maps on `grid` are not formed."""
        if self._products is None:
            gram_s_BChw = gram(self._s_BChw, self._grid)
            product_B = (self._p_BChw * gram_s_BChw).sum(_OF_A_MAP)
            self._products = product_B, (self._s_BChw * gram_s_BChw).sum(_OF_A_MAP)
        return self._products

    def _on_grid(self) -> tuple[Tensor, Tensor]:
        """U s and U p (B, C, H, W)."""
        if self._upsampled is None:
            self._upsampled = upsample(self._s_BChw, self._grid), upsample(self._p_BChw, self._grid)
        return self._upsampled
