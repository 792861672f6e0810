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
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from core import random, spec, tree
from experiments.parts import translator as translators
from experiments.parts.translator import DECODED, SUMMARY, Decoder, Translator, draw_attention, translations
from nets.language import transformer
from train import optimizers, plots
from train.data.fingerprint import fingerprint
from train.data.text import tokenizers
from train.data.text.tokenizers import PAD
from train.data.translation import buckets, corpus
from train.data.translation import files as pair_files
from train.data.translation import sets as pair_sets
from train.data.translation.files import Pair
from train.data.understood import understood
from train.files import replacing
from train.losses import cross_entropy
from train.metrics import translation
from train.optimizers import schedules
from train.run import Common, Count, FromRun, Positive, Rate, Run, Shared, begin, command_line, open_run
from train.run.flags import check_source
from train.run.logs import read_curves
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
class TranslateArgs(Decoder, FromRun):
    run: Path | None = None
    """Folder of a run: runs/translate/NAME."""
    weights: str | None = None
    """Published Marian weights instead: a folder (config.json, weights, source.spm, vocab.json) or a repository."""
    sentences: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Sentences to translate; without any, the lines of --file or of standard input."""
    file: Path | None = None
    """File with a sentence per line (.gz too)."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write to, a translation per line; standard output if None."""
    n_best: Count = 1
    """Translations per sentence, with their scores; up to the number of beams."""
    attention: Path | None = None
    """Folder for pictures of the attention of all heads to the first sentence: encoder, decoder and cross."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(Decoder, FromRun):
    data: str | None = None
    """Pairs to evaluate on, in the run's languages: all of a TSV, PREFIX or SOURCE,TARGET, or the test set of a folder;
    the run's own data if None."""
    test: str | None = None
    """Test set of the data; the first if None."""


def loss(params, batch, keys, cfg: transformer.Config, smoothing: float):
    source, target = batch
    logits, labels = transformer.apply(params, (source, target[:, :-1]), cfg, key=keys, train=True), target[:, 1:]
    hits = translation.token_accuracy(logits, labels, PAD)
    return translation.smoothed_divergence(logits, labels, smoothing, PAD), {"token_accuracy": hits}


@torch.no_grad()
def validate(params, cfg: transformer.Config, pairs: corpus.Corpus) -> dict[str, float]:
    """Cross-entropy in nats per token, and the fraction of tokens that are right, given those before."""
    device, total, right, count = tree.leaves(params)[0].device, 0.0, 0, 0
    for _, *batch in buckets.evaluation_batches(pairs, DECODED, cfg.context):
        source, target = tree.move(tuple(batch), device)
        logits, labels = transformer.apply(params, (source, target[:, :-1]), cfg), target[:, 1:]
        total += float(cross_entropy(logits, labels, ignore_id=PAD, reduction="sum"))
        right += int((logits.argmax(-1) == labels)[labels != PAD].sum())
        count += int((labels != PAD).sum())
    return {"loss": total / count, "token_accuracy": right / count}


def tokenizer_of(args: Args, data: pair_sets.ParallelSet, folder: Path | None) -> tokenizers.SentenceTokenizer:
    """The tokenizer of a resumed run, or a new one of the training sentences."""
    if folder:
        return tokenizers.load(folder / "tokenizer.json")
    texts = (text for pair in data.train for text in pair)
    return tokenizers.train_sentences(texts, args.vocabulary, args.tokenizer == "words")


def net_of(args: Args, vocabulary: int) -> transformer.Config:
    sizes = {"source_vocabulary": vocabulary, "target_vocabulary": vocabulary}
    choices = {"dropout": args.dropout, "norm_first": args.norm_first}
    return dataclasses.replace(transformer.PRESETS[args.preset], **sizes, **choices)


def train(args: Args) -> None:
    free = ("data", "steps", "tokens", "micro_batches", "shapes", "factor", "warmup", "eval_every")
    run = begin(RUNS, args, free=(*free, "average_checkpoints"))
    data = pair_sets.open_pairs(args.data, args.source, args.target)
    tokenizer = tokenizer_of(args, data, run.resumed_from)
    cfg = net_of(args, tokenizer.vocabulary_size)
    parts, left_out = pair_sets.fit({"validation": data.validation, **data.tests}, tokenizer, cfg.context)
    data = data._replace(validation=parts.pop("validation"), tests=parts)
    cache = None if args.data == "dates" else RUNS / "corpora"
    pairs = corpus.open_corpus(data.train, tokenizer, cache, longest=cfg.context)
    validation = corpus.open_corpus(data.validation, tokenizer)
    shapes = buckets.make_buckets(pairs, args.tokens, cfg.context, args.shapes)
    test = next(iter(data.test_sets))
    copied = translators.copy_baseline(data.test_sets[test], args.target)
    facts = pair_sets.facts(data, pairs, left_out=left_out) | copied
    understood(print, facts | {"vocabulary": tokenizer.vocabulary_size, "net": cfg})

    init_key, run_key, order_key = random.split(random.key(args.common.seed), 3).unbind(0)
    model, rate = transformer.spec(cfg), schedules.noam(cfg.width, args.warmup, args.factor)
    optimizer = optimizers.adam(rate, 0.9, 0.98, eps=1e-9)  # section 5.3 of the paper
    state = start(run_key.to(run.device), spec.init(init_key.to(run.device), model), model, optimizer)
    state = run.restore(state, {"net": cfg, "data": fingerprint(pairs, validation)}, args.steps)
    objective = functools.partial(loss, cfg=cfg, smoothing=args.label_smoothing)
    options = {"policy": run.policy, "micro_batches": args.micro_batches, "compile": args.common.compile}
    step = make_step(objective, optimizer, donate=True, **options)

    with run.open({}, unit="tokens", files={"tokenizer.json": tokenizer.save}):
        run.log.print(f"{tree.count(model):,} parameters; run in {run.folder}\n{shapes}")
        batches = (buckets.batch_at(pairs, shapes, order_key, at, args.micro_batches) for at in run.remaining)
        for at, batch in run.steps(batches):
            state, metrics = step(state, tree.move(batch, run.device))
            run.record(at, metrics, int((batch[1] != PAD).sum()))
            if run.due(at, args.eval_every):
                run.log.metrics(at, {f"validation/{k}": v for k, v in validate(state.params, cfg, validation).items()})
                translators.write_samples(run, Translator(state.params, cfg, tokenizer), data.validation[:4])
            if run.due(at, args.common.save_every):
                run.save(at, state)
        run.wait()
        report(run, test, data.test_sets[test], len(shapes.buckets))


