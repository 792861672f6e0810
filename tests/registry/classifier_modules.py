"""Image classifiers that nobody here wrote, small: torchvision's, transformers' and some in plain torch.nn.

Each comes with the Config of ours that has its sizes. What libraries have no argument for is put in afterwards.
"""

from functools import partial
from types import ModuleType

import pytest
import torch
from torch import nn

from nets.classifiers import (
    alexnet,
    convnext,
    densenet,
    googlenet,
    inception,
    mobilenet_v2,
    mobilenet_v3,
    vgg,
    vit,
)


def models() -> ModuleType:
    """Torchvision's."""
    return pytest.importorskip("torchvision.models", reason="torchvision is not installed")


ALEXNET = alexnet.Config(hidden=16, dropout=0.0, classes=7)


def small_alexnet() -> nn.Module:
    with torch.device("meta"):
        module = models().AlexNet(dropout=0.0)
    for place, sizes in ((1, (9216, 16)), (4, (16, 16)), (6, (16, 7))):
        module.classifier[place] = nn.Linear(*sizes)
    module.to_empty(device="cpu")
    return module.apply(lambda layer: layer.reset_parameters() if hasattr(layer, "reset_parameters") else None)


CONVNEXT = convnext.Config((1, 2, 1), (4, 6, 8), 0.0, layer_scale=0.1, classes=7)


def small_convnext() -> nn.Module:
    stages = [models().convnext.CNBlockConfig(*stage) for stage in ((4, 6, 1), (6, 8, 2), (8, None, 1))]
    module = models().ConvNeXt(stages, layer_scale=0.1, num_classes=7)
    for p in module.parameters():
        p.data *= 10 if p.ndim > 1 else 1  # from initial values at which the branches hardly count
    return module


def new_convnext() -> nn.Module:
    block = models().convnext.CNBlockConfig
    return models().ConvNeXt([block(48, 64, 1), block(64, None, 1)], num_classes=40)


DENSENET = densenet.Config((2, 1, 2), growth=4, width=8, expansion=2, classes=7)


def small_densenet(growth: int = 4, width: int = 8, classes: int = 7) -> nn.Module:
    sizes = {"growth_rate": growth, "num_init_features": width, "bn_size": 2, "num_classes": classes}
    return models().DenseNet(block_config=(2, 1, 2), **sizes)


