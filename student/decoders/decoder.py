"""What every decoder is: a head on a pyramid of features, with its losses and what it predicts.

B  images     C  channels of a map     h, w  its grid     H, W  the image
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn

from teachercache.pipeline.grids import upsample
from teachercache.pipeline.records.strict import Size
from teachercache.student.models.student import ImageRepresentation

STRIDES = (4, 8, 16, 32)


class Widths(NamedTuple):
    """Channels of x, and of each map."""

    image: int
    maps: tuple[int, ...]

    @classmethod
    def of(cls, features: ImageRepresentation) -> Self:
        return cls(features.image.shape[1], tuple(one.shape[1] for one in features.maps))

    @property
    def of_pyramid(self) -> list[int]:
        """Channels of the maps that `pyramid` makes of these."""
        return list(self.maps * len(STRIDES) if len(self.maps) == 1 else self.maps)


class Decoder(nn.Module, ABC):
    """Made of `Widths`, a number of classes and numbers of its own, each with a default.

    `task`: of a `LabelledDataset`, what it learns. `reads_image`: whether it works on x, too.
    """

    task: ClassVar[str]
    reads_image: ClassVar[bool] = False

    @abstractmethod
    def losses(self, features: ImageRepresentation, labels: Tensor) -> dict[str, Tensor]:
        """Scalars that add up to the loss of a batch; all parameters have a part in them, whatever the
        labels."""

    @abstractmethod
    def predict(self, features: ImageRepresentation, size: Size) -> Any:
        """For images of this size."""


def pyramid(maps_BChw: list[Tensor], size: Size) -> list[Tensor]:
    """Maps at strides 4, 8, 16 and 32 of an image of this size, for the decoders of networks with stages:
    each resized where it lies on another grid, and a single one at every stride."""
    maps_BChw = maps_BChw * len(STRIDES) if len(maps_BChw) == 1 else maps_BChw
    grids = [(size[0] // stride, size[1] // stride) for stride in STRIDES]
    return [upsample(map_BChw, grid) for map_BChw, grid in zip(maps_BChw, grids, strict=True)]
