"""Nets that make images: generators and critics, autoencoders, denoisers."""

from torch import Tensor

from core.tree import Tree
from nets import autoencoder_critic, cyclegan, dcgan, mlp_gan, pix2pix, sagan, stylegan
from registry.face import Net, both, images, labels, player, published, register, two_players, vectors

MLP_GAN = {"shape": (1, 2, 3), "latent": 4, "generator_widths": (5, 6), "critic_widths": (6, 5)}
player("mlp_gan generator", mlp_gan, "generator", mlp_gan.Config(**MLP_GAN), vectors(4))
CONDITIONAL = mlp_gan.Config(**MLP_GAN, classes=3, norm="none", tanh=False, dropout=0.3)
player("mlp_gan generator, classes", mlp_gan, "generator", CONDITIONAL, both(vectors(4), labels(3)))
player("mlp_gan critic", mlp_gan, "critic_outputs", CONDITIONAL, both(images(1, 2, 3), labels(3)), draws=True)
published(mlp_gan, {}, two_players(mlp_gan))

DCGAN = {"size": 8, "channels": 2, "latent": 4, "width": 3}
player("dcgan generator", dcgan, "generator", dcgan.Config(**DCGAN, classes=3), both(vectors(4), labels(3)))
player("dcgan generator, kernel 5", dcgan, "generator", dcgan.Config(**DCGAN, kernel=5), vectors(4))
player("dcgan critic, batch", dcgan, "critic_outputs", dcgan.Config(**DCGAN, dropout=0.3), images(2, 8), draws=True)
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
# The generator and critic of the authors' code (tests/nets/test_pix2pix.py).
published(pix2pix, {"paper": 54_413_955 + 2_768_705}, two_players(pix2pix))

CYCLEGAN = {"channels": 2, "width": 2, "critic_width": 2, "critic_layers": 2, "blocks": 1}
player("cyclegan generator", cyclegan, "generator", cyclegan.Config(**CYCLEGAN), images(2, 8, 12))
NEAREST = cyclegan.Config(**CYCLEGAN, upsample="nearest")
player("cyclegan generator, nearest", cyclegan, "generator", NEAREST, images(2, 8))
player("cyclegan critic", cyclegan, "critic_outputs", cyclegan.Config(**CYCLEGAN), images(2, 12))
# The same, less the biases in front of norms, which these take out.
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
