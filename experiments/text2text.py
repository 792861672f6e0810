"""T5 on pairs of texts: every task is a text in and a text out, told apart by the prefix of the source.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(arXiv:1910.10683); version 1.1: Shazeer 2020 (arXiv:2002.05202). Without a flag a small one learns, offline, to write
numbers, dates and prices in digits, and back in words. Data, batches and decoding are those of translate.py:

    python experiments/text2text.py                                           over two minutes on a CPU core
    python experiments/text2text.py --data FILE.csv --source article --target summary --metric chrf
    python experiments/text2text.py --weights google-t5/t5-small --data FILE.jsonl --prefix "summarize: " --lora 8
    python experiments/text2text.py predict --run runs/text2text/NAME "digits: May third, nineteen oh five"
    python experiments/text2text.py predict --weights google-t5/t5-small "translate English to German: Good morning."
    python experiments/text2text.py evaluate --run runs/text2text/NAME --beam 4 --data FILE.tsv

Expected: 99.8 % of 500 that it has not seen are right to the letter; none by the nearest training pair.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core import random, tree
from experiments.parts import text_to_text as parts
from experiments.parts import translation_runs as runs
from nets.language import t5
from train.data.fingerprint import fingerprint
from train.data.translation import sets as pair_sets
from train.data.understood import understood
from train.files import write_json
from train.losses import token_cross_entropy
from train.metrics import translation
from train.optimizers import schedules
from train.run import Common, Count, Natural, NonNegative, Positive, Rate, Shared, begin, command_line, open_run
from train.run.flags import check_source
from train.run.ranks import BY_ROWS
from train.run.run import unused
from train.step import make_step, start

RUNS = Path("runs/text2text")
HELD, BLOCK = 10, 8
Preset = Literal["tiny", "v1.1-tiny", "small", "v1.1-small", "base", "v1.1-base"]
Metric = Literal["exact", "bleu", "chrf", "rouge"]


@dataclass(frozen=True)
class Args:
    preset: Preset = "tiny"
    """Sizes of a net from scratch."""
    weights: str | None = None
    """Weights to begin with: a folder or Hugging Face id of a T5 1.0 or 1.1, a run of this script, or of pretrain.py
    with spans. None: from scratch, with unigram pieces of the training texts."""
    data: str = "numbers"
    """"numbers", "docstrings" or "dates" (embedded), a TSV, CSV or JSONL, SOURCE,TARGET, a folder, or what translate.py
    knows."""
    source: str = "source"
    """Column of the sources, or the end of their files' names."""
    target: str = "target"
    """Column of the targets, or the end of their files' names; for BLEU, a language."""
    prefix: str = ""
    """Text before each source, which names the task; "numbers" has its own."""
    metric: Metric = "exact"
    """Figure of the summary; BLEU and chrF are sacrebleu's, ROUGE-L needs the package rouge-score."""
    tokenizer: Literal["bpe", "unigram"] = "bpe"
    """Pieces from scratch: pairs of characters, each digit alone, or unigram pieces as T5's own."""
    vocabulary: Count = 200
    """Size of the vocabulary from scratch, at most; all characters are in it."""
    longest: Count = 32
    """Tokens of a text, at most; longer pairs are left out and counted."""
    lora: Natural = 0
    """Rank of LoRA's adapters, which alone are trained then; 0 trains all weights."""
    alpha: Positive = 16.0
    """Scale of the adapters: alpha / rank."""
    steps: Count = 900
    """Training steps."""
    tokens: Count = 1000
    """Source tokens per batch, and as many target tokens, at most."""
    micro_batches: Count = 1
    """Parts that a batch is cut into to save memory (gradient accumulation)."""
    shapes: Count = 2
    """Shapes of batches, by length, at most: more of them pad less, but the step is compiled for each."""
    learning_rate: Positive = 3e-3
    """Peak learning rate, which falls to 0 as a cosine; less for queries, more for embeddings, by their size."""
    warmup: Natural = 100
    """Steps in which the learning rate rises; up to a tenth of all."""
    weight_decay: NonNegative = 0.01
    """Weight decay of AdamW, on matrices."""
    dropout: Rate = 0.0
    """Dropout rate."""
    label_smoothing: Rate = 0.0
    """Probability of each target token that is spread over the vocabulary."""
    eval_every: Count = 200
    """Steps between evaluations on the validation pairs."""
    # Compiling the step for each shape takes as long as it then saves.
    common: Shared = Common(save_every=200, compile=False)


