"""Data pruning by the scores of "Deep Learning on a Data Diet": which examples training can do without.

Paul et al. 2021 (arXiv:2107.07075) score every example early in training: GraNd is the norm of its gradient, EL2N that
of its error softmax(z) - onehot(y), each averaged over several nets; what scores low is left out. Kirsch 2023
(arXiv:2303.14753) found that GraNd at initialisation, also proposed there, is no better than random: here it is the
negative control. Sorscher et al. 2022 (arXiv:2206.14486) show that of a small set the easy examples should be kept.

    python experiments/prune.py                      about a minute on 2 CPU cores
    python experiments/prune.py --data FOLDER --steps 2000 --early 200 --batch 64 --seeds 3 --kept 0.6 0.3 0.1
                                                     MNIST, or any folder of images; about 10 minutes

A thousand digits are scored by ten nets; then 232 nets, one for each score, end of the ranking, kept fraction and seed,
learn for equally many steps in one compiled call. Those of one seed start alike, those of one score share its ranking.
Expected, all examples 97.2 % right; 80, 60, 40 and 20 % of them: random 97.0, 96.5, 95.2, 93.7; hardest by EL2N 97.6,
97.7, 97.0, 91.2; by early GraNd 97.5, 97.7, 96.7, 90.9; by GraNd at initialisation 96.8, 96.4, 95.7, 92.3. So at 20 %
random wins; the easiest by EL2N or early GraNd are the worst throughout (66.1 and 67.4 at 20 %).
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
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
from train.data.fingerprint import fingerprint
from train.data.images import sets
from train.data.images.arrays import Labelled
from train.data.understood import understood
from train.gradients.stream import stream
from train.losses import cross_entropy
from train.optimizers import schedules
from train.run import Common, Count, Fraction, Positive, Shared, begin, command_line
from train.step import compiled, create, make_step

RUNS = Path("runs/prune")
TEST_DIGITS = 797  # of 1797
SCORES = ("EL2N early", "GraNd early", "GraNd at initialisation")
ENDS = ("hardest", "easiest")  # which end of a ranking is kept
DEVIATION = functools.partial(np.std, ddof=1)


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits" (in scikit-learn), "mnist", "cifar10" ... (downloaded once), or a folder of images."""
    kept: tuple[Fraction, ...] = (0.8, 0.6, 0.4, 0.2)
    """Fractions of the examples to train on; besides, nets are trained on all of them."""
    seeds: Count = 8
    """Nets trained for each score, end of the ranking and fraction; at least 2."""
    scorers: Count = 10
    """Nets over which a score is averaged."""
    early: Count = 60
    """Training steps before the early scores are taken."""
    widths: tuple[Count, ...] = (128,)
    """Widths of the hidden layers."""
    steps: Count = 600
    """Training steps, whatever fraction is kept; the learning rate falls to 0 over all of them."""
    batch: Count = 50
    """Examples per step and net, sampled with replacement from those that are kept."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    common: Shared = Common(save_every=200)


class Member(NamedTuple):
    """A net of the ensemble, which learns from the first `size` examples of an order of them."""

    curve: str
    kept: float
    seed: int
    order: int
    size: int


def losses(params: tree.Tree, batch: Labelled, cfg: mlp.Config) -> Tensor:
    """(N,)."""
    return cross_entropy(mlp.apply(params, batch.images, cfg), batch.labels, reduction="none")


def created(keys: Tensor, cfg: mlp.Config, optimizer: optimizers.Optimizer) -> tree.Tree:
    """The initial states, one per key, stacked."""
    states = torch.vmap(functools.partial(create, model=mlp.spec(cfg), optimizer=optimizer))(keys)
    return tree.map(torch.Tensor.contiguous, states)  # vmap repeats what they share, such as the step


def sample(data: Labelled, orders: Tensor, rows: Tensor, sizes: Tensor, keys: Tensor, n: int) -> Labelled:
    """A batch (nets, n, ...): net i samples, with keys[i], from the first sizes[i] entries of orders[rows[i]]."""
    indices = orders[rows[:, None], random.randint(keys, (n,), 0, sizes[:, None], torch.int64)]  # (nets, n)
    return Labelled(data.images[indices], data.labels[indices])


def score(args: Args, data: Labelled, cfg: mlp.Config, step, optimizer: optimizers.Optimizer, key: Tensor) -> Tensor:
    """(SCORES, examples): each score, averaged over the scorers, who learn from all examples for `early` steps."""
    create_keys, batch_keys = random.split(key, 2 * args.scorers).chunk(2)
    states, count = created(create_keys, cfg, optimizer), len(data.labels)
    everything = torch.arange(count, device=key.device)[None]
    rows = torch.zeros(args.scorers, dtype=torch.int64, device=key.device)

    def scored(params: tree.Tree, name: str) -> dict[str, np.ndarray]:
        def function(batch: Labelled) -> dict[str, Tensor]:
            with torch.no_grad():
                logits = torch.vmap(functools.partial(mlp.apply, cfg=cfg), in_dims=(0, None))(params, batch.images)
            norms = scores.grand(functools.partial(losses, cfg=cfg), params, batch, ensemble=True)
            return {"EL2N": scores.el2n(logits, batch.labels), "GraNd": norms}

        return stream(function, data, 500, keep=("EL2N", "GraNd"), title=f"scores {name}").kept

    initial = scored(states.params, "at initialisation")
    for at in range(args.early):
        keys = random.fold_in(batch_keys, at)
        states, _ = step(states, sample(data, everything, rows, rows + count, keys, args.batch))
    early = scored(states.params, f"after {args.early} steps")
    return torch.from_numpy(np.stack([early["EL2N"], early["GraNd"], initial["GraNd"]]))


def plan(args: Args, values: Tensor, key: Tensor) -> tuple[Tensor, list[Member]]:
    """Orders (orders, examples) of the examples, by the scores `values` (SCORES, examples) or random, and all nets."""
    seeds, count = range(args.seeds), values.shape[1]
    orders = [random.permutation(k, count) for k in random.split(key, args.seeds)]
    members = [Member("all", 1.0, seed, 0, count) for seed in seeds]
    curves = {"random": list(seeds)}
    for name, row in zip(SCORES, values.to(key.device), strict=True):
        for end in ENDS:
            curves[f"{name}, {end}"] = [len(orders)] * args.seeds
            orders.append(row.argsort(descending=end == "hardest", stable=True))
    for curve, rows in curves.items():
        for kept in args.kept:
            members += [Member(curve, kept, seed, rows[seed], max(1, round(kept * count))) for seed in seeds]
    return torch.stack(orders), members


@torch.no_grad()
def accuracies(params: tree.Tree, test: Labelled, cfg: mlp.Config) -> Tensor:
    """(nets,)."""
    apply = torch.vmap(functools.partial(mlp.apply, cfg=cfg), in_dims=(0, None))
    parts = [apply(params, test.images[part]).argmax(-1) for part in batching.evaluation_batches(len(test.labels), 500)]
    return (torch.cat(parts, 1) == test.labels).to(torch.float64).mean(1).cpu()


def study(args: Args, members: list[Member], right: Tensor, values: Tensor) -> dict:
    """The figures: accuracies by curve and fraction, a number per seed; the gain of each curve over random examples,
    seed by seed, with its standard error; and the rank correlations (Spearman's) of the scores."""
    by: dict[str, dict[str, list[float]]] = {}
    for member, value in zip(members, right.tolist(), strict=True):
        by.setdefault(member.curve, {}).setdefault(f"{member.kept:g}", []).append(value)
    gains: dict[str, dict[str, dict[str, float]]] = {curve: {} for curve in list(by)[2:]}
    for curve, gains_by in gains.items():
        for kept, seeds in by[curve].items():
            gain = np.subtract(seeds, by["random"][kept])
            gains_by[kept] = {"mean": gain.mean(), "standard_error": DEVIATION(gain) / args.seeds**0.5}
    correlation = torch.corrcoef(values.argsort(1).argsort(1).double())
    return {"accuracy": by, "gain_over_random": gains, "scores": SCORES, "rank_correlation": correlation}


def draw(args: Args, folder: Path, figures: dict, values: Tensor, data: Labelled, classes: tuple[str, ...]) -> None:
    """`prune.png`, and a picture per score with its hardest and easiest examples."""
    with plots.panels(folder / "prune.png", 1, 2, width=5.0) as panels:
        for axes, end in zip(panels, ENDS, strict=True):
            names = {"random": "random", **{f"{name}, {end}": name for name in SCORES}}
            for (curve, label), colour in zip(names.items(), ("#888888", *plots.COLOURS), strict=False):
                rows = np.array(list(figures["accuracy"][curve].values()))
                mean, deviation = (100 * f(rows, axis=1) for f in (np.mean, DEVIATION))
                style = {"color": colour, "label": label, "marker": "o", "ms": 4, "capsize": 3}
                axes.errorbar(100 * np.array(args.kept), mean, deviation, **style)
            everything = 100 * np.mean(figures["accuracy"]["all"]["1"])
            axes.axhline(everything, color=plots.INK, lw=1, ls=":", label="all examples")
            plots.curves(axes, {}, "kept (%)", "test accuracy (%), mean and deviation", f"The {end} kept")
            axes.legend(frameon=False, fontsize=9, loc="lower right")
    for name, row in zip(SCORES, values, strict=True):
        ranked = row.argsort(descending=True, stable=True)
        extremes = torch.cat([ranked[:12], ranked.flip(0)[:12]]).to(data.labels.device)
        titles = [classes[label] for label in data.labels[extremes]]
        path = folder / f"{name.replace(' ', '_').lower()}.png"
        plots.image_grid(path, data.images[extremes], 12, titles, f"{name}: hardest above, easiest below", 0.8)


def table(args: Args, figures: dict) -> str:
    """Test accuracies: mean and standard deviation over the seeds."""
    lines = [f"{'kept':<34}" + "".join(f"{kept:>16.0%}" for kept in (1.0, *args.kept))]
    everything = figures["accuracy"]["all"]["1"]
    for curve, by in list(figures["accuracy"].items())[1:]:
        cells = [f"{np.mean(x):.2%} ± {100 * DEVIATION(x):.2f}" for x in (everything, *by.values())]
        lines.append(f"{curve:<34}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("data",))
    if args.early > args.steps:
        raise ValueError(f"--early is {args.early}; expected up to --steps, {args.steps}")
    if args.seeds < 2:
        raise ValueError(f"--seeds is {args.seeds}; expected at least 2, for the error bars")
    if not args.kept or len(set(args.kept)) < len(args.kept):
        raise ValueError(f"--kept is {args.kept}; expected different fractions")
    images = sets.digits(TEST_DIGITS) if args.data == "digits" else sets.read_all(args.data, labelled=True)
    cfg = mlp.Config((images.train.images[0].numel(), *args.widths, len(images.classes)))
    understood(print, sets.facts(images) | {"net": cfg})
    learn, test = tree.move((images.train, images.test), run.device)

    keys = random.split(random.key(args.common.seed), 4).to(run.device)
    score_key, order_key, create_key, batch_key = keys.unbind(0)
    optimizer = optimizers.adamw(schedules.cosine(args.learning_rate, args.steps))
    options = {"policy": run.policy, "compile": False}
    step = torch.vmap(make_step(lambda params, batch, keys: losses(params, batch, cfg), optimizer, **options))
    if run.resumed_from:
        values = torch.from_numpy(np.load(run.resumed_from / "scores.npy"))
    else:
        print(f"scoring {len(learn.labels)} examples by {args.scorers} nets ...", flush=True)
        values = score(args, learn, cfg, step, optimizer, score_key)
    orders, members = plan(args, values, order_key)
    columns = torch.tensor([(m.seed, m.order, m.size) for m in members], device=run.device)
    seeds, rows, sizes = columns.unbind(1)
    create_keys, batch_keys = (random.fold_in(key, seeds) for key in (create_key, batch_key))
    identity = {"net": cfg, "members": len(members), "data": fingerprint(learn, test)}
    states = run.restore(created(create_keys, cfg, optimizer), identity, args.steps)
    step = compiled(step) if args.common.compile else step

    def batch_of(t: int) -> Labelled:
        return sample(learn, orders, rows, sizes, random.fold_in(batch_keys, t), args.batch)

    with run.open({}, files={"scores.npy": lambda path: np.save(path, values.numpy())}):
        run.log.print(f"{len(members)} nets of {tree.count(mlp.spec(cfg)):,} parameters; run in {run.folder}")
        for at, batch in run.steps(map(batch_of, run.remaining)):
            states, metrics = step(states, batch)
            run.record(at, metrics, len(members) * args.batch, loss=metrics["loss"].mean())
            if run.due(at, args.common.save_every):
                run.save(at, states)
        baselines = sets.baselines(images)
        figures = study(args, members, accuracies(states.params, test, cfg), values)
        run.result({**figures, **baselines, "examples": len(learn.labels)})
        draw(args, run.folder, figures, values, learn, images.classes)
    print(f"{table(args, figures)}\n{'nearest class mean, all':<34}{baselines['nearest_mean_accuracy']:>16.2%}")
    print(f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), root=RUNS)
