"""Wrong labels found by per-example losses, gradient norms, influence and TracIn, side by side.

A tenth of the labels of scikit-learn's digits is made wrong, a small net is trained on all of them, and the scores of
`core.scores` rank the examples; the wrong labels should come first. After training: the loss; EL2N and GraNd (Paul et
al. 2021, arXiv:2107.07075); self-influence by influence functions (Koh and Liang 2017, arXiv:1703.04730) with the
largest eigenvalues of the Gauss-Newton matrix (Schioppa et al. 2021, arXiv:2112.03052). Over snapshots of training: the
mean loss; self-influence by TracIn (Pruthi et al. 2020, arXiv:2002.08484). Without a net: the share of the ten nearest
neighbours that have another label.

    python experiments/mislabelled.py                                    about 30 seconds on 2 CPU cores
    python experiments/mislabelled.py --resume --rank 100                other eigenvalues, without training anew
    python experiments/mislabelled.py --data FOLDER --examples 10000 --batch 100 --steps 3000 --snapshot-every 300
                                                                         MNIST, or any folder of images

It ends with the average precision of each score, and the share of wrong labels among those it ranks first. Expected:
average precision 0.991 (mean loss), 0.986 (TracIn), 0.984 (neighbours), 0.88 (influence), 0.87 (loss, EL2N, GraNd);
random 0.10. The net learns wrong labels by heart, so of its scores only those that remember its training tell.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core import random, scores, tree
from core.curvature import ggn_vp, probe, top_eigenpairs
from experiments.parts.wrong_labels import average_precision, flip, precision_recall
from nets.classifiers import mlp
from train import optimizers, plots
from train.data import batching
from train.data.fingerprint import fingerprint
from train.data.images import sets
from train.data.images.arrays import Labelled
from train.data.understood import understood
from train.losses import cross_entropy
from train.metrics.classification import accuracy
from train.run import Common, Count, Fraction, Positive, Rate, Run, Shared, begin, checkpoints, command_line
from train.step import create, make_step

RUNS = Path("runs/mislabelled")
PART = 1000  # examples scored at once
SHOWN = 20  # most suspicious examples, and as many among those with a right label
NEIGHBOURS = 10
NAMES = {"loss": "loss", "el2n": "EL2N", "grand": "GraNd", "influence": "influence"}
NAMES |= {"mean_loss": "mean loss", "tracin": "TracIn", "neighbours": "neighbours"}


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits" (in scikit-learn), "mnist", "cifar10" ... (downloaded once), or a folder of images."""
    examples: Count | None = None
    """Number of training examples, the first ones; all if None."""
    flipped: Fraction = 0.1
    """Share of the labels that are made wrong."""
    widths: tuple[Count, ...] = (128,)
    """Widths of the hidden layers."""
    steps: Count = 2000
    """Training steps."""
    batch: Count = 50
    """Examples per step."""
    learning_rate: Positive = 0.05
    """Learning rate of SGD, constant."""
    momentum: Rate = 0.9
    """Momentum of SGD."""
    snapshot_every: Count = 100
    """Steps between snapshots of the parameters, for TracIn and the mean loss; other scores see the last."""
    rank: Count = 40
    """Number of eigenvalues of the Gauss-Newton matrix in the influence."""
    damping: Positive = 1e-3
    """Damping, added to these eigenvalues."""
    curvature_examples: Count = 2000
    """Number of examples in the Gauss-Newton matrix: the first ones."""
    common: Shared = Common(compile=False)


def in_parts(score: Callable, data: Labelled) -> Tensor:
    """`score(part)` of all parts of the data, (N,)."""
    parts = batching.evaluation_batches(len(data.labels), PART)
    return torch.cat([score(tree.map(lambda x, part=part: x[part], data)) for part in parts])


