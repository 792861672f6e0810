"""Nets with an output per pixel or region of an image."""

from nets.blocks.residual_stages import Stages
from nets.dense import deeplab, detr, fcn, fcos, transunet, unet
from tests.registry.face import images, net, published

UNET = {"width": 3, "depth": 2, "classes": 3}
net("dense unet", unet, unet.Config(**UNET), images(3, 9, 6))
net("dense unet, bilinear", unet, unet.Config(**UNET, bilinear=True), images(3, 8))
# Milesial's Pytorch-UNet with 3 channels and 2 classes.
published(unet, {"unet": 31_037_698, "unet-bilinear": 17_263_042})

BASIC = fcn.Config(Stages((1, 1), width=4), output_stride=4, classes=3, dropout=0.3)
net("fcn", fcn, BASIC, images(3, 8, 12), draws=True)
# Torchvision's, with their auxiliary heads.
published(fcn, {"fcn_resnet50": 35_322_218, "fcn_resnet101": 54_314_346})
BOTTLENECK = Stages((1, 1), "bottleneck", width=4)
DEEPLAB = deeplab.Config(BOTTLENECK, output_stride=4, rates=(2,), width=6, dropout=0.3, classes=3)
net("deeplab", deeplab, DEEPLAB, images(3, 12, 8), draws=True)
published(deeplab, {"deeplabv3_resnet50": 42_004_074, "deeplabv3_resnet101": 60_996_202})

TRANSUNET = transunet.Config(
    32, (1, 1, 1), 4, 2, layers=1, heads=2, width=6, hidden=8, decoder=(5, 4, 3, 4), bridge=6, dropout=0.3, classes=3
)
net("transunet", transunet, TRANSUNET, images(3, 32), draws=True)
# The authors' R50-ViT-B_16 for 224 pixels and 9 classes.
published(transunet, {"transunet": 105_277_081})

CIFAR = Stages((1, 1), width=4, stem="cifar")
FCOS = fcos.Config(3, CIFAR, first=0, extra=1, width=4, convolutions=1, groups=2, prior=0.3)
net("fcos", fcos, FCOS, images(3, 8))
published(fcos, {"resnet50": 32_322_720})

DETR = detr.Config(3, CIFAR, queries=3, layers=2, heads=2, width=8, hidden=6, dropout=0.2, frozen_norms=False)
# A key's bias shifts all scores of a query alike. The first layer's queries are still 0, so all values are the bias, 0.
CONSTANT = (
    "*.k.bias",
    "decoder.0.norm1.weight",
    *(f"decoder.0.attn.{name}" for name in ("k.weight", "proj.weight", "q.*", "v.weight")),
)
net("detr", detr, DETR, images(3, 8), draws=True, zero=CONSTANT)
published(detr, {})
