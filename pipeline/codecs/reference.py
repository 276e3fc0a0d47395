"""Decoding in plain numpy: the documentation of the format, and a way to read a cache from elsewhere.

    arrays = {name: zarr_group[name][rows] for name in ("codes", "scales")}
    features = decode("int4-hadamard", arrays, tables)      tables: stats/<teacher>.safetensors

Slow and plain on purpose; the codecs' own `decode` must equal it. Shapes: R rows, S levels, H×W grid,
C channels, N = S·H·W.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray
Arrays = dict[str, Array]


def decode(codec: str, arrays: Arrays, tables: Arrays) -> Array:
    """Features (R, S, H, W, C), float32, of any `int…` codec."""
    precision, _, scheme = codec.partition("-")
    bits = int(precision.removeprefix("int"))
    if scheme == "dct":
        return _hadamard(_dct(arrays, tables), tables)
    width = tables["mean"].shape[1]
    levels = tables["levels"][_unpack(arrays["codes"], bits, width)]
    tokens = levels * arrays["scales"][..., None].astype(np.float32)
    return {"": _plain, "hadamard": _hadamard, "phi-s": _phi_s}[scheme](tokens, tables)


def _unpack(packed: Array, bits: int, width: int) -> Array:
    """A little-endian bit stream for each token: code i is bits i·b … i·b + b − 1, lowest first."""
    stream = np.unpackbits(packed, axis=-1, count=width * bits, bitorder="little")
    return stream.reshape(*packed.shape[:-1], width, bits) @ (1 << np.arange(bits))


def _plain(tokens_RSHWC: Array, tables: Arrays) -> Array:
    return _levels(tables["mean"]) + tokens_RSHWC * _levels(tables["std"])


def _hadamard(tokens_RSHWC: Array, tables: Arrays) -> Array:
    rotation_CC = np.kron(tables["left"], tables["right"]) * tables["signs"]
    return _plain(tokens_RSHWC @ rotation_CC, tables)


def _phi_s(tokens_RSHWC: Array, tables: Arrays) -> Array:
    rotated_RSHWC = np.einsum("rshwd,sdc->rshwc", tokens_RSHWC, tables["rotation"], optimize=True)
    return _levels(tables["mean"]) + rotated_RSHWC * tables["std"][:, None, None, None]


def _dct(arrays: Arrays, tables: Arrays) -> Array:
    """Normalised tokens from their coefficients over levels, row and column frequencies."""
    bits_N = tables["bits"].ravel()
    codes, width = arrays["codes"], tables["mean"].shape[1]
    spectrum_RNC = np.zeros((len(codes), len(bits_N), width), np.float32)
    start = 0
    for bits in range(8, 0, -1):  # coefficients lie in the row by falling bits, then by index
        (positions,) = np.nonzero(bits_N == bits)
        end = start + len(positions) * width * bits // 8
        packed = codes[:, start:end].reshape(len(codes), len(positions), width * bits // 8)
        levels = tables["levels"][2**bits - 2 : 2 ** (bits + 1) - 2]
        spectrum_RNC[:, positions] = levels[_unpack(packed, bits, width)]
        start = end
    spectrum = spectrum_RNC.reshape(len(codes), *tables["bits"].shape, width)
    spectrum = spectrum * arrays["scales"][..., None].astype(np.float32)
    bases = tables["level_basis"], tables["row_basis"], tables["column_basis"]
    tokens_RSHWC = np.einsum("rtfgc,ts,fh,gw->rshwc", spectrum, *bases, optimize=True)
    return tokens_RSHWC * arrays["token_scales"][..., None].astype(np.float32)


def _levels(table_SC: Array) -> Array:
    return table_SC[:, None, None]
