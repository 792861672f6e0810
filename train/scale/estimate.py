"""Memory, traffic and arithmetic of a training step, per process, from a spec and a plan: nothing is allocated.

    cost = estimate(llama.spec(cfg), {"data": 8}, RULES["fsdp"], tokens=8192, time=8192)
    cost.state / 2**30, cost.flops, cost.mfu(tokens_per_second=6667, peak=989e12)

With N numbers, of which those in cut leaves are whole on d processes together:

    state           16 N / d            parameters and gradients in float32, and Adam's two moments
    all-gather      b N (d - 1) / d     the other processes' pieces, in numbers of b bytes
    reduce-scatter  4 N (d - 1) / d     gradients in float32
    all-reduce      8 N (d - 1) / d     of leaves that every process has whole: a reduce-scatter and an all-gather
    flops           6 N + 12 L w T      per token of T: N without tables that are only looked up, L layers, w the width
                                        of all heads (Chowdhery et al. 2022, arXiv:2204.02311, appendix B); for nets
                                        that use a weight once per token. Others: `traced`.

Bytes are those that a ring sends from each process, which is as many as it receives.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from core import tree
from core.spec import Stat, Table
from core.tree import Tree
from train.scale import shards
from train.scale.shards import ANY, Shard

STATE = 16
"""Bytes per number of a parameter: itself, its gradient and Adam's two moments, in float32."""
HEADS = "heads"
"""The logical axis of the heads' dimensions, the last one of the matrix after an attention."""


class Estimate(NamedTuple):
    """The needs of a process for a step; sizes in bytes."""

    parameters: int
    """Numbers of the whole net, Stats not counted."""
    state: int
    """Parameters, gradients and Adam's moments."""
    gathered: int
    """Whole parameters that are cut otherwise; all of them at once, as `train.step` has them."""
    volumes: dict[str, int]
    """{collective: bytes that the process sends in it}."""
    tokens: int
    """Tokens, or examples of a net without time, of this process."""
    flops: int
    """Floating-point operations of this process, forward and backward."""

    def mfu(self, tokens_per_second: float, peak: float) -> float:
        """Model FLOPs utilisation: the flops of the tokens per second of this process over the peak of its device."""
        return self.flops / self.tokens * tokens_per_second / peak


def estimate(
    spec: Tree,
    sizes: Mapping[str, int],
    rules: Mapping[str, str],
    *,
    tokens: int = 1,
    time: int = 0,
    compute: torch.dtype = torch.float32,
    tied: bool = False,
) -> Estimate:
    """The cost of a step of `train.step`, which gathers once, before the gradient.

    Args:
        spec, sizes, rules: as in `shards.plan`.
        tokens: tokens per step of each process that has rows of its own.
        time: tokens of a sequence, for the attention's share; 0 for a net without.
        compute: dtype of the gathered parameters, and of the activations that tensor parallelism exchanges.
        tied: a table is the output layer too.

    Raises ValueError: as `shards.plan`.
    """
    cuts = shards.plan(spec, sizes, rules)
    ways = {axis: sizes.get(axis, 1) for axis in ("replica", "data", "model")}
    rows = ways["replica"] * ways["data"]
    leaves = [(leaf, cuts[name]) for name, leaf in tree.items(spec) if not isinstance(leaf, Stat)]
    numbers: dict[str, int] = {"": 0, "data": 0, "model": 0}
    for leaf, cut in leaves:
        numbers[cut.mesh_axis if cut else ""] += math.prod(leaf.shape)
    own = sum(math.prod(shards.local_shape(leaf.shape, cut, sizes)) for leaf, cut in leaves)

    volumes = {
        "all_gather": compute.itemsize * numbers["data"] * (ways["data"] - 1) // ways["data"],
        "reduce_scatter": 4 * numbers["data"] * (ways["data"] - 1) // ways["data"],
        # Each process's pieces, over the replicas; all else, and the weight of the rows, over all with other rows.
        "all_reduce": _ring(numbers["data"] // ways["data"], ways["replica"])
        + _ring(numbers[""] + numbers["model"] // ways["model"] + 1, rows),
        "activations": _exchanged(leaves, ways["model"], tokens) * compute.itemsize,
    }
    shared = 1 / ways["model"]
    lookups = () if tied else (Table,)
    used = sum(math.prod(leaf.shape) for leaf, _ in leaves if len(leaf.shape) >= 2 and not isinstance(leaf, lookups))
    attended = sum(leaf.shape[-1] for leaf, _ in leaves if leaf.axes and leaf.axes[-1] == HEADS)  # L w
    flops = round((6 * used + 12 * attended * time) * tokens * shared)
    gathered = compute.itemsize * numbers["data"] if ways["data"] > 1 else 0
    total = sum(numbers.values())
    return Estimate(total, STATE * own, gathered, {k: v for k, v in volumes.items() if v}, tokens, flops)


def _ring(numbers: int, ways: int) -> int:
    """Bytes of an all-reduce in float32 that each process of a ring sends: 2 (n - 1) / n of all."""
    return 2 * 4 * numbers * (ways - 1) // ways


def _exchanged(leaves: list[tuple[Any, Shard | None]], ways: int, tokens: int) -> int:
    """Numbers that tensor parallelism sums: a layer cut by its inputs sums its outputs, forward; one cut by its outputs
    the cotangents of its inputs, backward. (Shoeybi et al. 2019, arXiv:1909.08053, section 3.)"""
    total = 0
    for leaf, cut in leaves:
        if cut is not None and cut.mesh_axis == "model" and len(leaf.shape) == 2:
            total += leaf.shape[1 - cut.dim] * tokens
    return 2 * total * (ways - 1) // ways


class Traced(NamedTuple):
    """The cost of a pass through a loss and its gradient, on one process."""

    saved: int
    """Bytes of the activations that are kept for the backward pass, without the parameters."""
    flops: int
    """Operations of matrix products and convolutions, forward and backward."""


def traced(loss: Callable[[Tree], torch.Tensor], params: Tree) -> Traced:
    """Activations and flops of any loss, of any net, from a pass and its gradient without values.

    Args:
        params: meta tensors, as `core.spec.abstract` gives them: nothing is computed.
        loss: of parameters, 0-D; its own inputs are meta tensors too.
    """
    params = tree.map(lambda x: x.detach().requires_grad_(x.is_floating_point()), params)
    own = {x.untyped_storage()._cdata for x in tree.leaves(params)}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # kept, so that no other one gets its address
        return x

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = loss(params)
        value.backward()
    return Traced(sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops())


def by_ranks(spec: Tree, way: str, ranks: list[int], **options: Any) -> dict[int, Estimate]:
    """{processes: estimate}, all along the axis that a way of `shards.RULES` cuts."""
    axis = shards.RULES[way].get(ANY, "model" if way == "tensor" else "data")
    return {n: estimate(spec, {axis: n}, shards.RULES[way], **options) for n in ranks}
