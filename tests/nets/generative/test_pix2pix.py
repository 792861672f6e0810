"""pix2pix against the published architecture as torch modules; patches, noise, gradient penalty."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.func import vmap

from core import random, spec, stats, tree
from nets.generative import pix2pix

TINY = pix2pix.Config(width=4, depth=4, critic_width=4, critic_layers=2, dropout=0.0)


class Level(nn.Module):
    """The U as the authors build it, from the middle: a level returns its input beside the lower levels' output."""

    def __init__(self, outer, inner, below, kind, source=None):
        super().__init__()
        self.outermost, middle = source is not None, below is None
        self.down = nn.Conv2d(source or outer, inner, 4, 2, 1, bias=False)
        self.up = nn.ConvTranspose2d(inner * (1 if middle else 2), outer, 4, 2, 1, bias=self.outermost)
        self.down_norm = nn.Identity() if middle or self.outermost else normed(kind, inner)
        self.up_norm = nn.Identity() if self.outermost else normed(kind, outer)
        self.below = below or nn.Identity()

    def forward(self, x):
        y = self.down(x if self.outermost else nn.functional.leaky_relu(x, 0.2))
        y = self.up_norm(self.up(self.below(self.down_norm(y)).relu()))
        return y.tanh() if self.outermost else torch.cat([x, y], 1)


def normed(kind, channels):
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.InstanceNorm2d(channels)


def generator_module(cfg):
    widths = [cfg.width * min(2**i, 8) for i in range(cfg.depth)]
    level = None
    for outer, inner in reversed(list(zip(widths, widths[1:], strict=False))):
        level = Level(outer, inner, level, cfg.norm)
    return Level(cfg.channels, widths[0], level, cfg.norm, cfg.source_channels)


