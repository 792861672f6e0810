import functools
import runpy
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from core import random, tree
from nets.classifiers import mlp
from tests.experiments import runs
from tests.experiments.runs import config, contents, finish, flag_id, is_png, metrics, result, same_bits, wait_for_step
from train import optimizers
from train.data.images import arrays
from train.run import checkpoints
from train.step import TrainState, create

call, start, refused, completed = (
    functools.partial(function, "prune") for function in (runs.call, runs.start, runs.refused, runs.completed)
)
# Small enough for milliseconds a step: 2 + 7 * 2 * 2 nets.
QUICK = ("--seeds", "2", "--kept", "0.5", "0.1", "--scorers", "3", "--early", "6", "--widths", "8", "--no-compile")
STEPS = ("--steps", "24", "--save-every", "12")
CFG = mlp.Config((64, 8, 10))
CURVES = ["random"] + [
    f"{name}, {end}"
    for name in ("EL2N early", "GraNd early", "GraNd at initialisation")
    for end in ("hardest", "easiest")
]
SCRIPT = runpy.run_path(str(runs.script("prune")))


def state_of(run: Path) -> TrainState:
    optimizer = optimizers.adamw(lambda count: 0.0)
    one = create(random.key(0), mlp.spec(CFG), optimizer)
    members = checkpoints.read_config(run / "checkpoints")["members"]
    return checkpoints.restore(run / "checkpoints", tree.stack([one] * members))


def module(params: tree.Tree) -> torch.nn.Module:
    first, second = params["layers"]
    found = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    found[1].load_state_dict(first)
    found[3].load_state_dict(second)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run of 24 steps, runs/prune/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("prune")
    (folder / "stdout").write_text(completed(folder, *QUICK, *STEPS, "--name", "whole"), encoding="utf-8")
    return folder


def test_folder_of_a_run(place):
    run = place / "runs" / "prune" / "whole"
    assert checkpoints.steps(run / "checkpoints") == [12, 24]
    for name in ("prune", "el2n_early", "grand_early", "grand_at_initialisation"):
        assert is_png(run / f"{name}.png")
    figures = result(run)
    assert list(figures["accuracy"]) == ["all", *CURVES] and figures["steps"] == 24 and figures["examples"] == 1000
    assert {len(values) for by in figures["accuracy"].values() for values in by.values()} == {2}
    assert all(list(figures["accuracy"][curve]) == ["0.5", "0.1"] for curve in CURVES)
    assert config(run)["members"] == 2 + 7 * 2 * 2 and metrics(run)[-1]["step"] == 24
    out = (place / "stdout").read_text(encoding="utf-8").splitlines()
    assert out[-1].endswith("files in runs/prune/whole/")
    assert [line[:34].strip() for line in out[-2 - len(CURVES) : -1]] == ["kept", *CURVES]


def test_accuracies_and_gains_are_those_of_modules(place):
    run = place / "runs" / "prune" / "whole"
    _, test = arrays.digits(797)
    right = []
    for params in tree.unstack(state_of(run).params):
        right.append(float((module(params)(test.images).argmax(1) == test.labels).double().mean()))
    figures = result(run)
    by = figures["accuracy"]
    found = [*by["all"]["1"]] + [value for curve in CURVES for kept in ("0.5", "0.1") for value in by[curve][kept]]
    assert found == pytest.approx(right)
    gain = figures["gain_over_random"]["EL2N early, easiest"]["0.1"]
    a, b = (np.array(by[curve]["0.1"]) for curve in ("EL2N early, easiest", "random"))
    assert gain["mean"] == pytest.approx((a - b).mean())
    assert gain["standard_error"] == pytest.approx((a - b).std(ddof=1) / 2**0.5)


def test_score_at_initialisation_is_the_norm_of_plain_gradients(place):
    scores = np.load(place / "runs" / "prune" / "whole" / "scores.npy")
    learn, _ = arrays.digits(797)
    assert scores.shape == (3, 1000)
    keys = random.split(random.fold_in(random.key(0), 2), 3)
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


def test_each_net_draws_from_what_is_kept_alone():
    args = SCRIPT["Args"](seeds=2, kept=(0.5, 0.1))
    found = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    orders, members = SCRIPT["plan"](args, found, random.key(0))
    data = arrays.Labelled(torch.arange(40.0)[:, None], torch.arange(40))
    rows, sizes = (torch.tensor([getattr(m, name) for m in members]) for name in ("order", "size"))
    keys = random.split(random.key(1), len(members))
    drawn = SCRIPT["draw"](data, orders, rows, sizes, keys, 2000)
    assert torch.equal(drawn.images[..., 0].long(), drawn.labels)
    for member, labels in zip(members, drawn.labels, strict=True):
        size = 40 if member.curve == "all" else round(40 * member.kept)
        chosen = set(labels.tolist())
        assert len(chosen) == size  # 2000 draws meet every one
        name, _, end = member.curve.partition(", ")
        if end:
            values = found[SCRIPT["SCORES"].index(name)]
            expected = values.topk(size, largest=end == "hardest").indices
            assert chosen == set(expected.tolist())
    chance = [
        set(x.tolist()) for m, x in zip(members, drawn.labels, strict=True) if (m.curve, m.kept) == ("random", 0.5)
    ]
    assert len(chance) == 2 and chance[0] != chance[1]


