"""Captions: a ViT reads a picture, a causal transformer writes about it and attends to its patches.

Vinyals et al. 2015, "Show and Tell" (arXiv:1411.4555); Dosovitskiy et al. 2021 (arXiv:2010.11929). Without a flag it
learns generated scenes of scikit-learn's digits, offline:

    python experiments/caption.py                                          five minutes of one CPU core
    python experiments/caption.py --data FOLDER                            pictures and captions.tsv, or COCO's JSON
    python experiments/caption.py --data FOLDER --weights FOLDER           a ViT-GPT2
    python experiments/caption.py predict --run runs/caption/NAME 1.jpg --maps
    python experiments/caption.py evaluate --run runs/caption/NAME --beam 4
    python experiments/caption.py evaluate --run runs/caption/NAME --data OTHER

BLEU is sacrebleu's; CIDEr is left out, as no library at hand has it. Expected: 94.8 % of 500 captions word for word, of
scenes of digits that it has not seen; the caption of the nearest picture in pixels is right for 3.2 %.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from core import random, tree
from experiments.parts import caption_figures as figures
from experiments.parts import captioner as parts
from experiments.parts.translator import Decoder
from nets.multimodal import captioner
from train import plots
from train.data import batching
from train.data.fingerprint import fingerprint
from train.data.images import folders
from train.data.understood import understood
from train.files import write_json
from train.metrics import translation
from train.run import Common, Count, Natural, NonNegative, Positive, Rate, Shared, begin, command_line, open_run
from train.run.flags import check_source
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS
from train.run.run import unused
from train.step import make_step, start

RUNS = Path("runs/caption")
FREE = ("data", "steps", "batch", "learning_rate", "weight_decay", "clip", "label_smoothing", "shift", "eval_every")


@dataclass(frozen=True)
class Args:
    data: str = "scenes"
    """"scenes", generated; a folder of pictures with captions.tsv (.csv, .jsonl), such a table, or COCO's JSON: FILE,
    or TRAIN,TEST. The defaults of what follows fit it."""
    weights: str | None = None
    """Weights to begin with: a folder or Hugging Face id of a ViT-GPT2; they have sizes and tokenizer of their own."""
    preset: Literal["tiny", "small", "vit-gpt2"] = "tiny"
    """Sizes of a net from scratch."""
    size: Count = 64
    """Pixels per side of a picture, as a net from scratch sees it."""
    tokenizer: Literal["words", "bpe"] = "words"
    """Tokens from scratch: the words of the training captions, or pairs of characters."""
    vocabulary: Count = 200
    """Size of the vocabulary from scratch, at most; rarer words are never written."""
    longest: Count = 20
    """Tokens of a caption with its end, at most, from scratch; longer ones are left out and counted."""
    language: str = "en"
    """Language of the captions, by which BLEU divides them into words: en, zh, ja ..."""
    shift: Natural = 3
    """Largest random shift of pictures, in pixels."""
    dropout: Rate = 0.0
    """Dropout rate."""
    label_smoothing: Rate = 0.0
    """Probability of each word that is spread over the vocabulary."""
    steps: Count = 1500
    """Training steps; the learning rate rises over a tenth of them, and then falls to 0."""
    batch: Count = 32
    """Captions per step."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """AdamW, or Muon for the hidden matrices and convolutions, which learns captions from scratch far sooner."""
    learning_rate: Positive = 4e-3
    """Peak learning rate; beside Muon, AdamW has half of it."""
    weight_decay: NonNegative = 0.05
    """Weight decay, not on biases and norms."""
    clip: Positive = 1.0
    """Norm that gradients are clipped to."""
    eval_every: Count = 300
    """Steps between evaluations on the first pictures to test on."""
    # Compiling the step takes as long as it then saves.
    common: Shared = Common(compile=False)


PICTURES = Args(
    preset="small",
    size=128,
    tokenizer="bpe",
    vocabulary=8000,
    longest=40,
    shift=8,
    dropout=0.1,
    steps=2000,
    learning_rate=1e-3,
    eval_every=500,
    common=Common(),
)
PUBLISHED = dataclasses.replace(
    PICTURES, optimizer="adamw", learning_rate=5e-5, weight_decay=0.01, batch=16, steps=2000
)


def presets(words: dict[str, str]) -> Args:
    args = PUBLISHED if "weights" in words else PICTURES if words.get("data", "scenes") != "scenes" else Args()
    return dataclasses.replace(args, data=words.get("data", "scenes"))


@dataclass(frozen=True, kw_only=True)
class Source(Decoder):
    run: Path | None = None
    """Folder of a run: runs/caption/NAME."""
    weights: str | None = None
    """A folder or Hugging Face id of a ViT-GPT2 instead."""
    checkpoint: str = "latest"
    """Checkpoint of the run: latest or a step."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    out: Path | None = None
    """New folder for what is written, numbered if it exists if None."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(Source):
    data: str | None = None
    """Pictures with captions, all of whose test part is used; the run's own if None."""
    language: str | None = None
    """Language of the captions; the run's, or en, if None."""


