"""Decoders: heads on the features of any student, or of teachers from a cache.

decoders = load_decoders("runs/decoders/decoders")
decoders.predict("semseg", images)              uint8 (B, 3, H, W) → logits (B, classes, H, W)
"""

from pkgutil import resolve_name
from typing import Literal

from teachercache.pipeline.errors import require_known
from teachercache.student.decoders.decoder import Decoder

DecoderKind = Literal["upernet", "mask_dino", "linear"]
_CLASSES = {
    "upernet": "teachercache.student.decoders.upernet:UPerNet",
    "mask_dino": "teachercache.student.decoders.mask_dino:MaskDINO",
    "linear": "teachercache.student.decoders.linear:Linear",
}
DECODERS = tuple(_CLASSES)


def decoder_class(kind: str) -> type[Decoder]:
    """Raises `RecipeError` for a kind that is not in `DECODERS`, `MissingExtraError`."""
    require_known("decoder", kind, DECODERS)
    return resolve_name(_CLASSES[kind])


__all__ = ["DECODERS", "Decoder", "decoder_class"]
