"""Features to measure codecs and grids on: four synthetic kinds, a random ViT on photographs, a cache.

Shapes: R rows, S levels, H×W grid, C channels. Each signal gives a calibration sample and other rows.
"""

from __future__ import annotations

import numpy as np
import timm
import torch
from skimage import data
from skimage.transform import resize
from torch import Tensor

from teachercache.pipeline.records.strict import Size

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")


def white(rows: int, levels: int, grid: Size, width: int, seed: int) -> Tensor:
    """Independent Gaussian values: nothing to exploit, and Shannon's bound is known."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, levels, *grid, width, generator=generator)


def heavy_tailed(rows: int, levels: int, grid: Size, width: int, seed: int) -> Tensor:
    """Student-t values of 4 degrees of freedom, 1% of the tokens 10 and 8 channels 100 times larger."""
    generator = torch.Generator().manual_seed(seed)
    normal, *squares = torch.randn(5, rows, levels, *grid, width, generator=generator).unbind(0)
    chi_square = torch.stack([square.square() for square in squares]).mean(0)
    loud_tokens = torch.rand(rows, levels, *grid, 1, generator=generator) < 0.01
    x = normal / chi_square.sqrt() * torch.where(loud_tokens, 10, 1)
    x[..., :: width // 8] *= 100
    return x


def massive(rows: int, levels: int, grid: Size, width: int, seed: int, k: float = 200.0) -> Tensor:
    """White, but 2% of the tokens hold +k and −0.7 k in two channels, as those of CLIP-L and DINOv2-L do."""
    x = white(rows, levels, grid, width, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    is_massive = torch.rand(rows, levels, *grid, generator=generator) < 0.02
    x[..., width // 3] += k * is_massive
    x[..., width // 2] -= 0.7 * k * is_massive
    return x


def correlated(
    rows: int, levels: int, grid: Size, width: int, seed: int, between_levels: float = 0.0
) -> Tensor:
    """Fields over the grid with the 1/f amplitude of natural images, mixed across channels.

    `between_levels`: the correlation of each level with the next, .18 to .36 in a trained ViT-S.
    """
    noise = white(rows, levels, grid, width, seed)
    for level in range(1, levels):
        noise[:, level] *= (1 - between_levels**2) ** 0.5
        noise[:, level] += between_levels * noise[:, level - 1]
    frequencies = (torch.fft.fftfreq(size) for size in grid)
    radius = torch.hypot(*torch.meshgrid(*frequencies, indexing="ij")).clamp(min=1 / max(grid))
    fields: Tensor = torch.fft.ifft2(torch.fft.fft2(noise, dim=(2, 3)) / radius[..., None], dim=(2, 3)).real
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(1)) / width**0.5
    mixed: Tensor = fields @ mixing
    return mixed


@torch.inference_mode()
def photographs(rows: int, grid: Size, seed: int, model: str = "vit_base_patch16_384") -> Tensor:
    """Four levels of a ViT with random weights on random crops of the photographs of scikit-image.

    Random blocks change a token little, so the levels are more alike than those of a trained teacher.
    """
    size = 16 * grid[0], 16 * grid[1]
    torch.manual_seed(0)
    vit = timm.create_model(model, pretrained=False, img_size=size).eval()
    quarter = len(vit.blocks) // 4
    levels = vit.forward_intermediates(
        (crops(rows, size, seed) - 0.5) / 0.25,
        indices=[quarter * k - 1 for k in (1, 2, 3, 4)],
        intermediates_only=True,
    )
    return torch.stack(levels, 1).permute(0, 1, 3, 4, 2).float().contiguous().clone()


def crops(count: int, size: Size, seed: int) -> Tensor:
    """Random squares of photographs, resized: (count, 3, height, width), 0 to 1."""
    generator = np.random.default_rng(seed)
    crops = []
    for i in range(count):
        photograph = getattr(data, PHOTOGRAPHS[i % len(PHOTOGRAPHS)])()
        side = int(generator.integers(min(photograph.shape[:2]) // 3, min(photograph.shape[:2])))
        top, left = (int(generator.integers(0, length - side + 1)) for length in photograph.shape[:2])
        crops.append(resize(photograph[top : top + side, left : left + side], size, anti_aliasing=True))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float()


def of_cache(path: str, teacher: str | None, rows: int, seed: int) -> dict[str, Tensor]:
    """Rows drawn from a cache, by teacher."""
    from teachercache.pipeline.cache import FeatureCache

    cache = FeatureCache.open(path)
    order = np.random.default_rng(seed).permutation(cache.num_rows)[:rows]
    names = [teacher] if teacher else cache.teachers
    return {name: encoded.decode() for name, encoded in cache.read(np.sort(order), names).items()}
