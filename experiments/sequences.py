"""Recurrent networks on sequences: texts are classified, series are forecast with bands.

Hochreiter and Schmidhuber 1997 (LSTM), Cho et al. 2014 (GRU); for texts also fastText (Joulin et al. 2017,
arXiv:1607.01759) and TextCNN (Kim 2014, arXiv:1408.5882). Without a flag an LSTM learns which sequences of brackets
are balanced, offline; a bag of words, which does not see their order, is at chance:

    python experiments/sequences.py                                          a minute on 2 CPU cores
    python experiments/sequences.py --data stsa.binary.train                 SST-2; any TSV, CSV, or lines "label text"
    python experiments/sequences.py --data train.txt --tokenizer characters-and-spaces --net fasttext   Chinese titles
    python experiments/sequences.py --task forecast                          a trend, two seasons, noise; half a minute
    python experiments/sequences.py --task forecast --data FILE.csv --column load --season 24
    python experiments/sequences.py predict --run runs/sequences/NAME "a gripping film"
    python experiments/sequences.py evaluate --run runs/sequences/NAME --data OTHER_FILE

Expected: 99.5 % of unseen sequences of brackets right; forecasts with an error of 1.68 sigma of the noise, where the
best possible has 1.60 and ridge regression 1.71.
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
from experiments.parts import forecaster, text_classifier
from experiments.parts.sequence_task import module_of
from train import optimizers, plots
from train.data.text import labelled, ragged
from train.data.understood import understood
from train.files import write_json
from train.optimizers import schedules
from train.run import (
    Common,
    Count,
    FromBest,
    NonNegative,
    Positive,
    Rate,
    SavedRun,
    Shared,
    begin,
    command_line,
    open_run,
)
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS, alone
from train.run.run import unused
from train.step import compiled, create, make_step

RUNS = Path("runs/sequences")


@dataclass(frozen=True)
class Args:
    task: Literal["classify", "forecast"] = "classify"
    """Classes of texts, or the future of a series; the defaults of what follows fit it and the data."""
    data: str = "brackets"
    """"brackets" or, to forecast, "seasons", both generated; else a file: of labelled texts (or a folder with one
    training file), or a CSV with a header."""
    validation: str | None = None
    """File of labelled texts for validation; that beside a training file, or a tenth held out, if None."""
    test: str | None = None
    """File of labelled texts for testing, in the same way."""
    tokenizer: Literal["words", "characters", "characters-and-spaces", "bpe"] = "characters"
    """Tokens of a text: its words, its characters, without or with the spaces between them, or byte pairs."""
    vocabulary: Count = 100
    """Size of the vocabulary, at most."""
    min_count: Count = 1
    """Occurrences of a word or character in the training texts, at least. Rarer ones are <unk>, whose vector is learned
    from them: without, a word that only the test texts have would be a random vector."""
    longest: Count = 200
    """Tokens of a text that the net sees, at most."""
    column: str | None = None
    """Column of the CSV to forecast; the one with numbers if None."""
    window: Count = 168
    """Values that the net sees before it forecasts."""
    horizon: Count = 24
    """Values to forecast."""
    season: Count = 168
    """Values in a season, for the forecast that repeats the last one."""
    patch: Count = 24
    """Values of a series per step of the recurrence."""
    members: Count = 1
    """Nets that forecast or classify together, trained in one step; the mean of their forecasts or probabilities
    counts."""
    net: Literal["rnn", "gru", "lstm", "layer-norm-lstm", "fasttext", "text_cnn"] = "lstm"
    """Cells of a recurrent network; or fastText or TextCNN, which classify texts, with defaults of their own."""
    embedding: Count = 32
    """Size of a token's embedding."""
    embedding_std: Positive = 1.0
    """Standard deviation of its initial values."""
    width: Count = 64
    """Hidden units per layer and direction; filters per window of text_cnn."""
    layers: Count = 1
    """Recurrent layers."""
    bidirectional: bool = False
    """Each layer runs in both directions."""
    pooling: Literal["last", "max", "mean"] = "last"
    """Hidden state that the output sees: the last, or the greatest or mean over time."""
    dropout: Rate = 0.0
    """Dropout rate of embeddings, between layers and before the output; of whole tokens and n-grams with fasttext."""
    ngrams: Count = 2
    """Tokens of the longest n-grams of fasttext; 1 for none."""
    buckets: Count = 2**17
    """Vectors that the n-grams of fasttext share by their hashes."""
    windows: tuple[Count, ...] = (2, 3, 4)
    """Tokens that a filter of text_cnn sees, for each of its convolutions."""
    epochs: Positive = 10.0
    """Passes over the training examples; the learning rate falls over all of them."""
    batch: Count = 50
    """Examples per step (and member)."""
    shapes: Count = 1
    """Shapes of batches, by length, at most: more of them pad less, but the step is compiled for each."""
    learning_rate: Positive = 5e-3
    """Peak learning rate."""
    weight_decay: NonNegative = 0.0
    """Weight decay of AdamW."""
    best_by: Literal["error", "loss"] = "error"
    """Validation figure of a classifier of which the checkpoint with the least is used. The loss tells epochs apart
    where there are few validation texts."""
    eval_every: Count | None = None
    """Steps between evaluations on the validation part; those of an epoch if None."""
    common: Shared = Common()


