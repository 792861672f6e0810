"""Training the adapters of a net that stays as it is."""

from dataclasses import replace

import pytest
import torch

from core import lora, random, spec, tree
from nets.language import gpt2
from train import optimizers
from train.losses import cross_entropy
from train.step import make_step, start

CFG = gpt2.Config(vocabulary=11, context=8, layers=2, heads=2, width=16, dropout=0.1)
MODEL = gpt2.spec(CFG)
TARGETS = {"attn.qkv.weight": ((0, 16), (32, 48)), "mlp.up.weight": None}


@pytest.mark.slow
def test_a_compiled_step_equals_the_eager_one():
    """By inductor, in one graph, with adapters of row blocks and magnitudes."""
    torch._dynamo.reset()
    cfg = replace(CFG, layers=1, dropout=0.0)
    base = spec.init(random.key(0), gpt2.spec(cfg))
    adapters = lora.spec(gpt2.spec(cfg), TARGETS, 4, magnitudes=True)
    values = lora.init(random.key(1), adapters, base)
    values = tree.map(lambda a: a + 0.05, values)  # b = 0 would hide most mistakes
    batch = random.randint(random.key(2), (8, 8), 0, 11).long()

    def loss(adapters, batch, keys):
        params = lora.adapted(base, adapters, lora.scale(4, 8))
        logits = gpt2.apply(params, batch[:, :-1], cfg, key=keys, train=True)
        return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    states = []
    for compile in (False, True):
        optimizer = optimizers.sgd(0.1)  # Adam would enlarge rounding errors
        step, state = make_step(loss, optimizer, compile=compile), start(random.key(3), values, adapters, optimizer)
        for _ in range(3):
            state, metrics = step(state, batch)
        states.append((state.params, metrics["loss"]))
    (params, value), (expected, loss) = states
    torch.testing.assert_close(value, loss, rtol=1e-5, atol=0)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6), params, expected)
    assert not torch.equal(tree.leaves(params)[0], tree.leaves(values)[0])


def test_steps_change_the_adapters_alone():
    base = spec.init(random.key(0), MODEL)
    before = tree.map(torch.clone, base)
    adapters = lora.spec(MODEL, TARGETS, 4, magnitudes=True)
    values = lora.init(random.key(1), adapters, base)
    batch = random.randint(random.key(2), (8, 8), 0, 11).long()

    def loss_by(form):
        def loss(adapters, batch, keys):
            params = form(base, adapters, lora.scale(4, 8))
            logits = gpt2.apply(params, batch[:, :-1], CFG, key=keys, train=True)
            return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

        return loss

    optimizer = optimizers.adamw(1e-2)
    states = []
    for form in (lora.adapted, lora.merge):
        step = make_step(loss_by(form), optimizer, compile=False)
        state = start(random.key(3), values, adapters, optimizer)
        losses = []
        for _ in range(20):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0] - 0.05
        states.append(state)
    for name, leaf in tree.items(states[0].params):
        assert not torch.equal(leaf, tree.get(values, name)), name
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), base, before)
    # Adam enlarges what rounding leaves between the two forms.
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3), *(s.params for s in states))
    assert tree.count(states[0].opt_state) < tree.count(base)
