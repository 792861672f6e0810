"""Private training against loops over the examples, and statistics of its noise."""

import math

import pytest
import torch

from core import per_example, random, spec, tree
from core.layers import batch_norm, batch_norm_spec, linear, linear_spec
from train import optimizers
from train.gradients import private
from train.gradients.private import AdaptiveNorm
from train.losses import cross_entropy
from train.step import Policy, create, make_step

MODEL = {"first": linear_spec(5, 7), "last": linear_spec(7, 3)}
N, MAX_NORM = 12, 0.7
SGD = optimizers.sgd(0.1, momentum=0.9)


def loss(params, batch):
    x, y = batch
    return cross_entropy(linear(params["last"], torch.tanh(linear(params["first"], x))), y, reduction="none")


def keyed_loss(params, batch, keys):
    return loss(params, batch)


def data(n=N, dtype=torch.float64):
    return random.normal(random.key(1), (n, 5), dtype), random.randint(random.key(2), (n,), 0, 3).long()


def initial(dtype=torch.float64):
    return spec.init(random.key(0), MODEL, dtype)


def one_by_one(params, batch):
    """The gradient of each example, from plain gradients."""
    return [
        torch.func.grad(lambda p, i=i: loss(p, tree.map(lambda x: x[i : i + 1], batch))[0])(params) for i in range(N)
    ]


