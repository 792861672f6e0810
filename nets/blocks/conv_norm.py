"""Blocks of image networks: convolution with norm and activation, squeeze-and-excitation, inverted residuals, patches.

Also the parts of rename tables for their names in other libraries' files.
"""

from torch import Tensor
from torch.nn import functional as F

from core import initializers, nodes, random
from core.initializers import Initializer
from core.layers import (
    activation,
    batch_norm,
    batch_norm_spec,
    conv,
    conv_spec,
    global_average_pool,
)
from core.tree import Tree
from nets.weights import Rename, fill

HE = initializers.kaiming_normal(mode="fan_out", nonlinearity="relu")
"""He et al. 2015, eq. 14: torchvision's initialisation of convolutions in ResNets and their successors."""

Sizes = int | tuple[int, ...]


def conv_norm_spec(
    d_in: int, d_out: int, kernel: Sizes, *, groups: int = 1, init: Initializer = HE, scale: Initializer | None = None
) -> Tree:
    """A convolution without bias, which batch norm would cancel, and batch norm.

    Args:
        scale: initialiser of the norm's weight, by default ones.
    """
    options = {} if scale is None else {"init": scale}
    return {
        "conv": conv_spec(d_in, d_out, kernel, groups=groups, bias=False, init=init),
        "norm": batch_norm_spec(d_out, **options),
    }


