import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve

from train.metrics.calibration import expected_calibration_error, reliability_bins


def predictions(examples: int, classes: int, seed: int = 0, sharpness: float = 3.0):
    """(probabilities, labels) in double precision."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(examples, classes)) * sharpness
    probabilities = torch.softmax(torch.tensor(scores), -1)
    return probabilities, torch.tensor(generator.integers(0, classes, examples))


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 40])
@pytest.mark.parametrize("classes", [2, 10])
def test_bins_are_those_of_scikit_learn(classes, bins):
    probabilities, labels = predictions(500, classes)
    confidence, predicted = probabilities.max(-1)
    fractions, means = calibration_curve((predicted == labels).numpy(), confidence.numpy(), n_bins=bins)
    actual = reliability_bins(probabilities, labels, bins)
    filled = actual.counts > 0
    torch.testing.assert_close(actual.accuracy[filled], torch.tensor(fractions))
    torch.testing.assert_close(actual.confidence[filled], torch.tensor(means))
    counts, _ = np.histogram(confidence.numpy(), np.linspace(0, 1, bins + 1))  # no confidence lies on an edge
    assert actual.counts.tolist() == counts.tolist()
    assert not actual.accuracy[~filled].any() and not actual.confidence[~filled].any()
    weights = counts[counts > 0] / 500
    expected = float((weights * np.abs(fractions - means)).sum())
    assert expected_calibration_error(probabilities, labels, bins).item() == pytest.approx(expected)


def test_error_by_hand():
    probabilities = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.1, 0.9], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 0])
    # (0.5, 0.75] holds 0.6 (right) and 0.7 (wrong); (0.75, 1] holds 0.9 and 1.0, both right.
    actual = reliability_bins(probabilities, labels, 4)
    assert actual.counts.tolist() == [0, 0, 2, 2]
    torch.testing.assert_close(actual.confidence, torch.tensor([0.0, 0.0, 0.65, 0.95]))
    torch.testing.assert_close(actual.accuracy, torch.tensor([0.0, 0.0, 0.5, 1.0]))
    assert expected_calibration_error(probabilities, labels, 4).item() == pytest.approx(0.5 * 0.15 + 0.5 * 0.05)


def test_an_edge_belongs_to_the_bin_below():
    probabilities = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
    assert reliability_bins(probabilities, torch.zeros(3, dtype=torch.long), 4).counts.tolist() == [0, 1, 1, 1]


def test_leading_axes_vmap_and_compile():
    pairs = [predictions(60, 5, seed) for seed in range(3)]
    probabilities, labels = torch.stack([p for p, _ in pairs]), torch.stack([y for _, y in pairs])
    one_by_one = torch.stack([expected_calibration_error(p, y) for p, y in pairs])
    torch.testing.assert_close(expected_calibration_error(probabilities, labels), one_by_one)
    torch.testing.assert_close(torch.vmap(expected_calibration_error)(probabilities, labels), one_by_one)
    torch._dynamo.reset()
    compiled = torch.compile(expected_calibration_error, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(probabilities, labels), one_by_one)
    shared = torch.stack([expected_calibration_error(p, labels[0]) for p, _ in pairs])
    torch.testing.assert_close(expected_calibration_error(probabilities, labels[0]), shared)


def test_low_precision_counts_in_single():
    probabilities, labels = predictions(2000, 4)
    error = expected_calibration_error(probabilities.bfloat16(), labels)
    assert error.dtype == torch.float32
    expected = expected_calibration_error(probabilities.bfloat16().double(), labels)
    assert error.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "count", "bins", "message"),
    [
        ((4, 3), 5, 15, r"got probabilities \(4, 3\) and labels \(5,\)"),
        ((4,), 4, 15, r"got probabilities \(4,\) and labels \(4,\)"),
        ((4, 3), 4, 0, "bins is 0; expected at least 1"),
        ((0, 3), 0, 15, r"there are no examples: the probabilities have shape \(0, 3\)"),
    ],
)
def test_what_does_not_fit(shape, count, bins, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(torch.ones(shape), torch.zeros(count, dtype=torch.long), bins)
