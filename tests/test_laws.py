"""The laws that every net keeps, whatever it is for. The nets are in registry; a failure names the net and leaf."""

import dataclasses
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, grad_and_value, vmap

from core import per_example, random, spec, stats, tree
from tests.registry import NETS, PUBLISHED, Net

# Variants of a net, "name, variant", share its layers: what takes long is tested with the first of each.
PLAIN = [n for n in NETS if "," not in n]
every_net = pytest.mark.parametrize("net", NETS.values(), ids=NETS)
variants_slow = pytest.mark.parametrize(
    "net", [pytest.param(n, id=name, marks=[] if name in PLAIN else pytest.mark.slow) for name, n in NETS.items()]
)


def some_nets(predicate):
    return pytest.mark.parametrize("net", [pytest.param(n, id=n.name) for n in NETS.values() if predicate(n)])


def values(net: Net, dtype=torch.float64, seed=0):
    """(params, Stats) as they start."""
    return spec.split(net.spec, spec.init(random.key(seed), net.spec, dtype))


def batch(net: Net, n: int, dtype=torch.float64, seed=1):
    return tree.cast(net.batch(random.key(seed), n), dtype)


def one_key_each(n: int, seed=2):
    return random.fold_in(random.key(seed), torch.arange(n))


def scalar(out):
    """A loss of any output, the sum over the examples: sin of each value, weighted so that nothing cancels."""
    total = 0.0
    for leaf in tree.leaves(out):
        if leaf.is_floating_point():
            weights = torch.cos(1.0 + torch.arange(leaf[0].numel(), dtype=leaf.dtype, device=leaf.device))
            total = total + (torch.sin(leaf).reshape(len(leaf), -1) * weights).sum()
    return total


def loss(params, running, net: Net, x, key, train):
    return scalar(net.apply(tree.merge(params, running), x, key, train))


