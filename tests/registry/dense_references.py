"""References of the nets with an output per pixel: torchvision's, and the U-Net (`module_unet` of the benchmarks) and
TransUNet written in torch.nn with the names of their authors' code."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nets.blocks.residual_stages import Stages
from nets.dense import deeplab, fcn, transunet, unet
from tests.benchmarks.module_unet import UNet
from tests.registry.classifier_modules import small_resnet
from tests.registry.references import names, parity

for name, size, bilinear in (("", (32, 24), False), (", odd", (37, 29), False), (", bilinear", (27, 41), True)):
    cfg = unet.Config(4, 3, bilinear, classes=3)
    parity(f"dense unet{name}", unet, cfg, partial(UNet, 4, 3, bilinear, 3), (3, 3, *size))
for name, cfg in unet.PRESETS.items():
    names(name, unet, cfg, lambda cfg=cfg: UNet(cfg.width, cfg.depth, cfg.bilinear, cfg.classes))


def torchvision(name: str):
    """A module of torchvision's models."""
    return pytest.importorskip(f"torchvision.models.{name}", reason="torchvision is not installed")


def as_tensors(module: nn.Module) -> nn.Module:
    """With outputs like ours, not in a dict, and without dropout."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0

    class Tensors(type(module)):
        def forward(self, x: Tensor):
            out = super().forward(x)
            return (out["out"], out["aux"]) if self.training else out["out"]

    module.__class__ = Tensors
    return module


def small(kind: str, block: str, dilated: bool) -> nn.Module:
    """A net of one block per stage; torchvision has no argument for its width."""
    body = small_resnet(block, (1, 1, 1, 1), replace_stride_with_dilation=[False, dilated, dilated])
    body = torchvision("_utils").IntermediateLayerGetter(body, {"layer4": "out", "layer3": "aux"})
    parts, width = torchvision("segmentation"), {"basic": 256, "bottleneck": 1024}[block]
    aux = parts.fcn.FCNHead(width, 5)
    if kind == "fcn":
        return as_tensors(parts.FCN(body, parts.fcn.FCNHead(2 * width, 5), aux))
    return as_tensors(parts.DeepLabV3(body, parts.deeplabv3.DeepLabHead(2 * width, 5), aux))


def published(name: str) -> nn.Module:
    options = {"weights": None, "weights_backbone": None, "aux_loss": True, "num_classes": 21}
    return getattr(torchvision("segmentation"), name)(**options)


ONE = (1, 1, 1, 1)
cfg = fcn.Config(Stages(ONE, "bottleneck"), dropout=0.0, classes=5)
parity("fcn", fcn, cfg, partial(small, "fcn", "bottleneck", True), (2, 3, 40, 33))
cfg = deeplab.Config(Stages(ONE), output_stride=32, dropout=0.0, aux_dropout=0.0, classes=5)
parity("deeplab", deeplab, cfg, partial(small, "deeplab", "basic", False), (2, 3, 64, 50))
for net in (fcn, deeplab):
    for name, cfg in net.PRESETS.items():
        if not name.endswith("18"):  # torchvision spreads the kernels of bottlenecks alone
            options = {"weights": None, "weights_backbone": None, "aux_loss": True, "num_classes": 21}
            names(
                name, net, cfg, lambda name=name, options=options: getattr(torchvision("segmentation"), name)(**options)
            )


class TransUNet(nn.Module):
    """The hybrid as its authors' code computes it."""

    def __init__(self, cfg: transunet.Config):
        super().__init__()
        self.cfg, body, w = cfg, "transformer.embeddings.hybrid_model", cfg.stem
        self.add(f"{body}.root.conv", nn.Conv2d(3, w, 7, 2, 3, bias=False))
        self.add(f"{body}.root.gn", nn.GroupNorm(cfg.groups, w, 1e-6))
        self.units, d_in = [], w
        for s, depth in enumerate(cfg.depths):
            inner, d_out = w * 2**s, 4 * w * 2**s
            for u in range(depth):
                name, stride = f"{body}.body.block{s + 1}.unit{u + 1}", 2 if s and not u else 1
                for i, (a, b, k, step) in enumerate(
                    ((d_in, inner, 1, 1), (inner, inner, 3, stride), (inner, d_out, 1, 1))
                ):
                    self.add(f"{name}.conv{i + 1}", nn.Conv2d(a, b, k, step, k // 2, bias=False))
                    self.add(f"{name}.gn{i + 1}", nn.GroupNorm(cfg.groups, b, 1e-6))
                if d_in != d_out or stride == 2:
                    self.add(f"{name}.downsample", nn.Conv2d(d_in, d_out, 1, stride, bias=False))
                    self.add(f"{name}.gn_proj", nn.GroupNorm(d_out, d_out))
                self.units.append((s, name))
                d_in = d_out
        self.add("transformer.embeddings.patch_embeddings", nn.Conv2d(d_in, cfg.width, 1))
        positions = nn.Parameter(torch.randn(1, (cfg.image // 16) ** 2, cfg.width))
        self.transformer.embeddings.position_embeddings = positions
        for i in range(cfg.layers):
            name = f"transformer.encoder.layer.{i}"
            for part in ("attention_norm", "ffn_norm"):
                self.add(f"{name}.{part}", nn.LayerNorm(cfg.width, 1e-6))
            for part in ("query", "key", "value", "out"):
                self.add(f"{name}.attn.{part}", nn.Linear(cfg.width, cfg.width))
            self.add(f"{name}.ffn.fc1", nn.Linear(cfg.width, cfg.hidden))
            self.add(f"{name}.ffn.fc2", nn.Linear(cfg.hidden, cfg.width))
        self.add("transformer.encoder.encoder_norm", nn.LayerNorm(cfg.width, 1e-6))
        self.add("decoder.conv_more", self.conv_relu(cfg.width, cfg.bridge))
        d_in = cfg.bridge
        for i, (skip, d_out) in enumerate(zip((8 * w, 4 * w, w, 0), cfg.decoder, strict=True)):
            self.add(f"decoder.blocks.{i}.conv1", self.conv_relu(d_in + skip, d_out))
            self.add(f"decoder.blocks.{i}.conv2", self.conv_relu(d_out, d_out))
            d_in = d_out
        self.add("segmentation_head.0", nn.Conv2d(d_in, cfg.classes, 3, padding=1))

    def add(self, name: str, module: nn.Module) -> None:
        *parents, last = name.split(".")
        node = self
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, nn.Module())
            node = getattr(node, parent)
        node.add_module(last, module)

    @staticmethod
    def conv_relu(d_in: int, d_out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(d_in, d_out, 3, padding=1, bias=False), nn.BatchNorm2d(d_out), nn.ReLU())

    def std(self, conv: str, norm: str, x: Tensor) -> Tensor:
        layer = self.get_submodule(conv)
        mean = layer.weight.mean((1, 2, 3), keepdim=True)
        deviation = (layer.weight.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        y = F.conv2d(x, (layer.weight - mean) / deviation, None, layer.stride, layer.padding)
        return self.get_submodule(norm)(y)

    def unit(self, name: str, x: Tensor) -> Tensor:
        y = x
        for i in (1, 2, 3):
            y = self.std(f"{name}.conv{i}", f"{name}.gn{i}", y)
            y = y.relu() if i < 3 else y
        if hasattr(self.get_submodule(name), "downsample"):
            x = self.std(f"{name}.downsample", f"{name}.gn_proj", x)
        return (x + y).relu()

    def forward(self, x: Tensor) -> Tensor:
        body, of = "transformer.embeddings.hybrid_model", self.get_submodule
        y = self.std(f"{body}.root.conv", f"{body}.root.gn", x).relu()
        maps = {0: y}
        y = F.max_pool2d(y, 3, 2)
        for s, name in self.units:
            y = maps[s + 1] = self.unit(name, y)
        for s, side in ((1, x.shape[2] // 4), (2, x.shape[2] // 8)):
            whole = torch.zeros(*maps[s].shape[:2], side, side)
            whole[..., : maps[s].shape[2], : maps[s].shape[3]] = maps[s]
            maps[s] = whole
        z = of("transformer.embeddings.patch_embeddings")(y)
        rows = z.shape[2]
        z = z.flatten(2).mT + self.transformer.embeddings.position_embeddings
        for i in range(self.cfg.layers):
            name = f"transformer.encoder.layer.{i}"
            h = of(f"{name}.attention_norm")(z)
            q, k, v = (of(f"{name}.attn.{n}")(h).unflatten(-1, (self.cfg.heads, -1)) for n in ("query", "key", "value"))
            h = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v))).transpose(1, 2).flatten(2)
            z = z + of(f"{name}.attn.out")(h)
            z = z + of(f"{name}.ffn.fc2")(F.gelu(of(f"{name}.ffn.fc1")(of(f"{name}.ffn_norm")(z))))
        z = of("transformer.encoder.encoder_norm")(z).mT.unflatten(2, (rows, rows))
        y = of("decoder.conv_more")(z)
        for i in range(4):
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
            y = torch.cat([y, maps[2 - i]], 1) if i < 3 else y
            y = of(f"decoder.blocks.{i}.conv2")(of(f"decoder.blocks.{i}.conv1")(y))
        return of("segmentation_head.0")(y)


SIZES = {"layers": 2, "heads": 2, "width": 12, "hidden": 20, "decoder": (10, 8, 6, 5), "bridge": 14}
cfg = transunet.Config(64, (2, 1, 1), 8, 4, **SIZES, dropout=0.0, classes=3)
parity("transunet", transunet, cfg, partial(TransUNet, cfg), (3, 3, 64, 64))
