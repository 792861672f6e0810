"""More losses for the tests of core.per_example (see models.py): raw parameters and whole nets."""

from functools import partial

import torch
from torch.nn import functional as F

from core import random, tree
from core.attention import cross_attention, cross_attention_spec, self_attention, self_attention_spec
from core.layers import conv, layer_norm, linear
from nets.blocks.transformer_block import block, block_spec
from nets.language import gpt2
from tests.core.per_example.models import Draw, N, layer, model, value

# raw parameters

layer("layer scale", lambda draw: draw(4), lambda p, x: x + p * x.tanh(), 4, 4, 4)
layer("bias of channels", lambda draw: draw(4), lambda p, x: x + p[:, None, None], 4, 4, 4, 4)
layer("bias of places", lambda draw: draw(4, 1), lambda p, x: x + p, 4, 4, 3)
layer("bias of an image", lambda draw: draw(1, 4, 3), lambda p, x: p + x, 4, 4, 3)
layer("temperature", lambda draw: draw(), lambda p, x: torch.exp(p) * x, 4, 4)
layer("scalar by number", lambda draw: draw(), lambda p, x: 2.0 * p - x / (1 + p**2) + p / 3, 4, 4)
layer("reversed operators", lambda draw: draw(4).abs(), lambda p, x: (1 - p) * x + 1 / (p + 1) + 2**p - (-p) * x, 4, 4)
layer("inside where", lambda draw: draw(4), lambda p, x: torch.where(x > p, x, p * x), 4, 4, 4)
layer(
    "clamped", lambda draw: draw(4), lambda p, x: torch.maximum(x, p) + torch.minimum(p, x) * p.clamp(-0.5, 0.5), 4, 4
)
layer("softmax over a parameter", lambda draw: draw(4), lambda p, x: p.softmax(0) * x, 4, 4, 4)
layer("gate", lambda draw: draw(4), lambda p, x: torch.sigmoid(p) * x + (1 - torch.sigmoid(p)) * x.cos(), 4, 4)
layer("F.prelu", lambda draw: draw(4), lambda p, x: F.prelu(x, p), 4, 4, 3)
layer("norm of a parameter", lambda draw: draw(3, 4), lambda w, x: F.linear(x, w / w.norm(dim=1, keepdim=True)), 4, 4)
layer("flattened", lambda draw: draw(2, 2), lambda w, x: x * w.flatten() + x * w.reshape(-1).flip(0), 4, 4)
layer("view", lambda draw: draw(4), lambda w, x: x @ w.view(2, 2), 4, 3, 2)
layer("parts", lambda draw: draw(6, 4), lambda w, x: sum(x @ part.T for part in w.chunk(3)), 4, 4)
layer("rows by iteration", lambda draw: draw(3, 4), lambda w, x: sum(row * x for row in w), 4, 4)
layer("rows by index", lambda draw: draw(3, 4), lambda w, x: w[0] * x + w[-1] + w[1, 2] * x, 4, 4)
layer("stacked", lambda draw: [draw(4), draw(4)], lambda p, x: x @ torch.stack(p).T, 4, 4)
layer("concatenated", lambda draw: [draw(2, 4), draw(4, 4)], lambda p, x: F.linear(x, torch.cat(p)), 4, 3, 4)
layer("expanded", lambda draw: draw(1, 4), lambda p, x: x * p.expand(x.shape[0], 4) + p.expand(-1, 4), 4, 4)
layer("outer product", lambda draw: [draw(3), draw(4)], lambda p, x: F.linear(x, torch.outer(*p)), 4, 4)
layer("triangle", lambda draw: draw(4, 4), lambda w, x: F.linear(x, torch.tril(w)), 4, 4)
layer(
    "inverse", lambda draw: draw(4, 4), lambda w, x: F.linear(x, torch.linalg.inv(w + 4 * torch.eye(4).double())), 4, 4
)
layer("matrix exponential", lambda draw: draw(4, 4), lambda w, x: x @ torch.matrix_exp(w - w.T), 4, 4)
layer("a kernel out of a parameter", lambda draw: draw(3, 4, 3), lambda w, x: F.conv1d(x, w / 2, padding=1), 4, 4, 5)
layer(
    "a kernel standardised by batch norm",
    lambda draw: {"gain": draw(3), "weight": draw(3, 4, 3)},
    lambda p, x: F.conv1d(
        x, F.batch_norm(p["weight"].reshape(1, 3, -1), None, None, p["gain"], training=True).reshape(3, 4, 3)
    ),
    *(4, 4, 5),
)
layer("flipped kernel", lambda draw: draw(3, 4, 3), lambda w, x: F.conv1d(x, w.flip(2)), 4, 4, 5)
layer("penalty", lambda draw: draw(3), lambda p, x: x + p.square().sum() + p.abs().mean(), 4, 3)
layer("distance", lambda draw: draw(5, 4), lambda p, x: (x[:, None] - p).square().sum(-1), 4, 4)
layer("cdist", lambda draw: draw(5, 4), lambda p, x: torch.cdist(x, p), 4, 3, 4)
layer("like a parameter", lambda draw: draw(4), lambda p, x: x * p * torch.ones_like(p) + torch.zeros_like(p), 4, 4)
layer(
    "many properties", lambda draw: draw(3, 4), lambda w, x: x[:, : w.size(0)] @ w * w.numel() / len(w) * w.ndim, 4, 4
)


