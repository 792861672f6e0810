"""Stacks of recurrent layers, in one or both directions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.layers.recurrent import LAYERS, SPECS, State, widths


def recurrent_spec(
    kind: str, d_in: int, width: int, *, layers: int = 1, bidirectional: bool = False, **options: Any
) -> list:
    """A stack of recurrent layers: a list, with `{"backward", "forward"}` at each place if bidirectional.

    Args:
        kind: "rnn", "gru", "lstm" or "layer_norm_lstm".
        options: of the kind's own spec.

    Raises:
        ValueError: an unknown kind, a size below 1.
    """
    if kind not in SPECS:
        raise ValueError(f"recurrent: kind '{kind}' is unknown; expected one of {', '.join(SPECS)}")
    hidden = options.get("projection") or width
    stack = []
    for i in range(layers):
        sizes = (d_in if i == 0 else hidden * (2 if bidirectional else 1), width)
        layer = SPECS[kind](*sizes, **options)
        stack.append({"backward": SPECS[kind](*sizes, **options), "forward": layer} if bidirectional else layer)
    return stack


def recurrent(
    kind: str,
    p: list,
    x: Tensor,
    start: list | None = None,
    *,
    lengths: Tensor | None = None,
    drop: Callable[[int, Tensor], Tensor] | None = None,
    every_step: bool = False,
    **options: Any,
) -> tuple[Tensor, list]:
    """A stack of recurrent layers, as torch.nn.RNN, GRU and LSTM. x: (batch, time, d_in).

    Args:
        start: a state for each layer, in the structure of p; zeros if None.
        drop: dropout between layers, `drop(i, x)` of the output of layer i, not of the last one's.
        lengths, every_step, options: as in `rnn`.

    Returns:
        The last layer's hidden states, (batch, time, width), of both directions side by side if bidirectional: (batch,
        time, 2 width), the forward one first; and a state for each layer.

    Raises:
        ValueError: an unknown kind, a start of another number of layers; else as `rnn`.
    """
    if kind not in LAYERS:
        raise ValueError(f"recurrent: kind '{kind}' is unknown; expected one of {', '.join(LAYERS)}")
    if start is not None:
        _check_states(p, start)
    states = []
    for i, layer in enumerate(p):
        first, options_of_all = None if start is None else start[i], {"lengths": lengths, "every_step": every_step}
        if "forward" in layer:
            parts = {
                direction: LAYERS[kind](
                    layer[direction],
                    x,
                    None if first is None else first[direction],
                    reverse=direction == "backward",
                    **options_of_all,
                    **options,
                )
                for direction in ("backward", "forward")
            }
            x = torch.cat([parts["forward"][0], parts["backward"][0]], -1)  # (batch, time, 2 width)
            states.append({direction: state for direction, (_, state) in parts.items()})
        else:
            x, state = LAYERS[kind](layer, x, first, **options_of_all, **options)  # (batch, time, width)
            states.append(state)
        if drop is not None and i < len(p) - 1:
            x = drop(i, x)
    return x, states


def empty_state(kind: str, p: list, batch: int, dtype: torch.dtype = torch.float32, device=None) -> list:
    """The first state of a stack: zeros (batch, n) in the structure of p, its parameters or its spec."""

    def zeros(layer: dict) -> State:
        parts = ("c", "h") if "lstm" in kind else ("h",)
        return {part: torch.zeros(batch, widths(layer)[part], dtype=dtype, device=device) for part in parts}

    return [{d: zeros(layer[d]) for d in layer} if "forward" in layer else zeros(layer) for layer in p]


def _check_states(p: list, start: list) -> None:
    """Raise ValueError unless there is a state for each layer, of each direction."""
    if not isinstance(start, (list, tuple)) or len(start) != len(p):
        count = len(start) if isinstance(start, (list, tuple)) else type(start).__name__
        raise ValueError(f"recurrent: expected a list with a state for each of {len(p)} layers, found {count}")
    for i, (layer, state) in enumerate(zip(p, start, strict=True)):
        if "forward" in layer and not (isinstance(state, dict) and sorted(state) == ["backward", "forward"]):
            parts = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"recurrent: expected backward and forward in the state of layer {i}, found {parts}")
