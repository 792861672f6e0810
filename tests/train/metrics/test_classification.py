"""Figures of a classifier against scikit-learn's, and the pictures of what it gets wrong."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

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
    actual = classification.figures(log_probs, labels)
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
    assert actual == pytest.approx(expected, abs=1e-6)
    assert all(type(value) is float for value in actual.values())


def calibration_error(scores, labels):
    confidence, right = scores.max(1), scores.argmax(1) == labels
    bins = np.ceil(confidence * 15)
    gaps = [abs((right[bins == b] - confidence[bins == b]).sum()) for b in range(1, 16)]
    return sum(gaps) / len(labels)


@pytest.mark.parametrize("top", [1, 3, 6])
def test_accuracy_is_scikit_learns(top):
    log_probs, labels = case()
    actual = classification.accuracy(log_probs, labels, top=top)
    expected = metrics.top_k_accuracy_score(labels, log_probs, k=top, labels=range(7))
    assert actual.item() == pytest.approx(expected) and actual.dtype == torch.float32
    positions = (log_probs.unflatten(0, (20, 10)), labels.unflatten(0, (20, 10)))
    torch.testing.assert_close(classification.accuracy(*positions, top=top), actual)
    valid = labels > 2
    expected = classification.accuracy(log_probs[valid], labels[valid], top=top)
    ignored = torch.where(valid, labels, -100)
    torch.testing.assert_close(classification.accuracy(log_probs, ignored, top=top, ignore_id=-100), expected)
    assert classification.accuracy(log_probs, torch.full_like(labels, -1), top=top, ignore_id=-1) == 0


def test_errors_of_accuracy():
    log_probs, labels = case()
    with pytest.raises(ValueError, match=r"top must be in \[1, 7\]"):
        classification.accuracy(log_probs, labels, top=8)
    with pytest.raises(TypeError, match="integers"):
        classification.accuracy(log_probs, labels.double())


def test_confusion_is_scikit_learns():
    log_probs, labels = case()
    expected = metrics.confusion_matrix(labels, log_probs.argmax(-1))
    actual = classification.confusion(log_probs, labels)
    assert np.array_equal(actual, expected) and actual.dtype == torch.int64
    # Row: the class; column: the prediction.
    one = classification.confusion(torch.tensor([[0.1, 0.2, 0.7]]).log(), torch.tensor([0], dtype=torch.int32))
    assert one.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_report_is_scikit_learns():
    log_probs, labels = case()
    expected = metrics.classification_report(labels, log_probs.argmax(-1), target_names=NAMES, digits=4)
    assert classification.report(log_probs, labels, NAMES) == expected


def test_report_of_a_class_without_examples():
    text = classification.report(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 0, 0]), ("a", "b", "never"))
    rows = [line.split() for line in text.splitlines()]
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
    first = tree.flatten(net.spec(cfg))[FIRST[family]]
    # One value in memory for all but the leaf that is searched.
    leaves = {name: torch.zeros(()).expand(leaf.shape) for name, leaf in abstract.items()}
    values = torch.rand(first.shape, generator=torch.Generator().manual_seed(0)) + 1
    params = tree.nest(leaves | {FIRST[family]: values}, like=net.spec(cfg))
    actual = classification.first_filters(params, channels, size)
    if family == "mlp":
        values = values.reshape(-1, channels, size, size)
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(actual, (values - low) / (high - low))


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
        pytest.param(tuple(f"class {i}" for i in range(60)), 3, torch.float32, marks=pytest.mark.slow),
    ],
    ids=["bytes", "two", "sixteen", "sixty"],
)
def test_study_writes_figures_report_and_pictures(classes, channels, kind, tmp_path):
    log_probs, labels = case(150, len(classes), sharp=6.0)
    images = torch.rand(150, channels, 9, 9, generator=torch.Generator().manual_seed(1))
    images = (images * 255).to(kind) if kind == torch.uint8 else images
    params = {"stem": {"weight": torch.rand(6, channels, 3, 3, generator=torch.Generator().manual_seed(2))}}
    requests = []

    def pixels(indices):
        requests.append(indices)
        return images[indices]

    figures = classification.study(tmp_path, params, log_probs, labels, classes, pixels)
    assert figures == classification.figures(log_probs, labels)
    assert torch.equal(requests[0], classification.worst_mistakes(log_probs, labels, 25))
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
    classification.study(tmp_path, params, one, labels, NAMES[:3], lambda indices: images[indices])
    assert_picture(tmp_path / "mistakes.png")
    assert not (tmp_path / "filters.png").exists()
    figures = classification.study(tmp_path, params, sure[labels], labels, NAMES[:3], lambda indices: images[indices])
    assert figures["accuracy"] == 1
    assert not (tmp_path / "mistakes.png").exists()  # those of before are gone
    assert_picture(tmp_path / "confusion.png")


def test_linear_probe_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    train, test = (x * torch.randn(n, 5, generator=generator) for n, x in ((60, 1.0), (40, 2.0)))
    labels = [(part.sum(1) > part.sum(1).median()).long() for part in (train, test)]
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    expected = pipeline.fit(train.numpy(), labels[0]).score(test.numpy(), labels[1])
    assert classification.linear_probe(train, test, *labels) == pytest.approx(expected)