@model
def class_token(draw):
    params = {"out": draw.linear(4, 4), "token": draw(1, 1, 4)}

    def loss(p, x):
        x = torch.cat([p["token"].expand(x.shape[0], 1, 4), x], 1)
        return value(linear(p["out"], x.cumsum(1)))

    return params, loss, draw(N, 3, 4)


@model
def class_token_by_repeat(draw):
    def loss(p, x):
        return value(torch.cat((p.repeat(x.size(0), 1, 1), x, p[None, None].expand(len(x), -1, -1)), dim=1).cumsum(1))

    return draw(4), loss, draw(N, 4, 4)


@model
def class_token_by_sum(draw):
    return draw(4), lambda p, x: value(torch.cat([torch.zeros_like(x[:, :1]) + p, x], 1).cumsum(1)), draw(N, 4, 4)


@model
def mixture(draw):
    params = {"mean": draw(3, 2), "scale": draw(3, 2), "weight": draw(3)}

    def loss(p, x):
        z = (x[:, None] - p["mean"]) / p["scale"].exp()
        scores = -0.5 * z.square().sum(-1) - p["scale"].sum(-1) + torch.log_softmax(p["weight"], 0)
        return -torch.logsumexp(scores, 1)

    return params, loss, draw(N, 2)


@model
def weight_norm(draw):
    params = {"bias": draw(3), "g": draw(3, 1), "v": draw(3, 4)}

    def loss(p, x):
        weight = p["g"] * p["v"] / p["v"].square().sum(1, keepdim=True).sqrt()
        return value(F.linear(x, weight, p["bias"]))

    return params, loss, draw(N, 5, 4)


@model
def spectral_norm(draw):
    left = draw(3)

    def loss(w, x):
        right = F.normalize(w.T @ left, dim=0)
        return value(F.linear(x, w / torch.dot(left, w @ right)))

    return draw(3, 4), loss, draw(N, 4)


@model
def low_rank(draw):
    params = {"a": draw(2, 4), "b": draw(3, 2), "w": draw(3, 4)}
    return params, lambda p, x: value(F.linear(x, p["w"] + p["b"] @ p["a"])), draw(N, 4, 4)


@model
def hypernetwork(draw):
    params = {"code": draw(1, 4), "net": draw.linear(4, 12)}
    return params, lambda p, x: value(F.linear(x, linear(p["net"], p["code"]).reshape(3, 4))), draw(N, 4)


@model
def hypernetwork_of_the_example(draw):
    params = {"net": draw.linear(4, 12)}
    return params, lambda p, x: value(torch.bmm(linear(p["net"], x).reshape(-1, 3, 4), x[:, :, None])), draw(N, 4)


@model
def half_inside(draw):
    """Parameters in float32, cast in the loss; here to float64, so that the comparison stays exact."""
    params = tree.cast({"out": draw.linear(4, 3), "scale": draw(4), "table": draw(5, 4)}, torch.float32)

    def loss(p, batch):
        p = tree.cast(p, torch.float64)
        return value(linear(p["out"], F.embedding(batch["ids"], p["table"]) * p["scale"] + batch["x"]))

    return params, loss, {"ids": draw.ids(5, N), "x": draw(N, 4)}


@model
def odd_tree(draw):
    params = {"2": (draw.linear(4, 4), [draw(4), {"10": draw(4, 4)}]), "1": {}, "a": draw()}

    def loss(p, batch):
        (x,), y = batch
        first, (scale, last) = p["2"]
        return value(linear(first, x) * scale @ last["10"] * p["a"]) + y["1"]["w"]

    return params, loss, ([draw(N, 4)], {"1": {"w": draw(N)}})


