"""Figures of a classifier against scikit-learn's, and the pictures of what it gets wrong."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics

from core import spec, tree
from nets.classifiers import by_name
from train.metrics import classification

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")


def case(examples=200, classes=7, seed=0, sharp=3.0):
    """Log probabilities that are right more often than not."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (examples,), generator=generator)
    logits = torch.randn(examples, classes, generator=generator)
    logits += sharp * torch.eye(classes)[labels] * torch.rand(examples, 1, generator=generator)
    return logits.log_softmax(-1), labels


# Figures.


@pytest.mark.parametrize("classes", [2, 5, 6, 7])
def test_figures_are_scikit_learns(classes):
    log_probs, labels = case(classes=classes)
    found = classification.figures(log_probs, labels)
    predicted, scores = log_probs.argmax(-1).numpy(), log_probs.exp().double().numpy()
    scores /= scores.sum(1, keepdims=True)
    expected = {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "nll": metrics.log_loss(labels, scores, labels=range(classes)),
        # Guo et al. 2017, eq. 3.
        "calibration_error": calibration_error(scores, labels.numpy()),
    }
    if classes > 5:
        expected["top5_accuracy"] = metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(classes))
    assert found == pytest.approx(expected, abs=1e-6)
    assert all(type(value) is float for value in found.values())


def calibration_error(scores, labels):
    confidence, right = scores.max(1), scores.argmax(1) == labels
    bins = np.ceil(confidence * 15)
    gaps = [abs((right[bins == b] - confidence[bins == b]).sum()) for b in range(1, 16)]
    return sum(gaps) / len(labels)


def test_confusion_is_scikit_learns():
    log_probs, labels = case()
    expected = metrics.confusion_matrix(labels, log_probs.argmax(-1))
    found = classification.confusion(log_probs, labels)
    assert np.array_equal(found, expected) and found.dtype == torch.int64
    # Row: the class; column: the prediction.
    one = classification.confusion(torch.tensor([[0.1, 0.2, 0.7]]).log(), torch.tensor([0], dtype=torch.int32))
    assert one.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_report_is_scikit_learns():
    log_probs, labels = case()
    expected = metrics.classification_report(labels, log_probs.argmax(-1), target_names=NAMES, digits=4)
    assert classification.report(log_probs, labels, NAMES) == expected


def test_report_of_a_class_without_examples():
    found = classification.report(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 0, 0]), ("a", "b", "never"))
    rows = [line.split() for line in found.splitlines()]
    assert ["never", "0.0000", "0.0000", "0.0000", "0"] in rows
    assert ["a", "1.0000", "0.6667", "0.8000", "3"] in rows and ["accuracy", "0.6667", "3"] in rows


def test_worst_mistakes():
    probabilities = torch.tensor(
        [[0.6, 0.3, 0.1], [0.9, 0.06, 0.04], [0.2, 0.7, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8], [0.55, 0.3, 0.15]]
    )
    labels = torch.tensor([1, 2, 1, 0, 2, 1])
    # Wrong are 0, 1, 3 and 5, with 0.3, 0.04, 0.3 and 0.3 for their labels: equal ones in order.
    assert classification.worst_mistakes(probabilities.log(), labels, 9).tolist() == [1, 0, 3, 5]
    assert classification.worst_mistakes(probabilities.log(), labels, 2).tolist() == [1, 0]
    assert classification.worst_mistakes(probabilities.log(), probabilities.argmax(-1), 9).tolist() == []


# The first layer.

FIRST = {
    "alexnet": "convs.0.weight",
    "convnext": "stem.conv.weight",
    "densenet": "stem.conv.weight",
    "googlenet": "stem.0.conv.weight",
    "inception": "stem.0.conv.weight",
    "lenet": "convs.0.weight",
    "mlp": "layers.0.weight",
    "mobilenet_v1": "stem.conv.weight",
    "mobilenet_v2": "stem.conv.weight",
    "mobilenet_v3": "stem.conv.weight",
    "resnet": "stem.conv.weight",
    "squeezenet": "stem.weight",
    "vgg": "stages.0.0.conv.weight",
    "vit": "patches.weight",
}
SMALL = {"alexnet": 64, "inception": 75}


def test_every_family_has_a_first_layer():
    assert set(FIRST) == set(by_name.FAMILIES)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("family", FIRST)
def test_first_filters(family, channels):
    """Depthwise convolutions have one channel, too, as grey images have."""
    size = SMALL.get(family, 32)
    preset = next(iter(by_name.FAMILIES[family].PRESETS))
    net, cfg = by_name.configured(preset, channels=channels, classes=4, size=size)
    abstract = tree.flatten(spec.abstract(net.spec(cfg)))
    wanted = tree.flatten(net.spec(cfg))[FIRST[family]]
    # One value in memory for all but the leaf that is to be found.
    leaves = {name: torch.zeros(()).expand(leaf.shape) for name, leaf in abstract.items()}
    values = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(0)) + 1
    params = tree.nest(leaves | {FIRST[family]: values}, like=net.spec(cfg))
    found = classification.first_filters(params, channels, size)
    if family == "mlp":
        values = values.reshape(-1, channels, size, size)
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, (values - low) / (high - low))


