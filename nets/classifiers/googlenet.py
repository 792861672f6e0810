"""GoogLeNet, the first Inception network, for images.

Szegedy et al. 2015, "Going Deeper with Convolutions" (arXiv:1409.4842): a block looks at its input at several scales
at once and lays the results side by side,

    y = [conv1x1(x), conv3x3(conv1x1(x)), conv5x5(conv1x1(x)), conv1x1(maxpool(x))]

where the first 1x1 convolutions are narrow and so keep the large ones cheap. In training two auxiliary heads in the
middle bring the gradient closer to the early layers.

As torchvision's, and unlike the paper's, each convolution has a batch norm (eps 0.001), and the 5x5 convolutions are
3x3.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from core import initializers
from core.layers import adaptive_average_pool, dropout, global_average_pool, linear, linear_spec, max_pool
from nets.blocks.conv_norm import (
    affine_names,
    check_images,
    conv_norm,
    conv_norm_names,
    conv_norm_spec,
    dropout_keys,
    fan_uniform,
    fill_published,
)
from nets.weights import Rename, read

EPS = 1e-3

AUX_WEIGHT = 0.3
"""Of each auxiliary head in the loss (section 5 of the paper)."""

Block = tuple[int, int, int, int, int, int]
"""Channels: of the 1x1 branch; before and of the 3x3 branch; before and of the "5x5" branch; of the pooled branch."""

STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
"""Table 1 of the paper."""


@dataclass(frozen=True)
class Config:
    """Three stages of blocks; the stem halves the image three times, and each later stage once more.

    The auxiliary heads are behind the first block of the second stage and before its last.
    """

    stem: tuple[int, int] = (64, 192)
    """Channels of the 7x7 and 1x1 convolutions, and of the 3x3 one."""
    stages: tuple[tuple[Block, ...], ...] = STAGES
    aux: bool = True
    """Whether there are auxiliary heads."""
    aux_sizes: tuple[int, int] = (128, 1024)
    """Channels of the convolution of an auxiliary head, and width of its hidden layer."""
    dropout: float = 0.2
    """Before the head; the paper's is 0.4."""
    aux_dropout: float = 0.7
    std: float = 0.01
    """Deviation of the initial weights, which are normal; torchvision truncates them at 2, which no draw reaches."""
    channels: int = 3
    classes: int = 1000

    def __post_init__(self):
        if len(self.stages) != 3 or not all(self.stages) or len(self.stages[1]) < 2:
            found = [len(blocks) for blocks in self.stages]
            raise ValueError(f"googlenet: stages of {found} blocks; expected three, and two blocks in the second")
        if any(len(block) != 6 for blocks in self.stages for block in blocks):
            raise ValueError("googlenet: a block has six numbers of channels")
        for name in ("dropout", "aux_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"googlenet: {name} {getattr(self, name)} is outside [0, 1)")


PRESETS = {"googlenet": Config()}


class Outputs(NamedTuple):
    """The logits of the three heads, (batch, classes) each."""

    logits: Tensor
    aux1: Tensor
    aux2: Tensor


def _conv_spec(cfg: Config, d_in: int, d_out: int, kernel: int) -> dict:
    return conv_norm_spec(d_in, d_out, kernel, init=initializers.normal(cfg.std))


def _linear_spec(cfg: Config, d_in: int, d_out: int) -> dict:
    return linear_spec(d_in, d_out, **fan_uniform(d_in) | {"init": initializers.normal(cfg.std)})


def _conv(p: dict, x: Tensor, train: bool, stride: int = 1) -> Tensor:
    return conv_norm(p, x, train=train, stride=stride, eps=EPS)


def _block_spec(cfg: Config, d_in: int, block: Block) -> list:
    """Branches, each a list of convolutions."""
    one, before_three, three, before_five, five, pooled = block
    return [
        [_conv_spec(cfg, d_in, one, 1)],
        [_conv_spec(cfg, d_in, before_three, 1), _conv_spec(cfg, before_three, three, 3)],
        [_conv_spec(cfg, d_in, before_five, 1), _conv_spec(cfg, before_five, five, 3)],
        [_conv_spec(cfg, d_in, pooled, 1)],
    ]


def _block(branches: list, x: Tensor, train: bool) -> Tensor:
    starts = [x, x, x, max_pool(x, 3, stride=1, padding=1)]
    outs = []
    for convs, y in zip(branches, starts, strict=True):
        for p in convs:
            y = _conv(p, y, train)
        outs.append(y)
    return torch.cat(outs, 1)


def _aux_spec(cfg: Config, d_in: int) -> dict:
    channels, hidden = cfg.aux_sizes
    return {
        "conv": _conv_spec(cfg, d_in, channels, 1),
        "head": _linear_spec(cfg, hidden, cfg.classes),
        "hidden": _linear_spec(cfg, channels * 4 * 4, hidden),
    }


def _aux(p: dict, x: Tensor, cfg: Config, key: Tensor | None, train: bool) -> Tensor:
    x = _conv(p["conv"], adaptive_average_pool(x, 4), train).flatten(1)
    return linear(p["head"], dropout(linear(p["hidden"], x).relu(), cfg.aux_dropout, key, train))


def _width(block: Block) -> int:
    one, _, three, _, five, pooled = block
    return one + three + five + pooled


def spec(cfg: Config) -> dict:
    """`stem.i`, `stages.s.b.i.j` (convolution j of branch i), `head`, and `aux.i` if there are auxiliary heads."""
    first, last = cfg.stem
    stages, d = [], last
    for blocks in cfg.stages:
        *inputs, d = (d, *(_width(block) for block in blocks))
        stages.append([_block_spec(cfg, n, block) for n, block in zip(inputs, blocks, strict=True)])
    return {
        **({"aux": [_aux_spec(cfg, _width(cfg.stages[1][b])) for b in (0, -2)]} if cfg.aux else {}),
        "head": _linear_spec(cfg, d, cfg.classes),
        "stages": stages,
        "stem": [
            _conv_spec(cfg, cfg.channels, first, 7),
            _conv_spec(cfg, first, first, 1),
            _conv_spec(cfg, first, last, 3),
        ],
    }


def _maps(params: dict, x: Tensor, cfg: Config, train: bool) -> list[list[Tensor]]:
    """The stem's maps at a half and at a quarter of the image, then the output of every block of each stage."""
    check_images("googlenet", x, cfg.channels, 15)
    first, reduce, grow = params["stem"]
    half = _conv(first, x, train, stride=2)
    x = max_pool(half, 3, stride=2, ceil_mode=True)
    x = _conv(grow, _conv(reduce, x, train), train)
    maps = [[half, x]]
    for kernel, blocks in zip((3, 3, 2), params["stages"], strict=True):
        x = max_pool(x, kernel, stride=2, ceil_mode=True)
        outs = []
        for branches in blocks:
            x = _block(branches, x, train)
            outs.append(x)
        maps.append(outs)
    return maps


def feature_maps(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """The maps at a half and at a quarter of the image, and the output of each stage, (batch, channels, height, width).

    Args:
        x: (batch, channels, height, width).

    Raises:
        ValueError: images with other channels, or smaller than 15 pixels a side.
    """
    stem, *stages = _maps(params, x, cfg, train)
    return [*stem, *(blocks[-1] for blocks in stages)]


def features(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """What the head sees: the last stage's maps, averaged over space. (batch, channels, h, w) -> (batch, d)."""
    return global_average_pool(feature_maps(params, x, cfg, train=train)[-1])


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor | Outputs:
    """Logits of images, and of the auxiliary heads in training.

    The loss of `Outputs` is that of the logits plus AUX_WEIGHT, 0.3, times that of each auxiliary head.

    Args:
        x: (batch, channels, height, width).
        key: (2,) or one an example (batch, 2); needed in training if there is dropout.

    Returns:
        (batch, classes); in training with cfg.aux, `Outputs`.

    Raises:
        ValueError: images with other channels, or smaller than 15 pixels a side; no key in training with dropout.
    """
    with_aux = train and cfg.aux
    keys = dropout_keys("googlenet", max(cfg.dropout, cfg.aux_dropout if with_aux else 0.0), key, 3, train)
    maps = _maps(params, x, cfg, train)
    logits = linear(params["head"], dropout(global_average_pool(maps[-1][-1]), cfg.dropout, keys[0], train))
    if not with_aux:
        return logits
    first, second = params["aux"]
    middle = maps[2]
    return Outputs(logits, _aux(first, middle[0], cfg, keys[1], train), _aux(second, middle[-2], cfg, keys[2], train))


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> torchvision's."""

    def names(ours: str, theirs: str) -> dict[str, Rename]:
        return conv_norm_names(ours, f"{theirs}.conv", f"{theirs}.bn")

    table = affine_names("head", "fc")
    for i in range(3):
        table |= names(f"stem.{i}", f"conv{i + 1}")
    for s, blocks in enumerate(spec(cfg)["stages"]):
        for b, branches in enumerate(blocks):
            for i, convs in enumerate(branches):
                theirs = f"inception{s + 3}{'abcdefgh'[b]}.branch{i + 1}"
                # The first branch is one module, the last a pooling (0) and a convolution (1).
                inside = {0: [""], 3: [".1"]}.get(i, [".0", ".1"])
                for j in range(len(convs)):
                    table |= names(f"stages.{s}.{b}.{i}.{j}", theirs + inside[j])
    for i in range(2 if cfg.aux else 0):
        ours, theirs = f"aux.{i}", f"aux{i + 1}"
        table |= names(f"{ours}.conv", f"{theirs}.conv")
        table |= affine_names(f"{ours}.hidden", f"{theirs}.fc1") | affine_names(f"{ours}.head", f"{theirs}.fc2")
    return table


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters and Stats from torchvision's file of this net: a local file or folder, or a hub repository.

    Without cfg.aux the file's auxiliary heads are left out. The published weights want pixels within [-1, 1], a mean
    and a deviation of 0.5 in each channel; torchvision's module reaches that from ImageNet's mean and deviation by
    its `transform_input`.
    """
    state = {name: x for name, x in read(source).items() if cfg.aux or not name.startswith(("aux1.", "aux2."))}
    return fill_published(spec(cfg), state, rename_table(cfg), source)