def suspicions(snapshots: list[tree.Tree], data: Labelled, cfg: mlp.Config, args: Args, key: Tensor, write: Callable):
    """({score: (N,)}, some of them at each snapshot); the higher, the more likely wrong."""

    def logits(p: tree.Tree, x: Tensor) -> Tensor:
        return mlp.apply(p, x, cfg)

    def loss(p: tree.Tree, batch: Labelled) -> Tensor:
        return cross_entropy(logits(p, batch.images), batch.labels, reduction="none")

    def at(p: tree.Tree) -> dict[str, Tensor]:
        return {
            "loss": in_parts(lambda part: loss(p, part), data),
            "el2n": in_parts(lambda part: scores.el2n(logits(p, part.images), part.labels), data),
            "grand": in_parts(lambda part: scores.grand(loss, p, part), data),
        }

    def disagreement(part: Labelled) -> Tensor:
        distances = torch.cdist(part.images.flatten(1), data.images.flatten(1))  # (part, N)
        nearest = distances.topk(min(1 + NEIGHBOURS, len(data.labels)), largest=False).indices[:, 1:]  # not itself
        return (data.labels[nearest] != part.labels[:, None]).float().mean(1)

    write(f"scoring {len(data.labels)} examples at {len(snapshots)} snapshots ...")
    history, params = [at(p) for p in snapshots], snapshots[-1]
    out = history[-1] | {"mean_loss": torch.stack([values["loss"] for values in history]).mean(0)}
    rates = [args.learning_rate] * len(snapshots)
    out["tracin"] = in_parts(lambda part: scores.tracin_self(loss, snapshots, rates, part), data)
    out["neighbours"] = in_parts(disagreement, data)
    write(f"influence, by {args.rank} eigenvalues of the Gauss-Newton matrix ...")
    few = tree.map(lambda x: x[: args.curvature_examples], data)

    def product(v: tree.Tree) -> tree.Tree:
        return ggn_vp(lambda p: logits(p, few.images), lambda z: cross_entropy(z, few.labels), params, v)

    values, vectors, residuals = top_eigenpairs(product, probe(key, params), args.rank, 2 * args.rank + 50, "magnitude")
    write(f"... from {float(values[0]):.3g} to {float(values[-1]):.3g}, each within {float(residuals.max()):.1g}")
    influence, spectrum = scores.low_rank_self_influence, (values, vectors, args.damping)
    out["influence"] = in_parts(lambda part: influence(loss, params, part, *spectrum), data)
    return {name: out[name] for name in NAMES}, history


def draw(folder: Path, values: dict, history: list[dict], steps: list[int], data, true: Tensor, wrong: Tensor) -> None:
    """`precision_recall.png`, `scores.png` and `suspects.png`, the examples that TracIn ranks first."""
    with plots.panels(folder / "precision_recall.png", 1, 2, 5.0, 4.6) as (left, right):
        titles = {name: f"{NAMES[name]} {average_precision(values[name], wrong):.3f}" for name in values}
        lines = {titles[name]: precision_recall(values[name], wrong)[::-1] for name in values}
        plots.curves(left, lines, "recall", "precision", "Wrong labels found, and average precision")
        share = float(wrong.double().mean())
        left.axhline(share, color="#888888", ls=":", lw=1.6, label=f"random {share:.3f}")
        left.set(xlim=(-0.02, 1.02), ylim=(0, 1.05))
        left.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))
        lines = {NAMES[name]: (steps, [average_precision(x[name], wrong) for x in history]) for name in history[0]}
        plots.curves(right, lines, "step", "average precision", "At each snapshot of training")
        for name, colour in (("mean_loss", plots.COLOURS[4]), ("tracin", plots.COLOURS[5])):
            value = average_precision(values[name], wrong)
            right.axhline(value, color=colour, ls="--", lw=1.2, label=f"{NAMES[name]}, over all snapshots")
        right.legend(frameon=False, fontsize=9)
    with plots.panels(folder / "scores.png", 2, 3, 3.6, 3.0) as axes:
        for panel, name in zip(axes, NAMES, strict=False):  # but the neighbours, which are eleven numbers
            logs = values[name].double().clamp(min=1e-10 * float(values[name].max())).log10()
            groups = {"right label": logs[~wrong], "wrong label": logs[wrong]}
            plots.histogram(panel, groups, 40, f"log10 of {NAMES[name]}", log=True)
            panel.set_ylim(top=4 * panel.get_ylim()[1])  # room for the legend
            panel.legend(frameon=False, fontsize=9, ncols=2, loc="upper center")
    ranked = values["tracin"].argsort(descending=True)
    first = torch.cat([ranked[:SHOWN], ranked[~wrong[ranked]][:SHOWN]]).tolist()
    titles = [f"{int(data.labels[i])} → {int(true[i])}" if wrong[i] else f"{int(data.labels[i])} ✓" for i in first]
    heading = "Label in the data → true label: the most suspicious by TracIn; below, of those whose label is right"
    plots.image_grid(folder / "suspects.png", data.images[first], 10, titles, heading, scale=0.9)


