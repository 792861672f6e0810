"""Collectives: sums and gathers over a group of processes, as functions.

Two kinds, by whether they may stand inside a loss. The loss of all is the sum of the processes' losses.

    inside:   sum_over    y = Σ_r x_r          dx = Σ_r dy_r       batch norm's statistics over all rows
              stack_over  y_r = x_r            dx = Σ_r dy_r[here]
              enter       y = x                dx = Σ_r dy_r       before a layer cut by its outputs
              leave       y = Σ_r x_r          dx = dy             after a layer cut by its inputs
              join        y = cat_r x_r        dx = dy[here]       the outputs of a layer cut by its outputs
    outside:  sum_all, gather, scatter_sum     several tensors in one collective

`enter` and `leave` are the f and g of Shoeybi et al. 2019 (Megatron-LM, arXiv:1909.08053, section 3), for layers whose
cotangents are the same on every process. Those inside have a gradient of any order, a vmap rule and a jvp, eager and
compiled. Torch's own collectives have none of them: `torch.func.grad` refuses them, and **vmap returns the local value
without a word**; so those outside raise where a transform is active.

A group is given by its name, `group.group_name` of a torch.distributed process group, and `ways`, its size. Every
process of the group must call the same collectives in the same order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.compiling import allow_in_graph, assume_constant_result


def _operators():
    """torch's functional collectives; imported late, because torch.distributed takes time and may be missing."""
    import torch.distributed._functional_collectives  # noqa: F401

    return torch.ops._c10d_functional


def _summed(x: Tensor, group: str) -> Tensor:
    operators = _operators()
    return operators.wait_tensor(operators.all_reduce(x.contiguous(), "sum", group))


def _stacked(x: Tensor, group: str, ways: int) -> Tensor:
    operators = _operators()
    rows = x.contiguous().reshape(1, *x.shape)
    return operators.wait_tensor(operators.all_gather_into_tensor(rows, ways, group))  # (ways, ...)


def _scattered(x: Tensor, group: str, ways: int) -> Tensor:
    operators = _operators()
    return operators.wait_tensor(operators.reduce_scatter_tensor(x.contiguous(), "sum", ways, group))[0]


class _Sum(torch.autograd.Function):
    """Backward: the same sum. All of the same shape, so a vmapped one is one collective on the batched tensor."""

    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, cotangent):
        return _Sum.apply(cotangent, ctx.group), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return _Sum.apply(tangent, ctx.group)

    @staticmethod
    def vmap(info, in_dims, x, group):
        return _Sum.apply(x, group), in_dims[0]


class _Enter(torch.autograd.Function):
    """Forward: the identity. Backward: the sum."""

    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, cotangent):
        return _Leave.apply(cotangent, ctx.group), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.view_as(tangent)

    @staticmethod
    def vmap(info, in_dims, x, group):
        return _Enter.apply(x, group), in_dims[0]


class _Leave(torch.autograd.Function):
    """Forward: the sum. Backward: the identity."""

    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, cotangent):
        return _Enter.apply(cotangent, ctx.group), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return _Leave.apply(tangent, ctx.group)

    @staticmethod
    def vmap(info, in_dims, x, group):
        return _Leave.apply(x, group), in_dims[0]


class _Stack(torch.autograd.Function):
    """Forward: x of every process, on a new leading axis. Backward: the sum of what they want of this one's."""

    @staticmethod
    def forward(x: Tensor, group: str, ways: int) -> Tensor:
        return _stacked(x, group, ways)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group, ctx.ways = inputs[1:]

    @staticmethod
    def backward(ctx, cotangent):
        return _Scatter.apply(cotangent, ctx.group, ctx.ways), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _Stack.apply(tangent, ctx.group, ctx.ways)

    @staticmethod
    def vmap(info, in_dims, x, group, ways):
        return _Stack.apply(x, group, ways), in_dims[0] + 1


class _Scatter(torch.autograd.Function):
    """The transpose of `_Stack`: (ways, ...) -> the sum over all processes of the row of this one."""

    @staticmethod
    def forward(x: Tensor, group: str, ways: int) -> Tensor:
        return _scattered(x, group, ways)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group, ctx.ways = inputs[1:]

    @staticmethod
    def backward(ctx, cotangent):
        return _Stack.apply(cotangent, ctx.group, ctx.ways), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _Scatter.apply(tangent, ctx.group, ctx.ways)

    @staticmethod
    def vmap(info, in_dims, x, group, ways):
        return _Scatter.apply(x.movedim(in_dims[0], 1), group, ways), 0


# One opaque node each: traced into, Dynamo loses the vmap rule of a Function and, under torch.func.grad, its backward.
@allow_in_graph
def _sum_over(x: Tensor, group: str) -> Tensor:
    return _Sum.apply(x, group)


