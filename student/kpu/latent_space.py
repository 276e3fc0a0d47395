"""What student and teachers are compared by (KPU, Eq. 1 to 3), and what maps it from one's space to the
other's.

B  images      h, w  grid of the student's map      D  width of the student
               H, W  grid of a teacher's map        C  width of the teacher
"""

from typing import NamedTuple

from torch import Tensor, nn

from teachercache.pipeline.grids import upsample
from teachercache.pipeline.records.strict import Size


class Features(NamedTuple):
    """X = {x, V}: an image's feature (B, C), None for teachers without class token, and map (B, C, H, W)."""

    image: Tensor | None
    map: Tensor

    @property
    def grid(self) -> Size:
        return self.map.shape[2], self.map.shape[3]


class Alignment(NamedTuple):
    """All that Eq. 1 to 3 compare for one teacher: `student` X with `t2s`, h_t2s(X^t); `s2t`, h_s2t(X), and
    `rec`, h_rec(h_t2s(X^t)), with `teacher` X^t. None where the student is built without them."""

    student: Features
    teacher: Features
    s2t: Features
    t2s: Features | None
    rec: Features | None


class Projection(nn.Module):
    """h of one teacher: the map is resampled to a grid, then an MLP with one hidden layer maps each of its
    tokens, and another the image's feature, if any. (The paper does not state the width and activation of
    the hidden layer; here they are the student's width and GELU.)"""

    def __init__(self, before: int, after: int, hidden: int, with_image: bool) -> None:
        super().__init__()
        self.image = _mlp(before, hidden, after) if with_image else None
        self.map = _mlp(before, hidden, after)

    def forward(self, features: Features, grid: Size) -> Features:
        map_BHWC = self.map(upsample(features.map, grid).permute(0, 2, 3, 1))
        image_BC = None if self.image is None else self.image(features.image)
        return Features(image_BC, map_BHWC.permute(0, 3, 1, 2))


def _mlp(before: int, hidden: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, hidden), nn.GELU(), nn.Linear(hidden, after))