TEXTS = {
    **{"tokenizer": "words", "vocabulary": 16_000, "min_count": 2, "embedding": 100, "embedding_std": 0.1},
    **{"width": 100, "bidirectional": True, "pooling": "max", "dropout": 0.5},
    **{"epochs": 4.0, "batch": 32, "shapes": 2, "learning_rate": 2e-3},
}
NETS = {
    "fasttext": {
        **{"net": "fasttext", "embedding": 32, "embedding_std": 0.1, "dropout": 0.4},
        **{"epochs": 6.0, "batch": 64, "learning_rate": 1e-2, "best_by": "loss"},
    },
    "text_cnn": {
        **{"net": "text_cnn", "embedding": 128, "embedding_std": 0.05, "width": 128, "dropout": 0.5},
        **{"epochs": 6.0, "batch": 64, "learning_rate": 3e-3, "best_by": "loss"},
    },
}
SERIES = {"task": "forecast", "members": 5, "epochs": 6.0, "batch": 32, "learning_rate": 1e-2, "weight_decay": 0.01}


def presets(words: dict[str, str]) -> Args:
    if words.get("task") == "forecast":
        return Args(**SERIES, data="seasons")
    texts = {} if words.get("data", "brackets") == "brackets" else TEXTS
    return Args(**{**texts, **NETS.get(words.get("net", ""), {})})


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(FromBest):
    data: str | None = None
    """Labelled texts of the run's classes, or a CSV; the run's own test part if None."""
    column: str | None = None
    """Column of the CSV; the run's if None."""
    out: Path | None = None
    """New folder for the figures and pictures; RUN/evaluations/DATA, numbered if it exists, if None."""


@dataclass(frozen=True, kw_only=True)
class PredictArgs(FromBest):
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to classify; without any, the lines of --file or of standard input."""
    file: Path | None = None
    """File with a text per line; for a forecast a CSV, after whose end it begins."""
    column: str | None = None
    """Column of the CSV; the run's if None."""


TASKS = {"classify": text_classifier, "forecast": forecaster}
SUMMARY = {
    "classify": "{accuracy:.2%} of the test texts right{member}, NLL {nll:.4f}, ECE {calibration_error:.2%} "
    "({tf_idf}bag of words: {bag_of_words_accuracy:.2%}, commonest class: {commonest_class_accuracy:.2%})",
    "forecast": "RMSE {rmse:.4g}, a member {member_rmse:.4g} (seasonal naive: {seasonal_naive_rmse:.4g}, "
    "ridge regression: {ridge_rmse:.4g}); {band_coverage:.1%} of the values in the 90 % bands",
}


