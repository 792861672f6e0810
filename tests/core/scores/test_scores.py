"""Scores of examples against closed forms, loops of plain gradients and dense Jacobians, in float64."""

import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from core import random, scores, tree
from core.curvature import ggn_vp, probe, top_eigenpairs
from core.per_example import PerExampleError

F64 = torch.float64
N, D, CLASSES = 7, 4, 3
X = random.normal(random.key(1), (N, D), F64)
Y = torch.tensor([0, 1, 2, 2, 1, 0, 1])
OTHERS = (random.normal(random.key(2), (5, D), F64), torch.tensor([2, 2, 0, 1, 0]))
BATCH = (X, Y)
ZEROS = {
    "a": {"bias": torch.zeros(5, dtype=F64), "weight": torch.zeros(5, D, dtype=F64)},
    "b": [{"bias": torch.zeros(CLASSES, dtype=F64), "weight": torch.zeros(CLASSES, 5, dtype=F64)}],
}
CHECKPOINTS = [probe(key, ZEROS) for key in random.split(random.key(0), 3)]
PARAMS = CHECKPOINTS[0]
RATES = [0.5, 0.25, 2.0]
close = torch.testing.assert_close


def logits(p, x):
    return F.linear(torch.tanh(F.linear(x, **p["a"])), **p["b"][0])


def losses(p, batch):
    return F.cross_entropy(logits(p, batch[0]), batch[1], reduction="none")


def ravel(values):
    return torch.cat([leaf.reshape(-1) for leaf in tree.leaves(values)])


def rows(params, batch):
    """Every example's gradient, one after the other by plain autograd: (N, parameters)."""
    rows = []
    for i in range(len(batch[1])):
        leaves = [leaf.clone().requires_grad_() for leaf in tree.leaves(params)]
        value = losses(tree.unflatten(params, leaves), (batch[0][i : i + 1], batch[1][i : i + 1]))[0]
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, leaves)]))
    return torch.stack(rows)


G, H = rows(PARAMS, BATCH), rows(PARAMS, OTHERS)


def jacobian(params, x):
    """(N, C, parameters), by torch's own jacobian of the function of a vector."""
    start, shapes = ravel(params), [leaf.shape for leaf in tree.leaves(params)]

    def of_vector(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        return logits(tree.unflatten(params, [p.reshape(s) for p, s in zip(parts, shapes, strict=True)]), x)

    return torch.autograd.functional.jacobian(of_vector, start)


# --- difficulty


def test_grand_is_the_norm_of_each_gradient():
    close(scores.grand(losses, PARAMS, BATCH), torch.linalg.vector_norm(G, dim=1))


def test_grand_of_an_ensemble_is_the_mean():
    expected = torch.stack([torch.linalg.vector_norm(rows(p, BATCH), dim=1) for p in CHECKPOINTS]).mean(0)
    close(scores.grand(losses, tree.stack(CHECKPOINTS), BATCH, ensemble=True), expected)


def test_grand_of_softmax_regression_is_el2n_times_the_input():
    """dL/dW = (softmax(W x) - onehot(y)) xᵀ, an outer product."""
    weight = random.normal(random.key(3), (CLASSES, D), F64)

    def loss(p, batch):
        return F.cross_entropy(F.linear(batch[0], p["weight"]), batch[1], reduction="none")

    expected = scores.el2n(F.linear(X, weight), Y) * torch.linalg.vector_norm(X, dim=1)
    close(scores.grand(loss, {"weight": weight}, BATCH), expected)


def test_el2n():
    z = logits(PARAMS, X)
    p = z.softmax(1).numpy()
    expected = [np.linalg.norm(p[i] - np.eye(CLASSES)[Y[i]]) for i in range(N)]
    close(scores.el2n(z, Y), torch.tensor(expected))
    # It is the norm of the loss's gradient by the logits.
    slope = torch.func.grad(lambda z: F.cross_entropy(z, Y, reduction="sum"))(z)
    close(scores.el2n(z, Y), torch.linalg.vector_norm(slope, dim=1))
    several = torch.stack([logits(p, X) for p in CHECKPOINTS])
    close(scores.el2n(several, Y), torch.stack([scores.el2n(z, Y) for z in several]).mean(0))
    close(scores.el2n(z, Y.to(torch.uint8)), scores.el2n(z, Y))
    right = torch.tensor([[200.0, 0.0]], dtype=torch.bfloat16)
    assert scores.el2n(right, torch.tensor([0])) == 0 and scores.el2n(right, torch.tensor([1])) == 2**0.5


def input_gradient(params, i):
    x = X[i].clone().requires_grad_()
    logits(params, x[None])[0, Y[i]].backward()
    return x.grad.numpy()


def test_vog():
    expected = [np.stack([input_gradient(p, i) for p in CHECKPOINTS]).var(0).mean() for i in range(N)]
    close(scores.vog(logits, CHECKPOINTS, X, Y), torch.tensor(expected))
    out = scores.vog(logits, [PARAMS] * 4, X, Y)  # nothing changes
    assert 0 <= out.min() and out.max() < 1e-30
    close(scores.vog(logits, CHECKPOINTS, X, Y.to(torch.uint8)), torch.tensor(expected))
    # Images: the mean is over all entries.
    images = scores.vog(lambda p, x: logits(p, x.flatten(1)), CHECKPOINTS, X.reshape(N, 1, 2, 2), Y)
    close(images, torch.tensor(expected))


def test_normalised_within_class():
    values = random.normal(random.key(4), (N,), F64)
    out = scores.normalised_within_class(values, Y, CLASSES)
    for label in range(CLASSES):
        own = values[label == Y]
        close(out[label == Y], (own - own.mean()) / own.std(correction=0))
    close(scores.normalised_within_class(values, Y.to(torch.uint8), CLASSES), out)
    # A class of one, a class of equal scores, a class of none.
    out = scores.normalised_within_class(torch.tensor([0.1, 5.0, 0.1, 0.1]), torch.tensor([0, 2, 0, 0]), 4)
    assert out.tolist() == [0, 0, 0, 0]


def test_forgetting_events():
    right = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 1, 1, 0], [1, 0, 1, 0, 1]], dtype=torch.bool)
    assert scores.forgetting_events(right).tolist() == [1, float("inf"), 0, 2, 0]


