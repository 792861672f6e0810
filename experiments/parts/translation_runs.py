"""Runs that learn to translate, whatever the net: their data, the loop, the figures at the end, their sub-commands."""

import codecs
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from torch import Tensor

from core import tree
from experiments.parts import translator as translators
from experiments.parts.translator import DECODED, NETS, SUMMARY, Decoder, Translator, draw_attention, translations
from train import plots
from train.data.fingerprint import fingerprint
from train.data.text import tokenizers
from train.data.text.subwords import T5Tokenizer
from train.data.text.tokenizers import PAD, SentenceTokenizer
from train.data.translation import buckets, corpus
from train.data.translation import files as pair_files
from train.data.translation import sets as pair_sets
from train.data.translation.files import Pair
from train.data.understood import understood
from train.files import replacing
from train.losses import cross_entropy
from train.metrics import translation
from train.run import Count, FromRun, Run, SavedRun, open_run
from train.run.logs import read_curves
from train.step import TrainState


@dataclass(frozen=True, kw_only=True)
class TranslateArgs(Decoder, FromRun):
    sentences: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Sentences to translate; without any, the lines of --file or of standard input."""
    file: Path | None = None
    """File with a sentence per line (.gz too)."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write to, a translation per line; standard output if None."""
    n_best: Count = 1
    """Translations per sentence, with their scores; up to the number of beams."""
    attention: Path | None = None
    """Folder for pictures of the attention to the first sentence, of all heads where there are several."""

    def check(self) -> None:
        super().check()
        if self.temperature is None and self.n_best > self.beam:
            raise ValueError(f"--n-best is {self.n_best}; expected 1 to {self.beam}, the beams")
        if self.sentences and self.file:
            raise ValueError("there are sentences and a --file; expected one of them")
        for flag, path in (("--out", self.out), ("--attention", self.attention)):
            if path and path.exists():
                raise ValueError(f"{flag} '{path}' exists already; choose another")


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(Decoder, FromRun):
    data: str | None = None
    """Pairs to evaluate on, in the run's languages: all of a TSV, PREFIX or SOURCE,TARGET, or the test set of a folder;
    the run's own data if None."""
    test: str | None = None
    """Test set of the data; the first if None."""


class Task(NamedTuple):
    """Sentences and tokens of a run, the shapes of its batches, the name of its first test set, its net.

    `model` makes a translator of what is trained.
    """

    data: pair_sets.ParallelSet
    tokenizer: SentenceTokenizer | T5Tokenizer
    pairs: corpus.Corpus
    validation: corpus.Corpus
    shapes: buckets.Buckets
    test: str
    cfg: Any
    model: Callable[[tree.Tree], Translator]

    def config(self) -> dict[str, Any]:
        """The entries of a run's configuration that a resumed run must share."""
        return {"net": self.cfg, "data": fingerprint(self.pairs, self.validation)}


def open_task(args: Any, run: Run, root: Path, cfg_of: Callable[[int], Any]) -> Task:
    """The data of a run's arguments, said on the standard output; `cfg_of` is the net for a vocabulary of this size."""
    data = pair_sets.open_pairs(args.data, args.source, args.target)
    tokenizer = _tokenizer(args, data, run.resumed_from)
    cfg = cfg_of(tokenizer.vocabulary_size)
    task, facts = task_of(args, root, data, Translator((), cfg, tokenizer))
    understood(print, facts | translators.copy_baseline(task.data.test_sets[task.test], args.target) | {"net": cfg})
    return task


def task_of(args: Any, root: Path, data: pair_sets.ParallelSet, translator: Translator) -> tuple[Task, dict[str, Any]]:
    """(The task of some pairs, its facts to print); pairs longer than the net's positions are left out.

    Args:
        translator: its parameters do not count.
    """
    tokenizer, longest = translator.tokenizer, translator.context
    parts, left_out = pair_sets.fit({"validation": data.validation, **data.tests}, tokenizer, longest)
    data = data._replace(validation=parts.pop("validation"), tests=parts)
    cache = None if isinstance(data.train, Sequence) else root / "corpora"
    pairs = corpus.open_corpus(data.train, tokenizer, cache, longest=longest)
    validation = corpus.open_corpus(data.validation, tokenizer)
    shapes = buckets.make_buckets(pairs, args.tokens, longest, args.shapes)
    facts = pair_sets.facts(data, pairs, left_out=left_out) | {"vocabulary": tokenizer.vocabulary_size}

    def model(params: tree.Tree) -> Translator:
        return translator._replace(params=params)

    return Task(data, tokenizer, pairs, validation, shapes, next(iter(data.test_sets)), translator.cfg, model), facts


def _tokenizer(args: Any, data: pair_sets.ParallelSet, folder: Path | None) -> SentenceTokenizer:
    """The tokenizer of a resumed run, or a new one of the training sentences."""
    if folder:
        return tokenizers.load(folder / "tokenizer.json")
    texts = (text for pair in data.train for text in pair)
    return tokenizers.train_sentences(texts, args.vocabulary, args.tokenizer == "words")


