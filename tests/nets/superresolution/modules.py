"""The nets in torch.nn, written from the papers, with the names of tensors of the public versions."""

import torch
from torch import nn
from torch.nn import functional as F


def conv(d_in, d_out, kernel=3, bias=True, stride=1):
    return nn.Conv2d(d_in, d_out, kernel, stride, kernel // 2, bias=bias)


class Srcnn(nn.Module):
    def __init__(self, kernels=(9, 1, 5), widths=(64, 32)):
        super().__init__()
        self.conv1, self.conv2 = conv(1, widths[0], kernels[0]), conv(*widths, kernels[1])
        self.conv3 = conv(widths[1], 1, kernels[2])

    def forward(self, x):
        return self.conv3(self.conv2(self.conv1(x).relu()).relu())


class Fsrcnn(nn.Module):
    def __init__(self, scale, d=56, s=12, m=4):
        super().__init__()
        self.first_part = nn.Sequential(conv(1, d, 5), nn.PReLU(d))
        layers = [conv(d, s, 1), nn.PReLU(s)]
        for _ in range(m):
            layers += [conv(s, s), nn.PReLU(s)]
        self.mid_part = nn.Sequential(*layers, conv(s, d, 1), nn.PReLU(d))
        self.last_part = nn.ConvTranspose2d(d, 1, 9, scale, 4, scale - 1)

    def forward(self, x):
        return self.last_part(self.mid_part(self.first_part(x)))


class Espcn(nn.Module):
    def __init__(self, scale, activation=nn.Tanh):
        super().__init__()
        self.first_part = nn.Sequential(conv(1, 64, 5), activation(), conv(64, 32), activation())
        self.last_part = nn.Sequential(conv(32, scale**2), nn.PixelShuffle(scale))

    def forward(self, x):
        return self.last_part(self.first_part(x))


class Vdsr(nn.Module):
    def __init__(self, depth=20, width=64):
        super().__init__()
        self.input, self.output = conv(1, width, bias=False), conv(width, 1, bias=False)
        inner = [nn.ModuleDict({"conv": conv(width, width, bias=False)}) for _ in range(depth - 2)]
        self.residual_layer = nn.ModuleList(inner)

    def forward(self, x):
        y = self.input(x).relu()
        for layer in self.residual_layer:
            y = layer["conv"](y).relu()
        return x + self.output(y)


class Drcn(nn.Module):
    """No public version is known; the names are ours."""

    def __init__(self, recursions, width):
        super().__init__()
        self.embedding = nn.ModuleList([conv(1, width), conv(width, width)])
        self.recursion = conv(width, width)
        self.reconstruction = nn.ModuleList([conv(width, width), conv(width, 1)])
        self.weights = nn.Parameter(torch.randn(recursions))

    def forward(self, x):
        h, total = x, 0.0
        for layer in self.embedding:
            h = layer(h).relu()
        for weight in self.weights:
            h = self.recursion(h).relu()
            total = total + weight * (x + self.reconstruction[1](self.reconstruction[0](h).relu()))
        return total


class Activated(nn.Module):
    """relu, then a convolution, as `module.1`."""

    def __init__(self, d_in, d_out, inplace):
        super().__init__()
        self.module = nn.Sequential(nn.ReLU(inplace), conv(d_in, d_out, bias=False))

    def forward(self, x):
        return self.module(x)


class Drrn(nn.Module):
    """inplace: the ReLUs of the public versions, by which h_0 is rectified."""

    def __init__(self, blocks, units, width=128, inplace=False):
        super().__init__()
        self.units = units

        def block(d_in):
            unit = nn.Module()
            unit.module = nn.Sequential(*(Activated(width, width, inplace) for _ in range(2)))
            return nn.ModuleDict({"h0": Activated(d_in, width, inplace), "ru": unit})

        self.rbs = nn.ModuleList([block(width if b else 1) for b in range(blocks)])
        self.rec = Activated(width, 1, inplace)

    def forward(self, x):
        h = x
        for block in self.rbs:
            h_0 = h = block["h0"](h)
            for _ in range(self.units):
                h = h_0 + block["ru"].module(h)
        return x + self.rec(h)


class Residual(nn.Module):
    def __init__(self, width, scale=1.0, kernel=3):
        super().__init__()
        self.body, self.scale = nn.Sequential(conv(width, width, kernel), nn.ReLU(), conv(width, width, kernel)), scale

    def forward(self, x):
        return x + self.scale * self.body(x)


def upsampler(scale, width):
    factors = {2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}[scale]
    return nn.Sequential(*(layer for f in factors for layer in (conv(width, f * f * width), nn.PixelShuffle(f))))


class Edsr(nn.Module):
    """EDSR, or MDSR with several scales, whose forward takes the scale."""

    def __init__(self, scales, blocks, width, residual_scale=1.0, white=255.0):
        super().__init__()
        self.scales, self.white = scales, white
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040])[:, None, None], persistent=False)
        self.head = nn.Sequential(conv(3, width))
        body = [Residual(width, residual_scale) for _ in range(blocks)]
        self.body = nn.Sequential(*body, conv(width, width))
        if len(scales) == 1:
            self.tail = nn.Sequential(upsampler(scales[0], width), conv(width, 3))
        else:
            own = [nn.Sequential(Residual(width, kernel=5), Residual(width, kernel=5)) for _ in scales]
            self.pre_process = nn.ModuleList(own)
            self.upsample = nn.ModuleList([upsampler(scale, width) for scale in scales])
            self.tail = nn.Sequential(conv(width, 3))

    def forward(self, x, scale=None):
        x = self.head(self.white * (x - self.mean))
        if scale is None:
            return self.tail(x + self.body(x)) / self.white + self.mean
        number = self.scales.index(scale)
        x = self.pre_process[number](x)
        return self.tail(self.upsample[number](x + self.body(x))) / self.white + self.mean


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        normed = [[conv(width, width, bias=False), nn.BatchNorm2d(width)] for _ in range(2)]
        self.rcb = nn.Sequential(*normed[0], nn.PReLU(), *normed[1])

    def forward(self, x):
        return x + self.rcb(x)


