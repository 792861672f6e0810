"""A captioner that `experiments/caption.py` trains, or a published one: its data, its loss and what it writes."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import random, spec, tree
from core.tree import Tree
from experiments.parts.translator import GREEDY, Decoder, Marks, avoiding, search
from nets import weights
from nets.multimodal import captioner, captioner_weights
from train import optimizers
from train.data import DataError, batching
from train.data.images import augment, captions, scenes
from train.data.images.arrays import digits
from train.data.text import tokenizers
from train.data.text.ragged import padded
from train.data.text.token_files import END_OF_TEXT
from train.data.text.tokenizers import PAD, UNK, BytePairTokenizer, SentenceTokenizer
from train.files import shown
from train.losses import token_cross_entropy
from train.metrics import translation
from train.optimizers import schedules
from train.run import SavedRun

TRAINING, TESTING = 6000, 500
"""Scenes to learn from and to test on."""
MOST = 3
"""Digits of a scene, at most."""
LARGEST = 64
"""Pixels per side of a scene, at most."""
BATCH = 64
"""Pictures at once, without a gradient."""
NOTHING = -1
"""Label of the positions after a caption, which do not count."""
WRITTEN = 50
"""Tokens that a published captioner writes, at most."""


class Captioner(NamedTuple):
    params: Tree
    cfg: captioner.Config
    tokenizer: SentenceTokenizer | BytePairTokenizer
    marks: Marks


class Pictures(NamedTuple):
    """images: (count, 3, side, side) bytes, each with at least one caption; `names` of their files."""

    images: Tensor
    captions: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]


class Data(NamedTuple):
    """Pictures to learn from and to test on; `facts` are what was understood of them."""

    train: Pictures
    test: Pictures
    facts: dict[str, Any]
    skipped: int


class Caption(NamedTuple):
    text: str
    score: float
    ids: list[int]
    """The tokens that were decoded, without the end."""


# Data.


def _of_scenes(key: Tensor, count: int, pool: Any, size: int) -> Pictures:
    """Up to `count` scenes; those are left out whose order from left to right is a matter of a few pixels.

    They are drawn with up to `LARGEST` pixels per side, and enlarged for a net that sees more.
    """
    side = min(size, LARGEST)
    sizes = (side // 4, 15 * side // 32)
    content = scenes.scenes(key, count + count // 8, pool, side=side, most=MOST, sizes=sizes)
    centres = (content.boxes[..., 0] + content.boxes[..., 2]) / 2
    centres = torch.where(content.labels < 0, torch.inf, centres).sort(1).values  # (count, most)
    gaps = (centres[:, 1:] - centres[:, :-1]).nan_to_num(torch.inf)
    clear = ((gaps >= side / 16).all(1) & (content.labels >= 0).any(1)).nonzero()[:count, 0]
    texts, images = scenes.captions(content), (255 * content.images[clear]).round().to(torch.uint8)
    if size > side:
        parts = (F.interpolate(part.float(), (size, size), mode="bilinear") for part in images.split(BATCH))
        images = torch.cat([part.round().to(torch.uint8) for part in parts])  # (count, 3, size, size)
    captions_of = tuple((texts[i],) for i in clear.tolist())
    return Pictures(images, captions_of, tuple(f"scene {i + 1}" for i in range(len(clear))))


def open_data(data: str, size: int) -> Data:
    """The pictures of `--data`: "scenes", or files with captions. Raises DataError as `captions.open_captions`."""
    if data == "scenes" and not Path(data).exists():
        keys, pools = random.split(random.key(0)).unbind(0), digits()
        parts = zip(keys, (TRAINING, TESTING), pools, strict=True)
        learn, test = (_of_scenes(key, count, pool, size) for key, count, pool in parts)
        counts = {"train": len(learn.images), "test": len(test.images)}
        apart = f"digits at least {min(size, LARGEST) / 16:g} pixels apart from left to right"
        return Data(learn, test, {"pictures": counts, "scenes": apart, "to test on": "scenes of other digits"}, 0)
    files = captions.open_captions(data)
    learn, bad = _of_files(files.train, size)
    test, also_bad = _of_files(files.test, size)
    files = files._replace(skipped=(*files.skipped, *bad, *also_bad))
    return Data(learn, test, captions.facts(files), len(files.skipped))


def _of_files(part: Sequence[captions.Captioned], size: int) -> tuple[Pictures, list[tuple]]:
    images, numbers, skipped = captions.read_pictures([one.path for one in part], size, whole=True)
    rows = [part[i] for i in numbers.tolist()]
    return Pictures(images, tuple(one.captions for one in rows), tuple(shown(one.path) for one in rows)), skipped


def learn_tokenizer(data: Pictures, kind: str, vocabulary: int) -> SentenceTokenizer:
    texts = (text for several in data.captions for text in several)
    return tokenizers.train_sentences(texts, vocabulary, kind == "words")


def table(data: Pictures, model: Captioner) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """(tokens (captions, time) from the start to the end, filled with `NOTHING`; the picture of each (captions,); those
    that are left out as they are longer than the net's context).

    Raises DataError: all are.
    """
    rows, owners, left_out = [], [], []
    texts = [(i, text) for i, several in enumerate(data.captions) for text in several]
    ids = model.tokenizer.encode_batch([text for _, text in texts])
    for (i, _), own in zip(texts, ids, strict=True):
        if len(own) < model.cfg.context:
            rows.append([model.marks.start, *own, model.marks.end])
            owners.append(i)
        else:
            reason = f"has {len(own)} tokens, expected less than {model.cfg.context}"
            left_out.append((f"a caption of {data.names[i]}", reason))
    if not rows:
        raise DataError(f"{left_out[0][0]} {left_out[0][1]}, as all {len(left_out)}; --longest sets it")
    return padded(rows, NOTHING)[0], torch.tensor(owners), left_out


def facts(data: Data, model: Captioner) -> dict[str, Any]:
    """Names and values to print before the first step, by `train.data.understood`."""
    texts = [text for several in data.test.captions for text in several]
    lost = [t for t, ids in zip(texts, model.tokenizer.encode_batch(texts), strict=True) if UNK in ids]
    unknown = isinstance(model.tokenizer, SentenceTokenizer) and lost
    note = f"{len(lost):,} of {len(texts):,}, such as {lost[0][:60]!r}" if unknown else ""
    return {"vocabulary": model.tokenizer.vocabulary_size, "test captions with unknown words": note, "net": model.cfg}


# Nets.


def scratch(args: Any, tokenizer: SentenceTokenizer, key: Tensor) -> Captioner:
    """A captioner that knows nothing. Raises ValueError: sizes that do not fit each other."""
    cfg = captioner.PRESETS[args.preset]
    sizes = {"image": args.size, "vocabulary": tokenizer.vocabulary_size, "context": args.longest + 1}
    cfg = dataclasses.replace(cfg, **sizes, dropout=args.dropout)
    return Captioner(spec.init(key, captioner.spec(cfg)), cfg, tokenizer, marks_of(tokenizer, cfg))


def marks_of(tokenizer: SentenceTokenizer | BytePairTokenizer, cfg: captioner.Config) -> Marks:
    """Raises ValueError: GPT-2's tokenizer without its end, or one with more tokens than the net."""
    size = tokenizer.vocabulary_size
    if size > cfg.vocabulary:
        raise ValueError(f"the tokenizer has {size} tokens; expected up to the {cfg.vocabulary} of the net")
    unused = tuple(range(size, cfg.vocabulary))
    if isinstance(tokenizer, SentenceTokenizer):
        return Marks(tokenizer.start, tokenizer.end, (PAD, tokenizer.start, UNK, *unused))
    end = tokenizer.token_id(END_OF_TEXT)
    if end is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT}; expected GPT-2's")
    return Marks(end, end, unused, WRITTEN)


