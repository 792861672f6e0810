"""Influence functions against dense solves, and against training again without the example, in float64."""

import re

import pytest
import torch
from torch.nn import functional as F

from core import random, scores, tree
from core.curvature import dense, ggn_vp, low_rank_inverse, probe, top_eigenpairs
from core.curvature.vectors import ravel
from core.transforms import hvp

F64 = torch.float64
close = torch.testing.assert_close
N, M, D, CLASSES, DECAY = 80, 6, 5, 3, 0.05


def examples(seed, count):
    """Inputs, and labels that they tell but for a little noise."""
    x = random.normal(random.key(seed), (count, D), F64)
    teacher = 2 * random.normal(random.key(100), (D, CLASSES), F64)
    return x, random.categorical(random.key(seed + 1), x @ teacher)


TRAIN, TEST = examples(1, N), examples(11, M)


def logits(p, x):
    return F.linear(x, p["weight"], p["bias"])


def losses(p, batch):
    return F.cross_entropy(logits(p, batch[0]), batch[1], reduction="none")


def objective(p, batch):
    """Mean loss and weight decay, together strictly convex; the sum is divided by N where one is left out too."""
    return losses(p, batch).sum() / N + 0.5 * DECAY * sum(leaf.square().sum() for leaf in tree.leaves(p))


ZEROS = {"bias": torch.zeros(CLASSES, dtype=F64), "weight": torch.zeros(CLASSES, D, dtype=F64)}


def newton(f, p):
    """The minimum of a convex function of the parameters, by Newton's method from `p`."""
    for _ in range(20):
        slope = ravel(torch.func.grad(f)(p))
        if slope.abs().max() < 1e-13:
            return p
        step = torch.linalg.solve(dense(lambda v, p=p: hvp(f, p, v)[1], p), slope)
        p = {"bias": p["bias"] - step[:CLASSES], "weight": p["weight"] - step[CLASSES:].reshape(CLASSES, D)}
    raise AssertionError("Newton's method did not converge")


PARAMS = newton(lambda p: objective(p, TRAIN), ZEROS)


def product(v):
    return hvp(objective, PARAMS, v, TRAIN)[1]


def ggn(v):
    return ggn_vp(lambda p: logits(p, TRAIN[0]), lambda z: F.cross_entropy(z, TRAIN[1]), PARAMS, v)


HESSIAN, GGN = dense(product, PARAMS), dense(ggn, PARAMS)
INVERSE = scores.inverse_by_conjugate_gradient(product, tolerance=1e-12)


def rows(batch):
    def one(p, x, y):
        return losses(p, (x[None], y[None]))[0]

    return torch.stack([ravel(torch.func.grad(one)(PARAMS, x, y)) for x, y in zip(*batch, strict=True)])


G, T = rows(TRAIN), rows(TEST)


def ranks(x):
    return x.argsort().argsort().double()


def test_influence_is_the_dense_solve():
    expected = -G @ torch.linalg.solve(HESSIAN, T.T)
    close(scores.influence(losses, PARAMS, TRAIN, TEST, INVERSE), expected.mean(1))
    one = tree.map(lambda x: x[2:3], TEST)
    close(scores.influence(losses, PARAMS, TRAIN, one, INVERSE), expected[:, 2])
    few = tree.map(lambda x: x[:8], TRAIN)
    expected = (G[:8] * torch.linalg.solve(HESSIAN, G[:8].T).T).sum(1)
    close(scores.self_influence(losses, PARAMS, few, INVERSE), expected)
    close(scores.self_influence(losses, PARAMS, few, INVERSE, chunk=3), expected)


def test_damping():
    inverse = scores.inverse_by_conjugate_gradient(ggn, damping=0.3, tolerance=1e-12)
    damped = GGN + 0.3 * torch.eye(len(GGN), dtype=F64)
    expected = -G @ torch.linalg.solve(damped, T.mean(0))
    close(scores.influence(losses, PARAMS, TRAIN, TEST, inverse), expected)


@pytest.mark.slow
def test_leaving_an_example_out():
    """The change of the losses after training again without each example in turn, and what is predicted."""
    before, changes, own = losses(PARAMS, TEST), [], []
    for i in range(N):
        rest = tree.map(lambda x, i=i: torch.cat([x[:i], x[i + 1 :]]), TRAIN)
        retrained = newton(lambda p, rest=rest: objective(p, rest), PARAMS)
        changes.append(losses(retrained, TEST) - before)
        own.append((losses(retrained, TRAIN) - losses(PARAMS, TRAIN))[i])
    changes, own = torch.stack(changes), torch.stack(own)
    predicted = -scores.influence(losses, PARAMS, TRAIN, TEST, INVERSE) / N
    correlation = torch.corrcoef(torch.stack([ranks(predicted), ranks(changes.mean(1))]))[0, 1]
    assert correlation > 0.98
    assert torch.corrcoef(torch.stack([predicted, changes.mean(1)]))[0, 1] > 0.98
    alone = (G * torch.linalg.solve(HESSIAN, G.T).T).sum(1) / N
    assert torch.corrcoef(torch.stack([ranks(alone), ranks(own)]))[0, 1] > 0.98


