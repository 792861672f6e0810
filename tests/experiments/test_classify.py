import functools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from core import random, spec, stats, tree
from experiments import classify
from experiments.parts import classifier
from nets.classifiers import by_name, resnet, squeezenet
from tests.experiments import runs
from tests.experiments.runs import config, contents, flag_id, is_png, result, same_bits
from tests.train.data.images.image_files import write_idx
from train.data.images import arrays
from train.run import checkpoints
from train.step import make_step

call, refused, completed = (
    functools.partial(function, "classify") for function in (runs.call, runs.refused, runs.completed)
)
QUICK = ("--net", "lenet-digits", "--epochs", "1", "--batch", "100", "--save-every", "10", "--no-compile")
COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 40), "red": (210, 30, 20)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run on digits, runs/classify/whole, and class folders of pictures; not to be changed."""
    folder = tmp_path_factory.mktemp("classify")
    pictures(folder / "colours")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, "--name", "whole") == 0
    return folder


def pictures(folder, each=6):
    """`train` and `val` with pictures of one colour each, and noise."""
    generator = np.random.default_rng(0)
    for part, count in (("train", each), ("val", 3)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(-20, 20, (24 + i, 30, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.jpg")


def parameters(run, net="lenet-digits", channels=1, classes=10, size=8, step=None):
    module, cfg = by_name.configured(net, channels=channels, classes=classes, size=size)
    params, _ = spec.split(module.spec(cfg), spec.abstract(module.spec(cfg)))
    return checkpoints.restore(run / "checkpoints", params, step, part="params")


def test_ends_beside_a_baseline_and_is_tested_once_a_step(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert call(*QUICK, "--epochs", "2", "--name", "a") == 0
    assert "(nearest mean: 90.91%)" in capfd.readouterr().out.splitlines()[-1]
    lines = [json.loads(line) for line in (tmp_path / "runs/classify/a/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "test/accuracy" in line] == [15, 30]


def test_evaluation_repeats_the_figures(here, capsys):
    run = here / "runs" / "classify" / "whole"
    figures = result(run)
    shutil.rmtree(run / "checkpoints" / "10")
    assert call("evaluate", "--run", run) == 0
    out = capsys.readouterr().out
    again = json.loads((run / "evaluations" / "digits" / "result.json").read_text())
    assert {name: again[name] for name in ("accuracy", "nll")} == {name: figures[name] for name in ("accuracy", "nll")}
    assert f"{figures['accuracy']:.2%} of the test images right" in out and f"NLL {figures['nll']:.4f}" in out
    _, test = arrays.digits()
    module, cfg = by_name.configured("lenet-digits", channels=1, classes=10, size=8)
    learn, _ = arrays.digits()
    pixels = (test.images - learn.images.mean()) / learn.images.std()
    right = (module.apply(parameters(run), pixels, cfg).argmax(-1) == test.labels).float().mean()
    assert float(right) == pytest.approx(figures["accuracy"])


def test_prediction(here, capfd):
    _, test = arrays.digits()
    for i in range(2):
        Image.fromarray((test.images[i, 0].numpy() * 255).astype(np.uint8)).save(f"{i}.png")
    before = contents(here / "runs")
    assert call("predict", "0.png", "1.png", "--run", "runs/classify/whole") == 0
    lines = capfd.readouterr().out.splitlines()
    first, second = lines.index("0.png"), lines.index("1.png")
    assert second == first + 6 and len(lines) == second + 7
    shares = [float(line.split("%")[0]) for line in lines[first + 1 : second]]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.1
    assert is_png(here / "predictions" / "predictions.png") and contents(here / "runs") == before
    rows = (here / "predictions" / "predictions.csv").read_text().splitlines()
    assert rows[0] == "picture,class,probability" and rows[1].startswith("0.png,") and len(rows) == 3

    (here / "bad.png").write_bytes(b"no picture")
    (here / "more").mkdir()
    shutil.move("1.png", "more/1.png")
    assert call("predict", "0.png", "bad.png", "more", "--run", "runs/classify/whole") == 0
    lines = capfd.readouterr().out.splitlines()
    assert "more/1.png" in lines and lines[-1] == "files in predictions_2/"  # nothing is overwritten
    assert any(line.split() == ["unreadable", "1"] for line in lines)
    line = refused(capfd, "predict", "0.png", "--out", "predictions", "--run", "runs/classify/whole")
    assert line == "error: 'predictions' exists already; choose another --out"


CHANGES = "--crop 1 --flip --colour-jitter 0.4 --rand-augment 9 --erase 0.3 --mixup 0.2 --cutmix 1".split()


def test_pictures_in_folders(here, capsys):
    (here / "colours" / "train" / "red" / "odd.png").write_bytes(b"")
    Image.fromarray(np.full((40, 40), 30000, np.uint16)).save(here / "colours" / "val" / "red" / "grey16.png")
    Image.new("RGBA", (30, 20), (0, 0, 255, 128)).save(here / "colours" / "val" / "blue" / "rgba.png")
    flags = ("--net", "cifar-resnet8", "--size", "16", "--batch", "6", "--no-compile", "--learning-rate", "0.1")
    assert call("--data", "colours", *flags, "--epochs", "8", "--save-every", "12", "--name", "c") == 0
    out = capsys.readouterr().out
    assert "1 of the files could not be read, and were skipped" in out
    run = here / "runs" / "classify" / "c"
    figures = result(run)
    assert figures["skipped"] == 1 and figures["steps"] == 24 and figures["accuracy"] > 0.7
    size = {"net": "cifar-resnet8", "channels": 3, "classes": 3, "size": 16}
    whole = parameters(run, **size)
    shutil.rmtree(run / "checkpoints" / "24")
    assert call("--resume", "--workers", "0") == 0
    assert same_bits(parameters(run, **size), whole)
    assert call("predict", "colours/val/green/0.jpg", "--run", run) == 0
    assert "green" in capsys.readouterr().out


def test_evaluation_of_other_pictures(here, capsys):
    """All that is there is evaluated, with a class missing; the run's own pictures stay."""
    flags = ("--net", "cifar-resnet8", "--size", "16", "--batch", "6", "--epochs", "1", "--no-compile")
    assert call("--data", "colours", *flags, "--workers", "0", "--name", "c") == 0
    shutil.rmtree(here / "colours" / "train" / "red")
    before = contents(here / "runs" / "classify" / "c")
    capsys.readouterr()
    assert call("evaluate", "--run", "runs/classify/c", "--data", "colours/train", "--workers", "0") == 0
    out = capsys.readouterr().out
    assert "of 12 images; files in runs/classify/c/evaluations/train/" in out
    assert "classes without test images  1: red" in out
    after = contents(here / "runs" / "classify" / "c")
    assert {name: after[name] for name in before} == before