def assert_trees_close(net: Net, actual, expected, what: str, **tolerance):
    """Leaf by leaf, to the precision of the dtype or the tolerance of `torch.testing.assert_close`."""
    assert tree.names(actual) == tree.names(expected), f"{net.name}: {what}: other names"
    for (name, a), b in zip(tree.items(actual), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{net.name}: {what}: '{name}': {m}", **tolerance)


def assert_trees_equal(net: Net, actual, expected, what: str):
    assert_trees_close(net, actual, expected, what, rtol=0.0, atol=0.0)


# spec


@every_net
def test_spec_describes_the_initial_values(net):
    params = spec.init(random.key(0), net.spec)
    spec.check(net.spec, params, net.name)
    for (name, leaf), value in zip(tree.items(net.spec), tree.leaves(params), strict=True):
        assert value.dtype == leaf.dtype, f"{net.name}: '{name}' is {value.dtype}"
        assert not leaf.axes or len(leaf.axes) == value.ndim, f"{net.name}: '{name}' has axes {leaf.axes}"
        assert value.isfinite().all() and not value.requires_grad, f"{net.name}: '{name}'"
    assert sorted_everywhere(net.spec), f"{net.name}: the spec has a dict whose keys are not sorted"
    assert sorted_everywhere(params), f"{net.name}: init has a dict whose keys are not sorted"


def sorted_everywhere(node):
    inner = tree.children(node) or []
    return (not isinstance(node, dict) or list(node) == sorted(node)) and all(sorted_everywhere(x) for _, x in inner)


@every_net
def test_spec_init_is_a_function_of_the_key(net):
    first, again, other = (spec.init(random.key(seed), net.spec) for seed in (0, 0, 1))
    assert_trees_equal(net, again, first, "the same key, other values")
    assert any(not torch.equal(a, b) for a, b in zip(tree.leaves(first), tree.leaves(other), strict=True)), net.name


def preset_counts() -> dict[tuple[str, str], set[int]]:
    """(module, preset) -> parameter counts that it was published with, or that the table of nets/README.md states."""
    counts = {(module, preset): set() for module, family in PUBLISHED.items() for preset in family.presets}
    for module, family in PUBLISHED.items():
        for preset, count in family.counts.items():
            counts[module, preset].add(count)
    for line in (Path(__file__).parents[1] / "nets" / "README.md").read_text(encoding="utf-8").splitlines():
        if len(columns := line.split(" | ")) == 6:  # net, paper, file, presets (parameters), same numbers as, run
            for preset, count in re.findall(r"`([^`]+)` \(([\d,]+)", columns[3]):
                counts[re.match(r"`([\w/]+)\.py`", columns[2])[1], preset].add(int(count.replace(",", "")))
    return counts


COUNTS = preset_counts()


@pytest.mark.parametrize(("module", "preset"), COUNTS)
def test_spec_count_is_the_published_one(module, preset):
    family = PUBLISHED[module]
    cfg = family.presets[preset]
    shapes = family.spec(cfg)
    params, _ = spec.split(shapes, shapes)
    assert COUNTS[module, preset] <= {tree.count(params)}
    # Configurations are values: equal ones are one key of a dict.
    assert {cfg: 1} == {dataclasses.replace(cfg): 1}


def test_spec_counts_are_known_of_most_presets():
    without = [f"{module} {preset}" for (module, preset), counts in COUNTS.items() if not counts]
    assert len(without) < len(COUNTS) / 2, without


# pure


@every_net
@pytest.mark.parametrize("train", [False, True])
def test_pure(net, train):
    params, running = values(net, torch.float32)
    inputs = {"params": tree.merge(params, running), "x": batch(net, 3, torch.float32), "key": random.key(2)}
    before, versions = tree.map(torch.clone, inputs), [leaf._version for leaf in tree.leaves(inputs)]
    torch_state = torch.get_rng_state()

    first = net.apply(inputs["params"], inputs["x"], inputs["key"], train)
    again = net.apply(inputs["params"], inputs["x"], inputs["key"], train)

    assert_trees_equal(net, again, first, "two calls differ")
    assert_trees_equal(net, inputs, before, "an input was changed")
    written = [n for (n, leaf), v in zip(tree.items(inputs), versions, strict=True) if leaf._version != v]
    assert not written, f"{net.name}: written in place: {written}"
    assert torch.equal(torch.get_rng_state(), torch_state), f"{net.name}: torch's global generator was used"
    wrong = [name for name, leaf in tree.items(first) if not leaf.isfinite().all()]
    assert not wrong, f"{net.name}: output that is not finite: {wrong}"


# batch


@every_net
def test_batch_example_alone_equals_example_in_a_batch(net):
    params, x = tree.merge(*values(net)), batch(net, 4)
    together = net.apply(params, x, None, False)
    for i in range(4):
        alone = net.apply(params, tree.map(lambda leaf, i=i: leaf[i : i + 1], x), None, False)
        assert_trees_close(net, alone, tree.map(lambda leaf, i=i: leaf[i : i + 1], together), f"example {i}")


# grad


def is_zero(net: Net, name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in net.zero)


@every_net
def test_grad_reaches_every_parameter(net):
    (params, running), x = values(net), batch(net, 4)
    gradients = grad(loss)(params, running, net, x, random.key(2), True)
    largest = max(float(g.abs().max()) for g in tree.leaves(gradients))
    for (name, g), p in zip(tree.items(gradients), tree.leaves(params), strict=True):
        assert g.shape == p.shape and g.dtype == p.dtype, f"{net.name}: '{name}': {g.dtype} {tuple(g.shape)}"
        assert g.isfinite().all(), f"{net.name}: '{name}' has a gradient that is not finite"
        if is_zero(net, name):
            assert g.abs().max() < 1e-10 * largest, f"{net.name}: '{name}' has a gradient; the registry says it is zero"
        else:
            assert g.abs().max() > 1e-8 * largest, f"{net.name}: '{name}' has no gradient"
    names = tree.names(params)
    assert all(any(fnmatch(name, pattern) for name in names) for pattern in net.zero), f"{net.name}: {net.zero}"


@some_nets(lambda net: net.mixes)
def test_grad_by_the_stats_is_their_increment(net):
    (params, running), x = values(net), batch(net, 4)
    increments = grad(loss, argnums=1)(params, running, net, x, random.key(2), True)
    updated = stats.update(running, increments)
    for (name, g), before, after in zip(
        tree.items(increments), tree.leaves(running), tree.leaves(updated), strict=True
    ):
        assert g.isfinite().all() and (g != 0).any(), f"{net.name}: '{name}' got no increment"
        if name.split(".")[-1] == "count":
            assert after == before + 1, f"{net.name}: '{name}' went from {before} to {after} in a step"
    # The new Stats are used: with them the outputs differ.
    outs = [net.apply(tree.merge(params, s), x, None, False) for s in (running, updated)]
    assert not torch.allclose(scalar(outs[0]), scalar(outs[1])), net.name
    still = grad(loss, argnums=1)(params, running, net, x, None, False)
    moved = [name for name, g in tree.items(still) if (g != 0).any()]
    assert not moved, f"{net.name}: a gradient in eval mode: {moved}"


# vmap


@variants_slow
@pytest.mark.parametrize("train", [False, True])
def test_vmap_ensemble_equals_its_members(net, train):
    keys = random.split(random.key(0), 3)
    stacked = vmap(lambda key: spec.init(key, net.spec, torch.float64))(keys)
    x, key = batch(net, 4), random.key(2)

    def both(values):
        params, running = spec.split(net.spec, values)
        return net.apply(values, x, key, train), grad(loss, (0, 1))(params, running, net, x, key, train)

    together = vmap(both)(stacked)
    for i, member in enumerate(tree.unstack(stacked)):
        assert_trees_equal(net, member, spec.init(keys[i], net.spec, torch.float64), f"init of member {i}")
        assert_trees_close(net, tree.map(lambda leaf, i=i: leaf[i], together), both(member), f"member {i}")


# per example


@variants_slow
def test_per_example_gradients_sum_to_the_gradient_of_the_batch(net):
    (params, running), x, keys = values(net), batch(net, 4), one_key_each(4)
    train = not net.mixes

    def alone(params, example, key):
        return loss(params, running, net, tree.map(lambda leaf: leaf[None], example), key[None], train)

    each = vmap(grad(alone), (None, 0, 0))(params, x, keys)
    together = grad(loss)(params, running, net, x, keys, train)
    assert_trees_close(net, tree.map(lambda g: g.sum(0), each), together, "sum of per-example gradients")


def reported(net: Net):
    """(loss (N,) of params and a batch, params, the batch): in training, unless that mixes the examples."""
    (params, running), x, train = values(net), batch(net, 4), not net.mixes

    def loss(params, batch):
        out = net.apply(tree.merge(params, running), batch["x"], batch["key"], train)
        return vmap(lambda one: scalar(tree.map(lambda leaf: leaf[None], one)))(out)

    return loss, params, {"key": one_key_each(4), "x": x}


def check_reports(net: Net, f=per_example.reports):
    """Norms equal those of vmap(grad), relative to the example's total norm."""
    loss, params, examples = reported(net)
    out = f(loss, params, examples)
    norms = tree.map(lambda g: g.reshape(len(g), -1).norm(dim=1), per_example.each(loss, params, examples))
    total = torch.stack(tree.leaves(norms)).square().sum(0).sqrt()
    assert (total > 0).all(), net.name
    for (name, norm), expected in zip(tree.items(out.norm), tree.leaves(norms), strict=True):
        error = float(((norm - expected) / total).abs().max())
        assert error <= 1e-10, f"{net.name}: '{name}': norms per example are off by {error:.1e}"
    gradient = grad(lambda p: loss(p, examples).sum())(params)
    for (name, g), expected in zip(tree.items(out.sum), tree.leaves(gradient), strict=True):
        error = float((g - expected).abs().max() / total.sum())
        assert error <= 1e-10, f"{net.name}: '{name}': the sum is off by {error:.1e}"


@variants_slow
def test_per_example_reports_equal_vmap_of_grad(net):
    check_reports(net)


ALONE = ("mlp", "resnet", "rnn", "gpt2", "transformer", "vqvae", "dcgan critic")


@pytest.mark.parametrize("name", [n if n in ALONE else pytest.param(n, marks=pytest.mark.slow) for n in NETS])
def test_per_example_reports_equal_gradients_of_batches_of_one(name):
    assert per_example.verify(*reported(NETS[name]), examples=2) <= 1e-10


# Ten seconds to two minutes each to trace: one of each kind of layer in CI, all others with -m long.
TRACED = (
    "convolutional",
    "resnet",
    "rnn",
    "gpt2",
    "transformer",
    "t5",
    "vit",
    "dcgan critic",
)


def compiled_by_suite(name: str):
    marks = [] if name == "mlp" else pytest.mark.slow if name in TRACED else pytest.mark.long
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [compiled_by_suite(name) for name in PLAIN])
def test_per_example_reports_compile(name):
    torch._dynamo.reset()

    def compiled(loss, params, examples):
        f = torch.compile(
            lambda p, b: per_example.reports(loss, p, b), backend="aot_eager", fullgraph=True, dynamic=False
        )
        return f(params, examples)

    check_reports(NETS[name], compiled)


