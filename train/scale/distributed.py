"""A train state over a mesh: cut before the first step, gathered before a gradient, reduced after it.

    params (cut) -> gather -> grad of the mean over this process's rows -> weighted mean over the mesh -> update (cut)

The collectives stand outside of the gradient, a few for all leaves together, in the compiled step. The sums of a
collective are the same bits on every process, so what every process keeps whole stays equal.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core import collectives, tree
from core.layers.normalization import synchronise_batch_norms
from core.layers.split import Split
from core.tree import Tree
from train.losses.weighted import positive
from train.optimizers.protocol import Optimizer, sharded
from train.scale import shards
from train.scale.mesh import Mesh
from train.scale.shards import Plan, Shard


@dataclass(frozen=True)
class Distributed:
    """A mesh and a plan, for `train.step.make_step`; `distribute` makes it.

    Attributes:
        mesh: the place of this process.
        cuts: the plan.
        shapes: {name: whole shape} of the leaves in the plan.
        local_norm: each process normalises by its own rows in batch norm.
        output_layers: names of the matrices cut along model whose outputs, the logits, every process gets whole.
    """

    mesh: Mesh
    cuts: Plan
    shapes: dict[str, tuple[int, ...]]
    local_norm: bool = False
    output_layers: frozenset[str] = frozenset()

    def cut_of(self, name: str, leaf: Tensor) -> Shard | None:
        """The cut of a leaf of parameters, gradients or optimizer states: that of the parameter whose name its own
        ends in, if it has the shape of it or of its pieces."""
        parameter = self._parameter(name, leaf)
        return None if parameter is None else self.cuts[parameter]

    def is_piece(self, name: str, leaf: Tensor) -> bool:
        """True if a leaf that has a cut is a piece."""
        parameter = self._parameter(name, leaf)
        return parameter is not None and tuple(leaf.shape) != self.shapes[parameter]

    def _parameter(self, name: str, leaf: Tensor) -> str | None:
        """The longest name of a parameter with a cut that the name of a leaf ends in."""
        path = name.split(".")
        for i in range(len(path)):
            suffix = ".".join(path[i:])
            cut = self.cuts.get(suffix)
            if cut is not None:
                whole = self.shapes[suffix]
                if tuple(leaf.shape) in (whole, shards.local_shape(whole, cut, self.mesh.sizes)):
                    return suffix
        return None

    def cut(self, values: Tree) -> Tree:
        """This process's pieces of a state, parameters or gradients; what is a piece already stays."""

        def piece(name: str, leaf: Tensor) -> Tensor:
            cut = self.cut_of(name, leaf)
            if cut is None or self.is_piece(name, leaf):
                return leaf
            return self._piece(leaf, cut).clone(memory_format=torch.contiguous_format)

        return tree.map_with_names(piece, values)

    def _piece(self, leaf: Tensor, cut: Shard) -> Tensor:
        ways, place = self.mesh.sizes[cut.mesh_axis], self.mesh.place[cut.mesh_axis]
        parts = leaf.split(cut.parts, cut.dim) if cut.parts else (leaf,)
        return torch.cat([part.chunk(ways, cut.dim)[place] for part in parts], cut.dim)

    def whole(self, values: Tree) -> Tree:
        """The inverse of `cut`: every process gets all of it, and all must ask for it."""
        names, leaves = tree.names(values), tree.leaves(values)
        out = list(leaves)
        for axis in self._axes:
            ways, rows = self.mesh.sizes[axis], []
            for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
                cut = self.cut_of(name, leaf)
                if cut is not None and cut.mesh_axis == axis:
                    rows.append((i, cut))
            xs = [leaves[i] for i, _ in rows]
            gathered = collectives.gather(xs, [cut.dim for _, cut in rows], self.mesh.groups[axis], ways)
            for (i, cut), x in zip(rows, gathered, strict=True):
                out[i] = _parts_together(x, cut, ways)
        return tree.unflatten(values, out)

    @functools.cached_property
    def _axes(self) -> tuple[str, ...]:
        """The axes of the mesh that leaves are cut along."""
        return tuple(dict.fromkeys(cut.mesh_axis for cut in self.cuts.values() if cut is not None))

    def gathered(self, params: Tree) -> Tree:
        """The parameters as the loss takes them: those that are cut along data are whole again."""
        return self.whole(params) if "data" in self._axes else params

    def prepared(self, params: Tree) -> Tree:
        """Parameters and Stats, merged, as the net takes them inside the loss: matrices that are cut along model, and
        batch norms, know their group."""
        if "model" in self._axes:
            params = tree.map_with_names(self._split, params)
        if self.mesh.rows == 1 or self.local_norm:
            return params
        return synchronise_batch_norms(params, self.mesh.groups["rows"], self.mesh.rows)

    def _split(self, name: str, leaf: Tensor) -> Tensor | Split:
        cut = self.cut_of(name, leaf)
        if cut is None or cut.mesh_axis != "model" or leaf.ndim != 2:
            return leaf
        group, place = self.mesh.groups["model"], self.mesh.place["model"]
        return Split(leaf, cut.dim, group, place, self.mesh.sizes["model"], joined=name in self.output_layers)

    def rows(self, batch: Tree) -> Tree:
        """This process's rows of a batch, any tree with the examples leading; so too of a tensor of indices.

        Raises ValueError: the rows do not divide among the processes.
        """
        if self.mesh.rows == 1:
            return batch

        def mine(x: Tensor) -> Tensor:
            if x.shape[0] % self.mesh.rows:
                raise ValueError(f"a batch of {x.shape[0]} examples does not divide over {self.mesh.rows} processes")
            size = x.shape[0] // self.mesh.rows
            return x[self.mesh.row * size : (self.mesh.row + 1) * size]

        return tree.map(mine, batch)

    def mean(self, weight: Tensor, losses: Tree, others: Tree) -> tuple[Tensor, Tree, Tree]:
        """(Σ w_r, Σ v_r / Σ w_r of the losses, Σ w_r x_r / Σ w_r of the others), r the processes with other rows; 1 in
        place of a sum of weights that is 0.

        Args:
            weight: 0-D, w_r, that of this process's rows.
            losses: gradients and losses, v_r / w_r; whole; gradients that are cut along data come out cut.
            others: metrics, increments of the Stats, x_r; whole.
        """
        if self.mesh.rows == 1:
            return weight, losses, others
        cuts = [self.cut_of(name, x) for name, x in tree.items(losses)]
        own = positive(weight)
        scaled = [x * own.to(x.dtype) for x in tree.leaves(losses)]  # v_r
        over_data = [i for i, cut in enumerate(cuts) if cut is not None and cut.mesh_axis == "data"]
        rest = [i for i in range(len(cuts)) if i not in set(over_data)]
        if over_data:
            group, ways = self.mesh.groups["data"], self.mesh.sizes["data"]
            dims = [cuts[i].dim for i in over_data]
            pieces = collectives.scatter_sum([scaled[i] for i in over_data], dims, group, ways)
            if self.mesh.sizes["replica"] > 1:
                pieces = collectives.sum_all(pieces, self.mesh.groups["replica"])
            for i, piece in zip(over_data, pieces, strict=True):
                scaled[i] = piece
        extra = [x * weight.to(x.dtype) for x in tree.leaves(others)]
        total, *sums = collectives.sum_all([weight, *(scaled[i] for i in rest), *extra], self.mesh.groups["rows"])
        for i, x in zip(rest, sums, strict=False):
            scaled[i] = x
        share = 1 / positive(total)
        means = [x * share.to(x.dtype) for x in scaled]
        extra = [x * share.to(x.dtype) for x in sums[len(rest) :]]
        return total, tree.unflatten(losses, means), tree.unflatten(others, extra)

    def summed(self, values: Tree) -> Tree:
        """The sum over the processes with other rows of each leaf, whole."""
        leaves = tree.leaves(values)
        if self.mesh.rows > 1:
            leaves = collectives.sum_all(leaves, self.mesh.groups["rows"])
        return tree.unflatten(values, leaves)

    def joined(self, values: Tree) -> Tree:
        """Leaves with this process's examples leading -> with those of all, in the order of the batch."""
        leaves = tree.leaves(values)
        if self.mesh.rows > 1:
            leaves = collectives.gather(leaves, [0] * len(leaves), self.mesh.groups["rows"], self.mesh.rows)
        return tree.unflatten(values, leaves)

    def norm(self, values: Tree) -> Tensor:
        """`tree.norm` of a tree of which this process has its pieces; the same on every process."""
        parts: dict[str, list[Tensor]] = {}
        for name, leaf in tree.items(values):
            cut = self.cut_of(name, leaf)
            parts.setdefault("" if cut is None else cut.mesh_axis, []).append(leaf)
        norms = [tree.norm(parts.pop(""))] if "" in parts else []
        for axis, pieces in parts.items():
            (own,) = collectives.gather([tree.norm(pieces)[None]], [0], self.mesh.groups[axis], self.mesh.sizes[axis])
            norms += own.unbind(0)
        return tree.norm(norms)

    def optimizer(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer for pieces of the parameters: what takes norms, or whole matrices, takes them over the mesh."""
        return sharded(optimizer, self) if self._axes else optimizer


def _parts_together(x: Tensor, cut: Shard, ways: int) -> Tensor:
    """Pieces that have a share of each part -> the parts one after the other."""
    if not cut.parts:
        return x
    pieces = x.chunk(ways, cut.dim)
    columns = [piece.split([size // ways for size in cut.parts], cut.dim) for piece in pieces]
    return torch.cat([column[i] for i in range(len(cut.parts)) for column in columns], cut.dim)


def distribute(model: Tree, mesh: Mesh, way: str, local_norm: bool = False) -> Distributed:
    """The plan of a spec over a mesh, by one of `shards.RULES`.

    Raises ValueError: nothing can be cut over an axis of the mesh.
    """
    cuts = shards.plan(model, mesh.sizes, shards.RULES[way])
    shapes = {name: tuple(leaf.shape) for name, leaf in tree.items(model)}
    output_layers = frozenset(name for name, leaf in tree.items(model) if "vocabulary" in leaf.axes[:1])
    return Distributed(mesh, cuts, shapes, local_norm, output_layers)


def reduced(gradient: Any, over: Distributed) -> Callable[[Any, Tree], tuple]:
    """The `result` of a `train.objective.Gradient`, of the contributions of all processes.

    Raises ValueError: the gradient does not say how they are reduced.
    """
    if gradient.reduce is None:
        raise ValueError("this gradient has no form for several processes; expected one with `reduce`")

    def result(state: Any, contribution: Tree) -> tuple:
        grads, *rest = gradient.result(state, gradient.reduce(over, contribution))
        return over.cut(grads), *rest

    return result
