"""Trees: every function against optree or a plain statement of its law, and inside torch.compile and torch.func."""

from collections import OrderedDict
from copy import deepcopy
from typing import NamedTuple

import optree
import pytest
import torch

from core import tree
from core.spec import Param


class Moments(NamedTuple):
    first: object
    second: object


def example():
    """Unsorted dicts, nested lists, tuples, a NamedTuple, an empty layer and a missing value."""
    return {
        "out": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)},
        "blocks": [{"scale": torch.full((3,), 2.0), "norm": {}}, {}, {"scale": torch.zeros(3)}],
        "pair": (torch.tensor(1.0), [torch.tensor(2.0), None]),
        "state": Moments(first={"b": torch.ones(1), "a": torch.zeros(1)}, second=torch.tensor([3, 4])),
    }


NAMES = [
    "blocks.0.scale",
    "blocks.2.scale",
    "out.bias",
    "out.weight",
    "pair.0",
    "pair.1.0",
    "state.first.a",
    "state.first.b",
    "state.second",
]


def equal(a, b):
    if optree.tree_structure(a) != optree.tree_structure(b):
        return False
    return all(torch.equal(x, y) for x, y in zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True))


def sorted_everywhere(node):
    if isinstance(node, dict):
        return list(node) == sorted(node) and all(sorted_everywhere(child) for child in node.values())
    return not isinstance(node, (list, tuple)) or all(sorted_everywhere(child) for child in node)


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")


def test_names_follow_the_leaves():
    t = example()
    assert tree.names(t) == NAMES
    leaves = optree.tree_leaves(t)
    assert all(a is b for a, b in zip(tree.leaves(t), leaves, strict=True))
    assert all(a is b for (_, a), b in zip(tree.items(t), leaves, strict=True))
    assert all(tree.get(t, name) is leaf for name, leaf in tree.items(t))
    assert tree.names(torch.ones(2)) == [""] and tree.names({}) == []


def test_names_follow_the_leaves_of_an_ordered_dict():
    t = OrderedDict(b=torch.tensor(1.0), a=torch.tensor(2.0))
    assert tree.map_with_names(lambda name, x: (name, x.item()), t) == OrderedDict(b=("b", 1.0), a=("a", 2.0))
    assert list(tree.sort(t)) == ["a", "b"] and tree.sort(t)["a"] is t["a"]


def test_map_equals_optree():
    t = example()
    assert equal(tree.map(lambda x, y: x + 2 * y, t, t), optree.tree_map(lambda x: 3 * x, t))
    named = tree.map_with_names(lambda name, x: (name, x), t)
    assert [pair[0] for pair in optree.tree_leaves(named, is_leaf=lambda x: isinstance(x, tuple) and x[0] in NAMES)]
    for like in (t, tree.structure(t)):
        assert equal(tree.unflatten(like, tree.leaves(t)), t)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": {"x": 1}, "b": [1, 2]}, "'a.y' is missing"),
        ({"a": {"x": 1, "y": 2, "z": 3}, "b": [1, 2]}, "'a.z' is left over"),
        ({"a": {"x": 1, "y": 2}, "b": [1]}, r"'b\.1' is missing"),
        ({"a": {"x": 1, "y": 2}, "b": (1, 2)}, "at 'b', expected list, found tuple"),
        ({"a": 1, "b": [1, 2]}, "at 'a', expected dict, found int"),
        ([1, 2], "at the top, expected dict, found list"),
    ],
)
def test_map_names_the_path_that_differs(other, message):
    with pytest.raises(ValueError, match=message):
        tree.map(lambda x, y: x, {"a": {"x": 1, "y": 2}, "b": [3, 4]}, other)


def test_an_error_of_the_mapped_function_passes_through():
    def fail(x, y):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        tree.map(fail, [1], [2])


@pytest.mark.parametrize(
    "predicate",
    [
        lambda name, x: True,
        lambda name, x: False,
        lambda name, x: name.endswith("scale"),
        lambda name, x: not name.startswith("blocks"),
        lambda name, x: name in ("pair.1.0", "state.first.b"),
        lambda name, x: x.ndim > 0,
    ],
)
def test_merge_inverts_partition(predicate):
    t = example()
    first, second = tree.partition(t, predicate)
    assert set(tree.names(first)) == {name for name, x in tree.items(t) if predicate(name, x)}
    assert set(tree.names(second)) == set(NAMES) - set(tree.names(first))
    # Two orders: the halves know nothing of each other.
    assert equal(tree.merge(first, second), t)
    assert sorted_everywhere(first) and sorted_everywhere(second) and sorted_everywhere(tree.merge(first, second))
    assert tree.names(tree.merge(second, first)) == NAMES


