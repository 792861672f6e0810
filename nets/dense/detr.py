"""DETR: detection as the prediction of a set, by a transformer on the feature map of a ResNet.

Carion et al. 2020, "End-to-End Object Detection with Transformers" (arXiv:2005.12872). With the positions P of the
feature map and learned queries Q, at every attention,

    encoder:  h = norm(h + attention(h + P, h + P, h));   h = norm(h + mlp(h))
    decoder:  d = 0;   d = norm(d + attention(d + Q, d + Q, d));   d = norm(d + attention(d + Q, h + P, h));
              d = norm(d + mlp(d));   logits = W norm(d),   box = sigmoid(mlp(norm(d)))

Each query predicts one object or none, the last class; nothing is suppressed afterwards. Its losses are
`train.losses.matching`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import boxes, initializers, random
from core.attention import attention, merge_heads, split_heads
from core.layers import (
    conv,
    conv_spec,
    dropout_sites,
    embedding_spec,
    layer_norm,
    layer_norm_spec,
    linear,
    linear_spec,
)
from core.layers.checks import check_tensor
from core.tree import Tree
from nets.blocks.conv_norm import affine_names, fill_published, fitting_table
from nets.blocks.residual_stages import TORCHVISION, TRANSFORMERS, Stages, stage_maps, stage_names, stages_spec
from nets.blocks.transformer_block import feedforward, feedforward_spec, identity, sinusoids
from nets.weights import Rename, read

RESNET50 = Stages((3, 4, 6, 3), "bottleneck")
SCALE = 2 * math.pi
"""Greatest position along an axis, before the sinusoids."""


@dataclass(frozen=True)
class Config:
    """Sizes of DETR and of the ResNet that it reads."""

    classes: int = 91
    """Classes of objects; "no object" is one more."""
    backbone: Stages = RESNET50
    """Stages of the ResNet."""
    queries: int = 100
    """Objects per image, at most."""
    layers: int = 6
    """Layers of the encoder, and of the decoder."""
    heads: int = 8
    width: int = 256
    hidden: int = 2048
    """Hidden units of the MLPs."""
    dropout: float = 0.1
    """Dropout rate of the residual branches of attention, as in transformers' files."""
    frozen_norms: bool = True
    """The ResNet's batch norms use their running statistics in training too."""
    attention: str = "auto"
    """Method of `core.attention.attention`: auto, explicit or fused."""

    def __post_init__(self):
        for name in ("classes", "queries", "layers", "heads", "width", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"detr: {name} is {getattr(self, name)}; expected at least 1")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"detr: width {self.width} is not divisible by 4 and {self.heads} heads")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"detr: dropout {self.dropout} is outside [0, 1)")


PRESETS = {
    "resnet50": Config(),
    "resnet18": Config(backbone=Stages()),
    "small": Config(
        10,
        Stages((1, 1, 1, 1), width=16, stem="cifar"),
        queries=8,
        layers=2,
        heads=4,
        width=64,
        hidden=128,
        dropout=0.0,
        frozen_norms=False,
    ),
}
"""resnet50: facebook/detr-resnet-50. small: scenes of digits."""


def _attention_spec(width: int) -> Tree:
    init = initializers.xavier_uniform()
    return {name: linear_spec(width, width, init=init) for name in ("k", "proj", "q", "v")}


def spec(cfg: Config) -> Tree:
    """`backbone`, `projection`, `encoder`, `decoder`, its last `norm`, `queries`, and the heads `classes`, `boxes`."""
    d_in = cfg.backbone.outputs(len(cfg.backbone.depths) - 1)
    mlp, norm = feedforward_spec(cfg.width, cfg.hidden), layer_norm_spec(cfg.width)
    layer = {"attn": _attention_spec(cfg.width), "mlp": mlp, "norm1": norm, "norm2": norm}
    decoder = {**layer, "cross": _attention_spec(cfg.width), "norm_cross": norm}
    as_torch = initializers.kaiming_uniform(a=math.sqrt(5))
    sizes = [(cfg.width, cfg.width)] * 2 + [(cfg.width, 4)]
    return {
        "backbone": stages_spec(cfg.backbone),
        "boxes": [linear_spec(*size, init=as_torch) for size in sizes],
        "classes": linear_spec(cfg.width, cfg.classes + 1, init=as_torch),
        "decoder": [dict(sorted(decoder.items()))] * cfg.layers,
        "encoder": [layer] * cfg.layers,
        "norm": norm,
        "projection": conv_spec(d_in, cfg.width, 1, init=as_torch),
        "queries": embedding_spec(cfg.queries, cfg.width, init=initializers.normal(), axes=("queries", "embed")),
    }


