"""Examination of a model on data by the gradient of every example: a page to look at, and tables.

The page, `report.html`, opens from disk, offline: a table of the examples to sort and search, linked plots, the most
suspicious labels, the most redundant and the most conflicting pairs, histograms by class and by layer. GraNd and EL2N:
Paul et al. 2021 (arXiv:2107.07075); self-influence: Koh and Liang 2017 (arXiv:1703.04730), by sketches as Park et al.
2023 (arXiv:2303.14186); noise scale: McCandlish et al. 2018 (arXiv:1812.06162).

    python experiments/examine.py                                        about half a minute on 2 CPU cores
    python experiments/examine.py --model cifar-resnet8 --data FOLDER    a net that first learns from these pictures
    python experiments/examine.py --model runs/classify/NAME --data FOLDER
    python experiments/examine.py --model torchvision:resnet18 --data FOLDER
    python experiments/examine.py --model timm:resnet10t --weights FILE.pth --data FOLDER
    python experiments/examine.py --model transformers:FOLDER --data FILE.csv
    python experiments/examine.py --model python:FILE.py:FUNCTION --data python:FILE.py:FUNCTION
    python experiments/examine.py --model gpt --data LINES.txt           losses of texts, without labels

Without a flag 5 % of the labels of scikit-learn's digits are made wrong, and a small net learns from them; five others
that each leave a fifth out say how probable a label is to a net that has not seen it.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core import per_example, random, scores, tree
from core.tree import Tree
from experiments.parts import cross_validation, examined_page
from experiments.parts.examined_models import LANGUAGE, TEXTS, open_subject
from experiments.parts.examined_subject import Source, Subject
from experiments.parts.wrong_labels import average_precision, flip
from train import optimizers
from train.data.fingerprint import fingerprint
from train.data.text.labelled import Columns
from train.data.understood import understood
from train.gradients.examination import Examination, examine
from train.optimizers import recipes, schedules
from train.run import Common, Count, Natural, Positive, Rate, Run, Shared, begin, command_line
from train.step import compiled, make_step

RUNS = Path("runs/examine")


@dataclass(frozen=True)
class Args:
    model: str = "mlp"
    """"mlp", or a preset of nets.classifiers; "bert" for labelled texts, "gpt" for lines: these learn from the data
    first. A run's folder (of classify, finetune_text, gpt, generate, pretrain); torchvision:NAME, timm:NAME,
    transformers:FOLDER_OR_ID; or python:FILE.py:FUNCTION, which returns an nn.Module or (params, apply)."""
    data: str = "digits"
    """Pictures as in classify.py: "digits", "mnist" ... or a folder; texts: a file with labels (CSV, TSV, JSON lines),
    "docstrings", or for language models lines; or python:FILE.py:FUNCTION, which returns (inputs, labels)."""
    weights: str | None = None
    """State dict for torchvision:NAME and timm:NAME, with a head for the classes of the data; published if None."""
    text_column: str | None = None
    """Name of the column, or key, of the texts; what the file itself shows if None."""
    label_column: str | None = None
    """Name of the column, or key, of the labels."""
    examples: Count | None = None
    """Number of examples, a random choice; all if None."""
    size: Count | None = None
    """Pixels per side that the model sees; its own, or those of the data, if None."""
    longest: Count = 64
    """Tokens of a text that the model sees, at most."""
    only: tuple[str, ...] = ()
    """Patterns of parameters whose gradients count, such as "head*"; all if empty."""
    flipped: Rate = 0.05
    """Share of the labels that are made wrong, to see whether they come first."""
    folds: Natural = 5
    """Nets that learn beside the first and each leave a part of the examples out; 0 for none."""
    epochs: Positive = 10.0
    """Passes over the examples of a net that learns first."""
    batch: Count = 50
    """Examples per training step."""
    learning_rate: Positive = 3e-3
    """Peak learning rate of AdamW."""
    chunk: Count = 64
    """Examples at a time while their gradients are examined."""
    sketch: Count = 512
    """Size of the sketch of a gradient; neighbours and self-influence are as exact as 1 / sqrt(sketch)."""
    neighbours: Count = 8
    """Neighbours per example."""
    pairs: Count = 20
    """Redundant and conflicting pairs."""
    damping: Positive = 0.1
    """Damping of the self-influence, as a multiple of the curvature's mean eigenvalue."""
    rows: Count = 10_000
    """Examples on the page, the most suspicious and a random choice of the others; the tables have all."""
    workers: Natural = 2
    """Processes that decode files."""
    common: Shared = Common(compile=False)


