"""GoogLeNet, the first Inception network, for images.

Szegedy et al. 2015, "Going Deeper with Convolutions" (arXiv:1409.4842): a block convolves its input at several scales
and concatenates the results,

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
"""Weight of each auxiliary head in the loss (section 5 of the paper)."""

Block = tuple[int, int, int, int, int, int]
"""Channels: of the 1x1 branch; before and after the 3x3 convolution; before and after the "5x5" one; of the pooled
branch."""

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
    """Sizes of three stages of blocks; the stem halves the image three times, and each later stage once more.

    The auxiliary heads come after the first block of the second stage and before its last.
    """

    stem: tuple[int, int] = (64, 192)
    """Channels of the stem's 7x7 and 1x1 convolutions, and of its 3x3 one."""
    stages: tuple[tuple[Block, ...], ...] = STAGES
    aux: bool = True
    """Have auxiliary heads."""
    aux_sizes: tuple[int, int] = (128, 1024)
    """Channels of the convolution of an auxiliary head, and width of its hidden layer."""
    dropout: float = 0.2
    """Dropout rate before the head; the paper's is 0.4."""
    aux_dropout: float = 0.7
    """Dropout rate before the auxiliary heads."""
    std: float = 0.01
    """Standard deviation of the initial weights, which are normal; torchvision truncates them at 2, out of reach."""
    channels: int = 3
    classes: int = 1000

    def __post_init__(self):
        if len(self.stages) != 3 or not all(self.stages) or len(self.stages[1]) < 2:
            depths = [len(blocks) for blocks in self.stages]
            raise ValueError(f"googlenet: stages of {depths} blocks; expected three, and two blocks in the second")
        if any(len(block) != 6 for blocks in self.stages for block in blocks):
            raise ValueError("googlenet: expected six numbers of channels per block")
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
    """The four branches, each a list of convolutions."""
    one, before_three, three, before_five, five, pooled = block
    return [
        [_conv_spec(cfg, d_in, one, 1)],
        [_conv_spec(cfg, d_in, before_three, 1), _conv_spec(cfg, before_three, three, 3)],
        [_conv_spec(cfg, d_in, before_five, 1), _conv_spec(cfg, before_five, five, 3)],
        [_conv_spec(cfg, d_in, pooled, 1)],
    ]


def _block(branches: list, x: Tensor, train: bool) -> Tensor:
    """y = [conv1x1(x), conv3x3(conv1x1(x)), "conv5x5"(conv1x1(x)), conv1x1(maxpool(x))].

    x: (batch, channels, height, width) -> (batch, sum of the branches' channels, height, width).
    """
    inputs = [x, x, x, max_pool(x, 3, stride=1, padding=1)]
    outs = []
    for convs, y in zip(branches, inputs, strict=True):
        for p in convs:
            y = _conv(p, y, train)  # (batch, branch channels, height, width)
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
    """Logits of an auxiliary head. x: (batch, channels, height, width) -> (batch, classes)."""
    x = _conv(p["conv"], adaptive_average_pool(x, 4), train).flatten(1)  # (batch, aux_sizes[0] * 4 * 4)
    x = linear(p["hidden"], x).relu()  # (batch, aux_sizes[1])
    return linear(p["head"], dropout(x, cfg.aux_dropout, key, train))


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
    """The stem's feature maps at 1/2 and 1/4 of the image's size, then the output of every block per stage."""
    check_images("googlenet", x, cfg.channels, 15)
    first, reduce, grow = params["stem"]
    half = _conv(first, x, train, stride=2)  # (batch, stem[0], height / 2, width / 2)
    x = max_pool(half, 3, stride=2, ceil_mode=True)  # (batch, stem[0], height / 4, width / 4)
    x = _conv(grow, _conv(reduce, x, train), train)  # (batch, stem[1], height / 4, width / 4)
    maps = [[half, x]]
    for kernel, blocks in zip((3, 3, 2), params["stages"], strict=True):
        x = max_pool(x, kernel, stride=2, ceil_mode=True)  # (batch, d, h / 2, w / 2)
        outs = []
        for branches in blocks:
            x = _block(branches, x, train)  # (batch, d of the block, h / 2, w / 2)
            outs.append(x)
        maps.append(outs)
    return maps


def feature_maps(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """Feature maps at 1/2 and 1/4 of the image's size, and the output of each stage: (batch, channels, height, width).

    Args:
        x: (batch, channels, height, width).

    Raises:
        ValueError: images with other channels, or smaller than 15 pixels per side.
    """
    stem, *stages = _maps(params, x, cfg, train)
    return [*stem, *(blocks[-1] for blocks in stages)]


def features(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """Penultimate features: the last stage's output, global-average-pooled. (batch, channels, h, w) -> (batch, d)."""
    return global_average_pool(feature_maps(params, x, cfg, train=train)[-1])


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor | Outputs:
    """Logits of images, and of the auxiliary heads in training.

    The loss of `Outputs` is loss(logits) + AUX_WEIGHT (loss(aux1) + loss(aux2)), AUX_WEIGHT = 0.3.

    Args:
        x: (batch, channels, height, width).
        key: (2,) or one per example (batch, 2); needed in training if there is dropout.

    Returns:
        (batch, classes); in training with cfg.aux, `Outputs`.

    Raises:
        ValueError: images with other channels, or smaller than 15 pixels per side; no key in training with dropout.
    """
    with_aux = train and cfg.aux
    keys = dropout_keys("googlenet", max(cfg.dropout, cfg.aux_dropout if with_aux else 0.0), key, 3, train)
    maps = _maps(params, x, cfg, train)
    pooled = global_average_pool(maps[-1][-1])  # (batch, d)
    logits = linear(params["head"], dropout(pooled, cfg.dropout, keys[0], train))  # (batch, classes)
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
                suffixes = {0: [""], 3: [".1"]}.get(i, [".0", ".1"])
                for j in range(len(convs)):
                    table |= names(f"stages.{s}.{b}.{i}.{j}", theirs + suffixes[j])
    for i in range(2 if cfg.aux else 0):
        ours, theirs = f"aux.{i}", f"aux{i + 1}"
        table |= names(f"{ours}.conv", f"{theirs}.conv")
        table |= affine_names(f"{ours}.hidden", f"{theirs}.fc1") | affine_names(f"{ours}.head", f"{theirs}.fc2")
    return table


def recognise(state: dict[str, Tensor], cfg: Config) -> tuple[dict[str, Tensor], dict[str, Rename]]:
    """(tensors, rename table); without cfg.aux the tensors of auxiliary heads are left out."""
    state = {name: x for name, x in state.items() if cfg.aux or not name.startswith(("aux1.", "aux2."))}
    return state, rename_table(cfg)


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters and Stats from torchvision's file of this net: a local file or folder, or a hub repository.

    Without cfg.aux the file's auxiliary heads are left out. The published weights want pixels within [-1, 1], that is
    a mean and a standard deviation of 0.5 per channel; torchvision's module reaches that from ImageNet's by its
    `transform_input`.
    """
    return fill_published(spec(cfg), *recognise(read(source), cfg), source)
