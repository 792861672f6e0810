"""experiments/prune.py: its scores and accuracies against torch's modules, which examples each net learns from."""

import functools
import runpy

import numpy as np
import pytest
import torch

from core import random, tree
from nets.classifiers import mlp
from tests.experiments import runs
from tests.experiments.runs import config, refused, result
from tests.experiments.test_laws import final_state
from train import optimizers
from train.data.images import arrays
from train.step import create

call, completed = (functools.partial(function, "prune") for function in (runs.call, runs.completed))
# Small enough for milliseconds a step: 2 + 7 * 2 * 2 nets.
QUICK = ("--seeds", "2", "--kept", "0.5", "0.1", "--scorers", "3", "--early", "6", "--widths", "8", "--steps", "24")
CFG = mlp.Config((64, 8, 10))
CURVES = ["random"] + [
    f"{name}, {end}"
    for name in ("EL2N early", "GraNd early", "GraNd at initialisation")
    for end in ("hardest", "easiest")
]
SCRIPT = runpy.run_path(str(runs.script("prune")))


def module(params: tree.Tree) -> torch.nn.Module:
    first, second = params["layers"]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    net[1].load_state_dict(first)
    net[3].load_state_dict(second)
    return net


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run of 24 steps, runs/prune/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("prune")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, "--no-compile", "--name", "whole") == 0
    return folder


def test_curves_of_a_run(place):
    run = place / "runs" / "prune" / "whole"
    figures = result(run)
    assert list(figures["accuracy"]) == ["all", *CURVES] and figures["examples"] == 1000
    assert {len(values) for by in figures["accuracy"].values() for values in by.values()} == {2}
    assert all(list(figures["accuracy"][curve]) == ["0.5", "0.1"] for curve in CURVES)
    assert config(run)["members"] == 2 + 7 * 2 * 2


def test_accuracies_and_gains_are_those_of_modules(place):
    run = place / "runs" / "prune" / "whole"
    _, test = arrays.digits(797)
    right = []
    for params in tree.unstack(final_state(run)["params"]):
        right.append(float((module(params)(test.images).argmax(1) == test.labels).double().mean()))
    figures = result(run)
    by = figures["accuracy"]
    actual = [*by["all"]["1"]] + [value for curve in CURVES for kept in ("0.5", "0.1") for value in by[curve][kept]]
    assert actual == pytest.approx(right)
    gain = figures["gain_over_random"]["EL2N early, easiest"]["0.1"]
    a, b = (np.array(by[curve]["0.1"]) for curve in ("EL2N early, easiest", "random"))
    assert gain["mean"] == pytest.approx((a - b).mean())
    assert gain["standard_error"] == pytest.approx((a - b).std(ddof=1) / 2**0.5)


def test_score_at_initialisation_is_the_norm_of_plain_gradients(place):
    scores = np.load(place / "runs" / "prune" / "whole" / "scores.npy")
    learn, _ = arrays.digits(797)
    assert scores.shape == (3, 1000)
    score_key, *_ = random.split(random.key(0), 4).unbind(0)
    keys, _ = random.split(score_key, 6).chunk(2)
    optimizer = optimizers.adamw(lambda count: 0.0)
    nets = [module(create(key, mlp.spec(CFG), optimizer).params) for key in keys]
    for i in (0, 499, 999):
        norms = []
        for net in nets:
            loss = torch.nn.functional.cross_entropy(net(learn.images[i : i + 1]), learn.labels[i : i + 1])
            gradient = torch.autograd.grad(loss, net.parameters())
            norms.append(float(torch.cat([g.flatten() for g in gradient]).norm()))
        assert scores[2, i] == pytest.approx(np.mean(norms), rel=1e-4)
    assert (scores[0] > 0).all() and (scores[0] < 2**0.5).all()  # |p - onehot|


def test_each_net_samples_only_from_its_examples():
    args = SCRIPT["Args"](seeds=2, kept=(0.5, 0.1))
    values = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    orders, members = SCRIPT["plan"](args, values, random.key(0))
    data = arrays.Labelled(torch.arange(40.0)[:, None], torch.arange(40))
    rows, sizes = (torch.tensor([getattr(m, name) for m in members]) for name in ("order", "size"))
    keys = random.split(random.key(1), len(members))
    batch = SCRIPT["sample"](data, orders, rows, sizes, keys, 2000)
    assert torch.equal(batch.images[..., 0].long(), batch.labels)
    for member, labels in zip(members, batch.labels, strict=True):
        size = 40 if member.curve == "all" else round(40 * member.kept)
        indices = set(labels.tolist())
        assert len(indices) == size  # 2000 samples meet every one
        name, _, end = member.curve.partition(", ")
        if end:
            row = values[SCRIPT["SCORES"].index(name)]
            expected = row.topk(size, largest=end == "hardest").indices
            assert indices == set(expected.tolist())
    halves = [
        set(x.tolist()) for m, x in zip(members, batch.labels, strict=True) if (m.curve, m.kept) == ("random", 0.5)
    ]
    assert len(halves) == 2 and halves[0] != halves[1]


def test_nets_of_one_seed_start_alike(place):
    """Before the first step all nets of a seed are one: they differ by their data."""
    args = SCRIPT["Args"](seeds=2, kept=(0.5,))
    _, members = SCRIPT["plan"](args, torch.zeros(3, 40), random.key(0))
    keys = random.fold_in(random.key(0), torch.tensor([m.seed for m in members]))
    states = SCRIPT["created"](keys, CFG, optimizers.adamw(lambda count: 0.0))
    weight = states.params["layers"][0]["weight"]
    for member, w in zip(members, weight, strict=True):
        torch.testing.assert_close(w, weight[member.seed])
    assert not torch.equal(weight[0], weight[1])


def test_scores_that_are_gone_are_named(here, capfd):
    (here / "runs" / "prune" / "whole" / "scores.npy").unlink()
    line = refused("prune", capfd, "--resume", "--name", "whole")
    assert "runs/prune/whole/scores.npy': No such file or directory" in line


@pytest.mark.long
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise, compiled."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "prune").iterdir()
    gains = result(run)["gain_over_random"]
    for name in ("EL2N early", "GraNd early"):
        for kept in ("0.6", "0.4"):  # with 80 % it is hardly more than two standard errors
            gain = gains[f"{name}, hardest"][kept]
            assert gain["mean"] > 2 * gain["standard_error"]
        assert gains[f"{name}, hardest"]["0.2"]["mean"] < -0.01  # of so few, random ones are better
    for kept, gain in gains["GraNd at initialisation, hardest"].items():
        assert gain["mean"] < 2 * gain["standard_error"], kept
