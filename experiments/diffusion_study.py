"""Studies of a run of diffusion.py: samplers compared, interpolation, inpainting, and gradients by the time.

Song et al. 2021, "Denoising Diffusion Implicit Models" (arXiv:2010.02502), Lugmayr et al. 2022, "RePaint"
(arXiv:2201.09865). Without --run the newest run of diffusion.py is studied:

    python experiments/diffusion_study.py                                    a table of samplers, minutes
    python experiments/diffusion_study.py --run runs/diffusion/NAME --bits 64        and bits per dimension
    python experiments/diffusion_study.py interpolate                        between test images, by way of their noise
    python experiments/diffusion_study.py inpaint --mask half                or box, or a PNG: bright is known
    python experiments/diffusion_study.py gradients                          which times the gradient comes from
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from core import per_example, random, tree
from experiments.parts import diffusion
from experiments.parts.diffusion import Compared, Opened
from train import plots
from train.diffusion import by_time, inpainting, samplers
from train.diffusion.film import unit
from train.diffusion.inversion import ddim_inversion, slerp
from train.diffusion.likelihood import flow_bits, flow_step, flow_times, variational_bound
from train.diffusion.tables import Sampler
from train.files import write_json
from train.plots import gan as gan_plots
from train.run import command_line
from train.run.flags import Count, FromRun, Natural, Range
from train.run.progress import progress
from train.run.run import unused
from train.step import compiled

PAIRS = 8  # of images between which `interpolate` goes


@dataclass(frozen=True)
class StudyArgs(FromRun):
    run: Path | None = None
    """Folder of a run of diffusion.py, such as runs/diffusion/NAME; the newest if None."""
    seed: Natural = 0
    """Seed of the noise."""
    compile: bool = True
    """Compile the sampler's step with torch.compile."""
    out: Path | None = None
    """New file for what comes out; a file in the run's folder, numbered if it exists, if None."""


@dataclass(frozen=True)
class EvaluateArgs(StudyArgs):
    classifier: Path | None = None
    """Run of classify.py on the same data, whose features the figures compare; the pixels if None."""
    count: Compared = 500
    """Number of samples that the figures compare with as many images, or with all if there are fewer."""
    bits: Natural = 0
    """Number of test images whose bits per dimension are computed."""
    flow_steps: Count = 100
    """Steps of the flow for its bits per dimension."""


@dataclass(frozen=True)
class InterpolateArgs(StudyArgs):
    sampler_steps: Count = 100
    """Steps of the way to the noise, and of that back."""


@dataclass(frozen=True)
class InpaintArgs(StudyArgs):
    mask: str = "half"
    """half, box, or a PNG of the images' size, bright where they are known."""
    sampler: Literal[tuple(samplers.SAMPLERS)] = "ddpm"
    """Sampler."""
    sampler_steps: Count = 100
    """Steps of the sampler."""
    repeats: Count = 5
    """Runs of each step, so that the unknown part fits to the known one."""
    count: Annotated[int, Range(1, 64), tyro.conf.arg(metavar="1..64")] = 10
    """Number of test images."""


@dataclass(frozen=True)
class GradientsArgs(StudyArgs):
    times: Count = 20
    """Number of random times at which the gradient of each test image is taken."""
    count: Count = 128
    """Number of test images."""


def no_label(run: Opened, count: int) -> Tensor | None:
    """The label for no class; None for a net without classes."""
    classes = run.model.cfg.classes
    return torch.full((count,), classes, device=run.device) if classes else None


