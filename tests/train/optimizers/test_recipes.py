"""Optimizers and schedules by name, against torch's; leaves by patterns of their names."""

import math

import pytest
import torch

from core import tree
from tests.train.optimizers.cases import F64, assert_close, grads_at
from train import optimizers
from train.optimizers import recipes, schedules

STEPS, WARMUP, PEAK = 50, 10, 0.3


def params():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    return {
        "head": {"bias": draw(3), "weight": draw(3, 6)},
        "stages": [{"weight": draw(4, 3, 2, 2)}, {"weight": draw(6, 4)}],
        "stem": {"weight": draw(3, 1, 2, 2)},
    }


def decayed(name, leaf):
    return leaf.ndim >= 2 and name != "stages.1.weight"


def hidden(name, leaf):
    return name.startswith("stages")


def run(optimizer, steps=6):
    values = params()
    state = optimizer.init(values)
    for step in range(steps):
        updates, state = optimizer.update(grads_at(step, values), state, values)
        values = optimizers.apply_updates(values, updates)
    return values


def run_torch(make, steps=6):
    """`make` maps {name: parameter} to pairs of a torch optimizer and the scheduler of its learning rate."""
    values = params()
    named = {name: torch.nn.Parameter(leaf) for name, leaf in tree.items(values)}
    pairs = make(named)
    for step in range(steps):
        grads = grads_at(step, tree.unflatten(values, [p.detach() for p in named.values()]))
        for p, g in zip(named.values(), tree.leaves(grads), strict=True):
            p.grad = g
        for optimizer, scheduler in pairs:
            optimizer.step()
            scheduler.step()
    return tree.unflatten(values, [p.detach() for p in named.values()])


def groups(named, weight_decay):
    """torch's groups of parameters with and without weight decay."""
    parts = {True: [], False: []}
    for name, p in named.items():
        parts[decayed(name, p)].append(p)
    return [{"params": p, "weight_decay": weight_decay if yes else 0.0} for yes, p in parts.items() if p]


def halving(optimizer):
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


RATE = schedules.exponential(0.1, 0.5)


# The learning rate.


def values(schedule, steps=STEPS + 5):
    return torch.stack([schedule(torch.tensor(count)) for count in range(steps)]).tolist()


