"""experiments/diffusion.py and diffusion_study.py: their losses, samples, studies, and folders of pictures."""

import functools
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from core import random, spec, tree
from experiments import diffusion_study
from experiments.parts import diffusion
from nets.generative import unet
from tests.experiments import runs
from tests.experiments.runs import is_png, metrics, result
from tests.experiments.test_laws import final_state
from train.diffusion import schedules
from train.step import Policy

DRAWN = True
call, refused = (functools.partial(function, "diffusion") for function in (runs.call, runs.refused))
study, study_refused = (functools.partial(function, "diffusion_study") for function in (runs.call, runs.refused))
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


@pytest.fixture
def run(here):
    """The run in a copy of its folder, in which the test stands."""
    return here / "runs" / "diffusion" / "whole"


def noise_pictures(folder, count, size=(10, 12)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{i}.png")


def test_figures_of_a_run(place):
    run = place / "runs" / "diffusion" / "whole"
    figures = result(run)
    assert figures["features"] == "pixels" and figures["frechet_distance"] > 0 and 0 <= figures["coverage"] <= 1
    # Of 20 times each has a group of its own, and all have as many examples, so that the mean of the groups is that
    # of all.
    by_time = list(figures["loss_by_time"].values())
    assert len(by_time) == 20 and sum(by_time) / 20 == pytest.approx(figures["loss"], rel=0.02)
    assert final_state(run)["history"]["counts"].sum() == 8  # losses in the history: two batches of 4


@pytest.mark.slow
def test_watched_gradients(tmp_path, monkeypatch, capfd):
    """The same run, and its log has the norms by the time. A net without classes takes no guidance."""
    monkeypatch.chdir(tmp_path)
    flags = ("--loss-weight", "hybrid", "--variance", "learned", "--noise-schedule", "linear", "--timesteps", "30")
    flags = (*flags, "--sampler", "ddpm", "--steps", "1")
    assert call(*QUICK, *flags, "--name", "plain") == 0
    assert call(*QUICK, *flags, "--watch-gradients", "--name", "seen") == 0
    plain, seen = (tmp_path / "runs" / "diffusion" / name for name in ("plain", "seen"))
    loss, same = ([r["train/loss"] for r in metrics(run) if "train/loss" in r] for run in (plain, seen))
    assert same == pytest.approx(loss, rel=1e-5)
    (norms,) = [r for r in metrics(seen) if any(name.startswith("gradients/time/") for name in r)]
    assert all(value > 0 for name, value in norms.items() if name.startswith("gradients/time/"))
    assert is_png(seen / "gradients_by_time.png")
    for flags in (("--guidance", "2"), ("--label", "1")):
        assert "has no classes" in refused(capfd, "sample", "--run", "runs/diffusion/plain", *flags)


def test_losses_in_half_precision():
    """Only the net is in bfloat16: the loss, the weights and the noise have the precision they had."""
    cfg = unet.Config(1, (8, 8), blocks=1, attention=(), groups=4, zero=False)
    params = spec.init(random.key(0), unet.spec(cfg))
    model = diffusion.Diffusion(cfg, diffusion.Process(timesteps=20), schedules.make("cosine", 20))
    images, weights = random.normal(random.key(1), (6, 1, 4, 4)), torch.full((6,), 1 + 2**-12)
    batch = (images, torch.zeros(6, dtype=torch.int64), torch.arange(6) * 3, weights)
    keys = random.split(random.key(2), 6)
    full, _ = diffusion.losses(params, batch, keys, model, 256)
    half, same = diffusion.losses(params, batch, keys, model, 256, Policy(torch.bfloat16))
    assert half.dtype == torch.float32 and torch.equal(half, same["losses"]) and not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.1, atol=0)  # bfloat16 has 8 bits, an error of 2^-8 a layer
    unweighted, _ = diffusion.losses(params, (*batch[:3], weights / weights), keys, model, 256, Policy(torch.bfloat16))
    assert torch.equal(half, unweighted * weights)  # the weight is not rounded to 1


