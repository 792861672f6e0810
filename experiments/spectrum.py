"""Hessian and Gauss-Newton spectra of a small net during training, by Lanczos iteration and exactly.

Ghorbani et al. 2019, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density" (arXiv:1901.10159),
draw the spectrum of a loss from products with its Hessian alone, by stochastic Lanczos quadrature. Here a tanh net is
small enough that the whole matrix can be computed too, so every estimate stands beside the truth. It is trained by
gradient descent on all examples at once, whose largest Hessian eigenvalue rises to 2 / learning rate and stays there:
the edge of stability (Cohen et al. 2021, arXiv:2103.00065). Data are scikit-learn's digits, 2 x 2 pixels averaged:

    python experiments/spectrum.py                                       about 90 seconds on one CPU core
    python experiments/spectrum.py --no-exact --pool 1 --widths 200 200  a larger net, by Lanczos iteration alone

It ends with how far the estimates are from the exact eigenvalues, traces and densities.
Expected: the Hessian's largest eigenvalue is 6.3 after 2000 steps, 2 / learning rate 6.67; top eigenvalues agree to
1e-14, traces to 6 %, densities to 0.8 %; the loss is 0.040 and 90 % of the test digits are right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from core import curvature, random, tree
from core.curvature import Density, probe, smoothed
from core.transforms import hvp
from nets.classifiers import mlp
from train import optimizers, plots
from train.data.images import arrays
from train.files import read_json, write_json
from train.losses import accuracy, cross_entropy
from train.run import command_line
from train.run import run as runs
from train.run.logs import read_curves
from train.step import create, make_step

RUNS = Path("runs/spectrum")
TEST_DIGITS = 1297  # of 1797
TOP = 5  # eigenvalues compared with the exact ones
SHARPNESS_STEPS = 30  # of Lanczos, for the largest eigenvalue alone
KINDS = {"hessian": "Hessian", "ggn": "Gauss-Newton"}


@dataclass(frozen=True)
class Args:
    widths: tuple[int, ...] = (20, 20)
    """Widths of the hidden layers."""
    pool: int = 2
    """Side of the squares of pixels that are averaged: 1, 2 or 4."""
    steps: int = 2000
    """Steps of gradient descent, each on all 500 examples."""
    learning_rate: float = 0.3
    """Constant; gradient descent is stable while no eigenvalue of the Hessian is above 2 / learning rate."""
    every: int = 40
    """Steps between two measurements of the largest eigenvalues."""
    spectra: tuple[int, ...] = (0, 100, 500)
    """The steps after which the whole spectrum is taken; it always is after the last."""
    exact: bool = True
    """Compute the dense matrices and their eigenvalues too: for up to a few thousand parameters."""
    lanczos_steps: int = 80
    """Products for the eigenvalues at the upper end, and for each probe of a density."""
    probes: int = 10
    """Random vectors of a density; a trace takes ten times as many."""
    save_every: int = 500
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random: initial values and probes."""
    name: str | None = None
    """Folder under runs/spectrum; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


def products(params: tree.Tree, data: arrays.Labelled, cfg: mlp.Config) -> dict[str, Callable]:
    """{matrix: its product with a tree like the parameters}."""

    def outputs(p: tree.Tree) -> Tensor:
        return mlp.apply(p, data.images, cfg)

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits, data.labels)

    return {
        "hessian": lambda v: hvp(lambda p: loss(outputs(p)), params, v)[1],
        "ggn": lambda v: curvature.ggn_vp(outputs, loss, params, v),
    }


def spectrum(params: tree.Tree, data: arrays.Labelled, cfg: mlp.Config, key: Tensor, args: Args) -> dict:
    """Per matrix what Lanczos and Hutchinson say of it, and with `--exact` its eigenvalues in descending order."""
    found = {}
    for (name, product), matrix_key in zip(products(params, data, cfg).items(), random.split(key, 2), strict=True):
        top_key, density_key, trace_key = random.split(matrix_key, 3)
        top = curvature.top_eigenpairs(product, probe(top_key, params), TOP, max(TOP, args.lanczos_steps))
        density = curvature.spectral_density(product, params, density_key, args.probes, args.lanczos_steps)
        trace = curvature.hutchinson_trace(product, params, trace_key, 10 * args.probes)
        exact = []
        if args.exact:
            matrix = curvature.dense(product, params, chunk=64)
            exact = torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)
        found[name] = {**top._asdict(), "density": density, "trace": trace, "exact": exact}
        del found[name]["vectors"]
    return found


def compare(spectra: dict[int, dict], name: str) -> dict[str, float]:
    """How far the estimates of a matrix are from the truth, the worst of all spectra: relative errors of the top
    eigenvalues and of the trace, the latter also in standard errors, and half the integral of |estimated - exact|
    density, both smoothed: the share of the eigenvalues that lies elsewhere."""
    worst = {"residual": max(max(found[name]["residuals"]) for found in spectra.values())}
    for found in (every[name] for every in spectra.values() if every[name]["exact"]):
        exact, trace = torch.tensor(found["exact"], dtype=torch.float64), found["trace"]
        top = torch.tensor(found["values"], dtype=torch.float64)
        off = abs(trace["value"] - float(exact.sum()))
        grid, estimate, truth = densities(found)
        for figure, value in {
            "top_error": float(((top - exact[: len(top)]) / exact[: len(top)]).abs().max()),
            "trace_error": off / abs(float(exact.sum())),
            "trace_standard_errors": off / trace["standard_error"],
            "density_error": 0.5 * float(torch.trapezoid((estimate - truth).abs(), grid)),
        }.items():
            worst[figure] = max(worst.get(figure, 0.0), value)
    return {f"{name}_{figure}": value for figure, value in worst.items()}


def densities(found: dict) -> tuple[Tensor, Tensor, Tensor | None]:
    """(grid, estimated density, exact density or None) of one spectrum, smoothed by a hundredth of its length."""
    nodes, weights = (torch.tensor(found["density"][part], dtype=torch.float64) for part in ("nodes", "weights"))
    exact = torch.tensor(found["exact"], dtype=torch.float64)
    low, high = (float(x) for x in torch.cat([nodes, exact]).aminmax())
    sigma = 0.01 * (high - low)
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, 1001, dtype=torch.float64)
    truth = smoothed(Density(exact, torch.full_like(exact, 1 / len(exact))), grid, sigma) if len(exact) else None
    return grid, smoothed(Density(nodes, weights), grid, sigma), truth


def draw(folder: Path, spectra: dict[int, dict], args: Args) -> None:
    """`spectra.png`, the densities, and `sharpness.png`, the largest eigenvalues over training."""
    with plots.panels(folder / "spectra.png", 2, len(spectra), 3.5, 3.2) as axes:
        for panel, (name, step) in zip(axes, ((n, s) for n in KINDS for s in spectra), strict=True):
            found = spectra[step][name]
            grid, estimate, truth = densities(found)
            title, floor = f"{KINDS[name]}, step {step}", 1e-4 * float(estimate.max())
            plots.curves(panel, {"Lanczos quadrature": (grid, estimate)}, "eigenvalue", "density", title, log=True)
            if truth is not None:
                bars, edges = np.histogram(found["exact"], 50, density=True)
                shade = {"color": plots.COLOURS[1], "alpha": 0.4, "label": "exact, histogram"}
                panel.stairs(np.maximum(bars, floor), edges, baseline=floor, fill=True, **shade)
                panel.plot(grid.tolist(), truth.tolist(), "--", color=plots.COLOURS[1], lw=1.2, label="exact, smoothed")
            panel.set_ylim(floor, 3 * float(estimate.max()))
            panel.legend(frameon=False, fontsize=8, loc="upper right")
    curves = read_curves(folder, *(f"sharpness/{name}" for name in KINDS), "train/loss")
    with plots.panels(folder / "sharpness.png", 1, 2, 5.0, 3.8) as (left, right):
        lines = {KINDS[name]: curves[f"sharpness/{name}"] for name in KINDS}
        plots.curves(left, lines, "step", "largest eigenvalue", "Sharpness, by Lanczos iteration")
        for name, colour, label in zip(KINDS, plots.COLOURS, ("exact", None), strict=False) if args.exact else ():
            truth = [spectra[step][name]["exact"][0] for step in spectra]
            left.scatter(list(spectra), truth, s=28, color=colour, zorder=3, label=label)
        left.axhline(2 / args.learning_rate, color=plots.INK, ls=":", lw=1.4, label="2 / learning rate")
        left.legend(frameon=False, fontsize=9, loc="upper left")
        plots.curves(right, {"train": curves["train/loss"]}, "step", "nats", "Training loss", log=True)


SUMMARY = """\
sharpness {sharpness:.4g} at the end, at most {sharpness_max:.4g}; 2 / learning rate is {threshold:.4g}
loss {train_loss:.4f}, {test_accuracy:.1%} of test digits right"""
COMPARED = """\
{kind:<12}  top eigenvalues within {top_error:.1e} of the exact ones, trace within {trace_error:.1%} \
({trace_standard_errors:.1f} standard errors), {density_error:.1%} of the density elsewhere"""


def train(args: Args) -> None:
    origin, args = runs.begin(RUNS, args, free=("steps", "save_every", "device"))
    counts = {name: getattr(args, name) for name in ("steps", "every", "lanczos_steps", "probes", "save_every")}
    command_line.at_least_one(**counts, widths=min(args.widths, default=1))
    command_line.positive(learning_rate=args.learning_rate)
    if args.pool not in (1, 2, 4):
        raise ValueError(f"--pool is {args.pool}; expected 1, 2 or 4")
    if min(args.spectra, default=0) < 0:
        raise ValueError(f"--spectra is {min(args.spectra)}; expected steps of at least 0")
    device = command_line.device(args.device)
    pooled = [data._replace(images=avg_pool2d(data.images, args.pool)) for data in arrays.digits(TEST_DIGITS)]
    learn, test = tree.move(pooled, device)
    cfg = mlp.Config(((8 // args.pool) ** 2, *args.widths, 10), activation="tanh")
    model, optimizer, key = mlp.spec(cfg), optimizers.sgd(args.learning_rate), random.key(args.seed, device)
    identity = {"net": cfg, "examples": {"train": len(learn.labels), "test": len(test.labels)}}
    state = runs.restore(origin, create(key, model, optimizer), identity, args.steps)
    probe_key = random.fold_in(key, 2)  # `create` has used numbers 0 and 1
    step = make_step(lambda p, data, _: cross_entropy(mlp.apply(p, data[0], cfg), data[1]), optimizer, compile=False)
    wide = torch.float32 if device.type == "mps" else torch.float64  # rounding is not what is compared
    measured = tree.cast(learn, wide)
    taken = sorted({step for step in args.spectra if step < args.steps} | {args.steps})

    with runs.opened(origin, {"args": args, **identity, "torch": torch.__version__}, total=args.steps) as run:
        run.log.print(f"{tree.count(model):,} parameters; run in {run.folder}")

        def measure(at: int, values: dict[str, Tensor]) -> None:
            params = tree.cast(state.params, wide)
            start = probe(random.fold_in(probe_key, 0), params)
            for name, product in products(params, measured, cfg).items():
                top = curvature.top_eigenpairs(product, start, 1, SHARPNESS_STEPS).values
                values = values | {f"sharpness/{name}": top[0]}
            run.log.metrics(at, values)
            if at in taken:
                found = spectrum(params, measured, cfg, random.fold_in(probe_key, at + 1), args)
                write_json(run.folder / "spectra" / f"{at}.json", found)

        if (at := run.first) == 0:
            measure(0, {})
        for at in range(run.first + 1, args.steps + 1):
            state, metrics = step(state, learn)
            runs.check_finite(run, at, metrics)
            last = at == args.steps or run.stop.requested
            run.log.progress(at, len(learn.labels), loss=metrics["loss"])
            if at % args.every == 0 or at in taken:
                measure(at, {"train/loss": metrics["loss"], "train/grad_norm": metrics["grad_norm"]})
            if at % args.save_every == 0 or last:
                runs.save(run, at, state)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        spectra = {at: read_json(run.folder / "spectra" / f"{at}.json") for at in taken}
        _, sharpness = read_curves(run.folder, "sharpness/hessian")["sharpness/hessian"]
        figures = {
            "sharpness": sharpness[-1],
            "sharpness_max": max(sharpness),
            "threshold": 2 / args.learning_rate,
            "train_loss": float(cross_entropy(mlp.apply(state.params, learn.images, cfg), learn.labels)),
            "test_accuracy": float(accuracy(mlp.apply(state.params, test.images, cfg), test.labels)),
        }
        compared = {name: compare(spectra, name) for name in KINDS}
        draw(run.folder, spectra, args)
        run.log.result(
            {
                **figures,
                **compared["hessian"],
                **compared["ggn"],
                "steps": at,
                "seconds": seconds,
                "parameters": tree.count(model),
            }
        )
    print(SUMMARY.format(**figures))
    for name, kind in KINDS.items() if args.exact else ():
        print(COMPARED.format(kind=kind, **{f.removeprefix(f"{name}_"): v for f, v in compared[name].items()}))
    print(f"{at} steps in {seconds:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train))