def conv_norm(
    p: Tree,
    x: Tensor,
    act: str | None = "relu",
    *,
    train: bool,
    stride: Sizes = 1,
    padding: Sizes | str = "symmetric",
    groups: int = 1,
    dilation: int = 1,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> Tensor:
    """y = act(norm(conv(x))). x: (batch, d_in, height, width) -> (batch, d_out, height', width').

    Args:
        act: a name of `core.layers.ACTIVATIONS`, None for the identity.
        padding: "symmetric" is half the kernel: with stride 1 and an odd kernel the size stays. "tensorflow" gives
            ceil(size / stride) pixels; where it has an odd number of rows or columns to add, the right and the bottom
            get one more.
        eps, momentum: as in `core.layers.batch_norm`.

    Parameters of `folded` have no norm any more, and are for evaluation alone.
    """
    if train and "norm" not in p:
        raise ValueError("conv_norm: parameters whose batch norm was folded into the convolution cannot be trained")
    kernel = p["conv"]["weight"].shape[2:]
    if padding == "tensorflow" and stride != 1:
        x, padding = F.pad(x, _tensorflow_padding(x, kernel, stride)), 0
    elif isinstance(padding, str):
        padding = tuple(dilation * (k - 1) // 2 for k in kernel)
    y = conv(p["conv"], x, stride=stride, padding=padding, groups=groups, dilation=dilation)  # (batch, d_out, h', w')
    if "norm" in p:
        y = batch_norm(p["norm"], y, train=train, eps=eps, momentum=momentum)
    return y if act is None else activation(act)(y)


def folded(params: Tree, *, eps: float) -> Tree:
    """Parameters and Stats of a net of `conv_norm` blocks with each batch norm folded into its convolution.

        W' = s W,   b' = β - s μ,   s = γ / sqrt(σ² + eps)

    In evaluation the outputs are the same but for rounding, one pass over each feature map is saved, and quantisers
    meet plain convolutions. Nets with batch norm elsewhere (before the convolution, as in DenseNet) do not take them:
    they miss the norm by name.

    Args:
        eps: that of the net's norms, 1e-5 in most.

    Raises:
        ValueError: there is no such block.
    """
    count = 0

    def walk(node: Tree) -> Tree:
        nonlocal count
        if isinstance(node, dict) and set(node) == {"conv", "norm"} and {"mean", "var"} <= set(node["norm"]):
            count += 1
            conv, norm = node["conv"], node["norm"]
            s = (norm["var"] + eps).rsqrt() * norm.get("weight", 1.0)  # (d_out,)
            bias = norm.get("bias", 0.0) + s * (conv.get("bias", 0.0) - norm["mean"])
            weight = conv["weight"] * s.view(-1, *(1,) * (conv["weight"].ndim - 1))
            return {"conv": {"bias": bias, "weight": weight}}
        inner = nodes.children(node)
        return node if inner is None else nodes.rebuild(node, [walk(child) for _, child in inner])

    out = walk(params)
    if not count:
        raise ValueError("folded: there is no block of a convolution and its batch norm, {'conv': ..., 'norm': ...}")
    return out


def _tensorflow_padding(x: Tensor, kernel: tuple[int, int], stride: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom), along each axis max((ceil(n / stride) - 1) stride + k - n, 0) in all."""
    rows, columns = (max((-(-n // stride) - 1) * stride + k - n, 0) for n, k in zip(x.shape[2:], kernel, strict=True))
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2


def norm_names(ours: str, theirs: str) -> dict[str, Rename]:
    """Part of a rename table for batch norm, with the names of torch.nn.BatchNorm2d."""
    names = {
        "bias": "bias",
        "count": "num_batches_tracked",
        "mean": "running_mean",
        "var": "running_var",
        "weight": "weight",
    }
    return {f"{ours}.{a}": Rename(f"{theirs}.{b}") for a, b in names.items()}


def conv_norm_names(ours: str, conv: str, norm: str) -> dict[str, Rename]:
    """Part of a rename table for a `conv_norm`."""
    return {f"{ours}.conv.weight": Rename(f"{conv}.weight"), **norm_names(f"{ours}.norm", norm)}


def affine_names(ours: str, theirs: str) -> dict[str, Rename]:
    """Part of a rename table for a weight and a bias."""
    return {f"{ours}.{name}": Rename(f"{theirs}.{name}") for name in ("bias", "weight")}


def fill_published(spec: Tree, state: dict[str, Tensor], table: dict[str, Rename], source: str) -> Tree:
    """`nets.weights.fill`, but batch norm's counts may be missing: they then start at 0.

    Torch counts batches since version 0.4.1; many published files are older.
    """
    absent = [name for name, rename in table.items() if name.endswith(".count") and rename.theirs not in state]
    return fill(spec, state, {name: rename for name, rename in table.items() if name not in absent}, source)


def fitting_table(state: dict[str, Tensor], *tables: dict[str, Rename]) -> dict[str, Rename]:
    """The rename table, of several libraries' for one net, that knows most of the names in a file."""
    return max(tables, key=lambda table: sum(name in state for rename in table.values() for name in rename.names))


def with_base_prefix(state: dict[str, Tensor], prefix: str, table: dict[str, Rename]) -> dict[str, Tensor]:
    """The tensors of a file of transformers that holds the net without its head, named as those of the whole net.

    prefix: put before all names but the head's in a file of the whole net, such as "resnet.".
    """
    names = {name for rename in table.values() for name in rename.names}
    return {prefix + name if prefix + name in names else name: x for name, x in state.items()}


def squeeze_excite_spec(channels: int, squeezed: int) -> Tree:
    """Two 1x1 convolutions, to `squeezed` channels and back."""
    return {"reduce": conv_spec(channels, squeezed, 1, init=HE), "restore": conv_spec(squeezed, channels, 1, init=HE)}


def squeeze_excite(p: Tree, x: Tensor, act: str = "relu", gate: str = "sigmoid") -> Tensor:
    """x times a gate per channel, a function of the means of all channels. Hu et al. 2018, arXiv:1709.01507, section 3.

        z = mean of x over space;   s = gate(W_2 act(W_1 z));   y = s x

    x: (batch, channels, height, width) -> the same shape.
    """
    z = global_average_pool(x)[..., None, None]  # (batch, channels, 1, 1)
    s = activation(gate)(conv(p["restore"], activation(act)(conv(p["reduce"], z))))  # s = gate(W_2 act(W_1 z))
    return s * x


def inverted_residual_spec(d_in: int, expanded: int, d_out: int, kernel: int = 3, *, squeezed: int = 0) -> Tree:
    """`expand` unless expanded is d_in, `depthwise`, `squeeze` to that many channels unless 0, and `project`."""
    parts = {"depthwise": conv_norm_spec(expanded, expanded, kernel, groups=expanded)}
    if expanded != d_in:
        parts["expand"] = conv_norm_spec(d_in, expanded, 1)
    parts["project"] = conv_norm_spec(expanded, d_out, 1)
    if squeezed:
        parts["squeeze"] = squeeze_excite_spec(expanded, squeezed)
    return parts


def inverted_residual(
    p: Tree,
    x: Tensor,
    act: str,
    *,
    train: bool,
    stride: int = 1,
    padding: str = "symmetric",
    gate: str = "hard_sigmoid",
    **norm: float,
) -> Tensor:
    """Inverted residual with a linear bottleneck. Sandler et al. 2018, arXiv:1801.04381, table 1 and figure 4.

        y = x + project(squeeze(act(depthwise(act(expand(x))))))

    x: (batch, d_in, height, width) -> (batch, d_out, height / stride, width / stride), rounded up. x is added only
    where the stride is 1 and d_out = d_in; after `project` there is no activation.

    Args:
        padding: of the depthwise convolution, as in `conv_norm`.
        gate: of squeeze-and-excitation.
        norm: eps and momentum, as in `conv_norm`.
    """
    y = conv_norm(p["expand"], x, act, train=train, **norm) if "expand" in p else x  # (batch, expanded, height, width)
    channels = y.shape[1]
    y = conv_norm(p["depthwise"], y, act, train=train, stride=stride, padding=padding, groups=channels, **norm)
    if "squeeze" in p:
        y = squeeze_excite(p["squeeze"], y, gate=gate)
    y = conv_norm(p["project"], y, None, train=train, **norm)  # (batch, d_out, height', width')
    return x + y if stride == 1 and x.shape[1] == y.shape[1] else y


def divisible(channels: float, by: int = 8) -> int:
    """The nearest multiple of `by`, at least one, and at least 0.9 of the channels: the widths of scaled MobileNets."""
    nearest = max(by, int(channels + by / 2) // by * by)
    return nearest if nearest >= 0.9 * channels else nearest + by


def fan_uniform(fan_in: int) -> dict[str, Initializer]:
    """Options of a spec: weight and bias uniform within 1 / sqrt(fan_in), the default of torch.nn."""
    init = initializers.uniform(-(fan_in**-0.5), fan_in**-0.5)
    return {"bias_init": init, "init": init}


def dropout_keys(name: str, rate: float, key: Tensor | None, sites: int, train: bool) -> list[Tensor | None]:
    """A key per site of dropout, or Nones where nothing is drawn.

    Args:
        name: of the net, for the error.
        key: (2,), or one per example (batch, 2).

    Raises:
        ValueError: there is dropout, but no key.
    """
    if not train or rate == 0:
        return [None] * sites
    if key is None:
        raise ValueError(f"{name}: training with dropout {rate} draws random numbers; pass key=")
    return list(random.sites(key, sites).unbind(0))


def patch_embedding_spec(channels: int, width: int, patch: int, *, init: Initializer) -> Tree:
    """Linear map of patches of patch * patch pixels, in the form of a convolution's weight, and a bias."""
    return conv_spec(channels, width, patch, init=init)


def patch_embedding(p: Tree, x: Tensor) -> Tensor:
    """Cut the images into patches that do not overlap and map each to a vector. Dosovitskiy et al. 2021, section 3.1.

    x: (batch, channels, height, width) -> (batch, width, height // patch, width // patch); the rest is cut off.
    """
    return conv(p, x, stride=tuple(p["weight"].shape[2:]))


def check_images(name: str, x: Tensor, channels: int, least: int) -> None:
    """Raise ValueError unless x is (batch, channels, height, width) of at least `least` pixels per side."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{name}: expected images (batch, {channels}, height, width), found {tuple(x.shape)}")
    if min(x.shape[2:]) < least:
        raise ValueError(f"{name}: the images are {x.shape[2]} x {x.shape[3]}; expected at least {least} a side")
