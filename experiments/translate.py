"""Machine translation with the original Transformer: train it, let it translate, measure BLEU.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762). Without a flag it learns to translate dates, times,
prices and numbers that are written out in German into English, offline:

    python experiments/translate.py                                              a few minutes on 2 CPU cores
    python experiments/translate.py --data multi30k --preset small               29,000 captions, downloaded once
    python experiments/translate.py --data FOLDER --source en --target de        train.en, train.de, val.en, val.de ...
    python experiments/translate.py translate --run runs/translate/NAME "Der dritte Mai ist ein Montag."
    python experiments/translate.py evaluate --run runs/translate/NAME --beam 5
"""

import dataclasses
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from core import random, tree
from experiments.parts.translator import DECODED, Decoder, Translator, draw_attention, load, translations
from nets.language import transformer
from train import optimizers, plots
from train.data.text import tokenizers
from train.data.text.tokenizers import PAD
from train.data.translation import buckets, corpus
from train.data.translation import files as pair_files
from train.data.translation import sets as pair_sets
from train.losses import cross_entropy
from train.metrics import translation
from train.optimizers import schedules
from train.run import command_line
from train.run import run as runs
from train.run.logs import read_curves
from train.step import create, make_step

RUNS = Path("runs/translate")


@dataclass(frozen=True)
class Recipe:
    """How a preset of `nets.language.transformer` is trained: Adam with the paper's betas, Noam's schedule."""

    steps: int
    tokens: int
    factor: float
    warmup: int
    vocabulary: int
    shapes: int
    words: bool = False


RECIPES = {
    "tiny": Recipe(1500, 1000, 0.4, 400, 1000, 1),
    "small": Recipe(3600, 2000, 0.7, 800, 4000, 4),
    "base": Recipe(100_000, 25_000, 1.0, 4000, 37_000, 12),
    "big": Recipe(300_000, 25_000, 1.0, 4000, 37_000, 12),
}


@dataclass(frozen=True)
class Args:
    data: str = "dates"
    """"dates" (embedded), "multi30k", "iwslt17" or "wmt14" (downloaded once), a folder, a TSV, or SOURCE,TARGET."""
    source: str = "de"
    """The language to translate from, as files are named after it."""
    target: str = "en"
    """The language to translate into."""
    preset: str = "tiny"
    """Sizes and recipe: tiny, small, base, big."""
    tokenizer: str | None = None
    """"bpe" or "words", learned from both languages; the preset's if not given."""
    vocabulary: int | None = None
    """Its size, at most; as all of these, the preset's if not given."""
    steps: int | None = None
    """Training steps."""
    tokens: int | None = None
    """Source tokens a batch, and as many target tokens, at most."""
    factor: float | None = None
    """Of the learning rate factor * width^-0.5 * min(step^-0.5, step * warmup^-1.5)."""
    warmup: int | None = None
    """Steps in which it rises."""
    shapes: int | None = None
    """Buckets of similar length, at most: more of them pad less, but the step is compiled for each."""
    dropout: float | None = None
    """Dropout rate."""
    label_smoothing: float = 0.1
    """The share of each target token that is spread over the vocabulary."""
    norm_first: bool = False
    """Norms in front of each sub-layer instead of behind."""
    average: int = 3
    """At the end, the parameters are averaged over so many of the last checkpoints; three are kept."""
    eval_every: int = 250
    """Steps between two looks at the validation sentences."""
    save_every: int = 100
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random: initial values, order, dropout."""
    name: str | None = None
    """Folder under runs/translate; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    compile: bool = True
    """Compile the train step with torch.compile, once for each shape of batches."""


