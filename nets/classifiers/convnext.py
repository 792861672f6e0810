"""ConvNeXt: a convolutional network with the proportions of a transformer.

Liu et al. 2022, "A ConvNet for the 2020s" (arXiv:2201.03545). A block mixes space with a depthwise 7x7 convolution,
then channels with an MLP at every pixel:

    y = x + scale * down(gelu(up(norm(depthwise(x)))))

The norm is over the channels of a pixel; `scale`, one value per channel, starts near 0 (Touvron et al. 2021,
arXiv:2103.17239, "layer scale"). In training whole branches are dropped, later ones with higher probability (stochastic
depth, Huang et al. 2016, arXiv:1603.09382). Between stages a norm and a 2x2 convolution with stride 2 halve the image.
"""

from dataclasses import dataclass

from torch import Tensor

from core import initializers, random
from core.layers import (
    conv,
    conv_spec,
    global_average_pool,
    layer_norm,
    layer_norm_spec,
    linear,
    linear_spec,
    stochastic_depth,
)
from core.spec import Param
from nets.blocks.conv_norm import (
    affine_names,
    check_images,
    fitting_table,
    patch_embedding,
    patch_embedding_spec,
    with_base_prefix,
)
from nets.blocks.transformer_block import feedforward, feedforward_spec
from nets.weights import Rename, fill, read

INIT = initializers.normal(0.02)
EPS = 1e-6
"""Epsilon of the norms."""


@dataclass(frozen=True)
class Config:
    """Sizes of ConvNeXt: `depths` blocks of `widths` channels in each stage."""

    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    stochastic_depth: float = 0.1
    """Probability that the last block's branch is dropped; it grows linearly from 0 at the first."""
    layer_scale: float = 1e-6
    """Initial scale of each branch."""
    eps: float = EPS
    """Epsilon of the norm before the head; transformers' files are for 1e-12."""
    channels: int = 3
    classes: int = 1000

    def __post_init__(self):
        if not self.depths or len(self.depths) != len(self.widths) or min(self.depths + self.widths) < 1:
            sizes = f"depths {self.depths}, widths {self.widths}"
            raise ValueError(f"convnext: {sizes}; expected one of each per stage, all at least 1")
        if not 0.0 <= self.stochastic_depth < 1.0:
            raise ValueError(f"convnext: stochastic_depth {self.stochastic_depth} is outside [0, 1)")


PRESETS = {
    "convnext_tiny": Config(),
    "convnext_small": Config((3, 3, 27, 3), stochastic_depth=0.4),
    "convnext_base": Config((3, 3, 27, 3), (128, 256, 512, 1024), 0.5),
    "convnext_large": Config((3, 3, 27, 3), (192, 384, 768, 1536), 0.5),
}


def _block_spec(cfg: Config, width: int) -> dict:
    return {
        "depthwise": conv_spec(width, width, 7, groups=width, init=INIT),
        "mlp": feedforward_spec(width, 4 * width, init=INIT),
        "norm": layer_norm_spec(width),
        "scale": Param((width, 1, 1), initializers.constant(cfg.layer_scale)),
    }


def spec(cfg: Config) -> dict:
    """`stem`, `stages.s.blocks.b`, `stages.s.downsample` but in the first stage, `norm` and `head`.

    Weights start normal with standard deviation 0.02, biases at 0.
    """
    stages = []
    for s, (depth, width) in enumerate(zip(cfg.depths, cfg.widths, strict=True)):
        stage = {"blocks": [_block_spec(cfg, width)] * depth}
        if s:
            before = cfg.widths[s - 1]
            stage["downsample"] = {
                "conv": patch_embedding_spec(before, width, 2, init=INIT),
                "norm": layer_norm_spec(before),
            }
        stages.append(stage)
    return {
        "head": linear_spec(cfg.widths[-1], cfg.classes, init=INIT),
        "norm": layer_norm_spec(cfg.widths[-1]),
        "stages": stages,
        "stem": {
            "conv": patch_embedding_spec(cfg.channels, cfg.widths[0], 4, init=INIT),
            "norm": layer_norm_spec(cfg.widths[0]),
        },
    }


def _channel_norm(p: dict, x: Tensor) -> Tensor:
    """Layer norm over the channels of each pixel. x: (batch, channels, height, width) -> the same shape."""
    return layer_norm(p, x.permute(0, 2, 3, 1), eps=EPS).permute(0, 3, 1, 2)


def _branch(p: dict, x: Tensor) -> Tensor:
    """scale * down(gelu(up(norm(depthwise(x))))). x: (batch, channels, height, width) -> the same shape."""
    y = conv(p["depthwise"], x, padding=3, groups=x.shape[1])
    y = layer_norm(p["norm"], y.permute(0, 2, 3, 1), eps=EPS)  # (batch, height, width, channels)
    y = feedforward(p["mlp"], y, "gelu").permute(0, 3, 1, 2)  # (batch, channels, height, width)
    return p["scale"] * y