@pytest.mark.parametrize(
    "t",
    [
        torch.ones(2),
        {},
        [],
        None,
        {"norm": {}, "w": torch.ones(1)},
        [(), torch.ones(1)],
        Moments(None, torch.ones(1)),
        [[], {"a": ()}, [torch.ones(1)]],
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False])
def test_merge_inverts_partition_at_the_edges(t, first):
    assert equal(tree.merge(*tree.partition(t, lambda name, x: first)), t)


def test_three_parts_merge():
    t = example()
    a, rest = tree.partition(t, lambda name, x: name.startswith("blocks"))
    b, c = tree.partition(rest, lambda name, x: name.startswith("state"))
    assert equal(tree.merge(a, b, c), t)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"x": {"y": 1}}, {"x": {"y": 2}}, r"at 'x\.y': both trees have something there, int and int"),
        ([1, {}], [{}, 2, 3], "at the top: .* list of 2 and list of 3"),
        ({"x": [1, {}]}, {"x": ({}, 2)}, "at 'x': .* list of 2 and tuple of 2"),
        (1, {"x": 1}, "at the top: .* int and dict of 1"),
    ],
)
def test_merge_names_where_two_trees_meet(a, b, message):
    with pytest.raises(ValueError, match=message):
        tree.merge(a, b)


def test_stack_and_unstack():
    ts = [tree.map(lambda x, i=i: x + i, example()) for i in range(3)]
    stacked = tree.stack(ts)
    assert equal(stacked, optree.tree_map(lambda *xs: torch.stack(xs), *ts))
    assert all(equal(a, b) for a, b in zip(tree.unstack(stacked), ts, strict=True))