def test_pictures_that_moved_and_pictures_that_changed(here, capfd):
    """The identity of the data is their content: neither their place nor their number and sizes."""
    flags = ("--net", "lenet-digits", "--size", "8", "--batch", "6", "--epochs", "1", "--no-compile", "--workers", "0")
    assert call("--data", "colours", *flags, "--name", "c") == 0
    shutil.move("colours", "far")
    assert call("--resume", "--name", "c", "--data", "far", "--epochs", "2") == 0
    assert "resumed with --data far (it was started with colours)" in capfd.readouterr().out
    shutil.copy("far/train/red/1.jpg", "far/train/red/0.jpg")
    line = refused(capfd, "--resume", "--name", "c", "--data", "far", "--epochs", "3")
    assert "cannot resume 'runs/classify/c': its checkpoint has data" in line
    shutil.copy("far/train/red/2.jpg", "far/train/red/0.jpg")
    assert "cannot resume" in refused(capfd, "--resume", "--name", "c", "--data", "far")


def test_all_options_together(here):
    flags = "--optimizer muon --ema 0.9 --micro-batches 2 --dtype bfloat16 --label-smoothing 0.1 --schedule step"
    more = "--no-decay head* --channels-last --head-learning-rate 0.01 --freeze convs.0.*"
    assert call(*QUICK, *flags.split(), *more.split(), *CHANGES, "--name", "all") == 0
    run = here / "runs" / "classify" / "all"
    first, last = (parameters(run, step=step) for step in (10, 15))
    assert same_bits(first["convs"][0], last["convs"][0]) and not same_bits(first["convs"][1], last["convs"][1])


def test_finetuning_of_an_own_run(here, capsys):
    """The digits' net learns other classes: pixels of one channel, five classes."""
    learn, test = arrays.digits()
    for part, data in (("train", learn), ("t10k", test)):
        few = data.labels < 5
        write_idx(here / "five" / f"{part}-images-idx3-ubyte", (data.images[few, 0] * 255).to(torch.uint8).numpy())
        write_idx(here / "five" / f"{part}-labels-idx1-ubyte", data.labels[few].to(torch.uint8).numpy())
    flags = ("--data", "five", "--weights", "runs/classify/whole", "--batch", "50", "--epochs", "2", "--no-compile")
    assert call("finetune", *flags, "--freeze", "convs*", "--name", "tuned") == 0
    assert "initialised anew, as the weights are for other classes: head.bias, head.weight" in capsys.readouterr().out
    run = here / "runs" / "classify" / "tuned"
    old, new = parameters(here / "runs" / "classify" / "whole"), parameters(run, classes=5)
    assert same_bits(old["convs"], new["convs"]) and not same_bits(old["hidden"], new["hidden"])
    assert new["head"]["weight"].shape == (5, 64) and config(run)["trained"]["net"] == "lenet-digits"
    assert config(run)["trained"]["mean"] == config(here / "runs" / "classify" / "whole")["trained"]["mean"]
    assert call("--resume") == 0  # it is finished: nothing changes
    assert same_bits(parameters(run, classes=5), new)


