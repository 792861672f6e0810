"""Normalisation: layer, RMS, group, instance and batch norm.

    y = (x - mean) / sqrt(var + eps) * weight + bias

They differ in the axes of mean and var. Without weight and bias (`p` is `{}`) the last two steps are left out. Mean and
variance of half-precision inputs are computed in float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from core import tree
from core.collectives import stack_over
from core.initializers import Initializer, ones, zeros
from core.layers.checks import check_arguments
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
    """Layer norm over the last axes, per position. Ba et al. 2016, arXiv:1607.06450. x: (..., *shape).

    Without a weight it is over the last axis.

    Raises:
        TypeError: p is not a dict, or x not a tensor.
        ValueError: x does not end in the weight's shape.
    """
    return F.layer_norm(x, _last_axes("layer_norm", p, x), p.get("weight"), p.get("bias"), eps)


def rms_norm_spec(
    shape: int | tuple[int, ...], *, affine: bool = True, init: Initializer = ones, axes: Axes | None = None
) -> Tree:
    """weight of `shape`, the sizes of the normalised last axes; `{}` unless affine."""
    return layer_norm_spec(shape, affine=affine, bias=False, init=init, axes=axes)


def rms_norm(p: Tree, x: Tensor, *, eps: float | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axes. Zhang & Sennrich 2019, arXiv:1910.07467. x: (..., *shape).

    Args:
        eps: None is the machine epsilon of the precision it computes in, as in torch.nn.RMSNorm.

    Raises:
        TypeError: p is not a dict, or x not a tensor.
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
    """Group norm over space and each of `groups` groups of channels. Wu & He 2018, arXiv:1803.08494.

    x: (batch, channels, *space).

    Raises:
        TypeError: p is not a dict, or x not a tensor.
        ValueError: groups does not divide the channels, or x has other channels than the weight.
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
    """Instance norm over space, per channel. Ulyanov et al. 2016, arXiv:1607.08022. x: (batch, channels, *space).

    Raises:
        TypeError: p is not a dict, or x not a tensor.
        ValueError: x has other channels than the weight.
    """
    return F.group_norm(x, _channels("instance_norm", p, x), p.get("weight"), p.get("bias"), eps)


def batch_norm_spec(
    channels: int, *, affine: bool = True, init: Initializer = ones, axes: tuple[str | None] = (None,)
) -> Tree:
    """weight and bias (channels,) if affine; the Stats mean and var (channels,) and count (), the number of updates."""
    stats = {
        "count": Stat((), zeros),
        "mean": Stat((channels,), zeros, axes),
        "var": Stat((channels,), ones, axes),
    }
    both = {**_affine((channels,), affine, True, init, axes), **stats}
    return {name: both[name] for name in sorted(both)}


def batch_norm(p: Tree, x: Tensor, *, train: bool, momentum: float | None = 0.1, eps: float = 1e-5) -> Tensor:
    """Batch norm over batch and space, per channel. Ioffe & Szegedy 2015, arXiv:1502.03167.

    x: (batch, channels, *space).

    In training, the batch's mean and variance normalise, and taps (`core.tap`) report to the Stats: to mean and var
    `momentum * (batch's - running)`, with the unbiased variance, and 1 to count. So the gradient by the Stats is their
    increment, which `core.stats.update` applies. Otherwise the Stats normalise, as constants; also in training, where
    `freeze_batch_norms` marks the norm.

    Args:
        momentum: None is 1 / (count + 1), which makes the Stats the plain mean over all batches.

    Raises:
        TypeError: p is not a dict, or x not a tensor.
        ValueError: p has no Stats; x has other channels than they; or one value per channel in training.
    """
    check_arguments("batch_norm", p, x, needs=("mean", "var"))
    channels = p["mean"].shape[0]
    if x.ndim < 2 or x.shape[1] != channels:
        raise ValueError(f"batch_norm: expected x of shape (batch, {channels}, *space), found {tuple(x.shape)}")
    return _by_batch(p, x, momentum, eps) if train and FROZEN not in p else _by_stats(p, x, eps)


FROZEN = "frozen"
"""The entry of a batch norm by which `freeze_batch_norms` marks it."""


def freeze_batch_norms(params: Tree, frozen: Callable[[str], bool], prefix: str = "") -> Tree:
    """The same parameters and Stats, with the batch norms marked that are frozen: they use and keep their Stats.

    To be called inside a loss, before the net. In training mode a marked norm computes what it computes in eval mode,
    and reports no increments. An optimizer that leaves weight and bias alone does not freeze a batch norm: its output
    would still depend on the batch, and its Stats would follow the new data. Nothing recompiles, as the mark is a part
    of the tree's structure.

    Args:
        params: parameters and Stats of a net, merged.
        frozen: predicate of a leaf's dotted name. A norm is frozen if its weight and bias are; one without them, if its
            Stats are.
        prefix: put before all names, such as "encoder.".
    """
    inner = tree.children(params)
    if inner is None:
        return params
    params = tree.rebuild(params, [freeze_batch_norms(child, frozen, f"{prefix}{key}.") for key, child in inner])
    if not isinstance(params, dict) or not {"count", "mean", "var"} <= params.keys():
        return params
    names = params.keys() & {"bias", "weight"} or params.keys()
    return tree.sort({**params, FROZEN: params["count"]}) if all(frozen(prefix + name) for name in names) else params


