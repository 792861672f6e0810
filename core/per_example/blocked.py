"""Per-example gradients formed in blocks: one opaque operator, so that no two blocks are alive at once.

If it were written out in the graph, the compiler would fuse the reductions of all blocks and hold them all.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from core.compiling import allow_in_graph
from core.per_example.errors import FIRST_ORDER, PerExampleError


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider: reductions of half-precision values are off by percents otherwise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def bytes_at_once(device: torch.device) -> int:
    """Bytes of a block: the size of a CPU's cache; more elsewhere, where small kernels cost more than memory."""
    return 2**22 if device.type == "cpu" else 2**26


NARROW = 16
"""Columns of a matrix product, at least: for fewer several entries of a kernel are taken at once, by a copy."""


def _at(columns: Tensor, offsets: Sequence[int], time: int) -> Tensor:
    """The T columns at each of some offsets: (N, groups, L, c) -> (N, groups, T, offsets * c)."""
    parts = [columns[:, :, k : k + time] for k in offsets]
    return parts[0] if len(parts) == 1 else torch.cat([x.mT for x in parts], 2).mT  # T is last in memory


def _blocks(
    rows: Sequence[Tensor], columns: Sequence[Tensor], offsets: Sequence[int], dense: Tensor | None, budget: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks (rows, entries of the kernel, g (N, these rows, these entries, c)) of the parameter as a tensor
    (groups * p, kernel, c)."""
    count, groups, _, p = rows[0].shape
    c, kernel = columns[0].shape[-1], len(offsets) // len(rows)
    dense = None if dense is None else dense.reshape(count, groups * p, c, kernel).mT
    most = max(1, budget // max(1, count * c * rows[0].element_size()))  # rows of one entry
    together = 1 if groups > 1 else min(kernel, max(1, min(NARROW // c, most)))
    most = max(1, most // together)
    step = -(-p // -(-p // most)) if groups == 1 else max(1, most // p)  # blocks of equal size; whole groups
    for k in range(0, kernel, together):
        entries = slice(k, min(k + together, kernel))
        windows = [
            _at(x, offsets[use * kernel :][entries], left.shape[2])
            for use, (left, x) in enumerate(zip(rows, columns, strict=True))
        ]
        for i in range(0, p if groups == 1 else groups, step):
            own = slice(i, i + step)
            pairs = zip(rows, windows, strict=True)
            if groups == 1:
                parts = [left[..., own].mT @ right for left, right in pairs]
            else:
                parts = [left[:, own].mT @ right[:, own] for left, right in pairs]
            g = sum(parts[1:], parts[0]).reshape(count, -1, entries.stop - k, c)  # (N, rows, entries, c)
            first = i if groups == 1 else i * p
            at = slice(first, first + g.shape[1])
            yield at, entries, g if dense is None else g + dense[:, at, entries]


@torch.library.custom_op("functree::formed", mutates_args=())
def _operator(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    offsets: Sequence[int],
    dense: Tensor | None,
    direction: Tensor | None,
    want: str,
    budget: int,
) -> list[Tensor]:
    count, groups, _, p = rows[0].shape
    c, kernel = columns[0].shape[-1], len(offsets) // len(rows)
    dtype = torch.promote_types(rows[0].dtype, torch.float32)
    direction = None if direction is None else wide(direction).reshape(groups * p, c, kernel).mT
    shapes = {"norm": (count,), "dot": (count,), "gram": (count, count)}
    out = {name: rows[0].new_zeros(shapes.get(name, (groups * p, kernel, c)), dtype=dtype) for name in want.split(",")}
    for at, entries, g in _blocks(rows, columns, offsets, dense, budget):
        g = wide(g)
        flat = g.flatten(1)
        for name, total in out.items():
            if name == "norm":
                total += torch.linalg.vector_norm(flat, dim=1).square()
            elif name == "dot":
                assert direction is not None
                total += flat @ direction[at, entries].flatten()  # (N,)
            elif name == "gram":
                total += flat @ flat.T  # (N, N)
            elif name == "square":
                total[at, entries] = torch.linalg.vector_norm(g, dim=0).square()
            else:
                total[at, entries] = g.sum(0)
    return [x if name in shapes else x.mT.reshape(groups * p, c * kernel).contiguous() for name, x in out.items()]


@_operator.register_fake
def _(rows, columns, offsets, dense, direction, want, budget):
    count, groups, _, p = rows[0].shape
    like = (groups * p, columns[0].shape[-1] * (len(offsets) // len(rows)))
    shapes = {"norm": (count,), "dot": (count,), "gram": (count, count), "square": like, "sum": like}
    dtype = torch.promote_types(rows[0].dtype, torch.float32)
    return [rows[0].new_empty(shapes[name], dtype=dtype) for name in want.split(",")]


@_operator.register_vmap
def _(info, in_dims, rows, columns, offsets, dense, direction, want, budget):
    def member(x: Tensor | None, dim: int | None, i: int) -> Tensor | None:
        return x if x is None or dim is None else x.select(dim, i)

    members = []
    for i in range(info.batch_size):
        lists = [
            [member(x, dim, i) for x, dim in zip(xs, dims, strict=True)]
            for xs, dims in zip((rows, columns), in_dims, strict=False)
        ]
        others = [member(x, dim, i) for x, dim in zip((dense, direction), in_dims[3:5], strict=True)]
        members.append(_operator(*lists, offsets, *others, want, budget))
    outs = [torch.stack(values) for values in zip(*members, strict=True)]
    return outs, [0] * len(outs)


class _Formed(torch.autograd.Function):
    """The operator, whose results must not be differentiated again; it cannot refuse that itself under torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(offsets, dense, direction, want, budget, *rows_and_columns):
        uses = len(rows_and_columns) // 2
        rows, columns = list(rows_and_columns[:uses]), list(rows_and_columns[uses:])
        return tuple(_operator(rows, columns, offsets, dense, direction, want, budget))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise PerExampleError(FIRST_ORDER)

    jvp = backward


@allow_in_graph  # see core.tap
def formed(
    rows: list[Tensor],
    columns: list[Tensor],
    offsets: list[int],
    dense: Tensor | None,
    direction: Tensor | None,
    want: tuple[str, ...],
    budget: int,
) -> tuple[Tensor, ...]:
    """The wanted quantities of g_n, group by group, for the uses u of a parameter and the entries k of its kernel:

        g_n[:, :, k] = sum_u rows_u[n]^T columns_u[n, offset of u and k:] + dense_n[:, :, k]

    Args:
        rows, columns: of each use, (N, groups, T, p) and (N, groups, L, c); T and L may differ.
        offsets: of each use, the first of the T columns for each k, all of them one after the other.
        dense: (N, *shape), added.
        direction: like the parameter, for "dot".
        want: names of `core.per_example.forms.reduce`, at least one.
        budget: bytes of a block, or one row.

    Returns:
        for each name, in float32 or wider: "norm" (squared) and "dot" (N,), "gram" (N, N), "square" and "sum"
        (groups * p, c * kernel).
    """
    return _Formed.apply(offsets, dense, direction, ",".join(want), budget, *rows, *columns)
