"""experiments/classify.py predict --weights: transformers' probabilities of a picture, by the names of the classes."""

import csv
import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core import random, spec
from nets.classifiers import resnet, torchvision_weights
from tests.experiments import runs
from tests.experiments.runs import flag_id
from tests.nets.parity import randomise

call, refused = (functools.partial(function, "classify") for function in (runs.call, runs.refused))
CLASSES = {0: "tench, Tinca tinca", 1: "crane", 2: "crane"}
PREPARATION = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
PREPARATION |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """transformers' net of three classes, saved in `weights`, beside a photo; "resnet18" is the preset of its size."""
    from transformers import ResNetConfig, ResNetForImageClassification

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(resnet.PRESETS, "resnet18", resnet.Config((1, 2), width=4))
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2], "layer_type": "basic"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = ResNetForImageClassification(ResNetConfig(id2label=CLASSES, **sizes))
    module = randomise(module).eval()
    module.save_pretrained("weights")
    Path("weights/preprocessor_config.json").write_text(json.dumps(PREPARATION))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return module


def test_probabilities_are_those_of_transformers(module, capsys):
    flags = ("--weights", "weights", "--net", "resnet18")
    assert call("predict", *flags, "photo.png") == 0
    with Image.open("photo.png") as image:
        image = image.resize((60, 40), Image.Resampling.BICUBIC).crop((14, 4, 46, 36))
    pixels = torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0)[None] / 255
    mean, std = (torch.tensor(PREPARATION[name])[:, None, None] for name in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = module((pixels - mean) / std).logits.softmax(-1)[0].tolist()
    (row,) = json.loads(Path("predictions/predictions.json").read_text(encoding="utf-8"))
    names = ("tench, Tinca tinca", "crane (1)", "crane (2)")
    assert row["probabilities"] == pytest.approx(dict(zip(names, expected, strict=True)), abs=1e-5)
    (line,) = csv.DictReader(Path("predictions/predictions.csv").read_text(encoding="utf-8").splitlines())
    assert line["class"] == names[int(np.argmax(expected))]
    out = capsys.readouterr().out
    assert "--weights 'weights': its head is for 3 classes" in out and f"{max(expected):7.2%}  {line['class']}" in out


def test_published_weights_have_the_names_of_imagenet(tmp_path, monkeypatch, capsys):
    """The file that is downloaded for a preset, its head for one class of the thousand."""
    monkeypatch.chdir(tmp_path)
    cfg = resnet.Config((1, 1), width=4, classes=1000)
    monkeypatch.setitem(resnet.PRESETS, "resnet18", cfg)
    names = {ours: rename.theirs for ours, rename in resnet.rename_table(cfg).items()}
    params = spec.init(random.key(0), resnet.spec(cfg))
    state = {names[name]: leaf for name, leaf in torchvision_weights.tree.items(params) if name in names}
    state["fc.bias"][281] = 20.0
    torch.save(state, "file.pth")
    monkeypatch.setattr(torchvision_weights, "download", lambda name, base_url: Path("file.pth"))
    Image.new("RGB", (30, 30), "red").save("photo.png")
    assert call("predict", "photo.png", "--weights", "published", "--net", "resnet18", "--workers", "0") == 0
    first = capsys.readouterr().out.splitlines()
    assert first[first.index("photo.png") + 1].split()[1:] == ["tabby"]


def test_names_of_imagenet_are_torchvisions():
    """Read as text: importing torchvision without its operators fails."""
    module = importlib.util.find_spec("torchvision")
    if module is None:
        pytest.skip("torchvision is not installed")
    meta: dict = {}
    path = Path(module.submodule_search_locations[0]) / "models" / "_meta.py"
    exec(path.read_text(encoding="utf-8"), meta)
    facts = torchvision_weights.PUBLISHED["resnet18"]
    assert torchvision_weights.class_names(facts, 1000) == tuple(meta["_IMAGENET_CATEGORIES"])


def test_classes_without_names_have_their_numbers(tmp_path):
    (tmp_path / "config.json").write_text('{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}')
    facts = torchvision_weights.Published(str(tmp_path))
    assert torchvision_weights.class_names(facts, 2) == ("0", "1")
    (tmp_path / "config.json").write_text('{"label_names": ["cat", "dog"]}')
    assert torchvision_weights.class_names(facts, 2) == ("cat", "dog")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected either --run DIR or --weights SOURCE"),
        (["--run", "runs/classify/x", "--weights", "weights"], "expected either --run DIR or --weights SOURCE"),
        (["--weights", "weights"], "--weights 'weights' needs --net"),
        (["--run", "runs/classify/x", "--net", "resnet18"], "--net goes with --weights; a run has its own net"),
        (["--weights", "weights", "--net", "resnet19"], "no net is named 'resnet19'; close to it: resnet18"),
        (
            ["--weights", "weights", "--net", "resnet34"],
            "weights: 'classifier.1.weight' has shape (3, 8), expected (3, 512)",
        ),
        (["--weights", "runs/classify/whole", "--net", "resnet18"], "is a run's folder; expected it as --run"),
        (["--weights", "published", "--net", "cifar-resnet8"], "no weights of 'cifar-resnet8' are published"),
        (["--weights", "weights", "--net", "resnet18", "--out", "weights"], "'weights' exists already"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, module, capfd):
    Path("runs/classify/whole/checkpoints").mkdir(parents=True)
    assert message in refused(capfd, "predict", "photo.png", *flags)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "its config.json names 2 classes; expected 0 to 2"),
        ({"model_type": "vit"}, "is of another net than resnet18"),
    ],
)
def test_description_that_does_not_fit(change, message, module, capfd):
    path = Path("weights/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in refused(capfd, "predict", "photo.png", "--weights", "weights", "--net", "resnet18")


def test_net_without_a_head(module, capfd):
    module.resnet.save_pretrained("weights")
    line = refused(capfd, "predict", "photo.png", "--weights", "weights", "--net", "resnet18")
    assert "--weights 'weights': it has no head; expected one for the classes of resnet18" in line