# --- alignment


def test_cosine_with_the_mean_and_with_a_direction():
    cosine = torch.nn.functional.cosine_similarity
    close(scores.gradient_cosine(losses, PARAMS, BATCH), cosine(G, G.mean(0, keepdim=True)))
    close(scores.gradient_cosine(losses, PARAMS, BATCH, CHECKPOINTS[1]), cosine(G, ravel(CHECKPOINTS[1])[None]))
    nothing = tree.map(torch.zeros_like, PARAMS)
    assert scores.gradient_cosine(losses, PARAMS, BATCH, nothing).tolist() == [0.0] * N


def test_cosine_matrix():
    close(scores.cosine_matrix(G @ G.T), unit(G) @ unit(G).T)
    gram = torch.stack([G @ G.T, 4 * (G @ G.T)])
    close(scores.cosine_matrix(gram), (unit(G) @ unit(G).T).expand(2, N, N))
    padded = torch.block_diag(G @ G.T, torch.zeros(1, 1, dtype=F64))
    assert scores.cosine_matrix(padded)[-1].tolist() == [0.0] * (N + 1)


def unit(rows):
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


# --- TracIn


def test_task_gram():
    """The Gram matrix of four losses of the same parameters, by plain autograd one after the other."""

    def tasks(params):
        per_example = losses(params, BATCH)
        return torch.stack([per_example.mean(), -per_example[0], per_example[1:3].sum(), per_example.square().mean()])

    leaves = [leaf.clone().requires_grad_() for leaf in tree.leaves(PARAMS)]
    values = tasks(tree.unflatten(PARAMS, leaves))
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(v, leaves, retain_graph=True)]) for v in values]
    gram = scores.task_gram(tasks, PARAMS)
    close(gram, torch.stack(rows) @ torch.stack(rows).T)
    close(scores.cosine_matrix(gram).diagonal(), torch.ones(4, dtype=F64))
    with pytest.raises(ValueError, match=r"task_gram: the losses have shape \(\); expected one per task, \(K,\)"):
        scores.task_gram(lambda p: tasks(p).sum(), PARAMS)


