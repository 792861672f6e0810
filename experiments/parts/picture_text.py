"""A CLIP of a run or of published files: its tokenizer and pixels, embeddings of pictures and texts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import tree
from core.layers import linear_spec
from core.tree import Tree
from nets import weights
from nets.multimodal import clip, clip_weights
from train.data.text import clip_pairs, tokenizers
from train.data.text.tokenizers import BytePairTokenizer
from train.run import SavedRun, command_line, open_run
from train.run.flags import check_source

BATCH = 64
"""Pictures or texts that are embedded at once."""
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Means and standard deviations of the pixels of published nets, unless a file says otherwise."""
SMALL = {"embedding": 64, "text_layers": 1, "text_heads": 2, "text_width": 64, "activation": "gelu"}
VIT = SMALL | {"image_layers": 3, "image_heads": 3, "image_width": 96}
RESNET = SMALL | {"depths": (1, 1, 1, 1), "image_width": 16, "image_heads": 8, "zero_init": False}


class Pixels(NamedTuple):
    """Means and standard deviations of the channels that a net expects, and whether pictures are squeezed into the
    square (True) or their middle is taken."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    whole: bool = False


class Clip(NamedTuple):
    params: Tree
    cfg: clip.Config
    tokenizer: BytePairTokenizer
    pixels: Pixels

    @property
    def pictures(self) -> tuple[int, bool]:
        """Pixels per side, and whether pictures are squeezed, as `captions.read_pictures` takes them."""
        return self.cfg.image, self.pixels.whole


# Loading.


def scratch(args: Any, texts: Sequence[str], images: Tensor) -> Clip:
    """A net of the flags of clip.py, its parameters being their spec; vocabulary and pixels are those of the data.

    Raises ValueError: pictures of a size that the net does not take.
    """
    if args.longest < 3:
        raise ValueError(f"--longest is {args.longest}; expected at least 3")
    tokenizer = clip_pairs.train_clip_pairs(texts, args.vocabulary)
    sizes = {"vocabulary": tokenizer.vocabulary_size, "end_id": tokenizer.token_id(clip_pairs.END)}
    sizes |= {"context": args.longest, "image": args.size}
    small = {"vit": VIT | {"patch": max(1, args.size // 8)}, "resnet": RESNET}.get(args.net)
    base = clip.Config(**small, **sizes) if small else dataclasses.replace(clip.PRESETS[args.net], **sizes)
    values = images[:: max(1, len(images) // 1000)].double() / 255
    mean, std = (tuple(x.tolist()) for x in (values.mean((0, 2, 3)), values.std((0, 2, 3)).clamp(min=1e-3)))
    return Clip(clip.spec(base), base, tokenizer, Pixels(mean, std, args.fit == "squeeze"))


def of_weights(source: str, device: torch.device | str = "cpu") -> Clip:
    """Published weights: a folder or repository of transformers, OpenAI or OpenCLIP, with the tokenizer's files.

    Raises WeightsError, DataError: another kind of net, a file that is missing or does not fit.
    """
    params, cfg = clip_weights.from_pretrained(source)
    place = weights.beside(source)
    if not Path(place).is_dir():  # a repository: the tokenizer comes into the same folder of the cache
        place = str(weights.locate(place, ("tokenizer.json",)).parent)
    tokenizer = clip_pairs.load(place)
    if tokenizer.vocabulary_size > cfg.vocabulary:
        sizes = f"{tokenizer.vocabulary_size} tokens, expected up to the {cfg.vocabulary} of the net"
        raise ValueError(f"the tokenizer of '{source}' has {sizes}")
    if cfg.end_id not in (None, tokenizer.token_id(clip_pairs.END)):
        raise ValueError(f"'{source}': texts end with token {cfg.end_id}, in its tokenizer they do not")
    entries = weights.read_config(source, "preprocessor_config.json", optional=True)
    if not entries:
        entries = weights.read_config(source, "open_clip_config.json", optional=True).get("preprocess_cfg", {})
    values = [
        entries.get(f"image_{name}", entries.get(name, own)) for name, own in zip(("mean", "std"), OPENAI, strict=True)
    ]
    fits = all(
        isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(x, int | float) for x in value)
        for value in values
    )
    if not fits or min(values[1]) <= 0:
        raise ValueError(f"'{source}': means and standard deviations of pixels are {values}; expected three of each")
    return Clip(tree.move(params, device), cfg, tokenizer, Pixels(*(tuple(map(float, value)) for value in values)))


def head_spec(cfg: clip.Config) -> Tree:
    """The head of runs with --task true-false: an MLP on [u; v; u v; |u - v|] of a picture's and a text's embedding."""
    return {"hidden": linear_spec(4 * cfg.embedding, 2 * cfg.embedding), "out": linear_spec(2 * cfg.embedding, 1)}


def with_head(run: SavedRun, device: torch.device | str = "cpu") -> tuple[Clip, Tree]:
    """(The net of a run, at its checkpoint; its head, {} if it has none)."""
    cfg = run.read("net", clip.Config)
    model = {"clip": clip.spec(cfg)} | ({"head": head_spec(cfg)} if run.config["args"]["task"] == "true-false" else {})
    params = tree.move(run.learned(model, averaged=False), device)
    tokenizer = tokenizers.load(run.folder / "tokenizer.json", lossy=True)
    tokenizer.tokenizer.encode_special_tokens = True
    return Clip(params["clip"], cfg, tokenizer, run.read("pixels", Pixels)), params.get("head", {})


def opened(args: Any, root: Path) -> Clip:
    """The net of --run, whose runs are in `root`, or of --weights.

    Raises ValueError: none of both; a run that did not learn to compare pictures and texts.
    """
    check_source(args)
    device = command_line.device(args.device)
    if args.weights:
        return of_weights(args.weights, device)
    model, head = with_head(open_run(args.run, root, args.checkpoint), device)
    if head:
        raise ValueError(f"'{args.run}' learned what is true or false; expected a run that learned pairs")
    return model


def stored(model: Clip) -> dict[str, Any]:
    """Entries of a run's configuration, from which `with_head` makes the net again."""
    return {"net": model.cfg, "pixels": model.pixels}


