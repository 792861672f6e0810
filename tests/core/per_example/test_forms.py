"""Every way of reducing forms against the gradients they stand for."""

import pytest
import torch

from core.per_example.forms import (
    Dense,
    Outer,
    Rows,
    Shifted,
    combine,
    compress,
    inner,
    materialise,
    reduce,
    weighted_sum,
)

N = 4


def normal(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def shifted(groups, p, c, time, offsets, sign=1.0):
    longer = time + max(offsets)
    return Shifted(normal(N, groups, time, p) * sign, normal(N, groups, longer, c).flip(0), offsets)


def outer(groups, p, d, time, sign=1.0):
    return Outer(normal(N, groups, time, p) * sign, normal(N, groups, time, d).flip(0))


def rows(vocabulary, width, time):
    generator = torch.Generator().manual_seed(time)
    return Rows(torch.randint(vocabulary, (N, time), generator=generator), normal(N, time, width))


def cast(form, dtype):
    return type(form)(*(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in form))


def dense(*shape):
    return Dense(normal(N, *shape))


# name: (forms, shape of the parameter, its methods)
CASES = {
    "outer": ([outer(1, 5, 4, 6)], (5, 4), ("ghost", "formed")),
    "outer of one row": ([outer(1, 5, 4, 1)], (5, 4), ("closed", "ghost", "formed")),
    "outer of one row in groups": ([outer(3, 4, 2, 1)], (12, 2), ("closed", "ghost", "formed")),
    "outer in groups": ([outer(3, 4, 2, 5)], (12, 2, 1), ("ghost", "formed")),
    "outer used twice": ([outer(1, 5, 4, 2), outer(1, 5, 4, 3, -2.0)], (5, 4), ("ghost", "formed")),
    "a kernel": ([outer(2, 3, 8, 4)], (6, 2, 2, 2), ("ghost", "formed")),
    "groups that differ": ([outer(1, 4, 6, 2), outer(2, 2, 6, 3)], (4, 6), ("formed",)),
    "windows": ([shifted(1, 5, 3, 7, (0, 2, 5))], (5, 3, 3), ("ghost", "formed")),
    "windows of one row in groups": ([shifted(2, 4, 3, 1, (0, 1))], (8, 3, 2), ("closed", "ghost", "formed")),
    "windows twice": (
        [shifted(2, 3, 2, 6, (0, 3, 4, 9)), shifted(2, 3, 2, 4, (0, 1, 2, 3), -2.0)],
        (6, 2, 2, 2),
        ("ghost", "formed"),
    ),
    "windows in groups that differ": (
        [shifted(1, 4, 6, 2, (0, 1)), shifted(2, 2, 6, 3, (0, 2))],
        (4, 6, 2),
        ("formed",),
    ),
    "windows and outer": ([shifted(1, 5, 3, 7, (0, 4)), outer(1, 5, 6, 3)], (5, 3, 2), ("formed",)),
    "windows and dense": ([shifted(3, 2, 3, 7, (0, 4)), dense(6, 3, 2)], (6, 3, 2), ("formed",)),
    "rows": ([rows(5, 3, 7)], (5, 3), ("compressed", "ghost", "formed")),
    "rows twice": ([rows(5, 3, 7), rows(5, 3, 4)], (5, 3), ("compressed", "ghost", "formed")),
    "rows of a large table": ([rows(300, 3, 4)], (300, 3), ("compressed", "ghost")),
    "rows and outer": ([rows(5, 4, 3), outer(1, 5, 4, 3)], (5, 4), ("ghost", "formed")),
    "rows, two outers": ([rows(5, 4, 3), outer(1, 5, 4, 3), outer(1, 5, 4, 1)], (5, 4), ("ghost", "formed")),
    "outer and dense": ([outer(1, 5, 4, 3), dense(5, 4)], (5, 4), ("formed",)),
    "groups and dense": ([outer(3, 4, 2, 5), dense(12, 2, 1)], (12, 2, 1), ("formed",)),
    "rows and dense": ([rows(5, 4, 3), dense(5, 4)], (5, 4), ("formed",)),
    "everything": ([rows(5, 4, 3), dense(5, 4), outer(1, 5, 4, 3), dense(5, 4), rows(5, 4, 1)], (5, 4), ("formed",)),
    "dense": ([dense(3, 2)], (3, 2), ("dense", "formed")),
    "dense scalar, twice": ([dense(), dense()], (), ("dense",)),
}
WANT = ("norm", "dot", "gram", "square", "sum")


def quantities_of(g, direction):
    flat = g.reshape(N, -1)
    return {
        "norm": flat.square().sum(1),
        "dot": flat @ direction.flatten(),
        "gram": flat @ flat.T,
        "square": g.square().sum(0),
        "sum": g.sum(0),
    }


ways = pytest.mark.parametrize(("name", "method"), [(n, m) for n, (_, _, methods) in CASES.items() for m in methods])


@ways
@pytest.mark.parametrize("budget", [2**26, 400, 1])
def test_reduce(name, method, budget):
    forms, shape, _ = CASES[name]
    g, direction = materialise(forms, shape), normal(*shape)
    assert g.shape == (N, *shape)
    expected = quantities_of(g, direction)
    for want in (WANT, ("norm",), ("square", "sum"), ("gram", "dot"), ()):
        out = reduce(forms, shape, want, method, direction, budget)
        assert set(out) == set(want)
        for quantity in want:
            torch.testing.assert_close(
                out[quantity], expected[quantity], rtol=1e-11, atol=1e-11, msg=lambda m, q=quantity: f"{q}: {m}"
            )


@ways
def test_reduce_of_half_precision_is_wide(name, method):
    """Quantities come in float32, and as close as operands rounded to bfloat16 allow."""
    forms, shape, _ = CASES[name]
    half = [cast(f, torch.bfloat16) for f in forms]
    rounded = [cast(f, torch.float64) for f in half]
    direction = normal(*shape)
    expected = quantities_of(materialise(rounded, shape), direction)
    out = reduce(half, shape, ("norm", "dot"), method, direction.float())
    scale = {"norm": expected["norm"].max(), "dot": (expected["norm"].max().sqrt() * direction.norm())}
    for quantity, value in out.items():
        assert value.dtype == torch.float32
        assert float((value - expected[quantity]).abs().max() / scale[quantity]) < 2e-2


@pytest.mark.parametrize("name", CASES)
def test_weighted_sum(name):
    forms, shape, _ = CASES[name]
    g, weights = materialise(forms, shape), torch.tensor([0.5, -2.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(weighted_sum(forms, weights, shape), torch.einsum("n,n...->...", weights, g))
    torch.testing.assert_close(weighted_sum(forms, None, shape), g.sum(0))


@pytest.mark.parametrize("name", CASES)
def test_combine_keeps_the_gradient(name):
    forms, shape, _ = CASES[name]
    joined = combine(forms, shape)
    kinds = [type(f) for f in joined if not isinstance(f, Shifted)]
    assert len(set(kinds)) == len(kinds)
    torch.testing.assert_close(materialise(joined, shape), materialise(forms, shape))


def test_materialise_by_hand():
    a, b = outer(2, 3, 4, 5), rows(3, 2, 6)
    table = torch.zeros(N, 3, 2, dtype=torch.float64)
    for n in range(N):
        for place, i in enumerate(b.ids[n]):
            table[n, i] += b.values[n, place]
    torch.testing.assert_close(materialise([b], (3, 2)), table)
    by_hand = torch.stack([torch.cat([a.rows[n, g].T @ a.columns[n, g] for g in range(2)]) for n in range(N)])
    torch.testing.assert_close(materialise([a], (6, 4)), by_hand)


def test_compress_leaves_each_id_once():
    form = rows(3, 2, 9)
    once = compress(form)
    torch.testing.assert_close(materialise([once], (3, 2)), materialise([form], (3, 2)))
    for n in range(N):
        used = once.ids[n][once.values[n].abs().sum(1) > 0]
        assert len(used) == len(set(used.tolist()))


def test_inner_products_of_pairs():
    shape = (5, 4)
    forms = [outer(1, 5, 4, 3), outer(1, 5, 4, 6), rows(5, 4, 3), rows(5, 4, 7)]
    for a in forms:
        for b in forms:
            expected = (materialise([a], shape) * materialise([b], shape)).sum((1, 2))
            torch.testing.assert_close(inner(a, b), expected, rtol=1e-11, atol=1e-11)


def test_ghost_norms_that_cancel_are_not_negative():
    """Rows that cancel: the gradient is 0 but for rounding, its terms are not."""
    one, columns = normal(N, 1, 1, 6).float(), normal(N, 1, 1, 5).float()
    form = Outer(torch.cat([one, -one], 2), torch.cat([columns, columns * (1 + 1e-6)], 2))
    exact = materialise([Outer(*(x.double() for x in form))], (6, 5)).square().sum((1, 2))
    out = reduce([form], (6, 5), ("norm",), "ghost")["norm"]
    assert out.dtype == torch.float32 and (out >= 0).all()
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=0.0)
