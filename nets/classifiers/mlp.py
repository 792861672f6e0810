"""Multilayer perceptron (MLP): linear layers with an activation between them.

    h_0 = x,   h_i = act(W_i h_(i-1) + b_i),   logits = W_n h_(n-1) + b_n

Rumelhart, Hinton and Williams 1986, "Learning representations by back-propagating errors" (Nature).
"""

from dataclasses import dataclass

from torch import Tensor

from core import initializers, random
from core.layers import activation, dropout, linear, linear_spec
from core.layers.checks import check_arguments


@dataclass(frozen=True)
class Config:
    """Widths from input to output (at least two), the activation between layers, dropout rate of the hidden units."""

    widths: tuple[int, ...] = (64, 128, 128, 10)
    activation: str = "relu"
    dropout: float = 0.0

    def __post_init__(self):
        if len(self.widths) < 2:
            raise ValueError(f"mlp: widths {self.widths} need at least an input and an output")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"mlp: dropout {self.dropout} is outside [0, 1)")


PRESETS = {
    "digits": Config(),
    "mnist": Config((784, 512, 512, 10)),
    "mnist-dropout": Config((784, 800, 800, 10), dropout=0.5),
}


def spec(cfg: Config) -> dict:
    """`layers.i.weight` and `layers.i.bias`, He-initialised (He et al. 2015)."""
    init = initializers.kaiming_uniform(nonlinearity="relu")
    pairs = zip(cfg.widths[:-1], cfg.widths[1:], strict=True)
    return {"layers": [linear_spec(d_in, d_out, init=init) for d_in, d_out in pairs]}


def feature_maps(
    params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> list[Tensor]:
    """The hidden layers, (batch, width) each: those of an MLP have no height and width.

    Args:
        x: (batch, ...), flattened to (batch, widths[0]).
        key: (2,) or one per example (batch, 2); needed in training if there is dropout.
    """
    hidden = params["layers"][:-1]
    dropping = train and cfg.dropout > 0.0
    if dropping and key is None:
        raise ValueError(f"mlp: training with dropout {cfg.dropout} draws random numbers; pass key=")
    keys = random.sites(key, len(hidden)) if dropping else [None] * len(hidden)
    x, maps = x.flatten(1), []  # (batch, widths[0])
    for p, k in zip(hidden, keys, strict=True):
        x = dropout(activation(cfg.activation)(linear(p, x)), cfg.dropout, k, train)  # (batch, widths[i + 1])
        maps.append(x)
    return maps


def features(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Penultimate features: the last hidden layer, or the input if there is none. -> (batch, widths[-2])."""
    return [x.flatten(1), *feature_maps(params, x, cfg, key=key, train=train)][-1]


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of a batch. x: (batch, ...) -> (batch, widths[-1]); key as in `feature_maps`."""
    check_arguments("mlp", params, x)
    return linear(params["layers"][-1], features(params, x, cfg, key=key, train=train))
