"""Random draws of a lifted module from a key, in place of torch's global generator.

Inside `Draws(key)` dropout of every kind, attention's too, and the functions of torch that draw uniform, normal or
Bernoulli values draw from `fold_in(key, 0)`, `fold_in(key, 1)` ... in the order of their calls. With a key per example
(batch, 2) each example has masks of its own, whatever the others are; what is drawn must lead with the batch then.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from core import random
from core.attention import torch_attention
from core.layers.dropout import dropout, dropout_channels
from core.per_example.leaves import invoke
from core.threefry import check_key

SELU_LIMIT = -1.7580993408473766
"""The value of SELU at minus infinity, which alpha dropout puts in place of what it drops."""


class Draws(TorchFunctionMode):
    """Functions that draw take `key`, (2,) or one per example (batch, 2).

    Raises ValueError: from a function that draws and has no form here (`torch.randint`, `F.rrelu` ...), and where a key
    per example meets a shape that does not lead with the batch.
    """

    def __init__(self, key: Tensor):
        super().__init__()
        check_key(key)
        self.key, self.site = key, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _RULES:
            out = _RULES[func](self, *args, **kwargs)
            return invoke(func, args, kwargs) if out is NotImplemented else out
        if func in _REFUSED and _REFUSED[func](*args, **kwargs):
            raise ValueError(f"lift: {func.__name__} draws random numbers, and takes no key here")
        return invoke(func, args, kwargs)

    def next_key(self) -> Tensor:
        """Key of the next place that draws."""
        self.site += 1
        return random.fold_in(self.key, self.site - 1)

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """In [0, 1), float32."""
        return self._drawn(random.uniform, shape)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal of a shape."""
        return self._drawn(random.normal, shape)

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        key, shape = self.next_key(), tuple(shape)
        if key.ndim == 1:
            return draw(key, shape)
        if shape[:1] != key.shape[:1]:
            raise ValueError(f"lift: keys of {len(key)} examples, but values of shape {shape} are drawn")
        return torch.func.vmap(lambda one: draw(one, shape[1:]))(key)


def _dropout(draws: Draws, input, p=0.5, training=True, inplace=False):
    if not training or p == 0:
        return NotImplemented
    return input * 0 if p == 1 else dropout(input, p, draws.next_key())


def _dropout_of_channels(dims: int) -> Callable:
    def rule(draws: Draws, input, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return NotImplemented
        if input.ndim != dims + 2:
            raise ValueError(f"lift: dropout{dims}d of {tuple(input.shape)}; with a key, (batch, channels, *space)")
        return input * 0 if p == 1 else dropout_channels(input, p, draws.next_key())

    return rule


def _alpha_dropout(draws: Draws, input, p=0.5, training=False, inplace=False):
    """Klambauer et al. 2017, arXiv:1706.02515: a (x mask + limit (1 - mask)) + b, of the mean and variance of x."""
    if not training or p == 0:
        return NotImplemented
    a = ((1 - p) * (1 + p * SELU_LIMIT**2)) ** -0.5
    mask = draws.uniform(input.shape) >= p
    return a * torch.where(mask, input, SELU_LIMIT) - a * SELU_LIMIT * p


def _attention(draws: Draws, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    if dropout_p == 0:
        return NotImplemented
    drop = partial(dropout, rate=dropout_p, key=draws.next_key())
    return torch_attention(query, key, value, attn_mask, is_causal, drop=drop, **options)


def _of_size(name: str) -> Callable:
    """torch.rand and torch.randn."""

    def rule(draws: Draws, *size, dtype=None, device=None, **options):
        shape = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else options.get("size", size)
        out = getattr(draws, name)(shape)
        return out.to(device, torch.get_default_dtype() if dtype is None else dtype)

    return rule


def _like(name: str) -> Callable:
    def rule(draws: Draws, input, *, dtype=None, device=None, **options):
        return getattr(draws, name)(input.shape).to(input.device if device is None else device, dtype or input.dtype)

    return rule


def _bernoulli(draws: Draws, input, p=None, **options):
    share = input if p is None else p
    return (draws.uniform(input.shape) < share).to(input.dtype)


def _bernoulli_(draws: Draws, input, p=0.5, **options):
    return input.copy_(draws.uniform(input.shape) < p)


def _uniform_(draws: Draws, input, low=0.0, high=1.0, **options):
    low, high = options.get("from", low), options.get("to", high)
    return input.copy_(low + (high - low) * draws.uniform(input.shape))


def _normal_(draws: Draws, input, mean=0.0, std=1.0, **options):
    return input.copy_(mean + std * draws.normal(input.shape))


_RULES: dict[Callable, Callable] = {
    F.alpha_dropout: _alpha_dropout,
    F.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_,
    Tensor.normal_: _normal_,
    Tensor.uniform_: _uniform_,
    torch.alpha_dropout: _alpha_dropout,
    torch.bernoulli: _bernoulli,
    torch.dropout: _dropout,
    torch.rand: _of_size("uniform"),
    torch.rand_like: _like("uniform"),
    torch.randn: _of_size("normal"),
    torch.randn_like: _like("normal"),
    **{f: _dropout_of_channels(n) for n, f in enumerate((F.dropout1d, F.dropout2d, F.dropout3d), 1)},
}


def _always(*args, **kwargs) -> bool:
    return True


def _in_training(input, *args, training=False, **kwargs) -> bool:
    return training or True in args


def _with_dropout(*args, training=True, dropout_p=0.0, **kwargs) -> bool:
    return training and (args[11] if len(args) > 11 else dropout_p) > 0


# What draws otherwise, and when.
_REFUSED: dict[Callable, Callable[..., bool]] = {
    **dict.fromkeys((F.feature_alpha_dropout, F.rrelu, torch.rrelu), _in_training),
    **dict.fromkeys((F.gumbel_softmax, F.fractional_max_pool2d, F.fractional_max_pool3d), _always),
    **dict.fromkeys((torch.multinomial, torch.normal, torch.poisson, torch.randint, torch.randint_like), _always),
    **dict.fromkeys((torch.randperm, Tensor.multinomial, Tensor.random_, Tensor.exponential_, Tensor.cauchy_), _always),
    **dict.fromkeys((Tensor.geometric_, Tensor.log_normal_), _always),
    F.multi_head_attention_forward: _with_dropout,
}
