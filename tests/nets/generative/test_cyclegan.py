"""CycleGAN against the published architectures as torch modules."""

import dataclasses

import pytest
import torch
from torch import nn

from core import random, spec, tree
from nets.generative import cyclegan

TINY = cyclegan.Config(width=4, blocks=2, critic_width=4, critic_layers=2)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        halves = [[nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)] for _ in range(2)]
        self.inner = nn.Sequential(*halves[0], nn.ReLU(), *halves[1])

    def forward(self, x):
        return x + self.inner(x)


def generator_module(cfg):
    """c7s1-k, d2k, d4k, R4k ..., u2k, uk, c7s1-3 of the paper's appendix; biases everywhere, as published."""

    def then(layer, width):
        return [layer, nn.InstanceNorm2d(width), nn.ReLU()]

    k = cfg.width
    layers = [nn.ReflectionPad2d(3), *then(nn.Conv2d(cfg.channels, k, 7), k)]
    for d in (k, 2 * k):
        layers += then(nn.Conv2d(d, 2 * d, 3, 2, 1), 2 * d)
    layers += [Residual(4 * k) for _ in range(cfg.blocks)]
    for d in (4 * k, 2 * k):
        if cfg.upsample == "nearest":
            layers += [nn.Upsample(scale_factor=2), *then(nn.Conv2d(d, d // 2, 3, 1, 1), d // 2)]
        else:
            layers += then(nn.ConvTranspose2d(d, d // 2, 3, 2, 1, 1), d // 2)
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(k, cfg.channels, 7), nn.Tanh())


def critic_module(cfg):
    k = cfg.critic_width
    layers = [nn.Conv2d(cfg.channels, k, 4, 2, 1), nn.LeakyReLU(0.2)]
    for d_in, d_out, stride in ((k, 2 * k, 2), (2 * k, 4 * k, 1)):
        layers += [nn.Conv2d(d_in, d_out, 4, stride, 1), nn.InstanceNorm2d(d_out), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(4 * k, 1, 4, 1, 1))


def generator_order(params):
    both = [p for block in params["blocks"] for p in block]
    return [params["stem"], *params["down"], *both, *params["up"], params["head"]]


def fill(module, convs):
    """Copy our weights. Biases that we do not have stay, since the norms cancel them; their count is returned."""
    modules = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    for m, p in zip(modules, convs, strict=True):
        for name, x in p.items():
            getattr(m, name).data.copy_(x)
    return sum(m.bias.numel() for m, p in zip(modules, convs, strict=True) if "bias" not in p)


@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_parity_of_the_generator(upsample):
    cfg = dataclasses.replace(TINY, upsample=upsample)
    params = spec.init(random.key(0), cyclegan.generator_spec(cfg), torch.float64)
    module = generator_module(cfg).double()
    superfluous = fill(module, generator_order(params))
    assert sum(p.numel() for p in module.parameters()) == tree.count(params) + superfluous
    x = random.normal(random.key(1), (2, 3, 16, 24), torch.float64)
    expected = module(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(cyclegan.generator(params, x, cfg), expected, rtol=1e-9, atol=1e-12)


def test_parity_of_the_critic():
    params = spec.init(random.key(0), cyclegan.critic_spec(TINY), torch.float64)
    module = critic_module(TINY).double()
    fill(module, [*(p["conv"] for p in params["layers"]), params["head"]])
    x = random.normal(random.key(1), (2, 3, 16, 24), torch.float64)
    torch.testing.assert_close(cyclegan.critic(params, x, TINY), module(x), rtol=1e-9, atol=1e-12)


def test_paper_sizes():
    cfg = cyclegan.PRESETS["paper"]
    x = torch.empty(1, 3, 256, 256, device="meta")
    assert cyclegan.generator(spec.abstract(cyclegan.generator_spec(cfg)), x, cfg).shape == x.shape
    assert cyclegan.critic(spec.abstract(cyclegan.critic_spec(cfg)), x, cfg).shape == (1, 1, 30, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upsample": "bilinear"}, "upsample 'bilinear' is unknown; expected transposed or nearest"),
        ({"blocks": -1}, "-1 blocks; expected at least 0"),
        ({"width": 0}, "width is 0; expected at least 1"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, 16), r"expected images \(batch, 3, height, width\), found \(2, 1, 16, 16\)"),
        ((3, 4, 16), "4 x 16; expected at least 8"),
        ((3, 16, 18), "16 x 18; expected multiples of 4"),
    ],
)
def test_wrong_images(shape, message):
    params = spec.abstract(cyclegan.generator_spec(TINY))
    with pytest.raises(ValueError, match=message):
        cyclegan.generator(params, torch.empty(2, *shape, device="meta"), TINY)
