"""The states that the tests of checkpoints write, and how they compare them."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from core import random, tree
from train.run.checkpoints import Checkpoints


class Moments(NamedTuple):
    mu: dict
    nu: dict
    count: Tensor


class State(NamedTuple):
    params: dict
    opt_state: tuple
    key: Tensor
    step: Tensor


def make_state(seed: int = 0, width: int = 4) -> State:
    def draw(name: int, *shape: int) -> Tensor:
        return random.normal(random.fold_in(random.key(seed), name), shape)

    params = {
        "blocks": [{"bias": draw(0, width), "weight": draw(1, width, 3)}, {"weight": draw(2, width, width).T}],
        "scale": draw(3, 5).to(torch.bfloat16),
    }
    moments = Moments(tree.map(torch.zeros_like, params), tree.map(torch.ones_like, params), torch.tensor(7))
    return State(params, (moments, ()), random.key(seed + 2**31), torch.tensor(seed, dtype=torch.int32))


def same(a: tree.Tree, b: tree.Tree) -> bool:
    left, right = tree.flatten(a), tree.flatten(b)
    return left.keys() == right.keys() and all(
        x.dtype == right[n].dtype and x.shape == right[n].shape and torch.equal(x, right[n]) for n, x in left.items()
    )


def write(directory: Path, *steps: int, **options) -> None:
    with Checkpoints(directory, {"width": 4}, **options) as writer:
        for step in steps:
            writer.save(step, make_state(step), {"val_loss": float(step)})
