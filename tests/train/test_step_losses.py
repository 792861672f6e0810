"""Forms of loss that a train step takes: scalar, per example, weighted; in micro-batches the last two are exact."""

import pytest
import torch
from torch.nn import functional as F

from core import random, spec, tree
from core.layers import embedding, embedding_spec, linear, linear_spec
from tests.train.test_step import apply, batches, initial
from train import optimizers
from train.losses import WeightedLoss, cross_entropy, token_cross_entropy
from train.step import Policy, make_step, start

PAD, TOKENS = 0, 6
MODEL = {"tokens": embedding_spec(9, 8), "head": linear_spec(8, 9)}
SGD = optimizers.sgd(0.5)


def text(lengths=(6, 6, 5, 4, 3, 2, 1, 1)):
    """Tokens (examples, TOKENS), padded after the length of each example."""
    tokens = random.randint(random.key(3), (len(lengths), TOKENS), 1, 9).long()
    return torch.where(torch.arange(TOKENS) < torch.tensor(lengths)[:, None], tokens, PAD)


def token_loss(params, tokens, keys):
    logits = linear(params["head"], embedding(params["tokens"], tokens))
    loss = token_cross_entropy(logits, tokens, ignore_id=PAD, label_smoothing=0.1)
    hits = ((logits.argmax(-1) == tokens) & (tokens != PAD)).sum(1)
    return loss, {"accuracy": hits.sum() / loss.weights.sum().clamp(min=1)}


def scalar_loss(params, tokens, keys):
    loss, metrics = token_loss(params, tokens, keys)
    return loss.mean, metrics


def begin(dtype=torch.float64):
    return start(random.key(0), spec.init(random.key(1), MODEL, dtype), MODEL, SGD)


def result(loss, tokens, state=None, **options):
    return make_step(loss, SGD, **{"compile": False} | options)(begin() if state is None else state, tokens)


@pytest.mark.parametrize(
    ("micro_batches", "donate", "compile"),
    [
        *((n, donate, False) for n in (2, 4, 8) for donate in (False, True)),
        pytest.param(4, True, True, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_of_a_mean_over_tokens(micro_batches, donate, compile):
    """The lengths differ from part to part: means of parts are not the mean (transformers#24725)."""
    torch._dynamo.reset()
    tokens = text()
    options = dict(micro_batches=micro_batches, compile=compile, backend="aot_eager", donate=donate)
    expected, metrics = result(token_loss, tokens)
    actual, part_metrics = result(token_loss, tokens, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(part_metrics, metrics, rtol=1e-6, atol=0)  # the accuracy is a float32
    _, scalar = result(scalar_loss, tokens, **options)
    assert abs(scalar["grad_norm"] / metrics["grad_norm"] - 1) > 0.01


def test_the_mean_over_tokens_is_torchs():
    tokens, state = text(), begin()

    def objective(params):
        logits = linear(params["head"], embedding(params["tokens"], tokens))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=PAD, label_smoothing=0.1)

    expected = torch.func.grad(objective)(state.params)
    after, metrics = result(token_loss, tokens)
    actual = tree.map(lambda old, new: (old - new) / 0.5, state.params, after.params)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(metrics["loss"], objective(state.params))


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_parts_without_a_token_do_not_count(micro_batches):
    tokens = text((0, 0, 0, 0, 6, 3, 1, 4))
    expected, metrics = result(token_loss, tokens[4:])
    actual, all_metrics = result(token_loss, tokens, micro_batches=micro_batches)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(all_metrics["loss"], metrics["loss"])
    state = begin()
    after, metrics = result(token_loss, torch.zeros_like(tokens), micro_batches=micro_batches)
    torch.testing.assert_close(after.params, state.params, rtol=0, atol=0)
    assert metrics["loss"] == metrics["grad_norm"] == 0


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_parts_with_a_loss_and_no_weight_count(micro_batches):
    """As pictures without an object do, whose background is learned from: sum of values / sum of weights."""

    def loss(params, tokens, keys):
        values = token_loss(params, tokens, keys)[0].values
        own = WeightedLoss(values.detach(), (tokens[:, 1] != PAD).double())
        return WeightedLoss(values, (tokens[:, 4] != PAD).double()), {"each": values, "weighted": own}

    tokens = text((2, 3, 4, 1, 1, 6, 6, 3))
    expected, metrics = result(loss, tokens)
    actual, others = result(loss, tokens, micro_batches=micro_batches)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert others["each"].shape == (8,) and others["weighted"].ndim == 0
    torch.testing.assert_close(others, metrics, rtol=1e-12, atol=0)


def losses(params, batch, keys):
    return F.cross_entropy(apply(params, batch["x"], keys, 0.3), batch["y"], reduction="none")


FORMS = {
    "per example": losses,
    "with metrics": lambda *args: (losses(*args), {}),
    "equal weights": lambda *args: WeightedLoss(
        0.7 * losses(*args), torch.full((len(args[2]),), 0.7, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_mean(form, micro_batches):
    (batch,) = batches(1, dtype=torch.float64)
    state = initial(SGD, dtype=torch.float64)
    expected, metrics = result(lambda *args: losses(*args).mean(), batch, state)
    actual, others = result(FORMS[form], batch, state, micro_batches=micro_batches)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(others, metrics, rtol=1e-12, atol=0)


def test_metrics_in_half_precision_are_logged_in_float32():
    def loss(params, batch, keys):
        logits = apply(params, batch["x"], keys, 0.0)
        assert logits.dtype == torch.bfloat16
        hits = logits.argmax(-1) == batch["y"]
        return cross_entropy(logits, batch["y"]).to(torch.bfloat16), {"hits": hits.sum(), "largest": logits.amax()}

    for micro_batches in (1, 2):
        options = dict(policy=Policy(torch.bfloat16), micro_batches=micro_batches)
        _, metrics = result(loss, batches(1)[0], initial(SGD), **options)
        assert {x.dtype for x in metrics.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (
            lambda p, b, k: WeightedLoss(losses(p, b, k), torch.ones(3)),
            {},
            r"weights have shape \(3,\)",
        ),
        (lambda p, b, k: losses(p, b, k)[1:], {}, r"returned shape \(7,\); expected a scalar, or one loss per example"),
        (lambda p, b, k: None, {}, "returned NoneType"),
        (FORMS["equal weights"], {"watch": lambda reports: {}}, "the loss has weights; per-example gradients"),
    ],
    ids=["weights", "examples", "nothing", "watch"],
)
def test_other_losses_are_refused(loss, options, message):
    with pytest.raises(ValueError, match=message):
        result(loss, batches(1)[0], initial(SGD), **options)


@pytest.mark.parametrize("options", [{}, {"watch": lambda reports: {}}], ids=["mean", "watch"])
def test_stats_among_the_parameters_are_refused(options):
    state = initial(SGD, norm=True)
    state = state._replace(params=tree.merge(state.params, state.stats), stats={})
    with pytest.raises(ValueError, match="'norm.count' is a Stat among the parameters; make the state by `create`"):
        result(losses, batches(1)[0], state, **options)
