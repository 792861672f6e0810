"""Which examples can training do without? Pruning a data set by the scores of "Deep Learning on a Data Diet".

Paul et al. 2021 (arXiv:2107.07075) score every example early in training: GraNd is the norm of its gradient, EL2N that
of its error softmax(z) - onehot(y), each averaged over several nets; what scores low is left out. Kirsch 2023
(arXiv:2303.14753) found that GraNd at initialisation, also proposed there, is no better than chance: here it is the
negative control. Sorscher et al. 2022 (arXiv:2206.14486) show that of a small set the easy examples should be kept.

    python experiments/prune.py                      about a minute on 2 CPU cores
    python experiments/prune.py --data FOLDER --steps 2000 --early 200 --batch 64 --seeds 3 --kept 0.6 0.3 0.1
                                                     MNIST, or a set in its format; about 10 minutes

A thousand digits are scored by ten nets; then 232 nets, one for each score, end of the ranking, kept fraction and seed,
learn for equally many steps in one compiled call. Those of one seed start alike, those of one score share its ranking.
Expected, all examples 97.3 % right; 80, 60, 40 and 20 % of them: random 97.1, 96.7, 95.8, 93.8; hardest by EL2N 97.6,
97.7, 97.3, 90.6; by early GraNd 97.6, 97.7, 97.2, 85.3; by GraNd at initialisation 96.8, 96.0, 95.2, 87.8. So at 20 %
chance wins; the easiest by EL2N or early GraNd are the worst throughout (67.1 and 67.2 at 20 %).
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core import random, scores, tree
from nets.classifiers import mlp
from train import optimizers, plots
from train.data import batching
from train.data.images import arrays
from train.gradients.stream import stream
from train.losses import cross_entropy
from train.optimizers import schedules
from train.run import command_line
from train.run import run as runs
from train.step import create, make_step

RUNS = Path("runs/prune")
TEST_DIGITS = 797  # of 1797
SCORES = ("EL2N early", "GraNd early", "GraNd at initialisation")
ENDS = ("hardest", "easiest")  # which end of a ranking is kept
DEVIATION = functools.partial(np.std, ddof=1)


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits" (in scikit-learn), or a folder with the four files of MNIST or of a set in its format."""
    kept: tuple[float, ...] = (0.8, 0.6, 0.4, 0.2)
    """Fractions of the examples to train on; besides, nets are trained on all of them."""
    seeds: int = 8
    """Nets trained for each score, end of the ranking and fraction."""
    scorers: int = 10
    """Nets over which a score is averaged."""
    early: int = 60
    """Training steps before the early scores are taken."""
    widths: tuple[int, ...] = (128,)
    """Widths of the hidden layers."""
    steps: int = 600
    """Training steps, whatever fraction is kept; the learning rate falls to 0 over all of them."""
    batch: int = 50
    """Examples a step and net, drawn from those that are kept, with replacement."""
    learning_rate: float = 3e-3
    """Learning rate at the beginning."""
    save_every: int = 200
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random: initial values, order of the data, what is kept at random."""
    name: str | None = None
    """Folder under runs/prune; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    compile: bool = True
    """Compile the train step with torch.compile."""


class Member(NamedTuple):
    """A net of the ensemble, which learns from the first `size` examples of an order of them."""

    curve: str
    kept: float
    seed: int
    order: int
    size: int


def read(args: Args) -> tuple[arrays.Labelled, arrays.Labelled, mlp.Config]:
    """(train, test, the net that fits them)."""
    train, test = arrays.digits(TEST_DIGITS) if args.data == "digits" else arrays.mnist(args.data)
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    return train, test, mlp.Config((train.images[0].numel(), *args.widths, classes))


def losses(params: tree.Tree, batch: arrays.Labelled, cfg: mlp.Config) -> Tensor:
    """(N,)."""
    return cross_entropy(mlp.apply(params, batch.images, cfg), batch.labels, reduction="none")


def created(keys: Tensor, cfg: mlp.Config, optimizer: optimizers.Optimizer) -> tree.Tree:
    """The states that nets begin with, one a key, stacked."""
    states = torch.vmap(functools.partial(create, model=mlp.spec(cfg), optimizer=optimizer))(keys)
    return tree.map(torch.Tensor.contiguous, states)  # vmap repeats what they share, such as the step


def draw(data: arrays.Labelled, orders: Tensor, rows: Tensor, sizes: Tensor, keys: Tensor, n: int) -> arrays.Labelled:
    """A batch (nets, n, ...): net i draws, with keys[i], from the first sizes[i] entries of orders[rows[i]]."""
    chosen = orders[rows[:, None], random.randint(keys, (n,), 0, sizes[:, None], torch.int64)]
    return arrays.Labelled(data.images[chosen], data.labels[chosen])


