"""Classification by one linear layer (KPU, "Evaluation Metrics")."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.pipeline.records.strict import Size
from teachercache.student.decoders.decoder import Decoder, Widths
from teachercache.student.models.student import ImageRepresentation


class Linear(Decoder):
    """On x and the mean of each map, side by side, each normalised without parameters: raw features of
    different origin differ by orders of magnitude."""

    task = "class"
    reads_image = True

    def __init__(self, widths: Widths, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(widths.image + sum(widths.maps), classes)

    def losses(self, features: ImageRepresentation, labels: Tensor) -> dict[str, Tensor]:
        """`labels` (B,)."""
        logits_BC = self._logits(features)
        with torch.autocast(logits_BC.device.type, enabled=False):
            return {"cross_entropy": F.cross_entropy(logits_BC.float(), labels)}

    def predict(self, features: ImageRepresentation, size: Size) -> Tensor:
        """The class of each image (B,)."""
        return self._logits(features).argmax(1)

    def _logits(self, features: ImageRepresentation) -> Tensor:
        vectors = [features.image, *(one.mean((2, 3)) for one in features.maps)]
        return self.linear(torch.cat([F.layer_norm(one, one.shape[1:]) for one in vectors], dim=1))
