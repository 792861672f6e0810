"""ImageNet training: its schedule, its snapshots, and its evaluation beside torchvision's."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import imagenet
from experiments.parts import imagenet_data
from tests.experiments import runs
from tests.registry.experiments.classification import tars
from train.data.images import sets
from train.run import checkpoints

call, refused = (functools.partial(function, "imagenet") for function in (runs.call, runs.refused))
FLAGS = ("--data", "tars", "--net", "cifar-resnet8", "--size", "8", "--batch", "4", "--workers", "0", "--no-compile")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with small tars, in which the test stands; figures are not drawn."""
    tars(tmp_path)
    monkeypatch.chdir(tmp_path)
    runs.undrawn(monkeypatch)
    return tmp_path


def rates(steps: int, per_epoch: int, **options) -> list[float]:
    schedule = imagenet.schedule_of(imagenet.Args(**options), per_epoch, steps)
    return [float(schedule(torch.tensor(step))) for step in range(steps)]


def test_linear_scaling_and_gradual_warm_up():
    """Goyal et al. 2017: η = 0.1 for 256, k η for k 256; from η to k η in 5 epochs; a tenth at 30, 60 and 80 of 90."""
    options = {"learning_rate": 0.1, "warmup_epochs": 5.0, "schedule": "step"}
    values = rates(180, 2, batch=8192, **options)  # k = 32, two steps per epoch
    assert values[:10] == pytest.approx([0.1 + 3.1 * step / 10 for step in range(1, 11)])
    assert values[10:60] == pytest.approx([3.2] * 50) and values[60:120] == pytest.approx([0.32] * 60)
    assert values[120:160] == pytest.approx([0.032] * 40) and values[160:] == pytest.approx([0.0032] * 20)
    small = rates(90, 1, batch=64, **options)  # k = 1 / 4: from 0
    assert small[:5] == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.025]) and small[29] == pytest.approx(0.025)
    cosine = rates(100, 10, batch=256, learning_rate=0.1, warmup_epochs=2.0)
    expected = [0.05 * (1 + np.cos(np.pi * step / 80)) for step in range(80)]
    assert cosine[20:] == pytest.approx(expected, abs=1e-7)


@pytest.mark.slow
def test_snapshots_and_the_best_stay(here):
    flags = (*FLAGS, "--epochs", "8", "--snapshot-epochs", "2", "--save-every", "5", "--learning-rate", "0.5")
    assert call(*flags, "--name", "a") == 0
    folder = here / "runs" / "imagenet" / "a"
    saved = folder / "checkpoints"
    errors = {step: checkpoints.read_record(saved, step).metrics.get("error") for step in checkpoints.steps(saved)}
    result, evaluated = runs.result(folder), {step: error for step, error in errors.items() if error is not None}
    best = round(3 * result["best_epoch"])  # three steps per epoch
    assert set(errors) == {6, 12, 18, 20, 21, 24, best}
    assert evaluated[best] == min(evaluated.values()) == pytest.approx(1 - result["best_accuracy"])
    assert evaluated[24] == pytest.approx(1 - result["accuracy"])


@pytest.mark.slow
def test_classify_uses_the_runs(here, capsys):
    assert call(*FLAGS, "--epochs", "1", "--name", "a") == 0
    Image.new("RGB", (30, 20), "red").save("x.png")
    assert runs.call("classify", "predict", "--run", "runs/imagenet/a", "x.png", "--workers", "0") == 0
    assert call("predict", "--run", "runs/imagenet/a", "x.png", "--workers", "0") == 0
    first, second = (
        json.loads(Path(name, "predictions.json").read_text()) for name in ("predictions", "predictions_2")
    )
    assert first == second and set(first[0]["probabilities"]) == {"blue", "red"}


def images(folder: Path, names: tuple[str, ...]) -> sets.ImageSet:
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name / "x.png")
    return sets.open_images(str(folder), "all")


def test_labels_of_folders(tmp_path):
    """A folder of ImageNet-V2 has numbers as names, whose sorted order, 0, 1, 10, 2, is not that of the labels."""
    labels_of = imagenet_data.with_labels_of
    numbers = images(tmp_path / "numbers", tuple(map(str, range(12))))
    weights = tuple(f"thing {i}" for i in range(12))
    data, how = labels_of(weights, numbers, published=True)
    assert data.test.labels.tolist() == [int(path.parent.name) for path in data.test.paths] and "numbers" in how
    synsets = images(tmp_path / "synsets", ("n3", "n1", "n2"))
    assert labels_of(("a", "b", "c"), synsets, published=True)[0].test.labels.tolist() == [0, 1, 2]
    assert labels_of(("n2", "n1", "n3", "n4"), synsets)[0].test.labels.tolist() == [1, 0, 2]
    order = tmp_path / "mapping.txt"
    order.write_text("n9 fish, tench\nn2 a\nn1 b\nn3 c\n")
    assert labels_of(("a", "b", "c", "d"), synsets, order)[0].test.labels.tolist() == [2, 1, 3]
    for classes, published, message in (
        (("a", "b", "c"), False, r"has 3 classes such as 'n1', the net 3; expected its names, or --classes-from FILE"),
        (("a", "b"), True, r"the net 2; expected its names, its numbers, 2 folders, or --classes-from FILE"),
    ):
        with pytest.raises(ValueError, match=message):
            labels_of(classes, synsets, published=published)
    with pytest.raises(ValueError, match="mapping.txt has 4 names on 4 lines; the net has 3 classes"):
        labels_of(("a", "b", "c"), synsets, order)


@pytest.mark.slow
def test_evaluation_by_file_is_torchvisions(tmp_path, monkeypatch):
    """The same file of weights and the same pictures, CMYK and grey ones among them, in torchvision's own loop."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    generator = np.random.default_rng(0)
    for number in range(24):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), np.uint8))
        picture = coarse.resize((230 + 9 * number, 400 - 5 * number), Image.Resampling.BICUBIC)
        path = tmp_path / "val" / f"n{number % 8}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.convert(("RGB", "CMYK", "L")[number % 3]).save(path)
    torch.manual_seed(0)
    module = torchvision.models.resnet18(num_classes=8).train()
    with torch.no_grad():
        for _ in range(3):  # running statistics of their own
            module(torch.randn(4, 3, 64, 64))
    module.eval()
    torch.save(module.state_dict(), tmp_path / "resnet18.pth")
    scale = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), scale]
    pictures = ImageFolder(str(tmp_path / "val"), transforms.Compose(steps))
    pixels, labels = (torch.stack([torch.as_tensor(x) for x in column]) for column in zip(*pictures, strict=True))
    with torch.no_grad():
        logits = module(pixels)
    top5 = float((logits.topk(5).indices == labels[:, None]).any(1).float().mean())
    nll = float(torch.nn.functional.cross_entropy(logits, labels))

    monkeypatch.chdir(tmp_path)
    flags = ("--weights", "resnet18.pth", "--net", "resnet18", "--data", "val", "--workers", "0")
    assert call("evaluate", *flags) == 0
    result = json.loads((tmp_path / "evaluation" / "result.json").read_text())
    assert result["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert result["top5_accuracy"] == pytest.approx(top5)
    assert result["nll"] == pytest.approx(nll, rel=1e-5)  # the same operations in another order, in float32
