import functools
import math
import shutil
from pathlib import Path

import pytest
import torch

from core import random, spec
from experiments import vqvae as script
from nets.generative import pixelcnn, vqvae
from tests.experiments import runs
from tests.experiments.runs import config, flag_id, is_png, metrics, result, same_bits
from tests.experiments.test_laws import final_state
from tests.experiments.test_vae import noise_folder
from train.data.images import arrays
from train.run import checkpoints, open_run

call, refused = (functools.partial(function, "vqvae") for function in (runs.call, runs.refused))
QUICK = ("--steps", "3", "--prior-steps", "3", "--batch", "50", "--save-every", "2", "--eval-every", "2")
SMALL = ("--width", "8", "--codes", "8", "--no-compile")


@pytest.fixture(scope="module", autouse=True)
def quick_pictures():
    """No t-SNE, which the laws draw, and a prior of fewer channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.parts.autoencoder_pictures.draw_codes", lambda *_: None)
        patch.setitem(pixelcnn.PRESETS, "digits", pixelcnn.Config((4, 4), 64, 8, 2, 3, hidden=8))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run, runs/vqvae/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("vqvae")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, *SMALL, "--revive-every", "2", "--name", "whole") == 0
    return folder


def test_figures(place, monkeypatch):
    """The figures again, from the nets of the run."""
    monkeypatch.chdir(place)
    run, folder = open_run(place / "runs" / "vqvae" / "whole", Path("runs/vqvae")), Path("runs/vqvae/whole")
    cfg, prior = run.read("net", vqvae.Config), run.read("prior", pixelcnn.Config)
    values = run.learned(vqvae.spec(cfg), "model", averaged=False)
    learned_prior = run.learned(pixelcnn.spec(prior), "prior", averaged=False)
    learn, test = arrays.digits()
    out, figures = vqvae.apply(values, test.images, cfg), result(folder)
    assert figures["error"] == pytest.approx(float((out["output"] - test.images).square().mean()), rel=1e-4)
    log_p = pixelcnn.apply(learned_prior, out["codes"], prior, labels=test.labels).log_softmax(-1)
    nats = -log_p.gather(-1, out["codes"][..., None]).mean()
    assert figures["prior_nats"] == pytest.approx(float(nats), rel=1e-4)
    shares = out["codes"].flatten().bincount(minlength=8) / out["codes"].numel()
    assert figures["codes_used"] == pytest.approx(float((shares > 0).float().mean()))
    assert figures["prior_nats_unigram"] == pytest.approx(float(torch.special.entr(shares).sum()), rel=1e-4)
    assert figures["prior_nats_uniform"] == math.log(8)
    mean = learn.images.mean(0)
    assert figures["mean_image_error"] == pytest.approx(float((test.images - mean).square().mean()), rel=1e-5)


def test_each_stage_has_its_own_records(place):
    run = place / "runs" / "vqvae" / "whole"
    assert checkpoints.steps(run / "checkpoints") == [2, 4, 6]  # 3 steps and 3 of the prior
    errors, nats = (
        [line["step"] for line in metrics(run) if name in line] for name in ("test/error", "test/prior_nats")
    )
    assert errors == [2] and nats == [4, 6]


def test_run_resumes_within_either_stage(here):
    """The law stops a run in the stage of the prior; here in that of the autoencoder, on which the prior depends."""
    run = here / "runs" / "vqvae" / "whole"
    whole, figures = final_state(run), result(run)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / str(step))
    assert call("--resume", "--name", "whole") == 0
    assert same_bits(final_state(run), whole)
    assert {**result(run), "seconds": 0} == {**figures, "seconds": 0}


def test_prior_learns_longer_on_request(here, capsys):
    assert call("--resume", "--name", "whole", "--prior-steps", "5") == 0
    assert result(here / "runs" / "vqvae" / "whole")["steps"] == 8
    assert "resumed with --prior-steps 5 (it was started with 3)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codebook", "dtype"),
    [
        ("ema", "float32"),
        ("loss", "bfloat16"),
        ("loss", "float32"),
        ("ema", "bfloat16"),
    ],
)
def test_each_codebook(codebook, dtype, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--codebook", codebook, "--dtype", dtype, "--revive-every", "5", "--learning-rate", "1e-2")
    assert call(*QUICK, *SMALL, *flags, "--steps", "30", "--prior-steps", "20", "--name", "one") == 0
    run = tmp_path / "runs" / "vqvae" / "one"
    for name in ("train/loss", "prior/loss"):
        losses = [line[name] for line in metrics(run) if name in line]
        assert losses[-1] < losses[0]
    model = final_state(run)["model"]
    assert ("weight" in model["params"].get("codebook", {})) == (codebook == "loss")
    assert all(leaf.dtype == torch.float32 for leaf in model["params"]["encoder"]["output"].values())
    assert is_png(run / "samples.png") and is_png(run / "usage.png")


@pytest.mark.slow
def test_watched_gradients(tmp_path, monkeypatch):
    """The same training, and the gradients of the images beside it."""
    monkeypatch.chdir(tmp_path)
    flags = (*QUICK, *SMALL, "--codebook", "loss", "--steps", "10")
    assert call(*flags, "--name", "plain") == 0 and call(*flags, "--watch-gradients", "--name", "watched") == 0
    plain, watched = (result(tmp_path / "runs" / "vqvae" / name) for name in ("plain", "watched"))
    assert watched["error"] == pytest.approx(plain["error"], rel=1e-4)
    assert is_png(tmp_path / "runs" / "vqvae" / "watched" / "gradients.png")


def test_folder_of_one_class(tmp_path, monkeypatch, capfd):
    """There the prior is not conditional; a file that cannot be read is skipped and counted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    noise_folder(tmp_path / "faces" / "people", 20)
    flags = ("--data", "faces", "--size", "8", "--batch", "4")
    assert call(*QUICK, *SMALL, *flags, "--name", "one") == 0
    assert any(line.startswith("skipped") and "broken.png" in line for line in capfd.readouterr().out.splitlines())
    assert config(tmp_path / "runs" / "vqvae" / "one")["prior"]["classes"] == 0
    run = ("--run", "runs/vqvae/one")
    assert call("sample", *run, "--count", "4") == 0 and is_png(tmp_path / run[1] / "sampled.png")
    assert "this model is not conditional" in refused(capfd, "sample", *run, "--label", "0")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sample", "--label", "10"], "--label is 10; expected 0 to 9"),
        (["reconstruct", "--count", "298"], "--count is 298, but there are 297 test images"),
        (["interpolate", "--indices", "1", "2", "3"], "--indices 1 2 3: expected pairs of numbers from 0 to 296"),
    ],
    ids=flag_id,
)
def test_sub_commands_refuse_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, *flags, "--run", "runs/vqvae/whole")