def test_stack_and_unstack_name_what_does_not_fit():
    with pytest.raises(ValueError, match=r"'a\.w' has the shapes \(2,\), \(3,\)"):
        tree.stack([{"a": {"w": torch.ones(2)}}, {"a": {"w": torch.ones(3)}}])
    with pytest.raises(ValueError, match="'b' is missing"):
        tree.stack([{"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)}])
    with pytest.raises(ValueError, match="there are no trees"):
        tree.stack([])
    for t in ({"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2), "b": torch.tensor(1.0)}, {"b": {}}):
        with pytest.raises(ValueError, match="cannot unstack: .* found (none|a .*, b)"):
            tree.unstack(t)


def test_cast_and_move():
    t = {
        "w": torch.ones(2),
        "ids": torch.tensor([1, 2]),
        "on": torch.tensor(True),
        "n": 3,
        "half": torch.ones(1).half(),
    }
    cast = tree.cast(t, torch.bfloat16)
    assert {k: getattr(x, "dtype", None) for k, x in cast.items()} == {
        "w": torch.bfloat16,
        "ids": torch.int64,
        "on": torch.bool,
        "n": None,
        "half": torch.bfloat16,
    }
    moved = tree.move(t, "meta")
    assert all(x.is_meta for x in tree.leaves(moved) if isinstance(x, torch.Tensor)) and moved["n"] == 3


def test_count_table_and_norm():
    t = {"a": torch.ones(2, 3), "b": [torch.tensor(2.0), torch.ones(0)]}
    spec = {"a": Param((2, 3)), "b": [Param(()), Param((0,))]}
    assert tree.count(t) == tree.count(spec) == 7 and tree.count({}) == 0
    assert tree.table(t) == tree.table(spec)
    assert tree.table(spec).splitlines() == [
        "name   shape   dtype    numbers",
        "a      (2, 3)  float32        6",
        "b.0    ()      float32        1",
        "b.1    (0,)    float32        0",
        "total                         7",
    ]
    reference = torch.nn.utils.get_total_norm([t["a"], t["b"][0]])
    torch.testing.assert_close(tree.norm(t), reference)
    assert tree.norm({}) == 0
    # 4096 ones in bfloat16 would stop adding up at 256.
    assert tree.norm({"a": torch.ones(4096, dtype=torch.bfloat16)}) == 64.0


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1.0, 1e20, 1e35])
@pytest.mark.parametrize("mode", ["eager", "compiled", "vmap"])
def test_norm_at_every_scale(mode, scale):
    """In float32, squares of these vanish or overflow; the largest is within its range, as is the norm."""
    t = {"a": torch.tensor([3.0, 0.0, 0.0]) * scale, "b": [torch.tensor(4.0) * scale, torch.zeros(0)]}
    norm = compiled(tree.norm) if mode == "compiled" else tree.norm
    if mode == "vmap":
        actual = torch.func.vmap(norm)(tree.stack([tree.map(torch.ones_like, t), t]))[1]
    else:
        actual = norm(t)
    # Subnormal float32 has fewer digits.
    torch.testing.assert_close(actual / scale, torch.tensor(5.0), rtol=1e-4 if scale == 1e-40 else 1e-6, atol=0)
    assert actual.dtype == torch.float32


def test_norm_in_other_dtypes():
    assert tree.norm({"a": torch.full((4,), 6e4, dtype=torch.float16)}) == 2 * float(torch.tensor(6e4).half())
    assert tree.norm({"a": torch.full((4,), 1e-7, dtype=torch.float16)}) == 2 * float(torch.tensor(1e-7).half())
    assert tree.norm({"a": torch.full((4,), 1e30, dtype=torch.bfloat16)}).isfinite()
    assert tree.norm({"a": torch.ones(4, dtype=torch.float64)}).dtype == torch.float64
    assert tree.norm({"a": torch.tensor([1.0, torch.inf])}) == torch.inf
    assert tree.norm({"a": torch.tensor([1.0, torch.nan])}).isnan()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gradient_of_the_norm(scale):
    t = {"a": torch.tensor([3.0, 0.0]) * scale, "b": torch.tensor([4.0]) * scale}
    expected = {"a": torch.tensor([0.6, 0.0]), "b": torch.tensor([0.8])}
    torch.testing.assert_close(torch.func.grad(tree.norm)(t), expected)
    torch.testing.assert_close(compiled(torch.func.grad(tree.norm))(t), expected)
    leaf = t["a"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(tree.norm({**t, "a": leaf}), leaf)
    torch.testing.assert_close(gradient, expected["a"])
    assert not torch.func.grad(tree.norm)(tree.map(torch.zeros_like, t))["a"].any()


def test_keys_of_several_types():
    """They do not compare; optree orders them by type."""
    t = {"b": torch.ones(1), 2: {"w": torch.zeros(2)}, 1: torch.ones(3)}
    assert tree.names(t) == ["1", "2.w", "b"]
    assert all(a is b for a, b in zip(tree.leaves(t), [t[1], t[2]["w"], t["b"]], strict=True))
    assert list(tree.sort(t)) == [1, 2, "b"]
    assert equal(tree.merge(*tree.partition(t, lambda name, x: name == "b")), t)
    torch.testing.assert_close(compiled(lambda t: tree.map(torch.add, t, t))(t), tree.map(torch.add, t, t))
    with pytest.raises(ValueError, match="'1' is missing"):
        tree.map(torch.add, t, {**{key: x for key, x in t.items() if key != 1}, "1": torch.ones(3)})


def test_none_is_an_empty_node_unless_asked_for():
    t = {"a": None, "b": [torch.ones(1), None]}
    assert tree.names(t) == ["b.0"]
    assert [name for name, _ in tree.items(t, none_is_leaf=True)] == ["a", "b.0", "b.1"]
    assert tree.map(torch.neg, t)["a"] is None


@pytest.mark.parametrize("other", [{"a": {"x": 1}}, {"a": {"x": 1, "z": 2}}, {"a": [1, 2]}, [1], {"a": None}])
def test_compiled_maps_refuse_what_eager_ones_refuse(other):
    t = {"a": {"x": torch.ones(1), "y": torch.ones(1)}}
    with pytest.raises(ValueError) as caught:
        tree.map(lambda x, y: x, t, other)
    message = []

    def attempt(x):
        try:
            return tree.map(lambda x, y: x, t, other)
        except ValueError as error:
            message.append(str(error))
            return x

    compiled(attempt)(torch.ones(1))
    assert message == [str(caught.value)]


def test_flatten_and_nest_round_trip():
    t = {"b": [{"w": 1}, {"w": 2}], "a": {"10": 3, "9": 4}, "c": [5] * 11}
    flat = tree.flatten(t)
    assert list(flat)[:4] == ["a.10", "a.9", "b.0.w", "b.1.w"]
    assert tree.nest(flat) == t and sorted_everywhere(tree.nest(flat))
    assert tree.nest(dict(reversed(flat.items()))) == t
    assert tree.nest(tree.flatten(7)) == 7 and tree.nest({}) == {}
    shaped = example()
    assert equal(tree.nest(tree.flatten(shaped), like=shaped), shaped)


@pytest.mark.parametrize("key", [1, "a.b", ""])
def test_flatten_refuses_keys_that_are_no_names(key):
    with pytest.raises(ValueError, match=f"under key {key!r}: keys must be strings without dots"):
        tree.flatten({"x": [{key: 1}]})


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"a": 1, "a.b": 2}, "'a.b' lies under"),
        ({"a.b": 1, "a": 2}, "'a' is both"),
        ({"a": {}, "a.b": 1}, "'a.b' lies"),
    ],
)
def test_nest_refuses_a_leaf_that_is_a_branch(flat, message):
    with pytest.raises(ValueError, match=message):
        tree.nest(flat)


