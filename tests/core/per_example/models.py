"""Small losses for the tests of core.per_example: every operation that a parameter can meet, and its pitfalls.

Batch sizes agree with other axes (time, channels, width) on purpose. Each function below takes a `Draw` and returns
(params, loss, batch); its name is the name of the test.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import random, spec
from core.layers import (
    batch_norm,
    conv,
    conv_transpose,
    embedding,
    group_norm,
    instance_norm,
    layer_norm,
    linear,
    prelu,
    rms_norm,
)
from core.tree import Tree

N = 4


class Draw:
    """Values for a model: `draw(2, 3)` is normal, `draw.ids(10, 4, 5)` are integers below 10."""

    def __init__(self, name: str):
        self.generator = torch.Generator().manual_seed(spec.name_hash(name))

    def __call__(self, *shape: int) -> Tensor:
        return 0.7 * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def ids(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator)

    def linear(self, d_in: int, d_out: int) -> dict:
        return {"bias": self(d_out), "weight": self(d_out, d_in)}


class Model(NamedTuple):
    name: str
    params: Tree
    loss: Callable[[Tree, Tree], Tensor]
    batch: Tree


Build = Callable[[Draw], tuple[Tree, Callable, Tree]]
BUILDS: dict[str, Build] = {}


def model(build: Build, name: str = "") -> Build:
    BUILDS[name or build.__name__] = build
    return build


def make(name: str) -> Model:
    return Model(name, *BUILDS[name](Draw(name)))


def value(y: Tensor) -> Tensor:
    """A loss (N,) of any output (N, ...): all entries count, each with another weight."""
    flat = y.reshape(y.shape[0], -1)
    return (torch.sin(flat) * torch.cos(1.0 + torch.arange(flat.shape[1], dtype=y.dtype))).sum(1)


def layer(name: str, params: Callable[[Draw], Tree], apply: Callable[[Tree, Any], Tensor], *shape: int) -> None:
    """A model of one layer between two nonlinearities; x: `shape`."""

    def build(draw: Draw):
        scale = draw(shape[-1])
        return (
            {"layer": params(draw), "scale": scale},
            lambda p, x: value(apply(p["layer"], x * p["scale"])),
            draw(*shape),
        )

    model(build, name)


# linear


@model
def mlp(draw):
    params = [draw.linear(4, 4), draw.linear(4, 4), draw.linear(4, 3)]

    def loss(p, batch):
        x = batch["x"]
        for layer in p[:-1]:
            x = torch.tanh(linear(layer, x))
        return F.cross_entropy(linear(p[-1], x), batch["y"], reduction="none")

    return params, loss, {"x": draw(N, 4), "y": draw.ids(3, N)}


layer("linear 2-D", lambda draw: draw.linear(5, 4), linear, 4, 5)
layer("linear 3-D", lambda draw: draw.linear(4, 4), linear, 4, 4, 4)
layer("linear 4-D", lambda draw: draw.linear(3, 2), linear, 4, 4, 2, 3)
layer("linear 5-D", lambda draw: draw.linear(2, 4), linear, 4, 2, 4, 3, 2)
layer("linear one place", lambda draw: draw.linear(4, 3), linear, 5, 1, 4)
layer("linear, no bias", lambda draw: {"weight": draw(20, 30)}, linear, 4, 4, 30)
layer("linear, long", lambda draw: draw.linear(3, 2), linear, 4, 30, 3)
layer("x @ W", lambda draw: draw(4, 5), lambda w, x: x @ w, 4, 3, 4)
layer("x @ W.T", lambda draw: draw(5, 4), lambda w, x: x @ w.T, 4, 4)
layer("x @ W.mT", lambda draw: draw(5, 4), lambda w, x: x @ w.mT, 4, 3, 4)
layer("x @ W.transpose", lambda draw: draw(4, 4), lambda w, x: torch.matmul(x, w.transpose(0, 1)), 4, 4)
layer("x @ W.t().t()", lambda draw: draw(4, 4), lambda w, x: torch.mm(x, w.t().t()), 4, 4)
layer("W of permute", lambda draw: draw(5, 4), lambda w, x: F.linear(x, w.permute(1, 0)), 4, 5)
layer("W @ x", lambda draw: draw(5, 4), lambda w, x: w @ x, 4, 4, 3)
layer("W @ vector", lambda draw: draw(5, 4), lambda w, x: w @ x.unsqueeze(-1), 4, 4)
layer("x @ vector", lambda draw: draw(4), lambda w, x: (x @ w)[:, None], 4, 4)
layer("linear to one", lambda draw: draw(4), lambda w, x: F.linear(x, w), 4, 3, 4)
layer("einsum", lambda draw: draw(5, 4), lambda w, x: torch.einsum("nti,oi->nto", x, w), 4, 4, 4)
layer("einsum, heads", lambda draw: draw(2, 4, 3), lambda w, x: torch.einsum("nti,hio->nhto", x, w), 4, 4, 4)
layer("x @ W of 3-D", lambda draw: draw(3, 4, 2), lambda w, x: x @ w, 4, 3, 5, 4)
layer("bmm", lambda draw: draw(3, 4, 2), lambda w, x: torch.bmm(x, w[0].expand(x.shape[0], 4, 2)), 4, 3, 4)
layer("addmm", lambda draw: draw.linear(4, 3), lambda p, x: torch.addmm(p["bias"], x, p["weight"].T), 5, 4)
layer("bilinear", lambda draw: draw(2, 4, 4), lambda w, x: F.bilinear(x, x.cos(), w), 4, 4)
layer("multiply in 64 bits", lambda draw: draw(3), lambda w, x: torch.mul(w.double(), x).float().double(), 4, 3)


@model
def linear_used_twice(draw):
    params = {"in": draw.linear(3, 4), "layer": draw.linear(4, 4), "unused": {"weight": draw(2, 2)}}

    def loss(p, x):
        x = torch.tanh(linear(p["in"], x))
        return value(linear(p["layer"], torch.tanh(linear(p["layer"], x))))

    return params, loss, draw(N, 5, 3)


@model
def linear_five_times_as_vector_and_sequence(draw):
    def loss(p, x):
        total = value(linear(p, x.mean(1)))
        for _ in range(4):
            x = x + torch.tanh(linear(p, x))
        return total + value(x)

    return draw.linear(4, 4), loss, draw(N, 4, 4)


@model
def tied_autoencoder(draw):
    params = {"in": draw(4), "out": draw(6), "weight": draw(4, 6)}

    def loss(p, x):
        code = torch.tanh(F.linear(x, p["weight"], p["in"]))
        return value(F.linear(code, p["weight"].T, p["out"]))

    return params, loss, draw(N, 6)


@model
def tied_autoencoder_by_matmul(draw):
    return draw(4, 4), lambda w, x: value(torch.tanh(x @ w) @ w.T), draw(N, 3, 4)


@model
def weight_in_a_rule_and_without(draw):
    """A product, and a penalty of the raw weight that each example scales."""
    return draw(3, 4), lambda w, x: value(F.linear(x, w)) + x[:, 0] * w.square().sum(), draw(N, 4)


@model
def detached(draw):
    """Batches pass through a layer that gets no gradient of its own there."""

    def loss(p, x):
        return value(linear(p, x)) + value(F.linear(x.cos(), p["weight"].detach()))

    return draw.linear(4, 3), loss, draw(N, 4)


@model
def zero_gradient_for_some(draw):
    params = {"gate": draw(3, 4), "rest": draw(4)}
    return params, lambda p, x: value(F.linear(x, p["gate"])) * (x[:, 0] > 0) + (x * p["rest"]).sum(1), draw(N, 4)


# convolutions


def convolution(
    name: str, weight: tuple, shape: tuple, apply: Callable = conv, bias: int | None = None, **options
) -> None:
    out = weight[0] if apply is conv else weight[1] * options.get("groups", 1)
    layer(name, lambda draw: {"bias": draw(out), "weight": draw(*weight)}, lambda p, x: apply(p, x, **options), *shape)


convolution("conv1d", (4, 4, 3), (4, 4, 4))
convolution("conv2d, stride leaves pixels", (3, 4, 3, 2), (4, 4, 6, 7), stride=2)
convolution("conv3d", (2, 3, 2, 1, 2), (4, 3, 3, 4, 2), padding=(1, 0, 1), stride=(2, 1, 1))
convolution("conv2d, groups", (4, 2, 3, 3), (4, 4, 5, 4), groups=2, padding=1)
convolution("conv2d, depthwise", (8, 1, 3, 3), (4, 4, 4, 4), groups=4, padding=1, stride=2)
convolution("conv1d, dilated", (4, 3, 3), (4, 3, 9), dilation=3, padding=2, stride=2)
convolution("conv2d, same, even kernel", (3, 2, 4, 2), (4, 2, 4, 5), padding="same")
convolution("conv2d, same, dilated", (3, 2, 3, 2), (4, 2, 4, 5), padding="same", dilation=(2, 3))
for mode in ("circular", "reflect", "replicate"):
    convolution(f"conv2d, {mode}", (3, 2, 3, 3), (5, 2, 5, 4), padding=(2, 1), padding_mode=mode, stride=2)
layer(
    "F.conv2d, same",
    lambda draw: draw.linear(4, 3) | {"weight": draw(3, 2, 3, 5)},
    lambda p, x: F.conv2d(x, p["weight"], p["bias"], padding="same"),
    *(4, 2, 4, 4),
)
layer(
    "F.conv1d, valid",
    lambda draw: draw(3, 4, 2),
    lambda w, x: F.conv1d(input=x, weight=w, stride=(2,), padding="valid"),
    *(4, 4, 5),
)
layer("conv without batch axis", lambda draw: draw(3, 4, 2), lambda w, x: F.conv1d(x, w), 4, 4, 5)
convolution("conv_transpose1d", (3, 2, 3), (4, 3, 4), conv_transpose, stride=3, output_padding=2)
convolution("conv_transpose2d", (4, 3, 3, 2), (4, 4, 3, 2), conv_transpose, stride=(2, 1), padding=(1, 0))
convolution("conv_transpose3d", (2, 2, 2, 2, 1), (4, 2, 2, 3, 2), conv_transpose, stride=2)
# Legal, as output_padding is below the dilation.
convolution(
    "conv_transpose2d, groups, dilated",
    (4, 2, 2, 3),
    (4, 4, 3, 3),
    conv_transpose,
    **dict(stride=(1, 2), padding=1, output_padding=(1, 2), groups=2, dilation=(2, 3)),
)


@model
def conv_of_different_groups(draw):
    def loss(p, x):
        return value(conv(p, x[:, :2])) + value(conv(p, x, groups=2))

    return {"bias": draw(4), "weight": draw(4, 2, 3)}, loss, draw(N, 4, 5)


@model
def cnn(draw):
    params = {
        "conv1": {"weight": draw(4, 3, 3, 3)},
        "conv2": {"bias": draw(6), "weight": draw(6, 4, 3, 3)},
        "head": draw.linear(6, 3),
        "norm": {"bias": draw(4), "weight": draw(4)},
        "prelu": {"weight": draw(6)},
    }

    def loss(p, batch):
        x = group_norm(p["norm"], conv(p["conv1"], batch["x"], padding=1), 2).relu()
        x = prelu(p["prelu"], conv(p["conv2"], F.max_pool2d(x, 2), padding="same"))
        return F.cross_entropy(linear(p["head"], x.mean((2, 3))), batch["y"], reduction="none")

    return params, loss, {"x": draw(N, 3, 8, 8), "y": draw.ids(3, N)}


@model
def conv_recurrent(draw):
    def loss(p, x):
        h = torch.zeros_like(x)
        for _ in range(3):
            h = torch.tanh(conv(p["h"], h, padding=1) + conv(p["x"], x, padding=1))
        return value(h)

    return {k: {"bias": draw(2), "weight": draw(2, 2, 3)} for k in "hx"}, loss, draw(N, 2, 5)


# tables


def table(name: str, apply: Callable[[Any, Tensor], Tensor], *shape: int, vocabulary: int = 6) -> None:
    model(lambda draw: (draw(vocabulary, 4), lambda p, ids: value(apply(p, ids)), draw.ids(vocabulary, *shape)), name)


table("embedding", lambda w, ids: embedding({"weight": w}, ids), 4, 4)
table("embedding, padding", lambda w, ids: embedding({"weight": w}, ids, padding_id=2), 4, 5)
table("embedding, padding from the end", lambda w, ids: F.embedding(ids, w, -1), 4, 5)
table("embedding of one id", lambda w, ids: F.embedding(ids, w), 4)
table("embedding of 2-D ids", lambda w, ids: F.embedding(ids, w), 4, 2, 3)
table("embedding twice", lambda w, ids: F.embedding(ids, w) * F.embedding(ids.flip(1), w, 0), 4, 4)
table("embedding in a large vocabulary", lambda w, ids: F.embedding(ids, w), 4, 3, vocabulary=300)
table("W[ids]", lambda w, ids: w[ids], 4, 4)
table("W[negative ids]", lambda w, ids: w[ids - 3], 4, 4)
table("W[ids, slice]", lambda w, ids: w[ids, 1:3], 4, 4)
table("index_select", lambda w, ids: w.index_select(0, ids.flatten()[:0]).sum() + w[ids], 4, 4)
table("one hot", lambda w, ids: F.one_hot(ids, 6).double() @ w, 4, 3)


def tied(draw, vocabulary, time, width, bias):
    params = {"mix": draw.linear(width, width), "tokens": draw(vocabulary, width)}
    params |= {"bias": draw(vocabulary)} if bias else {}

    def loss(p, ids):
        h = torch.tanh(linear(p["mix"], F.embedding(ids[:, :-1], p["tokens"]).cumsum(1)))
        scores = F.linear(h, p["tokens"], p.get("bias"))
        return F.cross_entropy(scores.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)

    return params, loss, draw.ids(vocabulary, N, time + 1)


model(partial(tied, vocabulary=5, time=4, width=4, bias=False), "tied")
model(partial(tied, vocabulary=400, time=4, width=4, bias=True), "tied, ghost, with bias")


@model
def positions(draw):
    """Three ways: ids without a batch axis, a slice, an id of each example."""
    params = {"a": draw(7, 4), "b": draw(7, 4), "c": draw(7, 4), "out": draw.linear(4, 4)}

    def loss(p, batch):
        places = torch.arange(4)
        x = batch["x"] + F.embedding(places, p["a"]) + p["b"][:4] + F.embedding(batch["place"], p["c"])[:, None]
        return value(linear(p["out"], x))

    return params, loss, {"place": draw.ids(7, N), "x": draw(N, 4, 4)}


@model
def positions_alone(draw):
    """The model's first values have no batch axis at all, and are mapped before they meet one."""
    params = {"out": draw.linear(4, 4), "places": draw(7, 4)}

    def loss(p, x):
        return value(linear(p["out"], torch.tanh(p["places"][torch.arange(4)])) + x)

    return params, loss, draw(N, 4, 4)


