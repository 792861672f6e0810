import functools
import re

import pytest
import torch
from PIL import Image

from core import random, spec
from experiments.parts import diffusion, generator
from nets.generative import dcgan
from tests.experiments import runs
from tests.experiments.runs import config, flag_id, is_png, result
from train.run import checkpoints

DRAWN = True
call, refused = (functools.partial(function, "gan") for function in (runs.call, runs.refused))
QUICK = ("--steps", "2", "--batch", "8", "--save-every", "1", "--sample-every", "1", "--no-compile")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SMALL = ("--width", "4", "--latent", "16", "--critic-steps", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run of WGAN-GP, runs/gan/whole; not to be changed."""
    folder = tmp_path_factory.mktemp("gan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, *SMALL, "--name", "whole") == 0
    return folder


def averages(run):
    """The averaged parameters of the generator."""
    model = dcgan.generator_spec(dcgan.Config(**{**config(run)["net"], "heads": ()}))
    params, _ = spec.split(model, spec.abstract(model))
    return checkpoints.restore(run / "checkpoints", params, part="generator.opt_state.average")


def two_kinds(order: str) -> generator.Labelled:
    """400 pictures, half of them dark and half bright, in the order of their kinds or the two in turn."""
    bright = torch.arange(400) >= 200 if order == "sorted" else torch.arange(400) % 2 == 1
    noise = random.normal(random.key(0), (400, 1, 2, 2)) / 10
    return generator.Labelled(noise + torch.where(bright, 0.5, -0.5)[:, None, None, None], bright.long())


@pytest.mark.parametrize("order", ["sorted", "in turn"])
def test_real_images_are_a_sample_of_all(order, monkeypatch):
    """Folders lie in the order of their classes; every other image of MNIST is by other writers."""
    monkeypatch.setattr(generator, "MEASURED", 100)
    images, labels = two_kinds(order)
    data = generator.Data(generator.Labelled(images, labels), generator.Labelled(images, labels), ("dark", "bright"))
    of_diffusion = diffusion.Data(*data[:3], 256, {})
    for real in (generator.real_images(data), (diffusion.real_images(of_diffusion, 100) + 1) / 2):
        assert len(real) == 100 and 0.3 < float((real.mean((1, 2, 3)) > 0.5).float().mean()) < 0.7
    apart = generator.distances(images[labels == 0], images[labels == 1], None)["frechet_distance"]
    for figures in (generator.baseline(data, None), diffusion.baseline(of_diffusion, 100, None)):
        assert figures["real_frechet_distance"] < 0.05 * apart


def test_samples(here, capsys):
    run = here / "runs" / "gan" / "whole"
    assert call("sample", "--run", "runs/gan/whole", "--count", "9") == 0
    assert is_png(run / "sampled.png") and "9 samples" in capsys.readouterr().out
    assert call("sample", "--run", "runs/gan/whole", "--count", "9", "--seed", "1") == 0
    assert (run / "sampled_2.png").read_bytes() != (run / "sampled.png").read_bytes()  # nothing is overwritten
    assert call("sample", "--run", "runs/gan/whole", "--count", "9", "--checkpoint", "1", "--out", "first.png") == 0
    assert is_png(here / "first.png")


@pytest.mark.parametrize(
    ("gan", "pictures"),
    [
        slow("gan", ()),
        slow("cgan", ("classes",)),
        slow("dcgan", ()),
        slow("wgan", ()),
        slow("wgan-div", ()),
        slow("lsgan", ()),
        slow("ebgan", ()),
        slow("began", ()),
        slow("acgan", ("classes",)),
        ("infogan", ("categories", "code_1", "code_2")),
        slow("sngan", ()),
        slow("sagan", ()),
    ],
)
def test_each(gan, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.undrawn(monkeypatch)
    assert call(*QUICK, "--gan", gan, "--latent", "16", "--critic-steps", "1", "--name", "one") == 0
    run = tmp_path / "runs" / "gan" / "one"
    assert is_png(run / "samples.png") and all(is_png(run / f"{name}.png") for name in pictures)
    assert result(run)["frechet_distance"] > 0


def test_mixture_of_several_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--data", "ring", "--seeds", "2", "--width", "16", "--gan", "sngan", "--regulariser", "r1")
    assert call(*QUICK, *flags, "--pairing", "average", "--name", "one") == 0
    run = tmp_path / "runs" / "gan" / "one"
    figures = result(run)
    assert 0 <= figures["modes"] <= 8 and 0 <= figures["good"] <= 1 and "modes_std" in figures
    assert is_png(run / "samples.png")
    assert call("sample", "--run", "runs/gan/one", "--count", "50") == 0 and is_png(run / "sampled.png")


@pytest.mark.slow
def test_class_of_a_conditional_generator(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert call(*QUICK, "--gan", "cgan", "--name", "one") == 0
    assert call("sample", "--run", "runs/gan/one", "--label", "3", "--count", "4") == 0
    assert is_png(tmp_path / "runs" / "gan" / "one" / "sampled.png")
    assert "--label is 10; expected 0 to 9" in refused(capfd, "sample", "--run", "runs/gan/one", "--label", "10")


@pytest.mark.slow
def test_mixed_precision(here):
    assert call(*QUICK, *SMALL, "--dtype", "bfloat16", "--name", "half") == 0
    half, whole = (runs.metrics(here / "runs" / "gan" / name)[0] for name in ("half", "whole"))
    # Eight bits: each operation is off by up to 0.4 %, so the gradient's norm by less than 10 %.
    assert half["critic/grad_norm"] != whole["critic/grad_norm"]
    assert half["critic/grad_norm"] == pytest.approx(whole["critic/grad_norm"], rel=0.1)


@pytest.mark.slow
def test_features_of_a_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--net", "lenet-digits", "--epochs", "1", "--batch", "100", "--no-compile")
    assert runs.call("classify", *options, "--name", "judge") == 0
    assert call(*QUICK, *SMALL, "--classifier", "runs/classify/judge", "--name", "one") == 0
    assert result(tmp_path / "runs" / "gan" / "one")["features"] == "runs/classify/judge"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gan", "vae"], "invalid choice 'vae' for argument '--gan'. Expected one of ('gan', 'cgan', 'dcgan'"),
        (["--objective", "hinged"], "invalid choice 'hinged' for argument '--objective'"),
        (["--data", "nowhere"], "'nowhere' does not exist"),
        (
            ["--data", "ring", "--gan", "cgan"],
            "unconditional GANs with scores; 'cgan' has conditional",
        ),
        (["--batch", "5000"], "--batch is 5000, but there are 1500 images"),
        (["--size", "7"], "images of 7 pixels per side cannot be halved"),
        (["--width", "0"], "--width is 0; expected at least 1"),
        (["--regulariser-weight", "-1"], "--regulariser-weight is -1.0; expected at least 0"),
        (["--gan", "infogan", "--latent", "12"], "leave no room in 12 latent dimensions"),
        (["--classifier", "nowhere"], "nowhere"),
        (["--resume", "--name", "whole", "--gan", "dcgan"], "it was started with wgan-gp"),
        (["sample", "--run", "runs/gan/whole", "--label", "1"], "this generator is not conditional"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    quick = () if flags[0] in ("sample", "--resume") else QUICK
    assert message in refused(capfd, *quick, *flags)


@pytest.mark.slow
def test_flat_folder_of_pictures(tmp_path, monkeypatch, capfd):
    """No classes are needed where none are used; a file that cannot be read is skipped and counted; a resumed run knows
    the pictures, wherever they lie."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    for i in range(20):
        Image.effect_noise((20, 24), 60).convert("RGB").save(tmp_path / "faces" / f"{i}.png")
    (tmp_path / "faces" / "broken.png").write_bytes(b"no picture")
    assert call(*QUICK, *SMALL, "--data", "faces", "--size", "8", "--name", "one") == 0
    assert any(line.startswith("skipped") and "broken.png" in line for line in capfd.readouterr().out.splitlines())
    assert is_png(tmp_path / "runs" / "gan" / "one" / "samples.png")
    (tmp_path / "faces").rename(tmp_path / "moved")
    assert call("--resume", "--data", "moved") == 0
    (tmp_path / "moved" / "3.png").write_bytes((tmp_path / "moved" / "4.png").read_bytes())
    assert "'runs/gan/one': its checkpoint has data" in refused(capfd, "--resume", "--data", "moved")


def test_defaults_of_a_line(monkeypatch, capsys):
    """The help shows the numbers that a run would have."""
    monkeypatch.setenv("COLUMNS", "200")
    for flags, default in (
        (("--gan", "sagan"), "paper's proportion. (default: 0.0004)"),
        (("--gan", "sagan", "--learning-rate", "1e-3"), "paper's proportion. (default: 0.004)"),
        (("--gan", "dcgan", "--regulariser", "wgan-div"), "Weight of the regulariser. (default: 2.0)"),
        (("--data", "grid"), "Weight of the regulariser. (default: 0.1)"),
        (("--data", "grid"), "Training steps of the generator. (default: 6000)"),
    ):
        assert call(*flags, "--help") == 0
        assert default in " ".join(capsys.readouterr().out.replace("│", "").split())


@pytest.mark.long
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise, compiled."""
    runs.completed("gan", tmp_path)
    (run,) = (tmp_path / "runs" / "gan").iterdir()
    assert result(run)["frechet_distance"] < 0.1


def test_page_points_at_the_lines():
    """The table of GANS.md names the line of each entry of `GANS`."""
    folder = runs.ROOT / "experiments"
    lines = (folder / "gan.py").read_text(encoding="utf-8").splitlines()
    page = (folder / "GANS.md").read_text(encoding="utf-8")
    named = re.findall(r"\[gan\.py:(\d+)\]\(gan\.py#L(\d+)\).*gallery/gans/([a-z-]+)\.png", page)
    assert len(named) == 13
    for shown, number, gan in named:
        assert shown == number and lines[int(number) - 1].startswith(f'    "{gan}": Gan('), (gan, number)
