"""LeNet-5: two convolutions, two poolings and three linear layers, for digits.

LeCun, Bottou, Bengio and Haffner 1998, "Gradient-Based Learning Applied to Document Recognition" (Proceedings of the
IEEE):

    x_i = pool(tanh(conv_i(x_(i-1)))),  i = 1, 2;    logits = W_3 tanh(W_2 tanh(W_1 x_2))

As commonly written since: each channel of the second convolution sees all channels of the first, the poolings have no
weights, and the output is linear; the paper's 32x32 images are 28x28 ones padded by two pixels.
"""

from dataclasses import dataclass

from torch import Tensor

from core.layers import activation, average_pool, conv, conv_spec, linear, linear_spec, max_pool
from nets.blocks.conv_norm import affine_names, check_images, fan_uniform
from nets.weights import Rename, fill, read

POOLS = {"average": average_pool, "max": max_pool}


@dataclass(frozen=True)
class Config:
    """Sizes of LeNet; `widths` are the channels of the convolutions, each of which is followed by 2x2 pooling."""

    widths: tuple[int, ...] = (6, 16)
    hidden: tuple[int, ...] = (120, 84)
    size: int = 28
    """Pixels a side of the images."""
    kernel: int = 5
    padding: tuple[int, ...] = (2, 0)
    """Padding of each convolution."""
    activation: str = "tanh"
    pool: str = "average"
    channels: int = 1
    classes: int = 10

    def __post_init__(self):
        if self.pool not in POOLS:
            raise ValueError(f"lenet: pool '{self.pool}'; expected one of {', '.join(POOLS)}")
        if not self.widths or len(self.widths) != len(self.padding):
            raise ValueError(f"lenet: widths {self.widths} and padding {self.padding}; expected one per convolution")
        activation(self.activation)
        if self.pooled < 1:
            raise ValueError(f"lenet: nothing is left of images of {self.size} x {self.size} after the poolings")

    @property
    def pooled(self) -> int:
        """Pixels a side after the last pooling."""
        size = self.size
        for padding in self.padding:
            size = max(0, size + 2 * padding - self.kernel + 1) // 2
        return size


PRESETS = {
    "lenet5": Config(),
    "lenet5-relu": Config(activation="relu", pool="max"),
    # For the 8x8 digits of scikit-learn.
    "lenet-digits": Config((16, 32), (64,), size=8, kernel=3, padding=(1, 1), activation="relu", pool="max"),
}


def spec(cfg: Config) -> dict:
    """`convs.i`, `hidden.i` and `head`."""
    inputs = (cfg.channels, *cfg.widths[:-1])
    sizes = (cfg.widths[-1] * cfg.pooled**2, *cfg.hidden)
    return {
        "convs": [
            conv_spec(d_in, d_out, cfg.kernel, **fan_uniform(d_in * cfg.kernel**2))
            for d_in, d_out in zip(inputs, cfg.widths, strict=True)
        ],
        "head": linear_spec(sizes[-1], cfg.classes, **fan_uniform(sizes[-1])),
        "hidden": [
            linear_spec(d_in, d_out, **fan_uniform(d_in)) for d_in, d_out in zip(sizes[:-1], sizes[1:], strict=True)
        ],
    }


def feature_maps(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """The output of each convolution before its pooling, (batch, channels, height, width) each.

    Args:
        x: (batch, channels, size, size).
        train: without effect here.

    Raises:
        ValueError: images of other channels or another size.
    """
    check_images("lenet", x, cfg.channels, 1)
    if tuple(x.shape[2:]) != (cfg.size, cfg.size):
        raise ValueError(f"lenet: the images are {x.shape[2]} x {x.shape[3]}; expected {cfg.size} x {cfg.size}")
    maps = []
    for p, padding in zip(params["convs"], cfg.padding, strict=True):
        x = POOLS[cfg.pool](maps[-1], 2) if maps else x  # (batch, width, height / 2, height / 2)
        maps.append(activation(cfg.activation)(conv(p, x, padding=padding)))  # (batch, width, height, height)
    return maps


def features(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """Penultimate features: the last hidden layer. (batch, channels, size, size) -> (batch, d)."""
    x = POOLS[cfg.pool](feature_maps(params, x, cfg, train=train)[-1], 2).flatten(1)  # (batch, widths[-1] * pooled**2)
    for p in params["hidden"]:
        x = activation(cfg.activation)(linear(p, x))  # (batch, hidden[i])
    return x


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of images. x: (batch, channels, size, size) -> (batch, classes). No key is needed."""
    return linear(params["head"], features(params, x, cfg, train=train))


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> the usual ones: conv1, conv2 ... and fc1, fc2 ... with the head as the last of them."""
    layers = {f"convs.{i}": f"conv{i + 1}" for i in range(len(cfg.widths))}
    layers |= {f"hidden.{i}": f"fc{i + 1}" for i in range(len(cfg.hidden))}
    layers["head"] = f"fc{len(cfg.hidden) + 1}"
    return {ours: rename for layer in layers.items() for ours, rename in affine_names(*layer).items()}


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters from a file with the names of `rename_table`: a local file or folder, or a hub repository."""
    return fill(spec(cfg), read(source), rename_table(cfg), source)
