"""References of the image classifiers: rows of `references`, with the modules of `classifier_modules`."""

from dataclasses import replace
from functools import partial
from types import ModuleType

import torch
from torch import nn

from nets.classifiers import (
    alexnet,
    convnext,
    densenet,
    googlenet,
    inception,
    lenet,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    resnet,
    squeezenet,
    vgg,
    vit,
)
from tests.registry import classifier_modules as modules
from tests.registry.references import initial, names, parity


def presets_of_torchvision(net: ModuleType, prefix: str = "") -> None:
    """`names` for every preset that torchvision has a function of the same name for."""
    for name, cfg in net.PRESETS.items():
        if name.startswith(prefix):
            names(name, net, cfg, lambda name=name: getattr(modules.models(), name)())


parity("alexnet", alexnet, modules.ALEXNET, modules.small_alexnet, (2, 3, 95, 127))
initial("alexnet", alexnet, modules.ALEXNET, modules.small_alexnet)
presets_of_torchvision(alexnet)

parity("convnext, 32 x 32", convnext, modules.CONVNEXT, modules.small_convnext, (4, 3, 32, 32))
parity("convnext, 39 x 39", convnext, modules.CONVNEXT, modules.small_convnext, (4, 3, 39, 39))
initial("convnext", convnext, convnext.Config((1, 1), (48, 64), classes=40), modules.new_convnext)
presets_of_torchvision(convnext)

parity("densenet", densenet, modules.DENSENET, modules.small_densenet, (4, 3, 40, 32))
LARGER = {"growth": 32, "width": 40, "classes": 100}
initial("densenet", densenet, replace(modules.DENSENET, **LARGER), partial(modules.small_densenet, **LARGER))
presets_of_torchvision(densenet)

for name, size, options in (
    ("googlenet", (64, 64), {}),
    ("googlenet, 75 x 64", (75, 64), {}),
    ("googlenet, no aux", (64, 64), {"aux": False}),
):
    cfg = replace(modules.GOOGLENET, **options)
    parity(name, googlenet, cfg, partial(modules.small_googlenet, **options), (4, 3, *size))
NEW = partial(modules.small_googlenet, by=4, init_weights=True)
# Its head is put in after the other layers were initialised.
initial("googlenet", googlenet, modules.small_googlenet_config(4), NEW, without=("head.*",))
for aux in (True, False):
    cfg = replace(googlenet.PRESETS["googlenet"], aux=aux)
    module = partial(lambda aux: modules.models().googlenet(init_weights=False, aux_logits=aux), aux)
    names(f"googlenet, {'aux' if aux else 'no aux'}", googlenet, cfg, module)

for name, size, options in (
    ("inception", 299, {}),
    ("inception, aux 1x1", 128, {"aux_kernel": 1}),
    ("inception, no aux", 128, {"aux": False}),
):
    cfg = replace(modules.INCEPTION, **options)
    parity(name, inception, cfg, partial(modules.small_inception, **options), (4, 3, size, size))
NEW = partial(modules.small_inception, by=8, init_weights=True)
# Its heads are put in without the standard deviation of torchvision's own.
TWICE = inception.Config(4, (4, 8, 8), (16, 20, 20, 24), classes=7)
initial("inception", inception, TWICE, NEW, without=("head.*", "aux.head.*"))
for aux in (True, False):
    cfg = replace(inception.PRESETS["inception_v3"], aux=aux)
    module = partial(lambda aux: modules.models().inception_v3(init_weights=False, aux_logits=aux), aux)
    names(f"inception_v3, {'aux' if aux else 'no aux'}", inception, cfg, module)

for name, module in (
    ("lenet5", partial(modules.LeNet, torch.tanh, nn.AvgPool2d(2))),
    ("lenet5-relu", partial(modules.LeNet, torch.relu, nn.MaxPool2d(2))),
    ("lenet-digits", modules.Digits),
):
    cfg = lenet.PRESETS[name]
    parity(name, lenet, cfg, module, (3, 1, cfg.size, cfg.size))
    initial(name, lenet, cfg, module)

for padding in ("symmetric", "tensorflow"):
    for height, width in ((64, 64), (63, 50)):
        name = f"mobilenet_v1, {padding}, {height} x {width}"
        cfg = mobilenet_v1.Config(0.25, padding=padding, dropout=0.0, classes=7)
        module = partial(modules.transformers_mobilenet_v1, 0.25, 7, tf_padding=padding == "tensorflow")
        parity(name, mobilenet_v1, cfg, module, (4, 3, height, width))
