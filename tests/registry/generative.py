"""Nets that make images: generators and critics, autoencoders, denoisers."""

from types import ModuleType
from typing import Any

from torch import Tensor

from core.tree import Tree
from nets.generative import (
    autoencoder,
    autoencoder_critic,
    cyclegan,
    dcgan,
    mlp_gan,
    pix2pix,
    pixelcnn,
    sagan,
    stylegan,
    unet,
    vqvae,
)
from tests.registry.face import (
    Batch,
    Net,
    both,
    images,
    labels,
    net,
    player,
    published,
    register,
    tokens,
    two_players,
    vectors,
)

MLP_GAN = {"shape": (1, 2, 3), "latent": 4, "generator_widths": (5, 6), "critic_widths": (6, 5)}
player("mlp_gan generator", mlp_gan, "generator", mlp_gan.Config(**MLP_GAN), vectors(4))
CONDITIONAL = mlp_gan.Config(**MLP_GAN, classes=3, norm="none", tanh=False, dropout=0.3)
player("mlp_gan generator, classes", mlp_gan, "generator", CONDITIONAL, both(vectors(4), labels(3)))
player("mlp_gan critic", mlp_gan, "critic_outputs", CONDITIONAL, both(images(1, 2, 3), labels(3)), draws=True)
published(mlp_gan, {}, two_players(mlp_gan))

DCGAN = {"size": 8, "channels": 2, "latent": 4, "width": 3}
player("dcgan generator", dcgan, "generator", dcgan.Config(**DCGAN, classes=3), both(vectors(4), labels(3)))
player("dcgan generator, kernel 5", dcgan, "generator", dcgan.Config(**DCGAN, kernel=5), vectors(4))
player("dcgan critic", dcgan, "critic_outputs", dcgan.Config(**DCGAN, dropout=0.3), images(2, 8), draws=True)
DCGAN |= {"classes": 3}
CLASSIFIED = dcgan.Config(**DCGAN, norm="instance", heads=(("codes", 2), ("classes", 3)))
player("dcgan critic, instance, heads", dcgan, "critic_outputs", CLASSIFIED, images(2, 8))
NORMLESS = dcgan.Config(**DCGAN, norm="none", kernel=3)
player("dcgan critic, none", dcgan, "critic_outputs", NORMLESS, both(images(2, 8), labels(3)))
player(
    "dcgan critic, layer", dcgan, "critic_outputs", dcgan.Config(**DCGAN, norm="layer"), both(images(2, 8), labels(3))
)
published(dcgan, {}, two_players(dcgan))

PIX2PIX = {"source_channels": 1, "channels": 2, "width": 2, "critic_width": 2, "critic_layers": 1}
player("pix2pix generator", pix2pix, "generator", pix2pix.Config(**PIX2PIX, depth=3), images(1, 8, 16), draws=True)
BATCH = pix2pix.Config(**PIX2PIX, depth=3, norm="batch", dropout=0.0)
player("pix2pix generator, batch", pix2pix, "generator", BATCH, images(1, 8))


def pix2pix_critic(params: Tree, x: Tree, key: Tensor | None, train: bool) -> Tree:
    """Its images are pairs, not images and labels."""
    return pix2pix.critic_outputs(params, x, BATCH, key=key, train=train)


register(Net("pix2pix critic", pix2pix.critic_spec(BATCH), pix2pix_critic, both(images(1, 8), images(2, 8))))
# The generator and critic of the authors' code (tests/nets/generative/test_pix2pix.py).
published(pix2pix, {"paper": 54_413_955 + 2_768_705}, two_players(pix2pix))

CYCLEGAN = {"channels": 2, "width": 2, "critic_width": 2, "critic_layers": 2, "blocks": 1}
player("cyclegan generator", cyclegan, "generator", cyclegan.Config(**CYCLEGAN), images(2, 8, 12))
NEAREST = cyclegan.Config(**CYCLEGAN, upsample="nearest")
player("cyclegan generator, nearest", cyclegan, "generator", NEAREST, images(2, 8))
player("cyclegan critic", cyclegan, "critic_outputs", cyclegan.Config(**CYCLEGAN), images(2, 12))
# The same, less the biases before norms, which cancel them.
published(cyclegan, {"paper": 11_378_179 - 5_248 + 2_764_737 - 896}, two_players(cyclegan))

AUTOENCODER = {"size": 8, "channels": 2, "latent": 4, "code": 5, "width": 3}
EBGAN = autoencoder_critic.Config(**AUTOENCODER)
player("ebgan critic", autoencoder_critic, "critic_outputs", EBGAN, images(2, 8))
BEGAN = autoencoder_critic.Config("began", **AUTOENCODER, stages=1, eta=1)
player("began generator", autoencoder_critic, "generator", BEGAN, vectors(4))
player("began critic", autoencoder_critic, "critic_outputs", BEGAN, images(2, 8))
published(autoencoder_critic, {}, two_players(autoencoder_critic))

