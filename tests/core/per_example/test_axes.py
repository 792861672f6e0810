"""The axis of the batch: any one of an operation's input, as long as it is an axis of its own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core import per_example
from core.lift import lift
from core.per_example import PerExampleError
from tests.core.per_example.models import Draw, N
from tests.core.per_example.test_casts import assert_equal_to_loop

DRAW = Draw("axes")
P = {"b": DRAW(N), "table": DRAW(7, N), "w": DRAW(N, N)}
X = DRAW(N, 3, N)
IDS = DRAW.ids(7, N, 3)


def time_first(x):
    return x.transpose(0, 1)


LOSSES = {
    "linear": lambda p, x: F.linear(time_first(x), p["w"], p["b"]).square().sum((0, 2)),
    "matmul": lambda p, x: (time_first(x) @ p["w"]).square().sum((0, 2)),
    "parameter first": lambda p, x: (p["w"] @ x.mean(1).T).square().sum(0),
    "add": lambda p, x: (time_first(x) + p["b"]).square().sum((0, 2)),
    "a column per example": lambda p, x: (x.sum(1).T * p["b"][:, None]).square().sum(0),
    "ranks that differ": lambda p, x: (time_first(x) * (x[:, 0] * p["b"])).square().sum((0, 2)),
    "layer norm": lambda p, x: F.layer_norm(time_first(x), (N,), p["b"], p["b"]).pow(3).sum((0, 2)),
    "rms norm": lambda p, x: F.rms_norm(time_first(x), (N,), p["b"]).pow(3).sum((0, 2)),
    "no rule": lambda p, x: F.cosine_similarity(time_first(x), p["w"][:3, None], dim=-1).sum(0),
    "no rule, two places": lambda p, x: torch.einsum("tnd,nd,d->nt", time_first(x), x[:, 0], p["b"]).square().sum(1),
    "last": lambda p, x: F.glu(torch.stack([p["w"], p["w"]], 2)[..., 0] @ x.mean(1).T, 0).square().sum(0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_axis_may_be_that_of_the_batch(name):
    loss = LOSSES[name]
    assert_equal_to_loop(loss, P, X, per_example.reports(loss, P, X, ("norm", "gram", "square")), 1e-12)


def test_ids_with_the_batch_second():
    def loss(p, ids):
        return F.linear(F.embedding(ids.T, p["table"], padding_idx=2), p["w"]).square().sum((0, 2))

    assert_equal_to_loop(loss, P, IDS, per_example.reports(loss, P, IDS), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "layer norm", "no rule"])
def test_any_axis_while_compiling(name):
    torch._dynamo.reset()
    f = torch.compile(lambda p, x: per_example.reports(LOSSES[name], p, x), backend="aot_eager", fullgraph=True)
    assert_equal_to_loop(LOSSES[name], P, X, f(P, X), 1e-12)


REFUSED = {
    "examples apart": (
        lambda p, x: torch.addcmul(p["b"][0], x.sum(1)[:, :1], x.sum(1).T[:1]).sum(1),
        "not the same axis of all arguments",
    ),
    "normalised over the batch": (lambda p, x: F.layer_norm(x.sum(1).T, (len(x),), p["b"]).sum(0), "'b'"),
    "contracted": (lambda p, x: F.linear(x.sum(1).T, p["w"]).sum(0), "'w'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_the_examples_is_refused(name):
    loss, message = REFUSED[name]
    with pytest.raises(PerExampleError, match=message):
        per_example.reports(loss, P, X)


@pytest.mark.parametrize("layer", ["attention", "decoder", "recurrence"])
def test_modules_with_the_batch_second(layer):
    torch.manual_seed(0)
    module = {
        "attention": lambda: nn.MultiheadAttention(N, 2),
        "decoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(N, 2, 6), 1),
        "recurrence": lambda: nn.LSTM(N, 3, 2, bidirectional=True),
    }[layer]()
    params, _, apply = lift(module.double().eval())

    def loss(p, x):
        x = time_first(x)
        out = apply(p, x, x, x)[0] if layer == "attention" else apply(p, x, x) if layer == "decoder" else apply(p, x)[0]
        return out.square().sum((0, 2))

    assert_equal_to_loop(loss, params, X, per_example.reports(loss, params, X), 1e-12)
