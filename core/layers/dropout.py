"""Dropout of single values, whole channels, or whole examples.

    y = x m / (1 - rate),   m ~ Bernoulli(1 - rate)

Each function takes one key (2,), or one key per example (N, 2): then the mask of example i depends on key i alone, so a
micro-batch, a replica and `vmap(grad)` see the masks of the whole batch.

Every m takes 16 random bits, compared as an integer, so that one Threefry block serves four of them. Its probability is
therefore 1 - rate to within 2**-17.
"""

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor

from core import random, threefry
from core.layers.checks import check_tensor


def dropout(x: Tensor, rate: float, key: Tensor | None, train: bool = True) -> Tensor:
    """Dropout: each value is 0 with probability `rate`, else x / (1 - rate). Srivastava et al. 2014, JMLR 15.

    x: (batch, ...).

    Args:
        key: (2,), or (batch, 2). May be None where nothing is drawn (rate 0 or not train: x itself).

    Raises:
        TypeError: x or the key is not a tensor.
        ValueError: rate is outside [0, 1); no key in training; keys that are not one per example.
    """
    return _drop("dropout", x, tuple(x.shape), rate, key, train)


def dropout_channels(x: Tensor, rate: float, key: Tensor | None, train: bool = True) -> Tensor:
    """`dropout` of whole channels, as torch.nn.Dropout1d, 2d and 3d. Tompson et al. 2015, arXiv:1411.4280.

    x: (batch, channels, *space). Key and errors as in `dropout`.
    """
    if x.ndim < 2:
        raise ValueError(f"dropout_channels: expected x of shape (batch, channels, *space), found {tuple(x.shape)}")
    return _drop("dropout_channels", x, tuple(x.shape[:2]), rate, key, train)


def stochastic_depth(x: Tensor, rate: float, key: Tensor | None, train: bool = True) -> Tensor:
    """`dropout` of whole examples, for a residual branch: y + stochastic_depth(f(y), ...). Huang et al. 2016,
    arXiv:1603.09382, with the scale in training rather than at test time.

    x: (batch, ...). Key and errors as in `dropout`.
    """
    return _drop("stochastic_depth", x, tuple(x.shape[:1]), rate, key, train)


def _drop(name: str, x: Tensor, shape: tuple[int, ...], rate: float, key: Tensor | None, train: bool) -> Tensor:
    """x times a mask of `shape`, the leading axes of x."""
    check_tensor(name, x)
    if isinstance(rate, Tensor) and rate.ndim or not 0 <= rate < 1:
        value = f"a tensor of shape {tuple(rate.shape)}" if isinstance(rate, Tensor) and rate.ndim else rate
        raise ValueError(f"{name}: rate must be in [0, 1), found {value}")
    if not train or rate == 0:
        return x
    if key is None:
        raise ValueError(f"{name}: training with rate {rate} needs a key")
    threefry.check_key(key)
    if key.ndim > 2 or (key.ndim == 2 and key.shape[:1] != x.shape[:1]):
        raise ValueError(f"{name}: expected a key (2,) or ({shape[0] if shape else 1}, 2), found {tuple(key.shape)}")
    mask = _mask(key, shape[key.ndim - 1 :], rate)  # shape
    return _masked(x, mask.reshape(shape + (1,) * (x.ndim - len(shape))), rate)


def dropout_sites(key: Tensor, sites: int, shape: tuple[int, ...], rate: float) -> list[Callable[[Tensor], Tensor]]:
    """Dropout at several sites of a net whose values have one shape: a function `x -> dropout of x` per site.

    All masks come from one draw. A Threefry is about 150 nodes of a compiled graph, and one per site would make up most
    of it.

    Args:
        key: (2,) or one per example (shape[0], 2); site i has the masks of `fold_in(key, i)`.
        shape: that of the values, (batch, ...).
    """
    if not 0 < rate < 1:
        raise ValueError(f"dropout_sites: rate must be in (0, 1), found {rate}")
    threefry.check_key(key)
    if key.ndim > 2 or (key.ndim == 2 and key.shape[0] != shape[0]):
        raise ValueError(f"dropout_sites: expected a key (2,) or ({shape[0]}, 2), found {tuple(key.shape)}")
    masks = _mask(random.sites(key, sites), tuple(shape[key.ndim - 1 :]), rate)  # (sites, *shape)
    return [partial(_masked, mask=mask, rate=rate) for mask in masks.unbind(0)]


def _masked(x: Tensor, mask: Tensor, rate: float) -> Tensor:
    return torch.where(mask, x * (1 / (1 - rate)), 0)


def _mask(key: Tensor, shape: tuple[int, ...], rate: float) -> Tensor:
    """True with probability 1 - rate: key.shape[:-1] + shape."""
    count = prod(shape)
    quarters = random.bits(key, (-(-count // 4),), 64).view(torch.int16)  # (..., 4 ceil(count / 4))
    threshold = min(round(rate * 2**16), 2**16 - 1) - 2**15
    return (quarters >= threshold)[..., :count].reshape(key.shape[:-1] + shape)
