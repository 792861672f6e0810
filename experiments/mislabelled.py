"""Finding wrong labels by what single examples do to a net: losses, gradient norms, influence and TracIn side by side.

A tenth of the labels of scikit-learn's digits is made wrong, a small net is trained on all of them, and the scores of
`core.scores` rank the examples; the wrong labels should come first. After training: the loss; EL2N and GraNd (Paul et
al. 2021, arXiv:2107.07075); self-influence by influence functions (Koh and Liang 2017, arXiv:1703.04730) with the
largest eigenvalues of the Gauss-Newton matrix (Schioppa et al. 2021, arXiv:2112.03052). Over snapshots of training: the
mean loss; self-influence by TracIn (Pruthi et al. 2020, arXiv:2002.08484).

    python experiments/mislabelled.py                                    about 30 seconds on 2 CPU cores
    python experiments/mislabelled.py --resume                           go on with the newest run
    python experiments/mislabelled.py --data FOLDER --examples 10000 --batch 100 --steps 3000 --snapshot-every 300
                                                                         MNIST, or a set in its format

It ends with the average precision of each score, and how much of what it ranks first is wrong indeed. Expected: average
precision 0.998 (mean loss), 0.991 (TracIn), 0.90 (loss, EL2N), 0.89 (influence), 0.88 (GraNd); by chance 0.10. As the
net learns wrong labels by heart, only scores that remember how it came to them still tell.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core import random, scores, tree
from core.curvature import ggn_vp, probe, top_eigenpairs
from nets.classifiers import mlp
from train import optimizers, plots
from train.data import batching
from train.data.images import arrays
from train.losses import accuracy, cross_entropy
from train.run import checkpoints, command_line
from train.run import run as runs
from train.step import create, make_step

RUNS = Path("runs/mislabelled")
PART = 1000  # examples scored at once
SHOWN = 20  # most suspicious examples, and as many among those with a right label
NAMES = {"loss": "loss", "el2n": "EL2N", "grand": "GraNd", "influence": "influence"}
NAMES |= {"mean_loss": "mean loss", "tracin": "TracIn"}


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits" (in scikit-learn), or a folder with the four files of MNIST or of a set in its format."""
    examples: int | None = None
    """How many training examples to take; all if not given."""
    flipped: float = 0.1
    """Fraction of the labels that are made wrong."""
    widths: tuple[int, ...] = (128,)
    """Widths of the hidden layers."""
    steps: int = 2000
    """Training steps."""
    batch: int = 50
    """Examples a step."""
    learning_rate: float = 0.05
    """Constant; of stochastic gradient descent."""
    momentum: float = 0.9
    """Of stochastic gradient descent."""
    snapshot_every: int = 100
    """Steps between two snapshots of the parameters, for TracIn and the mean loss; other scores see the last."""
    rank: int = 40
    """Eigenvalues of the Gauss-Newton matrix that the influence takes into account."""
    damping: float = 1e-3
    """What is added to these eigenvalues."""
    curvature_examples: int = 2000
    """The Gauss-Newton matrix is that of the first so many examples."""
    save_every: int = 500
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random: which labels are flipped, initial values, the order of the data."""
    name: str | None = None
    """Folder under runs/mislabelled; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


def flip(labels: Tensor, classes: int, count: int, key: Tensor) -> tuple[Tensor, Tensor]:
    """(labels of which `count` are another class, which ones: (N,) of bool)."""
    which_key, class_key = random.split(key).unbind(0)
    wrong = torch.zeros_like(labels, dtype=torch.bool)
    wrong[random.permutation(which_key, len(labels))[:count]] = True
    shift = random.randint(class_key, labels.shape, 1, classes).to(labels.dtype)
    return torch.where(wrong, (labels + shift) % classes, labels), wrong


def in_parts(score: Callable, data: arrays.Labelled) -> Tensor:
    """`score(part)` of all parts of the data, (N,)."""
    parts = batching.evaluation_batches(len(data.labels), PART)
    return torch.cat([score(tree.map(lambda x, part=part: x[part], data)) for part in parts])


