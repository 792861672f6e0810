"""Where the heads of an encoder look in a text: the sub-command `attention` of `experiments/pretrain.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from core import tree
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Encoder
from experiments.parts.filling import attention_maps, piece
from experiments.parts.pretraining import RUNS, is_run, open_encoder
from train import plots
from train.run import command_line, open_run
from train.run.flags import check_source
from train.run.run import unused

LONGEST = 64
"""Tokens that a picture shows at most."""


@dataclass(frozen=True, kw_only=True)
class AttentionArgs:
    sentence: Annotated[str, tyro.conf.Positional] = "The dog that chased the cats is tired, because it ran too far."
    """Sentence whose tokens look at one another."""
    run: Path | None = None
    """Folder of a run with an encoder, of this script or of one that fine-tunes."""
    weights: str | None = None
    """Published weights instead: a folder or repository of a BERT, DistilBERT or RoBERTa."""
    heads: tuple[str, ...] = ()
    """Heads to draw, each as LAYER.HEAD, such as 1.3 4.12; if none is named, those that look most at the previous
    token, the next one, itself, the first and the last."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    out: Path | None = None
    """New picture; RUN/attention_of_text.png, numbered if it exists, if None."""


def maps_of_text(net: Encoder, text: str) -> tuple[Tensor, list[str]]:
    """(Attention weights (layers, heads, time, time) of a text, its tokens). Raises ValueError: it is no Unicode text,
    or too long for the net or a picture."""
    text.encode()  # of a lone surrogate
    longest = min(net.cfg.context, LONGEST)
    (encoding,) = encoders.encodings(net, [text], longest + 1)
    if len(encoding.ids) > longest:
        raise ValueError(f"the text has more than {longest} tokens; expected a sentence")
    tokens = torch.tensor([encoding.ids], device=tree.leaves(net.params)[0].device)
    return attention_maps(net, tokens)[0].cpu(), [piece(net.tokenizer, token).strip() for token in encoding.ids]


def typical(weights: Tensor) -> dict[str, tuple[int, int, float]]:
    """{what: (layer, head, share)}: the head with the largest mean share of weight on each token's previous one, next
    one, itself, and on the first and the last token.

    Args:
        weights: (layers, heads, time, time).
    """
    means = {"itself": weights.diagonal(0, 2, 3), "first token": weights[..., 0], "last token": weights[..., -1]}
    if weights.shape[-1] > 1:
        beside = {"previous token": weights.diagonal(-1, 2, 3), "next token": weights.diagonal(1, 2, 3)}
        means = beside | means
    out = {}
    for what, values in means.items():
        shares = values.float().mean(-1)  # (layers, heads)
        layer, head = divmod(int(shares.argmax()), shares.shape[1])
        out[what] = (layer, head, float(shares.max()))
    return out


def places(names: Sequence[str], layers: int, heads: int) -> list[tuple[int, int]]:
    """(layer, head), counted from 0, of names such as "2.11", counted from 1. Raises ValueError: there is no such."""
    out = []
    for name in names:
        parts = name.split(".")
        numbers = [int(part) - 1 if part.isascii() and part.isdecimal() else -1 for part in parts]
        if len(numbers) != 2 or not (0 <= numbers[0] < layers and 0 <= numbers[1] < heads):
            raise ValueError(f"there is no head '{name}'; expected LAYER.HEAD, up to {layers}.{heads}")
        out.append((numbers[0], numbers[1]))
    return out


def draw_heads(path: Path, weights: Tensor, names: Sequence[str], titles: dict[tuple[int, int], str]) -> None:
    """Panels of single heads: {(layer, head): what stands above it}; weights (layers, heads, time, time)."""
    columns = min(3, len(titles))
    side = 1.4 + 0.2 * len(names)
    with plots.panels(path, -(-len(titles) // columns), columns, width=side + 0.6, height=side) as axes:
        for panel, ((layer, head), title) in zip(axes, titles.items(), strict=False):
            plots.matrix(panel, weights[layer, head], names, names, title=title, numbers=False)
        for panel in axes[len(titles) :]:
            panel.set_axis_off()


def attention(args: AttentionArgs) -> None:
    """Where the heads of an encoder look in a text: a picture of some, and the most typical ones."""
    check_source(args)
    path, device = unused(args.out, (args.run or Path()) / "attention_of_text.png"), command_line.device(args.device)
    if args.run and not is_run(str(args.run)):
        open_run(args.run, RUNS)  # says so
    net, _ = open_encoder(args.weights or str(args.run))
    layers, heads = net.cfg.layers, net.cfg.heads
    titles = {place: f"layer {place[0] + 1}, head {place[1] + 1}" for place in places(args.heads, layers, heads)}
    net = net._replace(params=tree.move(net.params, device))
    weights, names = maps_of_text(net, args.sentence)
    for what, (layer, head, share) in typical(weights).items():
        print(f"{what:14}  layer {layer + 1}, head {head + 1}: {share:.0%} of the weight on average")
        if not args.heads:
            titles.setdefault((layer, head), f"layer {layer + 1}, head {head + 1}: {what}")
    draw_heads(path, weights, names, titles)
    print(f"{layers} layers of {heads} heads, {len(names)} tokens; picture in {path}")
