"""Sentence embeddings: an encoder learns that the texts of a pair are near each other, and far from all others.

Reimers and Gurevych 2019, "Sentence-BERT" (arXiv:1908.10084), with the other pairs of the batch as negatives, as in
Henderson et al. 2017 (arXiv:1705.00652). Without a flag it learns, offline and from scratch, which body a docstring's
first line belongs to:

    python experiments/embed.py                                          two minutes on 2 CPU cores
    python experiments/embed.py --weights sentence-transformers/all-MiniLM-L6-v2 --lora 8
    python experiments/embed.py --data FILE.csv --source question --target answer
    python experiments/embed.py search --run runs/embed/NAME --file LINES.txt "what to look for"
    python experiments/embed.py evaluate --weights FOLDER --data FILE.tsv
    python experiments/embed.py encode --run runs/embed/NAME --file LINES.txt --out vectors.npy
    python experiments/embed.py map --run runs/embed/NAME --method tsne
    python experiments/embed.py similarity --weights FOLDER "a text" "another" "a third"

Expected: the right body first for 25 % of 306 held-out lines, among five for 50 %; TF-IDF 38 % and 61 %.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from core import random, tree
from experiments.parts import embedder as parts
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Tuning
from train import plots
from train.data.fingerprint import fingerprint
from train.data.text import labelled
from train.data.text.files import lines_of
from train.data.translation import files as pair_files
from train.data.translation import sets as pair_sets
from train.data.understood import understood
from train.files import replacing, shown, write_json
from train.losses.contrastive import in_batch_negatives, same_texts
from train.run import Common, Count, Natural, Positive, Shared, begin, command_line, open_run
from train.run.logs import read_curves
from train.run.run import unused
from train.step import make_step, start

RUNS = Path("runs/embed")
HELD, BLOCK = 10, 8
SUMMARY = """\
{test}: recall at 1 {recall_at_1:.2%}, at 5 {recall_at_5:.2%}, MRR {mean_reciprocal_rank:.3f} among {pairs} \
(TF-IDF: {tfidf_recall_at_1:.2%}, {tfidf_recall_at_5:.2%}, {tfidf_mean_reciprocal_rank:.3f}; chance: \
{chance_recall_at_1:.2%})
without the words that pairs share: {unshared_recall_at_1:.2%}"""

SCRATCH = Tuning(layers=1, batch=64, shapes=1, epochs=3.0, head_rate=2e-3)
PUBLISHED = Tuning(longest=128, shapes=2, epochs=2.0, learning_rate=5e-5)


@dataclass(frozen=True)
class Args:
    data: str = "docstrings"
    """"docstrings" (embedded), a TSV, CSV or JSONL of pairs, SOURCE,TARGET, a folder, or what translate.py knows."""
    source: str = "source"
    """Column of the first texts, or the end of their files' names."""
    target: str = "target"
    """Column of the second texts, or the end of their files' names."""
    sharpness: Positive = 20.0
    """Factor of the cosines in the loss, one over the temperature."""
    cloze: Natural = 6
    """Further training pairs: up to this many sentences of each second text, each with all the rest."""
    eval_every: Count | None = None
    """Steps between evaluations on the validation pairs; those of an epoch if None."""
    tuning: Annotated[Tuning, tyro.conf.OmitArgPrefixes] = SCRATCH
    common: Shared = Common(save_every=100, compile=False)  # compiling takes longer than the default's gain


def presets(words: dict[str, str]) -> Args:
    return Args(cloze=0, tuning=PUBLISHED) if "weights" in words else Args()


@dataclass(frozen=True, kw_only=True)
class Source:
    run: Path | None = None
    """Folder of a run: runs/embed/NAME."""
    checkpoint: str = "latest"
    """Checkpoint of the run: latest or a step."""
    weights: str | None = None
    """A folder or Hugging Face id of a BERT, DistilBERT or RoBERTa instead, or a run of another script."""
    longest: Count = 128
    """Tokens of a text with --weights, at most; a run has its own."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


@dataclass(frozen=True, kw_only=True)
class SearchArgs(Source):
    file: Path | None = None
    """File with a text per line, to search in."""
    queries: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to look for; without any, the lines of standard input."""
    count: Count = 5
    """Lines to show per query."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(Source):
    data: str | None = None
    """Pairs: all of a TSV, CSV or JSONL, or the test set of a folder; the run's own, or "docstrings", if None."""
    source: str | None = None
    """Column of the first texts; the run's if None."""
    target: str | None = None
    """Column of the second texts; the run's if None."""
    out: Path | None = None
    """New folder for the figures and pictures; evaluations/DATA in the run's, numbered if it exists, if None."""


