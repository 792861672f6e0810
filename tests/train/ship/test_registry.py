"""The law of export: every net of the registry becomes a program with a dynamic batch."""

import pytest
import torch

from tests.registry import NETS
from tests.train.ship.exports import face, inputs_of, program_of
from train.ship.compare import difference

FAST = ("mlp", "convolutional", "gpt2", "vit", "rnn, tanh")
"""One of each kind; all of them take a minute and a half."""


def by_suite(name: str):
    """Variants of a net, "name, variant", share its layers."""
    return name if name in FAST else pytest.param(name, marks=pytest.mark.long if "," in name else pytest.mark.slow)


@pytest.mark.parametrize("name", [by_suite(name) for name in NETS])
def test_export_has_a_dynamic_batch(name):
    program, (apply, params) = program_of(name), face(name)
    for n in (1, 5):
        inputs = inputs_of(name, n, seed=7)
        with torch.no_grad():
            expected = apply(params, **inputs)
        # The same operations in another order: rounding of float32 over the depth of a net.
        assert difference(expected, program(**inputs)) < 1e-5, f"{name}: {n} examples"
