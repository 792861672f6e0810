"""GPT-2 in 60 lines, with torch and nothing else: the same numbers as `nets.language.gpt2`.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". n texts of t tokens, w numbers per token.
The full one has dropout, a cache and checks too.

    params, cfg = nets.language.gpt2.from_pretrained("openai-community/gpt2")
    tokens = generate(params, torch.tensor([[464, 3290]]), heads=12, steps=20)
"""

import math

import torch


def linear(p, x):
    """y = W x + b."""
    return x @ p["weight"].T + p.get("bias", 0.0)


def layer_norm(p, x):
    """(x - mean) / sqrt(variance + 1e-5) * weight + bias, over the w numbers of a token."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * p["weight"] + p.get("bias", 0.0)


def gelu(x):
    """x Φ(x), with Φ approximated by tanh (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(p, x, heads):
    """softmax(q kᵀ / sqrt(d)) v in each head, d = w / heads: (n, t, w) -> (n, t, w)."""
    q, k, v = linear(p["qkv"], x).chunk(3, -1)  # each (n, t, w)
    q, k, v = (a.unflatten(-1, (heads, -1)).transpose(1, 2) for a in (q, k, v))  # each (n, heads, t, w / heads)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (n, heads, t, t)
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)  # a token sees none after itself
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return linear(p["proj"], (weights @ v).transpose(1, 2).flatten(2))  # (n, t, w)


def mlp(p, x):
    """w -> 4 w -> w numbers per token."""
    return linear(p["down"], gelu(linear(p["up"], x)))


def gpt2(params, tokens, heads):
    """Logits of the next token at every position: tokens (n, t) -> (n, t, vocabulary)."""
    x = params["tokens"]["weight"][tokens] + params["positions"]["weight"][: tokens.shape[1]]  # (n, t, w)
    for p in params["blocks"]:
        x = x + attention(p["attn"], layer_norm(p["norm1"], x), heads)
        x = x + mlp(p["mlp"], layer_norm(p["norm2"], x))
    return layer_norm(params["norm"], x) @ params["tokens"]["weight"].T


def generate(params, tokens, heads, steps):
    """The most likely next token, `steps` times: (n, t) -> (n, t + steps)."""
    for _ in range(steps):
        best = gpt2(params, tokens, heads)[:, -1].argmax(-1, keepdim=True)  # (n, 1)
        tokens = torch.cat([tokens, best], 1)
    return tokens