# nets


def recurrent(draw, gates, cell):
    params = {"h": draw.linear(4, gates * 4), "x": draw.linear(3, gates * 4)}

    def loss(p, x):
        state = (torch.zeros(x.shape[0], 4, dtype=x.dtype),) * 2
        for t in range(x.shape[1]):
            state = cell(linear(p["x"], x[:, t]), linear(p["h"], state[0]), state)
        return value(state[0])

    return params, loss, draw(N, 4, 3)


def rnn(x, h, state):
    return (torch.tanh(x + h),) * 2


def gru(x, h, state):
    (r, z, n), (a, b, c) = x.chunk(3, 1), h.chunk(3, 1)
    z = torch.sigmoid(z + b)
    return ((1 - z) * torch.tanh(n + torch.sigmoid(r + a) * c) + z * state[0],) * 2


def lstm(x, h, state):
    i, f, g, o = (x + h).chunk(4, 1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


for gates, cell in ((1, rnn), (3, gru), (4, lstm)):
    model(partial(recurrent, gates=gates, cell=cell), cell.__name__)


@model
def recurrent_from_a_learned_state(draw):
    params = {"h": draw.linear(4, 4), "start": draw(4), "x": draw.linear(3, 4)}

    def loss(p, x):
        h = p["start"]
        for t in range(3):
            h = torch.tanh(linear(p["x"], x[:, t]) + linear(p["h"], h))
        return value(h)

    return params, loss, draw(N, 3, 3)


def initial(draw: Draw, of) -> dict:
    return tree.map(lambda leaf: draw(*leaf.shape), of)


@model
def attention(draw):
    params = {"attn": initial(draw, self_attention_spec(4, 2)), "cross": initial(draw, cross_attention_spec(4, 2))}

    def loss(p, batch):
        x = self_attention(p["attn"], batch["x"], 2, causal=True)
        return value(cross_attention(p["cross"], x, batch["memory"], 2))

    return params, loss, {"memory": draw(N, 3, 4), "x": draw(N, 4, 4)}


@model
def learned_queries(draw):
    """The queries have no batch axis until they meet the memory."""
    params = {"attn": initial(draw, cross_attention_spec(4, 2)), "queries": draw(3, 4)}

    def loss(p, memory):
        return value(cross_attention(p["attn"], p["queries"].expand(memory.shape[0], 3, 4), memory, 2))

    return params, loss, draw(N, 4, 4)


@model
def learned_keys(draw):
    """Attention to slots that are parameters, by matmul."""
    params = {"k": draw(5, 4), "q": draw.linear(4, 4), "v": draw(5, 4)}
    return params, lambda p, x: value((linear(p["q"], x) @ p["k"].T).softmax(-1) @ p["v"]), draw(N, 4, 4)


@model
def vision_transformer(draw):
    params = {
        "block": initial(draw, block_spec(4, 2, 8)),
        "patches": {"bias": draw(4), "weight": draw(4, 3, 2, 2)},
        "positions": draw(5, 4),
        "token": draw(4),
    }

    def loss(p, x):
        x = conv(p["patches"], x, stride=2).flatten(2).transpose(1, 2)
        x = torch.cat([p["token"].expand(x.shape[0], 1, 4), x], 1) + p["positions"]
        return value(block(p["block"], x, 2)[:, 0])

    return params, loss, draw(N, 3, 4, 4)


@model
def residual_mix(draw):
    params = {"alpha": draw(3), "layers": [draw.linear(4, 4) for _ in range(3)], "norm": {"weight": draw(4)}}

    def loss(p, x):
        for i, part in enumerate(p["layers"]):
            x = x * p["alpha"][i] + (1 - p["alpha"][i]) * torch.tanh(linear(part, layer_norm(p["norm"], x)))
        return value(x)

    return params, loss, draw(N, 4)


@model
def gpt2_with_dropout(draw):
    cfg = gpt2.Config(vocabulary=11, context=6, layers=1, heads=2, width=4, dropout=0.2)

    def loss(p, batch):
        scores = gpt2.apply(p, batch["ids"][:, :-1], cfg, key=batch["key"], train=True)
        return F.cross_entropy(scores.transpose(1, 2), batch["ids"][:, 1:], reduction="none").mean(1)

    batch = {"ids": draw.ids(11, N, 5), "key": random.split(random.key(1), N)}
    return initial(draw, gpt2.spec(cfg)), loss, batch