def evaluate(args: EvaluateArgs) -> None:
    """Compare samplers by figures of their samples, beside those of the real images; bits per dimension."""
    run = diffusion.opened(args)
    model, key, total = run.model, random.key(args.seed, run.device), run.model.steps
    path = unused(args.out, run.folder / "result" / "evaluation.json")
    diffusion.check_figures(run.data, args.classifier)
    if args.bits:
        flow_times(model.schedule, args.flow_steps)
    settings = [("ddpm", total), *(("ddim", n) for n in (10, 20, 50) if n <= total)]
    settings += [("dpm-solver++", 20)] if total > 20 else []
    each = [(name, diffusion.make_sampler(model, name, n, compile=args.compile)) for name, n in settings]
    steps = {name: sampler.step for name, sampler in each}  # one compiled step for all numbers of steps
    real = diffusion.real_images(run.data, args.count)
    labels, rows = diffusion.labels_of(model, len(real), run.device), []
    print(f"{len(real)} samples by each of {', '.join(f'{name} in {n} steps' for name, n in settings)} ...", flush=True)
    for name, sampler in each:
        sampler = sampler._replace(step=steps[name])
        samples, _ = diffusion.generate(sampler, run.params, labels, key, run.data.shape, len(real))
        figures, count = diffusion.compared(real, samples, args.classifier), len(sampler.table)
        rows.append({"sampler": name, "steps": count, **figures})
        print(f"{name:<13} {count:>5} steps  " + "  ".join(f"{n} {v:.4g}" for n, v in figures.items()), flush=True)
    table = {"samplers": rows, "features": str(args.classifier or "pixels"), "checkpoint": run.step}
    table |= diffusion.baseline(run.data, args.count, args.classifier)
    print(f"between real images, without a net: frechet_distance {table['real_frechet_distance']:.4g}")
    if args.bits:
        table["bits_per_dimension"] = bits_of(run, args, random.fold_in(key, 2))
        print(", ".join(f"{name} {value:.4g}" for name, value in table["bits_per_dimension"].items()))
    write_json(path, table)
    print(f"table in {path}")


@torch.no_grad()
def bits_of(run: Opened, args: EvaluateArgs, key: Tensor) -> dict[str, float]:
    """Bits per dimension of test images, means and their standard errors: by the bound, and by the flow; the uniform
    distribution over the grey levels has log2 of their number."""
    model, process, levels = run.model, run.model.process, run.data.levels
    images = run.data.test.images[: args.bits]
    labels = run.data.test.labels[: args.bits] if model.cfg.classes else None

    def net(inputs, x, time):
        return diffusion.predictor(model, *inputs)(x, time)

    def flow(inputs, row, x, signs):
        return flow_step(process.predicts)(diffusion.predictor(model, *inputs), row, x, signs)

    net, flow = (compiled(f, channels_last=True) if args.compile else f for f in (net, flow))
    inputs, choices = (run.params, labels), {"predicts": process.predicts, "levels": levels}
    for_bound, for_flow = random.split(key).unbind(0)
    with progress(model.steps, "the bound") as advance:
        options = {**choices, "variance": process.variance, "callback": advance}
        predict = functools.partial(net, inputs)
        bound = variational_bound(predict, model.schedule, images, for_bound, **options).total
    with progress(args.flow_steps, "the flow") as advance:
        options = {**choices, "steps": args.flow_steps, "callback": advance, "step": flow}
        flowed = flow_bits(inputs, model.schedule, images, for_flow, **options)
    values = {"bound": bound, "flow": flowed}
    errors = {f"{name}_error": float(b.std() / len(b) ** 0.5) for name, b in values.items()} if len(images) > 1 else {}
    means = {name: float(b.mean()) for name, b in values.items()}
    return {**means, **errors, "uniform": float(np.log2(levels)), "images": len(images)}