STYLEGAN = {"size": 8, "channels": 2, "latent": 4, "style": 5, "mapping_layers": 2, "width": 12, "mapping_rate": 0.5}
FADING = stylegan.Config(**STYLEGAN, group=1)


def stylegan_generator(params: Tree, z: Tensor, key: Tensor | None, train: bool) -> Tensor:
    """Between two levels, so that all layers are in use."""
    return stylegan.generator(params, z, FADING, key=key, train=train, alpha=0.7)


def stylegan_critic(params: Tree, x: Tensor, key: Tensor | None, train: bool) -> Tree:
    return stylegan.critic_outputs(params, x, FADING, key=key, train=train, alpha=0.7)


register(Net("stylegan generator", stylegan.generator_spec(FADING), stylegan_generator, vectors(4), draws=True))
register(Net("stylegan critic", stylegan.critic_spec(FADING), stylegan_critic, images(2, 8)))
# 26.2 million in section 2 of the paper.
published(stylegan, {"paper": 26_219_627}, stylegan.generator_spec)

SAGAN = {"size": 8, "channels": 2, "latent": 4, "generator_widths": (4, 3, 4), "critic_widths": (3, 4), "halvings": 1}
ATTENTIVE = sagan.Config(**SAGAN, attention=4, gamma=0.5, classes=3)
player("sagan generator", sagan, "generator", ATTENTIVE, both(vectors(4), labels(3)))
player("sagan critic", sagan, "critic_outputs", ATTENTIVE, both(images(2, 8), labels(3)))
LAYERED = sagan.Config(**SAGAN, norm="layer", pool="mean")
player("sagan critic, layer", sagan, "critic_outputs", LAYERED, images(2, 8))
published(sagan, {}, two_players(sagan))

UNET = {"channels": 2, "widths": (8, 12), "blocks": 1, "groups": 4, "zero": False}


def denoiser(name: str, cfg: unet.Config, **options) -> None:
    """The batch is images, times and, if there are classes, labels, the last of which means none."""

    def apply(params: Tree, x: Tree, key: Tensor | None, train: bool) -> Tensor:
        noisy, time, *classes = x
        return unet.apply(params, noisy, time, cfg, labels=classes[0] if classes else None, key=key, train=train)

    parts = [images(2, 4, 6), labels(1000), *([labels(cfg.classes + 1)] if cfg.classes else [])]
    register(Net(name, unet.spec(cfg), apply, both(*parts), **options))


denoiser("unet", unet.Config(**UNET, padding="tensorflow"))
denoiser("unet, classes, dropout", unet.Config(**UNET, attention=(0,), classes=3, dropout=0.3), draws=True)
denoiser("unet, scale and shift", unet.Config(**UNET, head_width=4, learned_variance=True, scale_shift=True))
# google/ddpm-cifar10-32, in the names of diffusers.
published(unet, {"cifar": 35_746_307})


def conditional(name: str, module: ModuleType, cfg: Any, batch: Batch) -> None:
    """A net with the usual face and `labels`; the batch is (x, labels)."""

    def apply(params: Tree, x: Tree, key: Tensor | None, train: bool) -> Tree:
        return module.apply(params, x[0], cfg, labels=x[1], key=key, train=train)

    register(Net(name, module.spec(cfg), apply, both(batch, labels(cfg.classes))))


VAE = {"shape": (2, 4, 8), "latent": 3, "widths": (5,), "width": 2}
net("autoencoder", autoencoder, autoencoder.Config(**VAE), images(2, 4, 8), draws=True)
VARIANCE = autoencoder.Config(**VAE, kind="convolutional", output="mean", learned_variance=True)
net("autoencoder, convolutional, variance", autoencoder, VARIANCE, images(2, 4, 8), draws=True)
VAE |= {"classes": 3, "gaussian": False}
conditional("autoencoder, classes", autoencoder, autoencoder.Config(**VAE), images(2, 4, 8))
CONDITIONAL = autoencoder.Config(**VAE, kind="convolutional")
conditional("autoencoder, convolutional, classes", autoencoder, CONDITIONAL, images(2, 4, 8))
# 784, 400 and 20 numbers there and back, the 20 twice.
published(autoencoder, {"mnist": 785 * 400 + 2 * 401 * 20 + 21 * 400 + 401 * 784})

VQVAE = {"channels": 2, "width": 4, "blocks": 1, "hidden": 3, "codes": 5, "code": 3}
net("vqvae", vqvae, vqvae.Config(**VQVAE), images(2, 4))
net("vqvae, codebook by loss", vqvae, vqvae.Config(**VQVAE, codebook="loss"), images(2, 4))
published(vqvae, {})

PIXELCNN = {"shape": (3, 3), "categories": 5, "width": 3, "layers": 2, "first_kernel": 3, "hidden": 4}


def codes(key: Tensor, n: int) -> Tensor:
    return tokens(5, 9)(key, n).reshape(n, 3, 3)


net("pixelcnn", pixelcnn, pixelcnn.Config(**PIXELCNN), codes)
conditional("pixelcnn, classes", pixelcnn, pixelcnn.Config(**PIXELCNN, classes=3), codes)
published(pixelcnn, {})