def test_finetuning_of_a_checkpoint(here, capfd):
    """A checkpoint of torchvision's net in DistributedDataParallel, without its head."""
    cfg = squeezenet.PRESETS["squeezenet1_1"]
    model, table = squeezenet.spec(cfg), squeezenet.rename_table(cfg)
    values = spec.init(random.key(5), model)
    names = {name: f"module.{table[name].theirs}" for name in tree.names(values) if not name.startswith("head.")}
    torch.save({"state_dict": {names[n]: x for n, x in tree.items(values) if n in names}, "epoch": 3}, "squeezenet.pth")
    flags = ("--data", "colours", "--net", "squeezenet1_1", "--weights", "squeezenet.pth", "--size", "32")
    frozen = ("--freeze", "stem*", "stages*", "--batch", "6", "--epochs", "1", "--no-compile", "--workers", "0")
    assert call("finetune", *flags, *frozen, "--name", "s") == 0
    out = capfd.readouterr().out
    assert "--weights 'squeezenet.pth': stripped 'module.' from all names" in out
    assert "--weights 'squeezenet.pth': it has no head" in out and "head.bias, head.weight" in out
    size = {"net": "squeezenet1_1", "channels": 3, "classes": 3, "size": 32}
    new = parameters(here / "runs" / "classify" / "s", **size)
    assert same_bits(new["stages"], values["stages"]) and new["head"]["weight"].shape[0] == 3
    assert config(here / "runs" / "classify" / "s")["trained"]["std"] == [0.229, 0.224, 0.225]
    line = refused(capfd, "finetune", *flags[:2], "--net", "squeezenet1_0", *flags[4:], *frozen)
    assert "squeezenet.pth" in line


def test_frozen_batch_norms_keep_their_statistics():
    cfg = resnet.Config((1, 1), width=4, stem="cifar", classes=3)
    params, running = spec.split(resnet.spec(cfg), spec.init(random.key(0), resnet.spec(cfg)))
    trained = classifier.Trained("resnet18", 3, 8, 8, ("a", "b", "c"), mean=(0.5,) * 3, std=(0.5,) * 3)
    batch = random.uniform(random.key(1), (4, 3, 8, 8)), torch.tensor([0, 1, 2, 0])

    def loss(running):
        options = {"net": resnet, "cfg": cfg, "trained": trained, "smoothing": 0.0, "dtype": torch.float32}
        values = tree.merge(params, running)
        return classify.losses(values, batch, None, frozen=("stem*", "stages.0*"), **options)[0].mean()

    updated = stats.update(running, torch.func.grad(loss)(running))
    moved = [n for (n, a), b in zip(tree.items(updated), tree.leaves(running), strict=True) if not torch.equal(a, b)]
    assert moved == [name for name in tree.names(running) if name.startswith("stages.1.")]


def test_compiled_run_has_the_same_values(here, monkeypatch):
    monkeypatch.setattr("train.step.make_step", functools.partial(make_step, backend="aot_eager"))
    torch._dynamo.reset()
    assert call(*QUICK[:-1], "--name", "compiled") == 0
    compiled, whole = (parameters(here / "runs" / "classify" / name) for name in ("compiled", "whole"))
    for (name, a), b in zip(tree.items(compiled), tree.leaves(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--net", "resnet19"], "no net is named 'resnet19'; close to it: resnet1"),
        (["--net", "resnet18"], "the images are 8 x 8; expected at least 32 a side"),
        (["--data", "nowhere"], "--data 'nowhere' does not exist; expected a folder of images, or one of digits"),
        (["--data", ""], "--data '' does not exist; expected a folder of images, or one of digits"),
        (["predict", "a.png", "--run", ""], "--run is empty; expected a path"),
        (["--optimizer", "adam"], "invalid choice 'adam' for argument '--optimizer'"),
        (["--batch", "2000"], "--batch is 2000, but 'digits' has 1500 images to learn from"),
        (["--least-area", "0.5"], "--least-area is for files; 'digits' is held in memory"),
        (["--rand-augment", "31"], "--rand-augment is 31; expected 0 to 30"),
        (["--colour-jitter", "-1"], "--colour-jitter is -1.0; expected at least 0"),
        (["finetune", "--head-learning-rate", "-1"], "--head-learning-rate is -1.0; expected at least 0"),
        (["finetune", "--net", "lenet-digits"], "finetune needs --weights"),
        (["--freeze", "stemm*"], "the pattern 'stemm*' fits no leaf; there are"),
        (["--weights", "nothing.pth"], "nothing.pth"),
        (["--weights", "published", "--net", "resnet18", "--size", "32"], "want images of 3 channels, found 1"),
        (["--weights", "runs/classify/whole", "--net", "cifar-resnet8"], "only the head may differ"),
        (["--resume", "--name", "whole", "--optimizer", "sgd"], "it was started with"),
        (["--resume", "--name", "whole", "--epochs", "0.1"], "the number of steps is 2, but 'runs/classify/whole' has"),
        (
            ["evaluate", "--run", "runs/classify/whole", "--data", "colours"],
            "colours/train/blue is none of the 10 classes",
        ),
        (["predict", "a.png", "--run", "runs/classify/whole"], "a.png does not exist"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd, monkeypatch):
    def offline(*_, **__):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("pooch.retrieve", offline)
    assert message in refused(capfd, *flags)


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise, compiled."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "classify").iterdir()
    assert result(run)["accuracy"] >= 0.98
