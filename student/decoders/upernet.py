"""Segmentation by UPerNet with an auxiliary FCN (KPU, "Evaluation Metrics"; Xiao et al., 2018)."""

import torch
from torch import Tensor

from teachercache.pipeline.errors import extra

with extra("decoders"):
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from teachercache.pipeline.grids import upsample
from teachercache.pipeline.records.strict import Size
from teachercache.student.decoders.decoder import Decoder, Widths, pyramid
from teachercache.student.losses.tasks import cross_entropy
from teachercache.student.models.student import ImageRepresentation


class UPerNet(Decoder):
    """The heads of transformers. `width` and `auxiliary_width`: their channels; the auxiliary head, on the
    map of stride 16, weighs 0.4 and does not predict."""

    task = "semseg"

    def __init__(self, widths: Widths, classes: int, width: int = 512, auxiliary_width: int = 256) -> None:
        super().__init__()
        config = UperNetConfig(hidden_size=width, auxiliary_channels=auxiliary_width, num_labels=classes)
        config.auxiliary_in_channels = None
        self.head = UperNetHead(config, widths.of_pyramid)
        self.auxiliary = UperNetFCNHead(config, widths.of_pyramid)
        self.auxiliary_weight = config.auxiliary_loss_weight

    def losses(self, features: ImageRepresentation, labels: Tensor) -> dict[str, Tensor]:
        """`labels` (B, H, W)."""
        size = labels.shape[1], labels.shape[2]
        maps = pyramid(features.maps, size)
        heads = {"cross_entropy": (self.head, 1.0), "auxiliary": (self.auxiliary, self.auxiliary_weight)}
        losses = {}
        for name, (head, weight) in heads.items():
            logits_BCHW = upsample(head(maps), size)
            with torch.autocast(logits_BCHW.device.type, enabled=False):
                losses[name] = weight * cross_entropy(logits_BCHW.float(), labels)
        return losses

    def predict(self, features: ImageRepresentation, size: Size) -> Tensor:
        """Logits (B, C, H, W)."""
        return upsample(self.head(pyramid(features.maps, size)), size)
