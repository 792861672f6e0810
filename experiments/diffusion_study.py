"""What diffusion.py does with a run: its commands but for training."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core import per_example, random, tree
from experiments.parts import diffusion as trained
from experiments.parts.diffusion import Data, Diffusion
from experiments.parts.generator import distances
from train import plots
from train.diffusion import samplers
from train.diffusion.inpainting import inpaint as fill_in
from train.diffusion.inversion import ddim_inversion, slerp
from train.diffusion.likelihood import flow_bits, flow_step, variational_bound
from train.diffusion.tables import Sampler
from train.files import write_json
from train.plots import gan as gan_plots
from train.run import command_line
from train.step import compiled

PAIRS = 8  # of images between which `interpolate` goes


class Opened(NamedTuple):
    """A run: its folder, arguments, what it has learned, its data, and the losses it was trained with."""

    folder: Path
    args: Any
    who: Diffusion
    data: Data
    params: tree.Tree
    device: torch.device
    losses: Callable


@dataclass(frozen=True)
class RunArgs:
    run: Path
    """Folder of a run, such as runs/diffusion/NAME."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 ..."""
    compile: bool = True
    """Compile the sampler's step with torch.compile."""


@dataclass(frozen=True)
class SampleArgs(RunArgs):
    sampler: str = "ddim"
    """ddpm, ddim, dpm-solver++, heun."""
    steps: int = 50
    """Steps of the sampler."""
    eta: float = 0.0
    """Of ddim: 0 draws no noise on the way, 1 as much as ddpm."""
    spacing: str = "trailing"
    """Which times the steps are at: leading, trailing, linspace."""
    guidance: float | None = None
    """Of a net with classes: 1 is what it was trained for, more is further into the class, 0 is without class."""
    label: int | None = None
    """Of this class; of all in turn if not given."""
    count: int = 64
    """How many samples."""


@dataclass(frozen=True)
class InterpolateArgs(RunArgs):
    steps: int = 100
    """Of the way to the noise, and of that back."""


@dataclass(frozen=True)
class InpaintArgs(RunArgs):
    mask: str = "half"
    """half, box, or a PNG of the images' size, bright where they are known."""
    sampler: str = "ddpm"
    """ddpm, ddim, dpm-solver++, heun."""
    steps: int = 100
    """Steps of the sampler."""
    repeats: int = 5
    """How often each step is made."""
    count: int = 10
    """How many test images."""


@dataclass(frozen=True)
class EvaluateArgs(RunArgs):
    classifier: Path | None = None
    """A run of classify.py on the same data; figures are then of its features, otherwise of the pixels."""
    count: int = 10_000
    """Samples that the figures are of, at most; as many as there are images if there are fewer."""
    bits: int = 0
    """Of how many test images bits per dimension are computed."""
    flow_steps: int = 100
    """Of the flow's bits."""


@dataclass(frozen=True)
class GradientsArgs(RunArgs):
    rounds: int = 20
    """How often each of the test images is looked at, each time at another time."""
    count: int = 128
    """Of how many test images."""


def labels_of(who: Diffusion, count: int, device: torch.device) -> Tensor | None:
    """Every class in turn; None for a net without classes."""
    classes = who.cfg.classes
    return torch.arange(count, device=device) % classes if classes else None


def anything(run: Opened, count: int) -> Tensor | None:
    """The label for no class; None for a net without classes."""
    classes = run.who.cfg.classes
    return torch.full((count,), classes, device=run.device) if classes else None


def measured(
    who: Diffusion,
    params: tree.Tree,
    data: Data,
    sampler: Sampler,
    step: trained.Step,
    key: Tensor,
    args: Any,
    folder: Path | None = None,
) -> tuple[dict[str, float], Tensor]:
    """(figures, images): distances between as many samples as images, at most args.count, which are of features of
    args.classifier, or of the pixels. With a folder, pictures go there."""
    real = torch.cat([data.test.images, data.train.images])[: args.count]
    film, labels = trained.Film(sampler), labels_of(who, len(real), key.device)
    fake = trained.generate(params, sampler, step, key, data.shape, labels, len(real), film)
    if folder is not None:
        film.draw(folder)
        plots.image_grid(folder / "samples.png", trained.unit(fake[:64]), 8, scale=0.6)
    return distances(trained.unit(real.cpu()), trained.unit(fake), args.classifier), fake


