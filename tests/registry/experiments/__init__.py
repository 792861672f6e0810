"""Every script of experiments/, once: the rows that `tests/experiments/test_laws.py` holds to the laws of experiments.

Experiment("gpt", ("--steps", "20", ...), pictures=("loss.png",), inputs=text, baseline="unigram_entropy", ...)
"""

from tests.registry.experiments import (
    captions,
    classification,
    detection,
    encoders,
    generative,
    language,
    picture_text,
    pictures,
    segmentation,
    sequences,
    spans,
)
from tests.registry.experiments.experiment import Experiment

PARTS = (
    classification,
    language,
    encoders,
    sequences,
    spans,
    generative,
    pictures,
    segmentation,
    detection,
    captions,
    picture_text,
)
EXPERIMENTS: list[Experiment] = [row for part in PARTS for row in part.ROWS]
