"""Inception v3 for images.

Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision" (arXiv:1512.00567): the blocks of
GoogLeNet (`nets.classifiers.googlenet`), with their large convolutions factorised. A 5x5 becomes two 3x3, a 7x7
becomes 1x7 and 7x1, and in the third stage 1x3 and 3x1 run in parallel:

    y = [branch_1(x), ..., branch_n(x), conv1x1(averagepool(x))]

The first block of the second and third stage halves the image instead: its branches end with stride 2, beside a max
pooling. In training an auxiliary head after the second stage acts as a regulariser. Each convolution has a batch norm
with eps 0.001; convolutions at the borders of stages have no padding, as in the paper, so that 299 pixels become
35, 17 and 8.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from core import initializers
from core.layers import average_pool, dropout, global_average_pool, linear, linear_spec, max_pool
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

AUX_WEIGHT = 0.4
"""Weight of the auxiliary head in the loss, as is customary; the paper gives none."""

Conv = tuple[int, int | tuple[int, int]]
"""(channels, kernel)."""

Branch = list[Conv | list[Conv]]
"""Convolutions one after another; the last element may be a list of parallel ones."""


@dataclass(frozen=True)
class Config:
    """Sizes of three stages, for images of 75 pixels per side and more; in training with `aux` see `aux_kernel`."""

    width: int = 32
    """Channels of the first convolution; nearly all others are in proportion to it."""
    pooled: tuple[int, ...] = (32, 64, 64)
    """Channels of the pooled branch, per block of the first stage."""
    channels_7x7: tuple[int, ...] = (128, 160, 160, 192)
    """Channels between the 1x7 and 7x1 convolutions, per block of the second stage after its first."""
    last: int = 2
    """Blocks of the third stage after its first."""
    aux: bool = True
    """Have an auxiliary head."""
    aux_kernel: int = 5
    """Kernel of the auxiliary head's second convolution: 5 needs images of 299 pixels in training; 1, of 107."""
    dropout: float = 0.5
    """Dropout rate before the head; the paper's is 0.2."""
    std: float = 0.1
    """Standard deviation of the initial weights, which are normal; torchvision truncates them at 2, out of reach."""
    aux_std: float = 0.001
    """Standard deviation of the initial weights of the auxiliary head's last layer."""
    channels: int = 3
    classes: int = 1000

    def __post_init__(self):
        if self.width < 2 or self.width % 2:
            raise ValueError(f"inception: width {self.width}; expected an even number of channels")
        if not self.pooled or min(self.pooled) < 1 or min(self.channels_7x7, default=1) < 1 or self.last < 0:
            sizes = f"pooled {self.pooled}, channels_7x7 {self.channels_7x7}, last {self.last}"
            raise ValueError(f"inception: {sizes}; expected positive channels and at least one block in the first")
        if self.aux_kernel not in (1, 3, 5):
            raise ValueError(f"inception: aux_kernel {self.aux_kernel}; expected 1, 3 or 5")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"inception: dropout {self.dropout} is outside [0, 1)")


PRESETS = {"inception_v3": Config()}


def _aux_pixels(kernel: int) -> int:
    """Side of the second stage's output that the auxiliary head needs.

    It averages over 5x5 with stride 3, and its second convolution has no padding.
    """
    return 3 * kernel + 2


def _least(pixels: int) -> int:
    """Side of the image that leaves `pixels` a side to the second stage; each halving takes n to (n - 1) // 2."""
    return 16 * pixels + 27


def fitted(cfg: Config, size: int) -> Config:
    """The net whose auxiliary head takes images of `size` pixels per side in training; without one below 107."""
    kernels = [kernel for kernel in (5, 3, 1) if kernel <= cfg.aux_kernel and _least(_aux_pixels(kernel)) <= size]
    return replace(cfg, aux_kernel=kernels[0]) if kernels else replace(cfg, aux=False)


class Outputs(NamedTuple):
    """The logits of the two heads, (batch, classes) each."""

    logits: Tensor
    aux: Tensor


def _scaled(cfg: Config, channels: int) -> int:
    """Published channels, all multiples of 16, in proportion to the width, which is even."""
    return channels * cfg.width // 32


def _stem(cfg: Config) -> list[Conv]:
    return [(_scaled(cfg, n), kernel) for n, kernel in ((32, 3), (32, 3), (64, 3), (80, 1), (192, 3))]


def _stages(cfg: Config) -> list[list[list[Branch]]]:
    """The branches of every block of each stage."""
    tall, wide = (7, 1), (1, 7)

    def of(channels: int, kernel: int | tuple[int, int] = 1) -> Conv:
        return _scaled(cfg, channels), kernel

    def small(pooled: int) -> list[Branch]:
        return [[of(64)], [of(48), of(64, 5)], [of(64), of(96, 3), of(96, 3)], [(pooled, 1)]]

    def factorised(n: int) -> list[Branch]:
        once = [(n, 1), (n, wide), of(192, tall)]
        twice = [(n, 1), (n, tall), (n, wide), (n, tall), of(192, wide)]
        return [[of(192)], once, twice, [of(192)]]

    parallel = [of(384, (1, 3)), of(384, (3, 1))]
    coarse = [[of(320)], [of(384), parallel], [of(448), of(384, 3), parallel], [of(192)]]
    to_second = [[of(384, 3)], [of(64), of(96, 3), of(96, 3)]]
    to_third = [[of(192), of(320, 3)], [of(192), of(192, wide), of(192, tall), of(192, 3)]]
    return [
        [small(pooled) for pooled in cfg.pooled],
        [to_second, *(factorised(n) for n in cfg.channels_7x7)],
        [to_third, *[coarse] * cfg.last],
    ]