# Embeddings.


def normalised(images: Tensor, pixels: Pixels) -> Tensor:
    """Bytes as a net takes them: (x / 255 - mean) / standard deviation."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in pixels[:2])
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def embed_pictures(model: Clip, images: Tensor) -> Tensor:
    """Embeddings (pictures, width) of norm 1, on the CPU, of bytes (pictures, 3, size, size)."""
    device, out = tree.leaves(model.params)[0].device, []
    for batch in images.split(BATCH):
        inputs = normalised(batch.to(device), model.pixels)
        out.append(F.normalize(clip.encode_image(model.params, inputs, model.cfg), dim=-1).float().cpu())
    return torch.cat(out)


@torch.no_grad()
def embed_texts(model: Clip, texts: Sequence[str]) -> Tensor:
    """Embeddings (texts, width) of norm 1, on the CPU."""
    device, out = tree.leaves(model.params)[0].device, []
    tokens, _ = clip_pairs.encode(model.tokenizer, texts, model.cfg.context)
    for batch in tokens.split(BATCH):
        out.append(F.normalize(clip.encode_text(model.params, batch.to(device), model.cfg), dim=-1).float().cpu())
    return torch.cat(out)


def cut(model: Clip, texts: Sequence[str]) -> str:
    """A note on texts with more tokens than the net sees, of which the rest does not count; "" if there is none."""
    count = sum(clip_pairs.encode(model.tokenizer, texts, model.cfg.context)[1])
    return f"{count:,} of {len(texts):,} texts have more than {model.cfg.context} tokens" if count else ""


def class_embeddings(model: Clip, classes: Sequence[str], prompt: str) -> Tensor:
    """Embeddings (classes, width) of the prompt with the name of each class in place of {}."""
    return embed_texts(model, [prompt.replace("{}", name) for name in classes])