def test_first_filters_that_are_flat_or_not_there():
    flat = classification.first_filters({"stem": torch.full((2, 3, 4, 4), 0.7)}, 3, 8)
    assert torch.equal(flat, torch.zeros(2, 3, 4, 4))
    assert classification.first_filters({"head": torch.ones(5, 7)}, 3, 8) is None


# Pictures.


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"))


def assert_picture(path):
    assert pixels_of(path).std() > 1


LONG = tuple(f"Canis lupus familiaris, the domestic dog, breed {i}" for i in range(7))


@pytest.mark.parametrize(
    ("classes", "channels", "kind"),
    [
        (NAMES, 3, torch.uint8),
        (LONG[:2], 1, torch.float32),
        (tuple(f"class {i}" for i in range(16)), 3, torch.float32),
        (tuple(f"class {i}" for i in range(60)), 3, torch.float32),
    ],
    ids=["bytes", "two", "sixteen", "sixty"],
)
def test_study_writes_figures_report_and_pictures(classes, channels, kind, tmp_path):
    log_probs, labels = case(150, len(classes), sharp=6.0)
    images = torch.rand(150, channels, 9, 9, generator=torch.Generator().manual_seed(1))
    images = (images * 255).to(kind) if kind == torch.uint8 else images
    params = {"stem": {"weight": torch.rand(6, channels, 3, 3, generator=torch.Generator().manual_seed(2))}}
    asked = []

    def pixels(chosen):
        asked.append(chosen)
        return images[chosen]

    found = classification.study(tmp_path, params, log_probs, labels, classes, pixels)
    assert found == classification.figures(log_probs, labels)
    assert torch.equal(asked[0], classification.worst_mistakes(log_probs, labels, 25))
    names = {"calibration.png", "confusion.png", "filters.png", "mistakes.png"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"report.txt"}
    for name in names:
        assert_picture(tmp_path / name)
    text = (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert text == classification.report(log_probs, labels, classes)


def test_study_with_one_mistake_and_with_none(tmp_path):
    labels = torch.tensor([0, 1, 2, 0])
    sure = (torch.eye(3) * 5).log_softmax(-1)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    params = {"layers": [{"weight": torch.ones(5, 7)}]}  # no first layer that could be shown
    one = sure[torch.tensor([0, 1, 2, 1])]
    classification.study(tmp_path, params, one, labels, NAMES[:3], lambda chosen: images[chosen])
    assert_picture(tmp_path / "mistakes.png")
    assert not (tmp_path / "filters.png").exists()
    found = classification.study(tmp_path, params, sure[labels], labels, NAMES[:3], lambda chosen: images[chosen])
    assert found["accuracy"] == 1
    assert not (tmp_path / "mistakes.png").exists()  # those of before are gone
    assert_picture(tmp_path / "confusion.png")


def test_long_names_keep_both_ends():
    assert classification._short("short", 5) == "short"
    assert [classification._short("abcdefghij", most) for most in (9, 8, 3)] == ["abcd…ghij", "abcd…hij", "a…j"]


@pytest.mark.parametrize("shape", [(1, 3, 5, 5), (4, 2, 3, 3)])
def test_filters(shape, tmp_path):
    filters = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    classification.draw_filters(tmp_path / "f.png", filters)
    assert_picture(tmp_path / "f.png")


def test_the_first_of_many_filters(tmp_path):
    filters = torch.rand(9, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    classification.draw_filters(tmp_path / "some.png", filters, most=4)
    classification.draw_filters(tmp_path / "four.png", filters[:4])
    some, four = (pixels_of(tmp_path / name) for name in ("some.png", "four.png"))
    assert np.array_equal(some[60:], four[60:]) and not np.array_equal(some, four)  # below the title, which counts all


@pytest.mark.parametrize(
    ("classes", "channels", "kind"),
    [(NAMES, 1, torch.float32), (LONG, 3, torch.uint8), (("yes", "no"), 3, torch.float32)],
    ids=["grey", "long", "two"],
)
def test_predictions(classes, channels, kind, tmp_path):
    images = torch.rand(2, channels, 12, 10, generator=torch.Generator().manual_seed(0))
    images = (images * 255).to(kind) if kind == torch.uint8 else images
    log_probs, _ = case(2, len(classes))
    names = ["a.png", "/a/very/long/path/to/somewhere/deep/in/the/tree/picture-0001.jpg"]
    classification.draw_predictions(tmp_path / "p.png", list(images), log_probs, classes, names)
    assert_picture(tmp_path / "p.png")