WEIGHTS = {
    "flat": lambda g: tree.map(lambda x: min(1.0, MAX_NORM / float(tree.norm(g))), g),
    "automatic": lambda g: tree.map(lambda x: MAX_NORM / (float(tree.norm(g)) + 0.01), g),
    "per_layer": lambda g: tree.map(lambda x: min(1.0, MAX_NORM / 2 / float(x.norm())), g),  # 4 parameters
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("clipping", private.CLIPPING)
def test_clipped_sum_is_that_of_a_loop(clipping, masked):
    params, batch = initial(), data()
    mask = torch.arange(N) % 3 > 0 if masked else None
    actual = private.clipped_sum(loss, params, batch, max_norm=MAX_NORM, mask=mask, clipping=clipping)
    expected = tree.map(torch.zeros_like, params)
    for i, g in enumerate(one_by_one(params, batch)):
        if mask is None or mask[i]:
            expected = tree.map(lambda s, x, w: s + w * x, expected, g, WEIGHTS[clipping](g))
    for a, b in zip(tree.leaves(actual.sum), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert_same(actual.losses, loss(params, batch) if mask is None else torch.where(mask, loss(params, batch), 0))


GROUPS = {"first.*": 0.3, "*": 0.5}


def test_groups_are_clipped_by_themselves():
    params, batch = initial(), data()
    actual = private.clipped_sum(loss, params, batch, max_norm=GROUPS).sum
    expected = tree.map(torch.zeros_like, params)
    for g in one_by_one(params, batch):
        bounds = {"first": 0.3, "last": 0.5}
        factors = {name: min(1.0, bound / float(tree.norm(g[name]))) for name, bound in bounds.items()}
        expected = {name: tree.map(lambda s, x, w=w: s + w * x, expected[name], g[name]) for name, w in factors.items()}
    assert_same(actual, expected)
    assert private.sensitivity(GROUPS) == pytest.approx(math.hypot(0.3, 0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [MAX_NORM, GROUPS], ids=["flat", "groups"])
def test_a_masked_example_has_no_influence(max_norm, bad):
    """Not even where its gradient is NaN (jax_privacy#84)."""
    params, (x, y) = initial(), data()
    mask = torch.arange(N) != 4
    expected = private.clipped_sum(loss, params, (x[mask], y[mask]), max_norm=max_norm)
    actual = private.clipped_sum(loss, params, (x.index_fill(0, torch.tensor(4), bad), y), max_norm=max_norm, mask=mask)
    assert_same(actual.sum, expected.sum)
    assert_same(actual.total_norm[mask], expected.total_norm)
    assert actual.losses[4] == actual.total_norm[4] == 0
    nothing = private.clipped_sum(loss, params, (bad * x, y), max_norm=max_norm, mask=torch.zeros(N, dtype=torch.bool))
    assert all((g == 0).all() for g in tree.leaves(nothing.sum))
    everything = private.clipped_sum(loss, params, (x, y), max_norm=max_norm, mask=torch.ones(N))  # 0 and 1 will do
    assert_same(everything.sum, private.clipped_sum(loss, params, (x, y), max_norm=max_norm).sum)


@pytest.mark.parametrize(
    ("clipping", "max_norm"), [*((clipping, MAX_NORM) for clipping in private.CLIPPING), ("flat", GROUPS)]
)
def test_one_example_changes_the_sum_by_at_most_max_norm(clipping, max_norm):
    params, (x, y) = initial(), data()
    batch = (100 * x, y)  # long gradients
    sums = [
        private.clipped_sum(loss, params, batch, max_norm=max_norm, mask=mask, clipping=clipping).sum
        for mask in (torch.ones(N, dtype=torch.bool), torch.arange(N) != 4)
    ]
    change, most = float(tree.norm(tree.map(torch.sub, *sums))), private.sensitivity(max_norm)
    assert 0.2 * most < change <= most * (1 + 1e-9)


def test_noise_is_normal_and_of_its_key():
    zeros = {"a": torch.zeros(300, 100), "b": torch.zeros(20000)}
    noise = private.add_noise(random.key(3), zeros, 2.5)
    every = torch.cat([x.flatten() for x in tree.leaves(noise)]) / 2.5
    n = len(every)
    # Five standard errors of the mean, the variance and the fourth moment of N(0, 1).
    assert abs(every.mean()) < 5 / math.sqrt(n)
    assert abs(every.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(every.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert len(every.unique()) > 0.99 * n  # the leaves do not share their numbers
    again, other = private.add_noise(random.key(3), zeros, 2.5), private.add_noise(random.key(4), zeros, 2.5)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(noise), tree.leaves(again), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(tree.leaves(noise), tree.leaves(other), strict=True))


def test_noisy_gradient():
    params, batch, key = initial(), data(), random.key(5)
    options = {"max_norm": MAX_NORM, "noise_multiplier": 1.5, "expected_batch": 9.0}
    actual = private.noisy_gradient(loss, params, batch, key, **options)
    summed = private.clipped_sum(loss, params, batch, max_norm=MAX_NORM).sum
    expected = tree.map(lambda g: g / 9, private.add_noise(key, summed, 1.5 * MAX_NORM))
    for a, b in zip(tree.leaves(actual), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


# --- the step


def private_step(**options):
    defaults = {"max_norm": MAX_NORM, "noise_multiplier": 1.0, "expected_batch": N, "compile": False}
    return private.make_private_step(keyed_loss, SGD, **defaults | options)


def states(step, batch, *more, steps=3, norm=None):
    state = create(random.key(0), MODEL, SGD)
    state = state if norm is None else private.with_norm(state, norm)
    state = state._replace(params=tree.cast(state.params, torch.float64))
    state = state._replace(opt_state=SGD.init(state.params))
    for _ in range(steps):
        state, metrics = step(state, batch, *more)
    return state, metrics


def assert_same(a, b, rtol=1e-12):
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)


def test_without_noise_and_clipping_it_is_the_plain_step():
    plain = make_step(lambda p, batch, keys: loss(p, batch).mean(), SGD, compile=False)
    expected, ours = states(plain, data()), states(private_step(max_norm=1e6, noise_multiplier=0.0), data())
    assert_same(ours[0], expected[0])
    for name in ("loss", "grad_norm", "update_norm"):
        torch.testing.assert_close(ours[1][name], expected[1][name])
    assert ours[1]["clipped"] == 0 and ours[1]["examples"] == N


@pytest.mark.parametrize("clipping", private.CLIPPING)
def test_padding_and_physical_batches_change_nothing(clipping):
    """Noise included: it comes once, whatever the parts."""
    (x, y), mask = data(), torch.arange(16) < N
    expected = states(private_step(clipping=clipping), (x, y))
    padded = torch.cat([x, 1e3 * torch.ones(4, 5)]), torch.cat([y, torch.zeros(4, dtype=torch.long)])
    for size in (None, 4, 8):
        actual = states(private_step(clipping=clipping, physical_batch=size), padded, mask)
        assert_same(actual[0], expected[0])
        assert_same(actual[1], expected[1], rtol=1e-6)


def test_noise_differs_from_step_to_step_and_is_of_the_run():
    x, y = data()
    step, nobody = private_step(), torch.zeros(N, dtype=torch.bool)
    beginning = create(random.key(0), MODEL, SGD)
    first, metrics = step(beginning, (x.float(), y), nobody)
    assert metrics["examples"] == 0 and metrics["loss"] == 0 and metrics["grad_norm"] > 0
    later, _ = step(beginning._replace(step=torch.tensor(1)), (x.float(), y), nobody)
    other, _ = step(beginning._replace(key=random.key(9)), (x.float(), y), nobody)
    again, _ = step(beginning, (x.float(), y), nobody)
    weight = [s.params["first"]["weight"] for s in (first, later, other, again)]
    assert torch.equal(weight[0], weight[3])
    assert not torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])


COMPILED = {
    "adaptive": {"max_norm": AdaptiveNorm(MAX_NORM)},
    "per_layer": {"clipping": "per_layer"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_step_is_one_graph_with_the_same_values(name):
    torch._dynamo.reset()
    (x, y), mask = data(), torch.arange(N) < 10
    options = {**COMPILED[name], "physical_batch": 4}
    norm = options.get("max_norm") if name == "adaptive" else None
    expected = states(private_step(**options), (x, y), mask, norm=norm)
    step = private_step(**options, compile=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = states(step, (x, y), mask, norm=norm)
        states(step, tree.map(lambda v: torch.cat([v, v[:4]]), (x, y)), torch.ones(16, dtype=torch.bool), norm=norm)
    torch._dynamo.reset()
    assert_same(actual[0], expected[0], rtol=1e-6)


def test_donated_step_and_masked_nan():
    (x, y), mask = data(), torch.arange(N) != 4
    expected = states(private_step(), (x, y), mask)
    broken = x.index_fill(0, torch.tensor(4), math.nan)
    assert_same(states(private_step(donate=True, physical_batch=6), (broken, y), mask), expected, rtol=1e-6)


def test_bfloat16_policy_keeps_master_values():
    def narrow(params, batch, keys):
        assert {x.dtype for x in tree.leaves(params)} == {batch[0].dtype} == {torch.bfloat16}
        return loss(params, batch)

    options = {"max_norm": 1e6, "noise_multiplier": 0.0, "expected_batch": N, "compile": False}
    state, batch = create(random.key(0), MODEL, SGD), data(dtype=torch.float32)
    expected = private.make_private_step(keyed_loss, SGD, **options)(state, batch)
    step = private.make_private_step(narrow, SGD, policy=Policy(torch.bfloat16), **options)
    actual = step(state, batch)
    assert {x.dtype for x in tree.leaves((actual[0].params, actual[1]))} == {torch.float32}
    for name in ("loss", "example_norm", "grad_norm"):  # bfloat16 has 8 bits
        torch.testing.assert_close(actual[1][name], expected[1][name], rtol=0.02, atol=0)


# --- adaptive clipping


def test_norm_goes_to_the_quantile():
    """Without noise; the parameters do not move, so the norms of the gradients are the same in all steps."""
    (x, y), quantile, frozen = data(), 0.7, optimizers.sgd(0.0)
    norms = private.clipped_sum(loss, initial(), (x, y), max_norm=1.0).total_norm
    for initial_norm in (1e-2, 1e2):
        norm = AdaptiveNorm(initial_norm, quantile=quantile, rate=0.5)
        options = {"max_norm": norm, "noise_multiplier": 0.0, "expected_batch": N, "compile": False}
        step, state = private.make_private_step(keyed_loss, frozen, **options), create(random.key(0), MODEL, frozen)
        state = private.with_norm(state._replace(params=initial()), norm)
        for _ in range(40):
            state, metrics = step(state, (x, y))
        low, high = norms.quantile(quantile - 1.5 / N), norms.quantile(quantile + 1.5 / N)
        assert low < metrics["clip_norm"] < high


def test_one_step_of_the_norm_is_the_papers():
    """Andrew et al. 2021, algorithm 1, written out with the step's own noise."""
    x, y = data()
    norm, noise_multiplier, expected_batch = AdaptiveNorm(0.5, 0.6, 0.2, count_noise=4.0), 1.5, 10.0
    options = {"max_norm": norm, "noise_multiplier": noise_multiplier, "expected_batch": expected_batch}
    state = private.with_norm(create(random.key(0), MODEL, SGD), norm)
    state = state._replace(params=initial(), opt_state=SGD.init(initial()))
    after, metrics = private_step(**options)(state, (x, y))
    clipped = private.clipped_sum(loss, state.params, (x, y), max_norm=0.5)
    key = random.fold_in(random.fold_in(state.key, 2**32 - 1), 0)
    gradient_noise = (noise_multiplier**-2 - (2 * 4.0) ** -2) ** -0.5
    assert gradient_noise > noise_multiplier
    grads = tree.map(lambda g: g / expected_batch, private.add_noise(key, clipped.sum, gradient_noise * 0.5))
    torch.testing.assert_close(metrics["grad_norm"], tree.norm(grads))
    shifted = (clipped.total_norm <= 0.5).double() - 0.5
    fraction = 0.5 + (shifted.sum() + 4.0 * random.normal(random.fold_in(key, 1), ())) / expected_batch
    torch.testing.assert_close(after.stats["clip_norm"].double(), 0.5 * torch.exp(-0.2 * (fraction - 0.6)))
    assert metrics["clip_norm"] == 0.5
    assert_same(metrics["clipped"].double(), (clipped.total_norm > 0.5).double().mean(), rtol=1e-6)


def test_batch_norm_is_refused():
    model = {"linear": linear_spec(5, 3), "norm": batch_norm_spec(3)}
    step = private.make_private_step(
        lambda p, b, k: cross_entropy(
            batch_norm(p["norm"], linear(p["linear"], b[0]), train=True), b[1], reduction="none"
        ),
        SGD,
        max_norm=1.0,
        noise_multiplier=1.0,
        expected_batch=N,
        compile=False,
    )
    with pytest.raises(ValueError, match="'norm.count' is a Stat: a layer that mixes the examples"):
        step(create(random.key(0), model, SGD), data(dtype=torch.float32))


# --- refusals


def clip(**options):
    return private.clipped_sum(loss, initial(), data(), **{"max_norm": MAX_NORM} | options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: private_step(noise_multiplier=math.nan), "noise_multiplier is nan"),
        (lambda: private_step(noise_multiplier=None), "noise_multiplier is None"),
        (lambda: private_step(expected_batch=0), "expected_batch is 0"),
        (lambda: private_step(physical_batch=0), "physical_batch is 0"),
        (lambda: private_step(max_norm=0.0), "max_norm is 0.0; expected a positive number"),
        (lambda: private_step(max_norm=None), "max_norm is None; expected a positive number"),
        (lambda: clip(max_norm=None), "max_norm is None; expected a positive number"),
        (lambda: private_step(max_norm={"*": -1.0}), r"max_norm of '\*' is -1.0; expected a positive number"),
        (lambda: private_step(max_norm={}), "max_norm has 0 groups"),
        (lambda: private_step(max_norm=GROUPS, clipping="automatic"), "2 groups, clipping is 'automatic'"),
        (lambda: private_step(max_norm=AdaptiveNorm(0.0)), "max_norm: initial is 0.0; expected a positive number"),
        (lambda: private_step(max_norm=AdaptiveNorm(1.0, 1.5)), r"quantile is 1.5; expected a number in \[0, 1\]"),
        (lambda: private_step(max_norm=AdaptiveNorm(1.0, count_noise=0.4)), "count_noise is 0.4; expected more than"),
        (
            lambda: private_step(max_norm=AdaptiveNorm(1.0), clipping="per_layer"),
            "adaptive norm is for 'flat' clipping",
        ),
        (lambda: states(private_step(max_norm=AdaptiveNorm(1.0)), data()), "expected .'clip_norm'.: make it by"),
        (lambda: private_step(clipping="global"), "clipping 'global' is unknown; expected one of flat"),
        (lambda: states(private_step(physical_batch=5), data()), "a batch of 12 examples is no multiple of"),
        (lambda: states(private_step(), data(), torch.ones(3) > 0), r"the mask has shape \(3,\); expected \(12,\)"),
        (lambda: clip(mask=torch.tensor([7.0, *[0.0] * (N - 1)])), "the mask is torch.float32; expected bool, or"),
        (lambda: clip(mask=torch.ones(N, 1, dtype=torch.bool)), r"the mask has shape \(12, 1\)"),
        (lambda: clip(mask=[True] * N), "the mask has shape list"),
    ],
    ids=lambda value: value.split(" ")[0] if isinstance(value, str) else "",
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_parameter_without_a_rule_is_named():
    def mixing(params, batch):
        return loss(params, batch).sum()

    with pytest.raises(per_example.PerExampleError):
        private.clipped_sum(mixing, initial(), data(), max_norm=1.0)
