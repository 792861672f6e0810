"""Where the heads of an encoder look: their attention weights, as figures and as pictures."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from core import tree
from core.attention import attention, queries_keys_values
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Encoder
from experiments.parts.filling import piece
from experiments.parts.translator import draw_maps
from train import plots

SHOWN = 4
"""Layers and heads that `draw_first` shows."""


@torch.no_grad()
def attention_maps(net: Encoder, tokens: Tensor) -> Tensor:
    """Attention weights (batch, layers, heads, time, time) of an encoder; each row sums to 1."""
    mask, maps = tokens != net.cfg.padding_id, []
    states = net.net.hidden_states(net.params, tokens, net.cfg, mask=mask)
    for p, x in zip(net.params["blocks"], states, strict=False):
        q, k, _ = queries_keys_values(p["attn"], x, net.cfg.heads)
        each = torch.eye(tokens.shape[1], dtype=x.dtype, device=x.device).expand(*k.shape[:2], -1, -1)
        maps.append(attention(q, k, each, mask=mask[:, None, None, :], method="explicit"))  # weights times 1
    return torch.stack(maps, 1)


def maps_of_text(net: Encoder, text: str) -> tuple[Tensor, list[str]]:
    """(Attention weights (layers, heads, time, time) of a text, its tokens). Raises ValueError: it is no Unicode text,
    or longer than the net's context."""
    text.encode()  # of a lone surrogate
    (encoding,) = encoders.encodings(net, [text], net.cfg.context + 1)
    if len(encoding.ids) > net.cfg.context:
        raise ValueError(f"the text has more than the {net.cfg.context} tokens that the net sees")
    tokens = torch.tensor([encoding.ids], device=tree.leaves(net.params)[0].device)
    return attention_maps(net, tokens)[0].cpu(), [piece(net.tokenizer, token).strip() for token in encoding.ids]


def typical(weights: Tensor) -> dict[str, tuple[int, int, float]]:
    """{what: (layer, head, share)}: the head with the largest mean share of weight on each token's previous one, next
    one, itself, and on the first and the last token.

    Args:
        weights: (layers, heads, time, time).
    """
    means = {"itself": weights.diagonal(0, 2, 3), "first token": weights[..., 0], "last token": weights[..., -1]}
    if weights.shape[-1] > 1:
        beside = {"previous token": weights.diagonal(-1, 2, 3), "next token": weights.diagonal(1, 2, 3)}
        means = beside | means
    out = {}
    for what, values in means.items():
        shares = values.float().mean(-1)  # (layers, heads)
        layer, head = divmod(int(shares.argmax()), shares.shape[1])
        out[what] = (layer, head, float(shares.max()))
    return out


def places(names: Sequence[str], layers: int, heads: int) -> list[tuple[int, int]]:
    """(layer, head), counted from 0, of names such as "2.11", counted from 1. Raises ValueError: there is no such."""
    out = []
    for name in names:
        parts = name.split(".")
        numbers = [int(part) - 1 if part.isascii() and part.isdecimal() else -1 for part in parts]
        if len(numbers) != 2 or not (0 <= numbers[0] < layers and 0 <= numbers[1] < heads):
            expected = f"LAYER.HEAD, up to {layers}.{heads}"
            raise ValueError(f"there is no head '{name}'; expected {expected}")
        out.append((numbers[0], numbers[1]))
    return out


def draw_heads(path: Path, weights: Tensor, names: Sequence[str], titles: dict[tuple[int, int], str]) -> None:
    """Panels of single heads: {(layer, head): what stands above it}; weights (layers, heads, time, time)."""
    columns = min(3, len(titles))
    side = 1.4 + 0.2 * len(names)
    with plots.panels(path, -(-len(titles) // columns), columns, width=side + 0.6, height=side) as axes:
        for panel, ((layer, head), title) in zip(axes, titles.items(), strict=False):
            plots.matrix(panel, weights[layer, head], names, names, title=title, numbers=False)
        for panel in axes[len(titles) :]:
            panel.set_axis_off()


def draw_first(path: Path, net: Encoder, tokens: Tensor) -> None:
    """The first layers and heads on one text (time,)."""
    weights = attention_maps(net, tokens[None].to(tree.leaves(net.params)[0].device))[:, :SHOWN, :SHOWN].cpu()
    names = [piece(net.tokenizer, token).strip() for token in tokens.tolist()]
    draw_maps(path, weights, names, names)
