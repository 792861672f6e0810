"""Image classifiers."""

from torch import Tensor

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
from nets.classifiers import (
    alexnet,
    convnext,
    densenet,
    googlenet,
    inception,
    lenet,
    mlp,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    resnet,
    squeezenet,
    vgg,
    vit,
)
from tests.registry.face import Net, images, net, published, register, vectors

# A net of this file, for Stats, taps and an output that is a tree.

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


# Batch norm cancels the bias of the convolution before it.
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
        # As torchvision's (tests/registry/classifier_references.py).
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
net("convnext", convnext, convnext.Config(**CONVNEXT, stochastic_depth=0.0), images(3, 9))
net("convnext, stochastic depth", convnext, convnext.Config(**CONVNEXT, stochastic_depth=0.5), images(3, 8), draws=True)
published(
    convnext,
    {
        # As torchvision's (tests/registry/classifier_references.py).
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
        # As torchvision's, and timm's for the small ones (tests/registry/classifier_references.py).
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

# The norm after the next 1x1 convolution cancels a shift of a block's output.
PROJECTED = ("stages.*.project.norm.bias",)
net(
    "mobilenet_v2",
    mobilenet_v2,
    mobilenet_v2.Config(1.0, (mobilenet_v2.Stage(1, 8, 1, 1), mobilenet_v2.Stage(2, 8, 1, 2)), last=12, **MOBILENET),
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
            (mobilenet_v3.Block(3, 8, 8, False, "relu"),),
            (mobilenet_v3.Block(5, 16, 8, True, "hard_swish", 2),),
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
        # As torchvision's (tests/registry/classifier_references.py).
        "densenet121": 7_978_856,
        "densenet161": 28_681_000,
        "densenet169": 14_149_480,
        "densenet201": 20_013_928,
    },
)

# Wide enough, with feature maps small enough, that the max pooling after a stage also meets windows of zeros: else the
# shift of its norms is a constant, which the next norm cancels.
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

INCEPTION = {"width": 2, "pooled": (2,), "channels_7x7": (), "last": 1, "aux_kernel": 1, "std": 0.3, "aux_std": 0.3}
net("inception", inception, inception.Config(**INCEPTION, classes=5), images(3, 107), draws=True)
published(inception, {"inception_v3": 27_161_264})
