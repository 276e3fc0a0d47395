"""Ideas that were tried at the bytes of int4-hadamard and not kept as codecs.

Each takes a calibration sample and the rows to code, both (R, S, H, W, C), and gives the decoded rows.
docs/codecs.md says what came of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teachercache.pipeline.codecs.dct import allocate_bits
from teachercache.pipeline.codecs.normalisation import Hadamard, Normalisation, rotate
from teachercache.pipeline.codecs.quantizer import (
    ScalarQuantizer,
    divide_by_scales,
    gaussian_levels,
    root_mean_square,
)

BITS = 4


def level_prediction(sample_RSHWC: Tensor, features_RSHWC: Tensor) -> Tensor:
    """Each level is predicted from the decoded one before by one gain a channel; the rest is coded."""
    standardise, hadamard = Normalisation.calibrate(sample_RSHWC), Hadamard.calibrate(sample_RSHWC)
    left, right = hadamard.tables["left"], hadamard.tables["right"]
    quantizer = ScalarQuantizer(_levels(BITS))
    z_sample, z = standardise.forward(sample_RSHWC), standardise.forward(features_RSHWC)
    levels = [torch.zeros_like(z[:, 0])]
    for level in range(z.shape[1]):
        gain_C = torch.zeros(z.shape[-1])
        if level:
            before, now = z_sample[:, level - 1], z_sample[:, level]
            gain_C = (before * now).mean((0, 1, 2)) / before.square().mean((0, 1, 2))
        residual = rotate(z[:, level] - gain_C * levels[-1], left, right)
        codes, scales = quantizer.quantise(residual)
        decoded = quantizer.dequantise(codes, z.shape[-1]) * scales[..., None].float()
        levels.append(gain_C * levels[-1] + rotate(decoded, left.T, right.T))
    return _destandardise(standardise, torch.stack(levels[1:], 1))


def channel_klt(sample_RSHWC: Tensor, features_RSHWC: Tensor) -> Tensor:
    """Dense principal axes for each level instead of Hadamard, their bits by reverse water-filling."""
    standardise = Normalisation.calibrate(sample_RSHWC)
    levels = []
    for z_sample, z in zip(
        standardise.forward(sample_RSHWC).unbind(1),
        standardise.forward(features_RSHWC).unbind(1),
        strict=True,
    ):
        unit_sample = (z_sample / root_mean_square(z_sample)).flatten(0, 2)
        axes = torch.linalg.eigh(unit_sample.T @ unit_sample).eigenvectors
        power_C = (unit_sample @ axes).square().mean(0)
        bits_C = torch.from_numpy(allocate_bits(power_C.double().numpy(), BITS * len(power_C)))
        scales = root_mean_square(z).half().float()
        unit = divide_by_scales(z, scales) @ axes / power_C.sqrt()
        decoded = torch.zeros_like(unit)
        for bits in bits_C.unique().tolist():
            decoded[..., bits_C == bits] = _nearest(unit[..., bits_C == bits], _levels(bits))
        levels.append(scales * (decoded * power_C.sqrt() @ axes.T))
    return _destandardise(standardise, torch.stack(levels, 1))


IDEAS = {"level prediction": level_prediction, "channel KLT": channel_klt}


def _levels(bits: int) -> Tensor:
    return torch.from_numpy(gaussian_levels(bits)).float()


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    return levels[torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)]


def _destandardise(standardise: Normalisation, z_RSHWC: Tensor) -> Tensor:
    one = torch.ones(1)
    return torch.stack([standardise.inverse(z, one, i) for i, z in enumerate(z_RSHWC.unbind(1))], 1)
