import contextlib
import functools
import gzip
import io
import signal
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch

from tests.experiments import runs
from tests.experiments.runs import config, finish, flag_id, is_png, metrics, result, same_bits, wait_for_step
from train.data.images import arrays
from train.run import checkpoints

call, start, refused, completed = (
    functools.partial(function, "mislabelled") for function in (runs.call, runs.start, runs.refused, runs.completed)
)
QUICK = ("--examples", "200", "--widths", "16", "--batch", "20", "--rank", "5")
QUICK += ("--steps", "400", "--save-every", "40", "--snapshot-every", "100")
SCORES = ("loss", "mean_loss", "el2n", "grand", "tracin", "influence")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run, runs/mislabelled/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("mislabelled")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        assert call(*QUICK, "--name", "whole") == 0
    (folder / "stdout").write_text(out.getvalue(), encoding="utf-8")
    return folder


def found(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.import_params(run / "scores.safetensors")


def modules(run: Path) -> list[torch.nn.Module]:
    """The nets of the snapshots."""
    made = []
    for step in (100, 200, 300, 400):
        params = checkpoints.import_params(run / "snapshots" / f"{step}.safetensors")["layers"]
        module = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
        module[0].load_state_dict(params[0])
        module[2].load_state_dict(params[1])
        made.append(module)
    return made


def test_folder_of_a_run(place):
    run = place / "runs" / "mislabelled" / "whole"
    assert checkpoints.steps(run / "checkpoints") == [320, 360, 400]
    assert all(is_png(run / f"{name}.png") for name in ("precision_recall", "scores", "suspects"))
    stored, figures, records = config(run), result(run), metrics(run)
    assert stored["examples"] == {"train": 200, "flipped": 20, "test": 297}
    assert figures["steps"] == 400 and figures["seconds"] > 0 and figures["parameters"] == 65 * 16 + 17 * 10
    assert [r["step"] for r in records] == list(range(10, 410, 10))
    assert records[0]["train/loss"] > records[-1]["train/loss"]
    out = (place / "stdout").read_text(encoding="utf-8")
    assert "20 of 200 labels wrong" in out and "step 400/400" in out
    assert out.splitlines()[-1].endswith("files in runs/mislabelled/whole/")
    assert f"TracIn     {figures['tracin_average_precision']:>18.3f}  {figures['tracin_precision']:.1%}" in out


def test_labels_that_are_flipped(place):
    scored, (clean, _) = found(place / "runs" / "mislabelled" / "whole"), arrays.digits()
    wrong, given, true = scored["wrong"], scored["label"], clean.labels[:200]
    assert wrong.sum() == 20 and torch.equal(given != true, wrong) and 0 <= given.min() and given.max() <= 9
    assert len(set((given - true)[wrong].remainder(10).tolist())) > 4  # not always the next class


def test_figures_are_those_of_scikit_learn(place):
    run = place / "runs" / "mislabelled" / "whole"
    scored, figures = found(run), result(run)
    wrong = scored["wrong"].numpy()
    for name in SCORES:
        expected = sklearn.metrics.average_precision_score(wrong, scored[name].numpy())
        assert figures[f"{name}_average_precision"] == pytest.approx(expected)
        first = np.argsort(-scored[name].numpy(), kind="stable")[:20]
        assert figures[f"{name}_precision"] == pytest.approx(wrong[first].mean())
    # By chance it would be 0.1.
    assert min(figures[f"{name}_average_precision"] for name in ("loss", "el2n", "tracin")) > 0.5


def test_scores_are_those_of_plain_autograd(place):
    """One example after the other, with torch's modules."""
    run = place / "runs" / "mislabelled" / "whole"
    scored, nets, (clean, _) = found(run), modules(run), arrays.digits()
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
    scored, net, (clean, _) = found(run), modules(run)[-1].double(), arrays.digits()
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


def idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_folder_in_the_format_of_mnist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    for part, count in (("train", 100), ("t10k", 12)):
        labels = np.arange(count) % 4
        idx(tmp_path / "files" / f"{part}-labels-idx1-ubyte.gz", labels)
        idx(tmp_path / "files" / f"{part}-images-idx3-ubyte.gz", 255 * np.eye(16).reshape(16, 4, 4)[labels])
    flags = ("--data", "files", "--widths", "8", "--batch", "20", "--steps", "100", "--rank", "3", "--name", "files")
    assert call(*flags, "--snapshot-every", "25") == 0
    figures = result(tmp_path / "runs" / "mislabelled" / "files")
    # Four pictures: a wrong label stands against 22 right ones, and cannot be learned by heart.
    assert figures["loss_average_precision"] == figures["tracin_average_precision"] == figures["test_accuracy"] == 1.0


# --- resume


def test_resume_with_another_rank_only_scores_anew(here, place):
    assert call("--resume", "--rank", "3") == 0
    before, after = (found(folder / "runs" / "mislabelled" / "whole") for folder in (place, here))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["influence"]


def test_stopped_and_resumed_run_has_the_same_bits(here, place):
    process = start(here, *QUICK, "--name", "stopped")
    run, whole = here / "runs" / "mislabelled" / "stopped", place / "runs" / "mislabelled" / "whole"
    wait_for_step(process, run, 40)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    at = checkpoints.latest(run / "checkpoints")
    assert code == 0 and at < 400 and "stopping after this step" in err and "Traceback" not in err
    assert f"stopped at step {at}; continue with: " in out and not (run / "result.json").exists()
    assert call("--resume", "--name", "stopped") == 0
    assert same_bits(found(run), found(whole)) and {**result(run), "seconds": 0} == {**result(whole), "seconds": 0}


# --- refusals


def test_help(capsys):
    assert call("--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Pruthi" in out and "Fraction of the labels that are made wrong." in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--examples", "0"], "--examples is 0; 'digits' has 1500 to learn from"),
        (["--examples", "1501"], "--examples is 1501; 'digits' has 1500 to learn from"),
        (["--flipped", "0"], "--flipped is 0.0; expected a fraction of 1500 labels, not none or all"),
        (["--flipped", "nan"], "--flipped is nan; expected a fraction of 1500 labels, not none or all"),
        (["--widths", "8", "0"], "--widths is 0; expected at least 1"),
        (["--batch", "1501"], "--batch is 1501, but there are 1500 examples to learn from"),
        (["--learning-rate", "nan"], "--learning-rate is nan; expected a positive number"),
        (["--damping", "0"], "--damping is 0.0; expected a positive number"),
        (["--snapshot-every", "1200"], "--snapshot-every is 1200; expected at most half of --steps 2000"),
        (["--data", "nowhere"], "no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in nowhere"),
        (["--name", "whole"], "whole' exists already; continue it with --resume or choose another --name"),
        (["--resume", "--name", "whole", "--flipped", "0.2"], "with --flipped 0.2: it was started with 0.1"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, *flags)


# --- slow: the whole thing


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "mislabelled").iterdir()
    figures = result(run)
    assert figures["tracin_average_precision"] > 0.97 and figures["mean_loss_average_precision"] > 0.97
    assert figures["loss_average_precision"] < figures["tracin_average_precision"]