def _halves(s: int, b: int) -> bool:
    """Block b of stage s halves the image."""
    return s > 0 and b == 0


def _parallel(convs: Conv | list[Conv]) -> list[Conv]:
    return convs if isinstance(convs, list) else [convs]


def _conv_spec(cfg: Config, d_in: int, d_out: int, kernel: int | tuple[int, int]) -> dict:
    return conv_norm_spec(d_in, d_out, kernel, init=initializers.normal(cfg.std))


def _linear_spec(d_in: int, d_out: int, std: float) -> dict:
    return linear_spec(d_in, d_out, **fan_uniform(d_in) | {"init": initializers.normal(std)})


def _conv(p: dict, x: Tensor, train: bool, stride: int = 1, padding: int | str = "symmetric") -> Tensor:
    return conv_norm(p, x, train=train, stride=stride, padding=padding, eps=EPS)


def _branch_spec(cfg: Config, d_in: int, branch: Branch) -> list:
    convs = []
    for step in branch:
        specs = [_conv_spec(cfg, d_in, *sizes) for sizes in _parallel(step)]
        convs.append(specs if isinstance(step, list) else specs[0])
        d_in = sum(d_out for d_out, _ in _parallel(step))
    return convs


def _branch(convs: list, x: Tensor, train: bool, halve: bool = False) -> Tensor:
    """The convolutions of a branch in turn. x: (batch, channels, h, w) -> (batch, branch channels, h, w).

    halve: give (batch, branch channels, (h - 1) // 2, (w - 1) // 2).
    """
    *first, last = convs
    for p in first:
        x = _conv(p, x, train)
    if halve:
        return _conv(last, x, train, stride=2, padding=0)
    return torch.cat([_conv(p, x, train) for p in last], 1) if isinstance(last, list) else _conv(last, x, train)


def _block(branches: list, x: Tensor, train: bool, halve: bool) -> Tensor:
    """y = [branch_1(x), ..., branch_n(x), conv1x1(averagepool(x))], or with maxpool(x) at the end if it halves.

    x: (batch, channels, h, w) -> (batch, sum of the branches' channels, h, w); halved as in `_branch`.
    """
    if halve:
        outs = [*(_branch(convs, x, train, halve) for convs in branches), max_pool(x, 3, stride=2)]
    else:
        *unpooled, pooled = branches
        outs = [_branch(convs, x, train) for convs in unpooled]
        outs.append(_branch(pooled, average_pool(x, 3, stride=1, padding=1), train))
    return torch.cat(outs, 1)


def _aux_spec(cfg: Config, d_in: int) -> dict:
    first, second = _scaled(cfg, 128), _scaled(cfg, 768)
    return {
        "convs": [_conv_spec(cfg, d_in, first, 1), _conv_spec(cfg, first, second, cfg.aux_kernel)],
        "head": _linear_spec(second, cfg.classes, cfg.aux_std),
    }


def _aux(p: dict, x: Tensor, train: bool) -> Tensor:
    """Logits of the auxiliary head. x: (batch, channels, height, width) -> (batch, classes)."""
    first, second = p["convs"]
    x = _conv(first, average_pool(x, 5, stride=3), train)  # (batch, d, (height - 2) // 3, (width - 2) // 3)
    x = _conv(second, x, train, padding=0)  # (batch, 6 d, h - kernel + 1, w - kernel + 1)
    return linear(p["head"], global_average_pool(x))


def spec(cfg: Config) -> dict:
    """`stem.i`, `stages.s.b.i.j` (convolution j of branch i; `stages.s.b.i.j.k` where two are parallel), `head`, and
    `aux` if there is an auxiliary head."""
    stem, d = [], cfg.channels
    for d_out, kernel in _stem(cfg):
        stem.append(_conv_spec(cfg, d, d_out, kernel))
        d = d_out
    stages, ends = [], []
    for s, blocks in enumerate(_stages(cfg)):
        stages.append([])
        for b, branches in enumerate(blocks):
            stages[-1].append([_branch_spec(cfg, d, branch) for branch in branches])
            d = sum(n for branch in branches for n, _ in _parallel(branch[-1])) + (d if _halves(s, b) else 0)
        ends.append(d)
    return {
        **({"aux": _aux_spec(cfg, ends[1])} if cfg.aux else {}),
        "head": _linear_spec(d, cfg.classes, cfg.std),
        "stages": stages,
        "stem": stem,
    }