def test_tracin():
    expected = sum(r * rows(p, BATCH) @ rows(p, OTHERS).T for p, r in zip(CHECKPOINTS, RATES, strict=True))
    close(scores.tracin(losses, CHECKPOINTS, RATES, BATCH, OTHERS), expected)
    close(scores.tracin(losses, CHECKPOINTS, RATES, BATCH, OTHERS, chunk=3), expected)
    close(scores.tracin_on_mean(losses, CHECKPOINTS, RATES, BATCH, OTHERS), expected.mean(1))
    close(scores.gradient_products(losses, PARAMS, BATCH, OTHERS, chunk=2), G @ H.T)


def test_tracin_on_one_test_example_and_self():
    whole = scores.tracin(losses, CHECKPOINTS, RATES, BATCH, BATCH)
    for i in (0, 4):
        one = tree.map(lambda x, i=i: x[i : i + 1], BATCH)
        close(scores.tracin_on_mean(losses, CHECKPOINTS, RATES, BATCH, one), whole[:, i])
    close(scores.tracin_self(losses, CHECKPOINTS, RATES, BATCH), whole.diagonal())


def test_tracin_predicts_what_a_step_does():
    """To first order: a step of gradient descent on z lowers the loss of z' by η <g_z, g_z'>."""
    rate, predicted = 1e-6, scores.tracin(losses, [PARAMS], [1e-6], BATCH, OTHERS)
    for i in range(N):
        gradient = torch.func.grad(lambda p, i=i: losses(p, BATCH)[i])(PARAMS)
        stepped = tree.map(lambda p, g: p - rate * g, PARAMS, gradient)
        fall = losses(PARAMS, OTHERS) - losses(stepped, OTHERS)
        close(fall, predicted[i], rtol=1e-3, atol=1e-10)


# --- the tangent kernel and the Fisher matrix


def test_empirical_ntk_is_the_product_of_dense_jacobians():
    j, k = jacobian(PARAMS, X), jacobian(PARAMS, OTHERS[0])
    close(scores.empirical_ntk(logits, PARAMS, X, OTHERS[0]), torch.einsum("ncp,mdp->nmcd", j, k))
    whole = scores.empirical_ntk(logits, PARAMS, X, chunk=2)
    close(whole, torch.einsum("ncp,mdp->nmcd", j, j))
    close(scores.ntk_trace(logits, PARAMS, X), whole.diagonal(dim1=2, dim2=3).sum(2))
    close(scores.pseudo_ntk(logits, PARAMS, X), whole.sum((2, 3)) / CLASSES)
    matrix = whole.transpose(1, 2).reshape(N * CLASSES, N * CLASSES)
    close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_kernel_predicts_the_motion_under_gradient_flow():
    """df/dt = -K dL/df: the outputs after a small step on the summed loss."""
    slope = torch.func.grad(lambda z: F.cross_entropy(z, Y, reduction="sum"))(logits(PARAMS, X))
    motion = -torch.einsum("nmcd,md->nc", scores.empirical_ntk(logits, PARAMS, OTHERS[0], X), slope)
    gradient = torch.func.grad(lambda p: losses(p, BATCH).sum())(PARAMS)
    stepped = tree.map(lambda p, g: p - 1e-6 * g, PARAMS, gradient)
    moved = (logits(stepped, OTHERS[0]) - logits(PARAMS, OTHERS[0])) / 1e-6
    close(moved, motion, rtol=1e-4, atol=1e-4)


def test_empirical_fisher_diagonal():
    close(ravel(scores.empirical_fisher_diagonal(losses, PARAMS, BATCH)), G.square().mean(0))


def test_fisher_diagonal_is_that_of_the_ggn():
    """Exactly, since the Fisher matrix of a softmax is the Gauss-Newton matrix of its cross entropy."""
    size = len(ravel(PARAMS))
    columns = []
    for i in range(size):
        eye = torch.zeros(size, dtype=F64).index_fill(0, torch.tensor([i]), 1.0)
        vector = tree.unflatten(
            PARAMS,
            [
                part.reshape(leaf.shape)
                for part, leaf in zip(
                    eye.split([x.numel() for x in tree.leaves(PARAMS)]), tree.leaves(PARAMS), strict=True
                )
            ],
        )
        product = ggn_vp(lambda p: logits(p, X), lambda z: F.cross_entropy(z, Y), PARAMS, vector)
        columns.append(ravel(product)[i])
    close(ravel(scores.fisher_diagonal(logits, PARAMS, X)), torch.stack(columns))