@pytest.mark.slow
def test_run_in_half_precision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.undrawn(monkeypatch)
    for dtype in ("float32", "bfloat16"):
        assert call(*QUICK, "--dtype", dtype, "--name", dtype) == 0
    full, half = (tmp_path / "runs" / "diffusion" / dtype for dtype in ("float32", "bfloat16"))
    state = final_state(half)
    assert all(x.dtype == torch.float32 for x in tree.leaves(state["train"]["params"]))
    assert not runs.same_bits(state, final_state(full))
    assert metrics(half)[-1]["train/loss"] == pytest.approx(metrics(full)[-1]["train/loss"], rel=0.05)


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
def test_samples(flags, run, capsys):
    assert call("sample", *RUN, *flags, "--sampler-steps", "3", "--count", "5") == 0
    folder = run / "sampled"
    assert is_png(folder / "samples.png") and is_png(folder / "film.png") and "5 samples" in capsys.readouterr().out
    assert (folder / "sampling.gif").read_bytes()[:3] == b"GIF"
    samples = np.load(folder / "samples.npy")
    assert samples.shape == (5, 8, 8, 1) and samples.dtype == np.uint8 and len(np.unique(samples)) > 2


def test_many_samples_are_all_in_a_file_and_the_first_in_a_picture(run):
    assert call("sample", *RUN, "--sampler-steps", "1", "--count", "300", "--out", "many") == 0
    assert np.load("many/samples.npy").shape == (300, 8, 8, 1)
    assert call("sample", *RUN, "--sampler-steps", "1", "--count", "64", "--out", "few") == 0
    with Image.open("many/samples.png") as many, Image.open("few/samples.png") as few:
        assert many.size == few.size


