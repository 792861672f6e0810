"""Private training against loops over the examples, statistics of its draws, and another accountant."""

import math

import pytest
import torch

from core import per_example, random, spec, tree
from core.layers import batch_norm, batch_norm_spec, linear, linear_spec
from train import optimizers
from train.gradients import private
from train.losses import cross_entropy
from train.step import create, make_step

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
    found = private.clipped_sum(loss, params, batch, max_norm=MAX_NORM, mask=mask, clipping=clipping)
    expected = tree.map(torch.zeros_like, params)
    for i, g in enumerate(one_by_one(params, batch)):
        if mask is None or mask[i]:
            expected = tree.map(lambda s, x, w: s + w * x, expected, g, WEIGHTS[clipping](g))
    for a, b in zip(tree.leaves(found.sum), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.losses, loss(params, batch))


@pytest.mark.parametrize("clipping", private.CLIPPING)
def test_one_example_changes_the_sum_by_at_most_max_norm(clipping):
    params, (x, y) = initial(), data()
    batch = (100 * x, y)  # long gradients
    sums = [
        private.clipped_sum(loss, params, batch, max_norm=MAX_NORM, mask=mask, clipping=clipping).sum
        for mask in (torch.ones(N, dtype=torch.bool), torch.arange(N) != 4)
    ]
    change = float(tree.norm(tree.map(torch.sub, *sums)))
    assert 0.2 * MAX_NORM < change <= MAX_NORM * (1 + 1e-9)


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
    found = private.noisy_gradient(loss, params, batch, key, **options)
    summed = private.clipped_sum(loss, params, batch, max_norm=MAX_NORM).sum
    expected = tree.map(lambda g: g / 9, private.add_noise(key, summed, 1.5 * MAX_NORM))
    for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


# --- samples


def test_every_example_has_the_same_chance_independently():
    count, rate, steps = 200, 0.3, 400
    chosen = torch.zeros(steps, count)
    for step in range(steps):
        sample = private.poisson_sample(random.key(7), step, count, rate)
        chosen[step, sample.indices[sample.mask]] = 1
    variance = rate * (1 - rate)
    # Standard errors: of a share, and of the variance of the size of the sample, which is binomial.
    assert abs(chosen.mean() - rate) < 5 * math.sqrt(variance / (steps * count))
    assert (chosen.mean(0) - rate).abs().max() < 5 * math.sqrt(variance / steps)
    assert abs(chosen.sum(1).var() / (count * variance) - 1) < 5 * math.sqrt(2 / steps)
    # No two examples go together, no two steps either.
    assert (torch.corrcoef(chosen.T) - torch.eye(count)).abs().max() < 6 / math.sqrt(steps)
    assert (torch.corrcoef(chosen) - torch.eye(steps)).abs().max() < 6 / math.sqrt(count)


def test_sample_is_filled_up():
    for step in range(20):
        plain = private.poisson_sample(random.key(7), step, 50, 0.2)
        filled = private.poisson_sample(random.key(7), step, 50, 0.2, multiple=8)
        assert len(filled.mask) % 8 == 0 and len(filled.mask) - filled.mask.sum() < 8
        assert torch.equal(filled.indices[filled.mask], plain.indices[plain.mask])
        assert len(plain.indices[plain.mask].unique()) == plain.mask.sum()
    everything = private.poisson_sample(random.key(7), 0, 50, 1.0)
    assert torch.equal(everything.indices, torch.arange(50)) and everything.mask.all()
    nothing = private.poisson_sample(random.key(7), 0, 50, 1e-9, multiple=8)
    assert not nothing.mask.any() and len(nothing.mask) == 8


# --- the step


def private_step(**options):
    defaults = {"max_norm": MAX_NORM, "noise_multiplier": 1.0, "expected_batch": N, "compile": False}
    return private.make_private_step(keyed_loss, SGD, **defaults | options)


def states(step, batch, *more, steps=3):
    state = create(random.key(0), MODEL, SGD)
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
        found = states(private_step(clipping=clipping, physical_batch=size), padded, mask)
        assert_same(found[0], expected[0])
        assert_same(found[1], expected[1], rtol=1e-6)


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