@dataclass(frozen=True, kw_only=True)
class PredictArgs(Source):
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, folders of them, a .txt file of names, or - for names on standard input."""
    maps: bool = False
    """Draw where each word looks, a file per picture."""


def train(args: Args) -> None:
    run = begin(RUNS, args, free=FREE, shards=BY_ROWS)
    net_key, run_key, order_key, shift_key = random.split(random.key(args.common.seed), 4).unbind(0)
    net = parts.of_weights(args.weights) if args.weights else None
    data = parts.open_data(args.data, net.cfg.image if net else args.size)
    if net:
        net = net._replace(cfg=dataclasses.replace(net.cfg, dropout=args.dropout))
    else:
        net = parts.scratch(args, parts.learn_tokenizer(data.train, args.tokenizer, args.vocabulary), net_key)
    rows, owners, left_out = parts.table(data.train, net)
    understood(print, {"data": args.data, **data.facts, "left out": left_out, **parts.facts(data, net)})
    if args.batch > len(rows):
        raise ValueError(f"--batch is {args.batch}, but there are {len(rows)} captions to learn from")
    model = captioner.spec(net.cfg)
    optimizer = parts.optimizer_of(args)
    state = start(run_key.to(run.device), tree.move(net.params, run.device), model, optimizer)
    content = fingerprint(data.train.images, data.train.captions)
    base = fingerprint(net.params) if args.weights else None
    state = run.restore(state, {"net": net.cfg, "data": content, "weights": base}, args.steps, model)
    loss = functools.partial(parts.loss, cfg=net.cfg, smoothing=args.label_smoothing)
    options = {"policy": run.policy, "distributed": run.distributed, "compile": args.common.compile}
    step = make_step(loss, optimizer, donate=True, **options)

    def batch_at(t: int) -> tuple[torch.Tensor, torch.Tensor]:
        some = batching.epoch_batch(order_key, t, len(rows), args.batch)
        keys = random.sites(random.fold_in(shift_key, t), args.batch)
        return parts.batch_of(data.train.images[owners[some]], rows[some], keys, args.shift)

    with run.open({}, files={"tokenizer.json": net.tokenizer.save}):
        run.log.print(f"{tree.count(model):,} parameters; run in {run.folder}")
        for at, batch in run.steps(batch_at(t) for t in run.remaining):
            state, metrics = step(state, tree.move(batch, run.device))
            run.record(at, metrics, args.batch)
            if at % args.eval_every == 0 and at < args.steps:
                some = data.test.captions[:100]
                texts = parts.write(net._replace(params=run.whole(state.params)), data.test.images[: len(some)])
                values = translation.caption_scores([one.text for one in texts], some, args.language)
                run.log.metrics(at, {"test/exact_match": values["exact_match"], "test/bleu": values["bleu"]})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        values = figures.study(run.folder, net._replace(params=run.whole(state.params)), data, args.language)
        run.result({**values, "parameters": tree.count(model), "skipped": data.skipped + len(left_out)})
    lines = read_curves(run.folder, "train/loss", "train/accuracy", "test/exact_match")
    with plots.panels(run.folder / "curves.png", 1, 2) as (left, right):
        plots.curves(left, {"train": lines.pop("train/loss")}, ylabel="nats per word", title="Cross-entropy")
        names = {"train/accuracy": "words, given those before", "test/exact_match": "whole captions, unseen"}
        plots.curves(right, {names[n]: line for n, line in lines.items()}, ylabel="fraction", title="Right")
    print(f"{figures.SUMMARY.format(**values)}\nafter {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def opened(args: PredictArgs | EvaluateArgs) -> tuple[parts.Captioner, Args]:
    """(The captioner, the arguments of its run, or those of published weights)."""
    args.check()
    check_source(args)
    device = command_line.device(args.device)
    if args.run:
        run = open_run(args.run, RUNS, args.checkpoint)
        return parts.of_run(run, device), run.read("args", Args)
    net = parts.of_weights(args.weights)
    return net._replace(params=tree.move(net.params, device)), Args()


def evaluate(args: EvaluateArgs) -> None:
    """Captions word for word and BLEU, on the test part of a run or on other pictures with captions."""
    net, trained = opened(args)
    if args.run is None and args.data is None:
        raise ValueError("published weights have no data of their own; name pictures with --data")
    data = parts.open_data(args.data or trained.data, net.cfg.image)
    way = f"{args.beam} beams" if args.temperature is None else f"samples at temperature {args.temperature}"
    understood(print, {"data": args.data or trained.data, **data.facts, "captions by": way, **parts.facts(data, net)})
    name = Path(args.data or "test").resolve().name
    folder = unused(args.out, args.run / "evaluations" / name if args.run else Path("evaluations") / name)
    folder.mkdir(parents=True)
    values = figures.study(folder, net, data, args.language or trained.language, args)
    write_json(folder / "result.json", {**values, "skipped": data.skipped})
    print(f"{figures.SUMMARY.format(**values)}\nfiles in {folder}/")


def predict(args: PredictArgs) -> None:
    """Captions of pictures: on the screen, as JSON and CSV, and below the pictures."""
    net, _ = opened(args)
    paths, skipped = folders.picture_paths(args.images)
    folder = unused(args.out, Path("captions"))
    count, bad = figures.write_predictions(folder, net, paths, args, args.maps)
    understood(print, {"pictures": count, "skipped": [*skipped, *bad]})
    print(f"files in {folder}/")


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, presets),
        root=RUNS,
        predict=(PredictArgs, predict),
        evaluate=(EvaluateArgs, evaluate),
    )
