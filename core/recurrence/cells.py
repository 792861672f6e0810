"""Cells: one step of a recurrence, `cell(p, xw, state) -> state`.

p holds the recurrent parameters, xw (..., gates) is the input's part of the pre-activations, W_x x + b_x, and state a
tuple of tensors (..., width), the hidden state h first. All are plain functions of tensors of any leading axes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from core.tree import Tree

State = tuple[Tensor, ...]


# core.layers is built on this folder, so its functions are not to be had here.
def _linear(p: Tree, x: Tensor) -> Tensor:
    return F.linear(x, p["weight"], p.get("bias"))


def _layer_norm(p: Tree, x: Tensor) -> Tensor:
    return F.layer_norm(x, p["weight"].shape, p["weight"], p["bias"])


def tanh_cell(p: Tree, xw: Tensor, state: State) -> State:
    """h' = tanh(W_x x + W_h h + b) (Elman 1990, "Finding Structure in Time"). xw: (..., width)."""
    return (torch.tanh(xw + _linear(p["hh"], state[0])),)


def relu_cell(p: Tree, xw: Tensor, state: State) -> State:
    """h' = max(0, W_x x + W_h h + b). xw: (..., width)."""
    return (torch.relu(xw + _linear(p["hh"], state[0])),)


def lstm_cell(p: Tree, xw: Tensor, state: State) -> State:
    """Long short-term memory (Hochreiter & Schmidhuber 1997; the forget gate of Gers et al. 2000). xw: (..., 4 cells).

    "peephole" (3, cells) lets the gates see the cells (Gers & Schmidhuber 2000, "Recurrent nets that time and count"):
    those of i and f the old ones, that of o the new ones. "projection" {"weight": (width, cells)} makes the hidden
    state smaller than the cells (Sak et al. 2014, arXiv:1402.1128).
    """
    h, c = state
    i, f, g, o = (xw + _linear(p["hh"], h)).chunk(4, dim=-1)  # each (..., cells)
    if "peephole" in p:
        of_i, of_f, of_o = p["peephole"].unbind(0)
        i, f = i + of_i * c, f + of_f * c
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # c' = f c + i g
    if "peephole" in p:
        o = o + of_o * c
    h = torch.sigmoid(o) * torch.tanh(c)  # h' = o tanh(c')
    return (_linear(p["projection"], h) if "projection" in p else h), c


def gru_cell(p: Tree, xw: Tensor, state: State) -> State:
    """Gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), its reset gate after the product as in torch and cuDNN.

    xw: (..., 3 width).
    """
    (h,) = state
    x_gates, x_n = xw.tensor_split((2 * h.shape[-1],), dim=-1)
    h_gates, h_n = _linear(p["hh"], h).tensor_split((2 * h.shape[-1],), dim=-1)
    r, z = torch.sigmoid(x_gates + h_gates).chunk(2, dim=-1)  # each (..., width)
    n = torch.tanh(x_n + r * h_n)  # n = tanh(W_n x + r (U_n h + b))
    return (n + z * (h - n),)  # h' = (1 - z) n + z h


def layer_norm_lstm_cell(p: Tree, xw: Tensor, state: State) -> State:
    """LSTM with layer norm (Ba et al. 2016, arXiv:1607.06450, eq. 20 to 22). xw: (..., 4 width), already normalised:

    gates = LN(W_h h) + LN(W_x x) + b,   h' = o tanh(LN(c'))
    """
    h, c = state
    gates = xw + _layer_norm(p["norm_h"], _linear(p["hh"], h))  # (..., 4 width)
    i, f, g, o = gates.chunk(4, dim=-1)  # each (..., width)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(_layer_norm(p["norm_c"], c)), c