def test_sampled_fisher_diagonal():
    exact = ravel(scores.fisher_diagonal(logits, PARAMS, X))
    key = random.key(5)
    # The same examples 60 times over: 300 labels for each.
    out = [ravel(scores.fisher_diagonal(logits, PARAMS, X.repeat(n, 1), key, 5)) for n in (1, 60)]
    errors = [float(torch.linalg.vector_norm(x - exact) / torch.linalg.vector_norm(exact)) for x in out]
    assert errors[1] < 0.1 and errors[1] < 0.5 * errors[0]
    # The squares of the gradients of the labels that were sampled.
    labels = random.categorical(key, logits(PARAMS, X), shape=(3, N))
    expected = torch.stack([rows(PARAMS, (X, label)).square().mean(0) for label in labels]).mean(0)
    close(ravel(scores.fisher_diagonal(logits, PARAMS, X, key, 3)), expected)


# --- every function: pure, and one graph


# A single layer and two classes: a graph for each function is slow to trace.
SMALL = [{"weight": x} for x in random.normal(random.key(7), (2, 2, D), F64)]
TWO = (X, Y % 2)
AFTER = tree.map(lambda x: x[:3], (OTHERS[0], OTHERS[1] % 2))


def small(p, x):
    return F.linear(torch.tanh(x), p["weight"])


def small_losses(p, batch):
    return F.cross_entropy(small(p, batch[0]), batch[1], reduction="none")


def doubled(v):
    return tree.map(lambda x: 2 * x, v)


VALUES, VECTORS, _ = top_eigenpairs(
    lambda v: ggn_vp(lambda p: small(p, X), lambda z: F.cross_entropy(z, TWO[1]), SMALL[0], v), SMALL[1], 3, 4
)
EVERY = {
    "grand": lambda p, b: scores.grand(small_losses, p, b),
    "grand_ensemble": lambda p, b: scores.grand(small_losses, tree.stack([p, SMALL[1]]), b, ensemble=True),
    "el2n": lambda p, b: scores.el2n(small(p, b[0]), b[1]),
    "vog": lambda p, b: scores.vog(small, [p, SMALL[1]], *b),
    "normalised": lambda p, b: scores.normalised_within_class(b[0][:, 0], b[1], 2),
    "forgetting": lambda p, b: scores.forgetting_events(b[0] > 0),
    "cosine": lambda p, b: scores.gradient_cosine(small_losses, p, b),
    "cosine_matrix": lambda p, b: scores.cosine_matrix(b[0] @ b[0].T),
    "tracin": lambda p, b: scores.tracin(small_losses, [p], RATES[:1], b, AFTER, chunk=4),
    "tracin_on_mean": lambda p, b: scores.tracin_on_mean(small_losses, [p], RATES[:1], b, AFTER),
    "tracin_self": lambda p, b: scores.tracin_self(small_losses, [p], RATES[:1], b),
    "influence": lambda p, b: scores.influence(small_losses, p, b, AFTER, doubled),
    "self_influence": lambda p, b: scores.self_influence(small_losses, p, b, doubled),
    "projections": lambda p, b: scores.projections(small_losses, p, b, VECTORS),
    "low_rank_influence": lambda p, b: scores.low_rank_influence(small_losses, p, b, AFTER, VALUES, VECTORS, 0.1),
    "low_rank_self": lambda p, b: scores.low_rank_self_influence(
        small_losses, p, b, VALUES, VECTORS, 0.1, complement=True
    ),
    "empirical_ntk": lambda p, b: scores.empirical_ntk(small, p, b[0], AFTER[0]),
    "ntk_trace": lambda p, b: scores.ntk_trace(small, p, b[0]),
    "pseudo_ntk": lambda p, b: scores.pseudo_ntk(small, p, b[0]),
    "empirical_fisher": lambda p, b: scores.empirical_fisher_diagonal(small_losses, p, b),
    "fisher": lambda p, b: scores.fisher_diagonal(small, p, b[0]),
    "sampled_fisher": lambda p, b: scores.fisher_diagonal(small, p, b[0], random.key(6)),
}
# Made of the same parts as one of the others, whose graph says as much.
ALIKE = ("tracin_self", "influence", "projections", "low_rank_influence", "pseudo_ntk", "empirical_fisher", "fisher")
ALIKE += ("empirical_ntk",)


