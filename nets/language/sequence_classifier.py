"""Recurrent network with one output per sequence, of tokens or of real values: classification, forecasting.

    x_t = table[id_t], or the values;   h_1 ... h_L = layers(x_1 ... x_L);   outputs = W pool(h_1 ... h_L) + b

Schuster and Paliwal 1997, "Bidirectional Recurrent Neural Networks"; Graves and Schmidhuber 2005, "Framewise Phoneme
Classification with Bidirectional LSTM". The cells: `core.recurrence.cells`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core import initializers, random
from core.layers import dropout, embedding, embedding_spec, linear, linear_spec, recurrent, recurrent_spec
from core.layers.recurrent import LAYERS, check_sequences

POOLINGS = ("last", "max", "mean")


@dataclass(frozen=True)
class Config:
    """Sizes and rates of a recurrent classifier or forecaster."""

    vocabulary: int = 0
    """Tokens of the embedding; 0 for real values."""
    d_in: int = 100
    """Size of an embedding, or number of real values per step."""
    embedding_std: float = 1.0
    """Standard deviation of the embeddings' initial values. With 0.1, rare words soon move away from theirs."""
    width: int = 100
    """Size of a hidden state, per direction."""
    layers: int = 1
    """Recurrent layers."""
    kind: str = "lstm"
    """Cells: rnn, gru, lstm or layer_norm_lstm."""
    bidirectional: bool = False
    """Each layer runs in both directions."""
    pooling: str = "last"
    """Hidden state that the outputs see: the last one (of each direction), the greatest or the mean over time."""
    dropout: float = 0.0
    """Dropout rate of the embeddings, between layers, and of the pooled state."""
    outputs: int = 2
    """Outputs: classes, or values to forecast."""

    def __post_init__(self):
        for name, least in (("vocabulary", 0), ("d_in", 1), ("width", 1), ("layers", 1), ("outputs", 1)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ValueError(f"sequence_classifier: {name} is {value}; expected at least {least}")
        for name, choices in (("kind", sorted(LAYERS)), ("pooling", POOLINGS)):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(f"sequence_classifier: {name} '{value}' is unknown; expected {', '.join(choices)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"sequence_classifier: dropout {self.dropout} is outside [0, 1)")

    @property
    def pooled(self) -> int:
        """Size of the pooled state."""
        return self.width * (2 if self.bidirectional else 1)


def spec(cfg: Config) -> dict:
    """Initial values as in torch.nn: uniform, but for the embeddings."""
    stack = recurrent_spec(cfg.kind, cfg.d_in, cfg.width, layers=cfg.layers, bidirectional=cfg.bidirectional)
    parts = {"head": linear_spec(cfg.pooled, cfg.outputs), "layers": stack}
    return (
        {**parts, "tokens": embedding_spec(cfg.vocabulary, cfg.d_in, init=initializers.normal(cfg.embedding_std))}
        if cfg.vocabulary
        else parts
    )


def features(
    params: dict, x: tuple[Tensor, Tensor], cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """The pooled state of each sequence, (batch, pooled). Arguments as in `apply`."""
    values, lengths = check_sequences("sequence_classifier", x, 0 if cfg.vocabulary else cfg.d_in)
    dropping = train and cfg.dropout > 0.0
    if dropping and key is None:
        raise ValueError(f"sequence_classifier: training with dropout {cfg.dropout} draws random numbers; pass key=")
    keys = random.sites(key, cfg.layers + 1) if dropping else [None] * (cfg.layers + 1)

    def drop(i: int, x: Tensor) -> Tensor:
        return dropout(x, cfg.dropout, keys[i], train)

    if cfg.vocabulary:
        values = drop(cfg.layers, embedding(params["tokens"], values))  # (batch, time, d_in)
    h, states = recurrent(cfg.kind, params["layers"], values, lengths=lengths, drop=drop)  # (batch, time, pooled)
    return drop(cfg.layers - 1, _pool(h, states[-1], lengths, cfg))


def apply(
    params: dict, x: tuple[Tensor, Tensor], cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """Outputs (logits, forecasts) of a batch of sequences, (batch, outputs).

    Args:
        x: (tokens or values, lengths): integers (batch, time) or real values (batch, time, d_in), and integers
            (batch,), the steps of each. What comes after them is not looked at; a sequence of none has the pooled
            state 0.
        key: (2,) or one per example (batch, 2); needed in training if there is dropout.

    Raises:
        TypeError: x is not two tensors.
        ValueError: shapes that do not fit, lengths out of range, no key where one is needed.
    """
    return linear(params["head"], features(params, x, cfg, key=key, train=train))


def _pool(h: Tensor, state: dict, lengths: Tensor, cfg: Config) -> Tensor:
    """The hidden states (batch, time, pooled), which are 0 after the ends, as one per sequence."""
    if cfg.pooling == "last":
        ends = [state[d]["h"] for d in ("forward", "backward")] if cfg.bidirectional else [state["h"]]
        return torch.cat(ends, -1)  # (batch, pooled)
    if cfg.pooling == "mean":
        return h.sum(1) / lengths.clamp(min=1)[:, None].to(h.dtype)
    live = (torch.arange(h.shape[1], device=h.device) < lengths[:, None])[..., None]  # (batch, time, 1)
    greatest = torch.where(live, h, -torch.inf).amax(1)  # (batch, pooled)
    return torch.where(lengths[:, None] > 0, greatest, 0)
