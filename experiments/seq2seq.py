"""Machine translation with recurrent nets and attention: train one, let it translate, see where it looks.

Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and Translate" (arXiv:1409.0473), Luong
et al. 2015 (arXiv:1508.04025). Data, flags and figures are those of translate.py, so that the nets can be compared:

    python experiments/seq2seq.py                                                 a few minutes on 2 CPU cores
    python experiments/seq2seq.py --scores none                                   all that is read in one vector
    python experiments/seq2seq.py --scores general --kind lstm --input-feeding
    python experiments/seq2seq.py --data multi30k --preset small                  29,000 captions, downloaded once
    python experiments/seq2seq.py translate --run runs/seq2seq/NAME "Der dritte Mai ist ein Montag."
    python experiments/seq2seq.py evaluate --run runs/seq2seq/NAME --beam 5
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core import random, spec
from experiments.parts import translation_runs as runs
from experiments.parts import translator as translators
from nets.language import scheduled_sampling, seq2seq
from train import optimizers
from train.data.text.tokenizers import PAD
from train.metrics import translation
from train.optimizers import schedules
from train.run import Common, Count, Natural, Positive, Rate, Share, Shared, begin, command_line, open_run
from train.run.ranks import BY_ROWS
from train.step import make_step, start

RUNS = Path("runs/seq2seq")


@dataclass(frozen=True)
class Args:
    preset: Literal["tiny", "small", "multi30k", "luong"] = "tiny"
    """Sizes of the net, and the defaults of what follows (this help shows those of the preset on its command line)."""
    kind: Literal["gru", "lstm"] = "gru"
    """Cells of encoder and decoder."""
    scores: Literal["none", "bahdanau", "dot", "general"] = "bahdanau"
    """Attention of the decoder to the source: none, Bahdanau's, or Luong's dot or general."""
    input_feeding: bool = False
    """Feed the readout of each step to the next (with Luong's attention)."""
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
    steps: Count = 1000
    """Training steps."""
    tokens: Count = 1000
    """Source tokens per batch, and as many target tokens, at most."""
    micro_batches: Count = 1
    """Parts that a batch is cut into to save memory (gradient accumulation)."""
    shapes: Count = 4
    """Shapes of batches, by length, at most: more of them pad less. With --compile, each is a graph."""
    learning_rate: Positive = 4e-3
    """Peak learning rate of Adam, which falls to 0 as a cosine."""
    warmup: Natural = 100
    """Steps in which the learning rate rises; up to a tenth of all."""
    clip: Positive = 1.0
    """Maximal norm of the gradient."""
    dropout: Rate = 0.0
    """Dropout rate."""
    label_smoothing: Rate = 0.1
    """Probability of each target token that is spread over the vocabulary."""
    teacher_forcing: Share = 1.0
    """Probability, at the end, that the net reads the target's token, not its own; it falls from 1 with the steps."""
    average_checkpoints: Count = 1
    """Checkpoints, of the last three, over which the parameters are averaged at the end."""
    eval_every: Count = 250
    """Steps between evaluations on the validation sentences."""
    # With attention in the recursion the graph holds every step of the target: minutes to compile, for hardly a gain.
    common: Shared = Common(save_every=100, compile=False)


MULTI30K = {"vocabulary": 4000, "steps": 3600, "tokens": 2000, "shapes": 6, "learning_rate": 2e-3, "warmup": 200}
LUONG = {"kind": "lstm", "scores": "general", "input_feeding": True, "vocabulary": 37_000, "shapes": 12}
PRESETS = {
    "small": Args("small", **MULTI30K, dropout=0.3),
    "multi30k": Args("multi30k", **MULTI30K, dropout=0.5),
    "luong": Args("luong", **LUONG, steps=100_000, tokens=5000, learning_rate=1e-3, dropout=0.2),
}


def loss(params, batch, keys, cfg: seq2seq.Config, smoothing: float):
    """Divergence of a batch (source, target), perhaps with a rate of teacher forcing per example."""
    source, target, *rates = batch
    inputs, labels, forced = target[:, :-1], target[:, 1:], None
    dropout_keys, forcing_keys = random.sites(keys, 2).unbind(0)  # each (examples, 2)
    if rates:
        forced = scheduled_sampling.teacher_forcing(forcing_keys, *inputs.shape, *rates)
    logits = seq2seq.apply(params, (source, inputs), cfg, forced=forced, key=dropout_keys, train=True)
    hits = translation.token_accuracy(logits, labels, PAD)
    return translation.smoothed_divergence(logits, labels, smoothing, PAD), {"token_accuracy": hits}


def batch_of(source: Tensor, target: Tensor, at: int, args: Args) -> tuple[Tensor, ...]:
    """The batch of step `at`; the rate of teacher forcing falls from 1 to that of the arguments in equal steps."""
    if args.teacher_forcing == 1:
        return source, target
    return source, target, torch.full((len(source),), 1 - (1 - args.teacher_forcing) * at / args.steps)


def net_of(args: Args, vocabulary: int) -> seq2seq.Config:
    options = {name: getattr(args, name) for name in ("kind", "input_feeding", "dropout")} | {"attention": args.scores}
    options |= {"source_vocabulary": vocabulary, "target_vocabulary": vocabulary}
    return dataclasses.replace(seq2seq.PRESETS[args.preset], **options)


def train(args: Args) -> None:
    free = ("data", "steps", "tokens", "micro_batches", "shapes", "learning_rate", "warmup", "clip", "eval_every")
    run = begin(RUNS, args, free=(*free, "average_checkpoints", "teacher_forcing"), shards=BY_ROWS)
    task = runs.open_task(args, run, RUNS, functools.partial(net_of, args))

    init_key, run_key, order_key = random.split(random.key(args.common.seed), 3).unbind(0)
    model, warmup = seq2seq.spec(task.cfg), min(args.warmup, args.steps // 10)
    rate = schedules.warmup_cosine(args.learning_rate, warmup, args.steps)
    optimizer = optimizers.chain(optimizers.clip_by_global_norm(args.clip), optimizers.adam(rate))
    state = start(run_key.to(run.device), spec.init(init_key.to(run.device), model), model, optimizer)
    state = run.restore(state, task.config(), args.steps, model)
    objective = functools.partial(loss, cfg=task.cfg, smoothing=args.label_smoothing)
    options = {"policy": run.policy, "micro_batches": args.micro_batches, "compile": args.common.compile}
    step = make_step(objective, optimizer, donate=True, distributed=run.distributed, **options)
    runs.learn(run, task, seq2seq, state, step, order_key, functools.partial(batch_of, args=args))


def translate(args: runs.TranslateArgs) -> None:
    """Translate sentences with a run's net."""
    args.check()
    runs.translate(args, translators.load(open_run(args.run, RUNS, args.checkpoint), args.device, net=seq2seq))


def evaluate(args: runs.EvaluateArgs) -> None:
    """BLEU and chrF of a run's translations of a test set."""
    args.check()
    run = open_run(args.run, RUNS, args.checkpoint)
    model = translators.load(run, args.device, net=seq2seq)
    runs.evaluate(args, run, run.read("args", Args), model)


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, PRESETS),
        root=RUNS,
        translate=(runs.TranslateArgs, translate),
        evaluate=(runs.EvaluateArgs, evaluate),
    )
