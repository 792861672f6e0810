"""Attention weights of `nets.language.t5`, to look at."""

from functools import partial

import torch
from torch import Tensor

from core.attention import causal_mask, cross_attention
from core.layers import embedding
from nets.blocks.transformer_block import identity
from nets.language.t5 import Config, _check, _feedforward, _norm, _over_queries, _position_bias


def attention_maps(params: dict, x: tuple[Tensor, Tensor], cfg: Config) -> dict[str, Tensor]:
    """Attention weights of `encoder`, `decoder` and `cross`, each (batch, layers, heads, queries, keys).

    x: as in `t5.apply`. Each row sums to 1; the rows of padding have no meaning.
    """
    source, target = x
    _check("source", source)
    _check("target", target)
    maps: dict[str, list[Tensor]] = {"encoder": [], "decoder": [], "cross": []}

    def record(weights: Tensor, name: str) -> Tensor:
        maps[name].append(weights)
        return weights

    # Dropout of the weights is a function of them: one that records takes its place.
    options = {name: {"drop": partial(record, name=name), "scale": 1.0} for name in maps}
    options["encoder"]["mask"] = options["cross"]["mask"] = _over_queries(source != cfg.padding_id)
    options["decoder"]["mask"] = causal_mask(target.shape[1], device=target.device)
    memory = None
    for side, tokens in (("encoder", source), ("decoder", target)):
        p, positions = params[side], torch.arange(tokens.shape[1], device=tokens.device)
        bias = _position_bias(p, positions, len(positions), cfg, both=side == "encoder")  # (heads, time, time)
        x = embedding(params["tokens"], tokens)  # (batch, time, width)
        for one in p["blocks"]:
            y = _norm(one["norm1"], x, cfg)
            x = x + cross_attention(one["attn"], y, y, cfg.heads, bias=bias, **options[side])
            if "cross" in one:
                y = _norm(one["norm_cross"], x, cfg)
                x = x + cross_attention(one["cross"], y, memory, cfg.heads, **options["cross"])
            x = x + _feedforward(one["mlp"], _norm(one["norm2"], x, cfg), cfg, identity)
        memory = _norm(p["norm"], x, cfg)
    return {name: torch.stack(weights, 1) for name, weights in maps.items()}  # (batch, layers, heads, queries, keys)