def sample(run: Opened, args: SampleArgs) -> None:
    command_line.at_least_one(count=args.count, steps=args.steps)
    who, classes = run.who, run.who.cfg.classes
    for flag, value in (("guidance", args.guidance), ("label", args.label)):
        if value is not None and not classes:
            raise ValueError(f"--{flag} is {value}, but the net of '{run.folder}' was trained without --classes")
    if args.label is not None and not 0 <= args.label < classes:
        raise ValueError(f"--label is {args.label}; expected 0 to {classes - 1}")
    guidance = 1.0 if args.guidance is None else args.guidance
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"--guidance is {guidance}; expected a number of at least 0")
    sampler = trained.make_sampler(who, args.sampler, args.steps, eta=args.eta, spacing=args.spacing)
    step = trained.make_step(who, sampler, guidance, compile=args.compile)
    labels, film = labels_of(who, args.count, run.device), trained.Film(sampler)
    labels = labels if args.label is None else torch.full_like(labels, args.label)
    key = random.key(args.seed, run.device)
    found = trained.generate(run.params, sampler, step, key, run.data.shape, labels, args.count, film)
    folder = run.folder / "sampled"
    film.draw(folder)
    plots.image_grid(folder / "samples.png", trained.unit(found), scale=0.6)
    print(f"{args.count} samples by {args.sampler} in {args.steps} steps in {folder}/")


