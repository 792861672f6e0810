"""Curvature products: the dense matrices of torch.func and the operators of curvlinops, eager and compiled."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from core import random, tree
from core.curvature import dense, fisher_vp, ggn_vp, probe, sampled_fisher_vp
from core.curvature.vectors import ravel, unravel
from core.transforms import hvp

F64 = torch.float64
N, CLASSES = 7, 3
X = random.normal(random.key(1), (N, 4), F64)
Y = torch.tensor([0, 1, 2, 2, 1, 0, 1])
ZEROS = {
    "a": {"bias": torch.zeros(5, dtype=F64), "weight": torch.zeros(5, 4, dtype=F64)},
    "b": [{"bias": torch.zeros(CLASSES, dtype=F64), "weight": torch.zeros(CLASSES, 5, dtype=F64)}],
}
PARAMS = probe(random.key(0), ZEROS)
DIRECTION = probe(random.key(2), ZEROS)


def logits(p):
    return torch.tanh(X @ p["a"]["weight"].T + p["a"]["bias"]) @ p["b"][0]["weight"].T + p["b"][0]["bias"]


def mean_loss(z):
    return cross_entropy(z, Y)


def loss(p):
    return mean_loss(logits(p))


def losses(p):
    return cross_entropy(logits(p), Y, reduction="none")


def hessian_product(v):
    return hvp(loss, PARAMS, v)[1]


def ggn_product(v):
    return ggn_vp(logits, mean_loss, PARAMS, v)


def fisher_product(v):
    return fisher_vp(losses, PARAMS, v)


def sampled_product(v):
    return sampled_fisher_vp(logits, PARAMS, v, random.key(3), samples=2)


PRODUCTS = {"hessian": hessian_product, "ggn": ggn_product, "fisher": fisher_product, "sampled": sampled_product}
every_product = pytest.mark.parametrize("name", PRODUCTS)


def jacobian(f):
    """(outputs, parameters) at PARAMS."""
    return torch.func.jacrev(lambda vector: f(unravel(vector, PARAMS)).reshape(-1))(ravel(PARAMS))


def exact(name: str) -> torch.Tensor:
    """The matrix, from its definition."""
    if name == "hessian":
        return torch.func.hessian(lambda vector: loss(unravel(vector, PARAMS)))(ravel(PARAMS))
    if name == "fisher":
        g = jacobian(losses)
        return g.T @ g / N
    j, p = jacobian(logits).reshape(N, CLASSES, -1), logits(PARAMS).softmax(-1)
    if name == "ggn":  # H = diag(p) - p pᵀ for each example
        h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("ncp,ncd,ndq->pq", j, h, j) / N
    labels = random.categorical(random.key(3), logits(PARAMS), shape=(2, N))
    g = torch.einsum("snc,ncp->snp", p - torch.eye(CLASSES, dtype=F64)[labels], j).flatten(0, 1)
    return g.T @ g / (2 * N)


@every_product
def test_product_is_that_with_the_exact_matrix(name):
    matrix = exact(name)
    torch.testing.assert_close(ravel(PRODUCTS[name](DIRECTION)), matrix @ ravel(DIRECTION), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dense(PRODUCTS[name], PARAMS), matrix, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dense(PRODUCTS[name], PARAMS, chunk=5), matrix, rtol=1e-12, atol=1e-14)


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name != "ggn" else name for name in PRODUCTS]
)
def test_compiled_and_mapped_product_is_the_same(name):
    product, directions = PRODUCTS[name], tree.stack([DIRECTION, PARAMS])
    expected = [product(DIRECTION), product(PARAMS)]
    torch.testing.assert_close(compiled(product)(DIRECTION), expected[0], rtol=1e-12, atol=1e-14)
    mapped = [torch.func.vmap(product)(directions), compiled(torch.func.vmap(product))(directions)]
    torch._dynamo.reset()
    for actual in mapped:
        torch.testing.assert_close(tree.unstack(actual), expected, rtol=1e-12, atol=1e-14)


def test_sampled_fisher_has_the_ggn_as_its_mean():
    samples = 20000
    actual = sampled_fisher_vp(logits, PARAMS, DIRECTION, random.key(4), samples)
    expected = ggn_product(DIRECTION)
    error, size = tree.norm(tree.map(torch.sub, actual, expected)), tree.norm(expected)
    assert 0 < error < 3 * size / math.sqrt(samples)
    again = sampled_fisher_vp(logits, PARAMS, DIRECTION, random.key(4), samples)
    other = sampled_fisher_vp(logits, PARAMS, DIRECTION, random.key(5), samples)
    assert torch.equal(ravel(actual), ravel(again)) and not torch.equal(ravel(actual), ravel(other))


def test_ggn_of_a_linear_model_is_the_hessian():
    def outputs(p):
        return X @ p["w"] + p["b"]

    params = probe(random.key(5), {"b": torch.zeros(3, dtype=F64), "w": torch.zeros(4, 3, dtype=F64)})
    v = probe(random.key(6), params)
    actual = ggn_vp(outputs, mean_loss, params, v)
    torch.testing.assert_close(actual, hvp(lambda p: mean_loss(outputs(p)), params, v)[1])


def test_outputs_may_be_a_tree_in_any_key_order():
    def outputs(p):
        z = logits(p)
        return {"z": z, "again": z.square()}

    def total(out):
        return mean_loss(out["z"]) + out["again"].exp().mean()

    def joined(z):
        return mean_loss(z[..., :CLASSES]) + z[..., CLASSES:].exp().mean()

    actual = ggn_vp(outputs, total, PARAMS, DIRECTION)
    torch.testing.assert_close(
        actual, ggn_vp(lambda p: torch.cat([logits(p), logits(p).square()], -1), joined, PARAMS, DIRECTION)
    )


def test_inputs_and_global_generator_are_as_before():
    before, state = tree.map(torch.clone, (PARAMS, DIRECTION)), torch.get_rng_state()
    for product in PRODUCTS.values():
        product(DIRECTION)
    torch.testing.assert_close((PARAMS, DIRECTION), before, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["hessian", "ggn", "fisher"])
def test_equal_to_curvlinops(name):
    curvlinops = pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch", exc_type=ImportError)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, CLASSES)).double()
    with torch.no_grad():
        for layer, p in ((model[0], PARAMS["a"]), (model[2], PARAMS["b"][0])):
            layer.weight.copy_(p["weight"])
            layer.bias.copy_(p["bias"])
    kind = {"hessian": "HessianLinearOperator", "ggn": "GGNLinearOperator", "fisher": "EFLinearOperator"}[name]
    parameters = dict(model.named_parameters())
    operator = getattr(curvlinops, kind)(model, torch.nn.CrossEntropyLoss(), list(parameters.values()), [(X, Y)])
    v = {"0": DIRECTION["a"], "2": DIRECTION["b"][0]}
    vector = torch.cat([tree.get(v, parameter).reshape(-1) for parameter in parameters])
    out = PRODUCTS[name](DIRECTION)
    out = {"0": out["a"], "2": out["b"][0]}
    actual = torch.cat([tree.get(out, parameter).reshape(-1) for parameter in parameters])
    torch.testing.assert_close(actual, (operator @ vector).detach(), rtol=1e-10, atol=1e-12)


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match=r"fisher_vp: the losses have shape \(\); expected one per example, \(N,\)"):
        fisher_vp(loss, PARAMS, DIRECTION)
    with pytest.raises(ValueError, match="leaf 'b.0.weight' is missing"):
        ggn_vp(logits, mean_loss, PARAMS, {**DIRECTION, "b": [{"bias": DIRECTION["b"][0]["bias"]}]})
    with pytest.raises(ValueError, match=r"returned shape \(7, 3\); expected a scalar"):
        ggn_vp(logits, torch.exp, PARAMS, DIRECTION)
    with pytest.raises(ValueError, match="samples is 0; expected at least 1"):
        sampled_fisher_vp(logits, PARAMS, DIRECTION, random.key(0), 0)
    with pytest.raises(ValueError, match="distribution 'cauchy' is unknown; expected one of rademacher, normal"):
        probe(random.key(0), PARAMS, "cauchy")
    with pytest.raises(TypeError, match="leaf 'a' is torch.int64; expected a floating-point tensor"):
        probe(random.key(0), {"a": torch.arange(3)})
    with pytest.raises(ValueError, match="the tree has no leaves"):
        probe(random.key(0), {})
