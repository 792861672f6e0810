"""Hessian and Gauss-Newton spectra of a small net during training, by Lanczos iteration and exactly.

Ghorbani et al. 2019, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density" (arXiv:1901.10159),
draw the spectrum of a loss from products with its Hessian alone, by stochastic Lanczos quadrature. Here a tanh net is
small enough that the whole matrix can be computed too, so every estimate stands beside the exact value. It is trained
by gradient descent on all examples at once, whose largest Hessian eigenvalue rises to 2 / learning rate and stays
there: the edge of stability (Cohen et al. 2021, arXiv:2103.00065). Data are scikit-learn's digits, 2 x 2 pixels
averaged:

    python experiments/spectrum.py                                       about 90 seconds on one CPU core
    python experiments/spectrum.py --no-exact --pool 1 --widths 200 200  a larger net, by Lanczos iteration alone

It ends with the errors of the estimated eigenvalues, traces and densities.
Expected: the Hessian's largest eigenvalue is 7.1 after 2000 steps, 2 / learning rate 6.67; top eigenvalues agree to
1e-14, traces to 9 %, densities to 0.9 %; the loss is 0.042 and 91 % of the test digits are right.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from core import curvature, random, tree
from core.curvature import Density, probe, smoothed
from core.transforms import hvp
from nets.classifiers import mlp
from train import optimizers, plots
from train.data.fingerprint import fingerprint
from train.data.images import sets
from train.data.images.arrays import Labelled
from train.data.understood import understood
from train.files import read_json, write_json
from train.losses import cross_entropy
from train.metrics.classification import accuracy
from train.run import Common, Count, Natural, Positive, Run, Shared, begin, command_line
from train.run.logs import read_curves
from train.step import create, make_step

RUNS = Path("runs/spectrum")
TEST_DIGITS = 1297  # of 1797
TOP = 5  # eigenvalues compared with the exact ones
SHARPNESS_STEPS = 30  # of Lanczos, for the largest eigenvalue alone
KINDS = {"hessian": "Hessian", "ggn": "Gauss-Newton"}


@dataclass(frozen=True)
class Args:
    widths: tuple[Count, ...] = (20, 20)
    """Widths of the hidden layers."""
    pool: Literal[1, 2, 4] = 2
    """Side of the squares of pixels that are averaged."""
    steps: Count = 2000
    """Steps of gradient descent, each on all 500 examples."""
    learning_rate: Positive = 0.3
    """Learning rate, constant; descent is stable while no eigenvalue of the Hessian is above 2 / learning rate."""
    eval_every: Count = 40
    """Steps between measurements of the largest eigenvalues."""
    spectra: tuple[Natural, ...] = (0, 100, 500)
    """Steps after which the whole spectrum is computed; it always is after the last."""
    exact: bool = True
    """Compute the dense matrices and their eigenvalues too: for up to a few thousand parameters."""
    lanczos_steps: Count = 80
    """Products for the eigenvalues at the upper end, and for each probe of a density."""
    probes: Count = 10
    """Random vectors of a density; a trace takes ten times as many."""
    common: Shared = Common(compile=False)


def products(params: tree.Tree, data: Labelled, cfg: mlp.Config) -> dict[str, Callable]:
    """{matrix: its product with a tree like the parameters}."""

    def outputs(p: tree.Tree) -> Tensor:
        return mlp.apply(p, data.images, cfg)

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits, data.labels)

    return {
        "hessian": lambda v: hvp(lambda p: loss(outputs(p)), params, v)[1],
        "ggn": lambda v: curvature.ggn_vp(outputs, loss, params, v),
    }


def spectrum(params: tree.Tree, data: Labelled, cfg: mlp.Config, key: Tensor, args: Args) -> dict:
    """Per matrix the estimates of Lanczos and Hutchinson, and with `--exact` its eigenvalues in descending order."""
    out = {}
    for (name, product), matrix_key in zip(products(params, data, cfg).items(), random.split(key, 2), strict=True):
        top_key, density_key, trace_key = random.split(matrix_key, 3)
        top = curvature.top_eigenpairs(product, probe(top_key, params), TOP, max(TOP, args.lanczos_steps))
        density = curvature.spectral_density(product, params, density_key, args.probes, args.lanczos_steps)
        trace = curvature.hutchinson_trace(product, params, trace_key, 10 * args.probes)
        exact = []
        if args.exact:
            matrix = curvature.dense(product, params, chunk=64)
            exact = torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)
        top = {"values": top.values, "residuals": top.residuals}
        out[name] = {**top, "density": density, "trace": trace, "exact": exact}
    return out


def errors(spectra: dict[int, dict], name: str) -> dict[str, float]:
    """The largest errors of the estimates of a matrix over all spectra: relative errors of the top eigenvalues and of
    the trace, the latter also in standard errors, and half the integral of |estimated - exact| density, both smoothed:
    the fraction of the eigenvalues that lies elsewhere."""
    worst = {"residual": max(max(matrices[name]["residuals"]) for matrices in spectra.values())}
    for estimates in (matrices[name] for matrices in spectra.values() if matrices[name]["exact"]):
        exact, trace = torch.tensor(estimates["exact"], dtype=torch.float64), estimates["trace"]
        top = torch.tensor(estimates["values"], dtype=torch.float64)
        off = abs(trace["value"] - float(exact.sum()))
        grid, estimate, truth = densities(estimates)
        for figure, value in {
            "top_error": float(((top - exact[: len(top)]) / exact[: len(top)]).abs().max()),
            "trace_error": off / abs(float(exact.sum())),
            "trace_standard_errors": off / trace["standard_error"],
            "density_error": 0.5 * float(torch.trapezoid((estimate - truth).abs(), grid)),
        }.items():
            worst[figure] = max(worst.get(figure, 0.0), value)
    return {f"{name}_{figure}": value for figure, value in worst.items()}


def densities(estimates: dict) -> tuple[Tensor, Tensor, Tensor | None]:
    """(grid, estimated density, exact density or None) of one spectrum, smoothed by a hundredth of its length."""
    nodes, weights = (torch.tensor(estimates["density"][part], dtype=torch.float64) for part in ("nodes", "weights"))
    exact = torch.tensor(estimates["exact"], dtype=torch.float64)
    low, high = (float(x) for x in torch.cat([nodes, exact]).aminmax())
    sigma = 0.01 * (high - low)
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, 1001, dtype=torch.float64)
    truth = smoothed(Density(exact, torch.full_like(exact, 1 / len(exact))), grid, sigma) if len(exact) else None
    return grid, smoothed(Density(nodes, weights), grid, sigma), truth


def draw(folder: Path, spectra: dict[int, dict], args: Args) -> None:
    """`spectra.png`, the densities, and `sharpness.png`, the largest eigenvalues over training."""
    with plots.panels(folder / "spectra.png", 2, len(spectra), 3.5, 3.2) as axes:
        for panel, (name, step) in zip(axes, itertools.product(KINDS, spectra), strict=True):
            grid, estimate, truth = densities(spectra[step][name])
            title, floor = f"{KINDS[name]}, step {step}", 1e-4 * float(estimate.max())
            plots.curves(panel, {"Lanczos quadrature": (grid, estimate)}, "eigenvalue", "density", title, log=True)
            if truth is not None:
                bars, edges = np.histogram(spectra[step][name]["exact"], 50, density=True)
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
        left.legend(frameon=False, fontsize=9, loc="lower right")
        plots.curves(right, {"train": curves["train/loss"]}, "step", "nats", "Training loss", log=True)


SUMMARY = """\
sharpness {sharpness:.4g} at the end, at most {sharpness_max:.4g}; 2 / learning rate is {threshold:.4g}
loss {train_loss:.4f}, {test_accuracy:.1%} of the test digits right (nearest class mean: {nearest_mean_accuracy:.1%})"""
COMPARED = """\
{kind:<12}  top eigenvalues within {top_error:.1e} of the exact ones, trace within {trace_error:.1%} \
({trace_standard_errors:.1f} standard errors), {density_error:.1%} of the density elsewhere"""


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("steps", "eval_every"))
    images = sets.digits(TEST_DIGITS)
    parts = [part._replace(images=avg_pool2d(part.images, args.pool)) for part in (images.train, images.test)]
    images = images._replace(train=parts[0], test=parts[1])
    cfg = mlp.Config(((8 // args.pool) ** 2, *args.widths, 10), activation="tanh")
    understood(print, sets.facts(images) | {"net": cfg})

    create_key, sharpness_key, spectrum_key = random.split(random.key(args.common.seed), 3).to(run.device).unbind(0)
    learn, test = tree.move(parts, run.device)
    wide = torch.float32 if run.device.type == "mps" else torch.float64  # rounding is not what is compared
    model, optimizer = mlp.spec(cfg), optimizers.sgd(args.learning_rate)
    identity = {"net": cfg, "data": fingerprint(learn, test)}
    state = run.restore(create(create_key, model, optimizer), identity, args.steps)

    def loss(params: tree.Tree, batch: Labelled, keys: Tensor) -> Tensor:
        return cross_entropy(mlp.apply(params, batch.images, cfg), batch.labels, reduction="none")

    step = make_step(loss, optimizer, policy=run.policy, compile=args.common.compile)
    moments = sorted({step for step in args.spectra if step < args.steps} | {args.steps})

    def measure(at: int) -> None:
        params, data = tree.cast((state.params, learn), wide)
        values = {}
        for name, product in products(params, data, cfg).items():
            top = curvature.top_eigenpairs(product, probe(sharpness_key, params), 1, SHARPNESS_STEPS)
            values[f"sharpness/{name}"] = top.values[0]
        run.log.metrics(at, values)
        if at in moments:
            estimates = spectrum(params, data, cfg, random.fold_in(spectrum_key, at), args)
            write_json(run.folder / "spectra" / f"{at}.json", estimates)

    with run.open({"examples": {"train": len(learn.labels), "test": len(test.labels)}}):
        run.log.print(f"{tree.count(model):,} parameters; run in {run.folder}")
        if run.first == 0:
            measure(0)
        for at, batch in run.steps(itertools.repeat(learn)):
            state, metrics = step(state, batch)
            run.record(at, metrics, len(learn.labels))
            if at % args.eval_every == 0 or at in moments:
                measure(at)
            if run.due(at, args.common.save_every):
                run.save(at, state)
        report(run, tree.move(state.params, "cpu"), images, cfg, moments)


def report(run: Run, params: tree.Tree, images: sets.ImageSet, cfg: mlp.Config, moments: list[int]) -> None:
    """The final figures and pictures."""
    args, learn, test = run.args, images.train, images.test
    spectra = {at: read_json(run.folder / "spectra" / f"{at}.json") for at in moments}
    _, sharpness = read_curves(run.folder, "sharpness/hessian")["sharpness/hessian"]
    figures = {
        "sharpness": sharpness[-1],
        "sharpness_max": max(sharpness),
        "threshold": 2 / args.learning_rate,
        "train_loss": float(cross_entropy(mlp.apply(params, learn.images, cfg), learn.labels)),
        "test_accuracy": float(accuracy(mlp.apply(params, test.images, cfg), test.labels)),
        **sets.baselines(images),
    }
    compared = {name: errors(spectra, name) for name in KINDS}
    run.result({**figures, **compared["hessian"], **compared["ggn"], "parameters": tree.count(params)})
    draw(run.folder, spectra, args)
    print(SUMMARY.format(**figures))
    for name, kind in KINDS.items() if args.exact else ():
        print(COMPARED.format(kind=kind, **{f.removeprefix(f"{name}_"): v for f, v in compared[name].items()}))
    print(f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), root=RUNS)
