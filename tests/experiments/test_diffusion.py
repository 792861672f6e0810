import functools
import json
import shutil

import pytest
import torch

from core import random, spec, tree
from experiments.parts import diffusion
from nets.generative import unet
from tests.experiments import runs
from tests.experiments.runs import is_png, metrics, result, same_bits
from train.diffusion import schedules
from train.run import checkpoints

call, refused = (functools.partial(function, "diffusion") for function in (runs.call, runs.refused))
QUICK = ("--steps", "2", "--batch", "4", "--save-every", "1", "--timesteps", "20", "--sampler-steps", "2")
QUICK = (*QUICK, "--count", "16", "--no-compile")
RUN = ("--run", "runs/diffusion/whole", "--no-compile")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run with classes and importance, runs/diffusion/whole; not to be changed."""
    folder = tmp_path_factory.mktemp("diffusion")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, "--classes", "--importance", "--dropout", "0.1", "--name", "whole") == 0
    return folder


def learned(run):
    cfg = unet.Config(**{**runs.config(run)["net"], "widths": (32, 48), "attention": ()})
    model = spec.abstract(unet.spec(cfg))
    counts = torch.zeros(20, dtype=torch.int64)
    return checkpoints.restore(run / "checkpoints", model, part="train.params"), checkpoints.restore(
        run / "checkpoints", counts, part="history.counts"
    )


def test_folder_of_a_run(place):
    run = place / "runs" / "diffusion" / "whole"
    assert checkpoints.steps(run / "checkpoints") == [1, 2]
    assert all(is_png(run / f"{name}.png") for name in ("samples", "film", "film_predicted", "loss", "loss_by_time"))
    assert (run / "sampling.gif").read_bytes()[:3] == b"GIF"
    figures = result(run)
    assert figures["features"] == "pixels" and figures["frechet_distance"] > 0 and 0 <= figures["coverage"] <= 1
    # Of 20 times each has a group of its own, and all have as many examples, so that the mean of the groups is that
    # of all.
    by_time = list(figures["loss_by_time"].values())
    assert len(by_time) == 20 and sum(by_time) / 20 == pytest.approx(figures["loss"], rel=0.02)
    assert learned(run)[1].sum() == 8  # losses in the history: two batches of 4


def test_resumed_run_has_the_same_bits(here):
    run = here / "runs" / "diffusion" / "whole"
    whole, figures = learned(run), result(run)
    shutil.rmtree(run / "checkpoints" / "2")
    assert call("--resume") == 0
    assert same_bits(learned(run), whole) and result(run)["frechet_distance"] == figures["frechet_distance"]


def test_watched_gradients(tmp_path, monkeypatch, capfd):
    """The same run, and its log has the norms by the time. A net without classes takes no guidance."""
    monkeypatch.chdir(tmp_path)
    flags = ("--weight", "hybrid", "--variance", "learned", "--schedule", "linear", "--timesteps", "30")
    flags = (*flags, "--sampler", "ddpm", "--steps", "1")
    assert call(*QUICK, *flags, "--name", "plain") == 0
    assert call(*QUICK, *flags, "--watch-gradients", "--name", "seen") == 0
    plain, seen = (tmp_path / "runs" / "diffusion" / name for name in ("plain", "seen"))
    found = metrics(seen)[-1]
    assert found["train/loss"] == pytest.approx(metrics(plain)[-1]["train/loss"], rel=1e-5)
    assert any(name.startswith("gradients/time/") for name in found) and is_png(seen / "gradients_by_time.png")
    for flags in (("--guidance", "2"), ("--label", "1")):
        assert "was trained without --classes" in refused(capfd, "sample", "--run", "runs/diffusion/plain", *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ("--sampler", "ddpm"),
        ("--sampler", "ddim", "--eta", "0.5", "--label", "3", "--guidance", "2"),
        ("--sampler", "dpm-solver++", "--spacing", "linspace"),
        ("--sampler", "heun", "--guidance", "0"),
    ],
    ids=lambda flags: flags[1],
)
def test_samples(flags, here, capsys):
    assert call("sample", *RUN, *flags, "--steps", "3", "--count", "5") == 0
    folder = here / "runs" / "diffusion" / "whole" / "sampled"
    assert is_png(folder / "samples.png") and is_png(folder / "film.png") and "5 samples" in capsys.readouterr().out
    assert (folder / "sampling.gif").read_bytes()[:3] == b"GIF"


def test_samples_are_functions_of_key_and_number(monkeypatch):
    """Whatever the batches are, and with all steps through one function."""
    cfg = unet.Config(1, (8, 8), blocks=1, attention=(), groups=4, classes=3, zero=False)
    params = spec.init(random.key(0), unet.spec(cfg))
    who = diffusion.Diffusion(cfg, schedules.make("cosine", 20), "noise", "small")
    sampler = diffusion.make_sampler(who, "ddim", 4, eta=1.0)
    step = diffusion.make_step(who, sampler, 2.0, compile=False)

    def drawn(count, labels):
        return diffusion.generate(params, sampler, step, random.key(1), (1, 4, 4), labels, count)

    labels = torch.arange(5) % 3
    whole = drawn(5, labels)
    monkeypatch.setattr(diffusion, "BATCH", 2)
    torch.testing.assert_close(drawn(5, labels), whole, atol=1e-5, rtol=1e-5)
    assert (drawn(5, labels * 0) - whole).abs().amax((1, 2, 3)).gt(1e-4).tolist() == [False, True, True, False, True]


def test_interpolation(here, capsys):
    assert call("interpolate", *RUN, "--steps", "20") == 0
    assert is_png(here / "runs" / "diffusion" / "whole" / "interpolation.png")
    # There and back again; grey images would be 0.35 away.
    assert float(capsys.readouterr().out.split("error of ")[1].split()[0]) < 0.02


def test_inpainting(here):
    assert call("inpaint", *RUN, "--steps", "3", "--repeats", "2", "--count", "3", "--mask", "box") == 0
    assert is_png(here / "runs" / "diffusion" / "whole" / "inpainted.png")


def test_masks(tmp_path):
    from PIL import Image

    half = diffusion.mask_of("half", (1, 6, 8))
    Image.fromarray(half.numpy()).save(tmp_path / "half.png")
    assert half.sum() == 24 and half[:, 0].all()
    assert torch.equal(diffusion.mask_of(str(tmp_path / "half.png"), (1, 6, 8)), half)
    assert (~diffusion.mask_of("box", (1, 6, 8))).sum() == 16


def test_evaluation(here):
    assert call("evaluate", *RUN, "--count", "12", "--bits", "2", "--flow-steps", "2") == 0
    table = json.loads((here / "runs" / "diffusion" / "whole" / "result" / "evaluation.json").read_text())
    assert [(row["sampler"], row["steps"]) for row in table["samplers"]] == [("ddpm", 20), ("ddim", 10), ("ddim", 20)]
    # 17 grey levels without a model: log2 17 = 4.09 bits.
    assert all(0.5 < table["bits_per_dimension"][name] < 6 for name in ("bound", "flow"))


def test_gradients_by_time(here):
    """The means of groups against gradients of one example at a time."""
    assert call("gradients", *RUN, "--count", "10", "--rounds", "2") == 0
    run = here / "runs" / "diffusion" / "whole"
    found = json.loads((run / "result" / "gradients.json").read_text())
    assert is_png(run / "gradients_of_times.png") and len(found["time"]) == 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["diffusion.py"])
        opened = runs.MAIN.opened(run.relative_to(here), "cpu")
    first = next(diffusion.probe(opened.who, opened.data, random.key(0), 2, 10))
    one = tree.map(lambda x: x[:1], first)
    gradient = torch.func.grad(lambda p: opened.losses(p, one[:4], one[4]).sum())(opened.params)
    assert first[2].tolist() == list(range(0, 20, 2)) and found["norm"][0] == pytest.approx(
        float(tree.norm(gradient)), rel=1e-4
    )


@pytest.fixture
def wrong_mask(here):
    from PIL import Image

    Image.new("L", (9, 8)).save(here / "mask.png")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedule", "quadratic"], "no schedule 'quadratic': choose one of linear, cosine"),
        (["--timesteps", "1"], "a diffusion takes at least 2 steps, got 1"),
        (["--schedule", "linear", "--timesteps", "10"], "betas must lie inside (0, 1)"),
        (["--sampler", "euler"], "no sampler 'euler': choose one of ddpm, ddim"),
        (["--sampler-steps", "30"], "a schedule of 20 steps is sampled in 1 to 20 steps, got 30"),
        (["--size", "9"], "the images have 9 x 9 pixels; the digits net takes sides divisible by 2: choose --size"),
        (["--preset", "huge"], "--preset 'huge' is unknown; expected one of digits, mnist"),
        (["--predicts", "score"], "--predicts 'score' is unknown; expected one of noise, image, velocity"),
        (["--variance", "learned"], "--variance learned goes with --weight hybrid"),
        (["--flip"], "--flip is not for digits"),
        (["--batch", "5000"], "--batch is 5000, but there are 1500 images"),
        (["--data", "nowhere"], "'nowhere' does not exist"),
        (["--classifier", "nowhere"], "nowhere"),
        (["--resume", "--name", "whole", "--preset", "mnist"], "it was started with digits"),
        (["sample", *RUN, "--sampler", "euler"], "no sampler 'euler'"),
        (["sample", *RUN, "--steps", "21"], "sampled in 1 to 20 steps, got 21"),
        (["sample", *RUN, "--label", "10"], "--label is 10; expected 0 to 9"),
        (["sample", *RUN, "--guidance", "-1"], "--guidance is -1.0; expected a number of at least 0"),
        (["sample", *RUN, "--sampler", "heun", "--eta", "1"], "--eta is 1.0; only ddim takes it"),
        (
            ["inpaint", *RUN, "--steps", "3", "--mask", "mask.png"],
            "has 8 x 9 pixels; expected those of the images, 8 x 8",
        ),
        (["inpaint", *RUN, "--steps", "3", "--mask", "none.png"], "'none.png': No such file"),
        (["inpaint", *RUN, "--steps", "3", "--repeats", "0"], "repeats must be at least 1, got 0"),
        (["interpolate", *RUN, "--steps", "21"], "sampled in 1 to 20 steps, got 21"),
        (["evaluate", *RUN, "--bits", "-1"], "--bits is -1"),
        (["gradients", *RUN, "--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["sample", "--run", "nowhere"], "nowhere"),
    ],
    ids=runs.flag_id,
)
def test_refused_in_one_line(flags, message, here, wrong_mask, capfd):
    quick = () if flags[0] in ("sample", "inpaint", "interpolate", "evaluate", "gradients", "--resume") else QUICK
    assert message in refused(capfd, *quick, *flags)


def test_checkpoint_of_another_net(here, capfd):
    path = here / "runs" / "diffusion" / "whole" / "config.json"
    stored = json.loads(path.read_text())
    stored["args"]["classes"] = False
    path.write_text(json.dumps(stored))
    assert "its checkpoint has" in refused(capfd, "--resume", "--name", "whole")


def test_folder_of_pictures(tmp_path, monkeypatch):
    """Three channels, mirrored, with features of a classifier."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for i in range(12):
        folder = tmp_path / "data" / ("dark", "bright")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 12), (10 * i, 20, 30 + 100 * (i % 2))).save(folder / f"{i}.png")
    flags = ("--data", "data", "--size", "8", "--preset", "digits", "--flip", "--predicts", "image")
    assert call(*QUICK, *flags, "--weight", "min-snr", "--count", "8", "--name", "one") == 0
    assert result(tmp_path / "runs" / "diffusion" / "one")["frechet_distance"] > 0


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise, compiled."""
    runs.completed("diffusion", tmp_path)
    (run,) = (tmp_path / "runs" / "diffusion").iterdir()
    assert result(run)["frechet_distance"] < 0.1
