"""Detection and instance segmentation by MaskDINO's decoder (Li et al., 2023), of transformers' parts.

B  images     Q  queries     C  classes     N  things of an image     D  width
h, w  a map at stride 4
Boxes are (centre x, centre y, width, height) as fractions of the image.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from teachercache.pipeline.errors import RecipeError, extra

with extra("decoders"):
    from transformers import Mask2FormerConfig, RTDetrConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder
    from transformers.models.rt_detr import modeling_rt_detr as rt_detr

from teachercache.pipeline.records.strict import Size
from teachercache.student.decoders.decoder import STRIDES, Decoder, Widths, pyramid
from teachercache.student.decoders.set_losses import SetLosses, Thing, boxes_around
from teachercache.student.kpu.deformable_attention import look_around
from teachercache.student.models.student import ImageRepresentation

_LEVELS = 3  # strides 8, 16 and 32, which the pixel decoder attends to
_KEPT = 100  # detections of an image, as COCO counts them
_LABEL_NOISE, _BOX_NOISE = 0.5, 0.4  # MaskDINO's


class Prediction(NamedTuple):
    """`logits` (B, Q, C), `boxes` (B, Q, 4), `masks` (B, Q, h, w), logits too."""

    logits: Tensor
    boxes: Tensor
    masks: Tensor

    def of(self, queries: slice) -> Prediction:
        return Prediction(*(one[:, queries] for one in self))


class Detection(NamedTuple):
    """What was found in an image, the surest first: `scores` (K,) of boxes and `mask_scores` (K,) of masks,
    `classes` (K,), `boxes` (K, 4) as (left, top, right, bottom), and `masks` (K, h, w), logits."""

    scores: Tensor
    mask_scores: Tensor
    classes: Tensor
    boxes: Tensor
    masks: Tensor


class MaskDINO(Decoder):
    """Queries are the tokens of the pixel decoder that look most like things; their boxes, those of their
    masks, are refined layer by layer, and each layer predicts. Known things with noise are queries besides
    (denoising).

    `width`: of all of it; `encoder_layers` and `layers`: of pixel decoder and decoder; `denoising`: queries
    of noisy things; `points`: where masks are compared. MaskDINO's pixel decoder has a fourth map, at stride
    64.
    """

    task = "instances"

    def __init__(
        self,
        widths: Widths,
        classes: int,
        width: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        layers: int = 9,
        queries: int = 300,
        denoising: int = 100,
        points: int = 12544,
    ) -> None:
        super().__init__()
        if width % 32 or width % heads:
            raise RecipeError(
                "The options of mask_dino do not fit each other.",
                got=f"width {width}, heads {heads}",
                expected="a width that is a multiple of 32, for its group norms, and of heads",
                do="choose another width",
            )
        self.classes, self.queries, self.denoising = classes, queries, denoising
        pixels = Mask2FormerConfig(
            feature_size=width,
            mask_feature_size=width,
            encoder_layers=encoder_layers,
            encoder_feedforward_dim=4 * width,
            num_attention_heads=heads,
            feature_strides=list(STRIDES),
            dropout=0.0,
        )
        config = RTDetrConfig(
            d_model=width,
            decoder_attention_heads=heads,
            decoder_ffn_dim=8 * width,
            num_feature_levels=_LEVELS,
            dropout=0.0,
            attn_implementation="sdpa",
        )
        self.pixel_decoder = Mask2FormerPixelDecoder(pixels, widths.of_pyramid)
        self.encoder_norm = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.layers = nn.ModuleList(rt_detr.RTDetrDecoderLayer(config) for _ in range(layers))
        self.positions = rt_detr.RTDetrMLPPredictionHead(4, 2 * width, width, num_layers=2)
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, classes)
        self.box_head = rt_detr.RTDetrMLPPredictionHead(width, width, 4, num_layers=3)
        self.mask_head = rt_detr.RTDetrMLPPredictionHead(width, width, width, num_layers=3)
        self.noisy_classes = nn.Embedding(classes + 1, width)
        self.set_losses = SetLosses(classes, points)
        self._initialise()

    def losses(self, features: ImageRepresentation, labels: Tensor) -> dict[str, Tensor]:
        """`labels` (B, H, W), as `labels.IGNORE` says of instances: by name the sums over all layers."""
        things = [Thing.of(map_HW) for map_HW in labels]
        predictions, noisy = self._decode(features, (labels.shape[1], labels.shape[2]), things)
        with torch.autocast(labels.device.type, enabled=False):
            losses = self.set_losses(predictions, things, noisy)
        unused = 0 * self.noisy_classes.weight.sum()  # in a batch without things
        return losses | {"class": losses["class"] + unused}

    def predict(self, features: ImageRepresentation, size: Size) -> list[Detection]:
        prediction = self._decode(features, size)[0][-1]
        return [self._detection(*one) for one in zip(*prediction, strict=True)]

    def _detection(self, logits_QC: Tensor, boxes_Q4: Tensor, masks_Qhw: Tensor) -> Detection:
        scores_K, places_K = logits_QC.sigmoid().flatten().topk(min(_KEPT, logits_QC.numel()))
        queries_K, masks_Khw = places_K // self.classes, masks_Qhw[places_K // self.classes].float()
        inside_Khw = masks_Khw > 0
        sure_K = (masks_Khw.sigmoid() * inside_Khw).sum((1, 2)) / inside_Khw.sum((1, 2)).clamp(min=1)
        boxes_K4 = rt_detr.center_to_corners_format(boxes_Q4[queries_K])
        return Detection(scores_K, scores_K * sure_K, places_K % self.classes, boxes_K4, masks_Khw)

    def _decode(
        self, features: ImageRepresentation, size: Size, things: list[Thing] | None = None
    ) -> tuple[list[Prediction], Any]:
        """The predictions of the encoder and of each layer, and, of known things, where their noisy queries
        are."""
        pixels = self.pixel_decoder(pyramid(features.maps, size))
        mask_features_BDhw = pixels.mask_features
        levels = list(reversed(pixels.multi_scale_features))
        memory_BLD = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
        grids = [(level.shape[2], level.shape[3]) for level in levels]
        queries_BQD, boxes_BQ4, first = self._select(memory_BLD, grids, mask_features_BDhw)
        noisy, blind = None, None
        if things is not None and self.denoising:
            targets = [{"class_labels": one.classes, "boxes": one.boxes} for one in things]
            noise = self.denoising, _LABEL_NOISE, _BOX_NOISE
            noisy_BND, noisy_boxes, blind, noisy = rt_detr.get_contrastive_denoising_training_group(
                targets, self.classes, queries_BQD.shape[1], self.noisy_classes, *noise
            )
            if noisy is not None:
                queries_BQD = torch.cat([noisy_BND.to(queries_BQD.dtype), queries_BQD], 1)
                boxes_BQ4 = torch.cat([noisy_boxes.sigmoid(), boxes_BQ4], 1)
                blind = blind.to(queries_BQD.dtype)
        predictions, shapes = [first], torch.tensor(grids, device=memory_BLD.device)
        for layer in self.layers:
            queries_BQD = layer(
                queries_BQD,
                object_queries_position_embeddings=self.positions(boxes_BQ4.to(queries_BQD.dtype)),
                reference_points=boxes_BQ4[:, :, None],
                spatial_shapes=shapes,
                spatial_shapes_list=grids,
                encoder_hidden_states=memory_BLD,
                encoder_attention_mask=blind,
            )
            predictions.append(self._predict(self.norm(queries_BQD), boxes_BQ4, mask_features_BDhw))
            boxes_BQ4 = predictions[-1].boxes.detach()
        return predictions, noisy

    def _select(
        self, memory_BLD: Tensor, grids: list[Size], mask_features_BDhw: Tensor
    ) -> tuple[Tensor, Tensor, Prediction]:
        """The queries, their boxes, and what the encoder predicts of them."""
        anchors_1L4, valid_1L1 = rt_detr.RTDetrModel._cached_generate_anchors(
            tuple(grids), 0.05, memory_BLD.device, torch.float32
        )
        tokens_BLD = self.encoder_norm(valid_1L1 * memory_BLD)
        count = min(self.queries, tokens_BLD.shape[1])
        places_BQ1 = self.class_head(tokens_BLD).amax(2).topk(count, 1).indices[..., None]
        chosen_BQD = tokens_BLD.take_along_dim(places_BQ1, 1)
        anchors_BQ4 = anchors_1L4.take_along_dim(places_BQ1, 1)
        first = self._predict(chosen_BQD, anchors_BQ4.sigmoid(), mask_features_BDhw)
        return chosen_BQD.detach(), _boxes_of(first.masks.detach()), first

    def _predict(self, queries_BQD: Tensor, boxes_BQ4: Tensor, mask_features_BDhw: Tensor) -> Prediction:
        masks_BQhw = torch.einsum("bqd,bdhw->bqhw", self.mask_head(queries_BQD), mask_features_BDhw)
        moved_BQ4 = self.box_head(queries_BQD).float() + rt_detr.inverse_sigmoid(boxes_BQ4.float())
        return Prediction(self.class_head(queries_BQD).float(), moved_BQ4.sigmoid(), masks_BQhw.float())

    def _initialise(self) -> None:
        """As the models do that the parts are from: rays of places to look at, few things, boxes as they
        are."""
        attentions: list[Any] = [one for one in self.modules() if hasattr(one, "sampling_offsets")]
        for one in attentions:
            layers = one.sampling_offsets, one.attention_weights, one.value_proj, one.output_proj
            look_around(*layers, (one.n_heads, one.n_levels, one.n_points))
        nn.init.normal_(self.pixel_decoder.level_embed)
        nn.init.constant_(self.class_head.bias, -math.log(99))
        for part in (self.box_head.layers[-1].weight, self.box_head.layers[-1].bias):
            nn.init.zeros_(part)


def _boxes_of(masks_BQhw: Tensor) -> Tensor:
    """Those around masks of logits, the whole image around none."""
    inside = masks_BQhw.flatten(0, 1) > 0
    inside = inside | ~inside.any((1, 2), True).expand_as(inside)
    return boxes_around(inside).unflatten(0, masks_BQhw.shape[:2])
