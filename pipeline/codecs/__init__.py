"""Codecs turn float features into what lies on disk, and back.

    codec = get_codec("int4-hadamard").calibrate(x)      x (rows, levels, H, W, C), any float dtype
    encoded = codec.encode(x)
    encoded.tensors()                                    {name: tensor}: exactly what goes to disk
    encoded.decode(device="cuda", dtype=torch.float32)

A codec is registered under one name in `_CODECS`; nothing else needs to know it. What others ask of a codec
before they use it (how it stands among the others, how many rows it learns from) are attributes of `Codec`.
"""

from collections.abc import Callable
from functools import partial
from typing import get_args

from teachercache.pipeline.codecs.codec import Codec, Encoded, Standing, torch_dtype
from teachercache.pipeline.codecs.dct import RINGS, SCALAR, GridDctCodec
from teachercache.pipeline.codecs.quantized import SCHEMES, QuantizedCodec
from teachercache.pipeline.codecs.scalar import BFloat16Codec, BitRoundCodec, Float16Codec, Float32Codec
from teachercache.pipeline.errors import CodecError

_CODECS: dict[str, Callable[[], Codec]] = {
    codec.name: codec for codec in (Float32Codec, Float16Codec, BFloat16Codec)
}
_CODECS |= {f"bitround-{_bits}": partial(BitRoundCodec, _bits) for _bits in (8, 6, 5, 4, 3)}
for _bits in (8, 6, 5, 4, 3):
    for _suffix, _scheme in SCHEMES.items():
        if _bits in _scheme.rates:
            _CODECS[f"int{_bits}{_suffix}"] = partial(QuantizedCodec, f"int{_bits}{_suffix}", _bits, _scheme)
    if _bits in (4, 3):
        for _suffix, _quantisation in (("-dct", SCALAR), ("-dct-rings", RINGS)):
            _name = f"int{_bits}{_suffix}"
            _CODECS[_name] = partial(GridDctCodec, _name, _bits, _quantisation)


def codec_names(standing: Standing | None = None) -> list[str]:
    """All codecs, or those of one standing, by falling number of bits."""
    return [name for name in _CODECS if standing in (None, get_codec(name).standing)]


def get_codec(name: str) -> Codec:
    """The codec called `name`, not calibrated: experiments too, so that every cache stays readable.

    Raises `CodecError` for a name nobody registered.
    """
    try:
        return _CODECS[name]()
    except KeyError:
        raise CodecError(
            "There is no codec of this name.",
            got=repr(name),
            expected="; ".join(f"{kind}: {', '.join(codec_names(kind))}" for kind in get_args(Standing)),
            do="choose one of them in the recipe (codec: …)",
        ) from None


__all__ = ["Codec", "Encoded", "Standing", "codec_names", "get_codec", "torch_dtype"]
