"""Recurrent layers: Elman's, LSTM, GRU, LSTM with layer norm; in stacks, both directions, over ragged sequences.

    state_t = cell(W_x x_t + b_x, state_{t-1})        cells and equations: `core.recurrence.cells`

A state is a dict: "h" (batch, width), and of an LSTM "c" (batch, cells). Parameters have torch's names, `ih` and `hh`.

Ragged sequences need no packing: what comes after an example's end is set to zero before the recursion and after it,
and the state is read at the end. The recursion itself has no masks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from core.initializers import Initializer, uniform
from core.layers.checks import INTEGERS, check_arguments, check_tensor
from core.layers.linear import linear, linear_spec
from core.layers.normalization import layer_norm, layer_norm_spec
from core.layers.unformed import formed
from core.recurrence import fused as kernels
from core.recurrence.cells import layer_norm_lstm_cell, lstm_cell
from core.recurrence.routes import mapped_or_beyond_first_derivatives, recurrence
from core.recurrence.unroll import unroll
from core.spec import Param
from core.tree import Tree

State = dict[str, Tensor]


def rnn_spec(d_in: int, width: int, *, bias: bool = True, init: Initializer | None = None) -> Tree:
    """`ih` (width, d_in) and `hh` (width, width), with a bias each; all from U(-1/sqrt(width), 1/sqrt(width)).

    Raises:
        ValueError: a size below 1.
    """
    return _spec("rnn", 1, d_in, width, width, bias, init)


def gru_spec(d_in: int, width: int, *, bias: bool = True, init: Initializer | None = None) -> Tree:
    """As `rnn_spec`, with 3 width rows: r, z, n."""
    return _spec("gru", 3, d_in, width, width, bias, init)


def lstm_spec(
    d_in: int,
    width: int,
    *,
    bias: bool = True,
    projection: int | None = None,
    peephole: bool = False,
    init: Initializer | None = None,
) -> Tree:
    """As `rnn_spec`, with 4 width rows: i, f, g, o.

    Args:
        width: number of cells.
        projection: size of the hidden state, if smaller: `projection` (projection, width).
        peephole: the gates see the cells: `peephole` (3, width).
    """
    init = _uniform(width) if init is None else init
    spec = _spec("lstm", 4, d_in, width, width if projection is None else projection, bias, init)
    if projection is not None:
        spec["projection"] = linear_spec(width, projection, bias=False, init=init)
    if peephole:
        spec["peephole"] = Param((3, width), init, (None, "out"))
    return dict(sorted(spec.items()))


def layer_norm_lstm_spec(d_in: int, width: int, *, init: Initializer | None = None) -> Tree:
    """As `lstm_spec`, with norms of the two products, whose biases are the only ones, and of the cells."""
    norms = {f"norm_{part}": layer_norm_spec(rows) for part, rows in (("c", width), ("h", 4 * width), ("x", 4 * width))}
    return {**_spec("layer_norm_lstm", 4, d_in, width, width, False, init), **norms}


def _uniform(width: int) -> Initializer:
    return uniform(-(width**-0.5), width**-0.5)


def _spec(
    name: str, gates: int, d_in: int, width: int, hidden: int, bias: bool, init: Initializer | None
) -> dict[str, Any]:
    for what, size in (("d_in", d_in), ("width", width), ("projection", hidden)):
        if size < 1:
            raise ValueError(f"{name}: {what} is {size}; expected at least 1")
    init = _uniform(width) if init is None else init
    return {
        "hh": linear_spec(hidden, gates * width, bias=bias, init=init, bias_init=init),
        "ih": linear_spec(d_in, gates * width, bias=bias, init=init, bias_init=init),
    }


def rnn(
    p: Tree,
    x: Tensor,
    start: State | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    every_step: bool = False,
    nonlinearity: str = "tanh",
    method: str = "auto",
) -> tuple[Tensor, State]:
    """Elman's recurrent layer, as torch.nn.RNN with one layer. x: (batch, time, d_in).

    Args:
        start: the state before the first step, `{"h": (batch, width)}`; zeros if None.
        lengths: (batch,) integer, from 0 to time: steps of each example. What comes after them is not looked at, and
            the output there is 0. An example of length 0 returns its start. Default None: all steps.
        reverse: from the last step of each example to its first.
        every_step: return the states after every step, (batch, time, n), in place of the last.
        nonlinearity: "tanh" or "relu".
        method: see `core.recurrence.recurrence`.

    Returns:
        The hidden states (batch, time, width), and the state after the last step (that of the first position if
        reverse).

    Raises:
        TypeError: x or the parameters of a wrong kind.
        ValueError: shapes that do not fit, lengths out of range; all are named.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity '{nonlinearity}' is unknown; expected tanh or relu")
    return _run("rnn", nonlinearity, p, x, start, lengths, reverse, every_step, method)