def test_weight_of_an_example():
    """dL(z')/dε itself, by training with a little more weight on one example."""
    epsilon = 1e-5
    for i in (0, 17):
        more = tree.map(lambda x, i=i: torch.cat([x, x[i : i + 1]]), TRAIN)

        def heavier(p, more=more):
            weights = torch.cat([torch.full((N,), 1 / N, dtype=F64), torch.tensor([epsilon], dtype=F64)])
            return losses(p, more) @ weights + 0.5 * DECAY * sum(leaf.square().sum() for leaf in tree.leaves(p))

        slope = (losses(newton(heavier, PARAMS), TEST) - losses(PARAMS, TEST)).mean() / epsilon
        close(scores.influence(losses, PARAMS, TRAIN, TEST, INVERSE)[i], slope, rtol=1e-3, atol=1e-6)


# --- low rank


START = probe(random.key(3), PARAMS)


def test_projections_are_products_with_the_gradients():
    vectors = tree.stack([probe(key, PARAMS) for key in random.split(random.key(4), 3)])
    expected = G @ torch.stack([ravel(v) for v in tree.unstack(vectors)]).T
    close(scores.projections(losses, PARAMS, TRAIN, vectors), expected)
    close(scores.projections(losses, PARAMS, TRAIN, vectors, chunk=2), expected)


def test_all_eigenpairs_give_the_dense_solve():
    # But those of the D + 1 directions that shift all logits alike, in which no gradient lies.
    values, vectors, _ = top_eigenpairs(product, START, len(HESSIAN) - D - 1, 100)
    close(scores.low_rank_self_influence(losses, PARAMS, TRAIN, values, vectors, 0.1), damped_self(HESSIAN, 0.1))
    expected = -G @ torch.linalg.solve(HESSIAN, T.T)
    close(scores.low_rank_influence(losses, PARAMS, TRAIN, TEST, values, vectors), expected)


def damped_self(matrix, damping):
    return (G * torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=F64), G.T).T).sum(1)


@pytest.mark.parametrize("complement", [False, True])
def test_few_eigenpairs(complement):
    values, vectors, _ = top_eigenpairs(ggn, START, 5, 30, which="magnitude")
    inverse = low_rank_inverse(values, vectors, 0.2, complement=complement)
    out = scores.low_rank_self_influence(losses, PARAMS, TRAIN, values, vectors, 0.2, complement=complement)
    close(out, scores.self_influence(losses, PARAMS, TRAIN, inverse))
    exact_values, exact_vectors = torch.linalg.eigh(GGN)
    part = exact_vectors[:, -5:] @ torch.diag(exact_values[-5:]) @ exact_vectors[:, -5:].T
    if complement:
        close(out, damped_self(part, 0.2))
    else:
        whole = scores.low_rank_influence(losses, PARAMS, TRAIN, TRAIN, values, vectors, 0.2)
        close(out, -whole.diagonal())
        close(whole.mean(1), scores.influence(losses, PARAMS, TRAIN, TRAIN, inverse))


def test_wrong_labels_have_more_self_influence():
    x, right = TRAIN[0], (TRAIN[0] @ random.normal(random.key(100), (D, CLASSES), F64)).argmax(1)
    wrong = torch.arange(N) % 10 == 0
    flipped = (x, torch.where(wrong, (right + 1) % CLASSES, right))
    params = newton(lambda p: objective(p, flipped), ZEROS)
    values, vectors, _ = top_eigenpairs(lambda v: hvp(objective, params, v, flipped)[1], START, 12, 100)
    out = scores.low_rank_self_influence(losses, params, flipped, values, vectors)
    assert out[wrong].median() > 3 * out[~wrong].median()


# --- errors


def test_solve_that_does_not_get_there():
    inverse = scores.inverse_by_conjugate_gradient(product, steps=2, tolerance=1e-10)
    with pytest.raises(
        ValueError, match=r"the relative residual is .* after 2 steps, above the tolerance 1.0e-10; raise"
    ):
        scores.influence(losses, PARAMS, TRAIN, TEST, inverse)


def test_curvature_that_is_not_positive():
    inverse = scores.inverse_by_conjugate_gradient(lambda v: tree.map(torch.neg, v), damping=0.1)
    with pytest.raises(ValueError, match=re.escape("negative or zero curvature, ")):
        scores.self_influence(losses, PARAMS, TRAIN, inverse)