# norms


def affine(*shape: int) -> Callable[[Draw], dict]:
    return lambda draw: {"bias": draw(*shape), "weight": draw(*shape)}


layer("layer_norm", affine(4), layer_norm, 4, 4, 4)
layer("layer_norm of a vector", affine(4), layer_norm, 4, 4)
layer("layer_norm over two axes", affine(3, 4), layer_norm, 4, 2, 3, 4)
layer("layer_norm, no bias", lambda draw: {"weight": draw(4)}, layer_norm, 4, 3, 4)
layer("layer_norm, bias only", lambda draw: draw(4), lambda b, x: F.layer_norm(x, (4,), None, b), 4, 3, 4)
layer("rms_norm", lambda draw: {"weight": draw(4)}, rms_norm, 4, 4, 4)
layer("rms_norm over two axes", lambda draw: {"weight": draw(4, 3)}, lambda p, x: rms_norm(p, x, eps=0.1), 4, 4, 3)
layer("group_norm", affine(4), lambda p, x: group_norm(p, x, 2), 4, 4, 4, 3)
layer("instance_norm", affine(4), instance_norm, 4, 4, 4)
layer("F.instance_norm", affine(4), lambda p, x: F.instance_norm(x, None, None, p["weight"], p["bias"]), 4, 4, 4)


def batch_normed(draw, shape, function):
    params = {"in": draw.linear(4, 4), "norm": affine(4)(draw)}
    mean, var = draw(4), draw(4).exp()

    def loss(p, x):
        x = linear(p["in"], x.movedim(1, -1)).movedim(-1, 1)
        if function:
            return value(F.batch_norm(x, mean, var, p["norm"]["weight"], p["norm"]["bias"], False, 0.1, 1e-5))
        return value(batch_norm(p["norm"] | {"mean": mean, "var": var}, x, train=False))

    return params, loss, draw(*shape)


model(partial(batch_normed, shape=(4, 4), function=False), "batch_norm, eval, vectors")
model(partial(batch_normed, shape=(4, 4, 4), function=False), "batch_norm, eval")
model(partial(batch_normed, shape=(4, 4, 3, 2), function=True), "F.batch_norm, eval")


@model
def keys_of_dropout(draw):
    from core.layers import dropout

    def loss(p, batch):
        return value(linear(p, dropout(batch["x"], 0.4, batch["key"])))

    return draw.linear(4, 3), loss, {"key": random.split(random.key(3), N), "x": draw(N, 4)}
