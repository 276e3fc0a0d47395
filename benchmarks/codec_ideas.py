"""Ideas beyond one scalar quantiser a token, tried at the bytes of int4-hadamard and not kept as codecs.

Each takes a calibration sample and the rows to code, both (R, S, H, W, C), and gives the decoded rows.
docs/codecs.md says what came of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.codecs.dct import allocate_bits
from pipeline.codecs.hadamard import rotate
from pipeline.codecs.lloyd_max import gaussian_levels
from pipeline.codecs.normalisation import Hadamard, Standardise
from pipeline.codecs.quantizer import GAUSSIAN_STEPS, Quantizer, divide_by_scales, root_mean_square

BITS = 4
STATES = 16


def level_prediction(sample_RSHWC: Tensor, features_RSHWC: Tensor) -> Tensor:
    """Each level is predicted from the decoded one before by one gain a channel; the rest is coded."""
    standardise, hadamard = Standardise.calibrate(sample_RSHWC), Hadamard.calibrate(sample_RSHWC)
    left, right = hadamard.tables["left"], hadamard.tables["right"]
    quantizer = _quantizer(BITS)
    z_sample, z = standardise.forward(sample_RSHWC), standardise.forward(features_RSHWC)
    levels = [torch.zeros_like(z[:, 0])]
    for level in range(z.shape[1]):
        gain_C = torch.zeros(z.shape[-1])
        if level:
            before, now = z_sample[:, level - 1], z_sample[:, level]
            gain_C = (before * now).mean((0, 1, 2)) / before.square().mean((0, 1, 2))
        residual = rotate(z[:, level] - gain_C * levels[-1], left, right)
        codes, scales = quantizer.quantise(residual, root_mean_square(residual), GAUSSIAN_STEPS)
        decoded = quantizer.dequantise(codes, z.shape[-1]) * scales[..., None].float()
        levels.append(gain_C * levels[-1] + rotate(decoded, left.T, right.T))
    return _destandardise(standardise, torch.stack(levels[1:], 1))


def channel_klt(sample_RSHWC: Tensor, features_RSHWC: Tensor) -> Tensor:
    """Dense principal axes for each level instead of Hadamard, their bits by reverse water-filling."""
    standardise = Standardise.calibrate(sample_RSHWC)
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


def trellis(sample_RSHWC: Tensor, features_RSHWC: Tensor) -> Tensor:
    """Trellis-coded quantisation: a code and the one before it choose among 256 levels (bitshift trellis,
    QTIP, Tseng et al. 2024). Decoding is a table lookup on 8 bits; encoding is a Viterbi search."""
    hadamard = Hadamard.calibrate(sample_RSHWC)
    table_PC = trellis_table()
    tokens = hadamard.forward(features_RSHWC)
    scales = root_mean_square(tokens).half()
    unit = divide_by_scales(tokens, scales)
    decoded = viterbi(unit.flatten(0, -2), table_PC).view(unit.shape)
    levels = range(features_RSHWC.shape[1])
    return torch.stack([hadamard.inverse(decoded[:, i], scales[:, i].float(), i) for i in levels], 1)


def trellis_table(rounds: int = 80) -> Tensor:
    """Levels (previous code, code), float32, by Lloyd's iteration on Gaussian samples."""
    quantiles = torch.special.ndtri((torch.arange(STATES**2) + 0.5) / STATES**2)
    reversed_bits = torch.tensor([int(f"{code:04b}"[::-1], 2) for code in range(STATES)])
    table_PC = quantiles.view(STATES, STATES).T[reversed_bits].contiguous()
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        samples = torch.randn(400, 512, generator=generator)
        index = _best_path(samples, table_PC).flatten()
        counts = torch.bincount(index, minlength=STATES**2)
        sums = torch.zeros(STATES**2).index_add_(0, index, samples.flatten())
        table_PC = torch.where(counts > 3, sums / counts, table_PC.flatten()).view(STATES, STATES)
    return table_PC


def viterbi(unit_NC: Tensor, table_PC: Tensor) -> Tensor:
    """The sequence of levels nearest to each token."""
    parts = [table_PC.flatten()[_best_path(part, table_PC)] for part in unit_NC.split(4096)]
    return torch.cat(parts)


def _best_path(unit_NC: Tensor, table_PC: Tensor) -> Tensor:
    """(N, C) indices previous code · 16 + code, by dynamic programming over the channels; starts at code 0."""
    num_tokens, num_steps = unit_NC.shape
    cost_NP = torch.full((num_tokens, STATES), torch.inf)
    cost_NP[:, 0] = 0
    previous = torch.empty(num_steps, num_tokens, STATES, dtype=torch.uint8)
    for step in range(num_steps):
        error_NPC = (unit_NC[:, step, None, None] - table_PC).square_()
        cost_NP, best = error_NPC.add_(cost_NP[:, :, None]).min(1)
        previous[step] = best
    code = cost_NP.argmin(1)
    path = torch.empty(num_tokens, num_steps, dtype=torch.long)
    for step in reversed(range(num_steps)):
        before = previous[step].gather(1, code[:, None])[:, 0].long()
        path[:, step] = before * STATES + code
        code = before
    return path


IDEAS = {"level prediction": level_prediction, "channel KLT": channel_klt, "trellis": trellis}


def _levels(bits: int) -> Tensor:
    return torch.from_numpy(gaussian_levels(bits)).float()


def _quantizer(bits: int) -> Quantizer:
    return Quantizer(_levels(bits))


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    return levels[torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)]


def _destandardise(standardise: Standardise, z_RSHWC: Tensor) -> Tensor:
    one = torch.ones(1)
    return torch.stack([standardise.inverse(z, one, i) for i, z in enumerate(z_RSHWC.unbind(1))], 1)
