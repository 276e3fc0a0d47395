"""The cosine as a loss, without the normalised copies of both maps that
`torch.nn.functional.cosine_similarity` makes and keeps for the gradient."""

import torch
from torch import Tensor


def cosine_similarity(a: Tensor, b: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """<a, b> / (‖a‖ ‖b‖) along `dim`, each norm bounded from below by `eps`, as in PyTorch."""
    norm_a, norm_b = (torch.linalg.vector_norm(one, dim=dim).clamp_min(eps) for one in (a, b))
    return (a * b).sum(dim) / (norm_a * norm_b)
