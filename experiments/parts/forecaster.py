"""An ensemble that forecasts a series, trained by `experiments/sequences.py`: its bands, figures and pictures.

Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles": each member
says a mean and a variance, and the ensemble is the normal distribution with the moments of their mixture.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random, spec, tree
from experiments.parts.sequence_task import Task, net_of
from nets.language import sequence_classifier as net
from train import plots
from train.data import series as data
from train.data.fingerprint import fingerprint
from train.data.series import Series, Windows
from train.losses.variational import gaussian_log_likelihood
from train.run import SavedRun

BAND = 1.645
"""Standard deviations on either side that hold 90 % of a normal distribution."""


@dataclass(frozen=True)
class Trained:
    """Form of the net's windows: the entry "forecaster" of a run's configuration."""

    window: int
    horizon: int
    season: int
    patch: int
    """Values per step of the recurrence."""
    scale: float
    """Standard deviation of the training windows about their means."""
    members: int


class Forecaster(NamedTuple):
    """`params` have the members as their leading axis."""

    params: tree.Tree
    cfg: net.Config
    trained: Trained


class Forecast(NamedTuple):
    """Mean and standard deviation (windows, horizon), and each member's mean (members, windows, horizon)."""

    mean: Tensor
    std: Tensor
    members: Tensor


def load(run: SavedRun, device: torch.device | str = "cpu") -> Forecaster:
    """The forecaster of a run, at its checkpoint."""
    cfg, trained = run.read("net", net.Config), run.read("forecaster", Trained)
    like = tree.stack([spec.abstract(net.spec(cfg))] * trained.members)
    return Forecaster(tree.move(run.restore(like, "params"), device), cfg, trained)


def open_series(args: Any) -> Series:
    """The series of `--data`: "seasons", which is generated, or a column of a CSV."""
    if args.data == "seasons" and not Path(args.data).exists():
        return data.seasons(random.key(0))
    return data.read_column(Path(args.data), args.column)


def task_of(args: Any, resumed_from: Path | None) -> Task:
    """The task of the flags of sequences.py. Raises ValueError: they do not fit each other or the series."""
    if args.window % args.patch:
        raise ValueError(f"--window {args.window} does not divide into --patch {args.patch}")
    series = open_series(args)
    values, origins = series.values, data.windows(series, args.window, args.horizon, args.season)
    if args.batch > len(origins.train):
        raise ValueError(f"--batch is {args.batch}, but '{args.data}' has {len(origins.train)} windows to learn from")
    scale = scale_of(values, origins.train, args.window)
    trained = Trained(args.window, args.horizon, args.season, args.patch, scale, args.members)
    cfg = net_of(args, d_in=args.patch, outputs=2 * args.horizon)

    def batch(key: Tensor, step: int) -> tuple[Tensor, Tensor]:
        shape = (args.members, args.batch)  # each member has windows of its own
        rows = random.randint(random.fold_in(key, step), shape, 0, len(origins.train), dtype=torch.int64)
        return examples(
            values, origins.train[rows], trained
        )  # (members, batch, steps, patch), (members, batch, horizon)

    def validate(params: tree.Tree) -> dict[str, float]:
        scores = figures(Forecaster(params, cfg, trained), values, origins.validation)
        return {"loss": scores.pop("nll"), **scores}

    return Task(
        facts=data.facts(series, origins),
        identity={"net": cfg, "data": fingerprint(values)},
        config={"forecaster": trained},
        cfg=cfg,
        per_epoch=len(origins.train) // args.batch,
        members=args.members,
        batch=batch,
        loss=functools.partial(losses, cfg=cfg),
        validate=validate,
        best="loss",
        study=functools.partial(study, series=series, origins=origins),
        files={},
    )


def examples(values: Tensor, origins: Tensor, trained: Trained) -> tuple[Tensor, Tensor]:
    """Windows (..., steps, patch) and targets (..., horizon), less the window's mean, over the scale; float32."""
    x, y = data.cut(values, origins, trained.window, trained.horizon)
    level = x.mean(-1, keepdim=True)
    x, y = (((part - level) / trained.scale).float() for part in (x, y))
    return x.unflatten(-1, (-1, trained.patch)), y


