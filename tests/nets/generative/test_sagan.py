"""Residual players with self-attention against the same nets written with torch.nn."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core import random, spec, tree
from nets.generative import sagan
from tests.nets.generative.critics import check_penalty
from tests.nets.parity import assert_same, randomise

CFG = sagan.Config(
    16,
    2,
    6,
    generator_widths=(16, 8, 8),
    critic_widths=(8, 16, 16),
    attention=8,
    gamma=0.5,
    classes=3,
)
LABELS = torch.tensor([2, 0, 1, 2])


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.key, self.query, self.value = (nn.Conv2d(channels, channels // 8, 1, bias=False) for _ in range(3))
        self.out = nn.Conv2d(channels // 8, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        f, g, h = (m(x).flatten(2) for m in (self.key, self.query, self.value))
        s = torch.einsum("bci,bcj->bij", f, g)  # s_ij = f(x_i) . g(x_j)
        beta = F.softmax(s, dim=1)  # over i
        o = torch.einsum("bci,bij->bcj", h, beta).unflatten(2, x.shape[2:])
        return self.gamma * self.out(o) + x


class ConditionalNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.weight, self.bias = nn.Embedding(3, channels), nn.Embedding(3, channels)

    def forward(self, x, y):
        return self.weight(y)[..., None, None] * self.norm(x) + self.bias(y)[..., None, None]


class Up(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.norm1, self.norm2 = ConditionalNorm(d_in), ConditionalNorm(d_out)
        self.conv1, self.conv2 = (nn.Conv2d(d, d_out, 3, 1, 1, bias=False) for d in (d_in, d_out))
        self.shortcut = nn.Conv2d(d_in, d_out, 1, bias=False)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x, y):
        h = self.conv1(self.up(F.relu(self.norm1(x, y))))
        return self.conv2(F.relu(self.norm2(h, y))) + self.shortcut(self.up(x))


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(6, 16 * 16)
        self.blocks = nn.ModuleList([Up(16, 8), Up(8, 8)])
        self.attention, self.norm = Attention(8), nn.BatchNorm2d(8)
        self.output = nn.Conv2d(8, 2, 3, 1, 1)

    def forward(self, z, y):
        x = self.project(z).view(-1, 16, 4, 4)
        x = self.attention(self.blocks[0](x, y))
        return self.output(F.relu(self.norm(self.blocks[1](x, y)))).tanh()


class Down(nn.Module):
    def __init__(self, d_in, d_out, first, halve):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(d_in, d_out, 3, 1, 1), nn.Conv2d(d_out, d_out, 3, 1, 1)
        if halve or d_in != d_out:
            self.shortcut = nn.Conv2d(d_in, d_out, 1)
        self.first, self.halve = first, halve

    def forward(self, x):
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        x = h + (self.shortcut(x) if hasattr(self, "shortcut") else x)
        return F.avg_pool2d(x, 2) if self.halve else x


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Down(2, 8, True, True), Down(8, 16, False, True), Down(16, 16, False, False)])
        self.attention, self.out, self.classes = Attention(8), nn.Linear(16, 1), nn.Embedding(3, 16)

    def forward(self, x, y):
        x = self.attention(self.blocks[0](x))
        h = F.relu(self.blocks[2](self.blocks[1](x))).sum((2, 3))
        return self.out(h)[:, 0] + (self.classes(y) * h).sum(1)


def filled(model, module):
    """Our tree from a module with our names, except for batch norm's statistics and the tables by class."""
    theirs = {"count": "num_batches_tracked", "mean": "running_mean", "var": "running_var"}
    state, leaves = module.state_dict(), {}
    for name in tree.names(model):
        *path, leaf = name.replace("by_class.", "").split(".")
        leaves[name] = state.pop(".".join([*path, theirs.get(leaf, leaf)])).clone().double()
    assert not state
    values = tree.nest(leaves, spec.init(random.key(0), model))
    spec.check(model, values)
    return values


def random_module(kind):
    """Double precision, with attention far from uniform, so that every detail of it matters."""
    torch.manual_seed(0)
    module = randomise(kind()).double()
    with torch.no_grad():
        for m in (module.attention.key, module.attention.query):
            m.weight *= 5
    return module


def test_generator_parity():
    module, z = random_module(Generator), random.normal(random.key(0), (4, 6), torch.float64)
    values = filled(sagan.generator_spec(CFG), module)
    assert_same(sagan.generator(values, z, CFG, labels=LABELS), module.eval()(z, LABELS).detach(), "eval", 1e-12)
    actual = sagan.generator(values, z, CFG, labels=LABELS, train=True)
    assert_same(actual, module.train()(z, LABELS).detach(), "training", 1e-12)


def test_critic_parity():
    module, x = random_module(Critic), random.normal(random.key(0), (4, 2, 16, 16), torch.float64)
    values = filled(sagan.critic_spec(CFG), module)
    assert_same(sagan.critic(values, x, CFG, labels=LABELS), module(x, LABELS).detach(), "scores", 1e-12)


def test_attention_begins_as_the_identity():
    p = spec.init(random.key(0), sagan.attention_spec(16))
    x = random.normal(random.key(1), (2, 16, 3, 4))
    assert torch.equal(sagan.self_attention(p, x), x)


@pytest.mark.parametrize("preset", sagan.PRESETS)
def test_presets(preset):
    cfg = sagan.PRESETS[preset]
    z = torch.empty(3, cfg.latent, device="meta")
    x = sagan.generator(spec.abstract(sagan.generator_spec(cfg)), z, cfg)
    assert tuple(x.shape) == (3, cfg.channels, cfg.size, cfg.size)
    out = sagan.critic_outputs(spec.abstract(sagan.critic_spec(cfg)), x, cfg)
    assert tuple(out["scores"].shape) == (3,) and tuple(out["features"].shape) == (3, cfg.critic_widths[-1])


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "layer", "instance"])
def test_penalty(norm):
    options = {"attention": 4, "gamma": 0.5} if norm == "none" else {}
    cfg = sagan.Config(8, 2, 4, (4, 4, 4), (4, 4), 1, norm, **options)
    params = spec.init(random.key(0), sagan.critic_spec(cfg), torch.float64)
    x = random.normal(random.key(1), (3, 2, 8, 8), torch.float64)
    check_penalty(lambda params, x: sagan.critic(params, x, cfg), params, x, compile=norm == "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "norm 'batch'; expected one of instance, layer, none"),
        ({"pool": "max"}, "pool 'max'; expected mean or sum"),
        ({"size": 36}, "images of 36 pixels per side cannot be halved 3 times"),
        ({"halvings": 5}, "5 halvings do not fit 4 blocks and 32 pixels"),
        ({"attention": 4}, r"attention at 4 pixels; both players have feature maps of \[8, 16\]"),
    ],
    ids=["norm", "pool", "size", "halvings", "attention"],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        sagan.Config(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16, 16), r"sagan critic: expected images \(batch, 2, height, width\)"),
        ((2, 2, 32, 16), "32 x 16; expected 16 x 16"),
        ((2, 2, 16, 16), "conditional on classes; pass labels="),
    ],
    ids=["channels", "size", "labels"],
)
def test_wrong_images(shape, message):
    with pytest.raises(ValueError, match=message):
        sagan.critic(spec.abstract(sagan.critic_spec(CFG)), torch.empty(shape, device="meta"), CFG)
