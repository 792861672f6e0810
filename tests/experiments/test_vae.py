import functools
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from core import random
from experiments.parts import variational
from nets.generative import autoencoder
from tests.experiments import runs
from tests.experiments.runs import config, flag_id, is_png, metrics, result
from tests.experiments.test_laws import final_state
from train import plots
from train.data.images import arrays
from train.run import open_run

DRAWN = True
call, refused = (functools.partial(function, "vae") for function in (runs.call, runs.refused))
QUICK = ("--steps", "4", "--batch", "50", "--save-every", "2", "--eval-every", "2", "--no-compile")
SMALL = ("--width", "16", "--bound-samples", "3")


@pytest.fixture
def without_codes(monkeypatch):
    """PCA and t-SNE are drawn by the laws already."""
    monkeypatch.setattr("experiments.parts.autoencoder_pictures.draw_codes", lambda *_: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run of a VAE with codes in the plane, runs/vae/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, *SMALL, "--latent", "2", "--name", "whole") == 0
    return folder


def noise_folder(folder, count, size=(20, 24)):
    """A folder of pictures, without sub-folders, and one file that is none."""
    folder.mkdir()
    for i in range(count):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")


def test_figures(place):
    run = place / "runs" / "vae" / "whole"
    figures, last = result(run), metrics(run)[-1]
    assert figures["elbo"] == pytest.approx(figures["reconstruction"] - figures["kl"], abs=1e-4)
    assert figures["elbo"] == last["test/elbo"] and 0 <= figures["active_units"] <= 2