def precision_recall(suspicion: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of "wrong if the score is at least t" for each t that occurs, the highest first."""
    values, ranked = suspicion.sort(descending=True, stable=True)
    last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool, device=values.device)])
    hits = wrong[ranked].cumsum(0)[last].double()
    return hits / (last.nonzero()[:, 0] + 1), hits / wrong.sum()


def average_precision(suspicion: Tensor, wrong: Tensor) -> float:
    """sum_t (recall_t - recall_t-1) precision_t."""
    precision, recall = precision_recall(suspicion, wrong)
    return float((recall.diff(prepend=recall.new_zeros(1)) * precision).sum())


def suspicions(snapshots: list[tree.Tree], data: arrays.Labelled, cfg: mlp.Config, args: Args, key: Tensor, say):
    """({score: (N,)}, the same of each snapshot for some); the higher, the more likely wrong."""

    def logits(p: tree.Tree, x: Tensor) -> Tensor:
        return mlp.apply(p, x, cfg)

    def loss(p: tree.Tree, batch: arrays.Labelled) -> Tensor:
        return cross_entropy(logits(p, batch.images), batch.labels, reduction="none")

    def at(p: tree.Tree) -> dict[str, Tensor]:
        return {
            "loss": in_parts(lambda part: loss(p, part), data),
            "el2n": in_parts(lambda part: scores.el2n(logits(p, part.images), part.labels), data),
            "grand": in_parts(lambda part: scores.grand(loss, p, part), data),
        }

    say(f"scoring {len(data.labels)} examples at {len(snapshots)} snapshots ...")
    history = [at(p) for p in snapshots]
    params, rates = snapshots[-1], [args.learning_rate] * len(snapshots)
    found = history[-1] | {"mean_loss": torch.stack([scored["loss"] for scored in history]).mean(0)}
    found["tracin"] = in_parts(lambda part: scores.tracin_self(loss, snapshots, rates, part), data)
    say(f"influence, by {args.rank} eigenvalues of the Gauss-Newton matrix ...")
    few = tree.map(lambda x: x[: args.curvature_examples], data)

    def product(v: tree.Tree) -> tree.Tree:
        return ggn_vp(lambda p: logits(p, few.images), lambda z: cross_entropy(z, few.labels), params, v)

    values, vectors, residuals = top_eigenpairs(product, probe(key, params), args.rank, 2 * args.rank + 50, "magnitude")
    say(f"... from {float(values[0]):.3g} to {float(values[-1]):.3g}, each within {float(residuals.max()):.1g}")

    influence, known = scores.low_rank_self_influence, (values, vectors, args.damping)
    found["influence"] = in_parts(lambda part: influence(loss, params, part, *known), data)
    return {name: found[name] for name in NAMES}, history


def draw(folder: Path, found: dict, history: list[dict], steps: list[int], data, true: Tensor, wrong: Tensor) -> None:
    """`precision_recall.png`, `scores.png` and `suspects.png`, the examples that TracIn ranks first."""
    with plots.panels(folder / "precision_recall.png", 1, 2, 5.0, 4.6) as (left, right):
        titles = {name: f"{NAMES[name]} {average_precision(found[name], wrong):.3f}" for name in found}
        lines = {titles[name]: precision_recall(found[name], wrong)[::-1] for name in found}
        plots.curves(left, lines, "recall", "precision", "Wrong labels found, and average precision")
        chance = float(wrong.double().mean())
        left.axhline(chance, color="#888888", ls=":", lw=1.6, label=f"chance {chance:.3f}")
        left.set(xlim=(-0.02, 1.02), ylim=(0, 1.05))
        left.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))
        lines = {NAMES[name]: (steps, [average_precision(x[name], wrong) for x in history]) for name in history[0]}
        plots.curves(right, lines, "step", "average precision", "At each snapshot of training")
        for name, colour in (("mean_loss", plots.COLOURS[4]), ("tracin", plots.COLOURS[5])):
            value = average_precision(found[name], wrong)
            right.axhline(value, color=colour, ls="--", lw=1.2, label=f"{NAMES[name]}, over all snapshots")
        right.legend(frameon=False, fontsize=9)
    with plots.panels(folder / "scores.png", 2, 3, 3.6, 3.0) as axes:
        for panel, (name, values) in zip(axes, found.items(), strict=True):
            values = values.double().clamp(min=1e-10 * float(values.max())).log10()
            groups = {"right label": values[~wrong], "wrong label": values[wrong]}
            plots.histogram(panel, groups, 40, f"log10 of {NAMES[name]}", log=True)
            panel.set_ylim(top=4 * panel.get_ylim()[1])  # room for the legend
            panel.legend(frameon=False, fontsize=9, ncols=2, loc="upper center")
    ranked = found["tracin"].argsort(descending=True)
    first = torch.cat([ranked[:SHOWN], ranked[~wrong[ranked]][:SHOWN]]).tolist()
    titles = [f"{int(data.labels[i])} → {int(true[i])}" if wrong[i] else f"{int(data.labels[i])} ✓" for i in first]
    heading = "Given label → true label: the most suspicious by TracIn; below, of those whose label is right"
    plots.image_grid(folder / "suspects.png", data.images[first], 10, titles, heading, scale=0.9)


def read(args: Args) -> tuple[arrays.Labelled, arrays.Labelled, mlp.Config]:
    """(train, test, the net that fits them)."""
    train, test = arrays.digits() if args.data == "digits" else arrays.mnist(args.data)
    if args.examples is not None and not 0 < args.examples <= len(train.labels):
        raise ValueError(f"--examples is {args.examples}; '{args.data}' has {len(train.labels)} to learn from")
    train = tree.map(lambda x: x[: args.examples], train)
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    return train, test, mlp.Config((train.images[0].numel(), *args.widths, classes))


def train(args: Args) -> None:
    free = ("steps", "save_every", "device", "rank", "damping", "curvature_examples")
    origin, args = runs.begin(RUNS, args, free)
    command_line.at_least_one(steps=args.steps, batch=args.batch, save_every=args.save_every, rank=args.rank)
    command_line.at_least_one(snapshot_every=args.snapshot_every, curvature_examples=args.curvature_examples)
    command_line.at_least_one(widths=min(args.widths, default=1))
    command_line.positive(learning_rate=args.learning_rate, damping=args.damping)
    taken = [*range(args.snapshot_every, args.steps + 1, args.snapshot_every)]
    if len(taken) < 2:
        raise ValueError(f"--snapshot-every is {args.snapshot_every}; expected at most half of --steps {args.steps}")
    device, (clean, test, cfg) = command_line.device(args.device), read(args)
    clean, test = tree.move((clean, test), device)
    total = len(clean.labels)
    count = round(args.flipped * total) if 0.0 < args.flipped < 1.0 else 0
    if not 0 < count < total:
        raise ValueError(f"--flipped is {args.flipped}; expected a fraction of {total} labels, not none or all")
    if args.batch > total:
        raise ValueError(f"--batch is {args.batch}, but there are {total} examples to learn from")
    key = random.key(args.seed, device)
    labels, wrong = flip(clean.labels, cfg.widths[-1], count, random.fold_in(key, 2))  # `create` uses 0 and 1
    data = clean._replace(labels=labels)
    model, optimizer = mlp.spec(cfg), optimizers.sgd(args.learning_rate, momentum=args.momentum)
    identity = {"net": cfg, "examples": {"train": total, "flipped": count, "test": len(test.labels)}}
    state = runs.restore(origin, create(key, model, optimizer), identity, args.steps)
    step = make_step(lambda p, b, _: cross_entropy(mlp.apply(p, b[0], cfg), b[1]), optimizer, compile=False)

    def snapshot(at: int) -> Path:
        return run.folder / "snapshots" / f"{at}.safetensors"

    with runs.opened(origin, {"args": args, **identity, "torch": torch.__version__}, total=args.steps) as run:
        run.log.print(f"{tree.count(model):,} parameters, {count} of {total} labels wrong; run in {run.folder}")
        snapshot(0).parent.mkdir(exist_ok=True)
        at = run.first
        for at in range(run.first + 1, args.steps + 1):
            chosen = batching.epoch_batch(random.fold_in(key, 3), at - 1, total, args.batch)
            state, metrics = step(state, (data.images[chosen], labels[chosen]))
            runs.check_finite(run, at, metrics)
            last = at == args.steps or run.stop.requested
            run.log.progress(at, args.batch, loss=metrics["loss"])
            if at % 10 == 0 or last:
                run.log.metrics(at, {f"train/{name}": value for name, value in metrics.items()})
            if at in taken:
                checkpoints.export_params(snapshot(at), state.params)
            if at % args.save_every == 0 or last:
                runs.save(run, at, state)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
    snapshots = [tree.move(checkpoints.import_params(snapshot(at), state.params), device) for at in taken]
    found, history = suspicions(snapshots, data, cfg, args, random.fold_in(key, 4), run.log.print)
    checkpoints.export_params(run.folder / "scores.safetensors", {**found, "label": labels, "wrong": wrong})
    draw(run.folder, found, history, taken, data, clean.labels, wrong)
    figures = {f"{name}_average_precision": average_precision(x, wrong) for name, x in found.items()}
    for name, x in found.items():
        figures[f"{name}_precision"] = float(wrong[x.argsort(descending=True)[:count]].double().mean())
    for name, (inputs, expected) in {"test": test, "train": data}.items():
        figures[f"{name}_accuracy"] = float(accuracy(mlp.apply(state.params, inputs, cfg), expected))
    run.log.result({**figures, "steps": at, "seconds": seconds, "parameters": tree.count(model)})
    scored = runs.seconds(run) - seconds
    print(f"score       average precision  precision of the first {count}")
    for name, title in NAMES.items():
        print(f"{title:<10} {figures[f'{name}_average_precision']:>18.3f}  {figures[f'{name}_precision']:.1%}")
    print("{test_accuracy:.1%} of the test digits right, {train_accuracy:.1%} of the labels learned".format(**figures))
    print(f"{at} steps in {seconds:.0f} s, scored in {scored:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train))
