"""TextCNN: convolutions of several widths over the vectors of a text's tokens, each pooled to its maximum over time.

    x_t = table[id_t];   c_{k,t} = relu(W_k [x_{t-k+1} ... x_t] + b_k);   logits = W [max_t c_{k,t}]_k + b

Kim 2014, "Convolutional Neural Networks for Sentence Classification" (arXiv:1408.5882); its CNN-rand, without the
constraint on the norm of W.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core import initializers
from core.layers import conv, conv_spec, dropout, embedding, embedding_spec, linear, linear_spec
from core.layers.recurrent import check_sequences


@dataclass(frozen=True)
class Config:
    """Sizes of TextCNN."""

    vocabulary: int = 5000
    """Tokens of the embedding."""
    d_in: int = 128
    """Size of a token's vector."""
    embedding_std: float = 0.1
    """Standard deviation of their initial values."""
    windows: tuple[int, ...] = (3, 4, 5)
    """Widths of the convolutions, in tokens."""
    width: int = 100
    """Filters of each convolution."""
    dropout: float = 0.5
    """Dropout rate of the pooled filters."""
    outputs: int = 2
    """Classes."""

    def __post_init__(self):
        for name in ("vocabulary", "d_in", "width", "outputs"):
            if getattr(self, name) < 1:
                raise ValueError(f"text_cnn: {name} is {getattr(self, name)}; expected at least 1")
        if not self.windows or min(self.windows) < 1 or len(set(self.windows)) < len(self.windows):
            raise ValueError(f"text_cnn: windows are {self.windows}; expected different widths of at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"text_cnn: dropout {self.dropout} is outside [0, 1)")


def spec(cfg: Config) -> dict:
    """Parameters of TextCNN."""
    return {
        "convs": [conv_spec(cfg.d_in, cfg.width, (k,)) for k in cfg.windows],
        "head": linear_spec(cfg.width * len(cfg.windows), cfg.outputs),
        "tokens": embedding_spec(cfg.vocabulary, cfg.d_in, init=initializers.normal(cfg.embedding_std)),
    }


def features(
    params: dict, x: tuple[Tensor, Tensor], cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """The pooled filters of each text, (batch, width * len(windows)). Arguments as in `apply`."""
    tokens, lengths = check_sequences("text_cnn", x)
    if train and cfg.dropout > 0.0 and key is None:
        raise ValueError(f"text_cnn: training with dropout {cfg.dropout} draws random numbers; pass key=")
    lengths = lengths.long()[:, None]  # (batch, 1)
    live = torch.arange(tokens.shape[1], device=tokens.device) < lengths  # (batch, time)
    vectors = embedding(params["tokens"], torch.where(live, tokens, 0))  # (batch, time, d_in)
    vectors = torch.where(live[..., None], vectors, 0).transpose(1, 2)  # (batch, d_in, time); 0 after the end
    pooled = []
    for k, p in zip(cfg.windows, params["convs"], strict=True):
        h = torch.relu(conv(p, vectors, padding=k - 1))  # (batch, width, time + k - 1)
        ends = torch.arange(h.shape[2], device=h.device)  # (time + k - 1,)
        inside = (ends < lengths + k - 1) & (lengths > 0)  # (batch, time + k - 1): the window has a token of the text
        pooled.append(torch.where(inside[:, None], h, 0).amax(2))  # (batch, width); relu(h) >= 0
    return dropout(torch.cat(pooled, 1), cfg.dropout, key, train)  # (batch, width * len(windows))


def apply(
    params: dict, x: tuple[Tensor, Tensor], cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """Logits of a batch of texts, (batch, outputs).

    Args:
        x: (tokens, lengths): integers (batch, time) and integers (batch,), the tokens of each text. What comes after
            them is not looked at; a text of none has the pooled filters 0. Every window with a token of the text
            counts, so that a text may be shorter than a window.
        key: (2,) or one per example (batch, 2); needed in training if there is dropout.

    Raises:
        TypeError: x is not two tensors.
        ValueError: shapes that do not fit, lengths out of range, no key where one is needed.
    """
    return linear(params["head"], features(params, x, cfg, key=key, train=train))
