"""Rotary position embeddings: queries and keys turned by their positions, so that scores depend on distances.

Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv:2104.09864), eq. 34. Pairs of
dimensions (i, i + depth / 2) are turned, as in GPT-NeoX and transformers' files; the paper and Meta's own files pair
neighbours, (2i, 2i + 1).
"""

import math

import torch
from torch import Tensor


def frequencies(depth: int, theta: float = 10000.0) -> list[float]:
    """Angle per position of each pair i of dimensions: theta^(-2i / depth), depth / 2 numbers."""
    if depth < 2 or depth % 2:
        raise ValueError(f"rotary: a head of {depth} dimensions does not divide into pairs")
    return [theta ** (-2 * i / depth) for i in range(depth // 2)]


def stretched(rates: list[float], factor: float, low: float, high: float, context: int) -> list[float]:
    """Llama 3.1's frequencies for a longer context: slow ones are divided by `factor`, fast ones stay.

    With n = context * rate / 2π turns of a pair over the original context, the rate stays where n > high, is divided
    where n < low, and is between the two linearly in n otherwise. Dubey et al. 2024, "The Llama 3 Herd of Models".

    Args:
        rates: from `frequencies`.
        context: number of positions of the original training.
    """

    def stretch(rate: float) -> float:
        share = min(max((context * rate / (2 * math.pi) - low) / (high - low), 0.0), 1.0)
        return rate * (share + (1 - share) / factor)

    return [stretch(rate) for rate in rates]


def rotation(positions: Tensor, rates: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions (...) times the rates, each (..., depth / 2)."""
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    per_position = torch.tensor(rates, dtype=wide, device=positions.device)  # (depth / 2,)
    angles = positions[..., None].to(wide) * per_position  # (..., depth / 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., depth) with each pair (x_i, x_(i + depth / 2)) turned; cos and sin broadcast to (..., depth / 2)."""
    a, b = x.chunk(2, -1)  # each (..., depth / 2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)  # (..., depth)
