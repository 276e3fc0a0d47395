"""What a codec does to a token before it is scaled and quantised, and undoes after.

Shapes: R rows, S levels, C channels. A calibrated normalisation is its tables, and each is linear:

    z = (x − mean) / std          outliers are taken out of z, and their x set again after decoding
    standardise   y = z
    hadamard      y = H D z       D random signs, H a Hadamard matrix
    phi-s         y = H D Uᵀ z    U the eigenvectors of the covariance, one std a level

Mean, std and covariance are those of the values that are not outliers. The last is PHI-S (Ranzinger et al.
2024, "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation"): an isotropic scale and a
rotation after which every channel has unit variance.
"""

import math
from typing import ClassVar, Self

import torch
from scipy.fft import dct
from torch import Tensor

from teachercache.pipeline.codecs.outliers import put_back, take_out, usual_moments
from teachercache.pipeline.codecs.quantizer import take
from teachercache.pipeline.records.feature_stats import FeatureMoments

SIGN_SEED = 0
LEVEL_TABLES = ("mean", "std", "rotation")  # those that have an entry for each level
SMALLEST_STD = 1e-12
# A channel that hardly varies in the calibration sample is not blown up to match the others: it may vary
# later. At 1/√C of the others' std it then takes half of its token's energy, and costs √2 in the error.
SMALLEST_RELATIVE_STD = 1 / 32
_VARIES = 1e-6  # of the largest std; what is below is rounding