def test_nest_names_what_does_not_match():
    with pytest.raises(ValueError, match=r"missing \['a\.w'\], left over \['a\.v'\]"):
        tree.nest({"a.v": 1, "b": 2}, like={"a": {"w": 0}, "b": 0})


def test_get_names_the_part_that_is_not_there():
    with pytest.raises(KeyError, match="no 'wait' under 'out': it has bias, weight"):
        tree.get(example(), "out.wait")
    with pytest.raises(KeyError, match="no 'x' under 'out.bias': it has no children"):
        tree.get(example(), "out.bias.x")


def test_sort_keeps_kinds_and_leaves():
    t = example()
    assert equal(tree.sort(t), t) and sorted_everywhere(tree.sort(t)) and not sorted_everywhere(t)


def test_inputs_are_left_alone():
    t = example()
    before, order, versions = deepcopy(t), list(t), [x._version for x in tree.leaves(t)]
    halves = tree.partition(t, lambda name, x: x.ndim > 0)
    tree.merge(*halves), tree.sort(t), tree.stack([t, t]), tree.cast(t, torch.float64), tree.norm(t["out"])
    tree.merge(halves[1], halves[0]), tree.nest(tree.flatten(t), like=t), tree.map(torch.neg, t), tree.table(t)
    assert equal(t, before) and list(t) == order and [x._version for x in tree.leaves(t)] == versions


def everything(t):
    """Calls most functions, for compile and torch.func."""
    first, second = tree.partition(t, lambda name, x: name.startswith("out"))
    both = tree.merge(tree.map_with_names(lambda name, x: x * len(name), first), second)
    both = tree.unstack(tree.stack([both, tree.cast(tree.sort(both), torch.float64)]))[1]
    both = tree.nest(tree.flatten(both), like=both)
    return both, tree.norm(tree.nest(tree.flatten(both["out"]))) * tree.count(both)


def floats():
    """The part of the example that torch.func takes: floating-point leaves, no None."""
    t = example()
    return {"out": t["out"], "blocks": t["blocks"], "pair": Moments(t["pair"][0], (torch.tensor(2.0),))}


def test_compiles_to_the_same_values():
    t = floats()
    out = compiled(everything)(t)
    torch.testing.assert_close(out, everything(t))
    assert sorted_everywhere(out[0])


def test_grad_and_vmap_go_through():
    t = floats()
    gradient = torch.func.grad(lambda t: everything(t)[1].sum())
    stacked = tree.stack([t, tree.map(lambda x: x + 1.0, t)])
    for f in (gradient, compiled(gradient)):
        # d |x| / d x, scaled by the factors len(name) and count of `everything`.
        bias, weight = 8 * t["out"]["bias"], 10 * t["out"]["weight"]
        total = torch.sqrt((bias**2).sum() + (weight**2).sum())
        torch.testing.assert_close(f(t)["out"]["bias"], 8 * bias / total * tree.count(t))
    mapped, looped = torch.func.vmap(gradient)(stacked), tree.stack([gradient(x) for x in tree.unstack(stacked)])
    torch.testing.assert_close(mapped, looped)