# compile


def gradients(net: Net):
    def f(params, running, x, key):
        return grad_and_value(loss, (0, 1))(params, running, net, x, key, True)

    return f


def check_compiled(net: Net, backend):
    torch._dynamo.reset()
    params, running = values(net, torch.float32)
    compiled = torch.compile(gradients(net), backend=backend, fullgraph=True, dynamic=False)
    for seed in (1, 2):
        args = params, running, batch(net, 4, torch.float32, seed), random.key(seed)
        actual, expected = compiled(*args), gradients(net)(*args)
        # A gradient that is zero but for rounding is compared on the scale of the others.
        noise = 1e-6 * max(float(leaf.abs().max()) for leaf in tree.leaves(expected))
        assert_trees_close(net, actual, expected, "compiled", rtol=1e-4, atol=noise)


ONE_OF_EACH_KIND = ("mlp", "convolutional", "resnet", "vit", "dcgan critic", "vqvae", "gpt2")


def compiled_by_kind(name: str):
    marks = [] if name in ONE_OF_EACH_KIND else pytest.mark.slow if name in PLAIN else pytest.mark.long
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [compiled_by_kind(name) for name in NETS])
def test_compile_is_one_graph(name):
    net = NETS[name]
    counter = CompileCounterWithBackend("aot_eager")
    check_compiled(net, counter)
    assert counter.frame_count == 1, f"{net.name}: {counter.frame_count} graphs for two batches of one shape"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convolutional", "mlp, dropout", "gpt2, no bias"])