def test_figures_against_distributions(place, monkeypatch):
    """The bound's parts by torch.distributions with the same samples, and log p(x) over a fine grid of the plane."""
    monkeypatch.chdir(place)
    run = open_run(place / "runs" / "vae" / "whole", Path("runs/vae"))
    cfg = run.read("net", autoencoder.Config)
    values = run.learned(autoencoder.spec(cfg), averaged=False)
    learn, test = arrays.digits()
    part = test._replace(images=test.images[:20], labels=test.labels[:20])
    key = random.key(3)
    figures = variational.figures_of(values, cfg, part, key, samples=2000)
    q = autoencoder.encode(values, part.images, cfg)
    z = autoencoder.draw(q, random.sites(key, 20))

    def log_p(z, x):
        output = torch.distributions.Bernoulli(logits=autoencoder.decode(values, z, cfg), validate_args=False)
        return output.log_prob(x).flatten(1).sum(1)

    posterior = torch.distributions.Normal(q.mean, (0.5 * q.log_variance).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    assert figures["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert figures["reconstruction"] == pytest.approx(float(log_p(z, part.images).mean()), rel=1e-5)
    axis = torch.linspace(-6, 6, 121)
    grid = torch.cartesian_prod(axis, axis)
    weight = torch.distributions.Normal(0.0, 1.0).log_prob(grid).sum(1) + 2 * math.log(0.1)
    exact = torch.stack([(log_p(grid, x.expand(len(grid), *x.shape)) + weight).logsumexp(0) for x in part.images])
    assert figures["log_likelihood"] == pytest.approx(float(exact.mean()), abs=0.02)


def test_mean_image_against_distributions():
    """The baseline without a net, of both likelihoods."""
    learn, test = arrays.digits()
    mean = learn.images.mean(0)
    figures = variational.mean_image(learn, test, autoencoder.Config())
    output = torch.distributions.Bernoulli(mean.clamp(1e-6, 1 - 1e-6), validate_args=False)
    expected = output.log_prob(test.images).flatten(1).sum(1).mean()
    assert figures["mean_image_log_likelihood"] == pytest.approx(float(expected), rel=1e-5)
    assert figures["mean_image_error"] == pytest.approx(float((test.images - mean).square().mean()), rel=1e-5)
    for learned in (True, False):
        cfg = autoencoder.Config(output="mean", learned_variance=learned)
        output = torch.distributions.Normal(mean, (learn.images - mean).square().mean().sqrt() if learned else 1.0)
        expected = output.log_prob(test.images).flatten(1).sum(1).mean()
        assert variational.mean_image(learn, test, cfg)["mean_image_log_likelihood"] == pytest.approx(
            float(expected), rel=1e-5
        )


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("model", "flags", "pictures"),
    [
        ("autoencoder", ("--latent", "2"), ("latent_grid",)),
        ("denoising", ("--noise", "0.5"), ()),
        ("conditional", ("--kind", "convolutional"), ()),
        ("vae", ("--likelihood", "gaussian", "--beta", "4"), ("samples",)),
        ("conditional-vae", ("--kind", "convolutional", "--latent", "2"), ("samples", "latent_grid")),
        ("iwae", ("--samples", "3"), ("samples",)),
    ],
)
def test_each(model, flags, pictures, dtype, tmp_path, monkeypatch, without_codes):
    monkeypatch.chdir(tmp_path)
    flags = (*QUICK, *SMALL, "--steps", "30", "--model", model, *flags, "--dtype", dtype)
    assert call(*flags, "--name", "one") == 0
    run = tmp_path / "runs" / "vae" / "one"
    assert all(is_png(run / f"{name}.png") for name in ("reconstructions", *pictures))
    assert (run / "samples.png").exists() == ("samples" in pictures)
    losses = [line["train/loss"] for line in metrics(run) if "train/loss" in line]
    assert losses[-1] < losses[0]
    assert all(leaf.dtype != torch.bfloat16 for leaf in final_state(run)["params"]["decoder"]["output"].values())


@pytest.mark.slow
def test_watched_gradients(tmp_path, monkeypatch, without_codes):
    """The same training, and the gradients of the images beside it."""
    monkeypatch.chdir(tmp_path)
    flags = (*QUICK, *SMALL, "--likelihood", "gaussian", "--steps", "10")
    assert call(*flags, "--name", "plain") == 0 and call(*flags, "--watch-gradients", "--name", "watched") == 0
    plain, watched = (metrics(tmp_path / "runs" / "vae" / name) for name in ("plain", "watched"))
    assert watched[-1]["test/elbo"] == pytest.approx(plain[-1]["test/elbo"], rel=1e-4)
    assert is_png(tmp_path / "runs" / "vae" / "watched" / "gradients.png")


def test_flat_folder_of_pictures(tmp_path, monkeypatch, capsys):
    """No classes are needed where none are used; a file that cannot be read is skipped and counted. A resumed run takes
    the same pictures at another place, and no others."""
    monkeypatch.chdir(tmp_path)
    noise_folder(tmp_path / "faces", 20)
    flags = ("--steps", "2", "--batch", "4", "--width", "4", "--data", "faces", "--size", "16", "--name", "one")
    assert call(*flags) == 0
    assert any(line.startswith("skipped") and "broken.png" in line for line in capsys.readouterr().out.splitlines())
    run = tmp_path / "runs" / "vae" / "one"
    assert is_png(run / "samples.png") and config(run)["net"]["output"] == "mean"
    assert call("sample", "--run", "runs/vae/one", "--count", "4") == 0 and is_png(run / "sampled.png")
    (tmp_path / "faces").rename(tmp_path / "moved")
    assert call("--resume", "--name", "one", "--data", "moved", "--steps", "3") == 0
    Image.effect_noise((20, 24), 60).convert("RGB").save(tmp_path / "moved" / "3.png")
    assert call("--resume", "--name", "one", "--steps", "4") == 2
    assert "its checkpoint has data" in capsys.readouterr().err


def test_too_few_test_images_are_refused_at_the_start(tmp_path, monkeypatch, capfd):
    """The pictures at the end need three."""
    monkeypatch.chdir(tmp_path)
    noise_folder(tmp_path / "faces", 10)
    flags = ("--data", "faces", "--batch", "4", "--size", "16")
    (tmp_path / "faces" / "broken.png").unlink()
    assert "'faces' has 2 images to test on; expected at least 3" in refused(capfd, *QUICK, *flags)
    noise_folder(tmp_path / "more", 15)
    assert call("--data", "more", "--batch", "4", "--size", "16", *QUICK[:2], "--width", "4", "--latent", "1") == 0


def test_samples_of_a_class(tmp_path, monkeypatch, capfd, without_codes):
    monkeypatch.chdir(tmp_path)
    assert call(*QUICK, *SMALL, "--model", "conditional-vae", "--name", "one") == 0
    folder = tmp_path / "runs" / "vae" / "one"
    assert call("sample", "--run", "runs/vae/one", "--label", "3", "--count", "4") == 0
    first = (folder / "sampled.png").read_bytes()
    assert call("sample", "--run", "runs/vae/one", "--label", "4", "--count", "4", "--checkpoint", "4") == 0
    assert (folder / "sampled_2.png").read_bytes() != first == (folder / "sampled.png").read_bytes()
    assert "--label is 10; expected 0 to 9" in refused(capfd, "sample", "--run", "runs/vae/one", "--label", "10")
    taken = ("--out", "runs/vae/one/sampled.png")
    assert "exists already; choose another --out" in refused(capfd, "sample", "--run", "runs/vae/one", *taken)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sample", "--label", "1"], "this model is not conditional"),
        (["sample", "--temperature", "0"], "--temperature is 0.0; expected a number above 0"),
        (["reconstruct", "--count", "298"], "--count is 298, but there are 297 test images"),
        (["interpolate", "--indices", "1", "2", "3"], "--indices 1 2 3: expected pairs of numbers from 0 to 296"),
        (["interpolate", "--indices", "0", "297"], "--indices 0 297: expected pairs of numbers from 0 to 296"),
    ],
    ids=flag_id,
)
def test_sub_commands_refuse_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, *flags, "--run", "runs/vae/whole")