def gru(
    p: Tree,
    x: Tensor,
    start: State | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    every_step: bool = False,
    method: str = "auto",
) -> tuple[Tensor, State]:
    """Gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), as torch.nn.GRU with one layer; see `rnn`."""
    return _run("gru", "gru", p, x, start, lengths, reverse, every_step, method)


def lstm(
    p: Tree,
    x: Tensor,
    start: State | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    every_step: bool = False,
    method: str = "auto",
) -> tuple[Tensor, State]:
    """Long short-term memory (Hochreiter & Schmidhuber 1997), as torch.nn.LSTM with one layer; see `rnn`.

    A state is `{"c": (batch, cells), "h": (batch, width)}`. With peepholes or a projection it is a loop.
    """
    return _run("lstm", "lstm", p, x, start, lengths, reverse, every_step, method)


def layer_norm_lstm(
    p: Tree,
    x: Tensor,
    start: State | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    every_step: bool = False,
    method: str = "auto",
) -> tuple[Tensor, State]:
    """LSTM with layer norm (Ba et al. 2016, arXiv:1607.06450), a loop; see `rnn`."""
    return _run("layer_norm_lstm", "layer_norm_lstm", p, x, start, lengths, reverse, every_step, method)


def _run(
    name: str,
    kind: str,
    p: Tree,
    x: Tensor,
    start: State | None,
    lengths: Tensor | None,
    reverse: bool,
    every_step: bool,
    method: str,
) -> tuple[Tensor, State]:
    check_arguments(name, p, x, needs=("hh", "ih"))
    p = formed(p)  # once, and not at every step
    if x.ndim != 3 or not x.shape[1]:
        raise ValueError(f"{name}: expected x of shape (batch, time > 0, d_in), found {tuple(x.shape)}")
    d_in = p["ih"]["weight"].shape[1]
    if x.shape[2] != d_in:  # the kernels would read beyond the end of x
        raise ValueError(f"{name}: expected a last axis of {d_in}, found x of shape {tuple(x.shape)}")
    names = ("h", "c") if "lstm" in kind else ("h",)
    first = _start(name, p, x, start, names)
    if lengths is not None:
        check_lengths(name, lengths, x)
        live = (torch.arange(x.shape[1], device=x.device) < lengths[:, None]).unsqueeze(-1)  # (batch, time, 1)
        x = torch.where(live, x, 0)  # a NaN after the end would reach the weights' gradients as 0 * NaN
    if reverse:
        x = reversed_in_time(x, lengths)
    states: tuple[Tensor, ...]
    last: list[Tensor] = []
    if kind == "lstm" and _takes_kernels(p, x, first, every_step, method):
        hidden, cells = _by_kernels(p, x, first, None if lengths is None else live)
        states, last = (hidden,), [cells]
    else:
        states = _every_state(kind, p, x, first, method)
    if lengths is None:
        ends = [state[:, -1] for state in states]  # (batch, n)
    else:
        ends = [_at_end(state, before, lengths) for state, before in zip(states, first, strict=False)]
        states = tuple(torch.where(live, state, 0) for state in states)
    ends = [*ends, *last]
    if reverse:
        states = tuple(reversed_in_time(state, lengths) for state in states)
    parts = dict(zip(names, states if every_step else ends, strict=True))
    return states[0], {part: parts[part] for part in sorted(names)}


def _every_state(kind: str, p: Tree, x: Tensor, start: tuple[Tensor, ...], method: str) -> tuple[Tensor, ...]:
    """The states after every step, (batch, time, n)."""
    xw = linear(p["ih"], x).to(start[0].dtype)  # (batch, time, gates); autocast narrows this product alone
    if kind == "layer_norm_lstm":
        return unroll(layer_norm_lstm_cell, p, layer_norm(p["norm_x"], xw), start)
    if "projection" in p or "peephole" in p:
        return unroll(lstm_cell, p, xw, start)
    return recurrence(kind, xw, p["hh"]["weight"], p["hh"].get("bias"), start, method=method)


def _takes_kernels(p: Tree, x: Tensor, start: tuple[Tensor, ...], every_step: bool, method: str) -> bool:
    """True where oneDNN's kernels compute an LSTM: one that they can, where they are fastest."""
    whole = "projection" not in p and "peephole" not in p and x.shape[0] > 0 and x.shape[1] > 1
    if every_step or method != "auto" or not whole or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_exporting():  # packages run without Python
        return False
    tensors = (x, *p["hh"].values(), *p["ih"].values(), *start)
    if has_torch_function(tensors):  # in a loss of core.per_example
        return False
    return kernels.available(*tensors) and not mapped_or_beyond_first_derivatives()


_CLOSED = 1e4  # the sigmoid of it is 1, of minus it 0, whatever a state adds


