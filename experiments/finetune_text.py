"""Texts classified by an encoder: BERT, DistilBERT or RoBERTa, fine-tuned or from scratch, whole or by LoRA.

Devlin et al. 2019 (arXiv:1810.04805). Without a flag a small BERT learns from scratch, offline, which package of
Python's library a docstring is from. Every figure stands beside that of TF-IDF with logistic regression:

    python experiments/finetune_text.py                                       a minute on 2 CPU cores
    python experiments/finetune_text.py --weights runs/pretrain/NAME          from a run of pretrain.py
    python experiments/finetune_text.py --weights FOLDER --data stsa.binary.train             SST-2; or an id of a hub
    python experiments/finetune_text.py --weights FOLDER --data stsa.binary.train --lora 8    adapters in peft's form
    python experiments/finetune_text.py --data FILE.jsonl --text-column body --label-column stars
    python experiments/finetune_text.py predict --run runs/finetune_text/NAME --count 3 "a gripping film"
    python experiments/finetune_text.py evaluate --run runs/finetune_text/NAME --data OTHER_FILE
    python experiments/finetune_text.py explain --run runs/finetune_text/NAME "a gripping film"
    python experiments/finetune_text.py influence-study --weights FOLDER --data stsa.binary.train

Expected of docstrings: 71.5 % from scratch, 77.0 % from a run of pretrain.py, 78.1 % by TF-IDF; of SST-2: MiniLM 88.9
%, TF-IDF 81.2 %.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core import random, tree
from experiments.parts import encoder as encoders
from experiments.parts import encoder_classifier, explanations, influences, labelled_texts, removal
from experiments.parts.encoder import Tuning
from experiments.parts.encoder_classifier import Classifier, Source
from train import plots
from train.data.fingerprint import fingerprint
from train.data.text import labelled, ragged, tf_idf
from train.data.text.labelled import Columns
from train.data.understood import understood
from train.files import write_json
from train.metrics.classification import worst_mistakes
from train.run import Common, Count, Fraction, FromBest, Positive, SavedRun, Shared, begin, command_line, open_run
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS
from train.run.run import unused
from train.step import make_step, start

RUNS = Path("runs/finetune_text")
FREE = ("source.data", "source.validation", "source.test", "eval_every")
FREE += tuple(f"tuning.{name}" for name in "epochs batch shapes learning_rate head_rate weight_decay".split())


@dataclass(frozen=True, kw_only=True)
class Args:
    eval_every: Count | None = None
    """Steps between evaluations on the validation part; those of an epoch if None."""
    source: Annotated[Source, tyro.conf.OmitArgPrefixes] = Source()
    tuning: Annotated[Tuning, tyro.conf.OmitArgPrefixes] = Tuning()
    common: Shared = Common(compile=False)


def presets(words: dict[str, str]) -> Args:
    options = {"shapes": 3 if "compile" in words else 4}  # more shapes cost nothing where none is compiled
    if "weights" not in words:
        options |= {"dropout": 0.0, "epochs": 12.0}
    if "lora" in words:
        options["learning_rate"] = 1e-3
    return Args(tuning=Tuning(**options))


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(FromBest):
    data: str | None = None
    """File of labelled texts of the run's classes; the run's own test part if None."""
    text_column: str | None = None
    """Name of the column of the texts; the run's if None."""
    label_column: str | None = None
    """Name of the column of the labels; the run's if None."""
    out: Path | None = None
    """New folder for the figures and pictures; RUN/evaluations/DATA, numbered if it exists, if None."""


@dataclass(frozen=True, kw_only=True)
class PredictArgs(FromBest):
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to classify; without any, the lines of --file or of standard input."""
    file: Path | None = None
    """File with a text per line."""
    count: Count = 1
    """Most probable classes that are printed per text."""


@dataclass(frozen=True, kw_only=True)
class ExplainArgs(FromBest):
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts whose classification is explained; without any, the worst mistakes in the test part."""
    count: Count = 5
    """Training texts that are shown for and against each prediction, and mistakes that are explained."""
    score: influences.Score = "influence"
    """influence: rise of the prediction's loss without the training text, by curvature. gradient, cosine: of the
    gradients of both losses."""
    leaves: Literal["head", "trained"] = "head"
    """Parameters whose gradients count: the head, or all that was trained, which takes a pass of training per text."""
    damping: Positive = 0.01
    """Damping, added to the curvature of the influence."""
    points: Count = explanations.POINTS
    """Points between a text of [MASK] and the text, at which integrated gradients are taken."""
    out: Path | None = None
    """New folder for the explanations; RUN/explanations/SCORE, numbered if it exists, if None."""


