"""The ResNet of CLIP's pictures: three convolutions in its stem, average pooling before strides, attention at the end.

Radford et al. 2021 (arXiv:2103.00020), section 2.4; He et al. 2019, "Bag of Tricks" (arXiv:1812.01187), ResNet-D:

    block(x) = relu(x' + norm(conv1(pool(relu(norm(conv3(relu(norm(conv1 x))))))));   x' = norm(conv1(pool x)) or x
    output = attention of the mean over the places to [mean; places] + positions
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers
from core.attention import attention, cross_attention_spec, cross_keys_values, merge_heads, split_heads
from core.layers import average_pool, embedding_spec, linear, linear_spec
from core.tree import Tree
from nets.blocks.conv_norm import conv_norm, conv_norm_spec

if TYPE_CHECKING:
    from nets.multimodal.clip import Config

EXPANSION = 4


def _stages(cfg: Config) -> list[list[tuple[int, int, int]]]:
    """(input channels, width, stride) of every block."""
    d_in, stages = cfg.image_width, []
    for s, depth in enumerate(cfg.depths):
        width = cfg.image_width * 2**s
        stages.append([(d_in, width, 2 if s else 1)] + [(EXPANSION * width, width, 1)] * (depth - 1))
        d_in = EXPANSION * width
    return stages


def _block_spec(cfg: Config, d_in: int, width: int, stride: int) -> Tree:
    d_out = EXPANSION * width
    last = conv_norm_spec(width, d_out, 1, scale=initializers.zeros if cfg.zero_init else initializers.ones)
    parts = {"convs": [conv_norm_spec(d_in, width, 1), conv_norm_spec(width, width, 3), last]}
    return parts | ({"shortcut": conv_norm_spec(d_in, d_out, 1)} if (stride, d_in) != (1, d_out) else {})


def spec(cfg: Config) -> Tree:
    """`stem`, `stages` and `pool`, attention whose last layer maps into the space of texts."""
    half, width = cfg.image_width // 2, EXPANSION * 8 * cfg.image_width
    init = initializers.normal(width**-0.5)
    pool = cross_attention_spec(width, cfg.image_heads, init=init)
    pool["positions"] = embedding_spec((cfg.image // 32) ** 2 + 1, width, init=init, axes=("time", "embed"))
    pool["proj"] = linear_spec(width, cfg.embedding, init=init)
    return {
        "pool": {name: pool[name] for name in sorted(pool)},
        "stages": [[_block_spec(cfg, *sizes) for sizes in stage] for stage in _stages(cfg)],
        "stem": [
            conv_norm_spec(cfg.channels, half, 3),
            conv_norm_spec(half, half, 3),
            conv_norm_spec(half, cfg.image_width, 3),
        ],
    }


def _block(p: Tree, x: Tensor, stride: int, train: bool) -> Tensor:
    first, second, third = p["convs"]
    y = conv_norm(second, conv_norm(first, x, train=train), train=train)
    y = conv_norm(third, average_pool(y, stride), None, train=train)
    if "shortcut" in p:
        x = conv_norm(p["shortcut"], average_pool(x, stride), None, train=train)
    return F.relu(x + y)


def apply(p: Tree, x: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """Embeddings of pictures: x (batch, channels, image, image) -> (batch, embedding)."""
    for i, one in enumerate(p["stem"]):
        x = conv_norm(one, x, stride=1 if i else 2, train=train)
    x = average_pool(x, 2)  # (batch, image_width, image / 4, image / 4)
    for stage, sizes in zip(p["stages"], _stages(cfg), strict=True):
        for one, (_, _, stride) in zip(stage, sizes, strict=True):
            x = _block(one, x, stride, train)
    places = x.flatten(2).transpose(1, 2)  # (batch, places, width)
    places = torch.cat([places.mean(1, keepdim=True), places], 1) + p["pool"]["positions"]["weight"]
    query = split_heads(linear(p["pool"]["q"], places[:, :1]), cfg.image_heads)  # (batch, heads, 1, depth)
    keys, values = cross_keys_values(p["pool"], places, cfg.image_heads)
    pooled = merge_heads(attention(query, keys, values, method=cfg.attention)).squeeze(1)  # (batch, width)
    return linear(p["pool"]["proj"], pooled)  # (batch, embedding)
