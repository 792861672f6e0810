"""torch's recurrent modules on the recurrences of this library: they compile, map and report as its own layers do."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from core.layers.recurrent_stack import recurrent
from core.recurrence import CELLS


def replaced(module: nn.Module, kinds: Mapping[type, type[nn.Module]] | None = None) -> nn.Module:
    """The module with layers of other classes, by their type, that have the same attributes; itself if it has none.

    What contains a replaced layer is copied, without its tensors; everything else is shared.

    kinds: by default `Recurrent` for nn.RNN, nn.GRU and nn.LSTM, `Cell` for their cells.
    """
    return _replaced(module, _KINDS if kinds is None else kinds, {})


def _replaced(
    module: nn.Module, kinds: Mapping[type, type[nn.Module]], copies: dict[nn.Module, nn.Module]
) -> nn.Module:
    if module in copies:
        return copies[module]
    out = module
    kind = kinds.get(type(module))
    if kind is not None:
        out = kind.__new__(kind)
        out.__dict__.update(module.__dict__, _parameters=dict(module._parameters))
    else:
        children = {name: child and _replaced(child, kinds, copies) for name, child in module._modules.items()}
        if any(child is not module._modules[name] for name, child in children.items()):
            out = copy.copy(module)
            # A module's own copy shares these dicts, and functional_call writes into them.
            out.__dict__.update(_modules=children, _parameters=dict(module._parameters), _buffers=dict(module._buffers))
    copies[module] = out
    return out


class Recurrent(nn.Module):
    """Has the attributes and parameters of the nn.RNN, nn.GRU or nn.LSTM that it replaces.

    No subclass of these: Dynamo refuses to trace them.
    """

    mode: str
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    dropout: float
    nonlinearity: str

    def flatten_parameters(self) -> None:
        """Nothing to do; modules call it before the layer."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple:
        """(output, state) as `nn.RNN`, `nn.GRU` and `nn.LSTM` return them."""
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        unbatched = input.ndim == 2
        if unbatched:
            out, state = self._run(input.unsqueeze(0), _map(lambda x: x.unsqueeze(1), hx), None)
            return out.squeeze(0), _map(lambda x: x.squeeze(1), state)
        out, state = self._run(input if self.batch_first else input.transpose(0, 1), hx, None)
        return out if self.batch_first else out.transpose(0, 1), state

    def _packed(self, input: PackedSequence, hx: Any) -> tuple:
        x, lengths = pad_packed_sequence(input, batch_first=True)
        out, state = self._run(x, hx, lengths)
        lengths = lengths if input.sorted_indices is None else lengths[input.sorted_indices.cpu()]
        out = out if input.sorted_indices is None else out[input.sorted_indices]
        packed = pack_padded_sequence(out, lengths, batch_first=True)
        return PackedSequence(packed.data, packed.batch_sizes, input.sorted_indices, input.unsorted_indices), state

    def _run(self, x: Tensor, hx: Any, lengths: Tensor | None) -> tuple:
        """x: (batch, time, d_in) -> (batch, time, directions * width), and the state as torch has it."""
        kind = {"RNN_TANH": "rnn", "RNN_RELU": "rnn"}.get(self.mode, self.mode.lower())
        directions = 2 if self.bidirectional else 1
        layers = [[self._layer(i, d) for d in range(directions)] for i in range(self.num_layers)]
        p = [{"forward": both[0], "backward": both[1]} if self.bidirectional else both[0] for both in layers]
        options: dict[str, Any] = {"nonlinearity": self.nonlinearity} if kind == "rnn" else {}
        start = None if hx is None else self._starts(kind, hx)
        out, states = recurrent(kind, p, x, start, lengths=lengths, drop=self._drop, **options)
        ends = [state[d] for state in states for d in ("forward", "backward")] if self.bidirectional else states
        h = torch.stack([state["h"] for state in ends])  # (layers * directions, batch, width)
        return out, (h, torch.stack([state["c"] for state in ends])) if kind == "lstm" else h

    def _drop(self, layer: int, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _layer(self, layer: int, direction: int) -> dict:
        suffix = f"_l{layer}{'_reverse' if direction else ''}"
        p = {part: {"weight": getattr(self, f"weight_{part}{suffix}")} for part in ("hh", "ih")}
        if self.bias:
            p = {part: {"bias": getattr(self, f"bias_{part}{suffix}"), **p[part]} for part in p}
        if getattr(self, "proj_size", 0):
            p["projection"] = {"weight": getattr(self, f"weight_hr{suffix}")}
        return p

    def _starts(self, kind: str, hx: Any) -> list:
        states = hx if isinstance(hx, (list, tuple)) else (hx,)
        if len(states) != (2 if kind == "lstm" else 1):
            expected = "(h, c)" if kind == "lstm" else "h"
            raise ValueError(f"the lifted {self.mode}: expected a first state {expected}, found {len(states)} tensors")
        named = {"h": states[0], "c": states[1]} if kind == "lstm" else {"h": states[0]}
        starts = [
            {part: x[i] for part, x in named.items()} for i in range(self.num_layers * (2 if self.bidirectional else 1))
        ]
        if not self.bidirectional:
            return starts
        return [{"forward": a, "backward": b} for a, b in zip(starts[::2], starts[1::2], strict=True)]


class Cell(nn.Module):
    """Has the attributes and parameters of the nn.RNNCell, nn.GRUCell or nn.LSTMCell that it replaces."""

    hidden_size: int
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """New state, as `nn.RNNCell`, `nn.GRUCell` and `nn.LSTMCell` return it."""
        gates = len(self.weight_hh) // self.hidden_size
        kind = {1: getattr(self, "nonlinearity", ""), 3: "gru", 4: "lstm"}[gates]
        if hx is None:
            h = input.new_zeros((*input.shape[:-1], self.hidden_size))
            hx = (h, h) if kind == "lstm" else h
        p = {"hh": {"weight": self.weight_hh} | ({} if self.bias_hh is None else {"bias": self.bias_hh})}
        xw = F.linear(input, self.weight_ih, self.bias_ih)  # (..., gates)
        state = CELLS[kind](p, xw, hx if kind == "lstm" else (hx,))
        return state if kind == "lstm" else state[0]


_KINDS: dict[type, type[nn.Module]] = {
    nn.RNN: Recurrent,
    nn.GRU: Recurrent,
    nn.LSTM: Recurrent,
    nn.RNNCell: Cell,
    nn.GRUCell: Cell,
    nn.LSTMCell: Cell,
}


def _map(f: Callable, state: Any) -> Any:
    return None if state is None else tuple(f(x) for x in state) if isinstance(state, tuple) else f(state)
