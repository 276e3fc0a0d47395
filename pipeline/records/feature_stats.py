"""Running moments of features, per level and channel: computed for each shard and merged later.

Shapes: R rows, S levels, H×W grid, C channels. All sums are centred (Chan, Golub & LeVeque 1983), so a large
mean costs no digits; sums within a few rows are float32, exact to 1e-7, all others float64. Merging is
associative and commutative up to rounding, near 1e-15; merge in shard order for bitwise repeatable results.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_ROWS_AT_ONCE = 8
_TOKENS_OF_CENTRE = 64  # whose mean all are summed about; a second pass over all would gain no digit


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
        """The moments of these rows, on their device."""
        _, levels, _, _, width = features_RSHWC.shape
        moments = cls.empty(levels, width, covariance).to(features_RSHWC.device)
        at_once = 1 if features_RSHWC.device.type == "cpu" else _ROWS_AT_ONCE  # one fits a CPU's cache
        for rows_RSHWC in features_RSHWC.split(at_once):
            tokens_SNC = rows_RSHWC.transpose(0, 1).flatten(1, 3).float()
            moments = moments.merge(cls._of_tokens(tokens_SNC, covariance))
        return moments

    @classmethod
    def _of_tokens(cls, tokens_SNC: Tensor, covariance: bool) -> Self:
        count = tokens_SNC.shape[1]
        about_SC = tokens_SNC[:, :: max(1, count // _TOKENS_OF_CENTRE)].mean(1)
        centred_SNC = tokens_SNC - about_SC[:, None]
        products_SCC = None
        shift_SC = centred_SNC.sum(1).double() / count  # what is left of the mean
        if covariance:
            exact_SNC = centred_SNC.double() - shift_SC[:, None]
            products_SCC = exact_SNC.mT @ exact_SNC
        squares_SC = centred_SNC.square_().sum(1).double() - count * shift_SC.square()
        return cls(count, about_SC.double() + shift_SC, squares_SC, products_SCC)

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
        """Covariance of the population. Raises `ValueError` if it was not requested."""
        if self.products_SCC is None:
            raise ValueError("these moments hold no covariance: build them with covariance=True")
        return self.products_SCC / max(self.count, 1)

    def to(self, device: torch.device | str) -> Self:
        products_SCC = None if self.products_SCC is None else self.products_SCC.to(device)
        return type(self)(self.count, self.mean_SC.to(device), self.squares_SC.to(device), products_SCC)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors for `safetensors` to save; `from_tensors` is the inverse."""
        tensors = {"count": torch.tensor(self.count), "mean": self.mean_SC, "squares": self.squares_SC}
        return tensors if self.products_SCC is None else tensors | {"products": self.products_SCC}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Raises `ValueError` for tensors that are not moments."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        mean_shape = shapes.get("mean", ())
        expected = {"count": (), "mean": mean_shape, "squares": mean_shape}
        expected |= {"products": (*mean_shape, *mean_shape[1:])} if "products" in tensors else {}
        if len(mean_shape) != 2 or shapes != expected:
            raise ValueError(f"tensors of shapes {shapes} are not moments of levels and channels")
        dtypes = {name: torch.int64 if name == "count" else torch.float64 for name in tensors}
        if {name: tensor.dtype for name, tensor in tensors.items()} != dtypes:
            raise ValueError("moments are float64, and their count is an int64")
        return cls(int(tensors["count"]), tensors["mean"], tensors["squares"], tensors.get("products"))
