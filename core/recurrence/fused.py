"""LSTM layers by oneDNN's kernels, forwards and backwards: for float32 on a CPU the fastest route.

They compute the input's product too, and return the cells of the last step alone. Second derivatives run the loop;
under vmap the kernels run once per slice.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from core.compiling import allow_in_graph, assume_constant_result
from core.recurrence.cells import lstm_cell
from core.recurrence.routes import zeros_if_none
from core.recurrence.unroll import unroll

_LSTM = 2  # the kernels' number of this mode


def available(*tensors: Tensor) -> bool:
    """True for float32 tensors on a CPU with oneDNN."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors) and _enabled()


@assume_constant_result
def _enabled() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def lstm(x: Tensor, w_ih: Tensor, w_hh: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (batch, time, width) and the last cells (batch, width).

    Args:
        x: (batch, time, d_in).
        w_ih, w_hh, b: (4 width, d_in), (4 width, width) and (4 width,), the sum of both biases.
        h, c: (batch, width), before the first step.
    """
    hs, last, _ = _lstm(x.transpose(0, 1), w_ih, w_hh, b, h, c)
    return hs.transpose(0, 1), last


@torch.library.custom_op("functree::fused_lstm", mutates_args=())
def forward(x: Tensor, w_ih: Tensor, w_hh: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states (time, batch, width), last cells (batch, width), workspace). x: (time, batch, d_in)."""
    settings: tuple = (False, [], _LSTM, w_hh.shape[1], 1, True, False, False, True)  # in time, one layer, biases
    x, w_ih, w_hh, b, h, c = (t.contiguous() for t in (x, w_ih, w_hh, b, h, c))
    with torch.enable_grad():  # without it there is no workspace
        hs, _, last, workspace = torch.ops.aten.mkldnn_rnn_layer(x, w_ih, w_hh, b, torch.zeros_like(b), h, c, *settings)
    return hs.detach(), last.detach().reshape(c.shape), workspace


@lru_cache
def _workspace_size(time: int, batch: int, d_in: int, width: int) -> int:
    def ask() -> int:
        shapes = (
            (time, batch, d_in),
            (4 * width, d_in),
            (4 * width, width),
            (4 * width,),
            (batch, width),
            (batch, width),
        )
        return forward(*(torch.zeros(shape) for shape in shapes))[2].numel()

    # In a thread of its own, out of reach of the modes in which a compiler's trace asks.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(ask).result()


@forward.register_fake
def _(x, w_ih, w_hh, b, h, c):
    time, batch, d_in = x.shape
    size = _workspace_size(time, batch, d_in, h.shape[1])
    return x.new_empty(time, batch, h.shape[1]), torch.empty_like(c), x.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op("functree::fused_lstm_backward", mutates_args=())
def backward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b: Tensor,
    h: Tensor,
    c: Tensor,
    hs: Tensor,
    last: Tensor,
    workspace: Tensor,
    dhs: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cotangents of x, w_ih, w_hh, b, h, c from those of the hidden states and of the last cells."""
    tensors = [t.contiguous() for t in (x, w_ih, w_hh, b, torch.zeros_like(b), h, c, hs, hs[-1], last, dhs)]
    settings: tuple = (False, _LSTM, w_hh.shape[1], 1, True, True, False, [], False)
    dx, dw_ih, dw_hh, db, _, dh, dc = torch.ops.aten.mkldnn_rnn_layer_backward(
        *tensors, None, dlast.contiguous(), *settings, workspace
    )
    return dx, dw_ih, dw_hh, db, dh.reshape(h.shape), dc.reshape(c.shape)


@backward.register_fake
def _(x, w_ih, w_hh, b, h, c, hs, last, workspace, dhs, dlast):
    return tuple(torch.empty(t.shape) for t in (x, w_ih, w_hh, b, h, c))


def _one_by_one(operator, info, in_dims, *args):
    """vmap by a loop: the kernels have no axis for it."""
    slices = [
        operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    outs = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
    return outs, (0,) * len(outs)


@forward.register_vmap
def _(info, in_dims, *args):
    return _one_by_one(forward, info, in_dims, *args)


@backward.register_vmap
def _(info, in_dims, *args):
    return _one_by_one(backward, info, in_dims, *args)


def _loop(x, w_ih, w_hh, b, h, c):
    """The same values, differentiable to any order."""
    p = {"hh": {"bias": b, "weight": w_hh}}
    hs, cs = unroll(lstm_cell, p, F.linear(x, w_ih).transpose(0, 1), (h, c))  # (batch, time, width)
    return hs.transpose(0, 1), cs[:, -1]


class _Fused(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w_ih, w_hh, b, h, c):
        return forward(x, w_ih, w_hh, b, h, c)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(outputs[2])
        ctx.set_materialize_grads(False)  # zeros of the size of the workspace cost a tenth of the time
        ctx.save_for_backward(*inputs, *outputs)

    @staticmethod
    def backward(ctx, dhs, dlast, _):
        hs, last, _ = ctx.saved_tensors[6:]
        dhs, dlast = zeros_if_none(dhs, hs), zeros_if_none(dlast, last)
        return _FusedBackward.apply(*ctx.saved_tensors, dhs, dlast)


class _FusedBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w_ih, w_hh, b, h, c, hs, last, workspace, dhs, dlast):
        return backward(x, w_ih, w_hh, b, h, c, hs, last, workspace, dhs, dlast)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, _, _, _, dhs, dlast = inputs
        ctx.save_for_backward(*tensors, dhs, dlast)

    @staticmethod
    def backward(ctx, *cotangents):
        def first(*inputs):
            *tensors, dhs, dlast = inputs
            return torch.func.vjp(_loop, *tensors)[1]((dhs, dlast))

        *of_inputs, of_dhs, of_dlast = torch.func.vjp(first, *ctx.saved_tensors)[1](tuple(cotangents))
        return *of_inputs, None, None, None, of_dhs, of_dlast


# One opaque node, whose backward Dynamo does not lose: see core/tap.py.
@allow_in_graph
def _lstm(x: Tensor, w_ih: Tensor, w_hh: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _Fused.apply(x, w_ih, w_hh, b, h, c)