def train(args: Args) -> None:
    free = ("data", "validation", "test", "epochs", "batch", "shapes", "learning_rate", "weight_decay", "eval_every")
    single = args.task == "classify" and args.members == 1
    shards = BY_ROWS if single else alone("--task forecast" if args.task == "forecast" else f"--members {args.members}")
    run = begin(RUNS, args, free=free, shards=shards)
    part = TASKS[args.task]
    task = part.task_of(args, run.resumed_from)
    understood(print, {**task.facts, "net": task.cfg})
    steps = max(1, round(args.epochs * task.per_epoch))
    create_key, order_key = random.split(random.key(args.common.seed)).unbind(0)
    model, rate = module_of(args.net).spec(task.cfg), schedules.warmup_cosine(args.learning_rate, steps // 20, steps)
    adamw = optimizers.adamw(rate, weight_decay=args.weight_decay, mask=lambda name, leaf: leaf.ndim >= 2)
    optimizer = optimizers.chain(optimizers.clip_by_global_norm(1.0), adamw)
    start = functools.partial(create, model=model, optimizer=optimizer)
    if task.members:
        state = torch.vmap(start)(random.split(create_key, task.members).to(run.device))
        state = tree.map(torch.Tensor.contiguous, state)  # vmap repeats what the members share, such as the step
        step = torch.vmap(make_step(task.loss, optimizer, policy=run.policy, compile=False))
        step = compiled(step) if args.common.compile else step
    else:
        state = start(create_key.to(run.device))
    parameters, every = tree.count(state.params), args.eval_every or task.per_epoch
    state = run.restore(state, task.identity, steps, model)
    if not task.members:
        options = {"policy": run.policy, "distributed": run.distributed, "compile": args.common.compile}
        step = make_step(task.loss, optimizer, donate=True, **options)

    with run.open(task.config, best=task.best, files=task.files):
        run.log.print(f"{parameters:,} parameters; run in {run.folder}")
        batches = (task.batch(order_key, t) for t in run.remaining)
        for at, batch in run.steps(batches):
            state, metrics = step(state, tree.move(batch, run.device))
            run.record(at, metrics, max(1, task.members) * args.batch)
            figures = {}
            if at % every == 0 or at == steps:  # not where a signal stops it: that checkpoint cannot be the best one
                figures = task.validate(run.whole(state.params))
                run.log.metrics(at, {f"validation/{name}": value for name, value in figures.items()})
            if run.due(at, args.common.save_every) or figures:
                run.save(at, state, **figures)
        best = open_run(run.folder, RUNS, "best")
        figures = task.study(run.folder, part.load(best, run.device))
        run.result({**figures, "parameters": parameters, "best_step": best.step})
    curves = read_curves(run.folder, "train/loss", "validation/loss")
    plots.curves(run.folder / "loss.png", curves, ylabel="nats", title=f"Loss of {args.task}")
    if args.task == "classify":
        curves = read_curves(run.folder, "train/accuracy", "validation/accuracy")
        plots.curves(run.folder / "accuracy.png", curves, ylabel="accuracy", title="Accuracy")
    ratio = "; {rmse_over_sigma:.3g} sigma, best possible {least_rmse:.4g}" if "least_rmse" in figures else ""
    simple = f"TF-IDF: {figures['tf_idf_accuracy']:.2%}, " if "tf_idf_accuracy" in figures else ""
    member = f" (a member: {figures['member_accuracy']:.2%})" if "member_accuracy" in figures else ""
    print((SUMMARY[args.task] + ratio).format(**figures, tf_idf=simple, member=member))
    print(f"{run.at} steps in {run.seconds:.0f} s, the best was {best.step}; files in {run.folder}/")


def arguments_of(run: SavedRun, column: str | None) -> Args:
    """The arguments of a run. Raises ValueError: there is a column, and the run classifies."""
    trained = run.read("args", Args)
    if column and trained.task == "classify":
        raise ValueError(f"--column '{column}' is that of a CSV, and '{run.folder}' classifies texts")
    return trained


def evaluate(args: EvaluateArgs) -> None:
    """Figures of a run's net on its test part, or on other data."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    trained = arguments_of(run, args.column)
    model = TASKS[trained.task].load(run, device)
    if args.data and trained.task == "classify":
        records, skipped = labelled.open_test(args.data, model.classes)
        understood(print, {"data": args.data, "form": records.form, "records": len(records.texts), "skipped": skipped})
        test = ragged.encoded(records, model.classes, model.tokenizer, model.kind, model.longest)
        study = functools.partial(text_classifier.study, texts=records.texts, data=test)
    else:
        changes = {"data": args.data or trained.data, "column": args.column or trained.column}
        task = TASKS[trained.task].task_of(dataclasses.replace(trained, **changes), args.run)
        understood(print, task.facts)
        study = task.study
    folder = unused(args.out, args.run / "evaluations" / (Path(args.data or "test").resolve().name))
    folder.mkdir(parents=True)
    figures = study(folder, model)
    write_json(folder / "result.json", {**figures, "checkpoint": run.step})
    print("\n".join(f"{name:26}{value:.4g}" for name, value in figures.items()), f"files in {folder}/", sep="\n")


def predict(args: PredictArgs) -> None:
    """Classes of texts with their probabilities, or the values after the end of a series with their bands."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    trained = arguments_of(run, args.column)
    model = TASKS[trained.task].load(run, device)
    if trained.task == "forecast":
        if args.texts:
            raise ValueError(f"'{args.texts[0]}' is a text, and '{args.run}' forecasts; name a CSV with --file")
        changes = {"data": str(args.file or trained.data), "column": args.column or trained.column}
        source = dataclasses.replace(trained, **changes)
        forecaster.print_future(model, forecaster.open_series(source))
    else:
        text_classifier.print_classes(model, args.texts, args.file)


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, presets),
        root=RUNS,
        predict=(PredictArgs, predict),
        evaluate=(EvaluateArgs, evaluate),
    )