def positions(mask: Tensor, width: int) -> Tensor:
    """Sinusoids of the places of a feature map: mask (batch, h, w), True inside the image -> (batch, h * w, width).

    Rows and columns are counted from 1, up to 2 pi at the last one inside; half of the dimensions are for rows.
    """
    inside = mask.float()
    halves = []
    for axis in (1, 2):  # rows, columns
        count = inside.cumsum(axis)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        halves.append(sinusoids(count / (last + 1e-6) * SCALE, width // 2))  # (batch, h, w, width / 2)
    return torch.cat(halves, -1).flatten(1, 2)


Drop = Callable[[Tensor], Tensor]


def _attend(
    p: Tree, q: Tensor, k: Tensor, v: Tensor, cfg: Config, mask: Tensor | None = None, see: Drop | None = None
) -> Tensor:
    """Multi-head attention of q (batch, queries, width) to k and v (batch, keys, width) -> the shape of q."""
    parts = [split_heads(linear(p[name], x), cfg.heads) for name, x in (("q", q), ("k", k), ("v", v))]
    return linear(p["proj"], merge_heads(attention(*parts, mask=mask, drop=see, method=cfg.attention)))


def encode(
    params: Tree, x: Tensor, cfg: Config, *, mask: Tensor | None = None, drops: list[Drop] | None = None, train=False
) -> tuple[Tensor, Tensor, Tensor]:
    """(memory, its positions, both (batch, places, width), and which places are inside, (batch, places))."""
    check_tensor("detr", x)
    features = stage_maps(params["backbone"], x, cfg.backbone, train=train and not cfg.frozen_norms)[-1]
    if mask is None:
        mask = x.new_ones(x.shape[0], *features.shape[2:]).bool()
    else:
        mask = F.interpolate(mask[:, None].float(), size=features.shape[2:])[:, 0].bool()  # (batch, h, w)
    where = positions(mask, cfg.width).to(features.dtype)  # (batch, places, width)
    h = conv(params["projection"], features).flatten(2).transpose(1, 2)  # (batch, places, width)
    inside = mask.flatten(1)  # (batch, places)
    for p, drop in zip(params["encoder"], drops or [identity] * cfg.layers, strict=True):
        place = h + where
        h = layer_norm(p["norm1"], h + drop(_attend(p["attn"], place, place, h, cfg, inside[:, None, None])))
        h = layer_norm(p["norm2"], h + feedforward(p["mlp"], h, "relu"))
    return h, where, inside


def apply(
    params: Tree,
    x: Tensor,
    cfg: Config,
    *,
    mask: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
    see: Drop | None = None,
) -> dict[str, Tensor]:
    """Predictions of every query after every layer of the decoder, whose last ones count.

    Args:
        x: (batch, channels, height, width).
        mask: (batch, height, width) boolean, False where an image is filled up to the size of the batch.
        key: (2,) or one per example (batch, 2); needed in training with dropout.
        see: called with the weights of the decoder's attention to the image, (batch, heads, queries, places), of each
            layer; it must return them.

    Returns:
        logits (batch, layers, queries, classes + 1), the last one of no object; boxes (batch, layers, queries, 4),
        centre x and y, width and height as shares of the image.

    Raises:
        ValueError: no key where one is needed.
    """
    drops = [identity] * (3 * cfg.layers)
    if train and cfg.dropout:
        if key is None:
            raise ValueError(f"detr: training with dropout {cfg.dropout} draws random numbers; pass key=")
        of_places, of_queries = random.sites(key, 2).unbind(0)
        stride = (4 if cfg.backbone.stem == "imagenet" else 1) * 2 ** (len(cfg.backbone.depths) - 1)
        places = -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
        drops = dropout_sites(of_places, cfg.layers, (x.shape[0], places, cfg.width), cfg.dropout)
        drops = [*drops, *dropout_sites(of_queries, 2 * cfg.layers, (x.shape[0], cfg.queries, cfg.width), cfg.dropout)]
    memory, where, inside = encode(params, x, cfg, mask=mask, drops=drops[: cfg.layers], train=train)
    keys, seen = memory + where, inside[:, None, None]
    queries = params["queries"]["weight"].expand(x.shape[0], -1, -1)  # (batch, queries, width)
    d, outputs = torch.zeros_like(queries), []
    on_self, on_cross = drops[cfg.layers :: 2], drops[cfg.layers + 1 :: 2]
    for p, drop, drop_cross in zip(params["decoder"], on_self, on_cross, strict=True):
        query = d + queries
        d = layer_norm(p["norm1"], d + drop(_attend(p["attn"], query, query, d, cfg)))
        crossed = _attend(p["cross"], d + queries, keys, memory, cfg, seen, see)
        d = layer_norm(p["norm_cross"], d + drop_cross(crossed))
        d = layer_norm(p["norm2"], d + feedforward(p["mlp"], d, "relu"))
        outputs.append(layer_norm(params["norm"], d))
    y = torch.stack(outputs, 1)  # (batch, layers, queries, width)
    first, second, last = params["boxes"]
    frames = linear(last, linear(second, linear(first, y).relu()).relu()).sigmoid()  # (batch, layers, queries, 4)
    return {"boxes": frames, "logits": linear(params["classes"], y)}


class Detections(NamedTuple):
    """Objects in one image, by descending score: boxes (count, 4) in pixels, scores and labels (count,), and the number
    of the query that found each."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    queries: Tensor


@torch.no_grad()
def detect(params: Tree, x: Tensor, cfg: Config, *, score: float = 0.7) -> list[Detections]:
    """Objects with a probability above `score` in each image: x (batch, channels, height, width)."""
    out, (height, width) = apply(params, x, cfg), x.shape[2:]
    best, labels = out["logits"][:, -1].softmax(-1)[..., :-1].max(-1)  # (batch, queries)
    frames = boxes.from_centres(out["boxes"][:, -1]) * x.new_tensor([width, height, width, height])
    detections = []
    for values, kinds, rows in zip(best, labels, frames, strict=True):
        order = values.argsort(descending=True, stable=True)
        order = order[values[order] > score]
        detections.append(Detections(boxes.clip(rows[order], height, width), values[order], kinds[order], order))
    return detections


def rename_table(cfg: Config, source: str = "torchvision") -> dict[str, Rename]:
    """Our names -> those of transformers' DetrForObjectDetection; source: whose names its ResNet has."""
    names = {"torchvision": TORCHVISION, "transformers": TRANSFORMERS}[source]
    table = stage_names(cfg.backbone, names, ours="backbone.", theirs="model.backbone.model.")
    parts = {"k": "k_proj", "proj": "o_proj", "q": "q_proj", "v": "v_proj"}
    norms = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
    for stack in ("encoder", "decoder"):
        attentions = {"attn": "self_attn"} | ({"cross": "encoder_attn"} if stack == "decoder" else {})
        own = norms | ({"norm_cross": "encoder_attn_layer_norm"} if stack == "decoder" else {})
        for i in range(cfg.layers):
            mine, their = f"{stack}.{i}", f"model.{stack}.layers.{i}"
            for ours, theirs in attentions.items():
                for part, name in parts.items():
                    table |= affine_names(f"{mine}.{ours}.{part}", f"{their}.{theirs}.{name}")
            for ours, theirs in own.items():
                table |= affine_names(f"{mine}.{ours}", f"{their}.{theirs}")
            table |= affine_names(f"{mine}.mlp.up", f"{their}.mlp.fc1")
            table |= affine_names(f"{mine}.mlp.down", f"{their}.mlp.fc2")
    for i in range(3):
        table |= affine_names(f"boxes.{i}", f"bbox_predictor.layers.{i}")
    table |= affine_names("classes", "class_labels_classifier") | affine_names("norm", "model.decoder.layernorm")
    table |= affine_names("projection", "model.input_projection")
    return table | {"queries.weight": Rename("model.query_position_embeddings.weight")}


def from_published(state: dict[str, Tensor], cfg: Config, what: str = "DETR weights") -> Tree:
    """Parameters and Stats from the tensors of transformers' DetrForObjectDetection, with old and new names.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen.
    """
    renamed = {}
    for name, value in state.items():
        name = name.replace("backbone.conv_encoder.", "backbone.").replace(".out_proj.", ".o_proj.")
        renamed[re.sub(r"\.(fc[12])\.", r".mlp.\1.", name.replace(".mlp.fc", ".fc"))] = value
    table = fitting_table(renamed, rename_table(cfg), rename_table(cfg, "transformers"))
    return fill_published(spec(cfg), renamed, table, what)


def from_pretrained(source: str, cfg: Config) -> Tree:
    """Parameters and Stats from transformers' file: a local file or folder, or a hub repository."""
    return from_published(read(source, prefixes=("module.", "_orig_mod.")), cfg, source)