def feature_maps(
    params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> list[Tensor]:
    """The output of each stage, (batch, channels, height, width) each.

    Args:
        x: (batch, channels, height, width).
        key: (2,) or one per example (batch, 2); needed in training if there is stochastic depth.

    Raises:
        ValueError: images with other channels, or smaller than the net's stride; no key where one is needed.
    """
    check_images("convnext", x, cfg.channels, 4 * 2 ** (len(cfg.depths) - 1))
    dropping = train and cfg.stochastic_depth > 0.0
    if dropping and key is None:
        rate = cfg.stochastic_depth
        raise ValueError(f"convnext: training with stochastic depth {rate} draws random numbers; pass key=")
    blocks = sum(cfg.depths)
    sites = iter(random.sites(key, blocks) if dropping else [None] * blocks)
    rates = iter([cfg.stochastic_depth * i / max(blocks - 1, 1) for i in range(blocks)])
    x = _channel_norm(params["stem"]["norm"], patch_embedding(params["stem"]["conv"], x))  # (batch, d, h / 4, w / 4)
    maps = []
    for stage in params["stages"]:
        if "downsample" in stage:
            x = _channel_norm(stage["downsample"]["norm"], x)
            x = patch_embedding(stage["downsample"]["conv"], x)  # (batch, next width, h / 2, w / 2)
        for p in stage["blocks"]:
            x = x + stochastic_depth(_branch(p, x), next(rates), next(sites), train)  # y = x + drop(branch(x))
        maps.append(x)
    return maps


def features(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Penultimate features: the last stage's feature maps, global-average-pooled and normalised. -> (batch, d)."""
    pooled = global_average_pool(feature_maps(params, x, cfg, key=key, train=train)[-1])  # (batch, d)
    return layer_norm(params["norm"], pooled, eps=cfg.eps)


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of images. x: (batch, channels, height, width) -> (batch, classes); key as in `feature_maps`."""
    return linear(params["head"], features(params, x, cfg, key=key, train=train))


NAMES = {
    "torchvision": {
        "block": "features.{index}.{b}",
        "depthwise": "block.0",
        "downsample.conv": "features.{before}.1",
        "downsample.norm": "features.{before}.0",
        "head": "classifier.2",
        "last": "classifier.0",
        "mlp.down": "block.5",
        "mlp.up": "block.3",
        "norm": "block.2",
        "scale": "layer_scale",
        "stem.conv": "features.0.0",
        "stem.norm": "features.0.1",
    },
    "transformers": {
        "block": "convnext.encoder.stages.{s}.layers.{b}",
        "depthwise": "dwconv",
        "downsample.conv": "convnext.encoder.stages.{s}.downsampling_layer.1",
        "downsample.norm": "convnext.encoder.stages.{s}.downsampling_layer.0",
        "head": "classifier",
        "last": "convnext.layernorm",
        "mlp.down": "pwconv2",
        "mlp.up": "pwconv1",
        "norm": "layernorm",
        "scale": "layer_scale_parameter",
        "stem.conv": "convnext.embeddings.patch_embeddings",
        "stem.norm": "convnext.embeddings.layernorm",
    },
}
"""Names of the parts in other libraries' files; those of a block are below `block`, the norm before the head is `last`.
Torchvision counts the downsampling between two stages (`before`) in one list with the stages (`index`)."""


def rename_table(cfg: Config, source: str = "torchvision") -> dict[str, Rename]:
    """Our names -> torchvision's, or those of transformers' ConvNextForImageClassification.

    Raises:
        ValueError: a source that is neither.
    """
    if source not in NAMES:
        raise ValueError(f"convnext: source '{source}' is unknown; expected one of {', '.join(NAMES)}")
    names = NAMES[source]
    parts = {"head": names["head"], "norm": names["last"], **{n: names[n] for n in ("stem.conv", "stem.norm")}}
    table = {}
    for s, depth in enumerate(cfg.depths):
        index = {"s": s, "before": 2 * s, "index": 2 * s + 1}
        for part in ("downsample.conv", "downsample.norm") if s else ():
            parts[f"stages.{s}.{part}"] = names[part].format(**index)
        for b in range(depth):
            ours, theirs = f"stages.{s}.blocks.{b}", names["block"].format(**index, b=b)
            for part in ("depthwise", "mlp.down", "mlp.up", "norm"):
                parts[f"{ours}.{part}"] = f"{theirs}.{names[part]}"
            table[f"{ours}.scale"] = Rename(f"{theirs}.{names['scale']}")
    for ours, theirs in parts.items():
        table |= affine_names(ours, theirs)
    return table


def recognise(state: dict[str, Tensor], cfg: Config) -> tuple[dict[str, Tensor], dict[str, Rename]]:
    """(tensors in our shapes, rename table of the library that wrote them)."""
    transformers = rename_table(cfg, "transformers")
    state = with_base_prefix(state, "convnext.", transformers)
    # Transformers keeps the scale of a branch as a vector.
    vectors = {name for name, x in state.items() if name.endswith(".layer_scale_parameter") and x.ndim == 1}
    state = {name: x[:, None, None] if name in vectors else x for name, x in state.items()}
    return state, fitting_table(state, rename_table(cfg), transformers)


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters from torchvision's or transformers' file: a local file or folder, or a hub repository."""
    return fill(spec(cfg), *recognise(read(source), cfg), source)