@dataclass(frozen=True, kw_only=True)
class StudyArgs:
    weights: str
    """Encoder whose head learns: a run of pretrain.py, a folder or Hugging Face id."""
    source: Annotated[Source, tyro.conf.OmitArgPrefixes] = Source()
    longest: Count = 64
    """Tokens of a text that the net sees, at most."""
    removed: Fraction = 0.05
    """Fraction of the training examples that is removed."""
    seeds: Count = 5
    """Seeds of the initial head, the order of the examples and the random removal; at least 2."""
    score: influences.Score = "influence"
    """Score by which examples help or harm the validation part."""
    damping: Positive = 0.01
    """Damping, added to the curvature of the influence."""
    epochs: Positive = 5.0
    """Passes over the training examples."""
    batch: Count = 64
    """Examples per step."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    out: Path | None = None
    """New folder for the figures; runs/finetune_text/influence-study, numbered if it exists, if None."""


SUMMARY = (
    "{accuracy:.2%} of the test texts right, NLL {nll:.4f}, ECE {calibration_error:.2%} "
    "(TF-IDF of {tf_idf_unit}: {tf_idf_accuracy:.2%}, commonest class: {commonest_class_accuracy:.2%})"
)


def train(args: Args) -> None:
    run, tuning = begin(RUNS, args, free=FREE, shards=BY_ROWS), args.tuning
    if tuning.lora and tuning.weights is None:
        raise ValueError("--lora adapts trained weights; name them with --weights")
    data = args.source.open()
    encoder_key, own_key, create_key, order_key = random.split(random.key(args.common.seed), 4).unbind(0)
    encoder = encoders.load(tuning, data.train.texts, "sequence", len(data.classes), key=encoder_key)
    data, parts, facts = encoder_classifier.prepare(encoder, data, tuning.longest)
    buckets = ragged.make_buckets(parts["train"].lengths, tuning.shapes, tuning.batch)
    widths = {"widths of batches": [bucket.width for bucket in buckets]}
    understood(print, {**facts, "weights": tuning.weights or "from scratch", **widths, "net": encoder.cfg})
    per_epoch = ragged.steps_per_epoch(buckets, tuning.batch)
    steps = max(1, round(tuning.epochs * per_epoch))
    identity = {"classes": data.classes, "data": fingerprint(*parts.values()), **encoders.identity(encoder, tuning)}
    encoder = encoder._replace(params=tree.move(encoder.params, run.device))
    own = encoders.trainable(encoder, tuning, own_key.to(run.device))
    optimizer = encoders.adamw(tuning, encoder, steps)
    loss = encoder_classifier.loss_of(encoder, own.whole, train=True)
    state = start(create_key.to(run.device), tree.map(lambda x: x.clone(), own.values), own.model, optimizer)
    state = run.restore(state, {"net": encoder.cfg, **identity}, steps, own.model)
    options = {"policy": run.policy, "distributed": run.distributed, "compile": args.common.compile}
    step = make_step(loss, optimizer, donate=True, **options)
    every, trained = args.eval_every or per_epoch, tree.count(own.model)

    config, files = encoders.stored(encoder), {"tokenizer.json": encoder.tokenizer.save}
    with run.open(config, best="error", files=files):
        run.log.print(f"{trained:,} of {tree.count(encoder.params):,} parameters; run in {run.folder}")
        batches = (ragged.batch_at(parts["train"], buckets, order_key, t, tuning.batch) for t in run.remaining)
        for at, batch in run.steps(batches):
            state, metrics = step(state, tree.move(batch, run.device))
            run.record(at, metrics, tuning.batch)
            figures = {}
            if at % every == 0 or at == steps:  # not where a signal stops it: that checkpoint cannot be the best one
                merged = encoder._replace(params=own.merged(run.whole(state.params)))
                figures = encoder_classifier.validate(merged, parts["validation"])
                run.log.metrics(at, {f"validation/{name}": value for name, value in figures.items()})
            if run.due(at, args.common.save_every) or figures:
                run.save(at, state, **figures)
        best = open_run(run.folder, RUNS, "best")
        model = encoder_classifier.load(best, run.device)
        log_probs = encoder_classifier.log_probabilities(model.encoder, parts["test"])
        figures = labelled_texts.study(run.folder, log_probs, parts["test"].labels, data.test.texts, data.classes)
        options = (data.test.texts, parts["test"].labels, log_probs)
        figures["attribution_error"] = explanations.write_attributions(run.folder, model, *options)
        figures |= {"best_step": best.step, "skipped": len(data.skipped)}
        simple = tf_idf.baselines(data)
        figures |= {f"{name}_accuracy": getattr(simple, name) for name in ("tf_idf", "commonest_class")}
        sizes = {"parameters": tree.count(encoder.params), "trained_parameters": trained}
        run.result({**figures, "tf_idf_unit": simple.unit, **sizes})
        if tuning.lora:
            encoders.write_adapters(run.folder, encoder, tuning, best.restore(own.model, "params"))
    curves = read_curves(run.folder, "train/loss", "validation/loss")
    plots.curves(run.folder / "loss.png", curves, ylabel="nats", title="Loss")
    curves = read_curves(run.folder, "train/accuracy", "validation/accuracy")
    plots.curves(run.folder / "accuracy.png", curves, ylabel="accuracy", title="Accuracy")
    print(SUMMARY.format(**figures, tf_idf_unit=simple.unit))
    print(f"{run.at} steps in {run.seconds:.0f} s, the best was {best.step}; files in {run.folder}/")


def evaluate(args: EvaluateArgs) -> None:
    """Figures of a run's classifier on its test part, or on other data."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    model, own = encoder_classifier.load(run, device), run.read("args", Args).source
    if args.data:
        columns = Columns(args.text_column or own.text_column, args.label_column or own.label_column)
        records, skipped = labelled.open_test(args.data, model.classes, columns)
        options = (model.classes, model.longest, "record")
        records, data, empty = encoder_classifier.encoded(model.encoder, records, *options)
        facts = {"data": args.data, "form": records.form, "records": len(records.texts), "skipped": [*skipped, *empty]}
    else:
        prepared = data_of(run, model)
        records, data, facts = prepared.data.test, prepared.parts["test"], prepared.facts
    understood(print, facts)
    folder = unused(args.out, args.run / "evaluations" / (Path(args.data or "test").resolve().name))
    folder.mkdir(parents=True)
    log_probs = encoder_classifier.log_probabilities(model.encoder, data)
    figures = labelled_texts.study(folder, log_probs, data.labels, records.texts, model.classes)
    write_json(folder / "result.json", {**figures, "checkpoint": run.step})
    print("\n".join(f"{name:26}{value:.4g}" for name, value in figures.items()), f"files in {folder}/", sep="\n")


