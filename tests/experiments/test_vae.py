import functools
import math
import shutil
import signal

import pytest
import torch

from nets.generative import autoencoder, pixelcnn, vqvae
from tests.experiments import runs
from tests.experiments.runs import config, flag_id, is_png, metrics, result, same_bits
from train import plots
from train.data.images import arrays
from train.run import checkpoints
from train.run import run as train_runs

call, refused, start = (functools.partial(function, "vae") for function in (runs.call, runs.refused, runs.start))
QUICK = ("--steps", "4", "--batch", "50", "--save-every", "2", "--test-every", "2", "--no-compile")
SMALL = ("--width", "16", "--bound-samples", "3")
CODEBOOK = ("--model", "vq-vae", "--width", "8", "--codes", "8", "--steps", "3", "--prior-steps", "3")


@pytest.fixture(scope="module", autouse=True)
def quick_pictures():
    """t-SNE of fewer codes, and a prior of fewer channels."""
    from experiments.parts import autoencoder_pictures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder_pictures, "EMBEDDED", 40)
        patch.setitem(pixelcnn.PRESETS, "digits", pixelcnn.Config((4, 4), 64, 8, 2, 3, hidden=8))
        yield


@pytest.fixture
def without_codes(monkeypatch):
    """PCA and t-SNE are drawn by `place` already."""
    monkeypatch.setattr("experiments.parts.autoencoder_pictures.draw_codes", lambda *_: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Finished runs, not to be changed: `whole`, a VAE with codes of two numbers, and `codebook`, a VQ-VAE."""
    folder = tmp_path_factory.mktemp("vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, *SMALL, "--latent", "2", "--name", "whole") == 0
        assert call(*QUICK, *CODEBOOK, "--revive-every", "2", "--name", "codebook") == 0
    return folder


def learned(run):
    """Both trees of a run."""
    quantised = config(run)["args"]["model"] == "vq-vae"
    cfg = train_runs.read_config(run, "net", vqvae.Config if quantised else autoencoder.Config)
    found = [train_runs.learned(run, (vqvae if quantised else autoencoder).spec(cfg), "model", averaged=False)]
    if quantised:
        prior = train_runs.read_config(run, "prior", pixelcnn.Config)
        found.append(train_runs.learned(run, pixelcnn.spec(prior), "prior", averaged=False))
    return found


def test_folder_of_a_run(place):
    run = place / "runs" / "vae" / "whole"
    assert checkpoints.steps(run / "checkpoints") == [2, 4]
    names = ("reconstructions", "samples", "latent_grid", "walk", "codes", "loss")
    assert all(is_png(run / f"{name}.png") for name in names)
    figures, last = result(run), metrics(run)[-1]
    assert figures["elbo"] == pytest.approx(figures["reconstruction"] - figures["kl"], abs=1e-4)
    assert figures["elbo"] == last["test/elbo"] and 0 <= figures["active_units"] <= 2


def test_figures_against_distributions(place):
    """The bound's parts by torch.distributions on the same draws, and log p(x) over a fine grid of the plane."""
    from core import random
    from experiments.parts.autoencoder import Trained, figures_of

    run = place / "runs" / "vae" / "whole"
    (values,) = learned(run)
    cfg = train_runs.read_config(run, "net", autoencoder.Config)
    test = arrays.digits()[1]
    part = test._replace(images=test.images[:20], labels=test.labels[:20])
    key = random.key(3)
    figures = figures_of({"model": values}, Trained(cfg, tuple("0123456789")), part, key, 2000)
    q = autoencoder.encode(values, part.images, cfg)
    z = autoencoder.draw(q, random.sites(key, 20))

    def given(z, x):
        output = torch.distributions.Bernoulli(logits=autoencoder.decode(values, z, cfg), validate_args=False)
        return output.log_prob(x).flatten(1).sum(1)

    posterior = torch.distributions.Normal(q.mean, (0.5 * q.log_variance).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    assert figures["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert figures["reconstruction"] == pytest.approx(float(given(z, part.images).mean()), rel=1e-5)
    axis = torch.linspace(-6, 6, 121)
    grid = torch.cartesian_prod(axis, axis)
    weight = torch.distributions.Normal(0.0, 1.0).log_prob(grid).sum(1) + 2 * math.log(0.1)
    exact = torch.stack([(given(grid, x.expand(len(grid), *x.shape)) + weight).logsumexp(0) for x in part.images])
    assert figures["log_likelihood"] == pytest.approx(float(exact.mean()), abs=0.02)


def test_folder_of_a_codebook(place):
    run = place / "runs" / "vae" / "codebook"
    assert checkpoints.steps(run / "checkpoints") == [2, 4, 6]  # 3 steps and 3 of the prior
    assert all(is_png(run / f"{name}.png") for name in ("reconstructions", "samples", "usage", "walk", "codes", "loss"))
    figures = result(run)
    assert 0 < figures["codes_used"] <= 1 and 1 <= figures["perplexity"] <= 8 and figures["prior_nats"] > 0
    seen = [line for line in metrics(run) if "test/prior_nats" in line]
    assert [line["step"] for line in seen] == [4, 6] and "test/error" not in seen[0]


@pytest.mark.parametrize(("name", "left"), [("whole", 2), ("codebook", 2), ("codebook", 4)])
def test_resumed_run_has_the_same_bits(name, left, here, without_codes):
    """Also one that was stopped while the prior learned."""
    run = here / "runs" / "vae" / name
    whole, figures = learned(run), result(run)
    for step in checkpoints.steps(run / "checkpoints"):
        if step > left:
            shutil.rmtree(run / "checkpoints" / str(step))
    assert checkpoints.latest(run / "checkpoints") == left
    assert call("--resume", "--name", name) == 0
    again = result(run)
    assert all(same_bits(a, b) for a, b in zip(learned(run), whole, strict=True))
    assert all(again[name] == figures[name] for name in figures if name != "seconds")


def test_interrupted(here, without_codes):
    """Ctrl-C saves; what is resumed ends as if it had not happened."""
    flags = ("--batch", "50", "--steps", "40", "--save-every", "10", "--no-compile", *SMALL)
    process = start(here, *flags, "--name", "cut")
    runs.wait_for_step(process, here / "runs" / "vae" / "cut", 10)
    process.send_signal(signal.SIGINT)
    code, out, _ = runs.finish(process)
    at = checkpoints.latest(here / "runs" / "vae" / "cut" / "checkpoints")
    assert code == 0 and (at == 40 or f"stopped at step {at}" in out)
    assert call("--resume", "--name", "cut") == 0 and call(*flags, "--name", "uncut") == 0
    assert same_bits(*(learned(here / "runs" / "vae" / name)[0] for name in ("cut", "uncut")))


@pytest.mark.parametrize(
    ("model", "flags", "pictures"),
    [
        ("autoencoder", ("--latent", "2"), ("latent_grid",)),
        ("denoising", ("--noise", "0.5"), ()),
        ("conditional", ("--kind", "convolutional"), ()),
        ("vae", ("--likelihood", "gaussian", "--beta", "4"), ("samples",)),
        ("conditional-vae", ("--kind", "convolutional", "--latent", "2"), ("samples", "latent_grid")),
        ("iwae", ("--samples", "3"), ("samples",)),
        ("vq-vae", ("--codebook", "loss", "--codes", "8", "--revive-every", "5", "--prior-steps", "2"), ("samples",)),
    ],
)
def test_each(model, flags, pictures, tmp_path, monkeypatch, without_codes):
    monkeypatch.chdir(tmp_path)
    assert call(*QUICK, *SMALL, "--steps", "30", "--model", model, *flags, "--name", "one") == 0
    run = tmp_path / "runs" / "vae" / "one"
    assert all(is_png(run / f"{name}.png") for name in ("reconstructions", *pictures))
    assert (run / "samples.png").exists() == ("samples" in pictures)
    losses = [line["train/loss"] for line in metrics(run) if "train/loss" in line]
    assert losses[-1] < losses[0]


def test_watched_gradients(tmp_path, monkeypatch, without_codes):
    """The same training, and the gradients of the images beside it."""
    monkeypatch.chdir(tmp_path)
    flags = (*QUICK, *SMALL, "--likelihood", "gaussian", "--steps", "10")
    assert call(*flags, "--name", "plain") == 0 and call(*flags, "--watch-gradients", "--name", "watched") == 0
    plain, watched = (metrics(tmp_path / "runs" / "vae" / name) for name in ("plain", "watched"))
    assert watched[-1]["test/elbo"] == pytest.approx(plain[-1]["test/elbo"], rel=1e-4)
    assert is_png(tmp_path / "runs" / "vae" / "watched" / "gradients.png")


@pytest.mark.parametrize("name", ["whole", "codebook"])
def test_use(name, here, capsys):
    run = here / "runs" / "vae" / name
    assert call("sample", "--run", f"runs/vae/{name}", "--count", "9") == 0
    first = (run / "sampled.png").read_bytes()
    assert "9 samples" in capsys.readouterr().out
    assert call("sample", "--run", f"runs/vae/{name}", "--count", "9", "--seed", "1") == 0
    assert is_png(run / "sampled.png") and (run / "sampled.png").read_bytes() != first
    assert call("reconstruct", "--run", f"runs/vae/{name}", "--count", "6") == 0 and is_png(run / "reconstructed.png")
    assert call("interpolate", "--run", f"runs/vae/{name}", "--images", "5", "9", "--steps", "4") == 0
    assert is_png(run / "interpolated.png")


def test_samples_of_a_class(here, capfd):
    """The prior of the codes knows the classes; the first samples are the same of any number of them."""
    assert call("sample", "--run", "runs/vae/codebook", "--label", "3", "--count", "2") == 0
    assert "--label is 10; expected 0 to 9" in refused(capfd, "sample", "--run", "runs/vae/codebook", "--label", "10")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "gan"], "--model 'gan' is unknown; expected one of autoencoder, denoising, conditional, vae"),
        (["--kind", "transformer"], "--kind 'transformer' is unknown; expected one of mlp, convolutional"),
        (["--likelihood", "poisson"], "--likelihood 'poisson' is unknown"),
        (["--beta", "2", "--model", "autoencoder"], "--beta is for vae, conditional-vae; the model is 'autoencoder'"),
        (["--latent", "2", "--model", "vq-vae"], "--latent is for autoencoder"),
        (["--model", "vq-vae", "--codebook", "list"], "codebook 'list'; expected ema or loss"),
        (["--model", "vq-vae", "--watch-gradients"], "use --codebook loss"),
        (["--model", "iwae", "--watch-gradients"], "--watch-gradients is not for iwae"),
        (["--model", "vq-vae", "--size", "7"], "images of 7 x 7 pixels cannot be halved 1 times"),
        (["--kind", "convolutional", "--size", "6"], "images of 6 x 6 pixels cannot be halved 2 times"),
        (["--model", "denoising", "--noise", "1"], "--noise is 1.0; expected a number between 0 and 1"),
        (["--beta", "-1"], "--beta and --commitment must be"),
        (["--width", "0"], "--width is 0; expected at least 1"),
        (["--data", "nowhere"], "'nowhere' does not exist"),
        (["--batch", "5000"], "--batch is 5000, but there are 1500 images"),
        (["--resume", "--name", "whole", "--model", "iwae"], "it was started with vae"),
        (["--resume", "--name", "codebook", "--steps", "9"], "its checkpoint has steps 3, expected 9"),
        (["sample", "--run", "runs/vae/whole", "--label", "1"], "this model is not conditional"),
        (["sample", "--run", "nowhere"], "nowhere"),
        (["reconstruct", "--run", "runs/vae/whole", "--count", "298"], "there are 297 test images"),
        (["interpolate", "--run", "runs/vae/whole", "--images", "1", "2", "3"], "expected pairs of numbers from 0 to"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    quick = () if flags[0] in ("sample", "reconstruct", "interpolate", "--resume") else QUICK
    assert message in refused(capfd, *quick, *flags)


def test_autoencoder_has_nothing_to_sample_from(tmp_path, monkeypatch, capfd, without_codes):
    monkeypatch.chdir(tmp_path)
    assert call(*QUICK, *SMALL, "--model", "autoencoder", "--name", "one") == 0
    assert "without a prior to sample codes from" in refused(capfd, "sample", "--run", "runs/vae/one")


def test_scatter(tmp_path):
    points, labels = torch.randn(12, 2), torch.arange(12) % 3
    for classes in (tuple("abc"), ("cat", "dog", "bird")):
        plots.scatter(tmp_path / "points.png", points, labels, classes)
        assert is_png(tmp_path / "points.png")
    for given, message in (
        ((points[:, :1], labels, "abc"), r"shape \(12, 1\), expected \(count, 2\)"),
        ((points, labels[:3], "abc"), r"12 points have labels of shape \(3,\)"),
        ((points, labels, "ab"), "labels go from 0 to 2, but there are 2 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.scatter(tmp_path / "points.png", *given)


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise."""
    runs.completed("vae", tmp_path)
    (run,) = (tmp_path / "runs" / "vae").iterdir()
    figures = result(run)
    assert figures["elbo"] > -24.5 and figures["log_likelihood"] > figures["elbo"] and figures["active_units"] >= 4
