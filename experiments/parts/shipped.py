"""The nets of runs as functions with named inputs, ready to leave Python: real inputs of their data, and which axes may
change."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import tree
from core.tree import Tree
from experiments.parts import (
    classifier,
    detector,
    embedder,
    encoder,
    language_model,
    segmentation_task,
    segmenter,
    translator,
    upscaler,
)
from nets.language import transformer
from nets.superresolution import by_name
from train.data.images import originals, resize
from train.data.images import sets as image_sets
from train.data.images.augment import unit
from train.data.images.files import Decoder
from train.data.text import text, tokenizers
from train.data.translation import sets as pair_sets
from train.run import SavedRun, checkpoints, open_run
from train.ship import Axis

HELD, BLOCK = 10, 8
"""As in embed.py: one in ten blocks of eight pairs is held out."""
CALIBRATION = 32
"""Examples that static quantisation sees; they are not among those that are compared."""
PIXELS = 64
"""Pixels per side of the tiles that super-resolution is exported for, at most."""


class Subject(NamedTuple):
    """A function to ship.

    apply: `apply(params, **inputs)`.
    inputs: real examples, batch leading; to compare with.
    ranges: as in `train.ship.export`.
    classes: axis of the classes in its one output; None if the outputs are no logits.
    static: whether activations are quantised by calibration, as suits convolutions.
    kind: what the net does, for a line.
    calibration: other examples, for static quantisation.
    """

    apply: Callable[..., Tree]
    params: Tree
    inputs: dict[str, Tensor]
    ranges: dict[str, dict[int, Axis]]
    classes: int | None
    static: bool
    kind: str
    calibration: dict[str, Tensor] = {}

    def some(self, count: int, first: int = 0) -> dict[str, Tensor]:
        """Inputs of `count` examples, repeated if there are fewer."""
        number = len(next(iter(self.inputs.values())))
        rows = torch.arange(first, first + count) % number
        return {name: value[rows] for name, value in self.inputs.items()}

    def calibrating(self) -> Iterator[dict[str, Tensor]]:
        """Batches for static quantisation."""
        for first in range(len(next(iter(self.calibration.values())))):
            yield self._replace(inputs=self.calibration).some(self.fewest, first)

    @property
    def fewest(self) -> int:
        """Examples that a package takes at once, at least."""
        return max(axis.low for axes in self.ranges.values() for axis in axes.values() if axis.name == "batch")


Sizes = tuple[int, int]


def subject(folder: Path, checkpoint: str, batch: Sizes, count: int) -> Subject:
    """The net of a run, with up to `count` examples of its test data, and others to calibrate with.

    Args:
        batch: the sizes that the package will take, from and to.

    Raises ValueError: no run, or one of a script whose nets are not shipped here.
    """
    saved = folder / "checkpoints"
    if not saved.is_dir():
        raise ValueError(f"'{folder}' is not the folder of a run; expected one of {', '.join(KINDS)}")
    name = checkpoints.read_config(saved).get("experiment")
    if name not in KINDS:
        raise ValueError(f"'{folder}' is a run of {name}.py; expected one of {', '.join(KINDS)}")
    run = open_run(folder, Path("runs") / name, checkpoint)
    whole = KINDS[name](run, Axis("batch", *batch), count + CALIBRATION)
    number = len(next(iter(whole.inputs.values())))
    compared = max(1, number - min(CALIBRATION, number // 2))
    inputs, calibration = (
        {name: value[rows] for name, value in whole.inputs.items()} for rows in (slice(compared), slice(compared, None))
    )
    return whole._replace(inputs=inputs, calibration=calibration)


def _classify(run: SavedRun, batch: Axis, count: int) -> Subject:
    trained, values = classifier.load(run.folder, str(run.step))
    data = image_sets.open_images(run.config["args"]["data"], "split", classes=trained.classes)
    data = image_sets.resized(data, trained.size)
    indices = torch.arange(min(count, len(data.test.labels)))
    with Decoder(0) as decoder:
        pixels = unit(image_sets.some(data.test, indices, trained.size, trained.resize, decoder))
    return of_classifier(trained, values, pixels, batch)


def of_classifier(trained: classifier.Trained, values: Tree, pixels: Tensor, batch: Axis) -> Subject:
    """A classifier of pictures (images, channels, size, size) in [0, 1]."""
    net, cfg = classifier.net_of(trained)

    def apply(params: Tree, pixels: Tensor) -> Tensor:
        return net.apply(params, classifier.normalised(pixels, trained), cfg)

    kind = f"{trained.net} of {len(trained.classes)} classes"
    return Subject(apply, values, {"pixels": pixels}, {"pixels": {0: batch}}, 1, True, kind)


def _gpt(run: SavedRun, batch: Axis, count: int) -> Subject:
    net, cfg = language_model.net_of_run(run)
    params, args = run.restore(net.spec(cfg), "params"), run.config["args"]
    path, tokenizer = args["text"] and Path(args["text"]), tokenizers.load(run.folder / "tokenizer.json")
    data = text.open_text(path, tokenizer, Path("runs/gpt/tokens"))
    held = text.split(data.tokens, blocks=args["blocks"], least=4 * cfg.context)[1]
    windows, _ = next(text.windows(held, cfg.context, count))  # (up to count, context)
    ranges = {"tokens": {0: batch, 1: Axis("time", 1, cfg.context)}}

    def apply(params: Tree, tokens: Tensor) -> Tensor:
        return net.apply(params, tokens, cfg)

    return Subject(apply, params, {"tokens": windows}, ranges, -1, False, "language model")


def _translate(run: SavedRun, batch: Axis, count: int) -> Subject:
    params, cfg, tokenizer, marks = model = translator.load(run, "cpu")
    args = run.config["args"]
    pairs = next(iter(pair_sets.open_pairs(args["data"], args["source"], args["target"]).test_sets.values()))
    sides = []
    for i, before in ((0, []), (1, [marks.start])):
        rows = [[*before, *tokenizer.encode(pair[i]), *([] if i else [marks.end])] for pair in pairs[:count]]
        sides.append(_padded([row[: model.context] for row in rows], cfg.padding_id))
    ranges = {"source": {0: batch, 1: Axis("source_time", 1, model.context)}}
    ranges["target"] = {0: batch, 1: Axis("target_time", 1, model.context)}

    def apply(params: Tree, source: Tensor, target: Tensor) -> Tensor:
        return transformer.apply(params, (source, target), cfg)

    inputs = dict(zip(("source", "target"), sides, strict=True))
    return Subject(apply, params, inputs, ranges, -1, False, "translator")


def _padded(rows: list[list[int]], padding: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])


def _superres(run: SavedRun, batch: Axis, count: int) -> Subject:
    args = run.config["args"]
    net = by_name.PRESETS[args["net"]]
    cfg, scale = run.read("net", net.Config), args["scale"][0]
    values = run.learned(net.spec(cfg), "generator" if args["net"].startswith("srgan") else "", averaged=False)
    pictures = originals.open_originals(args["test"], 3, upscaler.least_size((scale,))).pictures
    side, parts = min(PIXELS, *(n // scale for picture in pictures for n in picture.shape[1:])), []
    for picture in pictures:
        x = resize.ycbcr(unit(picture)[None])[:, :1] if cfg.channels == 1 else unit(picture)[None]
        small = resize.lowered(resize.cropped(x, scale), scale)
        cuts = small.unfold(2, side, side).unfold(3, side, side)  # (1, channels, rows, columns, side, side)
        parts.append(cuts.flatten(2, 3).transpose(1, 2)[0])  # (tiles, channels, side, side)

    def apply(params: Tree, pixels: Tensor) -> Tensor:
        bicubic = resize.enlarged(pixels, scale)
        return by_name.enlarge(net, params, cfg, pixels, bicubic, scale, residual=args["residual"])

    pixels = torch.cat(parts)[:count].contiguous()
    kind = f"{args['net']}, {scale} times, tiles of {side}"
    return Subject(apply, values, {"pixels": pixels}, {"pixels": {0: batch}}, None, True, kind)


def _segment(run: SavedRun, batch: Axis, count: int) -> Subject:
    model, args = segmenter.load(run, torch.device("cpu")), run.config["args"]
    values, members = model.values, model.trained.members
    if members > 1:
        values = tree.map(lambda leaf: leaf[0], values)
    side = getattr(model.cfg, "image", None) or args["size"]
    images = segmentation_task.source_of(SimpleNamespace(**args)).data.test.images[:count]
    whole = [F.interpolate(unit(x)[None], (side, side), mode="bilinear", align_corners=False) for x in images]
    return Subject(
        lambda params, pixels: model.net.apply(params, segmenter.normalised(pixels, model.trained), model.cfg),
        values,
        {"pixels": torch.cat(whole)},
        {"pixels": {0: batch}},
        1,
        True,
        f"{model.trained.net}, {side} x {side}" + (f", the first of {members} members" if members > 1 else ""),
    )


def _detect(run: SavedRun, batch: Axis, count: int) -> Subject:
    model, args = detector.load(run), run.config["args"]
    data = detector.open_data(args["data"], model.size, model.classes)
    pixels = unit(data.test.images[:count])

    def apply(params: Tree, pixels: Tensor) -> Tree:
        return model.module.apply(params, detector.normalised(pixels), model.cfg)

    kind = f"{model.net} of {len(model.classes)} classes"
    return Subject(apply, model.params, {"pixels": pixels}, {"pixels": {0: batch}}, None, True, kind)


def _embed(run: SavedRun, batch: Axis, count: int) -> Subject:
    model, args = embedder.load(run), run.config["args"]
    data = pair_sets.open_pairs(args["data"], args["source"], args["target"], every=HELD, block=BLOCK)
    pairs = next(iter(data.test_sets.values()))
    tokens, lengths = encoder.tokens_of(model.encoder, [first for first, _ in pairs[:count]], model.longest)

    def apply(params: Tree, tokens: Tensor, lengths: Tensor) -> Tensor:
        return embedder.vectors(params, tokens, lengths, model.encoder)

    ranges = {"lengths": {0: batch}, "tokens": {0: batch, 1: Axis("time", 1, model.longest)}}
    inputs = {"lengths": lengths, "tokens": tokens}
    return Subject(apply, tree.sort(model.encoder.params), inputs, ranges, None, False, "sentence embeddings")


KINDS: dict[str, Callable[[SavedRun, Axis, int], Subject]] = {
    "classify": _classify,
    "gpt": _gpt,
    "translate": _translate,
    "superres": _superres,
    "segment": _segment,
    "detect": _detect,
    "embed": _embed,
}
"""Scripts whose runs can be shipped."""
