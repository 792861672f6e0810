"""train.gradients.examination: one example after the other with plain autograd."""

import numpy as np
import pytest
import torch

from core import per_example, random, spec, tree
from nets.classifiers import mlp
from train.data.images import arrays
from train.gradients import examination
from train.gradients.examination import examine
from train.losses import cross_entropy

CFG = mlp.Config((64, 12, 10))


def loss(params, batch):
    logits = mlp.apply(params, batch["inputs"], CFG)
    return cross_entropy(logits, batch["labels"], reduction="none"), {"logits": logits}


@pytest.fixture(scope="module")
def case():
    images, labels = arrays.digits()[0]
    data = {"inputs": images[:50].clone(), "labels": labels[:50]}
    return tree.cast(spec.init(random.key(0), mlp.spec(CFG)), torch.float64), tree.cast(data, torch.float64)


@pytest.fixture(scope="module")
def gradients(case):
    """(50, parameters), and the losses, by plain autograd."""
    params, data = case
    rows, losses = [], []
    for i in range(50):
        leaves = [x.clone().requires_grad_() for x in tree.leaves(params)]
        value = loss(tree.unflatten(params, leaves), tree.map(lambda x, i=i: x[i : i + 1], data))[0].sum()
        rows.append(torch.autograd.grad(value, leaves))
        losses.append(value.item())
    return [torch.stack(column).flatten(1).numpy() for column in zip(*rows, strict=True)], np.array(losses)


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture(scope="module")
def out(case):
    params, data = case
    options = {"labels": data["labels"], "size": 4096, "neighbours": 3, "pairs": 4}
    return examine(loss, params, data, 16, **options)  # the last batch is shorter


def test_scores_are_those_of_plain_autograd(case, gradients, out):
    layers, losses = gradients
    whole = np.concatenate(layers, 1)
    mean = whole.mean(0)
    np.testing.assert_allclose(out.scores["loss"], losses, rtol=1e-6)  # kept in the precision of the losses
    np.testing.assert_allclose(out.scores["norm"], np.linalg.norm(whole, axis=1), rtol=1e-6)
    np.testing.assert_allclose(out.scores["cosine"], cosine(whole, mean), atol=1e-6)
    np.testing.assert_allclose(out.layers, np.stack([np.linalg.norm(x, axis=1) for x in layers], 1), rtol=1e-6)
    assert out.mean_norm == pytest.approx(np.linalg.norm(mean), rel=1e-6)
    logits = mlp.apply(case[0], case[1]["inputs"], CFG)
    error = logits.softmax(1) - torch.nn.functional.one_hot(case[1]["labels"], 10)
    np.testing.assert_allclose(out.scores["el2n"], error.norm(dim=1).numpy(), rtol=1e-6)


def test_noise_scale_is_the_unbiased_one(gradients, out):
    """tr Σ of numpy's covariance, and |G|² = |mean|² - tr Σ / N."""
    layers, _ = gradients
    traces = np.array([np.var(x, axis=0, ddof=1).sum() for x in layers])
    squares = np.array([np.square(x.mean(0)).sum() for x in layers]) - traces / 50
    assert out.noise_scale == pytest.approx(traces.sum() / squares.sum(), rel=1e-5)
    np.testing.assert_allclose(out.layer_noise, np.where(squares > 0, traces / squares, np.inf), rtol=1e-5)


def test_pairs_have_exact_cosines_and_neighbours_nearly(gradients, out):
    whole = np.concatenate(gradients[0], 1)
    for pair in (*out.redundant, *out.conflicting):
        assert pair.cosine == pytest.approx(cosine(whole[pair.first], whole[pair.second]), abs=1e-6)
    exact = cosine(whole[:, None], whole[out.neighbours.indices.numpy()])
    np.testing.assert_allclose(out.neighbours.cosines.numpy(), exact, atol=0.1)  # 6 / sqrt(4096)
    assert np.all(np.diff([pair.cosine for pair in out.redundant]) <= 0)
    assert out.conflicting[0].cosine < 0 < out.redundant[-1].cosine


def test_self_influence_is_nearly_that_of_the_gradients(gradients, out):
    """gᵀ (F + λ)⁻¹ g = K (K / N + λ)⁻¹ on the diagonal, K the Gram matrix: no sketch and no matrix of parameters."""
    whole = np.concatenate(gradients[0], 1)
    gram = whole @ whole.T
    damping = 0.1 * np.trace(gram) / 50 / 4096
    expected = np.diagonal(gram @ np.linalg.inv(gram / 50 + damping * np.eye(50)))
    np.testing.assert_allclose(out.scores["self_influence"], expected, rtol=0.02)


@pytest.mark.slow
def test_interrupted_pass_goes_on_to_the_same_bits(case, out, tmp_path, monkeypatch):
    params, data = case
    calls, sketches = [], examination.sketches.gradient_sketches

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sketches(*args, **options)

    options = {"labels": data["labels"], "size": 4096, "neighbours": 3, "pairs": 4, "folder": tmp_path / "a"}
    with monkeypatch.context() as patch:
        patch.setattr(examination.sketches, "gradient_sketches", stopping)
        with pytest.raises(KeyboardInterrupt):
            examine(loss, params, data, 16, **options)
    again = examine(loss, params, data, 16, resume=True, **options)
    assert all(np.array_equal(again.scores[name], out.scores[name]) for name in out.scores)


def test_loss_that_looks_at_values_is_not_mapped(case):
    params, data = case

    def looking(p, batch):
        return loss(p, batch) if float(batch["inputs"].max()) >= 0 else None

    options = {"labels": data["labels"], "size": 16, "neighbours": 2, "pairs": 1}
    expected = examine(loss, params, data, 50, **options)
    hashes = examination.sketches.hashes(random.key(0), params, 16)
    with pytest.raises(RuntimeError, match="vmap"):
        examination.sketched(looking, params, data, hashes, 16, 8)
    out = examination.sketched(looking, params, data, hashes, 16, None)
    np.testing.assert_allclose(out.numpy(), expected.sketches, rtol=1e-6, atol=1e-9)
    assert not examination._maps(looking, params, data) and examination._maps(loss, params, data)


def test_losses_without_logits(case):
    params, data = case
    out = examine(lambda p, batch: (loss(p, batch)[0], {}), params, data, 50, size=16, neighbours=2, pairs=1)
    assert out.log_probs is None and "el2n" not in out.scores


def test_refusals(case):
    params, data = case
    with pytest.raises(ValueError, match="expected at least two examples to examine, found 1"):
        examine(loss, params, tree.map(lambda x: x[:1], data), 16)

    def mixing(p, batch):
        losses, aux = loss(p, batch)
        return losses - losses.mean(), aux

    with pytest.raises(per_example.PerExampleError):
        examine(mixing, params, data, 16, size=16)
    broken = {**data, "inputs": data["inputs"].index_fill(0, torch.tensor(7), torch.nan)}
    with pytest.raises(ValueError, match=r"the gradient of example 7 is not finite \(loss nan\)"):
        examine(loss, params, broken, 16, size=16)
