"""The Transformer in 100 lines, with torch and nothing else: the same numbers as `nets.language.transformer`.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762); sections and equations are its. n sentences of s
source and t target tokens, w numbers per token. The full one has dropout, caches, beams and checks too.

    params = spec.init(key, nets.language.transformer.spec(cfg))
    logits = transformer(params, source, target, heads=4)  # source, target: integers, 0 is padding
"""

import math

import torch

PADDING, START = 0, 1


def linear(p, x):
    """y = W x + b."""
    return x @ p["weight"].T + p.get("bias", 0.0)


def layer_norm(p, x):
    """(x - mean) / sqrt(variance + 1e-5) * weight + bias, over the w numbers of a token."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * p["weight"] + p["bias"]


def attention(q, k, v, allowed):
    """softmax(q kᵀ / sqrt(d)) v, equation 1 (section 3.2); `allowed` says which keys a query may see."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (n, heads, queries, keys)
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v  # (n, heads, queries, d)


def split(x, heads):
    """(n, time, w) -> (n, heads, time, w / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x):
    """(n, heads, time, d) -> (n, time, w)."""
    return x.transpose(1, 2).flatten(2)


def self_attention(p, x, heads, allowed):
    """Queries, keys and values from one sequence, in every head of its own matrices (section 3.2.2)."""
    q, k, v = (split(part, heads) for part in linear(p["qkv"], x).chunk(3, -1))
    return linear(p["proj"], join(attention(q, k, v, allowed)))


def cross_attention(p, x, memory, heads, allowed):
    """Queries from the target, keys and values from the source."""
    k, v = (split(part, heads) for part in linear(p["kv"], memory).chunk(2, -1))
    return linear(p["proj"], join(attention(split(linear(p["q"], x), heads), k, v, allowed)))


def mlp(p, x):
    """max(0, x W_1 + b_1) W_2 + b_2 at every position, equation 2 (section 3.3)."""
    return linear(p["down"], linear(p["up"], x).relu())


def positions(time, width):
    """sin and cos of position / 10000^(2i / w), alternating: (time, w) (section 3.5)."""
    angles = torch.arange(time)[:, None] * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def embed(params, ids):
    """sqrt(w) tokens[ids] + positions: (n, time) -> (n, time, w) (sections 3.4 and 3.5)."""
    table = params["tokens"]["weight"]  # one for source, target and output layer (section 3.4)
    return math.sqrt(table.shape[1]) * table[ids] + positions(ids.shape[1], table.shape[1]).to(table.dtype)


def encode(params, source, heads):
    """(n, s) -> memory (n, s, w); every sub-layer is norm(x + f(x)) (section 3.1)."""
    x, real = embed(params, source), (source != PADDING)[:, None, None, :]
    for p in params["encoder"]["blocks"]:
        x = layer_norm(p["norm1"], x + self_attention(p["attn"], x, heads, real))
        x = layer_norm(p["norm2"], x + mlp(p["mlp"], x))
    return x


def transformer(params, source, target, heads):
    """Logits of the token after each of the target: (n, s), (n, t) -> (n, t, vocabulary)."""
    memory, real = encode(params, source, heads), (source != PADDING)[:, None, None, :]
    x = embed(params, target)
    past = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).tril()  # a token sees none after itself
    for p in params["decoder"]["blocks"]:
        x = layer_norm(p["norm1"], x + self_attention(p["attn"], x, heads, past))
        x = layer_norm(p["norm_cross"], x + cross_attention(p["cross"], x, memory, heads, real))
        x = layer_norm(p["norm2"], x + mlp(p["mlp"], x))
    return x @ params["tokens"]["weight"].T


def translate(params, source, heads, steps):
    """The most likely next token, `steps` times, after a start token: (n, s) -> (n, 1 + steps)."""
    target = torch.full((len(source), 1), START)
    for _ in range(steps):
        best = transformer(params, source, target, heads)[:, -1].argmax(-1, keepdim=True)
        target = torch.cat([target, best], 1)
    return target
