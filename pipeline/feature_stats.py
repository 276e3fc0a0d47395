"""Running moments of features, per level and channel, that shards compute apart and merge later.

Shapes: R rows, S levels, H×W grid, C channels. All sums are float64 and centred (Chan, Golub & LeVeque 1983),
so a large mean costs no digits. Merging is associative and commutative up to rounding, near 1e-15; merge in
shard order where the very bits must be repeatable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureMoments:
    """Count, mean and centred second moments of all tokens of some rows.

    `squares_SC` is Σ (x − mean)²; `products_SCC`, kept on request, is Σ (x − mean)(x − mean)ᵀ.
    """

    count: int
    mean_SC: Tensor
    squares_SC: Tensor
    products_SCC: Tensor | None = None

    @classmethod
    def empty(cls, levels: int, width: int, covariance: bool = False) -> Self:
        """The moments of no token: merging them changes nothing."""
        zeros_SC = torch.zeros(levels, width, dtype=torch.float64)
        zeros_SCC = torch.zeros(levels, width, width, dtype=torch.float64) if covariance else None
        return cls(0, zeros_SC, zeros_SC.clone(), zeros_SCC)

    @classmethod
    def of(cls, features_RSHWC: Tensor, covariance: bool = False) -> Self:
        """The moments of these rows, on their device. One row at a time: float64 is needed of one only."""
        _, levels, _, _, width = features_RSHWC.shape
        moments = cls.empty(levels, width, covariance).to(features_RSHWC.device)
        for row_SHWC in features_RSHWC:
            moments = moments.merge(cls._of_row(row_SHWC.flatten(1, 2).double(), covariance))
        return moments

    @classmethod
    def _of_row(cls, tokens_SNC: Tensor, covariance: bool) -> Self:
        mean_SC = tokens_SNC.mean(1)
        centred_SNC = tokens_SNC - mean_SC[:, None]
        products_SCC = centred_SNC.mT @ centred_SNC if covariance else None
        return cls(tokens_SNC.shape[1], mean_SC, centred_SNC.square().sum(1), products_SCC)

    def merge(self, other: Self) -> Self:
        """The moments of both sets of rows together."""
        count = self.count + other.count
        if count == 0:
            return self
        shift_SC = other.mean_SC - self.mean_SC
        weight = self.count * (other.count / count)
        products_SCC = None
        if self.products_SCC is not None and other.products_SCC is not None:
            shift_SCC = weight * shift_SC[:, :, None] * shift_SC[:, None]
            products_SCC = self.products_SCC + other.products_SCC + shift_SCC
        return type(self)(
            count,
            self.mean_SC + (other.count / count) * shift_SC,
            self.squares_SC + other.squares_SC + weight * shift_SC.square(),
            products_SCC,
        )

    def std_SC(self) -> Tensor:
        """Standard deviation of the population: divided by the count, zero where there is no token."""
        return (self.squares_SC / max(self.count, 1)).sqrt()

    def covariance_SCC(self) -> Tensor:
        """Covariance of the population. Raises `ValueError` where it was not asked for."""
        if self.products_SCC is None:
            raise ValueError("these moments hold no covariance: build them with covariance=True")
        return self.products_SCC / max(self.count, 1)

    def to(self, device: torch.device | str) -> Self:
        products_SCC = None if self.products_SCC is None else self.products_SCC.to(device)
        return type(self)(self.count, self.mean_SC.to(device), self.squares_SC.to(device), products_SCC)

    def tensors(self) -> dict[str, Tensor]:
        """What `safetensors` saves; `from_tensors` is the way back."""
        tensors = {
            "count": torch.tensor(self.count),
            "mean": self.mean_SC,
            "squares": self.squares_SC,
        }
        return tensors if self.products_SCC is None else tensors | {"products": self.products_SCC}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        count = int(tensors["count"])
        return cls(count, tensors["mean"], tensors["squares"], tensors.get("products"))