def scale_of(values: Tensor, origins: Tensor, window: int) -> float:
    """Standard deviation of the windows about their means. Raises ValueError: they are constant, or too large."""
    x, _ = data.cut(values, origins, window, 0)
    scale, largest = float((x - x.mean(-1, keepdim=True)).std()), float(x.abs().max())
    if not math.isfinite(scale):
        raise ValueError(f"the series has values up to {largest:.3g}; expected less than 1e150")
    if scale <= 1e-12 * largest:
        raise ValueError(
            f"each window to learn from is constant, the last one {float(x[-1, -1]):.6g}; nothing to learn"
        )
    return scale


def outputs(params: tree.Tree, x: Tensor, cfg: net.Config, **options) -> tuple[Tensor, Tensor]:
    """Mean and log variance of one member, each (windows, horizon)."""
    lengths = torch.full((len(x),), x.shape[1], device=x.device)
    return net.apply(params, (x, lengths), cfg, **options).chunk(2, -1)


def losses(params: tree.Tree, batch: tuple[Tensor, Tensor], keys: Tensor, cfg: net.Config) -> Tensor:
    """Negative log-likelihood per value to forecast, in nats: (windows,)."""
    x, y = batch
    mean, log_variance = outputs(params, x, cfg, key=keys, train=True)
    return -gaussian_log_likelihood(mean, log_variance, y) / y.shape[-1]


@torch.no_grad()
def forecast(model: Forecaster, x: Tensor) -> Forecast:
    """The ensemble's forecast of windows (windows, steps, patch), in units of the scale about the level; on the CPU.

    mean = 1/M sum m_i,   variance = 1/M sum (v_i + m_i^2) - mean^2
    """
    members = torch.vmap(functools.partial(outputs, cfg=model.cfg), (0, None))
    device = tree.leaves(model.params)[0].device
    parts = [members(model.params, part.to(device)) for part in x.split(512)]
    means, log_variances = (torch.cat(part, 1).cpu() for part in zip(*parts, strict=True))  # (members, windows, h)
    mean = means.mean(0)
    variance = (log_variances.exp() + means.square()).mean(0) - mean.square()
    return Forecast(mean, variance.clamp(min=1e-12).sqrt(), means)


def figures(model: Forecaster, values: Tensor, origins: Tensor) -> dict[str, float]:
    """Root mean square errors in the series' unit, NLL in nats per value, and the share inside the bands."""
    x, y = (part.double() for part in examples(values, origins, model.trained))
    out, scale = Forecast(*(part.double() for part in forecast(model, x.float()))), model.trained.scale
    z = (y - out.mean) / out.std
    return {
        "rmse": scale * rms(out.mean - y),
        "member_rmse": scale * float((out.members - y).square().mean((1, 2)).sqrt().mean()),
        "nll": float((z.square() / 2 + (scale * out.std).log()).mean()) + math.log(2 * math.pi) / 2,
        "band_coverage": float((z.abs() <= BAND).double().mean()),
    }


def rms(errors: Tensor) -> float:
    return float(errors.double().square().mean().sqrt())


def ridge(values: Tensor, origins: Windows, trained: Trained) -> Tensor:
    """Ridge regression from the same windows to all steps of the horizon, of the test windows (windows, horizon), in
    the series' unit; its penalty is the best of five on the validation windows."""
    from sklearn.linear_model import Ridge

    parts = [examples(values, part, trained) for part in origins]
    (x, y), (x_val, y_val), (x_test, _) = ((x.flatten(1).numpy(), y.numpy()) for x, y in parts)
    models = [Ridge(alpha=alpha).fit(x, y) for alpha in (0.1, 1.0, 10.0, 100.0, 1000.0)]
    best = min(models, key=lambda model: ((model.predict(x_val) - y_val) ** 2).mean())
    level = data.cut(values, origins.test, trained.window, 0)[0].mean(-1, keepdim=True)
    return torch.from_numpy(best.predict(x_test)).double().reshape(level.shape[0], -1) * trained.scale + level