def _by_kernels(p: Tree, x: Tensor, start: tuple[Tensor, ...], live: Tensor | None) -> tuple[Tensor, Tensor]:
    """The hidden states (batch, time, width) and the cells (batch, width) of the end of each example."""
    w_ih, w_hh = p["ih"]["weight"], p["hh"]["weight"]
    if live is not None:
        # After the end, i = o = 0 and f = 1: the cells stay what they were there.
        gates = x.new_tensor([-_CLOSED, _CLOSED, 0.0, -_CLOSED])[:, None].expand(4, w_hh.shape[1])  # (4, width)
        w_ih = torch.cat([w_ih, gates.reshape(-1, 1)], 1)  # (4 width, d_in + 1)
        x = torch.cat([x, (~live).to(x.dtype)], 2)  # (batch, time, d_in + 1)
    b = p["ih"]["bias"] + p["hh"]["bias"] if "bias" in p["ih"] else x.new_zeros(len(w_ih))
    return kernels.lstm(x, w_ih, w_hh, b, *start)


def widths(p: Tree) -> dict[str, int]:
    """Sizes of the cells "c" and of the hidden state "h" of a layer, from its parameters or its spec."""
    hidden = p["hh"]["weight"].shape[1]
    return {"c": p["projection"]["weight"].shape[1] if "projection" in p else hidden, "h": hidden}


def _start(name: str, p: Tree, x: Tensor, start: State | None, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The tensors of the first state, in the order of names."""
    shapes, dtype = {part: (x.shape[0], n) for part, n in widths(p).items()}, p["hh"]["weight"].dtype
    if start is None:
        return tuple(x.new_zeros(shapes[part], dtype=dtype) for part in names)
    if not isinstance(start, dict) or sorted(start) != sorted(names):
        parts = ", ".join(map(str, start)) if isinstance(start, dict) else type(start).__name__
        raise ValueError(f"{name}: expected a state with {' and '.join(sorted(names))}, found {parts}")
    for part in names:
        shape = tuple(start[part].shape)
        if shape != shapes[part]:
            raise ValueError(f"{name}: expected '{part}' of the state of shape {shapes[part]}, found {shape}")
        if start[part].dtype != dtype:
            raise ValueError(f"{name}: the state is {start[part].dtype}, the parameters are {dtype}")
    return tuple(start[part] for part in names)


def check_lengths(name: str, lengths: Tensor, x: Tensor) -> None:
    """Raise unless lengths is (batch,) integers from 0 to time; of values only where they can be read for free."""
    check_tensor(name, lengths, "lengths")
    if lengths.dtype not in INTEGERS or tuple(lengths.shape) != (x.shape[0],):
        kind = f"{lengths.dtype} of shape {tuple(lengths.shape)}"
        raise ValueError(f"{name}: expected lengths of integers, shape ({x.shape[0]},), found {kind}")
    plain = type(lengths) is Tensor and lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if plain and not torch._C._functorch.is_functorch_wrapped_tensor(lengths) and lengths.shape[0]:
        low, high = (int(value) for value in lengths.aminmax())
        if low < 0 or high > x.shape[1]:
            raise ValueError(f"{name}: lengths are from {low} to {high}; expected from 0 to the time of {x.shape[1]}")


def check_sequences(name: str, x: Any, d_in: int = 0) -> tuple[Tensor, Tensor]:
    """The two parts of x: tokens (batch, time), or real values (batch, time, d_in) if d_in is given, and lengths.

    Raises:
        TypeError: x is not two tensors.
        ValueError: shapes that do not fit, lengths out of range.
    """
    what, shape = ("values", f"(batch, time, {d_in})") if d_in else ("tokens", "(batch, time)")
    if not isinstance(x, tuple) or len(x) != 2:
        raise TypeError(f"{name}: x is {type(x).__name__}; expected a tuple, ({what}, lengths)")
    values, lengths = x
    check_tensor(name, values, what)
    if values.ndim != (3 if d_in else 2) or d_in and values.shape[2] != d_in:
        raise ValueError(f"{name}: expected {what} of shape {shape}, found {tuple(values.shape)}")
    check_lengths(name, lengths, values)
    return values, lengths


def _at_end(states: Tensor, start: Tensor, lengths: Tensor) -> Tensor:
    """The states (batch, time, n) after `lengths` steps, (batch, n)."""
    lengths = lengths.long()[:, None]  # (batch, 1)
    index = (lengths - 1).clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])  # (batch, 1, n)
    return torch.where(lengths > 0, states.gather(1, index).squeeze(1), start)


def reversed_in_time(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The first `lengths` steps of each example in reverse order, later ones as they are. x: (batch, time, n)."""
    if lengths is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device)  # (time,)
    mirrored = lengths.long()[:, None] - 1 - steps  # (batch, time)
    index = torch.where(mirrored < 0, steps, mirrored)[..., None].expand_as(x)  # (batch, time, n)
    return x.gather(1, index)


SPECS = {"gru": gru_spec, "layer_norm_lstm": layer_norm_lstm_spec, "lstm": lstm_spec, "rnn": rnn_spec}
LAYERS: dict[str, Callable] = {"gru": gru, "layer_norm_lstm": layer_norm_lstm, "lstm": lstm, "rnn": rnn}