def feature_maps(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """Feature maps at 1/2 and 1/4 of the image's size, and the output of each stage: (batch, channels, height, width).

    Args:
        x: (batch, channels, height, width).

    Raises:
        ValueError: images with other channels, or smaller than 75 pixels per side.
    """
    check_images("inception", x, cfg.channels, _least(3))
    a, b, c, d, e = params["stem"]
    x = _conv(a, x, train, stride=2, padding=0)  # (batch, width, 149, 149) of 299 x 299 pixels
    half = _conv(c, _conv(b, x, train, padding=0), train)  # (batch, 2 width, 147, 147)
    x = max_pool(half, 3, stride=2)  # (batch, 2 width, 73, 73)
    quarter = _conv(e, _conv(d, x, train), train, padding=0)  # (batch, 6 width, 71, 71)
    maps, x = [half, quarter], max_pool(quarter, 3, stride=2)  # (batch, 6 width, 35, 35)
    for s, blocks in enumerate(params["stages"]):
        for i, branches in enumerate(blocks):
            x = _block(branches, x, train, _halves(s, i))  # 35 x 35, then 17 x 17, then 8 x 8
        maps.append(x)
    return maps


def features(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """Penultimate features: the last stage's output, global-average-pooled. (batch, channels, h, w) -> (batch, d)."""
    return global_average_pool(feature_maps(params, x, cfg, train=train)[-1])


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor | Outputs:
    """Logits of images, and of the auxiliary head in training.

    The loss of `Outputs` is loss(logits) + AUX_WEIGHT loss(aux), AUX_WEIGHT = 0.4.

    Args:
        x: (batch, channels, height, width).
        key: (2,) or one per example (batch, 2); needed in training if there is dropout.

    Returns:
        (batch, classes); in training with cfg.aux, `Outputs`.

    Raises:
        ValueError: images with other channels, or too small, in training for the auxiliary head; no key in training
            with dropout.
    """
    with_aux = train and cfg.aux
    check_images("inception", x, cfg.channels, _least(_aux_pixels(cfg.aux_kernel) if with_aux else 3))
    (drop_key,) = dropout_keys("inception", cfg.dropout, key, 1, train)
    maps = feature_maps(params, x, cfg, train=train)
    pooled = global_average_pool(maps[-1])  # (batch, d)
    logits = linear(params["head"], dropout(pooled, cfg.dropout, drop_key, train))  # (batch, classes)
    return Outputs(logits, _aux(params["aux"], maps[-2], train)) if with_aux else logits


BLOCK_NAMES = ("bcdefghijk", "abcdefghijk", "abcdefghijk")
BRANCH_NAMES = {
    (0, False): ("branch1x1", "branch5x5", "branch3x3dbl", "branch_pool"),
    (1, True): ("branch3x3", "branch3x3dbl"),
    (1, False): ("branch1x1", "branch7x7", "branch7x7dbl", "branch_pool"),
    (2, True): ("branch3x3", "branch7x7x3"),
    (2, False): ("branch1x1", "branch3x3", "branch3x3dbl", "branch_pool"),
}
"""Torchvision's names of the branches, by stage and whether the block halves the image."""


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> torchvision's."""

    def names(ours: str, theirs: str) -> dict[str, Rename]:
        return conv_norm_names(ours, f"{theirs}.conv", f"{theirs}.bn")

    table = affine_names("head", "fc")
    for i, index in enumerate(("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")):
        table |= names(f"stem.{i}", f"Conv2d_{index}")
    for s, blocks in enumerate(_stages(cfg)):
        for b, branches in enumerate(blocks):
            for i, (name, branch) in enumerate(zip(BRANCH_NAMES[s, _halves(s, b)], branches, strict=True)):
                ours, theirs = f"stages.{s}.{b}.{i}", f"Mixed_{s + 5}{BLOCK_NAMES[s][b]}.{name}"
                for j, step in enumerate(branch):
                    number = f"_{j + 1}" if len(branch) > 1 else ""
                    if isinstance(step, list):
                        for k, letter in zip(range(len(step)), "ab", strict=True):
                            table |= names(f"{ours}.{j}.{k}", f"{theirs}{number}{letter}")
                    else:
                        table |= names(f"{ours}.{j}", f"{theirs}{number}")
    if cfg.aux:
        for i in range(2):
            table |= names(f"aux.convs.{i}", f"AuxLogits.conv{i}")
        table |= affine_names("aux.head", "AuxLogits.fc")
    return table


def recognise(state: dict[str, Tensor], cfg: Config) -> tuple[dict[str, Tensor], dict[str, Rename]]:
    """(tensors, rename table); without cfg.aux the tensors of the auxiliary head are left out."""
    return {name: x for name, x in state.items() if cfg.aux or not name.startswith("AuxLogits.")}, rename_table(cfg)


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters and Stats from torchvision's file of this net: a local file or folder, or a hub repository.

    Without cfg.aux the file's auxiliary head is left out. The published weights want pixels within [-1, 1], that is a
    mean and a standard deviation of 0.5 per channel; torchvision's module reaches that from ImageNet's by its
    `transform_input`.
    """
    return fill_published(spec(cfg), *recognise(read(source), cfg), source)
