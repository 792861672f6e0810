"""Lifted modules: the module's own outputs, gradients and running statistics."""

from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from core import stats as statistics
from core import tree
from core.lift import lift
from core.per_example import PerExampleError, reports

F64 = torch.float64


def conv_net(momentum=0.2):
    """Three kinds of batch norm, numeric names, an activation without parameters between."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.Flatten(),
        nn.Linear(16, 3),
        nn.BatchNorm1d(3, affine=False, momentum=0.3),
    ).double()


def batches(n, size=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 2, 6, 6, generator=generator, dtype=F64) for _ in range(n)]


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")


def state_of(module):
    values = {name: x.detach().clone() for name, x in module.state_dict().items()}
    return values, [p._version for p in module.parameters()], [m.training for m in module.modules()]


def assert_untouched(module, before):
    torch.testing.assert_close(state_of(module), before, rtol=0, atol=0)
    assert all(p.grad is None for p in module.parameters())


def loss(values, x, apply, train=True):
    return apply(values, x, train=train).square().mean()


# The cumulative average (momentum None) reads its count with float(), which torch itself does not compile.
@pytest.mark.parametrize(
    ("compile", "momentum"), [(False, 0.2), pytest.param(True, 0.2, marks=pytest.mark.slow), (False, None)]
)
def test_training_follows_the_module_for_several_steps(compile, momentum):
    module = conv_net(momentum)
    before = state_of(module)
    params, stats, apply = lift(module)
    reference = deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)

    def step(params, stats, x):
        gradient, increments = grad(lambda p, s: loss(tree.merge(p, s), x, apply), argnums=(0, 1))(params, stats)
        return tree.map(lambda p, g: p - 0.1 * g, params, gradient), statistics.update(stats, increments)

    step = compiled(step) if compile else step
    for x in batches(3):
        params, stats = step(params, stats, x)
        optimizer.zero_grad()
        reference(x).square().mean().backward()
        optimizer.step()
    values = tree.flatten(tree.merge(params, stats))
    assert values.pop("count") == 3
    expected = reference.state_dict()
    assert set(values) == set(expected)
    for name, x in expected.items():
        torch.testing.assert_close(values[name], x.to(F64), rtol=1e-9, atol=1e-12, msg=name)
    reference.eval()
    x = batches(1)[0]
    torch.testing.assert_close(apply(tree.merge(params, stats), x), reference(x))
    assert_untouched(module, before)


def test_sequential_names():
    params, stats, _ = lift(conv_net())
    assert tree.names(params) == [f"{i}.{leaf}" for i in (0, 1, 3, 4, 6) for leaf in ("bias", "weight")]
    kinds = ("num_batches_tracked", "running_mean", "running_var")
    assert tree.names(stats) == [*(f"{i}.{leaf}" for i in (1, 4, 7) for leaf in kinds), "count"]
    many = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(12)))
    assert isinstance(lift(many).params, list) and tree.names(lift(many).params) == [f"{i}.weight" for i in range(12)]


def test_per_example_gradients_in_eval_mode():
    module = conv_net()
    module(batches(1)[0])  # statistics other than the initial ones
    params, stats, apply = lift(module)
    x = batches(1)[0]

    def one(p, x):
        return loss(tree.merge(p, stats), x[None], apply, train=False)

    each = vmap(grad(one), in_dims=(None, 0))(params, x)
    module.eval()
    for i in range(len(x)):
        module.zero_grad()
        module(x[i : i + 1]).square().mean().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(tree.get(each, name)[i], p.grad)


def test_ensembles_train_as_one_by_one():
    modules = [conv_net() for _ in range(3)]
    for i, module in enumerate(modules):
        module[0].weight.data.mul_(1 + i)
    lifted = [lift(module) for module in modules]
    params, stats = (tree.stack([getattr(x, kind) for x in lifted]) for kind in ("params", "stats"))
    x, apply = batches(1)[0], lifted[0].apply

    def increments(p, s):
        return grad(lambda p, s: loss(tree.merge(p, s), x, apply), argnums=(0, 1))(p, s)

    gradients, reports = vmap(increments)(params, stats)
    stats = statistics.update(stats, reports)
    for i, module in enumerate(modules):
        module(x).square().mean().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(tree.get(gradients, name)[i], p.grad, rtol=1e-7, atol=1e-10)
        for name, b in module.named_buffers():
            torch.testing.assert_close(tree.get(stats, name)[i], b.to(F64))


class Two(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("ids", torch.arange(3))
        self.register_buffer("factor", torch.full((3,), 2.0), persistent=False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        y = self.norm(x) * self.factor
        return Two(y, {"ids": self.ids, "y": y + 1})


@pytest.mark.parametrize(
    "of",
    [
        lambda out: out.first.sum(),
        lambda out: out.second["y"].sum(),
        lambda out: out.first.sum() + out.second["y"].sum(),
    ],
)
def test_any_output_carries_the_reports(of):
    module = TwoOutputs()
    params, stats, apply = lift(module)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    increments = grad(lambda s: of(apply(tree.merge(params, s), x, train=True)))(stats)
    stats = statistics.update(stats, increments)
    assert module.calls == 0 and module.norm.num_batches_tracked == 0
    out = module(x)
    assert tree.names(stats) == ["count", "ids", "norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
    for name, b in module.state_dict().items():
        if name in tree.names(stats):
            torch.testing.assert_close(tree.get(stats, name), b, check_dtype=False)
    again = apply(tree.merge(params, stats), x, train=True)
    torch.testing.assert_close(again.first, out.first)
    assert torch.equal(again.second["ids"], module.ids) and again.second["ids"].dtype == torch.int64


def test_unused_module_reports_nothing():
    params, stats, apply = lift(conv_net())
    increments = grad(lambda s: 0.0 * s["count"])(stats)
    torch.testing.assert_close(statistics.update(stats, increments), stats)


def by_hand(loss, params, batch):
    """Norms per example of each parameter, from batches of one."""
    rows = []
    for i in range(len(tree.leaves(batch)[0])):
        rows.append(grad(lambda p, i=i: loss(p, tree.map(lambda x: x[i : i + 1], batch)).sum())(params))
    return tree.map(lambda *gs: torch.stack([g.norm() for g in gs]), *rows)


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_reports_per_example_of_lifted_modules(mode):
    params, stats, apply = lift(conv_net())
    params = {"module": params, "scale": torch.tensor([1.0, -2.0, 0.5], dtype=F64)}

    def loss(p, x):
        return torch.sin(p["scale"] * apply(tree.merge(p["module"], stats), x)).sum(1)

    def norms(p, x):
        return reports(loss, p, x, ("norm", "gram")).norm

    x = batches(1, size=4)[0]
    out = (compiled(norms) if mode == "compiled" else norms)(params, x)
    torch.testing.assert_close(out, tree.sort(by_hand(loss, params, x)), rtol=1e-9, atol=1e-12)


def test_reports_per_example_name_the_layer_that_mixes():
    params, stats, apply = lift(conv_net())
    with pytest.raises(PerExampleError, match="lift: layer '1' in training mode mixes the examples of a batch"):
        reports(lambda p, x: apply(tree.merge(p, stats), x, train=True).sum(1), params, batches(1)[0])
    plain = nn.Sequential(nn.Linear(2, 3), nn.InstanceNorm1d(3), nn.Flatten()).double()
    params, stats, apply = lift(plain)
    x = torch.randn(4, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    loss = lambda p, x: apply(p, x.flatten(1)[:, None, :2].expand(-1, 3, -1), train=True).sin().sum(1)  # noqa: E731
    torch.testing.assert_close(reports(loss, params, x).norm, tree.sort(by_hand(loss, params, x)))


def test_norm_without_running_statistics_is_named():
    """It normalises by the batch in eval mode too."""
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    params, _, apply = lift(module)
    with pytest.raises(PerExampleError, match="lift: layer '1' in eval mode too mixes the examples"):
        reports(lambda p, x: apply(p, x).sum(1), params, torch.randn(3, 4))


def test_functional_call_in_the_loss():
    """A parameter inside the loss is a tensor, so that a module may take it; every operation then has its rule."""
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    params = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(0))

    def loss(p, x):
        return torch.func.functional_call(module, p, (x,)).sin().sum(1)

    torch.testing.assert_close(reports(loss, params, x).norm, tree.sort(by_hand(loss, params, x)))


class Attending(nn.Module):
    """Samples inside its forward, without a Dropout module."""

    def __init__(self, rate):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, dropout=rate, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class DropPath(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop_prob = 0.1


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5))), r"1\.0"),
        (nn.Sequential(nn.Dropout(0.0), nn.AlphaDropout(0.1)), "1"),
        (nn.Sequential(nn.RReLU()), "0"),
        (Attending(0.1), "inner"),
        (nn.LSTM(4, 4, num_layers=2, dropout=0.2), "LSTM"),
        (nn.Sequential(DropPath()), "0"),
    ],
)
def test_random_layers_are_refused_in_training(module, name):
    params, stats, apply = lift(module)
    with pytest.raises(ValueError, match=f"lift: layer '{name}' draws random numbers in training mode"):
        apply(tree.merge(params, stats), torch.ones(2, 3, 4), train=True)


def test_random_layers_pass_in_eval_mode_and_at_rate_zero():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    module = Attending(0.1)
    params, _, apply = lift(module)
    torch.testing.assert_close(apply(params, x), module.eval()(x))
    module = Attending(0.0)
    params, _, apply = lift(module)
    torch.testing.assert_close(apply(params, x, train=True), module(x))


def test_what_is_no_module_is_named():
    for wrong, kind in ((nn.Linear, "the class Linear"), ({"weight": torch.ones(2)}, "dict"), (F.relu, "function")):
        with pytest.raises(TypeError, match=f"lift: expected an nn.Module, got {kind}"):
            lift(wrong)


def test_values_are_those_of_the_module():
    """A value that is missing is not silently the module's own."""
    params, stats, apply = lift(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    x, values = torch.ones(2, 2), tree.merge(params, stats)
    for wrong, message in (
        (params, r"missing \['1.num_batches_tracked', '1.running_mean', '1.running_var', 'count'\], left over \[\]"),
        (tree.merge(values, {"2": {"weight": x}}), r"missing \[\], left over \['2.weight'\]"),
        (x, r"got Tensor missing \['0.bias'"),
        (None, r"got NoneType missing \['0.bias'"),
    ):
        with pytest.raises(ValueError, match=r"lift: apply expects tree.merge\(params, stats\) first, .*" + message):
            apply(wrong, x)


def test_what_cannot_be_lifted_is_named():
    with pytest.raises(ValueError, match=r"lift: '1\.weight' has no shape yet"):
        lift(nn.Sequential(nn.Linear(1, 1), nn.LazyLinear(2)))
    counter = nn.Sequential(nn.Linear(1, 1))
    counter[0].register_buffer("count", torch.zeros(()))
    with pytest.raises(ValueError, match=r"lift: '0\.count' is called `count`"):
        lift(counter)


def test_parametrised_modules_lift_too():
    torch.manual_seed(0)
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double()
    params, _, apply = lift(module)
    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    gradient = grad(lambda p: apply(p, x, train=True).square().sum())(params)
    module(x).square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(tree.get(gradient, name), p.grad)