def test_autoencoder_has_nothing_to_sample_from(tmp_path, monkeypatch, capfd, without_codes):
    monkeypatch.chdir(tmp_path)
    assert call(*QUICK, *SMALL, "--model", "autoencoder", "--name", "one") == 0
    assert "without a prior to sample codes from" in refused(capfd, "sample", "--run", "runs/vae/one")


def test_defaults_follow_the_model_and_the_images(monkeypatch, capsys):
    """The help shows the numbers that a run would have."""
    monkeypatch.setenv("COLUMNS", "200")
    for flags, default in (
        ((), "Dimension of a code. (default: 8)"),
        (("--data", "mnist"), "Dimension of a code. (default: 20)"),
        (("--data", "mnist"), "first feature maps. (default: 400)"),
        (("--size", "28", "--kind", "convolutional"), "first feature maps. (default: 32)"),
        (("--data", "cifar10"), "by default for coloured images. (default: gaussian)"),
        (("--data", "cifar10"), "pixels per side. (default: convolutional)"),
        (("--model", "iwae"), "importance-weighted bound (iwae). (default: 5)"),
        (("--model", "iwae"), "Weight of the divergence (vae, conditional-vae). (default: None)"),
    ):
        assert call(*flags, "--help") == 0
        assert default in " ".join(capsys.readouterr().out.replace("│", "").split()), default


def test_scatter(tmp_path):
    points, labels = torch.randn(12, 2), torch.arange(12) % 3
    for classes in (tuple("abc"), ("cat", "dog", "bird")):
        plots.scatter(tmp_path / "points.png", points, labels, classes)
        assert is_png(tmp_path / "points.png")
    for args, message in (
        ((points[:, :1], labels, "abc"), r"shape \(12, 1\), expected \(count, 2\)"),
        ((points, labels[:3], "abc"), r"12 points have labels of shape \(3,\)"),
        ((points, labels, "ab"), "labels go from 0 to 2, but there are 2 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.scatter(tmp_path / "points.png", *args)


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise."""
    runs.completed("vae", tmp_path)
    (run,) = (tmp_path / "runs" / "vae").iterdir()
    figures = result(run)
    assert figures["elbo"] > -24.5 and figures["log_likelihood"] > figures["elbo"] and figures["active_units"] >= 4
    assert figures["elbo"] > figures["mean_image_log_likelihood"] + 2