def read(args: Args) -> tuple[sets.ImageSet, int]:
    """(images, number of wrong labels), checked."""
    images = sets.read_all(args.data, labelled=True)
    available = len(images.train.labels)
    if args.examples is not None and args.examples > available:
        raise ValueError(f"--examples is {args.examples}; '{args.data}' has {available} to learn from")
    images = images._replace(train=tree.map(lambda x: x[: args.examples], images.train))
    total = len(images.train.labels)
    count = round(args.flipped * total)
    if not 0 < count < total:
        raise ValueError(f"--flipped is {args.flipped}; expected a share of {total} labels, not none or all")
    if args.batch > total:
        raise ValueError(f"--batch is {args.batch}, but there are {total} examples to learn from")
    if 2 * args.snapshot_every > args.steps:
        raise ValueError(f"--snapshot-every is {args.snapshot_every}; expected up to half of --steps {args.steps}")
    return images, count


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("data", "steps", "rank", "damping", "curvature_examples"))
    (images, count), device = read(args), run.device
    cfg = mlp.Config((images.train.images[0].numel(), *args.widths, len(images.classes)))
    understood(print, sets.facts(images) | {"wrong labels": count, "net": cfg})

    create_key, flip_key, data_key, probe_key = random.split(random.key(args.common.seed), 4).unbind(0)
    clean, test = tree.move((images.train, images.test), device)
    labels, wrong = tree.move(flip(images.train.labels, len(images.classes), count, flip_key), device)
    learn, identity = clean._replace(labels=labels), {"net": cfg, "data": fingerprint(clean, labels, test)}
    model, optimizer = mlp.spec(cfg), optimizers.sgd(args.learning_rate, momentum=args.momentum)
    state = run.restore(create(create_key.to(device), model, optimizer), identity, args.steps)

    def loss(params: tree.Tree, batch: Labelled, keys: Tensor) -> Tensor:
        return cross_entropy(mlp.apply(params, batch.images, cfg), batch.labels, reduction="none")

    step = make_step(loss, optimizer, policy=run.policy, compile=args.common.compile)
    batches = (batching.epoch_batch(data_key, t, len(labels), args.batch) for t in run.remaining)
    moments = range(args.snapshot_every, args.steps + 1, args.snapshot_every)
    with run.open({"examples": {"train": len(labels), "flipped": count, "test": len(test.labels)}}):
        run.log.print(f"{tree.count(model):,} parameters; run in {run.folder}")
        (run.folder / "snapshots").mkdir(exist_ok=True)
        for at, indices in run.steps(batches):
            state, metrics = step(state, tree.map(lambda x, i=indices: x[i], learn))
            run.record(at, metrics, args.batch)
            if at in moments:
                checkpoints.export_params(run.folder / "snapshots" / f"{at}.safetensors", state.params)
            if run.due(at, args.common.save_every):
                run.save(at, state)
        report(run, state.params, learn, test, clean.labels, wrong, cfg, moments, probe_key.to(device))


def report(run: Run, params, learn: Labelled, test: Labelled, true: Tensor, wrong: Tensor, cfg, moments, key) -> None:
    """All scores, their figures and pictures."""
    files = [run.folder / "snapshots" / f"{at}.safetensors" for at in moments]
    snapshots = [tree.move(checkpoints.import_params(path, params), run.device) for path in files]
    values, history = suspicions(snapshots, learn, cfg, run.args, key, run.log.print)
    checkpoints.export_params(run.folder / "scores.safetensors", {**values, "label": learn.labels, "wrong": wrong})
    draw(run.folder, values, history, list(moments), learn, true, wrong)
    count = int(wrong.sum())
    figures = {f"{name}_average_precision": average_precision(x, wrong) for name, x in values.items()}
    for name, x in values.items():
        figures[f"{name}_precision"] = float(wrong[x.argsort(descending=True, stable=True)[:count]].double().mean())
    for name, part in {"test": test, "train": learn}.items():
        figures[f"{name}_accuracy"] = float(accuracy(mlp.apply(params, part.images, cfg), part.labels))
    run.result({**figures, "parameters": tree.count(params)})
    print(f"score       average precision  precision of the first {count}")
    for name, title in NAMES.items():
        print(f"{title:<10} {figures[f'{name}_average_precision']:>18.3f}  {figures[f'{name}_precision']:.1%}")
    print("{test_accuracy:.1%} of the test images right, {train_accuracy:.1%} of the labels learned".format(**figures))
    print(f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), root=RUNS)
