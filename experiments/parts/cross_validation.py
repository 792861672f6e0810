"""Nets that learn at once, from all examples and from all but a part each: probabilities from outside of training."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from core import random, tree
from core.tree import Tree
from train.data import DataError
from train.data.batching import epoch_batch, evaluation_batches
from train.optimizers import Optimizer
from train.step import create

PART = 500  # examples at a time


def folds_of(count: int, folds: int, key: Tensor) -> list[Tensor]:
    """The examples that each net leaves out: none, then a random part each.

    Raises DataError: one fold, which would leave nothing to learn from, or more folds than examples.
    """
    if folds == 1 or folds > count:
        raise DataError(f"--folds is {folds}; expected 0, or 2 to {count}, the number of examples")
    order = random.permutation(key, count)
    parts = [part.sort().values for part in order.tensor_split(folds)] if folds else []
    return [torch.empty(0, dtype=torch.int64), *parts]


def learned_from(count: int, left_out: list[Tensor]) -> list[Tensor]:
    """The examples that each net learns from."""
    everything = torch.arange(count)
    return [everything[~torch.isin(everything, part)] for part in left_out]


def states_of(key: Tensor, members: int, model: Tree, optimizer: Optimizer) -> Tree:
    """The initial states of the nets, stacked."""
    start = functools.partial(create, model=model, optimizer=optimizer)
    states = torch.vmap(start)(random.split(key, members))
    return tree.map(Tensor.contiguous, states)  # vmap repeats what they share, such as the step


def batch_at(data: Tree, rows: list[Tensor], key: Tensor, step: int, batch: int) -> Tree:
    """The batch of a step, (nets, batch, ...): each net goes through its own examples in an order of its own."""
    keys = random.split(key, len(rows)).unbind(0)
    pairs = zip(rows, keys, strict=True)
    indices = torch.stack([own[epoch_batch(own_key, step, len(own), batch)] for own, own_key in pairs])
    return tree.map(lambda x: x[indices], data)


def member(states: Tree, number: int) -> tuple[Tree, Tree]:
    """(params, stats) of one net."""
    params, stats = (tree.map(lambda x: x[number], part) for part in (states.params, states.stats))
    return params, stats


@torch.no_grad()
def log_probabilities(loss: Callable, values: Tree, data: Tree, rows: Tensor) -> Tensor:
    """(rows, classes), on the CPU, of the logits that `loss(values, batch)` has beside the losses."""
    device, parts = tree.leaves(values)[0].device, []
    for part in evaluation_batches(len(rows), PART):
        batch = tree.map(lambda x, part=part: x[rows[part]].to(device), data)
        parts.append(loss(values, batch)[1]["logits"].float().log_softmax(-1).cpu())
    return torch.cat(parts)


def held_out(loss: Callable, states: Tree, data: Tree, left_out: list[Tensor]) -> Tensor | None:
    """(examples, classes): log-probabilities of each example by the net that has not learned from it; None without
    folds."""
    if len(left_out) == 1:
        return None
    rows, parts = torch.cat(left_out), []
    for number, part in enumerate(left_out[1:], 1):
        parts.append(log_probabilities(loss, tree.merge(*member(states, number)), data, part))
    return torch.cat(parts)[rows.argsort()]
