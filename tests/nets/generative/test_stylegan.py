"""StyleGAN against its equations as torch modules; growing, mixing, truncation, the minibatch standard deviation."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, grad_and_value, vmap
from torch.nn import functional as F

from core import random, spec, tree
from core.layers import upsample_nearest
from nets.blocks import style_blocks
from nets.generative import stylegan

TINY = stylegan.Config(16, 2, latent=6, style=5, mapping_layers=3, width=24, most=8, group=2)
Z = random.normal(random.key(3), (4, 6), torch.float64)
IMAGES = random.normal(random.key(4), (4, 2, 16, 16), torch.float64)


def random_values(model):
    """Initial values plus noise, so that no bias or scale of noise is 0."""
    values = spec.init(random.key(0), model, torch.float64)
    hashes = {name: spec.name_hash(name) for name in tree.names(values)}

    def moved(name, x):
        return x + 0.3 * random.normal(random.fold_in(random.key(1), hashes[name]), tuple(x.shape), x.dtype)

    return tree.map_with_names(moved, values)


GENERATOR, CRITIC = random_values(stylegan.generator_spec(TINY)), random_values(stylegan.critic_spec(TINY))


# Modules, in the authors' order of operations.


class Scaled(nn.Module):
    """A linear layer or a convolution whose weight is multiplied by gain / sqrt(fan in) each time."""

    def __init__(self, p, gain, rate=1.0):
        super().__init__()
        self.weight = nn.Parameter(p["weight"])
        self.bias = nn.Parameter(p["bias"]) if "bias" in p else None
        self.rate = rate
        self.scale = gain * rate / math.sqrt(p["weight"][0].numel())

    def forward(self, x):
        bias = None if self.bias is None else self.bias * self.rate
        if self.weight.ndim == 2:
            return F.linear(x, self.weight * self.scale, bias)
        return F.conv2d(x, self.weight * self.scale, bias, padding=self.weight.shape[-1] // 2)


class Blur(nn.Module):
    def forward(self, x):
        kernel = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=x.dtype) / 16
        return F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])


class Styled(nn.Module):
    def __init__(self, p, up):
        super().__init__()
        conv = [Scaled(p["conv"], math.sqrt(2))] if "conv" in p else []
        self.conv = nn.Sequential(nn.Upsample(scale_factor=2), *conv, Blur()) if up else nn.Sequential(*conv)
        self.style, self.p = Scaled(p["style"], 1.0), p

    def forward(self, x, w, noise):
        x = self.conv(x) + noise * self.p["noise"].reshape(1, -1, 1, 1) + self.p["bias"].reshape(1, -1, 1, 1)
        x = F.leaky_relu(x, 0.2)
        x = x - x.mean((2, 3), keepdim=True)
        x = x / (x.square().mean((2, 3), keepdim=True) + 1e-8).sqrt()
        style = self.style(w).reshape(len(w), 2, -1, 1, 1)
        return x * (style[:, 0] + 1) + style[:, 1]


class Generator(nn.Module):
    def __init__(self, params, rate):
        super().__init__()
        self.mapping = nn.ModuleList([Scaled(p, math.sqrt(2), rate) for p in params["mapping"]])
        self.layers = nn.ModuleList(
            [Styled(p, i > 0 and j == 0) for i, b in enumerate(params["blocks"]) for j, p in enumerate(b["layers"])]
        )
        self.images = nn.ModuleList([Scaled(block["image"], 1.0) for block in params["blocks"]])
        self.constant = params["constant"]

    def styles(self, z):
        w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
        for layer in self.mapping:
            w = F.leaky_relu(layer(w), 0.2)
        return w

    def forward(self, styles, noise, level, alpha):
        """Images of all levels, the last two blended, as in the authors' growing."""
        x, images = self.constant.expand(styles.shape[0], -1, -1, -1), []
        for i in range(2 * level + 2):
            x = self.layers[i](x, styles[:, i], noise[i])
            if i % 2:
                images.append(self.images[i // 2](x))
        if level == 0:
            return images[0]
        return alpha * images[-1] + (1 - alpha) * F.interpolate(images[-2], scale_factor=2)


class Critic(nn.Module):
    def __init__(self, params):
        super().__init__()
        root = math.sqrt(2)
        self.convs = nn.ModuleList([nn.ModuleList([Scaled(p, root) for p in b["convs"]]) for b in params["blocks"]])
        self.images = nn.ModuleList([Scaled(block["image"], root) for block in params["blocks"]])
        self.hidden, self.head = Scaled(params["hidden"], root), Scaled(params["head"], 1.0)

    def forward(self, image, level, alpha, group):
        x = F.leaky_relu(self.images[level](image), 0.2)
        for i in range(level, 0, -1):
            x = Blur()(F.leaky_relu(self.convs[i][0](x), 0.2))
            x = F.leaky_relu(F.avg_pool2d(self.convs[i][1](x), 2), 0.2)
            if i == level:
                small = F.leaky_relu(self.images[i - 1](F.avg_pool2d(image, 2)), 0.2)
                x = alpha * x + (1 - alpha) * small
        stds = std_one_by_one(x, group)
        x = torch.cat([x, stds.reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)], 1)
        x = F.leaky_relu(self.convs[0][0](x), 0.2).flatten(1)
        return self.head(F.leaky_relu(self.hidden(x), 0.2))[:, 0]


def std_one_by_one(x, group):
    groups, stds = len(x) // group, torch.empty(len(x), dtype=x.dtype)
    for i in range(len(x)):
        members = x[[j for j in range(len(x)) if j % groups == i % groups]]
        stds[i] = (members.var(0, unbiased=False) + 1e-8).sqrt().mean()
    return stds


@pytest.mark.parametrize(("level", "alpha"), [(0, 1.0), (1, 0.3), (2, 1.0), (2, 0.8)])
def test_parity(level, alpha):
    with torch.no_grad():
        module = Generator(GENERATOR, TINY.mapping_rate)
        noise = stylegan.noises(random.key(8), 4, level, torch.float64)
        styles = module.styles(Z)[:, None].expand(4, 2 * level + 2, 5)
        expected = module(styles, noise, level, alpha)
        assert expected.std() > 0.1
        actual = stylegan.generator(GENERATOR, Z, TINY, level=level, alpha=alpha, noise=noise)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
        images = stylegan.reals(IMAGES, level, 1.0, TINY)
        expected = Critic(CRITIC)(images, level, alpha, TINY.group)
        actual = stylegan.critic(CRITIC, images, TINY, level=level, alpha=alpha)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


# Growing.


def test_fading_begins_with_the_level_below():
    for level in (1, 2):
        # The noise of the lower layers differs with the level, since one draw serves all.
        noise = stylegan.noises(random.key(0), 1, level, torch.float64)
        coarse = stylegan.generator(GENERATOR, Z, TINY, level=level - 1, noise=noise[:-2])
        fine = stylegan.generator(GENERATOR, Z, TINY, level=level, alpha=0.0, noise=noise)
        torch.testing.assert_close(fine, upsample_nearest(coarse))
        images = stylegan.reals(IMAGES, level, 0.0, TINY)
        below = stylegan.reals(IMAGES, level - 1, 1.0, TINY)
        torch.testing.assert_close(images, upsample_nearest(below))
        scores = stylegan.critic(CRITIC, images, TINY, level=level, alpha=0.0)
        torch.testing.assert_close(scores, stylegan.critic(CRITIC, below, TINY, level=level - 1))


def test_growth_is_the_published_schedule():
    cfg = stylegan.Config(32)
    actual = [stylegan.growth(shown, 100, cfg) for shown in (0, 99, 100, 150, 199, 200, 299, 300, 350, 400, 10_000)]
    expected = [(1, 1.0), (1, 1.0), (2, 0.0), (2, 0.5), (2, 0.99), (2, 1.0), (2, 1.0), (3, 0.0), (3, 0.5)]
    assert actual == [*expected, (3, 1.0), (3, 1.0)]
    assert stylegan.growth(0, 100, cfg, first=3) == (3, 1.0) == stylegan.growth(150, 100, cfg, first=3)


@pytest.mark.slow
def test_fading_does_not_recompile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    cfg = dataclasses.replace(TINY, size=8, mapping_layers=1)
    g, c = random_values(stylegan.generator_spec(cfg)), random_values(stylegan.critic_spec(cfg))

    def both(g, c, alpha):
        images = stylegan.generator(g, Z, cfg, key=random.key(1), train=True, alpha=alpha)
        return images, stylegan.critic(c, images, cfg, alpha=alpha)

    compiled = torch.compile(both, backend=counter, fullgraph=True, dynamic=False)
    for alpha in (0.0, 0.25, 1.0):
        actual, expected = compiled(g, c, torch.tensor(alpha)), both(g, c, alpha)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


# Styles and noise.


def test_mapping_depends_on_directions_only():
    w = stylegan.mapping(GENERATOR, Z, TINY)
    torch.testing.assert_close(stylegan.mapping(GENERATOR, 7 * Z, TINY), w, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(stylegan.mapping(GENERATOR, -Z, TINY), w)


@pytest.mark.parametrize("rate", [1.0, 0.01])
def test_a_slower_mapping_starts_as_any_other_and_moves_less(rate):
    cfg = stylegan.Config(8, latent=64, style=64, most=8, mapping_layers=3, mapping_rate=rate)
    plain = dataclasses.replace(cfg, mapping_rate=1.0)
    params = [spec.init(random.key(0), stylegan.generator_spec(c), torch.float64) for c in (cfg, plain)]
    z = random.normal(random.key(1), (50, 64), torch.float64)
    w, other = (stylegan.mapping(p, z, c) for p, c in zip(params, (cfg, plain), strict=True))
    torch.testing.assert_close(w, other)
    assert 0.5 < w.square().mean() < 2
    moved = tree.map(lambda x: x + 1e-3, params[0])
    change = (stylegan.mapping(moved, z, cfg) - w).abs().mean()
    wide = (stylegan.mapping(tree.map(lambda x: x + 1e-3, params[1]), z, plain) - w).abs().mean()
    assert float(change) == pytest.approx(rate * float(wide), rel=0.05)


def test_truncation():
    mean = stylegan.mean_style(GENERATOR, random.key(0), TINY, 2000)
    w = stylegan.mapping(GENERATOR, random.normal(random.key(5), (2000, 6), torch.float64), TINY)
    assert mean.shape == (5,) and (w.mean(0) - mean).norm() < 0.1 * w.std()
    assert torch.equal(stylegan.truncated(w, mean, 0.0), mean.expand(2000, 5))
    torch.testing.assert_close(stylegan.truncated(w, mean, 1.0), w)
    torch.testing.assert_close(stylegan.truncated(w, mean, 0.5), (w + mean) / 2)
    layered = w[:, None].expand(2000, 6, 5)
    some = stylegan.truncated(layered, mean, 0.5, layers=2)
    torch.testing.assert_close(some[:, 1], (w + mean) / 2)
    assert torch.equal(some[:, 2:], layered[:, 2:])


def test_mixed_styles_change_at_the_crossover():
    first, second = torch.zeros(3, 5), torch.ones(3, 5)
    actual = stylegan.mixed(first, second, torch.tensor([0, 2, 6]), 6)
    assert actual[..., 0].tolist() == [[1.0] * 6, [0.0, 0, 1, 1, 1, 1], [0.0] * 6]
    assert torch.equal(stylegan.mixed(first, second, 3, 6)[0, :, 0], torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_training_mixes_as_often_as_it_should():
    """Where styles are not mixed, training is evaluation with the same key."""
    params = spec.init(random.key(0), stylegan.generator_spec(TINY), torch.float64)
    z = random.normal(random.key(6), (400, 6), torch.float64)
    for mixing in (0.0, 0.4, 1.0):
        cfg = dataclasses.replace(TINY, mixing=mixing)
        options = {"key": random.key(2), "level": 1}
        plain, trained = (stylegan.generator(params, z, cfg, train=train, **options) for train in (False, True))
        share = ((plain - trained).abs().amax((1, 2, 3)) > 1e-9).double().mean()
        assert share == mixing if mixing in (0.0, 1.0) else abs(share - mixing) < 0.08


def test_noise():
    twice = Z[:1].expand(2, -1)
    fixed = stylegan.generator(GENERATOR, twice, TINY)
    torch.testing.assert_close(fixed[0], fixed[1])
    one, again, other = (stylegan.generator(GENERATOR, twice, TINY, key=random.key(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.allclose(one, other) and not torch.allclose(one[0], one[1])
    noise = stylegan.noises(random.split(random.key(1), 3), 3, 2)
    assert [tuple(x.shape) for x in noise] == [(3, 1, n, n) for n in (4, 4, 8, 8, 16, 16)]
    together = torch.cat([x.flatten() for x in noise])
    assert abs(together.mean()) < 0.1 and abs(together.std() - 1) < 0.1
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(noise) if a.shape == b.shape)
    # Initially noise has no effect.
    params = spec.init(random.key(0), stylegan.generator_spec(TINY), torch.float64)
    assert torch.equal(stylegan.generator(params, Z, TINY), stylegan.generator(params, Z, TINY, key=random.key(1)))


def test_blocks():
    x = random.normal(random.key(1), (6, 3, 4, 5), torch.float64)
    torch.testing.assert_close(style_blocks.blur(x), Blur()(x))
    squares = style_blocks.pixel_norm(x).square().mean(1)
    torch.testing.assert_close(squares, torch.ones_like(squares), rtol=0, atol=1e-6)
    for group in (1, 2, 3, 6, 9):
        actual = style_blocks.minibatch_std(x, group)
        assert actual.shape == (6, 4, 4, 5) and torch.equal(actual[:, :3], x)
        expected = std_one_by_one(x, min(group, 6)).reshape(6, 1, 1, 1).expand(6, 1, 4, 5)
        torch.testing.assert_close(actual[:, 3:], expected)
    assert style_blocks.minibatch_std(x[:1].expand(4, -1, -1, -1), 4)[:, 3].max() == pytest.approx(1e-4)


# The critic in a batch, and under gradients of gradients.


def penalty(params, images, alpha):
    """R1, Mescheder et al. 2018: the mean squared norm of the scores' gradients."""
    slopes = grad(lambda x: stylegan.critic(params, x, TINY, level=1, alpha=alpha).sum())(images)
    return slopes.square().sum((1, 2, 3)).mean()


def test_r1_is_that_of_autograd_and_compiles():
    torch._dynamo.reset()
    leaves = tree.map(lambda x: x.clone().requires_grad_(), CRITIC)
    real = stylegan.reals(IMAGES, 1, 0.6, TINY)
    images = real.clone().requires_grad_()
    scores = stylegan.critic(leaves, images, TINY, level=1, alpha=0.6)
    (slopes,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    value = slopes.square().sum((1, 2, 3)).mean()
    # The last biases have no influence on a gradient by the images.
    expected = torch.autograd.grad(value, tree.leaves(leaves), allow_unused=True)
    step = torch.compile(grad_and_value(penalty), backend="aot_eager", fullgraph=True)
    gradient, compiled = step(CRITIC, real, torch.tensor(0.6))
    torch.testing.assert_close(penalty(CRITIC, real, torch.tensor(0.6)), value.detach())
    torch.testing.assert_close(compiled, value.detach())
    assert value > 0
    for actual, g in zip(tree.leaves(gradient), expected, strict=True):
        torch.testing.assert_close(actual, torch.zeros_like(actual) if g is None else g)


def test_groups_under_vmap():
    stacked = tree.stack([CRITIC, random_values(stylegan.critic_spec(TINY)), tree.map(lambda x: 2 * x, CRITIC)])
    together = vmap(lambda p: stylegan.critic(p, IMAGES, TINY))(stacked)
    for scores, params in zip(together, tree.unstack(stacked), strict=True):
        torch.testing.assert_close(scores, stylegan.critic(params, IMAGES, TINY))


# Errors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 48}, "size is 48; expected a power of 2 from 8 on"),
        ({"size": 4}, "size is 4; expected a power of 2 from 8 on"),
        ({"size": 256, "width": 100}, "width 100 leaves no channel at 256 pixels"),
        ({"group": 0}, "group is 0; expected at least 1"),
        ({"mixing": 1.5}, "mixing 1.5, mapping_rate 0.01; expected a probability"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: stylegan.generator(GENERATOR, Z[:, 1:], TINY), r"expected z of shape \(batch, 6\), found \(4, 5\)"),
        (lambda: stylegan.generator(GENERATOR, Z, TINY, level=3), "level is 3; expected 0 to 2 for 16 pixels"),
        (lambda: stylegan.generator(GENERATOR, Z, TINY, train=True), "pass key="),
        (
            lambda: stylegan.synthesis(GENERATOR, torch.ones(4, 2, 5), [], TINY, level=0),
            r"styles \(4, 2, 5\) and 0 noises; expected \(batch, 2, 5\) and 2 at level 0",
        ),
        (lambda: stylegan.critic(CRITIC, IMAGES, TINY, level=1), "16 x 16; expected 8 x 8 at level 1"),
        (lambda: stylegan.critic(CRITIC, IMAGES[:, :1], TINY), r"expected images \(batch, 2, height, width\)"),
        (lambda: stylegan.critic(CRITIC, IMAGES[:3], TINY), "batch 3 is not divisible into groups of 2"),
        (lambda: stylegan.reals(IMAGES, 5, 1.0, TINY), "level is 5"),
    ],
)
def test_wrong_use(use, message):
    with pytest.raises(ValueError, match=message):
        use()