class Up(nn.Module):
    def __init__(self, width, factor):
        super().__init__()
        self.upsample_block = nn.Sequential(conv(width, factor**2 * width), nn.PixelShuffle(factor), nn.PReLU())

    def forward(self, x):
        return self.upsample_block(x)


class SrResNet(nn.Module):
    def __init__(self, scale, blocks=16, width=64):
        super().__init__()
        self.conv1 = nn.Sequential(conv(3, width, 9), nn.PReLU())
        self.trunk = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.conv2 = nn.Sequential(conv(width, width, bias=False), nn.BatchNorm2d(width))
        factors = {2: (2,), 3: (3,), 4: (2, 2)}[scale]
        self.upsampling = nn.Sequential(*(Up(width, factor) for factor in factors))
        self.conv3 = conv(width, 3, 9)

    def forward(self, x):
        x = self.conv1(x)
        return self.conv3(self.upsampling(x + self.conv2(self.trunk(x))))


class SrganCritic(nn.Module):
    def __init__(self, width, hidden, size):
        super().__init__()
        widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
        self.layers = nn.ModuleList([conv(3, width)])
        self.norms = nn.ModuleList([nn.Identity()])
        for i in range(1, 8):
            self.layers.append(conv(widths[i - 1], widths[i], bias=False, stride=2 if i % 2 else 1))
            self.norms.append(nn.BatchNorm2d(widths[i]))
        self.hidden, self.head = nn.Linear(8 * width * (size // 16) ** 2, hidden), nn.Linear(hidden, 1)

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.leaky_relu(norm(layer(x)), 0.2)
        return self.head(F.leaky_relu(self.hidden(x.flatten(1)), 0.2))[:, 0]