def data_of(run: SavedRun, model: Classifier) -> encoder_classifier.Prepared:
    """The data that a run was trained on. Raises ValueError: it is not there any more, or is other data."""
    source = run.read("args", Args).source
    prepared = encoder_classifier.prepare(model.encoder, source.open(), model.longest)
    if fingerprint(*prepared.parts.values()) != run.config["data"]:
        raise ValueError(f"'{source.data}' has changed since '{run.folder}' was trained on it")
    return prepared


def predict(args: PredictArgs) -> None:
    """Classes of texts with their probabilities."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    model = encoder_classifier.load(run, device)
    classify = functools.partial(encoder_classifier.classify, model)
    labelled_texts.print_classes(classify, model.classes, args.texts, args.file, args.count)


def explain(args: ExplainArgs) -> None:
    """Contributions of tokens to a prediction, and the training texts that speak for and against it."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    model = encoder_classifier.load(run, device)
    data, parts, facts = data_of(run, model)
    understood(print, {**facts, "score": args.score, "gradients of": args.leaves})
    texts, labels = args.texts, [None] * len(args.texts)
    if not texts:
        log_probs = encoder_classifier.log_probabilities(model.encoder, parts["test"])
        rows = worst_mistakes(log_probs, parts["test"].labels, args.count).tolist()
        texts, labels = [data.test.texts[i] for i in rows], [data.test.labels[i] for i in rows]
        if not rows:
            raise ValueError("there is no mistake in the test part; name texts to explain")
    support = influences.supporter(run, model, parts["train"], args.score, args.leaves, args.damping)
    pairs = zip(texts, labels, strict=True)
    outs = [explanations.explain(model, text, label, support, args.points) for text, label in pairs]
    folder = unused(args.out, args.run / "explanations" / args.score)
    print("\n".join(explanations.write(folder, outs, data.train, args.count, args.score)))
    log_probs = encoder_classifier.log_probabilities(model.encoder, parts["train"])
    explanations.write_report(folder, outs, data.train, parts["train"].labels, model, log_probs)
    print(f"files in {folder}/")


def influence_study(args: StudyArgs) -> None:
    """Accuracy without the training examples that help most, beside as many at random: a head on a frozen encoder."""
    device = command_line.device(args.device)
    if args.seeds < 2:
        raise ValueError(f"--seeds is {args.seeds}; expected at least 2, for the deviations")
    data = args.source.open()
    tuning = Tuning(weights=args.weights, longest=args.longest, dropout=0.0)
    encoder = encoders.load(tuning, (), "sequence", len(data.classes), key=random.key(0))
    encoder = encoder._replace(params=tree.move(encoder.params, device))
    data, parts, facts = encoder_classifier.prepare(encoder, data, args.longest)
    understood(print, {**facts, "weights": args.weights, "score": args.score})
    folder = unused(args.out, RUNS / "influence-study")
    read = {name: influences.read(encoder, part) for name, part in parts.items()}
    recipe = removal.Recipe(args.epochs, args.batch, args.learning_rate)
    seeds = []
    for seed in range(args.seeds):
        options = (args.removed, recipe, args.score, args.damping, random.key(seed).to(device))
        seeds.append(removal.removals(encoder, read, *options))
        print(f"seed {seed}: " + ", ".join(f"{arm} {x['test']:.2%}" for arm, x in seeds[-1].items()), flush=True)
    changes = removal.summary(seeds)
    folder.mkdir(parents=True)
    write_json(folder / "result.json", {"args": args, "changes": changes})
    removal.draw(folder / "removal.png", changes, args.removed)
    print(removal.table(changes, args.removed), f"files in {folder}/", sep="\n")


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, presets),
        root=RUNS,
        predict=(PredictArgs, predict),
        evaluate=(EvaluateArgs, evaluate),
        explain=(ExplainArgs, explain),
        **{"influence-study": (StudyArgs, influence_study)},
    )