def test_nets_of_one_seed_start_alike(place):
    """Without a step to learn, all of a seed would be one net: what differs is the data."""
    args = SCRIPT["Args"](seeds=2, kept=(0.5,))
    _, members = SCRIPT["plan"](args, torch.zeros(3, 40), random.key(0))
    keys = random.fold_in(random.fold_in(random.key(0), 4), torch.tensor([m.seed for m in members]))
    states = SCRIPT["created"](keys, CFG, optimizers.adamw(lambda count: 0.0))
    weight = states.params["layers"][0]["weight"]
    for member, w in zip(members, weight, strict=True):
        assert torch.equal(w, weight[member.seed])
    assert not torch.equal(weight[0], weight[1])


def test_compiled_run_is_one_graph_with_the_same_values(here, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert call(*QUICK[:-1], *STEPS, "--name", "compiled") == 0
    torch._dynamo.reset()
    folder = here / "runs" / "prune"
    torch.testing.assert_close(
        state_of(folder / "compiled").params, state_of(folder / "whole").params, rtol=1e-3, atol=1e-5
    )


def test_folder_in_the_format_of_mnist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    for part, count in (("train", 48), ("t10k", 12)):
        labels = (np.arange(count) % 4).astype(np.uint8)
        pixels = (255 * np.eye(16).reshape(16, 4, 4)[labels]).astype(np.uint8)
        for name, array in ((f"{part}-labels-idx1-ubyte", labels), (f"{part}-images-idx3-ubyte", pixels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (tmp_path / "files" / name).write_bytes(header + array.tobytes())
    flags = ("--data", "files", "--steps", "100", "--learning-rate", "0.03", "--name", "files")
    assert call(*QUICK, *flags) == 0
    figures = result(tmp_path / "runs" / "prune" / "files")
    assert figures["examples"] == 48 and figures["accuracy"]["all"]["1"] == [1.0, 1.0]


# --- resume


def test_resume_from_a_checkpoint_gives_the_same_bits(here, place):
    run, whole = here / "runs" / "prune" / "whole", place / "runs" / "prune" / "whole"
    shutil.rmtree(run / "checkpoints" / "24")
    (run / "prune.png").unlink()
    assert call("--resume") == 0
    assert same_bits(state_of(run), state_of(whole))
    assert {**result(run), "seconds": 0} == {**result(whole), "seconds": 0}
    assert contents(run)["prune.png"] == contents(whole)["prune.png"]


def test_interrupted_and_resumed_run_has_the_same_bits(here):
    long = (*QUICK, "--steps", "60", "--save-every", "10")
    assert call(*long, "--name", "uninterrupted") == 0
    process = start(here, *long, "--name", "stopped")
    folder = here / "runs" / "prune"
    wait_for_step(process, folder / "stopped", 10)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    at = checkpoints.latest(folder / "stopped" / "checkpoints")
    assert code == 0 and at < 60 and "stopping after this step" in err and "Traceback" not in err
    assert f"stopped at step {at}; continue with: " in out
    assert call("--resume", "--name", "stopped") == 0
    assert same_bits(state_of(folder / "stopped"), state_of(folder / "uninterrupted"))


# --- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "--seeds is 1; expected at least 2, for the error bars"),
        (["--kept", "0.5", "1.0"], "--kept is (0.5, 1.0); expected different fractions between 0 and 1"),
        (["--kept", "0.5", "0.5"], "--kept is (0.5, 0.5); expected different fractions"),
        (["--early", "0"], "--early is 0; expected at least 1"),
        (["--early", "700"], "--early is 700; expected at most --steps, 600"),
        (["--widths", "0"], "--widths is 0; expected at least 1"),
        (["--learning-rate", "0"], "--learning-rate is 0.0; expected a positive number"),
        (["--data", "nowhere"], "no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in nowhere"),
        (["--resume", "--name", "whole", "--seeds", "3"], "with --seeds 3: it was started with 2"),
        (["--resume", "--name", "whole", "--steps", "25"], "with --steps 25: it was started with 24"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, *flags)


def test_scores_that_are_gone_are_named(here, capfd):
    (here / "runs" / "prune" / "whole" / "scores.npy").unlink()
    assert "runs/prune/whole/scores.npy': No such file or directory" in refused(capfd, "--resume", "--name", "whole")


# --- slow: the whole thing


@pytest.mark.slow
def test_no_flags(tmp_path):
    """What the experiment's first lines promise, compiled."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "prune").iterdir()
    gains = result(run)["gain_over_random"]
    for name in ("EL2N early", "GraNd early"):
        for kept in ("0.8", "0.6", "0.4"):
            gain = gains[f"{name}, hardest"][kept]
            assert gain["mean"] > 2 * gain["standard_error"]
        assert gains[f"{name}, hardest"]["0.2"]["mean"] < -0.01  # of too few, chance takes better ones
    for kept, gain in gains["GraNd at initialisation, hardest"].items():
        assert gain["mean"] < 2 * gain["standard_error"], kept
