"""Classifier-free guidance: a conditional and an unconditional prediction combined (Ho and Salimans 2022)."""

import torch
from torch import Tensor

from train.diffusion.tables import Model


def guided(conditional: Model, unconditional: Model, scale: float) -> Model:
    """The model unconditional + scale (conditional - unconditional), for any sampler.

    Ho and Salimans 2022, arXiv:2207.12598, eq. 6.

    Args:
        conditional, unconditional: `(x, time) -> output`. With twice the channels, the variance half is the conditional
            model's.
        scale: 0 is the unconditional model, 1 the conditional one, above 1 extrapolates; the paper's 1 + w.
    """

    def model(x: Tensor, time: Tensor) -> Tensor:
        return _combine(conditional(x, time), unconditional(x, time), x, scale)

    return model


def guided_together(model, classes: Tensor, no_class: Tensor, scale: float) -> Model:
    """`guided`, with both predictions from one batch of twice the size.

    Args:
        model: `(x, time, classes) -> output`.
        classes: (batch, ...) classes to sample.
        no_class: of the same shape, the model's code for no class.
    """
    if classes.shape != no_class.shape:
        raise ValueError(f"classes {tuple(classes.shape)} and no_class {tuple(no_class.shape)} must have one shape")

    def together(x: Tensor, time: Tensor) -> Tensor:
        output = model(torch.cat([x, x]), torch.cat([time, time]), torch.cat([classes, no_class]))
        return _combine(*output.chunk(2), x, scale)

    return together


def _combine(conditional: Tensor, unconditional: Tensor, x: Tensor, scale: float) -> Tensor:
    channels = x.shape[1]
    # unconditional + scale (conditional - unconditional)
    mixed = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale)
    return torch.cat([mixed, conditional[:, channels:]], 1)  # (batch, channels or twice the channels, ...)