class Normalisation:
    """Standardises; others rotate, too. `forward` takes whole rows, `inverse` any tokens of one level."""

    table_names: ClassVar[tuple[str, ...]] = ("mean", "std")
    needs_covariance: ClassVar[bool] = False

    def __init__(self, tables: dict[str, Tensor]) -> None:
        self.tables = {name: tables[name] for name in self.table_names}
        self.levels, self.width = tables["mean"].shape
        self._std_SC = tables["std"].view(self.levels, -1).expand_as(tables["mean"])

    @classmethod
    def calibrate(cls, features_RSHWC: Tensor) -> Self:
        """The tables for features like these; float32, on their device."""
        return cls.of_moments(usual_moments(features_RSHWC, cls.needs_covariance))

    @classmethod
    def of_moments(cls, moments: FeatureMoments) -> Self:
        """The tables for features of these moments. Raises `ValueError` where a covariance is missing."""
        return cls(_standard_tables(moments))

    def forward(self, features_RSHWC: Tensor) -> Tensor:
        """y, float32, of the same shape; over the calibration sample its mean square is 1."""
        return self.rotate(self.standardise(features_RSHWC))

    def split(self, features_RSHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y without the outliers; their places in the level, int32 (R, S, K), and z there, float16.

        Outliers that float16 cannot hold are infinite.
        """
        z_RSHWC = self.standardise(features_RSHWC).contiguous()
        places_RSK, values_RSK = take_out(z_RSHWC)
        return self.rotate(z_RSHWC), places_RSK, values_RSK

    def restore(self, features_RSHWC: Tensor, places_RSK: Tensor, values_RSK: Tensor) -> None:
        """Sets decoded features to their outliers, in place."""
        first_channel_S1 = self.width * torch.arange(self.levels, device=places_RSK.device)[:, None]
        index_RSK = places_RSK % self.width + first_channel_S1
        mean, std = (take(table_SC.flatten(), index_RSK) for table_SC in (self.tables["mean"], self._std_SC))
        put_back(features_RSHWC, places_RSK, torch.addcmul(mean, values_RSK.float(), std))

    def standardise(self, features_RSHWC: Tensor) -> Tensor:
        """z, float32."""
        return (features_RSHWC.float() - self.tables["mean"][:, None, None]) / self._std_SC[:, None, None]

    def rotate(self, z_RSHWC: Tensor) -> Tensor:
        """y of what `standardise` gives."""
        return z_RSHWC

    def inverse(self, tokens: Tensor, scales: Tensor, level: int) -> Tensor:
        """x of y = scales · tokens, (…, C) and (…, 1), all of one level."""
        return torch.addcmul(self.tables["mean"][level], tokens * scales, self.tables["std"][level])


class Hadamard(Normalisation):
    table_names = ("mean", "std", "signs", "left", "right")

    def __init__(self, tables: dict[str, Tensor]) -> None:
        super().__init__(tables)
        self.signed_std_SC = tables["signs"] * tables["std"]
        self._half_signs_C = tables["signs"].half()

    @classmethod
    def of_moments(cls, moments: FeatureMoments) -> Self:
        return cls(_standard_tables(moments) | _rotation_tables(moments))

    def split(self, features_RSHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens_RSHWC, places_RSK, values_RSK = super().split(features_RSHWC)
        return tokens_RSHWC, places_RSK, values_RSK * take(self._half_signs_C, places_RSK % self.width)

    def standardise(self, features_RSHWC: Tensor) -> Tensor:
        """D z, since another pass for the signs would cost a GPU as much as a product."""
        centred_RSHWC = features_RSHWC.float() - self.tables["mean"][:, None, None]
        return centred_RSHWC / self.signed_std_SC[:, None, None]

    def rotate(self, z_RSHWC: Tensor) -> Tensor:
        return rotate(z_RSHWC, self.tables["left"], self.tables["right"])

    def inverse(self, tokens: Tensor, scales: Tensor, level: int) -> Tensor:
        signed = rotate(tokens, self.tables["left"].T, self.tables["right"].T)
        return torch.addcmul(self.tables["mean"][level], signed * scales, self.signed_std_SC[level])


class PhiS(Normalisation):
    """`rotation` (S, C, C) is H D Uᵀ, dense: exact for each teacher, and dear to decode without a GPU."""

    table_names = ("mean", "std", "rotation")
    needs_covariance = True

    @classmethod
    def of_moments(cls, moments: FeatureMoments) -> Self:
        variances_SC, eigenvectors_SCC = torch.linalg.eigh(moments.covariance_SCC())
        tables = _rotation_tables(moments)
        signed_SCC = (tables["signs"].double() * eigenvectors_SCC).contiguous()
        rotation_SCC = rotate(signed_SCC, tables["left"].double(), tables["right"].double()).mT
        std_S = variances_SC.clamp(min=0).mean(1).sqrt()
        std_S = torch.where(std_S > SMALLEST_STD, std_S, 1)
        rotation = rotation_SCC.float().contiguous()
        return cls({"mean": moments.mean_SC.float(), "std": std_S.float(), "rotation": rotation})

    def rotate(self, z_RSHWC: Tensor) -> Tensor:
        levels = zip(z_RSHWC.unbind(1), self.tables["rotation"], strict=True)
        return torch.stack([level @ rotation.T for level, rotation in levels], 1)

    def inverse(self, tokens: Tensor, scales: Tensor, level: int) -> Tensor:
        rotated = tokens @ self.tables["rotation"][level]
        return torch.addcmul(self.tables["mean"][level], rotated, scales * self.tables["std"][level])


def _standard_tables(moments: FeatureMoments) -> dict[str, Tensor]:
    return {"mean": moments.mean_SC.float(), "std": floored_std(moments.std_SC()).float()}


def floored_std(std_SC: Tensor) -> Tensor:
    """Each channel's std, and at least `SMALLEST_RELATIVE_STD` of the median of those that vary.

    1 where no channel of a level does, since the sample then says nothing of what is to come.
    """
    varies_SC = std_SC > (_VARIES * std_SC.amax(1, keepdim=True)).clamp(min=SMALLEST_STD)
    usual_S1 = std_SC.where(varies_SC, torch.nan).nanmedian(1, keepdim=True).values
    return torch.where(usual_S1.isnan(), 1, std_SC.maximum(SMALLEST_RELATIVE_STD * usual_S1))


def _rotation_tables(moments: FeatureMoments) -> dict[str, Tensor]:
    width = moments.mean_SC.shape[1]
    generator = torch.Generator().manual_seed(SIGN_SEED)
    signs_C = 1.0 - 2.0 * torch.randint(2, (width,), generator=generator)
    left, right = hadamard_factors(width)
    tables = {"signs": signs_C, "left": left.float(), "right": right.float()}
    return {name: table.to(moments.mean_SC.device) for name, table in tables.items()}


def hadamard_factors(width: int) -> tuple[Tensor, Tensor]:
    """Orthonormal (left, right) in float64 with left ⊗ right of size `width`, about √width each.

    A Hadamard matrix has entries of one magnitude, so rotating by it spreads an outlier channel evenly over
    all. As two small products, left (m, m) @ token (m, k) @ rightᵀ (k, k), that takes 2·(m + k) flops a value
    where a dense rotation takes 2·m·k.

    Hadamard for each width that is a power of two times a Paley order: all of 256, 384, 512, 768, 1024,
    1152, 1280, 1408, 1536 and more. Else the odd part of the width is served by a DCT, also orthonormal.
    """
    left, right = _core(width), torch.ones(1, 1, dtype=torch.float64)
    doublings = (width // len(left)).bit_length() - 1
    for _ in range(doublings):
        if len(left) < len(right):
            left = _double(left)
        else:
            right = _double(right)
    return left, right


def rotate(tokens: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """H x along the last axis of `tokens` (…, width). With the factors transposed: Hᵀ x."""
    blocks = tokens.reshape(-1, len(left), len(right))
    return (left @ (blocks @ right.T)).view(tokens.shape)


def _core(width: int) -> Tensor:
    """The smallest orthonormal matrix from which doubling reaches `width`."""
    odd = width // (width & -width)
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    order = 4 * odd
    while width % order == 0:
        if _is_prime(order - 1):
            return _paley(order - 1)
        order *= 2
    return torch.from_numpy(dct(torch.eye(odd, dtype=torch.float64).numpy(), norm="ortho"))


def _double(matrix: Tensor) -> Tensor:
    """Sylvester's step, orthonormal."""
    return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=matrix.dtype), matrix) / math.sqrt(2)


def _paley(q: int) -> Tensor:
    """Paley's first construction, orthonormal: order q + 1 for a prime q ≡ 3 (mod 4)."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    index = torch.arange(q)
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = character[(index - index[:, None]) % q] + torch.eye(q, dtype=torch.float64)
    return matrix / math.sqrt(q + 1)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