@pytest.mark.parametrize("clipping", private.CLIPPING)
def test_compiled_step_is_one_graph_with_the_same_values(clipping):
    torch._dynamo.reset()
    (x, y), mask = data(), torch.arange(N) < 10
    expected = states(private_step(clipping=clipping, physical_batch=4), (x, y), mask)
    step = private_step(clipping=clipping, physical_batch=4, compile=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = states(step, (x, y), mask)
        states(step, tree.map(lambda v: torch.cat([v, v[:4]]), (x, y)), torch.ones(16, dtype=torch.bool))
    torch._dynamo.reset()
    assert_same(found[0], expected[0], rtol=1e-6)


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


# --- the accounting


def test_accounting_agrees_with_opacus():
    """Its Renyi accountant to the last digits; its PRV accountant is at most 0.01 above the least epsilon."""
    accountants = pytest.importorskip("opacus.accountants", reason="opacus is not installed", exc_type=ImportError)
    noise, rate, steps, delta = 1.1, 256 / 60000, 3515, 1e-5
    found = {}
    for name, accountant in (("rdp", accountants.RDPAccountant()), ("pld", accountants.PRVAccountant())):
        accountant.history = [(noise, rate, steps)]
        found[name] = accountant.get_epsilon(delta)
    ours = {name: private.spent_epsilon(noise, rate, steps, delta, name) for name in found}
    assert ours["rdp"] == pytest.approx(found["rdp"], rel=1e-6)
    assert found["pld"] - 0.011 < ours["pld"] <= found["pld"] + 1e-3
    assert ours["pld"] < ours["rdp"]


def test_epsilon_of_one_gaussian_is_the_exact_one():
    """delta(epsilon) of a Gaussian in closed form: Balle and Wang 2018, arXiv:1805.06530, theorem 8."""
    noise, delta = 2.0, 1e-5
    epsilon = private.spent_epsilon(noise, 1.0, 1, delta)

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    found = phi(1 / (2 * noise) - epsilon * noise) - math.exp(epsilon) * phi(-1 / (2 * noise) - epsilon * noise)
    assert found == pytest.approx(delta, rel=2e-3)


@pytest.mark.parametrize("accountant", private.ACCOUNTANTS)
def test_noise_for_epsilon_is_the_least(accountant):
    rate, steps, delta, epsilon = 0.01, 50, 1e-5, 1.0
    noise = private.noise_for_epsilon(epsilon, delta, rate, steps, accountant)
    assert private.spent_epsilon(noise, rate, steps, delta, accountant) <= epsilon
    assert private.spent_epsilon(noise * 0.998, rate, steps, delta, accountant) > epsilon


def test_limits_of_the_accounting():
    assert private.spent_epsilon(1.0, 0.1, 0, 1e-5) == 0
    assert private.spent_epsilon(0.0, 0.1, 1, 1e-5) == math.inf


def call_noise(**options):
    return private.noise_for_epsilon(**{"epsilon": 1.0, "delta": 1e-5, "sampling_rate": 0.1, "steps": 10} | options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: private.spent_epsilon(-1.0, 0.1, 10, 1e-5), "noise_multiplier is -1.0; expected"),
        (lambda: private.spent_epsilon(1.0, 1.5, 10, 1e-5), "sampling_rate is 1.5; expected a number in"),
        (lambda: private.spent_epsilon(1.0, 0.1, -1, 1e-5), "steps is -1; expected at least 0"),
        (lambda: private.spent_epsilon(1.0, 0.1, 10, 1.0), "delta is 1.0; expected a number between 0 and 1"),
        (lambda: private.spent_epsilon(1.0, 0.1, 10, 1e-5, "moments"), "accountant 'moments' is unknown"),
        (lambda: call_noise(epsilon=0.0), "epsilon is 0.0; expected a positive number"),
        (lambda: call_noise(steps=0), "steps is 0; expected at least 1"),
        (lambda: private.poisson_sample(random.key(0), 0, 10, 0.0), "poisson_sample: rate is 0.0"),
        (lambda: private.poisson_sample(random.key(0), 0, 0, 0.5), "count is 0, multiple 1"),
        (lambda: private_step(noise_multiplier=math.nan), "noise_multiplier is nan"),
        (lambda: private_step(expected_batch=0), "expected_batch is 0"),
        (lambda: private_step(physical_batch=0), "physical_batch is 0"),
        (lambda: states(private_step(max_norm=0.0), data()), "max_norm is 0.0; expected a positive number"),
        (lambda: states(private_step(clipping="global"), data()), "clipping 'global' is unknown; expected one of flat"),
        (lambda: states(private_step(physical_batch=5), data()), "a batch of 12 examples is no multiple of"),
        (lambda: states(private_step(), data(), torch.ones(3) > 0), r"the mask has shape \(3,\); expected \(12,\)"),
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