def presets(words: dict[str, str]) -> Args:
    """Wrong labels and folds for the digits alone; data for the texts' nets; one short training for all others."""
    model = words.get("model", "mlp")
    if model in (LANGUAGE, TEXTS):
        return Args(data="docstrings", flipped=0.0, folds=0, epochs=3.0, batch=32, learning_rate=1e-3)
    if words.get("data", "digits") == "digits" and not (":" in model or "/" in model):
        return Args()
    return Args(flipped=0.0, folds=0, epochs=3.0, batch=64)


def prepared(args: Args, subject: Subject, key: Tensor) -> tuple[Subject, Tensor | None]:
    """The subject with the labels that are examined, and which of them were made wrong; checked.

    Raises ValueError: the flags do not fit the model or the data.
    """
    count, labels, wrong = len(subject.examples.names), subject.labels, None
    if count < 2:
        raise ValueError(f"'{args.data}' gives one example; expected at least two")
    if subject.params is not None and args.folds:
        raise ValueError(f"--folds {args.folds} is for nets that learn first; '{args.model}' has learned already")
    if subject.learn and args.batch > count - count // max(2, args.folds) * bool(args.folds):
        raise ValueError(f"--batch is {args.batch}, too large for {count} examples to learn from")
    if labels is None and (args.flipped or args.folds):
        raise ValueError(f"'{args.data}' has no labels; expected --flipped 0 --folds 0")
    if args.flipped:
        number = round(args.flipped * count)
        if not 0 < number:
            raise ValueError(f"--flipped is {args.flipped}; expected a share of {count} labels, not none")
        labels, wrong = flip(labels, len(subject.examples.classes), number, key)
        subject = subject._replace(examples=subject.examples._replace(labels=labels))
        subject = subject._replace(data={**subject.data, "labels": labels})
    return subject, wrong


def check_fit(args: Args, subject: Subject, values: Tree) -> None:
    """Raise ValueError if the loss of two examples cannot be computed, or has another shape; or --only fits nothing."""
    recipes.check_patterns(values, args.only)
    two = tree.map(lambda x: x[:2], subject.data)
    try:
        with torch.no_grad():
            losses, aux = subject.loss(values, tree.move(two, tree.leaves(values)[0].device))
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        shape = tuple(tree.leaves(subject.data["inputs"])[0].shape[1:])
        problem = f"{type(error).__name__}: {line}"
        raise ValueError(f"--model '{args.model}' does not take the data, of shape {shape}: {problem}") from error
    classes = len(subject.examples.classes)
    if "logits" in aux and aux["logits"].shape != (2, classes):
        shape = tuple(aux["logits"].shape)
        raise ValueError(f"--model '{args.model}' returns {shape} for 2 examples; expected (2, {classes}) logits")
    if subject.params is not None:  # a module of others may have no gradients per example, which is said at once
        own, rest = divided(args, subject.params)
        per_example.plan(lambda p, b: subject.loss(tree.merge(p, rest, subject.stats), b), own, two, has_aux=True)