@torch.no_grad()
def interpolate(args: InterpolateArgs) -> None:
    """Interpolate between test images by way of their noise: DDIM backwards, a great circle, and DDIM; of no class."""
    run = diffusion.opened(args)
    schedule, predicts, images = run.model.schedule, run.model.process.predicts, run.data.test.images
    path = unused(args.out, run.folder / "interpolation.png")
    if len(images) < 2:
        raise ValueError(f"interpolate goes from one test image to another; there is {len(images)}")
    forth = ddim_inversion(schedule, args.sampler_steps, predicts=predicts)
    # As the inversion: the same times, and nothing clipped.
    back = samplers.ddim(schedule, args.sampler_steps, predicts=predicts, clip=False)
    pairs = min(PAIRS, len(images) // 2)
    ends, fractions = images[: 2 * pairs], torch.linspace(0, 1, 9).tolist()

    def through(sampler: Sampler, x: Tensor, callback: Callable) -> Tensor:
        sampler = diffusion.with_net(sampler, run.model, compile=args.compile)
        return samplers.sample(sampler, (run.params, no_label(run, len(x))), x, callback=callback)

    with progress(2 * args.sampler_steps, "interpolating") as advance:
        noise = through(forth, ends, advance)
        way = torch.cat([slerp(noise[:pairs], noise[pairs:], f) for f in fractions])  # (fractions * pairs, ...)
        between = through(back, way, advance).unflatten(0, (len(fractions), pairs)).transpose(0, 1).cpu()
    error = float((torch.cat([between[:, 0], between[:, -1]]) - ends.cpu()).abs().mean())
    table = torch.cat([ends[:pairs, None].cpu(), between, ends[pairs:, None].cpu()], 1)  # (pairs, fractions + 2, ...)
    columns = ["image", *(f"{f:.2g}" for f in fractions), "image"]
    gan_plots.image_table(path, unit(table), None, columns, "Between test images, by way of their noise")
    print(f"{pairs} pairs in {path}; images come back with a mean absolute error of {error / 2:.4f} (of 1)")


@torch.no_grad()
def inpaint(args: InpaintArgs) -> None:
    """Fill in the part of test images that a mask leaves free; of no class."""
    run = diffusion.opened(args)
    images, path = run.data.test.images[: args.count], unused(args.out, run.folder / "inpainted.png")
    mask = inpainting.mask_of(args.mask, *images.shape[2:]).to(run.device)
    sampler = diffusion.make_sampler(run.model, args.sampler, args.sampler_steps, compile=args.compile)
    for_start, key = random.split(random.key(args.seed, run.device)).unbind(0)
    with progress(args.sampler_steps, "inpainting") as advance:
        x, inputs = random.normal(for_start, images.shape), (run.params, no_label(run, len(images)))
        whole = inpainting.inpaint(sampler, inputs, x, images, mask, key, repeats=args.repeats, callback=advance)
    # Grey, where nothing is known.
    rows = torch.stack([unit(part.cpu()) for part in (images, torch.where(mask, images, 0.0), whole)])
    gan_plots.image_table(path, rows, ["image", "known", "filled in"], title="Test images, inpainted")
    print(f"{len(images)} test images in {path}")


def gradients(args: GradientsArgs) -> None:
    """Norms of per-example gradients of the loss that was trained, and the loss, by the time."""
    run = diffusion.opened(args)
    model, key = run.model, random.key(args.seed, run.device)
    path = unused(args.out, run.folder / "gradients_of_times.png")
    if model.cfg.zero and all(not leaf.any() for leaf in tree.leaves(run.params["output"])):
        raise ValueError(f"the net of '{run.folder}' gives 0 everywhere: it has not been trained")

    def losses_of(params, batch):
        *batch, keys = batch
        return diffusion.losses(params, batch, keys, model, run.data.levels)[0]

    def report(params, batch):
        reports = per_example.reports(losses_of, params, batch, ("norm",))
        return reports.losses, reports.total_norm

    report = compiled(report) if args.compile else report
    columns = []
    with progress(args.times, "gradients") as advance:
        for batch in diffusion.probe(model, run.data, key, args.times, args.count):
            columns.append([values.cpu() for values in (batch[2], *report(run.params, batch))])
            advance()
    times, losses, norms = (torch.cat(parts) for parts in zip(*columns, strict=True))
    quantities = {"norm": norms, "loss": losses, "square": norms.square()}
    table = {name: by_time.grouped(times, values, model.steps) for name, values in quantities.items()}
    middle, square = table["square"]
    positive = bool((table["loss"][1] > 0).all())
    with plots.panels(path, 1, 3, 4.6, 3.8) as (left, centre, right):
        plots.curves(left, {"": table["norm"]}, "time", "mean norm", "Per-example gradients", log=True)
        share = middle, square / square.nansum()
        plots.curves(centre, {"": share}, "time", "share", "Share in the sum of their squares")
        title = f"Loss ({model.process.loss_weight})"
        plots.curves(right, {"": table["loss"]}, "time", "mean loss", title, log=positive)
    order = times.argsort()
    total = norms[order].double().cumsum(0)
    half = int(times[order][int((total < total[-1] / 2).sum())])
    means = {name: values for name, (_, values) in table.items()}
    write_json(path.with_suffix(".json"), {"time": middle, **means, "half_of_the_norm_up_to_time": half})
    sentence = f"half of the sum of {len(norms)} gradients' norms is from times up to {half} of {model.steps}"
    print(f"{sentence}; picture in {path}")


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (EvaluateArgs, evaluate),
        evaluate=(EvaluateArgs, evaluate),
        interpolate=(InterpolateArgs, interpolate),
        inpaint=(InpaintArgs, inpaint),
        gradients=(GradientsArgs, gradients),
    )
