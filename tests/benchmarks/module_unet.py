"""The U-Net of segmentation in torch.nn, with the parameter names of milesial's Pytorch-UNet."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pair(nn.Module):
    def __init__(self, d_in: int, inner: int, d_out: int):
        super().__init__()
        layers = []
        for a, b in ((d_in, inner), (inner, d_out)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class UNet(nn.Module):
    """The paper's figure 1, padded; `down1.maxpool_conv.1` and so on."""

    def __init__(self, width: int, depth: int, bilinear: bool, classes: int):
        super().__init__()
        sizes = [width * 2**i for i in range(depth + 1)]
        half = 2 if bilinear else 1
        self.depth, self.inc, self.outc = depth, Pair(3, width, width), nn.Module()
        self.outc.conv = nn.Conv2d(width, classes, 1)
        for i in range(depth):
            d_out = sizes[i + 1] // (half if i == depth - 1 else 1)
            down, up = nn.Module(), nn.Module()
            down.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), Pair(sizes[i], d_out, d_out))
            low, d_out = sizes[depth - 1 - i], sizes[depth - 1 - i] // (half if i < depth - 1 else 1)
            up.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            if not bilinear:
                up.up = nn.ConvTranspose2d(2 * low, low, 2, 2)
            up.conv = Pair(2 * low, low, d_out)
            setattr(self, f"down{i + 1}", down)
            setattr(self, f"up{i + 1}", up)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.inc(x)]
        for i in range(self.depth):
            maps.append(getattr(self, f"down{i + 1}").maxpool_conv(maps[-1]))
        y = maps.pop()
        for i in range(self.depth):
            up, skip = getattr(self, f"up{i + 1}"), maps.pop()
            y = up.up(y)
            rows, columns = (skip.shape[k] - y.shape[k] for k in (2, 3))
            y = F.pad(y, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
            y = up.conv(torch.cat([skip, y], 1))
        return self.outc.conv(y)