TEXTS = Args(vocabulary=4000, longest=128, tokens=2000, shapes=4, steps=2000, learning_rate=2e-3, dropout=0.1)
PUBLISHED = dataclasses.replace(TEXTS, longest=512, tokens=4000, learning_rate=3e-4)


def presets(words: dict[str, str]) -> Args:
    return PUBLISHED if "weights" in words else TEXTS if words.get("data", "numbers") != "numbers" else Args()


@dataclass(frozen=True, kw_only=True)
class Source:
    run: Path | None = None
    """Folder of a run: runs/text2text/NAME."""
    weights: str | None = None
    """A folder or Hugging Face id of a T5 instead."""
    longest: Count = 512
    """Tokens of a text with published weights, at most; a run has its own."""
    prefix: str | None = None
    """Text before each source; the run's if None."""


@dataclass(frozen=True, kw_only=True)
class PredictArgs(Source, runs.TranslateArgs):
    sentences: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to answer; without any, the lines of --file or of standard input."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write to, an answer per line; standard output if None."""
    n_best: Count = 1
    """Answers per text, with their scores; up to the number of beams."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(Source, runs.EvaluateArgs):
    data: str | None = None
    """Pairs to evaluate on: all of a TSV, CSV or JSONL, or the test set of a folder; the run's own data if None."""
    source: str | None = None
    """Column of the sources; the run's if None."""
    target: str | None = None
    """Column of the targets; the run's if None."""
    metric: Metric | None = None
    """Figure of the summary; the run's, or exact, if None."""
    out: Path | None = None
    """New folder for result.json and mistakes.txt; evaluations/DATA in the run's, numbered if it exists, if None."""


def loss(params, batch, keys, cfg: t5.Config, whole, smoothing: float):
    source, target = batch
    inputs, labels = target[:, :-1], target[:, 1:]
    logits = t5.apply(whole(params), (source, inputs), cfg, key=keys, train=True)
    hits = translation.token_accuracy(logits, labels, cfg.padding_id)
    return token_cross_entropy(logits, labels, label_smoothing=smoothing, ignore_id=cfg.padding_id), {"accuracy": hits}


def net_of(args: Args, vocabulary: int) -> t5.Config:
    name = args.preset.replace("v1.1-tiny", "tiny")
    version = t5.V1_1 if args.preset == "v1.1-tiny" else {}
    return dataclasses.replace(t5.PRESETS[name], vocabulary=vocabulary, dropout=args.dropout, **version)


def open_data(args: Args) -> pair_sets.ParallelSet:
    """The pairs of the arguments, in memory, each source after the prefix."""
    data = pair_sets.open_pairs(args.data, args.source, args.target, every=HELD, block=BLOCK)
    tests = {name: parts.prefixed(pairs, args.prefix) for name, pairs in data.tests.items()}
    train, validation = (parts.prefixed(pairs, args.prefix) for pairs in (data.train, data.validation))
    return data._replace(train=train, validation=validation, tests=tests)