@dataclass(frozen=True, kw_only=True)
class Texts(Source):
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to embed; without any, the lines of --file or of standard input."""
    file: Path | None = None
    """File with a text per line."""


@dataclass(frozen=True, kw_only=True)
class EncodeArgs(Texts):
    out: Path | None = None
    """New .npy file for the vectors, a row per text in their order; printed as text if None."""


@dataclass(frozen=True, kw_only=True)
class MapArgs(Source):
    data: str = "docstrings"
    """Labelled texts: "docstrings" (by package), or a file as finetuning scripts read it."""
    method: Literal["pca", "tsne"] = "pca"
    """Principal components, or scikit-learn's t-SNE."""
    count: Count = 1000
    """Texts on the map, at most."""
    out: Path | None = None
    """New PNG file; map.png, numbered if it exists, in the run's folder or the current one, if None."""


@dataclass(frozen=True, kw_only=True)
class SimilarityArgs(Texts):
    out: Path | None = None
    """New PNG file; similarity.png, numbered if it exists, in the run's folder or the current one, if None."""


def loss(params, batch: parts.Pairs, keys, encoder, whole, scale: float):
    first, first_lengths, second, second_lengths, numbers = batch
    first_keys, second_keys = random.sites(keys, 2).unbind(0)  # each (pairs, 2)
    params = whole(params)
    a = parts.vectors(params, first, first_lengths, encoder, key=first_keys, train=True)  # (pairs, width)
    b = parts.vectors(params, second, second_lengths, encoder, key=second_keys, train=True)
    return in_batch_negatives(a, b, scale=scale, matches=same_texts(*numbers.unbind(1)))