def score(args: Args, data: arrays.Labelled, cfg: mlp.Config, step, optimizer: optimizers.Optimizer) -> Tensor:
    """(SCORES, examples): each score, averaged over the scorers, who learn from all examples for `early` steps."""
    keys = random.split(random.fold_in(random.key(args.seed, data.labels.device), 2), args.scorers)
    states, count = created(keys, cfg, optimizer), len(data.labels)
    everything = torch.arange(count, device=keys.device)[None]
    rows = torch.zeros(args.scorers, dtype=torch.int64, device=keys.device)

    def scored(params: tree.Tree, name: str) -> dict[str, np.ndarray]:
        def function(batch: arrays.Labelled) -> dict[str, Tensor]:
            with torch.no_grad():
                logits = torch.vmap(functools.partial(mlp.apply, cfg=cfg), in_dims=(0, None))(params, batch.images)
            found = scores.grand(functools.partial(losses, cfg=cfg), params, batch, ensemble=True)
            return {"EL2N": scores.el2n(logits, batch.labels), "GraNd": found}

        return stream(function, data, 500, keep=("EL2N", "GraNd"), title=f"scores {name}").kept

    initially = scored(states.params, "at initialisation")
    draws = random.fold_in(keys, 2)  # `create` has used numbers 0 and 1
    for at in range(args.early):
        states, _ = step(states, draw(data, everything, rows, rows + count, random.fold_in(draws, at), args.batch))
    early = scored(states.params, f"after {args.early} steps")
    return torch.from_numpy(np.stack([early["EL2N"], early["GraNd"], initially["GraNd"]]))


def plan(args: Args, found: Tensor, key: Tensor) -> tuple[Tensor, list[Member]]:
    """Orders (orders, examples) of the examples by the scores found (SCORES, examples) or by chance, and all nets."""
    seeds, count = range(args.seeds), found.shape[1]
    orders = [random.permutation(k, count) for k in random.split(key, args.seeds)]
    members = [Member("all", 1.0, seed, 0, count) for seed in seeds]
    curves = {"random": list(seeds)}
    for name, values in zip(SCORES, found.to(key.device), strict=True):
        for end in ENDS:
            curves[f"{name}, {end}"] = [len(orders)] * args.seeds
            orders.append(values.argsort(descending=end == "hardest", stable=True))
    for curve, rows in curves.items():
        for kept in args.kept:
            members += [Member(curve, kept, seed, rows[seed], max(1, round(kept * count))) for seed in seeds]
    return torch.stack(orders), members


@torch.no_grad()
def accuracies(params: tree.Tree, test: arrays.Labelled, cfg: mlp.Config) -> Tensor:
    """(nets,)."""
    apply = torch.vmap(functools.partial(mlp.apply, cfg=cfg), in_dims=(0, None))
    parts = [apply(params, test.images[part]).argmax(-1) for part in batching.evaluation_batches(len(test.labels), 500)]
    return (torch.cat(parts, 1) == test.labels).to(torch.float64).mean(1).cpu()


def study(args: Args, members: list[Member], right: Tensor, found: Tensor) -> dict:
    """The figures: accuracies by curve and fraction, a number a seed; what each curve gains over random examples, seed
    by seed, with its standard error; and the rank correlations (Spearman's) of the scores."""
    by: dict[str, dict[str, list[float]]] = {}
    for member, value in zip(members, right.tolist(), strict=True):
        by.setdefault(member.curve, {}).setdefault(f"{member.kept:g}", []).append(value)
    gains: dict[str, dict[str, dict[str, float]]] = {curve: {} for curve in list(by)[2:]}
    for curve, found_by in gains.items():
        for kept, values in by[curve].items():
            gain = np.subtract(values, by["random"][kept])
            found_by[kept] = {"mean": gain.mean(), "standard_error": DEVIATION(gain) / args.seeds**0.5}
    correlation = torch.corrcoef(found.argsort(1).argsort(1).double())
    return {"accuracy": by, "gain_over_random": gains, "scores": SCORES, "rank_correlation": correlation}