for name, cfg in mobilenet_v1.PRESETS.items():
    names(name, mobilenet_v1, cfg, partial(modules.transformers_mobilenet_v1, cfg.width))

for width in (0.5, 1.0):
    name, module = f"mobilenet_v2, width {width}", partial(modules.small_mobilenet_v2, width)
    cfg = mobilenet_v2.Config(width, modules.V2_STAGES, dropout=0.0, classes=7)
    parity(name, mobilenet_v2, cfg, module, (4, 3, 32, 23))
    initial(name, mobilenet_v2, cfg, module)
for name, cfg in mobilenet_v2.PRESETS.items():
    names(name, mobilenet_v2, cfg, lambda cfg=cfg: modules.models().MobileNetV2(width_mult=cfg.width))

Block = mobilenet_v3.Block
V3_STAGES = {
    "large": (
        (Block(3, 16, 16, False, "relu"),),
        (Block(3, 40, 24, True, "relu", 2), Block(5, 72, 24, True, "hard_swish")),
        (Block(5, 96, 40, False, "hard_swish", 2),),
    ),
    "small": mobilenet_v3.SMALL[:1] + mobilenet_v3.SMALL[2:3],
}
for size, stages in V3_STAGES.items():
    for width in (1.0, 0.75):
        cfg = mobilenet_v3.Config(stages, 64, width, dropout=0.0, classes=7)
        name, module = f"mobilenet_v3, {size}, width {width}", partial(modules.small_mobilenet_v3, cfg)
        parity(name, mobilenet_v3, cfg, module, (4, 3, 32, 39))
        initial(name, mobilenet_v3, cfg, module)
presets_of_torchvision(mobilenet_v3)

for name, block, groups, group_width in (
    ("resnet, basic", "basic", 1, 64),
    ("resnet, bottleneck", "bottleneck", 1, 64),
    ("resnet, groups", "bottleneck", 4, 8),
    ("resnet, wide", "bottleneck", 1, 128),
):
    cfg = resnet.Config((2, 1, 1, 1), block, groups=groups, group_width=group_width, classes=7)
    module = partial(modules.small_resnet, block, groups=groups, width_per_group=group_width)
    parity(name, resnet, cfg, module, (4, 3, 64, 64))
cfg = resnet.Config((1, 1, 1, 1), "bottleneck", groups=2, group_width=4, classes=7)
module = partial(modules.small_resnet, "bottleneck", (1, 1, 1, 1), groups=2, width_per_group=4)
# Our head is normal (LeCun), torch's default for linear layers uniform.
initial("resnet", resnet, cfg, module, without=("head.*",))
presets_of_torchvision(resnet, prefix="res")
presets_of_torchvision(resnet, prefix="wide")

for name, preset in squeezenet.PRESETS.items():
    cfg = replace(preset, classes=7, dropout=0.0)
    parity(name, squeezenet, cfg, partial(modules.small_squeezenet, name), (2, 3, 40, 53))
    initial(name, squeezenet, cfg, partial(modules.small_squeezenet, name))
presets_of_torchvision(squeezenet)

for norm in (False, True):
    for size in (64, 32):  # each of the 7 x 7 pooled positions is a mean, or several of them share a pixel
        name, cfg = f"vgg, {'norm' if norm else 'plain'}, {size} x {size}", modules.small_vgg_config(norm)
        parity(name, vgg, cfg, partial(modules.small_vgg, norm), (3, 3, size, size))
presets_of_torchvision(vgg)

parity("vit", vit, modules.VIT, modules.random_vit, (4, 3, 12, 12))
WIDE = replace(modules.VIT, image=32, width=64, hidden=128, zero_head=True)
# Torchvision's biases of the MLPs have a standard deviation of 1e-6.
initial("vit", vit, WIDE, partial(modules.torchvision_vit, WIDE), without=("blocks.*.mlp.*.bias",))
TIMM = {"vit_ti_16": "vit_tiny_patch16_224", "vit_s_16": "vit_small_patch16_224"}
for name, cfg in vit.PRESETS.items():
    if name in TIMM:
        names(name, vit, cfg, partial(modules.timm_vit, TIMM[name]), source="timm")
    else:
        names(name, vit, cfg, lambda name=name: getattr(modules.models(), name)())