@dataclass(frozen=True, kw_only=True)
class TranslateArgs(Decoder):
    run: Path
    """Folder of a run, such as runs/translate/NAME."""
    sentences: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What to translate; without any, the lines of --file or of standard input."""
    file: Path | None = None
    """A file with a sentence a line."""
    n_best: int = 1
    """How many translations of each sentence, with their scores; at most as many as beams."""
    attention: Path | None = None
    """A folder for pictures of the attention of all heads: encoder, decoder and cross, of the first sentence."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(Decoder):
    run: Path
    """Folder of a run, such as runs/translate/NAME."""
    test: str | None = None
    """Which test set of the data, the first if not given."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


def loss(params, batch, keys, cfg: transformer.Config, smoothing: float):
    source, target = batch
    logits, labels = transformer.apply(params, (source, target[:, :-1]), cfg, key=keys, train=True), target[:, 1:]
    hits = translation.token_accuracy(logits, labels, PAD)
    return translation.smoothed_divergence(logits, labels, smoothing, PAD), {"token_accuracy": hits}


@torch.no_grad()
def validate(params, cfg: transformer.Config, pairs: corpus.Corpus) -> dict[str, float]:
    """Cross-entropy in nats a token, and the share of tokens that are right, given those before."""
    device, total, right, count = tree.leaves(params)[0].device, 0.0, 0, 0
    for _, *batch in buckets.evaluation_batches(pairs, DECODED, cfg.context):
        source, target = tree.move(tuple(batch), device)
        logits, labels = transformer.apply(params, (source, target[:, :-1]), cfg), target[:, 1:]
        total += float(cross_entropy(logits, labels, ignore_id=PAD, reduction="sum"))
        right += int((logits.argmax(-1) == labels)[labels != PAD].sum())
        count += int((labels != PAD).sum())
    return {"loss": total / count, "token_accuracy": right / count}


def settings(args: Args) -> tuple[transformer.Config, Recipe]:
    """The preset's sizes and recipe with the flags applied."""
    command_line.choice("--preset", args.preset, RECIPES)
    recipe = RECIPES[args.preset]
    said = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if f.name != "words"}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in said.items() if value is not None})
    if args.tokenizer is not None:
        words = command_line.choice("--tokenizer", args.tokenizer, ("bpe", "words")) == "words"
        recipe = dataclasses.replace(recipe, words=words)
    command_line.at_least_one(steps=recipe.steps, tokens=recipe.tokens, warmup=recipe.warmup, shapes=recipe.shapes)
    command_line.at_least_one(average=args.average, eval_every=args.eval_every, save_every=args.save_every)
    command_line.positive(factor=recipe.factor)
    cfg = dataclasses.replace(transformer.PRESETS[args.preset], norm_first=args.norm_first)
    return cfg if args.dropout is None else dataclasses.replace(cfg, dropout=args.dropout), recipe


def train(args: Args) -> None:
    origin, args = runs.begin(RUNS, args, free=("steps", "average", "eval_every", "save_every", "device", "compile"))
    cfg, recipe = settings(args)
    device, began = command_line.device(args.device), time.perf_counter()
    data = pair_sets.open_pairs(args.data, args.source, args.target)
    if origin.folder:
        tokenizer = tokenizers.load(origin.folder / "tokenizer.json")
    else:
        texts = (text for pair in data.train for text in pair)
        tokenizer = tokenizers.train_sentences(texts, recipe.vocabulary, recipe.words)
    cfg = dataclasses.replace(
        cfg, source_vocabulary=tokenizer.vocabulary_size, target_vocabulary=tokenizer.vocabulary_size
    )
    pairs = corpus.open_corpus(data.train, tokenizer, None if args.data == "dates" else RUNS / "corpora")
    held = corpus.open_corpus(data.validation, tokenizer)
    shapes = buckets.make_buckets(pairs, recipe.tokens, cfg.context, recipe.shapes)

    rate = schedules.noam(cfg.width, recipe.warmup, recipe.factor)
    optimizer = optimizers.adam(rate, 0.9, 0.98, eps=1e-9)  # section 5.3 of the paper
    model, key = transformer.spec(cfg), random.key(args.seed, device)
    identity = {"net": cfg, "pairs": len(pairs)}
    state = runs.restore(origin, create(key, model, optimizer), identity, recipe.steps)
    objective = functools.partial(loss, cfg=cfg, smoothing=args.label_smoothing)
    step = make_step(objective, optimizer, donate=True, compile=args.compile)
    order_key = random.fold_in(random.key(args.seed), 2)  # `create` has 0 and 1
    watched, references = zip(*data.validation[:4], strict=True)

    config = {"args": args, **identity, "recipe": recipe, "torch": torch.__version__}
    files = {"tokenizer.json": tokenizer.save}
    with runs.opened(origin, config, total=recipe.steps, unit="tokens", files=files) as run:
        run.log.print(f"{tree.count(model):,} parameters, {len(pairs):,} pairs; run in {run.folder}")
        run.log.print(f"{shapes}\nready after {time.perf_counter() - began:.1f} s")
        if shapes.too_long:
            run.log.print(f"{shapes.too_long} pairs are longer than {cfg.context} tokens and left out")
        if args.compile and run.first < recipe.steps:
            run.log.print(f"compiling the train step, once for each of {len(shapes.buckets)} shapes ...")
        at = run.first
        for at in range(run.first + 1, recipe.steps + 1):
            batch = tree.move(buckets.batch_at(pairs, shapes, order_key, at - 1), device)
            state, metrics = step(state, batch)
            runs.check_finite(run, at, metrics)
            last = at == recipe.steps or run.stop.requested
            run.log.progress(at, int((batch[1] != PAD).sum()), loss=metrics["loss"])
            if at % 10 == 0 or last:
                run.log.metrics(at, {f"train/{name}": value for name, value in metrics.items()})
            if at % args.eval_every == 0 or last:
                run.log.metrics(at, {f"validation/{k}": v for k, v in validate(state.params, cfg, held).items()})
                shown = translations(Translator(state.params, cfg, tokenizer), watched)
                lines = [
                    f"step {at}",
                    *(f"  {s}\n  = {r}\n  > {t[0][0]}" for s, r, t in zip(watched, references, shown, strict=True)),
                ]
                with open(run.folder / "samples.txt", "a", encoding="utf-8") as file:
                    file.write("\n".join(lines) + "\n\n")
            if at % args.save_every == 0 or last:
                runs.save(run, at, state)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        run.saved.wait()
        translator = load(run.folder, args.device, args.average)
        name, test = next(iter(data.tests.items()), ("validation", data.validation))
        sources, references = zip(*test, strict=True)
        found = [best[0][0] for best in translations(translator, sources)]
        figures = {**translation.scores(found, references), "test": name, "steps": at, "seconds": seconds}
        run.log.result({**figures, "parameters": tree.count(model), "shapes": len(shapes.buckets)})
    lines = read_curves(run.folder, "train/loss", "validation/loss")
    plots.curves(
        run.folder / "loss.png", lines, ylabel="nats a token", title="Training (divergence), validation (cross-entropy)"
    )
    draw_attention(run.folder / "attention", translator, sources[0], found[0])
    print("".join(f"\n{s}\n= {r}\n> {t}\n" for s, r, t in list(zip(sources, references, found, strict=True))[:5]))
    report(figures, f"after {at} steps in {seconds:.0f} s; files in {run.folder}/")


