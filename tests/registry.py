"""Every net of the zoo, once: what `test_laws.py` holds to the laws that all nets keep.

A net with the usual face is one call,

    net("gpt2", gpt2, gpt2.Config(vocabulary=31, ...), tokens(31, 8), draws=True)

with a configuration so small that a gradient takes milliseconds; give each choice that changes the code path (with and
without dropout, norm first or last) a line of its own. What has another face (a generator and its critic, a net in
several parts) is one `Net` a part, with a function in place of the module. `published` says which sizes its presets
must have. The batch is made by one of the makers below, or any function `(key, n) -> tree of tensors`; tuples are made
with `both`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from core import random, spec, tree
from core.layers import (
    batch_norm,
    batch_norm_spec,
    conv,
    conv_spec,
    global_average_pool,
    linear,
    linear_spec,
    prelu,
    prelu_spec,
)
from core.tree import Tree
from nets import (
    alexnet,
    autoencoder_critic,
    convnext,
    cyclegan,
    dcgan,
    densenet,
    googlenet,
    gpt2,
    inception,
    lenet,
    mlp,
    mlp_gan,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    pix2pix,
    resnet,
    sagan,
    squeezenet,
    stylegan,
    transformer,
    vgg,
    vit,
)

Batch = Callable[[Tensor, int], Tree]


@dataclass(frozen=True, repr=False)
class Net:
    """A net as the laws see it.

    Args:
        spec: its parameters, in a small configuration.
        apply: (params and Stats, x, key or None, train) -> a tensor or a tree of tensors, batch leading.
        batch: (key, n) -> x, an example batch of n; floating-point leaves are cast to the precision under test.
        draws: whether training draws random numbers, and so needs a key.
        zero: patterns (as in a shell) of the leaves whose gradient in training is identically zero.
    """

    name: str
    spec: Tree
    apply: Callable[[Tree, Tree, Tensor | None, bool], Tree]
    batch: Batch
    draws: bool = False
    zero: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name

    @property
    def mixes(self) -> bool:
        """Whether training mixes the examples of a batch: batch norm does."""
        return any(isinstance(leaf, spec.Stat) for leaf in tree.leaves(self.spec))


@dataclass(frozen=True)
class Published:
    """The presets of a module, and the number of parameters that each of some was published with."""

    spec: Callable[[Any], Tree]
    presets: dict[str, Any]
    counts: dict[str, int]


NETS: dict[str, Net] = {}
PUBLISHED: dict[str, Published] = {}


def register(net: Net) -> None:
    if net.name in NETS:
        raise ValueError(f"there are two nets of the name '{net.name}'")
    NETS[net.name] = net


def net(name: str, module: ModuleType, cfg: Any, batch: Batch, **options) -> None:
    """Register a module with the face `spec(cfg)`, `apply(params, x, cfg, *, key, train)`."""

    def apply(params: Tree, x: Tree, key: Tensor | None, train: bool) -> Tree:
        return module.apply(params, x, cfg, key=key, train=train)

    register(Net(name, module.spec(cfg), apply, batch, **options))


def player(name: str, module: ModuleType, part: str, cfg: Any, batch: Batch, **options) -> None:
    """Register a `generator` or `critic_outputs`. The batch is (z or images, labels) where it is conditional."""
    face = getattr(module, part)

    def apply(params: Tree, x: Tree, key: Tensor | None, train: bool) -> Tree:
        x, labels = x if isinstance(x, tuple) else (x, None)
        return face(params, x, cfg, labels=labels, key=key, train=train)

    parameters = getattr(module, part.removesuffix("_outputs") + "_spec")(cfg)
    register(Net(name, parameters, apply, batch, **options))


def two_players(module: ModuleType) -> Callable[[Any], Tree]:
    """The specs of both as one, for `published`."""
    return lambda cfg: {"critic": module.critic_spec(cfg), "generator": module.generator_spec(cfg)}


def published(module: ModuleType, counts: dict[str, int], spec: Callable[[Any], Tree] | None = None) -> None:
    """Register the presets of a module. The counts are without Stats; a weight used twice counts once."""
    PUBLISHED[module.__name__.removeprefix("nets.")] = Published(spec or module.spec, module.PRESETS, counts)


# Example batches.


def vectors(width: int) -> Batch:
    return lambda key, n: random.normal(key, (n, width))


def images(channels: int, height: int, width: int | None = None) -> Batch:
    return lambda key, n: random.normal(key, (n, channels, height, width or height))


def tokens(vocabulary: int, time: int) -> Batch:
    return lambda key, n: random.randint(key, (n, time), 0, vocabulary).long()


def labels(classes: int) -> Batch:
    return lambda key, n: random.randint(key, (n,), 0, classes).long()


def both(*batches: Batch) -> Batch:
    """A tuple of inputs, as an encoder-decoder takes."""

    def make(key: Tensor, n: int) -> tuple:
        return tuple(f(k, n) for f, k in zip(batches, random.split(key, len(batches)).unbind(0), strict=True))

    return make


# A net of this file: until a larger one does, it shows that the laws hold for Stats, taps and outputs that are trees.

CONVOLUTIONAL = {
    "conv1": conv_spec(3, 6, 3, bias=False),
    "conv2": conv_spec(6, 8, 3),
    "head": linear_spec(8, 5),
    "norm1": batch_norm_spec(6),
    "norm2": batch_norm_spec(8),
    "prelu": prelu_spec(),
}


def convolutional(params: Tree, x: Tensor, key: Tensor | None, train: bool) -> Tree:
    x = prelu(params["prelu"], batch_norm(params["norm1"], conv(params["conv1"], x, padding=1), train=train))
    x = batch_norm(params["norm2"], conv(params["conv2"], x, stride=2), train=train).relu()
    pooled = global_average_pool(x)
    return {"features": pooled, "logits": linear(params["head"], pooled)}


# The bias of a convolution in front of batch norm is taken out by the norm.
register(Net("convolutional", CONVOLUTIONAL, convolutional, images(3, 8), zero=("conv2.bias",)))

net("mlp", mlp, mlp.Config((6, 8, 7, 3), activation="tanh"), vectors(6))
net("mlp, dropout", mlp, mlp.Config((6, 8, 7, 3), dropout=0.4), vectors(6), draws=True)
published(mlp, {"mnist": 669_706})

RESNET = {"width": 4, "stem": "cifar", "classes": 5}
net("resnet", resnet, resnet.Config((1, 1), **RESNET | {"stem": "imagenet"}), images(3, 16))
net("resnet, bottleneck", resnet, resnet.Config((1, 1), "bottleneck", groups=2, group_width=32, **RESNET), images(3, 8))
net("resnet, padding", resnet, resnet.Config((1, 1), shortcut="padding", **RESNET), images(3, 8))
published(
    resnet,
    {
        # As torchvision's (tests/nets/test_resnet.py).
        "resnet18": 11_689_512,
        "resnet34": 21_797_672,
        "resnet50": 25_557_032,
        "resnet101": 44_549_160,
        "resnet152": 60_192_808,
        "resnext50_32x4d": 25_028_904,
        "resnext101_32x8d": 88_791_336,
        "resnext101_64x4d": 83_455_272,
        "wide_resnet50_2": 68_883_240,
        "wide_resnet101_2": 126_886_696,
    },
)

CONVNEXT = {"depths": (1, 2), "widths": (4, 6), "layer_scale": 0.1, "classes": 5}
net("convnext", convnext, convnext.Config(**CONVNEXT, stochastic_depth=0.5), images(3, 9), draws=True)
net("convnext, no depth", convnext, convnext.Config(**CONVNEXT, stochastic_depth=0.0), images(3, 8))
published(
    convnext,
    {
        # As torchvision's (tests/nets/test_convnext.py).
        "convnext_tiny": 28_589_128,
        "convnext_small": 50_223_688,
        "convnext_base": 88_591_464,
        "convnext_large": 197_767_336,
    },
)

VIT = {"image": 8, "patch": 4, "layers": 2, "heads": 2, "width": 8, "hidden": 12, "classes": 5, "zero_head": False}
RATES = {"dropout": 0.2, "attention_dropout": 0.2, "stochastic_depth": 0.5}
net("vit", vit, vit.Config(**VIT), images(3, 8))
net("vit, mean", vit, vit.Config(**VIT, pool="mean", stochastic_depth=0.5), images(3, 8), draws=True)
net("vit, dropout", vit, vit.Config(**VIT, **RATES), images(3, 8), draws=True)
published(
    vit,
    {
        # As torchvision's, and timm's for the small ones (tests/nets/test_vit.py).
        "vit_ti_16": 5_717_416,
        "vit_s_16": 22_050_664,
        "vit_b_16": 86_567_656,
        "vit_b_32": 88_224_232,
        "vit_l_16": 304_326_632,
        "vit_l_32": 306_535_400,
        "vit_h_14": 632_045_800,
    },
)

VGG = {"pooled": 2, "hidden": 6, "dropout": 0.3, "classes": 5}
net("vgg", vgg, vgg.Config(((4,), (5, 5)), **VGG), images(3, 8), draws=True)
net("vgg, norm", vgg, vgg.Config(((4,), (5,)), True, **VGG), images(3, 8), draws=True, zero=("stages.*.conv.bias",))
published(
    vgg,
    {
        "vgg11": 132_863_336,
        "vgg11_bn": 132_868_840,
        "vgg13": 133_047_848,
        "vgg13_bn": 133_053_736,
        "vgg16": 138_357_544,
        "vgg16_bn": 138_365_992,
        "vgg19": 143_667_240,
        "vgg19_bn": 143_678_248,
    },
)

ALEXNET = alexnet.Config((2, 3, 3, 3, 3), pooled=2, hidden=6, dropout=0.3, classes=5)
net("alexnet", alexnet, ALEXNET, images(3, 63), draws=True)
published(alexnet, {"alexnet": 61_100_840})

SQUEEZENET = squeezenet.Config((((4, 5),), ((5, 6),)), stem=6, kernel=3, dropout=0.3, classes=8)
net("squeezenet", squeezenet, SQUEEZENET, images(3, 17), draws=True)
published(squeezenet, {"squeezenet1_0": 1_248_424, "squeezenet1_1": 1_235_496})

MOBILENET = {"stem": 8, "dropout": 0.3, "classes": 5}
net("mobilenet_v1", mobilenet_v1, mobilenet_v1.Config(1.0, ((8,), (12,)), **MOBILENET), images(3, 8), draws=True)
net(
    "mobilenet_v1, tensorflow",
    mobilenet_v1,
    mobilenet_v1.Config(1.0, ((8,), (12,)), padding="tensorflow", **MOBILENET),
    images(3, 8, 7),
    draws=True,
)
# In millions in the paper: 4.2, 2.6, 1.3 and 0.5.
V1 = {"": 4_231_976, "-0.75": 2_585_560, "-0.5": 1_331_592, "-0.25": 470_072}
published(mobilenet_v1, {f"mobilenet_v1{width}": count for width, count in V1.items()})

# A shift of what a block gives out is taken out by the norm behind the next 1x1 convolution.
PROJECTED = ("stages.*.project.norm.bias",)
net(
    "mobilenet_v2",
    mobilenet_v2,
    mobilenet_v2.Config(1.0, (mobilenet_v2.Stage(1, 8, 1, 1), mobilenet_v2.Stage(2, 8, 2, 2)), last=12, **MOBILENET),
    images(3, 8),
    draws=True,
    zero=PROJECTED,
)
published(mobilenet_v2, {"mobilenet_v2": 3_504_872})

net(
    "mobilenet_v3",
    mobilenet_v3,
    mobilenet_v3.Config(
        (
            (mobilenet_v3.Block(3, 8, 8, True, "relu"),),
            (mobilenet_v3.Block(5, 16, 8, False, "hard_swish", 2), mobilenet_v3.Block(3, 16, 8, True, "hard_swish")),
        ),
        8,
        **MOBILENET,
    ),
    images(3, 8),
    draws=True,
    zero=PROJECTED,
)
published(mobilenet_v3, {"mobilenet_v3_large": 5_483_032, "mobilenet_v3_small": 2_542_856})

LENET = {"size": 8, "kernel": 3, "padding": (1, 1)}
net("lenet", lenet, lenet.Config((2, 3), (6,), **LENET), images(1, 8))
net("lenet, max", lenet, lenet.Config((2, 3), (6,), activation="relu", pool="max", **LENET), images(1, 8))
published(lenet, {"lenet5": 61_706, "lenet5-relu": 61_706})

DENSENET = {"growth": 3, "width": 4, "expansion": 2, "classes": 5}
net("densenet", densenet, densenet.Config((1, 2), **DENSENET), images(3, 16))
net("densenet, dropout", densenet, densenet.Config((1, 2), dropout=0.3, **DENSENET), images(3, 16), draws=True)
published(
    densenet,
    {
        # As torchvision's (tests/nets/test_densenet.py).
        "densenet121": 7_978_856,
        "densenet161": 28_681_000,
        "densenet169": 14_149_480,
        "densenet201": 20_013_928,
    },
)

# Wide enough, and on small enough maps, that the max pooling behind a stage also meets windows of zeros: else the shift
# of its norms is a constant, which the next norm takes out again.
INCEPTION_BLOCK = (12, 3, 12, 3, 12, 12)
GOOGLENET = {
    "stem": (4, 6),
    "stages": ((INCEPTION_BLOCK,), (INCEPTION_BLOCK,) * 2, (INCEPTION_BLOCK,)),
    "aux_sizes": (4, 16),
    "aux_dropout": 0.3,
    "std": 0.4,
    "classes": 5,
}
net("googlenet", googlenet, googlenet.Config(**GOOGLENET), images(3, 16), draws=True)
published(googlenet, {"googlenet": 13_004_888})

INCEPTION = {"width": 2, "pooled": (2,), "inside": (), "last": 1, "aux_kernel": 1, "std": 0.3, "aux_std": 0.3}
net("inception", inception, inception.Config(**INCEPTION, classes=5), images(3, 107), draws=True)
published(inception, {"inception_v3": 27_161_264})

GPT = {"vocabulary": 31, "context": 10, "layers": 2, "heads": 2, "width": 8}
net("gpt2", gpt2, gpt2.Config(**GPT, dropout=0.2), tokens(31, 10), draws=True)
net("gpt2, no bias", gpt2, gpt2.Config(**GPT, dropout=0.0, bias=False), tokens(31, 10))
net("gpt", gpt2, gpt2.Config(**GPT, dropout=0.1, norm_first=False), tokens(31, 10), draws=True)
published(
    gpt2,
    {
        # Radford et al. 2018 and 2019, as in the published weights (tests/nets/test_gpt2.py).
        "gpt": 116_534_784,
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        # nanoGPT prints 0.80M and 10.65M, in which the positions are not counted.
        "nanogpt-cpu": 804_096,
        "nanogpt-gpu": 10_745_088,
    },
)

# Token 0 is padding, here also between others.
SENTENCES = {"source_vocabulary": 13, "target_vocabulary": 13, "heads": 2, "width": 8, "hidden": 12, "context": 9}
PAIRS = both(tokens(13, 7), tokens(13, 5))
net("transformer", transformer, transformer.Config(**SENTENCES, layers=2, dropout=0.0), PAIRS)
SENTENCES |= {"layers": 1}
net("transformer, dropout", transformer, transformer.Config(**SENTENCES, attention_dropout=0.2), PAIRS, draws=True)
PRENORM = transformer.Config(**SENTENCES, dropout=0.2, norm_first=True, positions="halves", scale=False)
net("transformer, norm first", transformer, PRENORM, PAIRS, draws=True)
SENTENCES |= {"target_vocabulary": 11, "shared": False, "output_bias": True, "positions": "learned"}
SEPARATE = transformer.Config(**SENTENCES, dropout=0.0, activation="silu", final_norms=True)
net("transformer, separate embeddings", transformer, SEPARATE, both(tokens(13, 7), tokens(11, 5)))
# The paper's table 3 has 65 and 213 million for a shared vocabulary of "about 37,000" tokens, which are counted here.
published(transformer, {"base": 63_082_496, "big": 214_245_376})

# Generators and critics.

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
