"""DeepLabV3: a head that sees the feature map of a residual net at several scales at once.

Chen et al. 2017, "Rethinking Atrous Convolution for Semantic Image Segmentation" (arXiv:1706.05587), section 3.3, in
the form of torchvision. Parallel branches ("ASPP") look at the map: a 1x1 convolution, 3x3 ones whose taps lie `rates`
apart, and the mean over the whole map; they are joined by a 1x1 convolution:

    y = drop(conv_1x1([conv_1x1(f), conv_3x3(f, rate 12), (24), (36), mean(f)]));   logits = enlarge(conv(conv_3x3(y)))

Backbone, auxiliary head and enlarging are those of `nets.dense.fcn`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.layers import conv, conv_spec, dropout, global_average_pool
from nets.blocks.conv_norm import affine_names, conv_norm, conv_norm_names, conv_norm_spec, dropout_keys
from nets.blocks.residual_stages import Stages, stage_maps, stage_names, stages_spec
from nets.dense import fcn
from nets.weights import Rename

AUX_WEIGHT = fcn.AUX_WEIGHT
RESNET50, RESNET101 = fcn.PRESETS["fcn_resnet50"].backbone, fcn.PRESETS["fcn_resnet101"].backbone


@dataclass(frozen=True)
class Config:
    """Sizes of DeepLabV3 and of the ResNet that it reads."""

    backbone: Stages = RESNET50
    output_stride: int = 8
    """The backbone halves the image no further than to this part of it."""
    rates: tuple[int, ...] = (12, 24, 36)
    """Distances of the taps of the 3x3 convolutions that look at the feature map in parallel."""
    width: int = 256
    """Channels of each of them, and of the layers after them."""
    aux: bool = True
    """An auxiliary head, in training."""
    dropout: float = 0.5
    """Dropout rate after the branches are joined."""
    aux_dropout: float = 0.1
    """Dropout rate before the last convolution of the auxiliary head."""
    classes: int = 21

    def __post_init__(self):
        fcn.check_config("deeplab", self)
        if not 0.0 <= self.aux_dropout < 1.0:
            raise ValueError(f"deeplab: aux_dropout {self.aux_dropout} is outside [0, 1)")
        if self.width < 1 or any(rate < 1 for rate in self.rates):
            raise ValueError(f"deeplab: width {self.width}, rates {self.rates}; expected at least 1")


PRESETS = {
    "deeplabv3_resnet18": Config(Stages()),
    "deeplabv3_resnet50": Config(),
    "deeplabv3_resnet101": Config(RESNET101),
}


def spec(cfg: Config) -> dict:
    """`aux` if there is such a head, `backbone`, and `head`: `branches`, `mean`, `project`, `conv` and `out`."""
    last, width = cfg.backbone.outputs(len(cfg.backbone.depths) - 1), cfg.width
    head = {
        "branches": [conv_norm_spec(last, width, 1), *(conv_norm_spec(last, width, 3) for _ in cfg.rates)],
        "conv": conv_norm_spec(width, width, 3),
        "mean": conv_norm_spec(last, width, 1),
        "out": conv_spec(width, cfg.classes, 1),
        "project": conv_norm_spec((len(cfg.rates) + 2) * width, width, 1),
    }
    return {**fcn.aux_spec(cfg), "backbone": stages_spec(cfg.backbone), "head": head}


def _head(p: dict, f: Tensor, cfg: Config, key: Tensor | None, train: bool) -> Tensor:
    """f: (batch, d_in, h, w) -> logits (batch, classes, h, w)."""
    branches = [
        conv_norm(q, f, train=train, dilation=rate) for q, rate in zip(p["branches"], (1, *cfg.rates), strict=True)
    ]  # each (batch, width, h, w)
    mean = conv_norm(p["mean"], global_average_pool(f)[..., None, None], train=train)  # (batch, width, 1, 1)
    branches.append(mean.expand(-1, -1, *f.shape[2:]))
    y = conv_norm(p["project"], torch.cat(branches, 1), train=train)  # (batch, width, h, w)
    y = dropout(y, cfg.dropout, key, train)
    return conv(p["out"], conv_norm(p["conv"], y, train=train))  # (batch, classes, h, w)


def apply(
    params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Logits of each pixel; in training with an auxiliary head a tuple, of the own head's and of its.

    Args:
        x: (batch, channels, height, width); in training more than one image, as batch norm sees one mean of each.
        key: (2,), or one per example (batch, 2); needed in training with dropout.

    Returns:
        (batch, classes, height, width) each.

    Raises:
        ValueError: images with other channels, or smaller than the net's stride; no key where one is needed.
    """
    keys = dropout_keys("deeplab", max(cfg.dropout, cfg.aux_dropout), key, 2, train)
    *_, before, last = stage_maps(params["backbone"], x, cfg.backbone, output_stride=cfg.output_stride, train=train)
    logits = fcn.enlarged(_head(params["head"], last, cfg, keys[0], train), x)
    if not train or not cfg.aux:
        return logits
    return logits, fcn.enlarged(fcn.head(params["aux"], before, cfg.aux_dropout, keys[1], train), x)


# Files of torchvision.


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of torchvision's DeepLabV3."""
    table = stage_names(cfg.backbone, ours="backbone.", theirs="backbone.")
    table |= fcn.head_names("aux", "aux_classifier") if cfg.aux else {}
    parts = {f"branches.{i}": (f"0.convs.{i}.0", f"0.convs.{i}.1") for i in range(1 + len(cfg.rates))}
    mean = f"0.convs.{1 + len(cfg.rates)}"
    parts |= {"conv": ("1", "2"), "mean": (f"{mean}.1", f"{mean}.2"), "project": ("0.project.0", "0.project.1")}
    for ours, names in parts.items():
        table |= conv_norm_names(f"head.{ours}", *(f"classifier.{name}" for name in names))
    return table | affine_names("head.out", "classifier.4")