def train(args: Args) -> None:
    free = ("data", "metric", "steps", "tokens", "micro_batches", "shapes", "learning_rate", "warmup", "weight_decay")
    run = begin(RUNS, args, free=(*free, "eval_every"), shards=BY_ROWS)
    parts.check_metric(args.metric)
    if args.lora and not args.weights:
        raise ValueError("--lora adapts weights that have learned something; name them with --weights")
    net_key, lora_key, run_key, order_key = random.split(random.key(args.common.seed), 4).unbind(0)
    data = open_data(args)
    if args.weights:
        net = parts.of_weights(args.weights)
    else:
        texts = itertools.chain.from_iterable(data.train)
        net = parts.scratch(functools.partial(net_of, args), texts, args.tokenizer, args.vocabulary, net_key)
    cfg = dataclasses.replace(net.cfg, dropout=args.dropout)
    net = net._replace(cfg=cfg, params=tree.move(net.params, run.device))
    base = fingerprint(net.params) if args.weights else None
    own, model = parts.trainable(net, args.lora, args.alpha, lora_key), parts.translator(net, args.longest)
    task, facts = runs.task_of(args, RUNS, data, model)
    task = task._replace(model=lambda params: model._replace(params=own.merged(params)))
    understood(print, facts | {"languages": None} | parts.facts(net, task.data.test_sets[task.test], args.metric))

    rate = schedules.warmup_cosine(args.learning_rate, min(args.warmup, args.steps // 10), args.steps)
    optimizer = parts.adamw(rate, args.weight_decay, cfg)
    state = start(run_key.to(run.device), tree.move(own.values, run.device), own.model, optimizer)
    state = run.restore(state, task.config() | {"kind": "t5", "weights": base}, args.steps, own.model)
    objective = functools.partial(loss, cfg=cfg, whole=own.whole, smoothing=args.label_smoothing)
    options = {"policy": run.policy, "micro_batches": args.micro_batches, "compile": args.common.compile}
    step = make_step(objective, optimizer, donate=True, distributed=run.distributed, **options)

    def ending(params: tree.Tree) -> None:
        if args.lora:
            parts.write_adapters(run.folder, net, args, params)
        pairs = itertools.islice(task.data.train, 50_000)
        study = functools.partial(parts.study, metric=args.metric, language=args.target, train=pairs, folder=run.folder)
        runs.report(run, task, task.model(params), study, parts.summary(args.metric))

    runs.learn(run, task, t5, state, step, order_key, ending=ending)


def opened(args: PredictArgs | EvaluateArgs) -> tuple[parts.Translator, Args]:
    """(The net that writes, the arguments of its run, or those of published weights)."""
    args.check()
    check_source(args)
    device = command_line.device(args.device)
    if args.run:
        run = open_run(args.run, RUNS, args.checkpoint)
        return parts.of_run(run, device), run.read("args", Args)
    net = parts.of_weights(args.weights)
    return parts.translator(net._replace(params=tree.move(net.params, device)), args.longest), PUBLISHED


def predict(args: PredictArgs) -> None:
    """Write the answer to each text."""
    model, trained = opened(args)
    runs.translate(args, model, trained.prefix if args.prefix is None else args.prefix)


def evaluate(args: EvaluateArgs) -> None:
    """Exact matches, BLEU and chrF of what a net writes, beside answers without a net."""
    parts.check_metric(args.metric)
    model, trained = opened(args)
    if args.run is None and args.data is None:
        raise ValueError("published weights have no data of their own; name pairs with --data")
    names = ("data", "source", "target", "metric", "prefix")
    own = {name: value for name in names if (value := getattr(args, name)) is not None}
    trained = dataclasses.replace(trained, **own)
    if args.data is None:
        tests = open_data(trained).test_sets
    else:
        tests = pair_sets.open_tests(args.data, trained.source, trained.target)
        tests = {name: parts.prefixed(pairs, trained.prefix) for name, pairs in tests.items()}
    name, tests, facts = runs.test_of(args, tests, trained.data, model)
    understood(print, facts)
    folder = args.out or (args.run and args.run / "evaluations" / Path(args.data or name).resolve().name)
    if folder:
        folder = unused(args.out, folder)
        folder.mkdir(parents=True)
    options = {"metric": trained.metric, "language": trained.target, "folder": folder}
    figures, _ = parts.study(model, tests, args, **options)
    if folder:
        write_json(folder / "result.json", figures)
    print(parts.summary(trained.metric, nearest=False).format(**figures, test=name))
    print(f"files in {folder}/" if folder else "no files: name a folder with --out")


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, presets),
        root=RUNS,
        predict=(PredictArgs, predict),
        evaluate=(EvaluateArgs, evaluate),
    )