def draw_pictures(args: Args, folder: Path, figures: dict, found: Tensor, data: arrays.Labelled) -> None:
    with plots.panels(folder / "prune.png", 1, 2, width=5.0) as panels:
        for axes, end in zip(panels, ENDS, strict=True):
            names = {"random": "random", **{f"{name}, {end}": name for name in SCORES}}
            for (curve, label), colour in zip(names.items(), ("#888888", *plots.COLOURS), strict=False):
                rows = np.array(list(figures["accuracy"][curve].values()))
                mean, deviation = (100 * f(rows, axis=1) for f in (np.mean, DEVIATION))
                style = {"color": colour, "label": label, "marker": "o", "ms": 4, "capsize": 3}
                axes.errorbar(100 * np.array(args.kept), mean, deviation, **style)
            axes.axhline(
                100 * np.mean(figures["accuracy"]["all"]["1"]), color=plots.INK, lw=1, ls=":", label="all examples"
            )
            plots.curves(axes, {}, "kept (%)", "test accuracy (%), mean and deviation", f"The {end} kept")
            axes.legend(frameon=False, fontsize=9, loc="lower right")
    for name, values in zip(SCORES, found, strict=True):
        best = values.argsort(descending=True, stable=True)
        chosen = torch.cat([best[:12], best.flip(0)[:12]]).to(data.labels.device)
        labels, title = [str(int(label)) for label in data.labels[chosen]], f"{name}: hardest above, easiest below"
        path = folder / f"{name.replace(' ', '_').lower()}.png"
        plots.image_grid(path, data.images[chosen], 12, labels, title, 0.8)


def table(args: Args, figures: dict) -> str:
    """Test accuracies: mean and standard deviation over the seeds."""
    lines = [f"{'kept':<34}" + "".join(f"{kept:>16.0%}" for kept in (1.0, *args.kept))]
    everything = figures["accuracy"]["all"]["1"]
    for curve, by in list(figures["accuracy"].items())[1:]:
        cells = [f"{np.mean(x):.2%} ± {100 * DEVIATION(x):.2f}" for x in (everything, *by.values())]
        lines.append(f"{curve:<34}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def train(args: Args) -> None:
    origin, args = runs.begin(RUNS, args, free=("save_every", "device", "compile"))
    command_line.at_least_one(scorers=args.scorers, early=args.early, steps=args.steps, batch=args.batch)
    command_line.at_least_one(save_every=args.save_every, widths=min(args.widths, default=1))
    command_line.positive(learning_rate=args.learning_rate)
    if args.early > args.steps:
        raise ValueError(f"--early is {args.early}; expected at most --steps, {args.steps}")
    if args.seeds < 2:
        raise ValueError(f"--seeds is {args.seeds}; expected at least 2, for the error bars")
    if not args.kept or not all(0.0 < kept < 1.0 for kept in args.kept) or len(set(args.kept)) < len(args.kept):
        raise ValueError(f"--kept is {args.kept}; expected different fractions between 0 and 1")
    device, (learn, test, cfg) = command_line.device(args.device), read(args)
    learn, test = tree.move((learn, test), device)
    key, optimizer = random.key(args.seed, device), optimizers.adamw(schedules.cosine(args.learning_rate, args.steps))
    step = make_step(lambda params, batch, keys: losses(params, batch, cfg).mean(), optimizer, compile=False)
    step = torch.vmap(step)
    if origin.folder is None:
        print(f"scoring {len(learn.labels)} examples by {args.scorers} nets ...", flush=True)
        found = score(args, learn, cfg, step, optimizer)
    else:
        found = torch.from_numpy(np.load(origin.folder / "scores.npy"))
    orders, members = plan(args, found, random.fold_in(key, 3))
    rows, sizes = (torch.tensor([getattr(m, name) for m in members], device=device) for name in ("order", "size"))
    keys = random.fold_in(random.fold_in(key, 4), torch.tensor([m.seed for m in members], device=device))
    identity = {"net": cfg, "members": len(members), "examples": {"train": len(learn.labels), "test": len(test.labels)}}
    states = runs.restore(origin, created(keys, cfg, optimizer), identity, args.steps)
    if args.compile:
        step = torch.compile(step, fullgraph=True, dynamic=False)
    config = {"args": args, **identity, "torch": torch.__version__}
    files = {"scores.npy": lambda path: np.save(path, found.numpy())}
    with runs.opened(origin, config, total=args.steps, files=files) as run:
        run.log.print(f"{len(members)} nets of {tree.count(mlp.spec(cfg)):,} parameters each; run in {run.folder}")
        if args.compile and run.first < args.steps:
            run.log.print("compiling the train step ...")
        at = run.first
        for at in range(run.first + 1, args.steps + 1):
            draws = random.fold_in(random.fold_in(keys, 2), at)
            states, metrics = step(states, draw(learn, orders, rows, sizes, draws, args.batch))
            runs.check_finite(run, at, metrics)
            last = at == args.steps or run.stop.requested
            run.log.progress(at, len(members) * args.batch, loss=metrics["loss"].mean())
            if at % 10 == 0 or last:
                run.log.metrics(at, {f"train/{name}": values.mean() for name, values in metrics.items()})
            if at % args.save_every == 0 or last:
                runs.save(run, at, states)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        figures = study(args, members, accuracies(states.params, test, cfg), found)
        run.log.result({**figures, "steps": at, "seconds": seconds, "examples": len(learn.labels)})
        draw_pictures(args, run.folder, figures, found, learn)
    print(f"{table(args, figures)}\n{at} steps in {seconds:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train))