def of_weights(source: str) -> Captioner:
    """A ViT-GPT2 of a folder or repository with config.json, the weights and GPT-2's tokenizer.

    Raises ValueError: a file that is missing or does not fit.
    """
    params, cfg = captioner_weights.from_pretrained(source)
    tokenizer = tokenizers.load(weights.locate(weights.beside(source), ("tokenizer.json",)))
    return Captioner(params, cfg, tokenizer, marks_of(tokenizer, cfg))


def of_run(run: SavedRun, device: torch.device | str = "cpu") -> Captioner:
    """The captioner of a run, at its checkpoint."""
    cfg, tokenizer = run.read("net", captioner.Config), tokenizers.load(run.folder / "tokenizer.json")
    params = tree.move(run.restore(captioner.spec(cfg), "params"), device)
    return Captioner(params, cfg, tokenizer, marks_of(tokenizer, cfg))


# Training.


def normalised(images: Tensor) -> Tensor:
    """Bytes as numbers in [-1, 1], as ViT's published weights take them."""
    return images.float() / 127.5 - 1


def optimizer_of(args: Any) -> optimizers.Optimizer:
    """That of the flags, after clipping; Muon is for matrices and convolutions, and AdamW at half its learning rate for
    the rest."""
    rate, half = (
        schedules.warmup_cosine(peak, args.steps // 10, args.steps)
        for peak in (args.learning_rate, args.learning_rate / 2)
    )
    decay = {"weight_decay": args.weight_decay, "mask": lambda name, leaf: leaf.ndim >= 2}

    def hidden(name: str, leaf: Any) -> bool:
        return leaf.ndim in (2, 4) and "tokens" not in name and "positions" not in name

    if args.optimizer == "adamw":
        rule = optimizers.adamw(rate, **decay)
    else:
        dtype = torch.float32 if args.common.device == "cpu" else torch.bfloat16
        options = {"flatten": True, "adjust": "match_rms_adamw", "dtype": dtype}
        rule = optimizers.muon(rate, optimizers.adamw(half, **decay), matrices=hidden, **decay, **options)
    return optimizers.chain(optimizers.clip_by_global_norm(args.clip), rule)


def batch_of(images: Tensor, rows: Tensor, keys: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """(pictures as the net takes them, shifted at random by up to `shift` pixels; tokens)."""
    return normalised(augment.crop(keys, images, shift) if shift else images), rows


def loss(params: Tree, batch: tuple[Tensor, Tensor], keys: Tensor, cfg: captioner.Config, smoothing: float):
    images, rows = batch
    inputs, labels = rows[:, :-1].clamp(min=0), rows[:, 1:]
    logits = captioner.apply(params, (images, inputs), cfg, key=keys, train=True)
    hits = translation.token_accuracy(logits, labels, NOTHING)
    return token_cross_entropy(logits, labels, label_smoothing=smoothing, ignore_id=NOTHING), {"accuracy": hits}


# Captions.


@torch.no_grad()
def write(model: Captioner, images: Tensor, decoder: Decoder = GREEDY) -> list[Caption]:
    """The best caption of each of the images, bytes (count, 3, side, side); with a temperature a sample, that of image
    i with the key `fold_in(seed, i)`."""
    params, cfg, tokenizer, marks = model
    device, out = tree.leaves(params)[0].device, []
    keys = random.fold_in(random.key(decoder.seed), torch.arange(len(images), dtype=torch.int32))
    most = min(cfg.context, marks.longest or cfg.context)
    step = avoiding(captioner.stepper(params, cfg, partial(captioner.step, donate=True)), marks.forbidden)
    options = {"max_length": most, "end": marks.end, "padding": marks.end, "positions_axis": 2}
    for part in batching.evaluation_batches(len(images), BATCH):
        memory = captioner.encode(params, normalised(images[part].to(device)), cfg)
        cache = captioner.start(params, memory, cfg, min(16, most))
        first = torch.full((len(memory),), marks.start, device=device)
        inputs = cache["past"], first, decoder, 1, keys[part].to(device)
        best = search(step, *inputs, shared=cache["shared"], **options)
        for row, score in zip(best.tokens[:, 0].tolist(), best.scores[:, 0].tolist(), strict=True):
            ids = row[: row.index(marks.end)] if marks.end in row else row
            out.append(Caption(" ".join(tokenizer.decode(ids).split()), score, ids))
    return out
