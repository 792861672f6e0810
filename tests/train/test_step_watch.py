"""A train step that watches the per-example gradients takes the same step."""

import pytest
import torch
from torch.nn import functional as F

from core import tree
from core.per_example import PerExampleError, each
from core.scores import noise
from tests.train.test_step import apply, batches, initial, run
from train import optimizers
from train.step import Policy, make_step, step_keys

F64 = torch.float64
ADAMW = optimizers.adamw(1e-2, weight_decay=0.1)


def losses(params, batch, keys, rate=0.25):
    return F.cross_entropy(apply(params, batch["x"], keys, rate), batch["y"], reduction="none")


def mean_loss(params, batch, keys):
    return losses(params, batch, keys).mean()


def watch(reports):
    return {"norms": reports.total_norm, "trace": noise.total(noise.estimate(reports)).trace}


@pytest.mark.parametrize(
    ("compile", "micro_batches", "donate"),
    [
        *((False, n, donate) for n in (1, 4) for donate in (False, True)),
        pytest.param(True, 4, True, marks=pytest.mark.slow),
        pytest.param(True, 1, False, marks=pytest.mark.slow),
    ],
)
def test_watched_step_is_the_step(micro_batches, donate, compile):
    torch._dynamo.reset()
    options, data = {"micro_batches": micro_batches, "donate": donate}, batches(3, dtype=F64)
    state, metrics = run(make_step(mean_loss, ADAMW, compile=False, **options), initial(ADAMW, dtype=F64), data)
    step = make_step(losses, ADAMW, watch=watch, compile=compile, backend="aot_eager", **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        watched, actual = run(step, initial(ADAMW, dtype=F64), data)
    torch.testing.assert_close(watched, state, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close({name: actual[name] for name in metrics}, metrics, rtol=1e-9, atol=1e-12)
    assert actual["norms"].shape == (8,) and actual.keys() == {*metrics, "norms", "trace"}
    torch._dynamo.reset()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_is_watched_is_of_single_examples(micro_batches):
    """Against the stacked gradients; the masks of dropout are those that the step draws."""
    state, (batch,) = initial(ADAMW, dtype=F64), batches(1, dtype=F64)
    options = {"micro_batches": micro_batches, "compile": False, "watch": watch}
    _, metrics = make_step(losses, ADAMW, **options)(state, batch)
    inputs = (batch, step_keys(state.key, state.step, 8))
    rows = torch.cat([g.flatten(1) for g in tree.leaves(each(lambda p, b: losses(p, *b), state.params, inputs))], 1)
    torch.testing.assert_close(metrics["norms"], rows.norm(dim=1))
    torch.testing.assert_close(metrics["trace"], torch.cov(rows.T).trace())
    torch.testing.assert_close(metrics["grad_norm"], rows.mean(0).norm())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_bfloat16_policy(micro_batches):
    """Parameters and gradients stay float32, and the norms are those of bfloat16 gradients, to their rounding."""
    batch = batches(1)[0]
    options = {"micro_batches": micro_batches, "compile": False, "watch": watch}
    _, full = make_step(losses, ADAMW, **options)(initial(ADAMW), batch)
    state, half = make_step(losses, ADAMW, policy=Policy(torch.bfloat16), **options)(initial(ADAMW), batch)
    assert all(x.dtype == torch.float32 for x in tree.leaves(state.params))
    assert half["norms"].dtype == half["loss"].dtype == torch.float32
    torch.testing.assert_close(half["norms"], full["norms"], rtol=0.05, atol=0)
    assert not torch.equal(half["norms"], full["norms"])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_bfloat16_policy_has_the_forward_pass_of_training(micro_batches):
    """A net that takes rounded parameters back to float32: both passes use the rounded ones."""

    def upcast(params, batch, keys):
        hidden = torch.tanh(F.linear(batch["x"].float(), params["first"]["weight"].float()) * 4)
        logits = (hidden @ params["last"]["weight"].float().T) + params["last"]["bias"].float()
        return F.cross_entropy(logits, batch["y"], reduction="none")

    options = {"micro_batches": micro_batches, "compile": False, "policy": Policy(torch.bfloat16)}
    (batch,) = batches(1)
    state, metrics = make_step(upcast, ADAMW, **options)(initial(ADAMW), batch)
    watched, actual = make_step(upcast, ADAMW, watch=watch, **options)(initial(ADAMW), batch)
    # Sums of eight float32 in another order; the gradients are rounded to bfloat16.
    torch.testing.assert_close(actual["loss"], metrics["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(actual["grad_norm"], metrics["grad_norm"], rtol=2**-8, atol=0)


def test_other_quantities():
    step = make_step(losses, ADAMW, watch=lambda f: {"moment": tree.norm(f.square)}, want=("square",), compile=False)
    _, metrics = step(initial(ADAMW), batches(1)[0])
    assert metrics["moment"] > 0


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_batch_norm_is_refused(compile):
    torch._dynamo.reset()
    step = make_step(losses, ADAMW, watch=watch, compile=compile, backend="aot_eager")
    with pytest.raises(ValueError, match="watch: the net has Stats .'norm.count'., so its examples are not apart"):
        step(initial(ADAMW, norm=True), batches(1)[0])
    torch._dynamo.reset()


def test_mean_loss_is_refused():
    with pytest.raises(PerExampleError, match="loss"):
        make_step(mean_loss, ADAMW, watch=watch, compile=False)(initial(ADAMW), batches(1)[0])