@allow_in_graph
def _enter(x: Tensor, group: str) -> Tensor:
    return _Enter.apply(x, group)


@allow_in_graph
def _leave(x: Tensor, group: str) -> Tensor:
    return _Leave.apply(x, group)


@allow_in_graph
def _stack_over(x: Tensor, group: str, ways: int) -> Tensor:
    return _Stack.apply(x, group, ways)


def sum_over(x: Tensor, group: str) -> Tensor:
    """Σ_r x_r, the same on every process; its gradient is the sum of the processes' cotangents."""
    return _sum_over(x, group)


def enter(x: Tensor, group: str) -> Tensor:
    """x itself, which every process has; its gradient is the sum of the processes' cotangents."""
    return _enter(x, group)


def leave(x: Tensor, group: str) -> Tensor:
    """Σ_r x_r; its gradient is the cotangent, which every process has."""
    return _leave(x, group)


def stack_over(x: Tensor, group: str, ways: int) -> Tensor:
    """(ways, *x.shape): x of every process, in order of rank."""
    return _stack_over(x, group, ways)


def join(x: Tensor, dim: int, group: str, place: int, ways: int) -> Tensor:
    """The processes' pieces along `dim`, for a function of the whole that every process computes alike.

    The gradient of a piece is its part of the cotangent, as in `leave`. It is written with `leave`: the piece between
    zeros, summed, which is exact.

    Args:
        place: rank of this process in the group.
    """
    dim = dim % x.ndim
    before = list(x.shape)
    before[dim] = place * x.shape[dim]
    after = list(x.shape)
    after[dim] = (ways - 1 - place) * x.shape[dim]
    return leave(torch.cat([x.new_zeros(before), x, x.new_zeros(after)], dim), group)


@assume_constant_result
def _transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


def _check_outside(name: str) -> None:
    if _transformed():
        raise RuntimeError(
            f"{name} has no gradient and no vmap rule: torch's would be silently wrong. Call it outside of grad, vmap "
            "and jvp, or use sum_over, enter, leave or join"
        )


def _by_dtype(xs: Sequence[Tensor]) -> list[list[int]]:
    """The places of the tensors of each dtype: one collective takes one dtype."""
    groups: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(xs):
        groups.setdefault(x.dtype, []).append(i)
    return list(groups.values())


def sum_all(xs: Sequence[Tensor], group: str) -> list[Tensor]:
    """The sum over the processes of each tensor, in one collective; not inside a transform.

    The tensors are sent one after the other in one buffer: gloo takes 1.5 times as long for a coalesced one.

    Raises RuntimeError: inside grad, vmap or jvp.
    """
    _check_outside("sum_all")
    out = list(xs)
    for places in _by_dtype(xs):
        flat = _summed(torch.cat([xs[i].reshape(-1) for i in places]), group)
        for i, x in zip(places, flat.split([xs[i].numel() for i in places]), strict=True):
            out[i] = x.reshape(xs[i].shape)
    return out


def gather(xs: Sequence[Tensor], dims: Sequence[int], group: str, ways: int) -> list[Tensor]:
    """The processes' pieces of each tensor joined along its dimension, in one collective; not inside a transform.

    Raises RuntimeError: inside grad, vmap or jvp.
    """
    _check_outside("gather")
    operators, out = _operators(), list(xs)
    for places in _by_dtype(xs):
        own = [xs[i].contiguous() for i in places]
        pending = operators.all_gather_into_tensor_coalesced(own, ways, group)
        for i, rows in zip(places, pending, strict=True):
            rows, dim = operators.wait_tensor(rows), dims[i]  # (ways * first, ...)
            if dim:
                rows = rows.reshape(ways, *xs[i].shape).movedim(0, dim).flatten(dim, dim + 1)  # (..., ways * size, ...)
            out[i] = rows
    return out


def scatter_sum(xs: Sequence[Tensor], dims: Sequence[int], group: str, ways: int) -> list[Tensor]:
    """This process's piece along its dimension of the sum of each tensor, in one collective; not inside a transform.

    Raises RuntimeError: inside grad, vmap or jvp. ValueError: a dimension that does not divide.
    """
    _check_outside("scatter_sum")
    for x, dim in zip(xs, dims, strict=True):
        if x.shape[dim] % ways:
            raise ValueError(f"scatter_sum: dimension {dim} of {tuple(x.shape)} does not divide by {ways}")
    pieces = [x.unflatten(dim, (ways, -1)).movedim(dim, 0) for x, dim in zip(xs, dims, strict=True)]  # (ways, ...)
    out = [piece[0] for piece in pieces]
    for places in _by_dtype(xs):
        flat = _scattered(torch.cat([pieces[i].reshape(ways, -1) for i in places], 1), group, ways)
        for i, x in zip(places, flat.split([out[i].numel() for i in places]), strict=True):
            out[i] = x.reshape(out[i].shape)
    return out
