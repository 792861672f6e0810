"""Weights of 4 bits in groups: their errors, their size, and the nets that take them."""

import pytest
import torch
from torch.func import grad, vmap

from core import int4, int8, random, spec, tree
from core.layers import embedding, linear
from core.layers.int4 import Int4
from core.layers.unformed import formed
from tests.registry import NETS
from tests.test_laws import batch, values

KEY = random.key(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("columns", "groups"), [(64, 2), (32, 1), (100, 5), (2, 1)])
def test_an_entry_is_off_by_up_to_half_a_step_of_its_group(columns, groups, dtype):
    weight = random.normal(KEY, (5, columns)).to(dtype)
    weight[3] = 0
    leaf = int4.unformed(int4.quantise({"w": weight}))["w"]
    assert isinstance(leaf, Int4) and leaf.shape == weight.shape and leaf.dtype == dtype
    assert leaf.int4.shape == (5, columns // 2) and leaf.scale.shape == (5, groups)
    error = (leaf.dense().double() - weight.double()).abs().unflatten(1, (groups, -1)).amax(2)
    step = 0.5 if dtype != torch.bfloat16 else 0.55  # s and the product are rounded
    assert (error <= step * leaf.scale.double() * (1 + 1e-5)).all() and not leaf.dense()[3].any()


def test_integers_are_packed_in_pairs():
    weight = torch.tensor([[-7.0, 7.0, 0.0, 1.0]])
    out = int4.quantise({"w": weight}, group=4)["w"]
    assert out["int4"].tolist() == [[1 + 16 * 15, 8 + 16 * 9]] and out["scale"].tolist() == [[1.0]]
    assert torch.equal(int4.unformed({"w": out})["w"].dense(), weight)


def test_smaller_than_8_bits_and_groups_are_better_than_rows():
    params = {"w": random.normal(KEY, (64, 256)) * torch.logspace(-1, 1, 256)}
    sizes = [int8.nbytes(tree_) for tree_ in (params, int8.quantise(params), int4.quantise(params))]
    assert sizes[1] / sizes[0] < 0.26 and sizes[2] / sizes[0] == pytest.approx(5 / 32)
    errors = [
        float((int4.unformed(int4.quantise(params, group))["w"].dense() - params["w"]).norm())
        for group in (16, 32, 256)
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama", "vit", "bert"])
def test_nets_take_them_as_they_are(name):
    net = NETS[name]
    params, running = values(net)
    quantised, x = int4.quantise(params), batch(net, 2)
    assert any(leaf.dtype == torch.uint8 for leaf in tree.leaves(quantised)), name

    def out(params):
        return net.apply(tree.merge(params, running), x, random.key(2), False)

    ours = int4.unformed(quantised)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9), out(ours), out(formed(ours)))


def test_transforms_and_embeddings():
    two = [int4.quantise({"w": {"weight": random.normal(random.key(i), (6, 4))}}) for i in range(2)]
    x, ids = random.normal(KEY, (3, 4)), torch.tensor([[5, 0, 5]])
    together = vmap(lambda q: linear(int4.unformed(q)["w"], x))(tree.stack(two))
    for i, one in enumerate(two):
        dense = formed(int4.unformed(one))["w"]
        torch.testing.assert_close(together[i], linear(dense, x))
        assert torch.equal(embedding(int4.unformed(one)["w"], ids), embedding(dense, ids))
    gradient = grad(lambda x: linear(int4.unformed(two[0])["w"], x).sum())(x)
    torch.testing.assert_close(gradient, dense["weight"].new_ones(3, 6) @ formed(int4.unformed(two[0]))["w"]["weight"])


def test_refusals():
    with pytest.raises(ValueError, match="int4: group is 1; expected at least 2"):
        int4.quantise({"w": torch.ones(2, 2)}, 1)
    with pytest.raises(ValueError, match=r"int4: 'w' has shape \(2, 3\) and torch.float32; expected real numbers"):
        int4.quantise({"w": torch.ones(2, 3)}, where=lambda name, leaf: True)
    spec_, same = spec.init(KEY, {"w": NETS["mlp"].spec}), lambda name, leaf: False
    assert tree.names(int4.quantise(spec_, where=same)) == tree.names(spec_)
