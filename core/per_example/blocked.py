"""Per-example gradients formed in blocks: one opaque operator, so that no two blocks are alive at once.

If it were written out in the graph, the compiler would fuse the reductions of all blocks and hold them all.
"""

from collections.abc import Iterator

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


def _blocks(rows: Tensor, columns: Tensor, dense: Tensor | None, budget: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, a block of g (N, rows of the block, d)) for all rows of the parameter as a matrix (groups * p, d)."""
    count, groups, _, p = rows.shape
    d = columns.shape[-1]
    dense = None if dense is None else dense.reshape(count, groups * p, d)  # (N, groups * p, d)
    most = max(1, budget // max(1, count * d * rows.element_size()))
    if groups > 1:
        step = max(1, most // p)  # whole groups
        for b in range(0, groups, step):
            g = rows[:, b : b + step].transpose(-2, -1) @ columns[:, b : b + step]  # (N, step, p, d)
            g = g.reshape(count, -1, d)  # (N, step * p, d)
            yield b * p, g if dense is None else g + dense[:, b * p : b * p + g.shape[1]]
        return
    step = -(-p // -(-p // most))  # blocks of equal size
    for i in range(0, p, step):
        g = rows[:, 0, :, i : i + step].transpose(-2, -1) @ columns[:, 0]  # (N, step, d)
        yield i, g if dense is None else g + dense[:, i : i + step]


@torch.library.custom_op("functree::formed", mutates_args=())
def _operator(
    rows: Tensor, columns: Tensor, dense: Tensor | None, direction: Tensor | None, want: str, budget: int
) -> list[Tensor]:
    names = want.split(",")
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for start, g in _blocks(rows, columns, dense, budget):
        size, g = g.shape[1], wide(g)
        for name in names:
            if name == "norm":
                parts[name].append(torch.linalg.vector_norm(g, dim=(1, 2)).square())
            elif name == "dot":
                assert direction is not None
                v = wide(direction).reshape(-1, g.shape[2])[start : start + size]  # (rows, d)
                parts[name].append(g.flatten(1) @ v.flatten())  # (N,)
            elif name == "gram":
                parts[name].append(g.flatten(1) @ g.flatten(1).T)  # (N, N)
            elif name == "square":
                parts[name].append(torch.linalg.vector_norm(g, dim=0).square())  # (rows, d)
            else:
                parts[name].append(g.sum(0))  # (rows, d)
    return [
        torch.cat(parts[name]) if name in ("square", "sum") else sum(parts[name])  # type: ignore[misc]  # not 0
        for name in names
    ]


@_operator.register_fake
def _(rows, columns, dense, direction, want, budget):
    count, groups, _, p = rows.shape
    like = (groups * p, columns.shape[-1])
    shapes = {"norm": (count,), "dot": (count,), "gram": (count, count), "square": like, "sum": like}
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return [rows.new_empty(shapes[name], dtype=dtype) for name in want.split(",")]


@_operator.register_vmap
def _(info, in_dims, rows, columns, dense, direction, want, budget):
    members = []
    for i in range(info.batch_size):
        tensors = [
            x if dim is None else x.select(dim, i)
            for x, dim in zip((rows, columns, dense, direction), in_dims[:4], strict=True)
        ]
        members.append(_operator(*tensors, want, budget))
    outs = [torch.stack(values) for values in zip(*members, strict=True)]
    return outs, [0] * len(outs)


class _Formed(torch.autograd.Function):
    """The operator, whose results must not be differentiated again; it cannot refuse that itself under torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, columns, dense, direction, want, budget):
        return tuple(_operator(rows, columns, dense, direction, want, budget))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise PerExampleError(FIRST_ORDER)

    jvp = backward


@allow_in_graph  # see core.tap
def formed(
    rows: Tensor, columns: Tensor, dense: Tensor | None, direction: Tensor | None, want: tuple[str, ...], budget: int
) -> tuple[Tensor, ...]:
    """The wanted quantities of g_n = rows_n^T columns_n + dense_n, group by group.

    Args:
        rows, columns: (N, groups, T, p) and (N, groups, T, d).
        dense: (N, *shape), added.
        direction: like the parameter, for "dot".
        want: names of `core.per_example.forms.reduce`, at least one.
        budget: bytes of a block, or one row.

    Returns:
        for each name, in float32 or wider: "norm" (squared) and "dot" (N,), "gram" (N, N), "square" and "sum"
        (groups * p, d).
    """
    return _Formed.apply(rows, columns, dense, direction, ",".join(want), budget)