def report(figures: dict, rest: str) -> None:
    print("{test}: BLEU {bleu:.2f}, chrF {chrf:.2f}, {exact_match:.2%} word for word".format(**figures), rest)
    print(f"BLEU|{figures['bleu_signature']}")


def translate(args: TranslateArgs) -> None:
    args.check()
    if args.n_best < 1 or (args.temperature is None and args.n_best > args.beam):
        raise ValueError(f"--n-best is {args.n_best}; expected 1 to {args.beam}, the beams")
    translator = load(args.run, args.device, runs.read_config(args.run, "args", Args).average)
    if args.sentences:
        parts = [list(args.sentences)]
    elif args.file:
        parts = [pair_files.sentences(args.file)]
    else:
        parts = ([line.rstrip("\n")] for line in sys.stdin)  # each as it comes
    for number, sentences in enumerate(parts):
        found = translations(translator, sentences, args, args.n_best)
        for best in found:
            for text, score in best:
                print(text if args.n_best == 1 else f"{score:8.3f}  {text}", flush=True)
        if args.attention and number == 0 and sentences:
            draw_attention(args.attention, translator, sentences[0], found[0][0][0])


def evaluate(args: EvaluateArgs) -> None:
    args.check()
    trained = runs.read_config(args.run, "args", Args)
    translator = load(args.run, args.device, trained.average)
    data = pair_sets.open_pairs(trained.data, trained.source, trained.target)
    name = args.test or next(iter(data.tests), "")
    if name not in data.tests:
        raise ValueError(
            f"--test '{name}' is no test set of {trained.data}; there are {', '.join(data.tests) or 'none'}"
        )
    sources, references = zip(*data.tests[name], strict=True)
    began = time.perf_counter()
    found = translations(translator, sources, args)
    seconds = time.perf_counter() - began
    figures = {**translation.scores([best[0][0] for best in found], references), "test": name}
    report(figures, f"with {args.beam} beams" if args.temperature is None else f"drawn at {args.temperature}")
    print(f"{len(sources) / seconds:.0f} sentences/s")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), translate=(TranslateArgs, translate), evaluate=(EvaluateArgs, evaluate))