def test_samples_are_functions_of_key_and_number(monkeypatch):
    """Whatever the batches are, and with all steps through one function."""
    cfg = unet.Config(1, (8, 8), blocks=1, attention=(), groups=4, classes=3, zero=False)
    params = spec.init(random.key(0), unet.spec(cfg))
    process = diffusion.Process(predicts="noise", timesteps=20)
    model = diffusion.Diffusion(cfg, process, diffusion.schedule_of(process))
    sampler = diffusion.make_sampler(model, "ddim", 4, 2.0, eta=1.0, compile=False)

    def samples(labels):
        return diffusion.generate(sampler, params, labels, random.key(1), (1, 4, 4), 5)[0]

    labels = torch.arange(5) % 3
    whole = samples(labels)
    monkeypatch.setattr(diffusion, "BATCH", 2)
    torch.testing.assert_close(samples(labels), whole, atol=1e-5, rtol=1e-5)
    assert (samples(labels * 0) - whole).abs().amax((1, 2, 3)).gt(1e-4).tolist() == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("flags", "preset", "steps"),
    [
        ((), "digits", 1500),
        (("--size", "16"), "mnist", 2300),
        (("--data", "cifar10"), "small", 20_000),
        (("--data", "somewhere", "--size", "8"), "digits", 1500),
        (("--preset", "cifar", "--data", "cifar10"), "cifar", 100_000),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_presets_by_the_images(flags, preset, steps, monkeypatch, capsys):
    """The help shows the numbers that a run would have."""
    monkeypatch.setenv("COLUMNS", "200")
    assert call(*flags, "--help") == 0
    out = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert f"command line). (default: {preset})" in out and f"over all of them. (default: {steps})" in out


# diffusion_study.py


def test_interpolation(run, capsys):
    assert study("interpolate", *RUN, "--sampler-steps", "20") == 0
    assert is_png(run / "interpolation.png")
    # There and back again; grey images would be 0.35 away.
    assert float(capsys.readouterr().out.split("error of ")[1].split()[0]) < 0.02


def test_inpainting(run):
    flags = ("--sampler-steps", "3", "--repeats", "2", "--count", "3")
    assert study("inpaint", *RUN, *flags, "--mask", "box") == 0
    before = (run / "inpainted.png").read_bytes()
    assert study("inpaint", *RUN, *flags) == 0  # nothing is overwritten
    assert is_png(run / "inpainted_2.png") and (run / "inpainted.png").read_bytes() == before
    assert study("inpaint", *RUN, *flags, "--checkpoint", "1", "--out", "first.png") == 0
    assert is_png(run.parents[2] / "first.png")


@pytest.mark.parametrize("command", [("evaluate",), ()], ids=["evaluate", "newest"])
def test_evaluation(command, run, capsys):
    """Without a sub-command and --run it is of the newest run."""
    which = RUN if command else ("--no-compile",)
    assert study(*command, *which, "--count", "12", "--bits", "2", "--flow-steps", "2") == 0
    table = json.loads((run / "result" / "evaluation.json").read_text())
    assert [(row["sampler"], row["steps"]) for row in table["samplers"]] == [("ddpm", 20), ("ddim", 10), ("ddim", 20)]
    # 17 grey levels without a model: log2 17 = 4.09 bits.
    bits = table["bits_per_dimension"]
    assert all(0.5 < bits[name] < 6 for name in ("bound", "flow")) and bits["uniform"] == pytest.approx(
        4.0875, abs=1e-3
    )
    out = capsys.readouterr().out
    assert table["real_frechet_distance"] > 0 and "without a net" in out
    assert any(line.split() == ["run", "runs/diffusion/whole"] for line in out.splitlines())


@pytest.mark.slow
def test_gradients_by_time(run):
    """The means of groups against gradients of one example at a time."""
    assert study("gradients", *RUN, "--count", "10", "--times", "2") == 0
    table = json.loads((run / "gradients_of_times.json").read_text())
    assert is_png(run / "gradients_of_times.png") and len(table["time"]) == 20
    opened = diffusion.opened(diffusion_study.StudyArgs(run))
    first = next(diffusion.probe(opened.model, opened.data, random.key(0), 2, 10))
    *one, key = (x[:1] for x in first)
    levels = opened.data.levels
    gradient = torch.func.grad(lambda p: diffusion.losses(p, one, key, opened.model, levels)[0].sum())(opened.params)
    assert first[2].tolist() == list(range(0, 20, 2))
    assert table["norm"][0] == pytest.approx(float(tree.norm(gradient)), rel=1e-4)


@pytest.fixture
def wrong_mask(here):
    Image.new("L", (9, 8)).save(here / "mask.png")


def never(*_, **__):
    raise AssertionError("nothing may be sampled before all is checked")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sample", "--sampler", "euler"], "invalid choice 'euler' for argument '--sampler'"),
        (["sample", "--sampler-steps", "21"], "sampled in 1 to 20 steps, got 21"),
        (["sample", "--label", "10"], "--label is 10; expected 0 to 9"),
        (["sample", "--guidance", "-1"], "--guidance is -1.0; expected at least 0"),
        (["sample", "--sampler", "heun", "--eta", "1"], "--eta is 1.0; only ddim takes it"),
        (["sample", "--sampler-steps", "9", "--out", "runs"], "'runs' exists already; choose another --out"),
        (["inpaint", "--mask", "mask.png"], "has 8 x 9 pixels; expected those of the images, 8 x 8"),
        (["inpaint", "--sampler-steps", "3", "--mask", "none.png"], "'none.png': No such file"),
        (["inpaint", "--sampler-steps", "3", "--repeats", "0"], "--repeats is 0; expected at least 1"),
        (["inpaint", "--count", "65"], "--count is 65; expected a number in [1, 64]"),
        (["interpolate", "--sampler-steps", "21"], "sampled in 1 to 20 steps, got 21"),
        (["evaluate", "--bits", "-1"], "--bits is -1; expected at least 0"),
        (["evaluate", "--classifier", "no/such"], "'no/such' is not the folder of a run"),
        (["evaluate", "--count", "4"], "--count is 4; expected at least 6"),
        (
            ["evaluate", "--bits", "1", "--flow-steps", "20"],
            "a flow over 19 times of the schedule takes 1 to 18 steps, got 20",
        ),
        (["evaluate", "--out", "runs"], "'runs' exists already; choose another --out"),
        (["gradients", "--times", "0"], "--times is 0; expected at least 1"),
    ],
    ids=runs.flag_id,
)
def test_refused_before_anything_is_computed(flags, message, here, wrong_mask, monkeypatch, capfd):
    monkeypatch.setattr(unet, "apply", never)
    script = "diffusion" if flags[0] == "sample" else "diffusion_study"
    assert message in runs.refused(script, capfd, *flags, *RUN)


def test_study_without_a_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert "there is no run in 'runs/diffusion'; train one with diffusion.py" in study_refused(capfd, "--no-compile")
    assert "'nowhere' is not the folder of a run" in study_refused(capfd, "inpaint", "--run", "nowhere")