def train(args: Args) -> None:
    tuning = args.tuning
    free = [f"tuning.{name}" for name in ("epochs", "batch", "shapes", "learning_rate", "head_rate", "weight_decay")]
    run = begin(RUNS, args, free=("data", "eval_every", *free))
    if tuning.lora and not tuning.weights:
        raise ValueError("--lora adapts weights that have learned something; name them with --weights")
    net_key, lora_key, run_key, order_key = random.split(random.key(args.common.seed), 4).unbind(0)
    data = pair_sets.open_pairs(args.data, args.source, args.target, every=HELD, block=BLOCK)
    pairs, (test, tests) = pair_files.read(data.train), next(iter(data.test_sets.items()))
    encoder = encoders.load(tuning, [text for pair in pairs for text in pair], "features", key=net_key)
    encoder = encoder._replace(params=tree.move(encoder.params, run.device))
    learn = parts.encoded(encoder, parts.cloze(pairs, args.cloze), tuning.longest)
    buckets = parts.make_buckets(learn, tuning.shapes, tuning.batch)
    per_epoch = parts.ragged.steps_per_epoch(buckets, tuning.batch)
    steps = max(1, round(tuning.epochs * per_epoch))
    facts = {"training pairs": f"{len(pairs):,}, with sentences of them {len(learn.numbers):,}", "net": encoder.cfg}
    note = parts.cut(parts.Embedder(encoder, tuning.longest), [text for pair in pairs for text in pair])
    facts |= {"cut": note, "languages": None, "trained": f"LoRA of rank {tuning.lora}" if tuning.lora else None}
    understood(print, pair_sets.facts(data) | facts)

    own = encoders.trainable(encoder, tuning, lora_key)
    optimizer = encoders.adamw(tuning, encoder, steps)
    identity = {"data": fingerprint(learn), **encoders.identity(encoder, tuning)}
    values = tree.map(torch.clone, own.values)  # which the step overwrites
    state = run.restore(start(run_key.to(run.device), values, own.model, optimizer), identity, steps)
    objective = functools.partial(loss, encoder=encoder, whole=own.whole, scale=args.sharpness)
    step = make_step(objective, optimizer, policy=run.policy, donate=True, compile=args.common.compile)
    files = {"tokenizer.json": encoder.tokenizer.save}

    with run.open(encoders.stored(encoder), files=files):
        run.log.print(f"{tree.count(state.params):,} trained parameters; run in {run.folder}")
        run.log.print(f"a guess has a loss of {math.log(tuning.batch):.3f}")
        batches = (parts.batch_at(learn, buckets, order_key, t, tuning.batch) for t in run.remaining)
        for at, batch in run.steps(batches):
            state, metrics = step(state, tree.move(batch, run.device))
            run.record(at, metrics, tuning.batch)
            if run.due(at, args.eval_every or per_epoch):
                model = parts.Embedder(encoder._replace(params=own.merged(state.params)), tuning.longest)
                values = parts.figures(model, data.validation)
                run.log.metrics(at, {f"validation/{name}": value for name, value in values.items()})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        model = parts.Embedder(encoder._replace(params=own.merged(state.params)), tuning.longest)
        figures = parts.study(run.folder, model, tests)
        if tuning.lora:
            encoders.write_adapters(run.folder, encoder, tuning, state.params)
        run.result({**figures, "parameters": tree.count(state.params)})
    plots.curves(run.folder / "loss.png", read_curves(run.folder, "train/loss"), ylabel="nats", title="Loss")
    curves = read_curves(run.folder, *(f"validation/recall_at_{k}" for k in (1, 5)))
    plots.curves(run.folder / "recall.png", curves, ylabel="recall", title="Validation pairs found")
    print(SUMMARY.format(**figures, test=test))
    print(f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def search(args: SearchArgs) -> None:
    """The lines of a file that are nearest to each query: cosine, number of the line, the line."""
    model = parts.opened(args, RUNS)
    lines = parts.numbered(args.file)
    items, numbers = parts.embed_lines(model, list(lines.values())), list(lines)
    for query in filter(str.strip, lines_of(args.queries, None)):
        if len(args.queries) != 1:
            print(f"> {shown(query)}")
        for score, item in parts.nearest(model, items, query, args.count):
            print(f"{score:.4f}\t{numbers[item]}\t{shown(lines[numbers[item]])}", flush=True)


def evaluate(args: EvaluateArgs) -> None:
    """Recall of held-out pairs, or of all pairs of a file, beside TF-IDF."""
    model, trained = parts.opened(args, RUNS), Args()
    if args.run:
        trained = open_run(args.run, RUNS, args.checkpoint).read("args", Args)
    columns = args.source or trained.source, args.target or trained.target
    if args.data and args.data not in pair_sets.NAMES:
        tests = pair_sets.open_tests(args.data, *columns)
    else:
        tests = pair_sets.open_pairs(args.data or trained.data, *columns, every=HELD, block=BLOCK).test_sets
    name, pairs = next(iter(tests.items()))
    understood(print, {"pairs": args.data or trained.data, "test pairs": {name: len(pairs)}, "net": model.encoder.cfg})
    folder = None
    if args.out or args.run:
        folder = unused(args.out, (args.run or Path()) / "evaluations" / Path(args.data or name).resolve().name)
        folder.mkdir(parents=True)
    figures = parts.study(folder, model, pairs)
    if folder:
        write_json(folder / "result.json", figures)
    print(SUMMARY.format(**figures, test=name))
    print(f"files in {folder}/" if folder else "no files: name a folder with --out")


def encode(args: EncodeArgs) -> None:
    """Vectors of texts, of norm 1, a row per text; an empty line's is 0."""
    model, out = parts.opened(args, RUNS), None if args.out is None else unused(args.out, args.out)
    texts = parts.texts_of(args.texts, args.file)
    vectors = parts.embed_lines(model, texts)
    vectors = torch.where(torch.tensor([bool(text.strip()) for text in texts])[:, None], vectors, 0)
    if out is None:
        print("\n".join(" ".join(f"{x:.5f}" for x in row) for row in vectors.tolist()))
        return
    with replacing(out) as path, open(path, "wb") as file:
        np.save(file, vectors.numpy())
    print(f"{len(texts):,} vectors of {vectors.shape[1]} numbers in {out}")


def map_texts(args: MapArgs) -> None:
    """A picture of labelled texts in two dimensions."""
    model, out = parts.opened(args, RUNS), unused(args.out, (args.run or Path()) / "map.png")
    records = labelled.open_labelled("docstrings").test if args.data == "docstrings" else labelled.read(Path(args.data))
    rows = range(0, len(records.texts), -(-len(records.texts) // args.count))
    records = records.some(rows)
    understood(print, {"texts": len(records.texts), "labels": sorted(set(records.labels))})
    if len(records.texts) < 3:
        raise ValueError(f"there are {len(records.texts)} texts; expected at least 3 for a map")
    parts.draw_map(out, parts.embed(model, records.texts), records.labels, args.method)
    print(out)


def similarity(args: SimilarityArgs) -> None:
    """A table of the cosines between texts, printed and as a picture."""
    model, out = parts.opened(args, RUNS), unused(args.out, (args.run or Path()) / "similarity.png")
    texts = [text for text in parts.texts_of(args.texts, args.file) if text.strip()]
    if not 2 <= len(texts) <= 60:
        raise ValueError(f"there are {len(texts)} texts; expected 2 to 60 to compare")
    vectors = parts.embed(model, texts)
    cosines = vectors @ vectors.T  # (texts, texts)
    for row, text in zip(cosines.tolist(), texts, strict=True):
        print("\t".join([*(f"{x:.4f}" for x in row), shown(text)]))
    parts.draw_similarities(out, cosines, texts, texts)
    print(out)


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, presets),
        root=RUNS,
        search=(SearchArgs, search),
        evaluate=(EvaluateArgs, evaluate),
        encode=(EncodeArgs, encode),
        map=(MapArgs, map_texts),
        similarity=(SimilarityArgs, similarity),
    )
