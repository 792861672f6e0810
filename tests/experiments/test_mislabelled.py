"""experiments/mislabelled.py: its scores against plain autograd, its figures against scikit-learn."""

import functools
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import sklearn.neighbors
import torch

from tests.experiments import runs
from tests.experiments.runs import result
from train.data.images import arrays
from train.run import checkpoints

call, completed = (functools.partial(function, "mislabelled") for function in (runs.call, runs.completed))
QUICK = ("--examples", "200", "--widths", "16", "--batch", "20", "--rank", "5", "--steps", "200")
SNAPSHOTS = (50, 100, 150, 200)
SCORES = ("loss", "mean_loss", "el2n", "grand", "tracin", "influence", "neighbours")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run, runs/mislabelled/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("mislabelled")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, "--snapshot-every", "50", "--name", "whole") == 0
    return folder


def scores_of(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.import_params(run / "scores.safetensors")


def modules(run: Path) -> list[torch.nn.Module]:
    """The nets of the snapshots."""
    nets = []
    for step in SNAPSHOTS:
        params = checkpoints.import_params(run / "snapshots" / f"{step}.safetensors")["layers"]
        module = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
        module[0].load_state_dict(params[0])
        module[2].load_state_dict(params[1])
        nets.append(module)
    return nets


def test_labels_that_are_flipped(place):
    scored, (clean, _) = scores_of(place / "runs" / "mislabelled" / "whole"), arrays.digits()
    wrong, label, true = scored["wrong"], scored["label"], clean.labels[:200]
    assert wrong.sum() == 20 and torch.equal(label != true, wrong) and 0 <= label.min() and label.max() <= 9
    assert len(set((label - true)[wrong].remainder(10).tolist())) > 4  # not always the next class


def test_figures_are_those_of_scikit_learn(place):
    run = place / "runs" / "mislabelled" / "whole"
    scored, figures = scores_of(run), result(run)
    wrong = scored["wrong"].numpy()
    for name in SCORES:
        expected = sklearn.metrics.average_precision_score(wrong, scored[name].numpy())
        assert figures[f"{name}_average_precision"] == pytest.approx(expected)
        first = np.argsort(-scored[name].numpy(), kind="stable")[:20]
        assert figures[f"{name}_precision"] == pytest.approx(wrong[first].mean())
    # Random scores have 0.1.
    assert min(figures[f"{name}_average_precision"] for name in ("loss", "el2n", "tracin")) > 0.5


def test_scores_are_those_of_plain_autograd(place):
    """One example after the other, with torch's modules."""
    run = place / "runs" / "mislabelled" / "whole"
    scored, nets, (clean, _) = scores_of(run), modules(run), arrays.digits()
    for i in (0, 7, 113):
        x, y = clean.images[i].flatten()[None], scored["label"][i : i + 1]
        losses, norms = [], []
        for net in nets:
            loss = torch.nn.functional.cross_entropy(net(x), y)
            gradient = torch.autograd.grad(loss, list(net.parameters()))
            losses.append(loss.item())
            norms.append(float(sum(g.square().sum() for g in gradient) ** 0.5))
        error = torch.linalg.vector_norm(nets[-1](x).softmax(1)[0] - torch.eye(10)[y[0]])
        expected = {
            "loss": losses[-1],
            "mean_loss": np.mean(losses),
            "el2n": error.item(),
            "grand": norms[-1],
            "tracin": 0.05 * np.square(norms).sum(),
        }
        assert {name: float(scored[name][i]) for name in expected} == pytest.approx(expected, rel=1e-4)


def test_influence_is_the_dense_one(place):
    """gᵀ Q (Λ + damping)⁻¹ Qᵀ g with the five largest eigenpairs of the Gauss-Newton matrix, from dense Jacobians."""
    run = place / "runs" / "mislabelled" / "whole"
    scored, net, (clean, _) = scores_of(run), modules(run)[-1].double(), arrays.digits()
    x, y = clean.images[:200].flatten(1).double(), scored["label"]
    params = dict(net.named_parameters())
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)))(params)
    jacobian = torch.cat([j.flatten(2) for j in jacobians.values()], 2).detach()  # (N, classes, parameters)
    p = net(x).softmax(1).detach()
    root = jacobian - (p[:, :, None] * jacobian).sum(1, keepdim=True)
    ggn = torch.einsum("nc,ncp,ncq->pq", p, root, root) / 200
    values, vectors = (part[..., -5:] for part in torch.linalg.eigh(ggn))
    gradients = torch.einsum("ncp,nc->np", jacobian, p - torch.eye(10, dtype=p.dtype)[y])
    expected = ((gradients @ vectors).square() / (values + 1e-3)).sum(1)
    torch.testing.assert_close(scored["influence"].double(), expected, rtol=1e-3, atol=1e-3 * float(expected.mean()))


def test_neighbours_are_those_of_scikit_learn(place):
    """The share of the ten nearest images, itself left out, that have another label."""
    scored, (clean, _) = scores_of(place / "runs" / "mislabelled" / "whole"), arrays.digits()
    pixels, labels = clean.images[:200].flatten(1).numpy(), scored["label"].numpy()
    nearest = sklearn.neighbors.NearestNeighbors(n_neighbors=10).fit(pixels).kneighbors(return_distance=False)
    assert scored["neighbours"].numpy() == pytest.approx((labels[nearest] != labels[:, None]).mean(1))


def test_resume_with_another_rank_only_scores_anew(here, place):
    assert call("--resume", "--rank", "3") == 0
    before, after = (scores_of(folder / "runs" / "mislabelled" / "whole") for folder in (place, here))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["influence"]


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "mislabelled").iterdir()
    figures = result(run)
    assert figures["tracin_average_precision"] > 0.97 and figures["mean_loss_average_precision"] > 0.97
    assert figures["loss_average_precision"] < figures["tracin_average_precision"]