def torch_rates(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=PEAK)
    lr = torch.optim.lr_scheduler
    left = STEPS - WARMUP
    after = {
        "cosine": lambda: lr.CosineAnnealingLR(optimizer, left),
        "step": lambda: lr.MultiStepLR(optimizer, [left // 2, 3 * left // 4]),
        "constant": lambda: lr.ConstantLR(optimizer, 1.0),
    }[name]
    rise = lr.LinearLR(optimizer, 1 / WARMUP, 1.0, WARMUP - 1)
    both = lr.SequentialLR(optimizer, [rise, after()], [WARMUP])
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    return rates


@pytest.mark.parametrize("name", recipes.SCHEDULES)
def test_rates_are_those_of_torch(name):
    assert values(recipes.rate(name, PEAK, STEPS, WARMUP))[:STEPS] == pytest.approx(torch_rates(name), abs=1e-7)


def test_rates_at_the_ends_and_in_the_middle():
    rates = {name: values(recipes.rate(name, PEAK, STEPS, WARMUP)) for name in recipes.SCHEDULES}
    for course in rates.values():
        assert [course[i] for i in (0, 4, 9, 10)] == pytest.approx([PEAK / 10, PEAK / 2, PEAK, PEAK])
    assert [rates["cosine"][i] for i in (20, 30)] == pytest.approx([PEAK * (1 + math.sqrt(0.5)) / 2, PEAK / 2])
    assert rates["cosine"][50:] == pytest.approx([0] * 5, abs=1e-8)
    assert [rates["step"][i] / PEAK for i in (29, 30, 39, 40, 54)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])
    assert rates["constant"][10:] == pytest.approx([PEAK] * 45)


@pytest.mark.parametrize("name", recipes.SCHEDULES)
def test_rates_without_a_warm_up_begin_at_the_peak(name):
    assert values(recipes.rate(name, PEAK, STEPS, 0))[0] == pytest.approx(PEAK)


# The rule.


def test_sgd_is_torchs():
    def theirs(named):
        return [halving(torch.optim.SGD(groups(named, 0.05), lr=0.1, momentum=0.9, nesterov=True))]

    assert_close(run(recipes.optimizer("sgd", RATE, 0.05, decayed, hidden)), run_torch(theirs), atol=1e-7, rtol=1e-6)


def test_adamw_is_torchs():
    def theirs(named):
        return [halving(torch.optim.AdamW(groups(named, 0.5), lr=0.1))]

    assert_close(run(recipes.optimizer("adamw", RATE, 0.5, decayed, hidden)), run_torch(theirs), atol=1e-7, rtol=1e-6)


class Flat(torch.optim.Optimizer):
    """torch's Muon on convolutions as matrices, with one row per output channel."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "weight_decay": 0.0})
        self.matrices = {p: torch.nn.Parameter(p.detach().flatten(1)) for g in self.param_groups for p in g["params"]}
        parts = [g | {"params": [self.matrices[p] for p in g["params"]]} for g in self.param_groups]
        self.inner = torch.optim.Muon(parts, lr=0.1, adjust_lr_fn="match_rms_adamw")

    def step(self):
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs["lr"] = ours["lr"]
        for p, matrix in self.matrices.items():
            matrix.grad = p.grad.flatten(1)
        self.inner.step()
        for p, matrix in self.matrices.items():
            p.detach().copy_(matrix.detach().view_as(p))


def test_muon_is_torchs_on_flattened_convolutions_and_adamw_elsewhere():
    def theirs(named):
        mine = {name: p for name, p in named.items() if hidden(name, p)}
        rest = {name: p for name, p in named.items() if name not in mine}
        return [halving(Flat(groups(mine, 0.5))), halving(torch.optim.AdamW(groups(rest, 0.5), lr=0.1))]

    actual, expected = run(recipes.optimizer("muon", RATE, 0.5, decayed, hidden, F64)), run_torch(theirs)
    for (name, x), y in zip(tree.items(actual), tree.leaves(expected), strict=True):
        exact = {"atol": 1e-7, "rtol": 1e-6}
        # torch iterates in bfloat16, which alone is off by 1e-3.
        torch.testing.assert_close(x, y, **({"atol": 2e-3, "rtol": 0} if name.startswith("stages") else exact))


def test_muon_leaves_weights_alone_that_do_not_decay():
    """With zero gradients, only the decay remains."""
    zero = tree.map(torch.zeros_like, params())
    optimizer = recipes.optimizer("muon", schedules.constant(0.1), 0.5, decayed, hidden, torch.float32)
    updates, _ = optimizer.update(zero, optimizer.init(params()), params())
    for name, leaf in tree.items(params()):
        expected = -0.05 * leaf if decayed(name, leaf) else torch.zeros_like(leaf)
        torch.testing.assert_close(tree.flatten(updates)[name], expected, atol=1e-8, rtol=1e-6)


# Names.


def test_errors():
    with pytest.raises(ValueError, match=r"warmup must be in \[0, steps\], steps is 50, got 60"):
        recipes.rate("cosine", PEAK, STEPS, 60)
    with pytest.raises(ValueError, match="schedule 'linear' is unknown; expected one of cosine, step, constant"):
        recipes.rate("linear", PEAK, STEPS, WARMUP)
    with pytest.raises(ValueError, match="optimizer 'adam' is unknown; expected one of sgd, adamw, muon"):
        recipes.optimizer("adam", RATE, 0.0, decayed, hidden)


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("stem.conv.weight", ("stem*",), True),
        ("stem.conv.weight", ("head*", "*.weight"), True),
        ("stages.0.conv.weight", ("stem*", "*.bias"), False),
        ("stages.10.weight", ("stages.1.*",), False),
        ("stages.10.weight", ("stages.1?.*",), True),
        ("stages.3.weight", ("stages.[0-2].*",), False),
        ("stem", ("STEM",), False),
        ("stem", (), False),
    ],
)
def test_matches(name, patterns, expected):
    assert recipes.matches(name, patterns) is expected


def test_patterns_that_fit_nothing():
    recipes.check_patterns(params(), ("head*", "*.weight"))
    recipes.check_patterns(params(), ())
    message = r"the pattern 'steam\*' fits no leaf; there are head.bias, head.weight, .* \.\.\.$"
    with pytest.raises(ValueError, match=message) as caught:
        recipes.check_patterns(params(), ("head*", "steam*"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="fits no leaf"):
        recipes.check_patterns({f"layer{i}": torch.zeros(1) for i in range(200)}, ("head",))