@pytest.mark.parametrize("name", EVERY)
def test_pure(name):
    inputs = SMALL, TWO, AFTER, VALUES, VECTORS
    before, state = tree.map(torch.clone, inputs), torch.get_rng_state()
    first, second = EVERY[name](SMALL[0], TWO), EVERY[name](SMALL[0], TWO)
    for a, b in zip(tree.leaves((first, inputs)), tree.leaves((second, before)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())
    assert all(leaf.isfinite().all() or name == "forgetting" for leaf in tree.leaves(first))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in EVERY]
)
def test_compiled_is_one_graph_with_the_same_values(name):
    torch._dynamo.reset()
    compiled = torch.compile(EVERY[name], fullgraph=True, dynamic=False, backend="aot_eager")
    close(compiled(SMALL[0], TWO), EVERY[name](SMALL[0], TWO))
    torch._dynamo.reset()


# --- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores.el2n(X[0], Y), "el2n: the logits are torch.float64 (4,); expected floating-point"),
        (lambda: scores.el2n(X, Y[:3]), "el2n: the labels have shape (3,); expected one per example, (7,)"),
        (lambda: scores.el2n(X, Y.double()), "el2n: the labels are torch.float64; expected integers"),
        (lambda: scores.vog(logits, [PARAMS], X, Y), "vog: 1 checkpoints; a variance needs at least 2"),
        (lambda: scores.vog(lambda p, x: x[0], CHECKPOINTS, X, Y), "vog: the logits are torch.float64 (4,)"),
        (lambda: scores.normalised_within_class(X, Y, 3), "the scores have shape (7, 4); expected (N,)"),
        (lambda: scores.forgetting_events(X), "expected bool (evaluations, N), got torch.float64 (7, 4)"),
        (lambda: scores.cosine_matrix(X), "the Gram matrix has shape (7, 4); expected (..., N, N)"),
        (lambda: scores.tracin_self(losses, CHECKPOINTS, [0.1], BATCH), "3 checkpoints and 1 learning rates"),
        (lambda: scores.tracin(losses, [], [], BATCH, OTHERS), "0 checkpoints and 0 learning rates"),
        (lambda: scores.empirical_ntk(losses, PARAMS, BATCH), "empirical_ntk: the outputs have shape (1,)"),
        (lambda: scores.ntk_trace(losses, PARAMS, BATCH), "ntk_trace: the outputs have shape (1,); expected (1, C)"),
        (lambda: scores.fisher_diagonal(losses, PARAMS, BATCH), "fisher_diagonal: the logits are torch.float64 (7,)"),
        (lambda: scores.fisher_diagonal(logits, PARAMS, X, random.key(0), 0), "samples is 0; expected at least 1"),
        (
            lambda: scores.low_rank_self_influence(losses, PARAMS, BATCH, None, None, complement=True),
            "complement divides by damping, which is 0.0; expected above 0",
        ),
        (
            lambda: scores.low_rank_influence(small_losses, SMALL[0], TWO, AFTER, VALUES[:2], VECTORS),
            "low_rank_influence: values (2,), vectors 'weight' (3, 2, 4); expected (count,) and (count, ...)",
        ),
        (
            lambda: scores.low_rank_self_influence(small_losses, SMALL[0], TWO, VALUES, VECTORS, -float(VALUES[1])),
            "low_rank_self_influence: an eigenvalue plus damping is zero or not finite",
        ),
        (lambda: scores.gradient_cosine(losses, PARAMS, BATCH, PARAMS["a"]), "the direction lacks "),
    ],
    ids=range(18),
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError, PerExampleError), match=re.escape(message)):
        call()


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_label_that_is_no_class(label):
    """An error, never a score."""
    labels = Y.clone().fill_(label)
    for score in (
        lambda: scores.el2n(X[:, :CLASSES], labels),
        lambda: scores.vog(logits, CHECKPOINTS, X, labels),
        lambda: scores.normalised_within_class(X[:, 0], labels, CLASSES),
    ):
        with pytest.raises(RuntimeError, match="out of bounds"):
            score()