def learn(
    run: Run,
    task: Task,
    net: ModuleType,
    state: TrainState,
    step: Callable,
    order: Tensor,
    batch_of: Callable = lambda source, target, at: (source, target),
    ending: Callable[[tree.Tree], None] | None = None,
) -> None:
    """Train in the run's folder, with the figures and pictures of the test set at the end.

    Args:
        order: key of the order of the batches.
        batch_of: (source, target, step) -> the batch of the loss.
        ending: called with what is trained, instead of `report` on averaged checkpoints.
    """
    args, tokenizer, data = run.args, task.tokenizer, task.data
    with run.open({}, unit="tokens", files={"tokenizer.json": tokenizer.save}):
        run.log.print(f"{tree.count(run.whole(state.params)):,} parameters; run in {run.folder}\n{task.shapes}")
        parts = run.rows * args.micro_batches
        batches = (buckets.batch_at(task.pairs, task.shapes, order, at, parts) for at in run.remaining)
        for at, batch in run.steps(batches):
            state, metrics = step(state, tree.move(batch_of(*batch, at), run.device))
            run.record(at, metrics, int((batch[1] != PAD).sum()))
            if run.due(at, args.eval_every):
                model = task.model(run.whole(state.params))
                figures = validate(model, task.validation)
                run.log.metrics(at, {f"validation/{name}": value for name, value in figures.items()})
                translators.write_samples(run, model, data.validation[:4])
            if run.due(at, args.common.save_every):
                run.save(at, state)
        if ending:
            ending(run.whole(state.params))
            return
        saved = open_run(run.folder, run.root)
        model = translators.load(saved, args.common.device, args.average_checkpoints, net)
        report(run, task, model, partial(translators.evaluate, language=args.target), SUMMARY)


@torch.no_grad()
def validate(model: Translator, pairs: corpus.Corpus) -> dict[str, float]:
    """Cross-entropy in nats per token, and the fraction of tokens that are right, given those before."""
    net, device = NETS[type(model.cfg)], tree.leaves(model.params)[0].device
    total, right, count = 0.0, 0, 0
    for _, *batch in buckets.evaluation_batches(pairs, DECODED, model.context):
        source, target = tree.move(tuple(batch), device)
        logits, labels = net.apply(model.params, (source, target[:, :-1]), model.cfg), target[:, 1:]
        total += float(cross_entropy(logits, labels, ignore_id=PAD, reduction="sum"))
        right += int((logits.argmax(-1) == labels)[labels != PAD].sum())
        count += int((labels != PAD).sum())
    return {"loss": total / count, "token_accuracy": right / count}


def report(run: Run, task: Task, model: Translator, evaluate: Callable, summary: str) -> None:
    """The figures of the test sentences, the curves, the attention to the first of them.

    Args:
        evaluate: (model, pairs) -> (figures, translations).
        summary: the line to print, with the figures' names in braces.
    """
    args, pairs = run.args, task.data.test_sets[task.test]
    figures, best = evaluate(model, pairs)
    figures |= {"test": task.test, "sentences": len(pairs)}
    tokens = corpus.open_corpus(pairs, model.tokenizer)
    loss, ends = validate(model, tokens)["loss"], len(pairs)
    nats = loss * (int(tokens.lengths[:, 1].sum()) + ends)
    perplexity = translation.word_perplexity(nats, [reference for _, reference in pairs], args.target)
    figures |= {"test_loss": loss, "word_perplexity": perplexity}
    run.result({**figures, "parameters": tree.count(model.params), "shapes": len(task.shapes.buckets)})
    lines, title = read_curves(run.folder, "train/loss", "validation/loss"), "Divergence and validation cross-entropy"
    plots.curves(run.folder / "loss.png", lines, ylabel="nats per token", title=title)
    draw_attention(run.folder / "attention", model, pairs[0][0], best[0].ids)
    print("".join(f"\n{s}\n= {r}\n> {t}\n" for (s, r), (t, *_) in zip(pairs[:5], best, strict=False)))
    print(f"{summary.format(**figures)}\n{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def sentences_of(args: TranslateArgs, model: Translator, prefix: str = "") -> Iterable[list[str]]:
    """The sentences in parts, after the prefix: those of standard input one by one, each as it comes."""

    def prefixed(sentences: Sequence[str]) -> list[str]:
        return [prefix + sentence if sentence.strip() else sentence for sentence in sentences]

    if args.sentences:
        return [prefixed(args.sentences)]
    if args.file:
        return translators.usable(model, [prefixed(pair_files.sentences(args.file))])
    lines = (line.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").strip() for line in sys.stdin.buffer)
    return translators.usable(model, (prefixed([line]) for line in lines))


def translate(args: TranslateArgs, model: Translator, prefix: str = "") -> None:
    """Write the model's translations of the sentences, each after the prefix."""
    parts = sentences_of(args, model, prefix)
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


def evaluate(args: EvaluateArgs, run: SavedRun, trained: Any, model: Translator) -> None:
    """BLEU and chrF of the translations of a test set; `trained` are the arguments of the run."""
    languages = trained.source, trained.target
    if args.data is None:
        tests = pair_sets.open_pairs(trained.data, *languages).test_sets
    else:
        tests = pair_sets.open_tests(args.data, *languages)
    name, pairs, facts = test_of(args, tests, trained.data, model)
    understood(print, {"languages": " to ".join(languages)} | facts)
    began = time.perf_counter()
    figures, _ = translators.evaluate(model, pairs, trained.target, args)
    speed = len(pairs) / (time.perf_counter() - began)
    way = f"{args.beam} beams" if args.temperature is None else f"temperature {args.temperature}"
    print(f"{SUMMARY.format(**figures, test=name)}\n{way}, checkpoint of step {run.step}, {speed:.0f} sentences/s")


def test_of(
    args: EvaluateArgs, tests: Mapping[str, list[Pair]], data: str, model: Translator
) -> tuple[str, list[Pair], dict[str, Any]]:
    """(name, pairs, facts to print) of the test set of the flags; pairs that are too long are left out."""
    name = next(iter(tests)) if args.test is None else args.test
    if name not in tests:
        raise ValueError(f"--test '{name}' is no test set of {args.data or data}; there are {', '.join(tests)}")
    parts, left_out = pair_sets.fit({name: tests[name]}, model.tokenizer, model.context)
    return name, parts[name], {"test pairs": {name: len(parts[name])}, "left out": left_out}
