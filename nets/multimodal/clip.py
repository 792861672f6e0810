"""CLIP: one space for pictures and texts, learned from pairs of them.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020):

    image = normalise(W_i f(picture));   text = normalise(W_t g(words));   logits = exp(scale) image textᵀ

f is a ViT with a norm before its blocks (Dosovitskiy et al. 2021, arXiv:2010.11929), or the ResNet of
`nets/multimodal/clip_resnet.py`; g is a causal transformer, read at the token that ends the text. Both learn by telling
apart the pairs of a batch: `train.losses.contrastive`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers
from core.layers import embedding, embedding_spec, layer_norm, layer_norm_spec, linear, linear_spec
from core.layers.checks import check_tensor
from core.spec import Param
from core.tree import Tree
from nets.blocks.conv_norm import check_images, patch_embedding, patch_embedding_spec
from nets.blocks.transformer_block import block, block_spec, feedforward_spec
from nets.multimodal import clip_resnet

MAX_SCALE = 4.605170185988092
"""ln 100, above which section 2.5 clips the scale."""


@dataclass(frozen=True)
class Config:
    """Sizes of both towers of a CLIP."""

    embedding: int = 512
    """Size of the space that pictures and texts share."""
    image: int = 224
    """Pixels per side."""
    channels: int = 3
    patch: int = 32
    """Pixels per side of a patch of the ViT."""
    image_layers: int = 12
    image_heads: int = 12
    image_width: int = 768
    """Size of the ViT's hidden states; of the ResNet, channels after its stem."""
    depths: tuple[int, ...] = ()
    """Blocks of each stage of the ResNet; empty for a ViT."""
    zero_init: bool = True
    """Start the last norm of each of its blocks at 0, so that a block is its shortcut."""
    vocabulary: int = 49408
    context: int = 77
    """Maximal number of tokens in a text."""
    text_layers: int = 12
    text_heads: int = 8
    text_width: int = 512
    end_id: int | None = None
    """Token that ends a text. None: the largest id of the text, as in OpenAI's vocabulary."""
    activation: str = "quick_gelu"
    """Activation of the MLPs, a name of `core.layers.ACTIVATIONS`: OpenAI's weights are for quick_gelu, most of
    OpenCLIP's for gelu."""
    eps: float = 1e-5
    """Epsilon of the norms."""
    temperature: float = 0.07
    """Initial temperature, exp(-scale)."""
    attention: str = "auto"
    """Method of `core.attention.attention`: auto, explicit or fused."""

    def __post_init__(self):
        sizes = ("embedding", "image", "channels", "patch", "image_layers", "image_heads", "image_width", "vocabulary")
        for name in (*sizes, "context", "text_layers", "text_heads", "text_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"clip: {name} is {getattr(self, name)}; expected at least 1")
        if not self.depths and self.image % self.patch:
            raise ValueError(f"clip: image {self.image} is not divisible by patch {self.patch}")
        if self.depths and (len(self.depths) != 4 or min(self.depths) < 1 or self.image % 32):
            sizes = f"depths {self.depths} for images of {self.image}"
            raise ValueError(f"clip: {sizes}; expected four stages of at least one block, and a multiple of 32 pixels")
        for tower in ("image", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"clip: {tower}_width {width} is not divisible by {heads} heads")
        if not self.temperature > 0:
            raise ValueError(f"clip: temperature is {self.temperature}; expected more than 0")


def _resnet(depths: tuple[int, ...], width: int, image: int, embedding: int, text_width: int) -> Config:
    sizes = {"image_width": width, "image_heads": width // 2, "text_width": text_width, "text_heads": text_width // 64}
    return Config(embedding, image, depths=depths, **sizes)


PRESETS = {
    "vit-b-32": Config(),
    "vit-b-16": Config(patch=16),
    "vit-l-14": Config(768, patch=14, image_layers=24, image_heads=16, image_width=1024, text_heads=12, text_width=768),
    "rn50": _resnet((3, 4, 6, 3), 64, 224, 1024, 512),
    "rn101": _resnet((3, 4, 23, 3), 64, 224, 512, 512),
    "rn50x4": _resnet((4, 6, 10, 6), 80, 288, 640, 640),
}
"""Those of table 19 and 20 of the paper."""


def _blocks_spec(width: int, heads: int, layers: int) -> list[Tree]:
    """The initialisation of OpenAI's code: smaller where a matrix writes into the residual stream."""
    residual = initializers.normal(width**-0.5 * (2 * layers) ** -0.5)
    one = block_spec(width, heads, 4 * width, init=initializers.normal(width**-0.5), residual_init=residual)
    hidden = initializers.normal((2 * width) ** -0.5)
    return [one | {"mlp": feedforward_spec(width, 4 * width, init=hidden, down_init=residual)}] * layers


def vit_spec(cfg: Config) -> Tree:
    """Parameters of the ViT; patches have no bias."""
    width, init = cfg.image_width, initializers.normal(cfg.image_width**-0.5)
    patches = patch_embedding_spec(cfg.channels, width, cfg.patch, init=initializers.lecun_normal())
    return {
        "blocks": _blocks_spec(width, cfg.image_heads, cfg.image_layers),
        "class_token": Param((width,), init, ("embed",)),
        "norm": layer_norm_spec(width),
        "norm_before": layer_norm_spec(width),
        "patches": {"weight": patches["weight"]},
        "positions": embedding_spec(1 + (cfg.image // cfg.patch) ** 2, width, init=init, axes=("time", "embed")),
        "projection": linear_spec(width, cfg.embedding, bias=False, init=init),
    }


def spec(cfg: Config) -> Tree:
    """`image`, `text` and the 0-D `scale`, the logarithm of what the cosines are multiplied with."""
    width = cfg.text_width
    text = {
        "blocks": _blocks_spec(width, cfg.text_heads, cfg.text_layers),
        "norm": layer_norm_spec(width),
        "positions": embedding_spec(cfg.context, width, init=initializers.normal(0.01), axes=("time", "embed")),
        "projection": linear_spec(width, cfg.embedding, bias=False, init=initializers.normal(width**-0.5)),
        "tokens": embedding_spec(cfg.vocabulary, width, init=initializers.normal(0.02), axes=("vocabulary", "embed")),
    }
    start = initializers.constant(-torch.tensor(cfg.temperature).double().log().item())
    image = clip_resnet.spec(cfg) if cfg.depths else vit_spec(cfg)
    return {"image": image, "scale": Param((), start), "text": text}


def vit_states(p: Tree, x: Tensor, cfg: Config) -> list[Tensor]:
    """Input of the ViT's first block and output of each, (batch, 1 + patches, width), class token first."""
    patches = patch_embedding(p["patches"], x).flatten(2).transpose(1, 2)  # (batch, patches, width)
    token = p["class_token"].expand(x.shape[0], 1, cfg.image_width)  # (batch, 1, width)
    embedded = torch.cat([token, patches], 1) + p["positions"]["weight"]  # (batch, 1 + patches, width)
    states = [layer_norm(p["norm_before"], embedded, eps=cfg.eps)]
    options = {"activation": cfg.activation, "eps": cfg.eps, "method": cfg.attention}
    for one in p["blocks"]:
        states.append(block(one, states[-1], cfg.image_heads, **options))
    return states


def encode_image(params: Tree, x: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """Embeddings of pictures, not normalised: x (batch, channels, image, image) -> (batch, embedding).

    Raises ValueError: pictures of another size or with other channels.
    """
    check_tensor("clip", x)
    check_images("clip", x, cfg.channels, 1)
    if tuple(x.shape[2:]) != (cfg.image, cfg.image):
        raise ValueError(f"clip: the images are {x.shape[2]} x {x.shape[3]}; expected {cfg.image} x {cfg.image}")
    p = params["image"]
    if cfg.depths:
        return clip_resnet.apply(p, x, cfg, train=train)
    token = vit_states(p, x, cfg)[-1][:, 0]  # (batch, width)
    return linear(p["projection"], layer_norm(p["norm"], token, eps=cfg.eps))  # (batch, embedding)


def text_states(params: Tree, tokens: Tensor, cfg: Config) -> Tensor:
    """Last hidden states of a text after their norm: tokens (batch, time) -> (batch, time, width).

    Raises ValueError: tokens of another shape, or more than the context.
    """
    check_tensor("clip", tokens, "tokens")
    if tokens.ndim != 2 or not 0 < tokens.shape[1] <= cfg.context:
        raise ValueError(f"clip: expected tokens (batch, time up to {cfg.context}), found {tuple(tokens.shape)}")
    p = params["text"]
    x = embedding(p["tokens"], tokens) + p["positions"]["weight"][: tokens.shape[1]]  # (batch, time, width)
    options = {"activation": cfg.activation, "causal": True, "eps": cfg.eps, "method": cfg.attention}
    for one in p["blocks"]:
        x = block(one, x, cfg.text_heads, **options)
    return layer_norm(p["norm"], x, eps=cfg.eps)


def encode_text(params: Tree, tokens: Tensor, cfg: Config) -> Tensor:
    """Embeddings of texts, not normalised: tokens (batch, time) -> (batch, embedding).

    A text is read at the first `cfg.end_id`, or at its largest id; what stands after that does not count, since no
    token sees a later one.
    """
    x = text_states(params, tokens, cfg)  # (batch, time, width)
    ends = tokens.argmax(1) if cfg.end_id is None else (tokens == cfg.end_id).long().argmax(1)  # (batch,)
    x = x.gather(1, ends[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)  # (batch, width)
    return linear(params["text"]["projection"], x)  # (batch, embedding)


def apply(
    params: Tree, x: tuple[Tensor, Tensor], cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> dict[str, Tensor]:
    """Embeddings of pairs of a picture and a text.

    Args:
        x: pictures (batch, channels, image, image), and tokens (batch, time) of integers below `cfg.vocabulary`.
        key: nothing is drawn; the argument is there as in other nets.

    Returns:
        image and text, (batch, embedding), each of norm 1; similarity (batch,), exp(scale) times their product.
    """
    image = F.normalize(encode_image(params, x[0], cfg, train=train), dim=-1)  # (batch, embedding)
    text = F.normalize(encode_text(params, x[1], cfg), dim=-1)  # (batch, embedding)
    return {"image": image, "similarity": params["scale"].exp() * (image * text).sum(-1), "text": text}


def logits(params: Tree, image: Tensor, text: Tensor) -> Tensor:
    """Similarities of every picture to every text: (pictures, embedding), (texts, embedding), both of norm 1 ->
    (pictures, texts)."""
    return params["scale"].exp() * image @ text.T


def clipped(params: Tree) -> Tree:
    """The parameters with a scale of at most ln 100, after an optimizer's step."""
    return params | {"scale": params["scale"].clamp(max=MAX_SCALE)}
