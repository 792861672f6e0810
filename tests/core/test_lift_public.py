"""Architectures of other libraries, lifted: exact per example, with no layer mapped that need not be."""

import pytest
import torch
from torch import nn

from core import per_example, random, tree
from core.lift import lift
from core.per_example import PerExampleError
from tests.registry.public_modules import BUILDS, N, public

# One for each thing that a module may do: tie weights, take and return objects, a Conv1D, fold windows into the batch,
# learn a bias of the attention.
QUICK = ("gpt2", "llama", "bert", "swin", "t5")
MAPPED = {
    "deberta_v2": {"DisentangledSelfAttention"},
    "mixtral": {"MixtralSparseMoeBlock"},
    "swin": {"SwinLayer"},
    "torchvision's SwinTransformer": {"ShiftedWindowAttention"},
}
"""Kinds of layers that fold the batch into another axis, or spread what has no batch axis over it."""


def gradients(about) -> dict[str, torch.Tensor]:
    """(N, *shape) by parameter: plain autograd of the module itself, one example after the other."""
    rows: dict[str, list] = {}
    for i in range(N):
        loss = about.losses(about.module, tuple(x[i : i + 1] for x in about.batch)).sum()
        own = torch.autograd.grad(loss, list(about.module.parameters()), allow_unused=True)
        for (name, p), g in zip(about.module.named_parameters(), own, strict=True):
            rows.setdefault(name, []).append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(gs).detach() for name, gs in rows.items()}


def marked(name: str):
    heavy = "inception" in name or "timm" in name
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.long if heavy else pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in BUILDS])
def test_public_modules_are_exact_per_example(name):
    if "timm" in name:
        pytest.importorskip("timm")
    about = public(name)
    params, stats, apply = lift(about.module)

    def loss(p, batch):
        values = tree.merge(p, stats)
        return about.losses(lambda *args, **kwargs: apply(values, *args, **kwargs), batch)

    plan = per_example.plan(loss, params, about.batch, ("norm", "gram", "square"))
    out = per_example.reports(loss, params, about.batch, ("norm", "gram", "square"), plan=plan)
    expected = gradients(about)
    total = torch.cat([g.flatten(1) for g in expected.values()], 1).norm(dim=1)
    for parameter, norm in tree.items(out.norm):
        g = expected[parameter].flatten(1)
        pairs = ((norm / total, g.norm(dim=1) / total), (tree.get(out.gram, parameter), g @ g.T))
        for ours, theirs in (*pairs, (tree.get(out.square, parameter).flatten(), g.square().sum(0))):
            scale = 1.0 if ours is pairs[0][0] else float(total.max()) ** 2
            torch.testing.assert_close(
                ours / scale, theirs / scale, rtol=0, atol=1e-10, msg=lambda m, n=parameter: f"{n}: {m}"
            )
    assert {layer.rpartition("(")[2].rstrip(")") for layer in plan.layers} == MAPPED.get(name, set())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "bert" else pytest.mark.long) for name in QUICK]
)
def test_public_modules_compile(name):
    about = public(name)
    params, stats, apply = lift(about.module)

    def loss(p, batch):
        values = tree.merge(p, stats)
        return about.losses(lambda *args, **kwargs: apply(values, *args, **kwargs), batch)

    plan = per_example.plan(loss, params, about.batch)

    def norms(p, batch):
        return per_example.reports(loss, p, batch, plan=plan).total_norm

    torch._dynamo.reset()
    compiled = torch.compile(norms, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(params, about.batch), norms(params, about.batch), rtol=1e-9, atol=0)


class Folds(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x.reshape(-1, 4)).tanh().reshape(x.shape))


@pytest.mark.parametrize("traced", [False, True])
def test_a_layer_that_folds_the_batch_is_mapped_and_named(traced):
    layer = torch.fx.symbolic_trace(Folds()) if traced else Folds()
    params, _, apply = lift(nn.Sequential(layer, nn.Linear(3, 2)).double())
    x = random.normal(random.key(0), (N, 5, 4), torch.float64)

    def loss(p, x):
        return apply(p, x).square().sum((1, 2))

    plan = per_example.plan(loss, params, x)
    assert list(plan.layers) == ["0 (Folds)"]
    assert (
        str(plan)
        .splitlines()[-1]
        .startswith("layer 0 (Folds) is mapped over the examples: '0.first.weight' meets (5*N")
    )
    assert [leaf.uses[0].called for leaf in plan.leaves.values()] == 4 * ["spread"] + ["spread", "linear"]
    assert per_example.verify(loss, params, x) < 1e-12


class Sorts(Folds):
    """Sends the tokens of all examples to a layer by their values, as mixtures of experts do."""

    def forward(self, x):
        rows = self.first(x.reshape(-1, 4))
        places = (rows[:, 0] > 0).nonzero()[:, 0]
        return rows.new_zeros(len(rows), 3).index_add(0, places, self.second(rows[places])).reshape(len(x), -1, 3)


def test_a_layer_that_sorts_all_tokens_by_value_is_refused_by_name():
    params, _, apply = lift(Sorts().double())
    x = random.normal(random.key(0), (N, 5, 4), torch.float64)
    with pytest.raises(PerExampleError, match="'first.weight' meets"):
        per_example.reports(lambda p, x: apply(p, x).square().sum((1, 2)), params, x)


@pytest.mark.slow
def test_a_mixture_of_experts_keeps_its_own_form():
    """Inside reports its experts are gathered per token, so that they can be mapped; the module stays as it is."""
    about = public("mixtral")
    params, _, apply = lift(about.module)
    plan = per_example.plan(lambda p, batch: about.losses(lambda ids: apply(p, ids), batch), params, about.batch)
    assert {layer.partition(" ")[2] for layer in plan.layers} == {"(MixtralSparseMoeBlock)"}
    assert about.module.config._experts_implementation == "eager"
    assert all(m.config._experts_implementation == "eager" for m in about.module.modules() if hasattr(m, "config"))