def small_googlenet_config(by: int = 8) -> googlenet.Config:
    return googlenet.Config(
        (64 // by, 192 // by),
        tuple(tuple(tuple(n // by for n in block) for block in blocks) for blocks in googlenet.STAGES),
        aux_sizes=(128 // by, 1024 // by),
        dropout=0.0,
        aux_dropout=0.0,
        classes=7,
    )


GOOGLENET = small_googlenet_config()


def small_googlenet(aux: bool = True, by: int = 8, **options) -> nn.Module:
    """With a part of the channels everywhere. Torchvision gives its second auxiliary head before its first."""
    models()
    theirs = pytest.importorskip("torchvision.models.googlenet")

    class InOrder(theirs.GoogLeNet):
        def eager_outputs(self, x, aux2, aux1):
            return (x, aux1, aux2) if self.training and self.aux_logits else x

    def conv(d_in, d_out, **kwargs):
        return theirs.BasicConv2d(d_in if d_in == 3 else d_in // by, d_out // by, **kwargs)

    def head(d_in, classes, dropout):
        out = theirs.InceptionAux(d_in, classes, conv, dropout=dropout)
        out.fc1, out.fc2 = nn.Linear(2048 // by, 1024 // by), nn.Linear(1024 // by, classes)
        return out

    blocks = [conv, partial(theirs.Inception, conv_block=conv), head]
    options = {"blocks": blocks, "init_weights": False, "dropout": 0.0, "dropout_aux": 0.0} | options
    module = InOrder(7, aux_logits=aux, **options)
    module.fc = nn.Linear(1024 // by, 7)
    return module


INCEPTION = inception.Config(2, (2, 4, 4), (8, 10, 10, 12), dropout=0.0, classes=7)


def small_inception(aux: bool = True, aux_kernel: int = 5, by: int = 16, **options) -> nn.Module:
    """With a part of the channels everywhere."""
    models()
    theirs = pytest.importorskip("torchvision.models.inception")

    def conv(d_in, d_out, **kwargs):
        return theirs.BasicConv2d(d_in if d_in == 3 else d_in // by, d_out // by, **kwargs)

    def head(d_in, classes):
        out = theirs.InceptionAux(d_in, classes, conv)
        out.conv1 = conv(128, 768, kernel_size=aux_kernel)
        out.fc = nn.Linear(768 // by, classes)
        return out

    kinds = "InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE"
    blocks = [conv, *(partial(getattr(theirs, kind), conv_block=conv) for kind in kinds), head]
    options = {"inception_blocks": blocks, "init_weights": False, "dropout": 0.0} | options
    module = theirs.Inception3(7, aux_logits=aux, **options)
    module.fc = nn.Linear(2048 // by, 7)
    return module


class LeNet(nn.Module):
    def __init__(self, act, pool):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)
        self.act, self.pool = act, pool

    def forward(self, x):
        x = self.pool(self.act(self.conv1(x)))
        x = self.pool(self.act(self.conv2(x)))
        x = self.act(self.fc1(x.flatten(1)))
        return self.fc3(self.act(self.fc2(x)))


class Digits(nn.Module):
    """The preset lenet-digits."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(128, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        for conv in (self.conv1, self.conv2):
            x = nn.functional.max_pool2d(conv(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


def transformers_mobilenet_v1(width: float, classes: int = 1000, **options) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Logits(transformers.MobileNetV1ForImageClassification):
        def forward(self, x):
            return super().forward(x).logits

    options |= {"depth_multiplier": width, "num_labels": classes, "classifier_dropout_prob": 0.0}
    module = Logits(transformers.MobileNetV1Config(**options))
    for norm in (layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)):
        norm.momentum = 0.1  # not 0.9997, TensorFlow's weight of the old statistics: torch's is that of the new
    return module


V2_STAGES = tuple(mobilenet_v2.Stage(*row) for row in ((1, 16, 1, 1), (6, 24, 2, 2), (4, 32, 1, 1), (4, 40, 1, 2)))


def small_mobilenet_v2(width: float) -> nn.Module:
    table = [list(stage) for stage in V2_STAGES]
    return models().MobileNetV2(7, width_mult=width, inverted_residual_setting=table, dropout=0.0)


def small_mobilenet_v3(cfg: mobilenet_v3.Config) -> nn.Module:
    rows, d_in = [], cfg.stem
    for block in (block for blocks in cfg.stages for block in blocks):
        act = {"relu": "RE", "hard_swish": "HS"}[block.act]
        sizes = block.kernel, block.expanded, block.channels, block.squeeze, act, block.stride, 1, cfg.width
        rows.append(models().mobilenetv3.InvertedResidualConfig(d_in, *sizes))
        d_in = block.channels
    hidden = rows[0].adjust_channels(cfg.hidden, cfg.width)
    return models().MobileNetV3(rows, hidden, num_classes=cfg.classes, dropout=0.0)


def small_resnet(block: str, depths: tuple[int, ...] = (2, 1, 1, 1), **options) -> nn.Module:
    kind = {"basic": "BasicBlock", "bottleneck": "Bottleneck"}[block]
    return models().ResNet(getattr(models().resnet, kind), depths, num_classes=7, **options)


def small_squeezenet(name: str) -> nn.Module:
    return models().SqueezeNet(name.removeprefix("squeezenet"), num_classes=7, dropout=0.0)


def small_vgg_config(norm: bool) -> vgg.Config:
    return vgg.Config(((8,), (8, 12), (12,)), norm, hidden=16, dropout=0.0, classes=7)


def small_vgg(norm: bool) -> nn.Module:
    with torch.device("meta"):
        module = models().VGG(nn.Identity(), dropout=0.0)
    module.features = models().vgg.make_layers([8, "M", 8, 12, "M", 12, "M"], norm)
    linear = nn.Linear(12 * 49, 16), nn.Linear(16, 16), nn.Linear(16, 7)
    for place, layer in zip((0, 3, 6), linear, strict=True):
        module.classifier[place] = layer
    return module


VIT = vit.Config(image=12, patch=4, layers=2, heads=2, width=12, hidden=20, classes=7, zero_head=False)


def torchvision_vit(cfg: vit.Config) -> nn.Module:
    sizes = {"image_size": cfg.image, "patch_size": cfg.patch, "num_layers": cfg.layers, "num_heads": cfg.heads}
    sizes |= {"hidden_dim": cfg.width, "mlp_dim": cfg.hidden}
    return models().VisionTransformer(num_classes=cfg.classes, **sizes)


def random_vit(cfg: vit.Config = VIT) -> nn.Module:
    """With other values than zeros in the head and the class token."""
    module = torchvision_vit(cfg)
    nn.init.normal_(module.heads.head.weight)
    nn.init.normal_(module.class_token)
    return module


def timm_vit(name: str) -> nn.Module:
    return pytest.importorskip("timm", reason="timm is not installed").create_model(name)
