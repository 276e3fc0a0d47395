"""The codecs' decoding in plain numpy: it defines the format, and reads a cache where teachercache is not.

    names = "codes", "scales", "outlier_places", "outlier_values"       docs/codecs.md has those of dct
    arrays = {name: zarr_group[name][rows] for name in names}
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
    if scheme.startswith("dct"):
        tokens_RSHWC = _dct(arrays, tables)
    else:
        packed, width = arrays["codes"], tables["mean"].shape[1]
        if scheme == "rings":
            levels = _rings(packed, bits, width, tables["levels"])
        else:
            levels = tables["levels"][_unpack(packed, bits, width)]
        tokens_RSHWC = levels * arrays["scales"][..., None].astype(np.float32)
    if scheme in ("hadamard", "rings", "dct", "dct-rings"):
        rotation_CC = np.kron(tables["left"], tables["right"]) * tables["signs"]
        tokens_RSHWC = tokens_RSHWC @ rotation_CC
    elif scheme == "phi-s":
        tokens_RSHWC = np.einsum("rshwd,sdc->rshwc", tokens_RSHWC, tables["rotation"], optimize=True)
    num_levels, width = tables["mean"].shape
    mean_SC, std_SC = (
        np.broadcast_to(tables[name].reshape(num_levels, -1), (num_levels, width)) for name in ("mean", "std")
    )
    tokens_RSNC = tokens_RSHWC.reshape(*tokens_RSHWC.shape[:2], -1, width)
    flat_RSn = (mean_SC[:, None] + std_SC[:, None] * tokens_RSNC).reshape(*tokens_RSNC.shape[:2], -1)
    level_S1, places_RSK = np.arange(num_levels)[:, None], arrays["outlier_places"]
    mean_RSK, std_RSK = (table_SC[level_S1, places_RSK % width] for table_SC in (mean_SC, std_SC))
    np.put_along_axis(flat_RSn, places_RSK, mean_RSK + std_RSK * arrays["outlier_values"], 2)
    return flat_RSn.reshape(tokens_RSHWC.shape)


def _rings(packed: Array, bits: int, width: int, table: Array) -> Array:
    """Value by value, as the signs depend on those before."""
    low_bytes = width * (bits - 1) // 8
    low = (
        _unpack(packed[..., :low_bytes], bits - 1, width)
        if bits > 1
        else np.zeros((*packed.shape[:-1], width), int)
    )
    unary = _unpack(packed[..., low_bytes:], 1, width)
    places = np.nonzero(unary)[-1].reshape(*unary.shape[:-1], width // 2)  # of the one that ends each ring
    rings = np.diff(places, prepend=-1) - 1
    ranks = rings * 4 ** (bits - 1) + low[..., 1::2] * 2 ** (bits - 1) + low[..., ::2]
    a = table[ranks].reshape(unary.shape)
    v, z = np.floor(a / 2).astype(int) % 2, np.zeros_like(unary)
    for t in range(width):
        for before in (v[..., t - i] for i in (1, 4, 5) if t >= i):
            z[..., t] ^= before
        if t >= 6:
            z[..., t] ^= z[..., t - 6]
    return np.where(z, -a, a) * 2.0 ** (1 - bits)


def _unpack(packed: Array, bits: int, width: int) -> Array:
    """A little-endian bit stream for each token: code i is bits i·b … i·b + b − 1, lowest first."""
    stream = np.unpackbits(packed, axis=-1, count=width * bits, bitorder="little")
    return stream.reshape(*packed.shape[:-1], width, bits) @ (1 << np.arange(bits))


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
        if tables["levels"].ndim == 2:
            spectrum_RNC[:, positions] = _rings(packed, bits, width, tables["levels"])
        else:
            levels = tables["levels"][2**bits - 2 : 2 ** (bits + 1) - 2]
            spectrum_RNC[:, positions] = levels[_unpack(packed, bits, width)]
        start = end
    spectrum = spectrum_RNC.reshape(len(codes), *tables["bits"].shape, width)
    spectrum = spectrum * arrays["scales"][..., None].astype(np.float32)
    bases = tables["level_basis"], tables["row_basis"], tables["column_basis"]
    tokens_RSHWC: Array = np.einsum("rtfgc,ts,fh,gw->rshwc", spectrum, *bases, optimize=True)
    tokens_RSHWC *= arrays["token_scales"][..., None].astype(np.float32)
    return tokens_RSHWC
