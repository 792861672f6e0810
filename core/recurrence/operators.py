"""The recursion of a tanh, relu, LSTM or GRU layer as one operator of torch, forwards and backwards.

torch.compile does not look inside, so a graph has one node where a loop has hundreds, whatever the number of steps.
Only what depends on the step before is in here: the input's product xw comes from outside, for all steps at once, and
the weights' gradients are one product of the cotangents of all steps with the states of all steps.

Shapes: xw (batch, time, gates), w (gates, width), b (gates,), the states h and c (batch, width). An ensemble has one
more axis, the first of them all. What a kind has no use for has the width 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

KINDS = {"tanh": 1, "relu": 1, "lstm": 4, "gru": 3}
"""Gates of each kind."""
_KEPT = {"tanh": 0, "relu": 0, "lstm": 4, "gru": 4}


def _by_step(x: Tensor) -> Tensor:
    """(..., time, n) -> (time, ..., n), a view."""
    return x.movedim(-2, 0)


def _add_product(w: Tensor) -> Callable:
    """torch.addmm, or for one matrix per member torch.baddbmm."""
    return torch.baddbmm if w.ndim == 3 else torch.addmm


def _tanh(xw: Tensor, w: Tensor, b: Tensor, h: Tensor, c: Tensor, hs: Tensor, cs: Tensor, gates: Tensor) -> None:
    _elman(xw, w, b, h, hs, torch.tanh_)


def _relu(xw: Tensor, w: Tensor, b: Tensor, h: Tensor, c: Tensor, hs: Tensor, cs: Tensor, gates: Tensor) -> None:
    _elman(xw, w, b, h, hs, torch.relu_)


def _elman(xw: Tensor, w: Tensor, b: Tensor, h: Tensor, hs: Tensor, activation: Callable) -> None:
    add_product, w = _add_product(w), w.mT
    torch.add(xw, b, out=hs)
    for new in hs.unbind(0):
        h = activation(add_product(new, h, w, out=new))


def _lstm(xw: Tensor, w: Tensor, b: Tensor, h: Tensor, c: Tensor, hs: Tensor, cs: Tensor, gates: Tensor) -> None:
    """See `cells.lstm_cell`. The gates i, f, g, o are kept, after their activations."""
    add_product, w, cells = _add_product(w), w.mT, c.shape[-1]
    torch.add(xw, b, out=gates)
    for gate, new_h, new_c in zip(gates.unbind(0), hs.unbind(0), cs.unbind(0), strict=True):
        add_product(gate, h, w, out=gate)
        i_f, g, o = gate.split((2 * cells, cells, cells), -1)
        i, f = i_f.sigmoid_().chunk(2, -1)
        c = torch.mul(f, c, out=new_c).addcmul_(i, g.tanh_())
        h = torch.tanh(c, out=new_h).mul_(o.sigmoid_())


def _gru(xw: Tensor, w: Tensor, b: Tensor, h: Tensor, c: Tensor, hs: Tensor, cs: Tensor, gates: Tensor) -> None:
    """See `cells.gru_cell`. r, z, the state's part of n, and n are kept."""
    add_product, w, width = _add_product(w), w.mT, h.shape[-1]
    for x, gate, new in zip(xw.unbind(0), gates.unbind(0), hs.unbind(0), strict=True):
        product = gate.narrow(-1, 0, 3 * width)
        add_product(b.expand_as(product), h, w, out=product)
        r_z, h_n, n = gate.split((2 * width, width, width), -1)
        x_gates, x_n = x.tensor_split((2 * width,), -1)
        r, z = r_z.add_(x_gates).sigmoid_().chunk(2, -1)
        torch.addcmul(x_n, r, h_n, out=n).tanh_()
        h = torch.lerp(n, h, z, out=new)  # n + z (h - n)


_FORWARD = {"tanh": _tanh, "relu": _relu, "lstm": _lstm, "gru": _gru}