SYNCHRONISED = "synchronised"
"""The entry of a batch norm by which `synchronise_batch_norms` marks it."""


def synchronise_batch_norms(params: Tree, group: str, ways: int) -> Tree:
    """The same parameters and Stats, with every batch norm marked: in training it normalises with the mean and variance
    over the batches of all processes of a group, which are equally large.

    To be called inside a loss, before the net, like `freeze_batch_norms`. One collective per norm, forward and
    backward.

    Args:
        group, ways: see `core.collectives`.
    """
    inner = tree.children(params)
    if inner is None:
        return params
    params = tree.rebuild(params, [synchronise_batch_norms(child, group, ways) for _, child in inner])
    if not isinstance(params, dict) or not {"count", "mean", "var"} <= params.keys():
        return params
    return tree.sort({**params, SYNCHRONISED: (group, ways)})


def _by_batch(p: Tree, x: Tensor, momentum: float | None, eps: float) -> Tensor:
    """Normalise with the batch's mean and variance, and tap the Stats' increments."""
    y, mean, var = _normalised_together(p, x, eps) if SYNCHRONISED in p else _normalised(p, x, eps)
    rate = 1 / (p["count"] + 1) if momentum is None else momentum
    y = tap(y, p["mean"], rate * (mean - p["mean"]))
    y = tap(y, p["var"], rate * (var - p["var"]))
    # Of a batched value, so that each slice of a vmapped batch counts.
    return tap(y, p["count"], torch.ones_like(mean.sum()))


def _normalised(p: Tree, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, the batch's mean, its unbiased variance), the latter two in float32 or wider."""
    weight, bias = p.get("weight"), p.get("bias")
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == wide:
        # With momentum 1 the kernel writes the batch's mean and variance into these two, which saves a pass over x.
        # Created from x, they are batched where x is.
        mean, var = (x.detach().new_zeros(x.shape[1:2]) for _ in range(2))
        return F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=eps), mean, var
    # Under vmap the kernel takes no statistics wider than x.
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    var, mean = torch.var_mean(x.detach().to(wide), [0, *range(2, x.ndim)], correction=1)
    return y, mean, var


def _normalised_together(p: Tree, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`_normalised` over the batches of all processes.

    mean = avg_r mean_r,   var = avg_r (var_r + (mean_r - mean)²),   r the processes (Chan et al. 1979)

    Not from the mean of x²: at a mean of 1000, its difference to mean² is rounding noise in float32.
    """
    group, ways = p[SYNCHRONISED]
    axes, wide = [0, *range(2, x.ndim)], torch.promote_types(x.dtype, torch.float32)
    space = (-1,) + (1,) * (x.ndim - 2)
    own = torch.stack(torch.var_mean(x.to(wide), axes, correction=0))  # (2, channels)
    variances, means = stack_over(own, group, ways).unbind(1)  # each (ways, channels)
    mean = means.mean(0)  # (channels,)
    var = (variances + (means - mean).square()).mean(0)  # (channels,)
    scale = torch.rsqrt(var + eps)
    y = (x.to(wide) - mean.reshape(space)) * scale.reshape(space)
    if "weight" in p:
        y = y * p["weight"].reshape(space)
    y = y + p["bias"].reshape(space) if "bias" in p else y
    count = ways * x.numel() // x.shape[1]
    if count == 1:
        raise ValueError(f"batch_norm: expected more than 1 value per channel when training, found {tuple(x.shape)}")
    return y.to(x.dtype), mean.detach(), var.detach() * (count / (count - 1))


def _by_stats(p: Tree, x: Tensor, eps: float) -> Tensor:
    """Normalise with the Stats. Not F.batch_norm, which has no batching rule here when vmap is compiled."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, var = p["mean"].detach().to(wide), p["var"].detach().to(wide)
    scale = torch.rsqrt(var + eps)
    if "weight" in p:
        scale = scale * p["weight"]  # weight / sqrt(var + eps), (channels,)
    shift = p["bias"] - mean * scale if "bias" in p else -mean * scale  # (channels,)
    space = (-1,) + (1,) * (x.ndim - 2)
    return torch.addcmul(shift.reshape(space), x.to(wide), scale.reshape(space)).to(x.dtype)  # as x


def _affine(shape: tuple[int, ...], affine: bool, bias: bool, init: Initializer, axes: Axes) -> Tree:
    if not affine:
        return {}
    weight = Param(shape, init, axes)
    return {"bias": Param(shape, zeros, axes), "weight": weight} if bias else {"weight": weight}


def _last_axes(name: str, p: Tree, x: Tensor) -> tuple[int, ...]:
    """The sizes of the axes to normalise, checked against the end of x's shape."""
    check_arguments(name, p, x)
    shape = tuple(p["weight"].shape) if "weight" in p else tuple(x.shape[-1:])
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"{name}: expected x to end in {shape}, found {tuple(x.shape)}")
    return shape


def _channels(name: str, p: Tree, x: Tensor) -> int:
    """The channels of x, checked against the weight's."""
    check_arguments(name, p, x)
    if x.ndim < 2 or ("weight" in p and x.shape[1] != p["weight"].shape[0]):
        channels = p["weight"].shape[0] if "weight" in p else "channels"
        raise ValueError(f"{name}: expected x of shape (batch, {channels}, *space), found {tuple(x.shape)}")
    return x.shape[1]
