"""The critics of EBGAN and BEGAN against the same nets written with torch.nn."""

import dataclasses

import pytest
import torch
from torch import nn

from core import random, spec, tree
from nets.generative import autoencoder_critic
from tests.nets.generative.critics import check_penalty
from tests.nets.parity import assert_same, randomise

EBGAN = autoencoder_critic.Config(size=16, channels=2, latent=6, code=5, width=4)
BEGAN = autoencoder_critic.Config("began", 16, 2, latent=6, code=5, width=4, eta=1)


class Ebgan(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(2, 4, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(8 * 16, 5),
        )
        self.decoder = nn.Sequential(
            nn.Linear(5, 8 * 16, bias=False),
            nn.Unflatten(1, (8, 4, 4)),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, x):
        return (self.decoder(self.encoder(x)) - x).square().mean((1, 2, 3))


def began_decoder(latent):
    def two(n):
        return nn.Sequential(nn.Conv2d(n, n, 3, 1, 1), nn.ELU(), nn.Conv2d(n, n, 3, 1, 1), nn.ELU())

    scales = [two(4), nn.Upsample(scale_factor=2), two(4), nn.Upsample(scale_factor=2), two(4)]
    return nn.Sequential(
        nn.Linear(latent, 4 * 16), nn.Unflatten(1, (4, 4, 4)), *scales, nn.Conv2d(4, 2, 3, 1, 1), nn.Tanh()
    )


class Began(nn.Module):
    def __init__(self):
        super().__init__()
        layers, n = [nn.Conv2d(2, 4, 3, 1, 1), nn.ELU()], 4
        for smaller in (True, True, False):
            layers += [nn.Conv2d(n, n, 3, 1, 1), nn.ELU(), nn.Conv2d(n, n, 3, 1, 1), nn.ELU()]
            if smaller:
                layers += [nn.Conv2d(n, n + 4, 3, 2, 1), nn.ELU()]
                n += 4
        self.encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(n * 16, 5))
        self.decoder = began_decoder(5)

    def forward(self, x):
        return (self.decoder(self.encoder(x)) - x).abs().mean((1, 2, 3))


KINDS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)


def in_order(module, names):
    """{our prefix: their module}, theirs in the order in which they run."""
    return dict(zip(names, [m for m in module.modules() if isinstance(m, KINDS)], strict=True))


def filled(model, modules):
    """Our tree from their modules."""
    theirs = {"count": "num_batches_tracked", "mean": "running_mean", "var": "running_var"}
    leaves = {}
    for name in tree.names(model):
        prefix, leaf = name.rsplit(".", 1)
        leaves[name] = getattr(modules[prefix], theirs.get(leaf, leaf)).detach().clone().float()
    values = tree.nest(leaves, spec.init(random.key(0), model))
    spec.check(model, values)
    return values


EBGAN_NAMES = [f"encoder.{name}" for name in ("convs.0", "convs.1", "norms.1", "code")]
EBGAN_NAMES += [f"decoder.{name}" for name in ("project", "norms.0", "convs.0", "norms.1", "convs.1")]
SCALES = ["scales.0.0", "scales.0.1", "scales.1.0", "scales.1.1", "scales.2.0", "scales.2.1"]
DECODER = ["project", *SCALES, "output"]
BEGAN_NAMES = ["input", *SCALES[:2], "smaller.0", *SCALES[2:4], "smaller.1", *SCALES[4:], "code"]
BEGAN_NAMES = [f"encoder.{name}" for name in BEGAN_NAMES] + [f"decoder.{name}" for name in DECODER]


@pytest.mark.parametrize(
    ("cfg", "make", "names"), [(EBGAN, Ebgan, EBGAN_NAMES), (BEGAN, Began, BEGAN_NAMES)], ids=["ebgan", "began"]
)
def test_critic_parity(cfg, make, names):
    torch.manual_seed(0)
    module, x = randomise(make()), random.normal(random.key(0), (3, 2, 16, 16))
    values = filled(autoencoder_critic.critic_spec(cfg), in_order(module, names))
    out = autoencoder_critic.critic_outputs(values, x, cfg)
    code = module.eval().encoder(x).detach()
    assert_same(out["scores"], module(x).detach(), "eval")
    assert_same(out["features"], code, "code")
    assert_same(out["reconstructions"], module.decoder(code).detach(), "reconstructions")
    assert_same(autoencoder_critic.critic(values, x, cfg, train=True), module.train()(x).detach(), "training")


def test_began_generator_parity():
    torch.manual_seed(0)
    module, z = randomise(began_decoder(6)), random.normal(random.key(0), (3, 6))
    values = filled(autoencoder_critic.generator_spec(BEGAN), in_order(module, DECODER))
    assert_same(autoencoder_critic.generator(values, z, BEGAN), module(z).detach(), "images")


@pytest.mark.parametrize("preset", autoencoder_critic.PRESETS)
def test_presets(preset):
    cfg = autoencoder_critic.PRESETS[preset]
    z = torch.empty(3, cfg.latent, device="meta")
    x = autoencoder_critic.generator(spec.abstract(autoencoder_critic.generator_spec(cfg)), z, cfg)
    assert tuple(x.shape) == (3, cfg.channels, cfg.size, cfg.size)
    out = autoencoder_critic.critic_outputs(spec.abstract(autoencoder_critic.critic_spec(cfg)), x, cfg)
    assert tuple(out["scores"].shape) == (3,) and tuple(out["features"].shape) == (3, cfg.code)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [EBGAN, BEGAN], ids=["ebgan", "began"])
def test_penalty(cfg):
    cfg = dataclasses.replace(cfg, size=8, stages=1)
    params = spec.init(random.key(0), autoencoder_critic.critic_spec(cfg), torch.float64)
    x = random.normal(random.key(1), (3, 2, 8, 8), torch.float64)
    check_penalty(lambda params, x: autoencoder_critic.critic(params, x, cfg), params, x, compile=cfg.style == "began")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "vae"}, "style 'vae'; expected ebgan or began"),
        ({"eta": 3}, "eta 3; expected 1 or 2"),
        ({"size": 10}, "images of 10 pixels per side cannot be halved 2 times"),
    ],
    ids=["style", "eta", "size"],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        autoencoder_critic.Config(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 16, 16), r"autoencoder_critic: expected images \(batch, 2, height, width\)"),
        ((2, 2, 16, 8), "16 x 8; expected 16 x 16"),
    ],
    ids=["channels", "size"],
)
def test_wrong_images(shape, message):
    params = spec.abstract(autoencoder_critic.critic_spec(BEGAN))
    with pytest.raises(ValueError, match=message):
        autoencoder_critic.critic(params, torch.empty(shape, device="meta"), BEGAN)
