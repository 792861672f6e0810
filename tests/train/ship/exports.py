"""Nets of the registry as programs, for the tests of this folder."""

import torch

from core import random, spec, tree
from tests.registry import NETS
from train.ship import Axis, Program, export

BATCH = Axis("batch", 1, 8)


def inputs_of(name: str, n: int, seed: int = 1) -> dict:
    """A batch of a net of the registry as named inputs."""
    x = tree.cast(NETS[name].batch(random.key(seed), n), torch.float32)
    return {f"x{i}": part for i, part in enumerate(x)} if isinstance(x, tuple) else {"x": x}


def face(name: str):
    """(apply(params, **inputs), params) of a net of the registry."""
    net = NETS[name]

    def apply(params, **inputs):
        x = inputs["x"] if "x" in inputs else tuple(inputs[key] for key in sorted(inputs))
        return net.apply(params, x, None, False)

    return apply, spec.init(random.key(0), net.spec)


def program_of(name: str) -> Program:
    apply, params = face(name)
    example = inputs_of(name, 3)
    return export(apply, params, example, {key: {0: BATCH} for key in example})
