"""Normalisation: layer, RMS, group, instance and batch norm.

    y = (x - mean) / sqrt(var + eps) * weight + bias

They differ in what mean and var are taken over. Without weight and bias (`p` is `{}`) the last two steps fall away.
Statistics of half-precision inputs are taken in float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from core.initializers import Initializer, ones, zeros
from core.spec import Param, Stat
from core.tap import tap
from core.tree import Tree

Axes = tuple[str | None, ...]


def layer_norm_spec(
    shape: int | tuple[int, ...],
    *,
    affine: bool = True,
    bias: bool = True,
    init: Initializer = ones,
    axes: Axes | None = None,
) -> Tree:
    """weight and bias of `shape`, the sizes of the normalised last axes; `{}` unless affine."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    axes = (None,) * len(shape) if axes is None else axes
    return _affine(shape, affine, bias, init, axes)


def layer_norm(p: Tree, x: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Over the last axes, each position by itself. Ba et al. 2016, arXiv:1607.06450. x: (..., *shape).

    Without a weight it is over the last axis. Raises ValueError if x does not end in the weight's shape.
    """
    return F.layer_norm(x, _last_axes("layer_norm", p, x), p.get("weight"), p.get("bias"), eps)


def rms_norm_spec(
    shape: int | tuple[int, ...], *, affine: bool = True, init: Initializer = ones, axes: Axes | None = None
) -> Tree:
    """weight of `shape`, the sizes of the normalised last axes; `{}` unless affine."""
    return layer_norm_spec(shape, affine=affine, bias=False, init=init, axes=axes)


def rms_norm(p: Tree, x: Tensor, *, eps: float | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axes. Zhang & Sennrich 2019, arXiv:1910.07467. x: (..., *shape).

    Args:
        eps: None is the machine epsilon of the precision it computes in, as in torch.nn.RMSNorm.

    Raises:
        ValueError: x does not end in the weight's shape.
    """
    # Not F.rms_norm, whose Python part Dynamo does not trace where the weight is a stand-in (core.per_example).
    return torch.rms_norm(x, _last_axes("rms_norm", p, x), p.get("weight"), eps)


def group_norm_spec(
    channels: int, *, affine: bool = True, init: Initializer = ones, axes: tuple[str | None] = (None,)
) -> Tree:
    """weight and bias (channels,); `{}` unless affine."""
    return _affine((channels,), affine, True, init, axes)


def group_norm(p: Tree, x: Tensor, groups: int, *, eps: float = 1e-5) -> Tensor:
    """Over space and each of `groups` groups of channels. Wu & He 2018, arXiv:1803.08494. x: (batch, channels, *space).

    Raises ValueError if groups does not divide the channels, or they are not the weight's.
    """
    channels = _channels("group_norm", p, x)
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm: {groups} groups do not divide {channels} channels")
    return F.group_norm(x, groups, p.get("weight"), p.get("bias"), eps)


def instance_norm_spec(
    channels: int, *, affine: bool = True, init: Initializer = ones, axes: tuple[str | None] = (None,)
) -> Tree:
    """weight and bias (channels,); `{}` unless affine."""
    return group_norm_spec(channels, affine=affine, init=init, axes=axes)


def instance_norm(p: Tree, x: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Over space, each channel by itself. Ulyanov et al. 2016, arXiv:1607.08022. x: (batch, channels, *space).

    Raises ValueError if the channels are not the weight's.
    """
    return F.group_norm(x, _channels("instance_norm", p, x), p.get("weight"), p.get("bias"), eps)


def batch_norm_spec(
    channels: int, *, affine: bool = True, init: Initializer = ones, axes: tuple[str | None] = (None,)
) -> Tree:
    """weight and bias (channels,) if affine; the Stats mean and var (channels,) and count (), the updates so far."""
    stats = {
        "count": Stat((), zeros),
        "mean": Stat((channels,), zeros, axes),
        "var": Stat((channels,), ones, axes),
    }
    both = {**_affine((channels,), affine, True, init, axes), **stats}
    return {name: both[name] for name in sorted(both)}


def batch_norm(p: Tree, x: Tensor, *, train: bool, momentum: float | None = 0.1, eps: float = 1e-5) -> Tensor:
    """Over batch and space, each channel by itself. Ioffe & Szegedy 2015, arXiv:1502.03167.

    x: (batch, channels, *space).

    Training normalises with the batch's mean and variance and reports to the Stats by taps (`core.tap`): to mean and
    var `momentum * (batch's - running)`, the variance being the unbiased one, and 1 to count. The gradient by the
    Stats is thus their increment, which `core.stats.update` applies. Otherwise the Stats normalise, as constants.

    Args:
        momentum: None is 1 / (count + 1), which makes the Stats the plain mean over all batches.

    Raises:
        ValueError: the channels are not those of the Stats; or there is one value a channel in training.
    """
    channels = p["mean"].shape[0]
    if x.ndim < 2 or x.shape[1] != channels:
        raise ValueError(f"batch_norm: expected x of shape (batch, {channels}, *space), found {tuple(x.shape)}")
    return _by_batch(p, x, momentum, eps) if train else _by_stats(p, x, eps)


def _by_batch(p: Tree, x: Tensor, momentum: float | None, eps: float) -> Tensor:
    """Normalise with the batch's mean and variance, and tap the Stats' increments."""
    y, mean, var = _normalised(p, x, eps)
    rate = 1 / (p["count"] + 1) if momentum is None else momentum
    y = tap(y, p["mean"], rate * (mean - p["mean"]))
    y = tap(y, p["var"], rate * (var - p["var"]))
    # From a batched value, so that each of a vmapped batch counts.
    return tap(y, p["count"], torch.ones_like(mean.sum()))


def _normalised(p: Tree, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, the batch's mean, its unbiased variance), the two in float32 or wider."""
    weight, bias = p.get("weight"), p.get("bias")
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == wide:
        # With momentum 1 the kernel writes what it measures into these two, which spares one more pass over x. Made
        # from x, they are batched where x is.
        mean, var = (x.detach().new_zeros(x.shape[1:2]) for _ in range(2))
        return F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=eps), mean, var
    # Under vmap the kernel takes no statistics wider than x.
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    var, mean = torch.var_mean(x.detach().to(wide), [0, *range(2, x.ndim)], correction=1)
    return y, mean, var


def _by_stats(p: Tree, x: Tensor, eps: float) -> Tensor:
    """Normalise with the Stats. Not F.batch_norm, which has no batching rule here when vmap is compiled."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, var = p["mean"].detach().to(wide), p["var"].detach().to(wide)
    scale = torch.rsqrt(var + eps)
    if "weight" in p:
        scale = scale * p["weight"]
    shift = p["bias"] - mean * scale if "bias" in p else -mean * scale
    space = (-1,) + (1,) * (x.ndim - 2)
    return torch.addcmul(shift.reshape(space), x.to(wide), scale.reshape(space)).to(x.dtype)


def _affine(shape: tuple[int, ...], affine: bool, bias: bool, init: Initializer, axes: Axes) -> Tree:
    if not affine:
        return {}
    weight = Param(shape, init, axes)
    return {"bias": Param(shape, zeros, axes), "weight": weight} if bias else {"weight": weight}


def _last_axes(name: str, p: Tree, x: Tensor) -> tuple[int, ...]:
    """The sizes of the axes to normalise, once x is known to end in them."""
    shape = tuple(p["weight"].shape) if "weight" in p else tuple(x.shape[-1:])
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"{name}: expected x to end in {shape}, found {tuple(x.shape)}")
    return shape


def _channels(name: str, p: Tree, x: Tensor) -> int:
    """x's channels, once they are known to be the weight's."""
    if x.ndim < 2 or ("weight" in p and x.shape[1] != p["weight"].shape[0]):
        channels = p["weight"].shape[0] if "weight" in p else "channels"
        raise ValueError(f"{name}: expected x of shape (batch, {channels}, *space), found {tuple(x.shape)}")
    return x.shape[1]