def _states(kind: str, xw: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for hidden states, cells and gates: (..., batch, time, n); the gates of one step lie together."""
    *lead, time, _ = xw.shape
    gates = xw.new_empty(time, *lead, _KEPT[kind] * h.shape[-1]).movedim(0, -2)
    return xw.new_empty(*lead, time, h.shape[-1]), xw.new_empty(*lead, time, c.shape[-1]), gates


@torch.library.custom_op("functree::recurrence", mutates_args=())
def forward(kind: str, xw: Tensor, w: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, cells, gates) after each step, from the state (h, c) before the first."""
    hs, cs, gates = _states(kind, xw, h, c)
    bias = b.unsqueeze(-2)  # (1, gates), or one per member
    with torch.autocast(xw.device.type, enabled=False):
        _FORWARD[kind](_by_step(xw), w, bias, h, c, _by_step(hs), _by_step(cs), _by_step(gates))
    return hs, cs, gates


@forward.register_fake
def _(kind: str, xw: Tensor, w: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _states(kind, xw, h, c)


def _before(start: Tensor, states: Tensor) -> Tensor:
    """The states before each step: (..., time, n)."""
    return torch.cat([start.unsqueeze(-2), states.narrow(-2, 0, states.shape[-2] - 1)], -2)


# A cotangent dh of the hidden state after a step is that of the output plus that which the next step hands down. All
# factors that need no cotangent are computed before the loop, for all steps at once.


def _elman_back(kind: str, w: Tensor, h: Tensor, c: Tensor, hs: Tensor, cs, gates, dhs: Tensor, dcs):
    derivative = 1 - hs.square() if kind == "tanh" else (hs > 0).to(hs.dtype)
    d, add_product = torch.empty_like(hs), _add_product(w)
    steps, derivatives, outputs = (_by_step(x).unbind(0) for x in (d, derivative, dhs))
    dh = outputs[-1]
    for t in range(len(steps) - 1, -1, -1):
        if t < len(steps) - 1:
            dh = add_product(outputs[t], steps[t + 1], w)
        torch.mul(dh, derivatives[t], out=steps[t])
    return d, d.new_empty((*d.shape[:-1], 0)), steps[0] @ w, torch.zeros_like(c)


def _lstm_back(kind: str, w: Tensor, h: Tensor, c: Tensor, hs, cs: Tensor, gates: Tensor, dhs: Tensor, dcs: Tensor):
    cells = c.shape[-1]
    i, f, g, o = gates.chunk(4, -1)
    tanh_c, old_c = cs.tanh(), _before(c, cs)
    of_c = [g * i * (1 - i), old_c * f * (1 - f), i * (1 - g * g)]  # d i, d f, d g by dc
    d = torch.cat([*of_c, tanh_c * o * (1 - o)], -1)  # and d o by dh: (..., time, 4 cells)
    through_tanh = o * (1 - tanh_c * tanh_c)
    add_product = _add_product(w)
    steps, forget, through, of_hs, of_cs = (_by_step(x).unbind(0) for x in (d, f, through_tanh, dhs, dcs))
    dh, dc = of_hs[-1], of_cs[-1].clone()
    for t in range(len(steps) - 1, -1, -1):
        if t < len(steps) - 1:
            dh = add_product(of_hs[t], steps[t + 1], w)
            dc.mul_(forget[t + 1]).add_(of_cs[t])
        dc.addcmul_(dh, through[t])
        of_c, of_h = steps[t].split((3 * cells, cells), -1)
        of_c.unflatten(-1, (3, cells)).mul_(dc.unsqueeze(-2))
        of_h.mul_(dh)
    return d, d.new_empty((*d.shape[:-1], 0)), steps[0] @ w, dc * forget[0]


def _gru_back(kind: str, w: Tensor, h: Tensor, c: Tensor, hs: Tensor, cs, gates: Tensor, dhs: Tensor, dcs):
    width = h.shape[-1]
    r, z, h_n, n = gates.chunk(4, -1)
    of_n = (1 - z) * (1 - n * n)
    of_hn = of_n * r
    d_hw = torch.cat([of_hn * h_n * (1 - r), (_before(h, hs) - n) * z * (1 - z), of_hn], -1)  # (..., time, 3 width)
    add_product, total = _add_product(w), torch.empty_like(hs)
    steps, keep, totals, outputs = (_by_step(x).unbind(0) for x in (d_hw, z, total, dhs))
    for t in range(len(steps) - 1, -1, -1):
        if t == len(steps) - 1:
            dh = totals[t].copy_(outputs[t])
        else:
            torch.addcmul(outputs[t], dh, keep[t + 1], out=totals[t])
            dh = add_product(totals[t], steps[t + 1], w, out=totals[t])
        steps[t].unflatten(-1, (3, width)).mul_(dh.unsqueeze(-2))
    d_xw = torch.cat([d_hw.narrow(-1, 0, 2 * width), of_n * total], -1)
    return d_xw, d_hw, torch.addcmul(steps[0] @ w, dh, keep[0]), torch.zeros_like(c)


_BACKWARD = {"tanh": _elman_back, "relu": _elman_back, "lstm": _lstm_back, "gru": _gru_back}


@torch.library.custom_op("functree::recurrence_backward", mutates_args=())
def backward(
    kind: str, w: Tensor, h: Tensor, c: Tensor, hs: Tensor, cs: Tensor, gates: Tensor, dhs: Tensor, dcs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cotangents of xw, of the state's product w h + b, and of the first state, from those of hs and cs.

    Those of the two products differ for a GRU alone; else the second has the width 0.
    """
    with torch.autocast(hs.device.type, enabled=False):
        return _BACKWARD[kind](kind, w, h, c, hs, cs, gates, dhs, dcs)


@backward.register_fake
def _(kind: str, w: Tensor, h: Tensor, c: Tensor, hs: Tensor, cs, gates, dhs, dcs) -> tuple[Tensor, ...]:
    shape, gates = hs.shape[:-1], w.shape[-2]
    d_xw, d_hw = hs.new_empty(*shape, gates), hs.new_empty(*shape, gates if kind == "gru" else 0)
    return d_xw, d_hw, torch.empty_like(h), torch.empty_like(c)


def _mapped(operator: Callable, kind: str, args: tuple, dims: tuple, weights: tuple[int, ...]) -> tuple:
    """The operator under vmap: over the batch if it can, else over members.

    Args:
        args, dims: tensors, and the mapped axis of each or None.
        weights: which of them have no axis of the batch.
    """
    size = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    ensemble = args[weights[0]].ndim - (dims[weights[0]] is not None) == 3
    own = any(dims[i] is not None for i in weights)  # a matrix of its own for every slice
    fold = ensemble or not own
    axis = 1 if ensemble and not own else 0  # the mapped axis goes before that of the batch, or of the members

    def folded(i: int, x: Tensor, dim: int | None) -> Tensor:
        if i in weights and not own:
            return x
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.movedim(0, axis).flatten(axis, axis + 1) if fold else x

    outs = operator(kind, *(folded(i, x, dim) for i, (x, dim) in enumerate(zip(args, dims, strict=True))))
    return tuple((out.unflatten(axis, (size, -1)) if fold else out).movedim(axis, 0) for out in outs)


@forward.register_vmap
def _(info, in_dims, kind, *args):
    return _mapped(forward, kind, args, in_dims[1:], weights=(1, 2)), (0, 0, 0)


@backward.register_vmap
def _(info, in_dims, kind, *args):
    return _mapped(backward, kind, args, in_dims[1:], weights=(0,)), (0, 0, 0, 0)
