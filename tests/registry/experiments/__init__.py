"""Every script of experiments/, once: the rows that `tests/experiments/test_laws.py` holds to the laws of experiments.

Experiment("gpt", ("--steps", "20", ...), pictures=("loss.png",), inputs=text, baseline="unigram_entropy", ...)
"""

from tests.registry.experiments import (
    classification,
    detection,
    generative,
    language,
    pictures,
    segmentation,
    sequences,
    spans,
)
from tests.registry.experiments.experiment import Experiment

EXPERIMENTS: list[Experiment] = [
    *classification.ROWS,
    *language.ROWS,
    *sequences.ROWS,
    *spans.ROWS,
    *generative.ROWS,
    *pictures.ROWS,
    *segmentation.ROWS,
    *detection.ROWS,
]