def test_runs_of_vae_are_no_runs_of_vqvae(here, capfd):
    shutil.copytree(here / "runs" / "vqvae", here / "runs" / "vae")
    line = runs.refused("vae", capfd, "sample", "--run", "runs/vae/whole")
    assert "'runs/vae/whole' is a run of vqvae.py, expected one of vae.py" in line


def test_temperature_of_the_prior():
    """At a temperature near 0 all samples are the most probable image; the first ones are the same of any count."""
    cfg, prior = vqvae.Config(width=8, codes=8), pixelcnn.Config((4, 4), 8, 8, 2, 3, hidden=8)
    values = {
        "model": spec.init(random.key(0), vqvae.spec(cfg)),
        "prior": spec.init(random.key(1), pixelcnn.spec(prior)),
    }
    values["prior"]["output"]["bias"] = random.normal(random.key(3), (8,))  # at the start all codes are as probable
    model = script.as_functions(values, cfg, prior, ("one",))
    labels = torch.zeros(3, dtype=torch.int64)
    cold, warm = (model.sample(random.key(2), labels, temperature) for temperature in (1e-6, 1.0))
    assert torch.equal(cold[0], cold[1]) and not torch.equal(warm[0], warm[1])
    torch.testing.assert_close(model.sample(random.key(2), labels[:2], 1.0), warm[:2])


@pytest.mark.long
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise."""
    runs.completed("vqvae", tmp_path)
    (run,) = (tmp_path / "runs" / "vqvae").iterdir()
    figures = result(run)
    assert figures["error"] < figures["mean_image_error"] / 5 and figures["codes_used"] > 0.9
    assert figures["prior_nats"] < figures["prior_nats_unigram"] - 0.5
