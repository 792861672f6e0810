"""embedding against torch.nn.Embedding, and under the transforms."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from core import random, spec, tree
from core.layers import embedding, embedding_spec

IDS = torch.tensor([[0, 1, 4], [1, 1, 3]])


def values(key=None):
    return spec.init(random.key(0) if key is None else key, embedding_spec(5, 4), torch.float64)


@pytest.mark.parametrize("padding_id", [None, 1, -1, 0])
@pytest.mark.parametrize("ids", [IDS, IDS[0].int(), torch.tensor(4)], ids=["2-D", "int32", "0-D"])
def test_output_and_gradient_equal_torch(ids, padding_id):
    p, module = values(), torch.nn.Embedding(5, 4, padding_idx=padding_id, dtype=torch.float64)

    def expected(p):
        return functional_call(module, p, (ids,))

    def actual(p):
        return embedding(p, ids, padding_id=padding_id)

    torch.testing.assert_close(actual(p), expected(p), rtol=0, atol=0)
    gradients = [grad(lambda p, f=f: f(p).pow(3).sum())(p) for f in (actual, expected)]
    torch.testing.assert_close(*gradients)
    if padding_id is not None:
        assert (gradients[0]["weight"][padding_id] == 0).all()


def test_default_init_is_standard_normal():
    weight = spec.init(random.key(0), embedding_spec(500, 40))["weight"]
    assert weight.mean().abs() < 0.02 and 0.98 < weight.std() < 1.02
    assert embedding_spec(5, 4)["weight"].axes == ("vocabulary", "width")


@pytest.mark.parametrize("padding_id", [None, 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_ensemble_equals_the_members(padding_id, compiled):
    def loss(p):
        return embedding(p, IDS, padding_id=padding_id).pow(3).sum()

    torch._dynamo.reset()
    p, f = vmap(values)(random.split(random.key(0), 3)), vmap(grad(loss))
    if compiled:
        f = torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(f(p), tree.stack([grad(loss)(q) for q in tree.unstack(p)]))


@pytest.mark.parametrize("padding_id", [None, 1])
def test_gradients_of_examples_add_up(padding_id):
    def loss(p, ids):
        return embedding(p, ids, padding_id=padding_id).pow(3).sum()

    each = vmap(grad(loss), in_dims=(None, 0))(values(), IDS)
    torch.testing.assert_close(each["weight"].sum(0), grad(loss)(values(), IDS)["weight"])


def test_errors():
    with pytest.raises(ValueError, match="expected integer ids, found torch.float32"):
        embedding(values(), IDS.float())
    with pytest.raises(ValueError, match="padding_id=5 is not one of 5 rows"):
        embedding(values(), IDS, padding_id=5)
