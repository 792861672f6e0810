"""FCN: a fully convolutional head over the feature map of a residual net, enlarged to the image.

Long et al. 2015, "Fully Convolutional Networks for Semantic Segmentation" (arXiv:1411.4038), in the form of
torchvision: the backbone halves the image no further than to an eighth (`nets.blocks.residual_stages`), and

    logits = enlarge(conv(drop(relu(norm(conv(features))))))

An auxiliary head of the same form reads the stage before the last, in training alone (Zhao et al. 2017,
arXiv:1612.01105, section 3.3); its loss is weighed by `AUX_WEIGHT`.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from core.layers import conv, conv_spec, dropout
from nets.blocks.conv_norm import affine_names, conv_norm, conv_norm_names, conv_norm_spec, dropout_keys, fill_published
from nets.blocks.residual_stages import Stages, stage_maps, stage_names, stages_spec
from nets.weights import Rename, read

AUX_WEIGHT = 0.5
"""Weight of the auxiliary head's loss in torchvision's training script."""


def _resnet(*depths: int) -> Stages:
    return Stages(depths, "bottleneck")


@dataclass(frozen=True)
class Config:
    """Sizes of an FCN and of the ResNet that it reads."""

    backbone: Stages = _resnet(3, 4, 6, 3)
    output_stride: int = 8
    """The backbone halves the image no further than to this part of it."""
    aux: bool = True
    """An auxiliary head, in training."""
    dropout: float = 0.1
    """Dropout rate before the last convolution of each head."""
    classes: int = 21

    def __post_init__(self):
        check_config("fcn", self)


def check_config(name: str, cfg) -> None:
    """Raise ValueError for fields of a Config that do not fit; `name` begins the message."""
    if cfg.classes < 1 or len(cfg.backbone.depths) < 2:
        raise ValueError(f"{name}: {cfg.classes} classes, {len(cfg.backbone.depths)} stages; expected at least 1 and 2")
    if cfg.output_stride not in (4, 8, 16, 32):
        raise ValueError(f"{name}: output_stride is {cfg.output_stride}; expected 4, 8, 16 or 32")
    if not 0.0 <= cfg.dropout < 1.0:
        raise ValueError(f"{name}: dropout {cfg.dropout} is outside [0, 1)")


PRESETS = {
    "fcn_resnet18": Config(Stages()),
    "fcn_resnet50": Config(),
    "fcn_resnet101": Config(_resnet(3, 4, 23, 3)),
}


def head_spec(d_in: int, classes: int) -> dict:
    """`conv`, 3x3 to a fourth of the channels, and `out`, 1x1 to the classes."""
    return {"conv": conv_norm_spec(d_in, d_in // 4, 3), "out": conv_spec(d_in // 4, classes, 1)}


def head(p: dict, x: Tensor, rate: float, key: Tensor | None, train: bool) -> Tensor:
    """x: (batch, d_in, h, w) -> logits (batch, classes, h, w)."""
    x = conv_norm(p["conv"], x, train=train)  # (batch, d_in / 4, h, w)
    return conv(p["out"], dropout(x, rate, key, train))  # (batch, classes, h, w)


def aux_spec(cfg) -> dict:
    """The auxiliary head, if there is one."""
    return {"aux": head_spec(cfg.backbone.outputs(len(cfg.backbone.depths) - 2), cfg.classes)} if cfg.aux else {}


def spec(cfg: Config) -> dict:
    """`aux` if there is such a head, `backbone` and `head`."""
    last = cfg.backbone.outputs(len(cfg.backbone.depths) - 1)
    return {**aux_spec(cfg), "backbone": stages_spec(cfg.backbone), "head": head_spec(last, cfg.classes)}


def enlarged(logits: Tensor, x: Tensor) -> Tensor:
    """Logits at the size of the image x: (batch, classes, h, w) -> (batch, classes, height, width)."""
    return F.interpolate(logits, tuple(x.shape[2:]), mode="bilinear", align_corners=False)


def apply(
    params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Logits of each pixel; in training with an auxiliary head a tuple, of the own head's and of its.

    Args:
        x: (batch, channels, height, width).
        key: (2,), or one per example (batch, 2); needed in training with dropout.

    Returns:
        (batch, classes, height, width) each.

    Raises:
        ValueError: images with other channels, or smaller than the net's stride; no key where one is needed.
    """
    keys = dropout_keys("fcn", cfg.dropout, key, 2, train)
    *_, before, last = stage_maps(params["backbone"], x, cfg.backbone, output_stride=cfg.output_stride, train=train)
    logits = enlarged(head(params["head"], last, cfg.dropout, keys[0], train), x)
    if not train or not cfg.aux:
        return logits
    return logits, enlarged(head(params["aux"], before, cfg.dropout, keys[1], train), x)


# Files of torchvision.


def head_names(ours: str, theirs: str) -> dict[str, Rename]:
    """Part of a rename table for a `head` and torchvision's FCNHead."""
    return conv_norm_names(f"{ours}.conv", f"{theirs}.0", f"{theirs}.1") | affine_names(f"{ours}.out", f"{theirs}.4")


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of torchvision's FCN."""
    table = stage_names(cfg.backbone, ours="backbone.", theirs="backbone.") | head_names("head", "classifier")
    return table | (head_names("aux", "aux_classifier") if cfg.aux else {})


def backbone_from_pretrained(source: str, cfg: Stages) -> dict:
    """Parameters and Stats of a backbone from torchvision's file of a ResNet, without the head of the classifier."""
    state = {name: x for name, x in read(source).items() if not name.startswith("fc.")}
    return fill_published(stages_spec(cfg), state, stage_names(cfg), source)