def main(args: Args) -> None:
    run = begin(RUNS, args, free=("data", "rows", "workers"))
    keys = random.split(random.key(args.common.seed), 6).unbind(0)
    choice_key, create_key, flip_key, fold_key, order_key, sketch_key = keys
    columns = Columns(args.text_column, args.label_column)
    places = (args.size, args.longest, args.workers, args.weights)
    subject = open_subject(args.model, Source(args.data, columns, args.examples, choice_key, *places), create_key)
    subject, wrong = prepared(args, subject, flip_key)
    count = len(subject.examples.names)
    flips = None if wrong is None else int(wrong.sum())
    understood(print, subject.examples.facts | {"model": args.model, "labels made wrong": flips})

    left_out = cross_validation.folds_of(count, args.folds, fold_key)
    rows = cross_validation.learned_from(count, left_out)
    steps = max(1, round(args.epochs * count / args.batch)) if subject.learn else 0
    identity = {"data": fingerprint(subject.data)}
    states, step = None, None
    if subject.learn:
        optimizer = optimizers.adamw(schedules.cosine(args.learning_rate, steps), weight_decay=0.01)
        states = cross_validation.states_of(create_key.to(run.device), len(rows), subject.model, optimizer)
        check_fit(args, subject, tree.merge(*cross_validation.member(states, 0)))
        step = torch.vmap(make_step(subject.learn, optimizer, policy=run.policy, compile=False))
        step = compiled(step) if args.common.compile else step
    else:
        params, stats = tree.move((subject.params, subject.stats), run.device)
        check_fit(args, subject, tree.merge(params, stats))
    states = run.restore(states, identity, steps) if states is not None else run.restore((), identity, steps)

    with run.open({"examples": count}):
        batches = (cross_validation.batch_at(subject.data, rows, order_key, t, args.batch) for t in run.remaining)
        for at, batch in run.steps(batches):
            states, metrics = step(states, tree.move(batch, run.device))
            run.record(at, metrics, args.batch * len(rows), loss=metrics["loss"].mean())
            if run.due(at, args.common.save_every):
                run.save(at, states)
        figures, held_out = {}, None
        if subject.learn:
            params, stats = cross_validation.member(states, 0)
            held_out = cross_validation.held_out(subject.loss, states, subject.data, left_out)
        run.log.print(f"{tree.count(params):,} parameters; run in {run.folder}")
        out = examined(run, subject, params, stats, sketch_key)
        suspicion = None
        if out.log_probs is not None:
            suspicion = scores.label_suspicion(out.log_probs, subject.labels, held_out).numpy()
            figures["accuracy"] = float((out.log_probs.argmax(1) == subject.labels).float().mean())
        figures |= test_figures(subject, tree.merge(params, stats))
        if wrong is not None:
            figures |= ranking(torch.from_numpy(suspicion), out, held_out, subject.labels, wrong)
        figures |= {"loss": float(out.scores["loss"].mean()), "noise_scale": out.noise_scale, "examples": count}
        figures |= {"skipped": subject.examples.skipped, "parameters": tree.count(params)}
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # kilobytes on Linux
        size = examined_page.write(run.folder, args, subject, out, suspicion, held_out, wrong, figures, memory)
        run.result({name: value for name, value in figures.items() if value == value and abs(value) < float("inf")})
    print(examined_page.summary(figures))
    print(f"peak memory {memory:,.0f} MiB; the page has {size / 2**20:.1f} MiB; open {run.folder / 'report.html'}")
    print(f"{run.seconds:.0f} s; files in {run.folder}/")


def divided(args: Args, params: Tree) -> tuple[Tree, Tree]:
    """(the parameters that --only names, the others)."""
    return tree.partition(params, lambda name, _: not args.only or recipes.matches(name, args.only))


def examined(run: Run, subject: Subject, params: Tree, stats: Tree, key: Tensor) -> Examination:
    """The gradients of all examples, by the parameters that --only names."""
    args = run.args
    own, rest = divided(args, params)

    def loss(own: Tree, batch: Tree):
        return subject.loss(tree.merge(own, rest, stats), batch)

    folder = run.folder / "gradients"
    sizes = {"size": args.sketch, "neighbours": args.neighbours, "pairs": args.pairs, "damping": args.damping}
    options = {"labels": subject.labels, "folder": folder, "resume": folder.exists(), "identity": {"at": run.at}}
    try:
        return examine(loss, own, subject.data, args.chunk, key=key, **sizes, **options)
    except KeyboardInterrupt:
        run.log.print(f"stopped; continue with: python experiments/examine.py --resume --name {run.folder.name}")
        raise


def test_figures(subject: Subject, values: Tree) -> dict[str, float]:
    """Accuracy on other examples, beside that of always the commonest class."""
    if subject.test is None:
        return {}
    labels = subject.test["labels"]
    predicted = cross_validation.log_probabilities(subject.loss, values, subject.test, torch.arange(len(labels)))
    commonest = subject.labels.mode().values
    figures = {"test_accuracy": predicted.argmax(1) == labels, "commonest_class_accuracy": labels == commonest}
    return {name: float(right.float().mean()) for name, right in figures.items()}


def ranking(suspicion: Tensor, out: Examination, held_out: Tensor | None, labels: Tensor, wrong: Tensor) -> dict:
    """Average precision of the labels that were made wrong, by the suspicion and by single scores."""
    values = {"suspicion": suspicion, "loss": torch.from_numpy(out.scores["loss"])}
    if held_out is not None:
        values["held_out"] = -scores.label_probability(held_out, labels)
    values |= {name: torch.from_numpy(out.scores[name]) for name in ("norm", "self_influence")}
    figures = {f"{name}_average_precision": average_precision(x, wrong) for name, x in values.items()}
    first = suspicion.argsort(descending=True, stable=True)[: int(wrong.sum())]
    return figures | {"wrong_among_first": float(wrong[first].double().mean()), "wrong": int(wrong.sum())}


if __name__ == "__main__":
    command_line.run(__doc__, (Args, main, presets), root=RUNS)