def test_help_of_the_study_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ((), ("evaluate",), ("interpolate",), ("inpaint",), ("gradients",)):
        assert study(*command, "--help") == 0
        out = capsys.readouterr().out
        assert "--run" in out and all(len(line) <= 80 for line in out.splitlines() if "│" in line or "╭" in line)


def test_nothing_that_the_end_refuses_is_trained_first(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    noise_pictures(tmp_path / "few", 8)
    monkeypatch.setattr(unet, "apply", never)
    for flags, message in (
        (("--count", "4"), "--count is 4; expected at least 6"),
        (("--classifier", "nowhere"), "'nowhere' is not the folder of a run"),
        (("--data", "few", "--size", "8"), "there are 8 images; the figures take at least 12"),
    ):
        assert message in refused(capfd, *QUICK, *flags)


# Data


def test_checkpoint_of_another_net(here, run, capfd):
    path = run / "config.json"
    stored = json.loads(path.read_text())
    stored["args"]["process"]["classes"] = False
    path.write_text(json.dumps(stored))
    assert "its checkpoint has net classes 10, expected 0" in refused(capfd, "--resume", "--name", "whole")


def test_identity_of_the_data_is_their_content(tmp_path, monkeypatch, capfd):
    """The same pictures at another place resume; as many others do not."""
    monkeypatch.chdir(tmp_path)
    runs.undrawn(monkeypatch)
    noise_pictures(tmp_path / "data" / "a", 15)
    assert call(*QUICK, "--data", "data", "--size", "8", "--name", "one") == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    assert call("--resume", "--data", "moved") == 0
    noise_pictures(tmp_path / "other" / "a", 15)
    assert "its checkpoint has data" in refused(capfd, "--resume", "--data", "other")


def test_folder_of_pictures(tmp_path, monkeypatch):
    """Three channels, mirrored, with two classes and features of a classifier."""
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        folder = tmp_path / "data" / ("dark", "bright")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 12), (10 * i, 20, 30 + 100 * (i % 2))).save(folder / f"{i}.png")
    judge = ("--data", "data", "--net", "lenet-digits", "--size", "8", "--epochs", "1", "--batch", "4", "--no-compile")
    assert runs.call("classify", *judge, "--workers", "0", "--name", "judge") == 0
    flags = ("--data", "data", "--size", "8", "--flip", "--predicts", "image", "--loss-weight", "min-snr", "--classes")
    flags = (*flags, "--count", "8", "--classifier", "runs/classify/judge")
    assert call(*QUICK, *flags, "--name", "one") == 0
    figures = result(tmp_path / "runs" / "diffusion" / "one")
    assert figures["frechet_distance"] > 0 and figures["features"] == "runs/classify/judge"
    assert runs.config(tmp_path / "runs" / "diffusion" / "one")["net"]["classes"] == 2


def test_flat_folder_with_an_unreadable_picture(tmp_path, monkeypatch, capfd):
    """No classes are needed where none are used, and a file that cannot be read is skipped and counted."""
    monkeypatch.chdir(tmp_path)
    noise_pictures(tmp_path / "faces", 20)
    (tmp_path / "faces" / "broken.png").write_bytes(b"no picture")
    flags = ("--data", "faces", "--size", "8")
    assert call(*QUICK, *flags, "--name", "one") == 0
    assert any(line.startswith("skipped") and "broken.png" in line for line in capfd.readouterr().out.splitlines())
    assert call("sample", "--run", "runs/diffusion/one", "--no-compile", "--sampler-steps", "2", "--count", "3") == 0
    assert is_png(tmp_path / "runs" / "diffusion" / "one" / "sampled" / "samples.png")
    assert study("inpaint", "--sampler-steps", "2", "--count", "2", "--no-compile") == 0
    shutil.move("faces", "data/one-class")
    assert call(*QUICK, "--data", "data", "--size", "8", "--name", "two") == 0
    line = refused(capfd, *QUICK, "--data", "data", "--size", "8", "--classes")
    assert "'data' has the one class 'one-class'; expected at least two" in line


@pytest.mark.long
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise, compiled."""
    process = runs.start("diffusion", tmp_path)
    signal.alarm(900)  # 217 s on two cores that do nothing else
    code, _, err = runs.finish(process)
    assert (code, err) == (0, "")
    (run,) = (tmp_path / "runs" / "diffusion").iterdir()
    figures = result(run)
    assert figures["frechet_distance"] < 0.1
