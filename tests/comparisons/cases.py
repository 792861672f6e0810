"""Small models in float64 on which tools for per-example gradients are compared: each as a module and as a function.

A case has a module, a `function(params, x)` of the same parameters by the module's own dotted names, and a batch
of 5 examples. Either maps x (batch, ...) to logits (batch, classes); the loss per example is its cross-entropy. Modules
create their layers in the order of their use, which is where some tools begin and end.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import random, tree
from core.attention import attention
from core.layers import conv, embedding, group_norm, layer_norm, linear, rms_norm

BATCH, TIME, WIDTH, CLASSES, IDS = 5, 6, 4, 3, 7


class Case(NamedTuple):
    name: str
    module: nn.Module
    function: Callable
    x: Tensor
    labels: Tensor

    @property
    def params(self) -> dict:
        return tree.nest({name: p.detach().clone() for name, p in self.module.named_parameters()})

    def losses(self, params: dict, batch: tuple[Tensor, Tensor]) -> Tensor:
        """(batch,)"""
        x, labels = batch
        return F.cross_entropy(self.function(params, x), labels, reduction="none")


def head(d_in: int = WIDTH) -> nn.Linear:
    return nn.Linear(d_in, CLASSES)


class Net(nn.Module):
    """Layers and parameters from `parts`; `function` is `forward` as a function of the tree of parameters."""

    integers = False  # whether x is

    def __init__(self):
        super().__init__()
        for name, part in self.parts().items():
            setattr(self, name, part)


class Perceptron(Net):
    def parts(self):
        return {"first": nn.Linear(6, WIDTH), "out": head()}

    def forward(self, x):
        return self.out(torch.tanh(self.first(x)))

    @staticmethod
    def function(p, x):
        return linear(p["out"], torch.tanh(linear(p["first"], x)))


class Convolution(Net):
    options = {"stride": 2, "padding": 1}

    def parts(self):
        first = nn.Conv2d(4, 4, 3, **self.options)
        return {"first": first, "out": head(first(torch.zeros(1, 4, 5, 5)).numel())}

    def forward(self, x):
        return self.out(torch.tanh(self.first(x)).flatten(1))

    @classmethod
    def function(cls, p, x):
        return linear(p["out"], torch.tanh(conv(p["first"], x, **cls.options)).flatten(1))


class Grouped(Convolution):
    options = {"padding": 1, "groups": 2}


class Depthwise(Convolution):
    options = {"padding": 1, "groups": 4}


class Circular(Convolution):
    options = {"padding": 1, "padding_mode": "circular"}


class LayerNorm(Net):
    def parts(self):
        return {"first": nn.Linear(6, WIDTH), "norm": nn.LayerNorm(WIDTH), "out": head()}

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.first(x))).mean(1))

    @staticmethod
    def function(p, x):
        return linear(p["out"], torch.tanh(layer_norm(p["norm"], linear(p["first"], x))).mean(1))


class RMSNorm(LayerNorm):
    def parts(self):
        return {"first": nn.Linear(6, WIDTH), "norm": nn.RMSNorm(WIDTH), "out": head()}

    @staticmethod
    def function(p, x):
        return linear(p["out"], torch.tanh(rms_norm(p["norm"], linear(p["first"], x))).mean(1))


class GroupNorm(Net):
    def parts(self):
        return {"first": nn.Conv2d(4, 4, 3), "norm": nn.GroupNorm(2, 4), "out": head(36)}

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.first(x))).flatten(1))

    @staticmethod
    def function(p, x):
        return linear(p["out"], torch.tanh(group_norm(p["norm"], conv(p["first"], x), 2)).flatten(1))


class Embedding(Net):
    integers, padding = True, None

    def parts(self):
        return {"first": nn.Embedding(IDS, WIDTH, padding_idx=self.padding), "out": head()}

    def forward(self, ids):
        return self.out(torch.tanh(self.first(ids)).mean(1))

    @classmethod
    def function(cls, p, ids):
        return linear(p["out"], torch.tanh(embedding(p["first"], ids, padding_id=cls.padding)).mean(1))


class PaddedEmbedding(Embedding):
    padding = 0


class TiedEmbedding(Net):
    integers = True

    def parts(self):
        first, out = nn.Embedding(IDS, WIDTH), nn.Linear(WIDTH, IDS, bias=False)
        out.weight = first.weight
        return {"first": first, "body": nn.Linear(WIDTH, WIDTH), "out": out}

    def forward(self, ids):
        return self.out(torch.tanh(self.body(self.first(ids)))).mean(1)

    @staticmethod
    def function(p, ids):
        return linear(p["first"], torch.tanh(linear(p["body"], embedding(p["first"], ids)))).mean(1)


class LinearTwice(Net):
    def parts(self):
        return {"first": nn.Linear(6, WIDTH), "shared": nn.Linear(WIDTH, WIDTH), "out": head()}

    def forward(self, x):
        return self.out(torch.tanh(self.shared(torch.tanh(self.shared(self.first(x))))))

    @staticmethod
    def function(p, x):
        once = torch.tanh(linear(p["shared"], linear(p["first"], x)))
        return linear(p["out"], torch.tanh(linear(p["shared"], once)))


class PositionEmbedding(Net):
    integers = True

    def parts(self):
        return {"first": nn.Embedding(IDS, WIDTH), "position": nn.Embedding(TIME, WIDTH), "out": head()}

    def forward(self, ids):
        return self.out(torch.tanh(self.first(ids) + self.position(torch.arange(ids.shape[1]))).mean(1))

    @staticmethod
    def function(p, ids):
        x = embedding(p["first"], ids) + embedding(p["position"], torch.arange(ids.shape[1]))
        return linear(p["out"], torch.tanh(x).mean(1))


class RawParameters(Net):
    """A class token before the sequence and a scale of the residual branch, as in vision transformers."""

    def parts(self):
        raw = {"token": nn.Parameter(torch.zeros(1, 1, WIDTH)), "scale": nn.Parameter(torch.zeros(WIDTH))}
        return {"first": nn.Linear(6, WIDTH), "body": nn.Linear(WIDTH, WIDTH), "out": head(), **raw}

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), 1, WIDTH), self.first(x)], 1)
        return self.out((x + self.scale * torch.tanh(self.body(x))).mean(1))

    @staticmethod
    def function(p, x):
        x = torch.cat([p["token"].expand(len(x), 1, WIDTH), linear(p["first"], x)], 1)
        return linear(p["out"], (x + p["scale"] * torch.tanh(linear(p["body"], x))).mean(1))


class Attention(Net):
    def parts(self):
        attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        return {"first": nn.Linear(6, WIDTH), "attention": attention, "out": head()}

    def forward(self, x):
        x = self.first(x)
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))

    @staticmethod
    def function(p, x):
        a = p["attention"]
        qkv = linear({"weight": a["in_proj_weight"], "bias": a["in_proj_bias"]}, linear(p["first"], x))
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = attention(q, k, v).transpose(1, 2).flatten(2)
        return linear(p["out"], linear(a["out_proj"], mixed).mean(1))


class LSTM(Net):
    def parts(self):
        return {"first": nn.Linear(6, WIDTH), "memory": nn.LSTM(WIDTH, WIDTH, batch_first=True), "out": head()}

    def forward(self, x):
        return self.out(self.memory(self.first(x))[0].mean(1))

    @staticmethod
    def function(p, x):
        x, m = linear(p["first"], x), p["memory"]
        states = []
        h = c = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            gates = linear({"weight": m["weight_ih_l0"], "bias": m["bias_ih_l0"]}, x[:, t])
            gates = gates + linear({"weight": m["weight_hh_l0"], "bias": m["bias_hh_l0"]}, h)
            i, f, g, o = gates.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        return linear(p["out"], torch.stack(states, 1).mean(1))


class Linear4D(Perceptron):
    def forward(self, x):
        return self.out(torch.tanh(self.first(x)).mean((1, 2)))

    @staticmethod
    def function(p, x):
        return linear(p["out"], torch.tanh(linear(p["first"], x)).mean((1, 2)))


VECTORS, SEQUENCES, IMAGES, GRIDS = (BATCH, 6), (BATCH, TIME, 6), (BATCH, 4, 5, 5), (BATCH, 3, 2, 6)
# Integers; in the second a tool cannot tell the axes apart by their sizes.
TOKENS, SQUARE = (BATCH, TIME), (BATCH, BATCH)

CASES = {
    "multilayer perceptron": (Perceptron, VECTORS),
    "convolution": (Convolution, IMAGES),
    "layer norm": (LayerNorm, SEQUENCES),
    "group norm": (GroupNorm, IMAGES),
    "embedding": (Embedding, TOKENS),
    "embedding tied to the output layer": (TiedEmbedding, TOKENS),
    "linear used twice": (LinearTwice, VECTORS),
    "grouped convolution": (Grouped, IMAGES),
    "depthwise convolution": (Depthwise, IMAGES),
    "convolution, circular padding": (Circular, IMAGES),
    "embedding with a padding index": (PaddedEmbedding, TOKENS),
    "position embedding, looked up once": (PositionEmbedding, TOKENS),
    "position embedding, time = batch": (PositionEmbedding, SQUARE),
    "RMS norm": (RMSNorm, SEQUENCES),
    "class token and layer scale": (RawParameters, SEQUENCES),
    "multi-head attention": (Attention, SEQUENCES),
    "LSTM": (LSTM, SEQUENCES),
    "linear on a 4-D input": (Linear4D, GRIDS),
}


def case(name: str) -> Case:
    """The case of this name: always the same values. Norms' weights are drawn as well."""
    net, shape = CASES[name]
    module = net().double()
    keys = random.split(random.key(0), 3)
    for i, p in enumerate(module.parameters()):
        p.data = 0.5 * random.normal(random.fold_in(keys[0], i), p.shape, dtype=torch.float64)
    # Half of the ids are 0, the padding index where there is one.
    if net.integers:
        x = random.randint(keys[1], shape, 1 - IDS, IDS).long().clamp(min=0)
    else:
        x = random.normal(keys[1], shape, dtype=torch.float64)
    return Case(name, module, net.function, x, random.randint(keys[2], (BATCH,), 0, CLASSES).long())
