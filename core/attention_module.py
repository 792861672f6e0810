"""torch's nn.MultiheadAttention written out, for modules that `core.lift` runs per example or with a key.

Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Has the attributes and parameters of the nn.MultiheadAttention that it replaces, and computes as it does, by
    functions that have rules: torch's own is one function, which hides its dropout and its linear maps."""

    num_heads: int
    batch_first: bool
    dropout: float
    out_proj: nn.Module
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    add_zero_attn: bool
    in_proj_weight: Any
    in_proj_bias: Any
    bias_k: Any
    bias_v: Any

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `nn.MultiheadAttention`, with its arguments: (output, weights or None)."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        unbatched = query.ndim == 2
        if unbatched:
            query, key, value = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._projected(query, key, value)  # (batch, time, width), or (time, batch, width)
        if not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        mask = _added(key_padding_mask, attn_mask, len(q), self.num_heads, q.dtype)  # added to the scores
        extra = 0
        if self.bias_k is not None:
            k, v = (torch.cat([x, b + torch.zeros_like(x[:, :1])], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
            extra += 1
        if self.add_zero_attn:
            k, v = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (k, v))
            extra += 1
        mask = None if mask is None else F.pad(mask, (0, extra))
        q, k, v = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v)
        )  # (batch, heads, time, depth)
        scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)  # (batch, heads, queries, keys)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        out = (weights @ v).transpose(1, 2).flatten(2)  # (batch, queries, width)
        out = self.out_proj(out if self.batch_first else out.transpose(0, 1))
        seen = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        if unbatched:
            out, seen = out.squeeze(0 if self.batch_first else 1), None if seen is None else seen.squeeze(0)
        return out, seen

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None and query is key and key is value:
            return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        packed = self.in_proj_weight is not None
        weights: Any = (
            self.in_proj_weight.chunk(3) if packed else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]


def _added(padding: Tensor | None, mask: Tensor | None, batch: int, heads: int, dtype: torch.dtype) -> Tensor | None:
    """Both masks of nn.MultiheadAttention as numbers that are added to the scores, (batch or 1, heads or 1, queries or
    1, keys)."""
    parts = []
    if padding is not None:
        parts.append(_as_numbers(padding, dtype)[:, None, None])
    if mask is not None:
        mask = _as_numbers(mask, dtype)
        parts.append(mask if mask.ndim == 2 else mask.unflatten(0, (batch, heads)))
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