def test_compile_with_inductor(name):
    check_compiled(NETS[name], "inductor")


# keys


@some_nets(lambda net: net.draws)
def test_key_is_needed_in_training(net):
    params, x = tree.merge(*values(net)), batch(net, 2)
    with pytest.raises(ValueError, match="key"):
        net.apply(params, x, None, True)


@some_nets(lambda net: not net.draws)
def test_key_is_ignored_by_a_net_that_draws_nothing(net):
    params, x = tree.merge(*values(net)), batch(net, 2)
    with_key, without = (net.apply(params, x, key, True) for key in (random.key(2), None))
    assert_trees_equal(net, with_key, without, "a key changed the output")


@some_nets(lambda net: net.draws)
def test_key_decides_what_is_drawn(net):
    params, x = tree.merge(*values(net)), batch(net, 3)
    first, again, other = (scalar(net.apply(params, x, random.key(seed), True)) for seed in (2, 2, 3))
    assert torch.equal(first, again) and not torch.allclose(first, other), net.name
    assert not torch.allclose(first, scalar(net.apply(params, x, None, False))), f"{net.name}: train draws nothing"


@some_nets(lambda net: net.draws and not net.mixes)
def test_key_per_example_makes_it_independent_of_its_batch(net):
    params, x, keys = tree.merge(*values(net)), batch(net, 4), one_key_each(4)
    together = net.apply(params, x, keys, True)
    for rows in ([2], [3, 0]):
        some = net.apply(params, tree.map(lambda leaf, rows=rows: leaf[rows], x), keys[rows], True)
        assert_trees_close(net, some, tree.map(lambda leaf, rows=rows: leaf[rows], together), f"examples {rows}")


@some_nets(lambda net: net.draws and not net.mixes)
def test_key_per_example_draws_differently_for_equal_examples(net):
    params = tree.merge(*values(net))
    x = tree.map(lambda leaf: leaf[:1].expand(2, *leaf.shape[1:]), batch(net, 1))
    first, second = tree.unstack(net.apply(params, x, one_key_each(2), True))
    assert any(not torch.allclose(a, b) for a, b in zip(tree.leaves(first), tree.leaves(second), strict=True)), net.name