@torch.no_grad()
def interpolate(run: Opened, args: InterpolateArgs) -> None:
    """Images to noise by DDIM backwards, from noise to noise on a great circle, and back; of no class."""
    command_line.at_least_one(steps=args.steps)
    who, images = run.who, run.data.test.images
    if len(images) < 2:
        raise ValueError(f"interpolate goes from one test image to another; there is {len(images)}")
    forth = ddim_inversion(who.schedule, args.steps, predicts=who.predicts)
    # As the inversion: the same times, and nothing clipped.
    back = samplers.ddim(who.schedule, args.steps, predicts=who.predicts, clip=False)
    pairs = min(PAIRS, len(images) // 2)
    ends, fractions = images[: 2 * pairs], torch.linspace(0, 1, 9).tolist()

    def through(sampler: Sampler, x: Tensor, callback: Callable) -> Tensor:
        step = trained.make_step(who, sampler, compile=args.compile)
        given = trained.bound(step, run.params, anything(run, len(x)))
        return samplers.sample(sampler, None, x, step=given, callback=callback)

    with trained.progress(2 * args.steps, "interpolating") as advance:
        noise = through(forth, ends, advance)
        way = torch.cat([slerp(noise[:pairs], noise[pairs:], f) for f in fractions])
        found = through(back, way, advance).unflatten(0, (len(fractions), pairs)).transpose(0, 1).cpu()
    error = float((torch.cat([found[:, 0], found[:, -1]]) - ends.cpu()).abs().mean())
    table = torch.cat([ends[:pairs, None].cpu(), found, ends[pairs:, None].cpu()], 1)
    columns = ["image", *(f"{f:.2g}" for f in fractions), "image"]
    path = run.folder / "interpolation.png"
    gan_plots.image_table(path, trained.unit(table), None, columns, "Between test images, by way of their noise")
    print(f"{pairs} pairs in {path}; images come back with a mean absolute error of {error / 2:.4f} (of 1)")


@torch.no_grad()
def inpaint(run: Opened, args: InpaintArgs) -> None:
    command_line.at_least_one(steps=args.steps, count=args.count)
    who, images = run.who, run.data.test.images[: args.count]
    mask = trained.mask_of(args.mask, run.data.shape).to(run.device)
    sampler = trained.make_sampler(who, args.sampler, args.steps)
    step = trained.make_step(who, sampler, compile=args.compile)
    for_start, key = random.split(random.key(args.seed, run.device)).unbind(0)
    given = trained.bound(step, run.params, anything(run, len(images)))
    with trained.progress(args.steps, "inpainting") as advance:
        x = random.normal(for_start, images.shape)
        options = {"repeats": args.repeats, "step": given, "callback": advance}
        found = fill_in(sampler, None, x, images, mask, key, **options)
    # Grey, where nothing is known.
    rows = torch.stack([trained.unit(part.cpu()) for part in (images, torch.where(mask, images, 0.0), found)])
    path = run.folder / "inpainted.png"
    gan_plots.image_table(path, rows, ["image", "known", "filled in"], title="Test images, inpainted")
    print(f"{len(images)} test images in {path}")


def evaluate(run: Opened, args: EvaluateArgs) -> None:
    command_line.at_least_one(count=args.count, flow_steps=args.flow_steps)
    if args.bits < 0:
        raise ValueError(f"--bits is {args.bits}; expected a number of test images, or 0")
    who, key, steps, rows = run.who, random.key(args.seed, run.device), {}, []
    total = who.steps
    settings = [("ddpm", total), *(("ddim", n) for n in (10, 20, 50) if n <= total)]
    settings += [("dpm-solver++", 20)] if total > 20 else []
    for name, count in settings:
        sampler = trained.make_sampler(who, name, count)
        steps.setdefault(name, trained.make_step(who, sampler, compile=args.compile))
        found, _ = measured(who, run.params, run.data, sampler, steps[name], key, args)
        rows.append({"sampler": name, "steps": count, **found})
        print(f"{name:<13} {count:>5} steps  " + "  ".join(f"{n} {v:.4g}" for n, v in found.items()), flush=True)
    table = {"samplers": rows, "features": str(args.classifier or "pixels")}
    if args.bits:
        table["bits_per_dimension"] = bits_of(run, args, random.fold_in(key, 2))
        print(", ".join(f"{name} {value:.4g}" for name, value in table["bits_per_dimension"].items()))
    write_json(run.folder / "result" / "evaluation.json", table)
    print(f"table in {run.folder / 'result' / 'evaluation.json'}")


@torch.no_grad()
def bits_of(run: Opened, args: EvaluateArgs, key: Tensor) -> dict[str, float]:
    """Bits per dimension of test images, means and their standard errors: by the bound, and by the flow."""
    who, levels = run.who, run.data.levels
    images = run.data.test.images[: args.bits]
    labels = run.data.test.labels[: args.bits] if who.cfg.classes else None

    def net(params, labels, x, time):
        return trained.model_of(who, params, labels)(x, time)

    def flow(params, labels, row, x, signs):
        return flow_step(who.predicts)(trained.model_of(who, params, labels), row, x, signs)

    net, flow = (compiled(f, channels_last=True) if args.compile else f for f in (net, flow))
    choices = {"predicts": who.predicts, "levels": levels}
    for_bound, for_flow = random.split(key).unbind(0)
    with trained.progress(who.steps, "the bound") as advance:
        model = functools.partial(net, run.params, labels)
        options = {**choices, "variance": who.variance, "callback": advance}
        bound = variational_bound(model, who.schedule, images, for_bound, **options).total
    with trained.progress(args.flow_steps, "the flow") as advance:
        options = {**choices, "steps": args.flow_steps, "callback": advance}
        step = trained.bound(flow, run.params, labels)
        flowed = flow_bits(None, who.schedule, images, for_flow, step=step, **options)
    found = {"bound": bound, "flow": flowed}
    errors = {f"{name}_error": float(b.std() / len(b) ** 0.5) for name, b in found.items()} if len(images) > 1 else {}
    return {**{name: float(b.mean()) for name, b in found.items()}, **errors, "images": len(images)}


def gradients(run: Opened, args: GradientsArgs) -> None:
    """Norms of single examples' gradients of the loss that was trained, and the loss, by the time."""
    command_line.at_least_one(rounds=args.rounds, count=args.count)
    who, key = run.who, random.key(args.seed, run.device)
    if who.cfg.zero and all(not leaf.any() for leaf in tree.leaves(run.params["output"])):
        raise ValueError(f"the net of '{run.folder}' gives 0 everywhere: it has not been trained")

    def report(params, batch):
        images, labels, time, weights, keys = batch
        found = per_example.reports(lambda p, b: run.losses(p, b[:4], b[4]), params, batch, ("norm",))
        return found.losses, found.total_norm

    report = compiled(report) if args.compile else report
    times, losses, norms = [], [], []
    with trained.progress(args.rounds, "gradients") as advance:
        for batch in trained.probe(who, run.data, key, args.rounds, args.count):
            found = report(run.params, batch)
            for values, value in zip((times, losses, norms), (batch[2], *found), strict=True):
                values.append(value.cpu())
            advance()
    times, losses, norms = (torch.cat(values) for values in (times, losses, norms))
    groups = trained.groups_of(who)
    middle, mean_norm = trained.grouped(who, times, norms, groups)
    _, mean_loss = trained.grouped(who, times, losses, groups)
    _, square = trained.grouped(who, times, norms.square(), groups)
    with plots.panels(run.folder / "gradients_of_times.png", 1, 3, 4.6, 3.8) as (left, middle_axes, right):
        plots.curves(left, {"": (middle, mean_norm)}, "time", "mean norm", "Gradients of single examples", log=True)
        share = square / square.nansum()
        plots.curves(middle_axes, {"": (middle, share)}, "time", "share", "Share in the sum of their squares")
        log = bool((mean_loss > 0).all())
        plots.curves(right, {"": (middle, mean_loss)}, "time", "mean loss", f"Loss ({run.args.weight})", log=log)
    order = times.argsort()
    total = norms[order].double().cumsum(0)
    half = int(times[order][int((total < total[-1] / 2).sum())])
    values = {"time": middle, "norm": mean_norm, "loss": mean_loss, "square": square}
    table = {name: np.asarray(v, float).tolist() for name, v in values.items()}
    write_json(run.folder / "result" / "gradients.json", {**table, "half_of_the_norm_up_to_time": half})
    said = f"half of the sum of {len(norms)} gradients' norms is from times up to {half} of {who.steps}"
    print(f"{said}; picture in {run.folder / 'gradients_of_times.png'}")


COMMANDS = {
    "sample": (SampleArgs, sample),
    "interpolate": (InterpolateArgs, interpolate),
    "inpaint": (InpaintArgs, inpaint),
    "evaluate": (EvaluateArgs, evaluate),
    "gradients": (GradientsArgs, gradients),
}