def critic_module(cfg):
    widths = [cfg.critic_width * min(2**i, 8) for i in range(cfg.critic_layers + 1)]
    layers = [nn.Conv2d(cfg.source_channels + cfg.channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
    for i, (d_in, d_out) in enumerate(zip(widths, widths[1:], strict=False)):
        stride = 2 if i < cfg.critic_layers - 1 else 1
        layers += [nn.Conv2d(d_in, d_out, 4, stride, 1, bias=False), normed(cfg.norm, d_out), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))


def fill_conv(module, p):
    for name, x in p.items():
        getattr(module, name).data.copy_(x)


def fill_norm(module, p):
    if "norm" in p:
        q = p["norm"]
        for name, x in (("weight", "weight"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var")):
            getattr(module, name).data.copy_(q[x])


def fill_generator(module, params):
    level, last = module, len(params["down"]) - 1
    for i in range(last + 1):
        fill_conv(level.down, params["down"][i]["conv"])
        fill_conv(level.up, params["up"][last - i]["conv"])
        fill_norm(level.down_norm, params["down"][i])
        fill_norm(level.up_norm, params["up"][last - i])
        level = level.below


def fill_critic(module, params):
    modules = [m for m in module if not isinstance(m, nn.LeakyReLU)]
    fill_conv(modules[0], params["layers"][0]["conv"])
    for i, p in enumerate(params["layers"][1:]):
        fill_conv(modules[1 + 2 * i], p["conv"])
        fill_norm(modules[2 + 2 * i], p)
    fill_conv(modules[-1], params["head"])


def random_values(model):
    """Initial values plus noise, so that no norm or bias is at 1 or 0."""
    values = spec.init(random.key(0), model, torch.float64)
    hashes = {name: spec.name_hash(name) for name in tree.names(values)}

    def moved(name, x):
        noise = 0.05 * random.normal(random.fold_in(random.key(1), hashes[name]), tuple(x.shape), x.dtype)
        return x + (noise.abs() if name.endswith("var") else noise)

    return tree.map_with_names(moved, values)


def pair(n=2, size=32):
    keys = random.split(random.key(5))
    return tuple(random.normal(key, (n, 3, size, size), torch.float64) for key in keys)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("train", [False, True])
def test_parity_with_the_published_modules(norm, train):
    cfg = dataclasses.replace(TINY, norm=norm)
    for part, make, fill, x in (
        ("generator", generator_module, fill_generator, pair()[0]),
        ("critic", critic_module, fill_critic, pair()),
    ):
        model = getattr(pix2pix, f"{part}_spec")(cfg)
        params = random_values(model)
        module = make(cfg).double().train(train)
        fill(module, params)
        assert sum(p.numel() for p in module.parameters()) == tree.count(spec.split(model, model)[0])
        expected = module(x if part == "generator" else torch.cat(x, 1))
        actual = getattr(pix2pix, part)(params, x, cfg, train=train)
        assert expected.std() > 1e-3
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_batch_norm_statistics_equal_torch():
    cfg = dataclasses.replace(TINY, norm="batch")
    model, x = pix2pix.generator_spec(cfg), pair()[0]
    params = random_values(model)
    module = generator_module(cfg).double().train()
    fill_generator(module, params)
    module(x)
    weights, running = spec.split(model, params)
    increments = torch.func.grad(lambda s: pix2pix.generator(tree.merge(weights, s), x, cfg, train=True).sum())(running)
    actual = stats.update(running, increments)["down"][1]["norm"]
    torch.testing.assert_close(actual["mean"], module.below.down_norm.running_mean.float())
    torch.testing.assert_close(actual["var"], module.below.down_norm.running_var.float())


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_score_depends_on_one_patch(layers, patch):
    """By the extent of a score's gradient; without norm, whose statistics are of the whole image."""
    cfg = pix2pix.Config(source_channels=1, channels=1, critic_width=2, critic_layers=layers, norm="none")
    params = random_values(pix2pix.critic_spec(cfg))
    image = random.normal(random.key(2), (1, 1, 128, 128), torch.float64)

    def score(x):
        scores = pix2pix.critic(params, (x, image), cfg)
        return scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2]

    rows = torch.func.grad(score)(image)[0, 0].abs().sum(1).nonzero()
    assert rows.max() - rows.min() + 1 == patch


def test_paper_sizes():
    cfg = pix2pix.PRESETS["paper"]
    source = torch.empty(1, 3, 256, 256, device="meta")
    params = [spec.abstract(part(cfg)) for part in (pix2pix.generator_spec, pix2pix.critic_spec)]
    assert pix2pix.generator(params[0], source, cfg).shape == (1, 3, 256, 256)
    outputs = pix2pix.critic_outputs(params[1], (source, source), cfg)
    assert outputs["scores"].shape == (1, 1, 30, 30) and outputs["features"].shape == (1, 512, 31, 31)


def test_noise_without_training():
    cfg = dataclasses.replace(TINY, dropout=0.5)
    params, x = random_values(pix2pix.generator_spec(cfg)), pair()[0]
    still = pix2pix.generator(params, x, cfg)
    noisy = [pix2pix.generator(params, x, cfg, key=random.key(seed), noise=True) for seed in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.allclose(noisy[0], noisy[2])
    assert not torch.allclose(noisy[0], still)
    torch.testing.assert_close(pix2pix.generator(params, x, cfg, train=True, noise=False), still)
    with pytest.raises(ValueError, match="pass key="):
        pix2pix.generator(params, x, cfg, noise=True)


def test_gradient_penalty_through_the_critic_compiles():
    """A gradient of per-example gradients."""
    torch._dynamo.reset()
    params, (source, target) = random_values(pix2pix.critic_spec(TINY)), pair(size=24)

    def penalty(params):
        def score(s, t):
            return pix2pix.critic(params, (s[None], t[None]), TINY).mean()

        slopes = vmap(torch.func.grad(score, 1))(source, target)
        return (slopes.reshape(len(source), -1).norm(dim=1) - 1).square().mean()

    expected = torch.func.grad(penalty)(params)
    actual = torch.compile(torch.func.grad(penalty), backend="aot_eager", fullgraph=True)(params)
    for a, b in zip(tree.leaves(actual), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b)
    assert any(g.abs().max() > 1e-6 for g in tree.leaves(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "layer"}, "pix2pix: norm 'layer' is unknown; expected one of batch, instance, none"),
        ({"depth": 1}, "depth is 1; expected at least 2"),
        ({"width": 0}, "width is 0; expected at least 1"),
        ({"dropout": 1.0}, "dropout 1.0 is outside"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_wrong_images():
    generator, critic = (spec.abstract(part(TINY)) for part in (pix2pix.generator_spec, pix2pix.critic_spec))
    images = [torch.empty(2, *shape, device="meta") for shape in ((1, 16, 16), (3, 8, 16), (3, 24, 16), (3, 16, 16))]
    messages = (r"expected images \(batch, 3, height, width\)", "8 x 16; expected at least 16", "multiples of 16")
    for x, message in zip(images[:3], messages, strict=True):
        with pytest.raises(ValueError, match=message):
            pix2pix.generator(generator, x, TINY)
    with pytest.raises(ValueError, match=r"source \(2, 3, 24, 16\) and target \(2, 3, 16, 16\) differ in size"):
        pix2pix.critic(critic, (images[2], images[3]), TINY)
    with pytest.raises(ValueError, match="8 x 16; expected at least 12"):
        pix2pix.critic(critic, (images[1], images[1]), TINY)
    with pytest.raises(ValueError, match=r"expected images \(batch, 6, height, width\), found \(2, 4, 16, 16\)"):
        pix2pix.critic(critic, (images[0], images[3]), TINY)