def study(folder: Path, model: Forecaster, series: Series, origins: Windows) -> dict[str, float]:
    """`figures` of the test windows beside forecasts without a net; draws `forecast.png`."""
    trained, values = model.trained, series.values
    _, y = data.cut(values, origins.test, trained.window, trained.horizon)  # (windows, horizon)
    out = figures(model, values, origins.test)
    simple = {
        "seasonal naive": data.seasonal_naive(values, origins.test, trained.horizon, trained.season),
        "ridge regression": ridge(values, origins, trained),
    }
    out["seasonal_naive_rmse"], out["ridge_rmse"] = (rms(forecast - y) for forecast in simple.values())
    if series.sigma is not None:
        out["least_rmse"] = data.least_error(series, trained.horizon)
        out["rmse_over_sigma"] = out["rmse"] / series.sigma
    draw(folder, model, series, origins.test, simple)
    return out


def in_units(model: Forecaster, values: Tensor, origins: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the forecasts (windows, horizon), in the series' unit."""
    trained = model.trained
    window, _ = data.cut(values, origins, trained.window, 0)
    level = window.mean(-1, keepdim=True)
    x = ((window - level) / trained.scale).float().unflatten(-1, (-1, trained.patch))
    out = forecast(model, x)
    return out.mean.double() * trained.scale + level, out.std.double() * trained.scale


def draw(folder: Path, model: Forecaster, series: Series, origins: Tensor, simple: Mapping[str, Tensor]) -> None:
    """`forecast.png`: the last forecasts that follow one another, with their bands; errors by steps ahead."""
    trained, values, (blue, orange, *_) = model.trained, series.values, plots.COLOURS
    horizon = trained.horizon
    shown = origins.flip(0)[::horizon][:7].flip(0)  # forecasts do not overlap, unless there are gaps
    mean, std = in_units(model, values, shown)
    first = max(0, int(shown[0]) - trained.season)
    with plots.panels(folder / "forecast.png", 2, 1, width=9.0, height=3.2) as (above, below):
        times = torch.arange(first, int(shown[-1]) + horizon)
        plots.curves(above, {"series": (times, values[times])}, "step", "", f"{series.name}: test forecasts and bands")
        above.lines[0].set(color="#888888", linewidth=1.2)
        for origin, m, s in zip(shown.tolist(), mean, std, strict=True):
            steps = range(origin, origin + horizon)
            names = {"label": f"mean of {trained.members} members"} if origin == int(shown[0]) else {}
            above.plot(steps, m.tolist(), color=blue, lw=1.6, **names)
            low, high = (m - BAND * s).tolist(), (m + BAND * s).tolist()
            names = {"label": "90 % band"} if names else {}
            above.fill_between(steps, low, high, color=blue, alpha=0.2, lw=0, **names)
            above.axvline(origin, color=orange, lw=0.8, alpha=0.6, label="forecast made" if names else None)
        above.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, -0.42))
        every, _ = in_units(model, values, origins)
        _, y = data.cut(values, origins, trained.window, horizon)
        ahead = range(1, horizon + 1)
        lines = {f"{trained.members} members": every, **simple}
        errors = {name: (ahead, (f - y).square().mean(0).sqrt()) for name, f in lines.items()}
        if series.sigma is not None:
            best = [data.error_ahead(series, h) for h in ahead]
            errors["best possible"] = (ahead, torch.tensor(best))
        plots.curves(below, errors, "steps ahead", "root mean square error", "Errors of the test forecasts")
        below.set_ylim(bottom=0)


def print_future(model: Forecaster, series: Series) -> None:
    """The values after the end of a series: a line each with the time or step, the mean and the 90 % band.

    Raises ValueError: it is shorter than a window, or the window before its end has a gap.
    """
    window = series.values[-model.trained.window :]
    if len(window) < model.trained.window or window.isnan().any():
        problem = f"has {len(series.values)} values" if len(window) < model.trained.window else "has a gap near its end"
        raise ValueError(f"{series.name} {problem}; expected {model.trained.window} to forecast from")
    mean, std = in_units(model, series.values, torch.tensor([len(series.values)]))
    first = len(series.values)
    print(f"{'step' if series.label(first) == str(first) else 'time'},mean,low,high")
    for step, (m, s) in enumerate(zip(mean[0].tolist(), std[0].tolist(), strict=True), first):
        print(f"{series.label(step)},{m:.6g},{m - BAND * s:.6g},{m + BAND * s:.6g}")
