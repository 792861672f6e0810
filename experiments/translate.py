"""Machine translation with the original Transformer: train it, let it translate, measure BLEU.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762). Without a flag it learns to translate dates, times,
prices and numbers that are written out in German into English, offline:

    python experiments/translate.py                                              a few minutes on 2 CPU cores
    python experiments/translate.py --data multi30k --preset small               29,000 captions, downloaded once
    python experiments/translate.py --data FOLDER --source en --target de        train.en, train.de, val.en, val.de ...
    python experiments/translate.py translate --run runs/translate/NAME "Der dritte Mai ist ein Montag."
    python experiments/translate.py translate --weights Helsinki-NLP/opus-mt-de-en "Der Zug ist pünktlich."
    python experiments/translate.py evaluate --run runs/translate/NAME --beam 5 --data FOLDER
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core import random, spec
from experiments.parts import translation_runs as runs
from experiments.parts import translator as translators
from nets.language import transformer
from train import optimizers
from train.data.text.tokenizers import PAD
from train.metrics import translation
from train.optimizers import schedules
from train.run import Common, Count, Positive, Rate, Shared, begin, command_line, open_run
from train.run.flags import check_source
from train.run.ranks import BY_ROWS
from train.step import make_step, start

RUNS = Path("runs/translate")


@dataclass(frozen=True)
class Args:
    preset: Literal["tiny", "small", "base", "big"] = "tiny"
    """Sizes of the net, and the defaults of what follows (this help shows those of the preset on its command line)."""
    data: str = "dates"
    """"dates" (embedded), "multi30k", "iwslt17" or "wmt14" (downloaded once), a folder, a TSV, or SOURCE,TARGET."""
    source: str = "de"
    """Language to translate from, as files are named after it."""
    target: str = "en"
    """Language to translate into."""
    tokenizer: Literal["bpe", "words"] = "bpe"
    """Byte pairs or whole words, learned from both languages."""
    vocabulary: Count = 1000
    """Size of the vocabulary, at most."""
    steps: Count = 1500
    """Training steps."""
    tokens: Count = 1000
    """Source tokens per batch, and as many target tokens, at most."""
    micro_batches: Count = 1
    """Parts that a batch is cut into to save memory (gradient accumulation)."""
    shapes: Count = 1
    """Shapes of batches, by length, at most: more of them pad less, but the step is compiled for each."""
    factor: Positive = 0.4
    """Factor of the learning rate, factor * width^-0.5 * min(step^-0.5, step * warmup^-1.5)."""
    warmup: Count = 400
    """Steps in which the learning rate rises."""
    dropout: Rate = 0.0
    """Dropout rate."""
    label_smoothing: Rate = 0.1
    """Probability of each target token that is spread over the vocabulary."""
    norm_first: bool = False
    """Norm before each sub-layer instead of after it."""
    average_checkpoints: Count = 3
    """Checkpoints, of the last three, over which the parameters are averaged at the end."""
    eval_every: Count = 250
    """Steps between evaluations on the validation sentences."""
    common: Shared = Common(save_every=100)


# Sections 5.1 to 5.4 of the paper.
PAPER = {"tokens": 25_000, "vocabulary": 37_000, "shapes": 12, "factor": 1.0, "warmup": 4000}
PRESETS = {
    "small": Args("small", steps=3600, tokens=2000, vocabulary=4000, shapes=4, factor=0.7, warmup=800, dropout=0.1),
    "base": Args("base", **PAPER, steps=100_000, dropout=0.1),
    "big": Args("big", **PAPER, steps=300_000, dropout=0.3),
}


@dataclass(frozen=True, kw_only=True)
class TranslateArgs(runs.TranslateArgs):
    run: Path | None = None
    """Folder of a run: runs/translate/NAME."""
    weights: str | None = None
    """Published Marian weights instead: a folder (config.json, weights, source.spm, vocab.json) or a repository."""


def loss(params, batch, keys, cfg: transformer.Config, smoothing: float):
    source, target = batch
    logits, labels = transformer.apply(params, (source, target[:, :-1]), cfg, key=keys, train=True), target[:, 1:]
    hits = translation.token_accuracy(logits, labels, PAD)
    return translation.smoothed_divergence(logits, labels, smoothing, PAD), {"token_accuracy": hits}


def net_of(args: Args, vocabulary: int) -> transformer.Config:
    sizes = {"source_vocabulary": vocabulary, "target_vocabulary": vocabulary}
    choices = {"dropout": args.dropout, "norm_first": args.norm_first}
    return dataclasses.replace(transformer.PRESETS[args.preset], **sizes, **choices)


def train(args: Args) -> None:
    free = ("data", "steps", "tokens", "micro_batches", "shapes", "factor", "warmup", "eval_every")
    run = begin(RUNS, args, free=(*free, "average_checkpoints"), shards=BY_ROWS)
    task = runs.open_task(args, run, RUNS, functools.partial(net_of, args))
    cfg = task.cfg

    init_key, run_key, order_key = random.split(random.key(args.common.seed), 3).unbind(0)
    model, rate = transformer.spec(cfg), schedules.noam(cfg.width, args.warmup, args.factor)
    optimizer = optimizers.adam(rate, 0.9, 0.98, eps=1e-9)  # section 5.3 of the paper
    state = start(run_key.to(run.device), spec.init(init_key.to(run.device), model), model, optimizer)
    state = run.restore(state, task.config(), args.steps, model)
    objective = functools.partial(loss, cfg=cfg, smoothing=args.label_smoothing)
    options = {"policy": run.policy, "micro_batches": args.micro_batches, "compile": args.common.compile}
    step = make_step(objective, optimizer, donate=True, distributed=run.distributed, **options)

    runs.learn(run, task, transformer, state, step, order_key)


def translate(args: TranslateArgs) -> None:
    """Translate sentences with a run's net or with published Marian weights."""
    args.check()
    check_source(args)
    if args.run:
        model = translators.load(open_run(args.run, RUNS, args.checkpoint), args.device)
    else:
        model = translators.published(args.weights, args.device)
    runs.translate(args, model)


def evaluate(args: runs.EvaluateArgs) -> None:
    """BLEU and chrF of a run's translations of a test set."""
    args.check()
    run = open_run(args.run, RUNS, args.checkpoint)
    runs.evaluate(args, run, run.read("args", Args), translators.load(run, args.device))


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, PRESETS),
        root=RUNS,
        translate=(TranslateArgs, translate),
        evaluate=(runs.EvaluateArgs, evaluate),
    )
