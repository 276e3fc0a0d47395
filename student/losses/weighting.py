"""How much each teacher counts in a step, where that follows from their losses (KPU, Figure 4).

T  teachers      B  images of one input: each of its teachers has a loss of each of them
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from teachercache.pipeline.crops import uniforms
from teachercache.pipeline.loading.loader import Batch

Losses = Mapping[str, Tensor]  # of the teachers of one input, (B,) each
Mean = Callable[[Tensor], Tensor]
_LEAST = 1e-8


class Weighting:
    """All teachers count alike. Others weigh the losses as they say."""

    def __call__(self, inputs: Sequence[Losses], batches: Sequence[Batch]) -> Tensor:
        """The weighted mean over the teachers of all inputs of their losses; a scalar with a gradient."""
        return torch.stack([loss_B.mean() for losses in inputs for loss_B in losses.values()]).mean()

    def weights(self) -> Mapping[str, Tensor]:
        """What a log shows of it, by teacher."""
        return {}


class Famo(Weighting):
    """FAMO (Liu et al. 2023, "FAMO: Fast Adaptive Multitask Optimization"): all log-losses fall alike.

    With z = softmax(ξ), a step's gradient is Σ c z_t / ℓ_t ∇ℓ_t, where c makes the factors add up to 1; then
    ξ ← ξ - `lr` · (Jᵀ δ + `decay` · ξ), J the Jacobian of z and δ_t how far that step brought log ℓ_t down on
    its own batch. (The authors' code hands this gradient to Adam; the paper does not.) `mean`: over the
    processes, whose ξ so stay equal to the bit.
    """

    def __init__(
        self, teachers: Sequence[str], lr: float, decay: float, mean: Mean = lambda local: local
    ) -> None:
        self._teachers, self._lr, self._decay, self._mean = list(teachers), lr, decay, mean
        self._xi_T = torch.zeros(len(teachers), dtype=torch.float64)
        self._before_T = torch.ones_like(self._xi_T)

    def __call__(self, inputs: Sequence[Losses], batches: Sequence[Batch]) -> Tensor:
        losses_T = self._means(inputs)
        self._xi_T = self._xi_T.to(losses_T.device)
        self._before_T = self._whole(losses_T)
        factors_T = self._xi_T.softmax(0) / self._before_T
        return ((factors_T / factors_T.sum()).to(losses_T) * losses_T).sum()

    def update(self, inputs: Sequence[Losses]) -> None:
        """Move ξ by the losses that the batches of the last call have after the step."""
        delta_T = self._before_T.log() - self._whole(self._means(inputs)).log()
        z_T = self._xi_T.softmax(0)
        gradient_T = z_T * (delta_T - (z_T * delta_T).sum())
        self._xi_T = self._xi_T - self._lr * (gradient_T + self._decay * self._xi_T)

    def weights(self) -> dict[str, Tensor]:
        """z."""
        return dict(zip(self._teachers, self._xi_T.softmax(0), strict=True))

    def state(self) -> dict[str, float]:
        return dict(zip(self._teachers, self._xi_T.tolist(), strict=True))

    def load(self, state: Mapping[str, float]) -> None:
        self._xi_T = torch.tensor([state[name] for name in self._teachers], dtype=torch.float64)

    def _means(self, inputs: Sequence[Losses]) -> Tensor:
        means = {name: loss_B.mean() for losses in inputs for name, loss_B in losses.items()}
        return torch.stack([means[name] for name in self._teachers])

    def _whole(self, losses_T: Tensor) -> Tensor:
        return self._mean(losses_T.detach()).double().clamp(min=_LEAST)


class TeacherDrop(Weighting):
    """Teacher dropping (Sariyildiz et al. 2024, "UNIC"): of each image the teacher with the largest loss
    counts, and each other one with 1 - `probability`; what counts of an input has equal weight, as in the
    authors' code.

    Drawn by (`seed`, sample, step). `mean`: over the processes, so that all divide by the same number.
    """

    def __init__(self, probability: float, seed: int, mean: Mean = lambda local: local) -> None:
        self._probability, self._seed, self._mean = probability, seed, mean

    def __call__(self, inputs: Sequence[Losses], batches: Sequence[Batch]) -> Tensor:
        means = []
        for losses, batch in zip(inputs, batches, strict=True):
            losses_TB = torch.stack(list(losses.values()))
            keeps_TB = self._keeps(losses_TB.detach(), batch)
            mean = (keeps_TB * losses_TB).sum() / self._mean(keeps_TB.sum())
            means.append(len(losses) * mean)
        return torch.stack(means).sum() / sum(map(len, inputs))

    def _keeps(self, losses_TB: Tensor, batch: Batch) -> Tensor:
        keys = [f"drop/{key}" for key in batch.sample_keys]
        drawn_BT = uniforms(self._seed, keys, np.array([batch.step]), draws=len(losses_TB))[:, 0]
        keeps_TB = torch.from_numpy(self._probability <= drawn_BT.T).to(losses_TB)
        return keeps_TB.scatter(0, losses_TB.argmax(0, keepdim=True), 1)
