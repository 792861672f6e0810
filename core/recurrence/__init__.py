"""Recurrences over time: cells, and the routes by which they run."""

from core.recurrence.cells import State, gru_cell, layer_norm_lstm_cell, lstm_cell, relu_cell, tanh_cell
from core.recurrence.routes import CELLS, recurrence
from core.recurrence.unroll import unroll

__all__ = [
    "CELLS",
    "State",
    "gru_cell",
    "layer_norm_lstm_cell",
    "lstm_cell",
    "recurrence",
    "relu_cell",
    "tanh_cell",
    "unroll",
]