def report(run: Run, name: str, pairs: list[Pair], shapes: int) -> None:
    """The figures of the test sentences, the curves, the attention to the first of them."""
    model = translators.load(open_run(run.folder, RUNS), run.args.common.device, run.args.average_checkpoints)
    figures, best = translators.evaluate(model, pairs, run.args.target)
    figures |= {"test": name, "sentences": len(pairs)}
    run.result({**figures, "parameters": tree.count(model.params), "shapes": shapes})
    lines, title = read_curves(run.folder, "train/loss", "validation/loss"), "Divergence and validation cross-entropy"
    plots.curves(run.folder / "loss.png", lines, ylabel="nats per token", title=title)
    draw_attention(run.folder / "attention", model, pairs[0][0], best[0].ids)
    print("".join(f"\n{s}\n= {r}\n> {t}\n" for (s, r), (t, *_) in zip(pairs[:5], best, strict=False)))
    print(f"{SUMMARY.format(**figures)}\n{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def sentences_of(args: TranslateArgs, model: Translator) -> Iterable[list[str]]:
    """The sentences in parts: those of standard input one by one, each as it comes."""
    if args.sentences:
        return [list(args.sentences)]
    if args.file:
        return translators.usable(model, [pair_files.sentences(args.file)])
    lines = (line.decode("utf-8", "surrogateescape").strip() for line in sys.stdin.buffer)
    return translators.usable(model, ([line] for line in lines))


def translate(args: TranslateArgs) -> None:
    """Translate sentences with a run's net or with published Marian weights."""
    args.check()
    check_source(args)
    if args.temperature is None and args.n_best > args.beam:
        raise ValueError(f"--n-best is {args.n_best}; expected 1 to {args.beam}, the beams")
    for flag, path in (("--out", args.out), ("--attention", args.attention)):
        if path and path.exists():
            raise ValueError(f"{flag} '{path}' exists already; choose another")
    if args.run:
        model = translators.load(open_run(args.run, RUNS, args.checkpoint), args.device)
    else:
        model = translators.published(args.weights, args.device)
    parts = sentences_of(args, model)
    with ExitStack() as stack:
        out = sys.stdout
        if args.out:
            out = stack.enter_context(open(stack.enter_context(replacing(args.out)), "w", encoding="utf-8"))
        for part in parts:
            best = translations(model, part, args, args.n_best)
            for text, score, _ in (one for rows in best for one in rows):
                line = " ".join(text.splitlines())
                print(line if args.n_best == 1 else f"{score:8.3f}  {line}", file=out, flush=True)
            first = next(((s, rows[0].ids) for s, rows in zip(part, best, strict=True) if s.strip()), None)
            if args.attention and first and not args.attention.exists():
                draw_attention(args.attention, model, *first)


def evaluate(args: EvaluateArgs) -> None:
    """BLEU and chrF of a run's translations of a test set."""
    args.check()
    run = open_run(args.run, RUNS, args.checkpoint)
    trained, model = run.read("args", Args), translators.load(run, args.device)
    languages = trained.source, trained.target
    if args.data is None:
        tests = pair_sets.open_pairs(trained.data, *languages).test_sets
    else:
        tests = pair_sets.open_tests(args.data, *languages)
    name = next(iter(tests)) if args.test is None else args.test
    if name not in tests:
        there = f"there are {', '.join(tests)}"
        raise ValueError(f"--test '{name}' is no test set of {args.data or trained.data}; {there}")
    tests, left_out = pair_sets.fit({name: tests[name]}, model.tokenizer, model.cfg.context)
    facts = {"languages": " to ".join(languages), "test pairs": {name: len(tests[name])}, "left out": left_out}
    understood(print, facts)
    began = time.perf_counter()
    figures, _ = translators.evaluate(model, tests[name], trained.target, args)
    speed = len(tests[name]) / (time.perf_counter() - began)
    way = f"{args.beam} beams" if args.temperature is None else f"temperature {args.temperature}"
    print(f"{SUMMARY.format(**figures, test=name)}\n{way}, checkpoint of step {run.step}, {speed:.0f} sentences/s")


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, PRESETS),
        root=RUNS,
        translate=(TranslateArgs, translate),
        evaluate=(EvaluateArgs, evaluate),
    )
