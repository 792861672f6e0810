"""Autoencoders: plain, denoising, conditional, variational and importance-weighted.

Kingma and Welling 2014, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), and its relatives, by `--model`. Without a
flag a variational autoencoder learns scikit-learn's 8x8 digits, offline:

    python experiments/vae.py                                            half a minute on 2 CPU cores
    python experiments/vae.py --latent 2                                 and the whole plane of codes as a picture
    python experiments/vae.py --data FOLDER --compile                    the files of MNIST; or any folder of pictures
    python experiments/vae.py --model conditional-vae --beta 4 --likelihood gaussian --kind convolutional
    python experiments/vae.py --model iwae --samples 50
    python experiments/vae.py --watch-gradients
    python experiments/vae.py sample --run runs/vae/NAME                 reconstruct and interpolate likewise

It ends with the ELBO of the test images in its two parts, a bound on their log likelihood, and pictures. Beside them
stand the figures of the mean image, which needs no net.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core import random, tree
from experiments.parts import autoencoder as parts
from experiments.parts import autoencoder_pictures as pictures
from experiments.parts.autoencoder import Autoencoder
from experiments.parts.variational import (
    as_functions,
    corrupted,
    figures_of,
    log_likelihood,
    mean_image,
    weighted_bound,
)
from nets.generative import autoencoder
from nets.generative.autoencoder import Config
from train import optimizers, plots
from train.data import batching
from train.data.fingerprint import fingerprint
from train.data.images import sets as image_sets
from train.data.images.sets import ImageSet
from train.data.understood import understood
from train.gradients import watch
from train.losses import variational
from train.run import Common, Count, Fraction, NonNegative, Positive, SavedRun, Shared, begin, command_line
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS
from train.run.run import format_figures
from train.step import create, make_step

RUNS = Path("runs/vae")


@dataclass(frozen=True)
class Model:
    gaussian: bool = False
    """Codes are samples of q(z | x), and the loss has its divergence from N(0, I)."""
    conditional: bool = False
    flags: dict[str, float] = field(default_factory=dict)
    """Flags that only some models have, with their defaults."""


MODELS = {
    "autoencoder": Model(),
    # Vincent et al. 2008, "Extracting and Composing Robust Features with Denoising Autoencoders".
    "denoising": Model(flags={"noise": 0.3}),
    "conditional": Model(conditional=True),
    "vae": Model(gaussian=True, flags={"beta": 1.0}),
    # Sohn et al. 2015, "Learning Structured Output Representation using Deep Conditional Generative Models".
    "conditional-vae": Model(gaussian=True, conditional=True, flags={"beta": 1.0}),
    # Burda et al. 2016, "Importance Weighted Autoencoders", arXiv:1509.00519.
    "iwae": Model(gaussian=True, flags={"samples": 5}),
}
KINDS, OUTPUTS = ("mlp", "convolutional"), {"bernoulli": "logits", "gaussian": "mean"}


@dataclass(frozen=True)
class Args:
    model: Literal[tuple(MODELS)] = "vae"
    """Model; this help shows the defaults of the --model, --kind, --data and --size on its command line."""
    data: str = "digits"
    """"digits" (embedded), "mnist", "cifar10" ... (downloaded once), or a folder of pictures."""
    size: Count | None = None
    """Pixels per side that images are scaled to; None keeps the size of sets like MNIST, and is 64 for pictures."""
    kind: Literal[KINDS] = "mlp"
    """Kind of both nets; convolutional by default for images of more than 28 pixels per side."""
    likelihood: Literal[tuple(OUTPUTS)] = "bernoulli"
    """Distribution of a pixel; gaussian (of a VAE with one learned variance) by default for coloured images."""
    latent: Count = 8
    """Dimension of a code."""
    width: Count = 256
    """Units of the encoder's first hidden layer, or channels of the first feature maps."""
    beta: NonNegative | None = 1.0
    """Weight of the divergence (vae, conditional-vae)."""
    samples: Count | None = None
    """Samples in the importance-weighted bound (iwae)."""
    noise: Fraction | None = None
    """Share of the pixels that is set to 0 (denoising)."""
    steps: Count = 2000
    """Training steps."""
    batch: Count = 100
    """Images per step."""
    learning_rate: Positive = 1e-3
    """Learning rate of Adam."""
    bound_samples: Count = 100
    """Samples per test image in the importance-weighted bound at the end."""
    eval_every: Count = 250
    """Steps between evaluations on the test images."""
    watch_gradients: bool = False
    """Record the norm of each image's gradient and the gradient noise scale."""
    common: Shared = Common(save_every=1000, compile=False)


def presets(words: dict[str, str]) -> Args | None:
    """The arguments whose defaults depend on the model and on the images."""
    model, (style, grey) = words.get("model", "vae"), parts.expected_images(words)
    kind = words.get("kind", "convolutional" if style == "small" else "mlp")
    if model not in MODELS or kind not in KINDS:
        return None
    preset, own = preset_of(style, kind), MODELS[model].flags
    width = preset.widths[0] if kind == "mlp" else preset.width
    flags = {name: own.get(name) for name in ("beta", "samples", "noise")}
    return Args(
        model, kind=kind, likelihood="bernoulli" if grey else "gaussian", latent=preset.latent, width=width, **flags
    )


def preset_of(style: str, kind: str) -> Config:
    return autoencoder.PRESETS[f"{style}-conv" if kind == "convolutional" or style == "small" else style]


def check(args: Args) -> None:
    """Raise ValueError if a flag is not the model's."""
    for name in ("beta", "samples", "noise"):
        value, owners = getattr(args, name), [model for model, each in MODELS.items() if name in each.flags]
        if (value is None) == (args.model in owners):
            raise ValueError(f"--{name} {value} is for {', '.join(owners)}; the model is '{args.model}'")
    if args.watch_gradients and args.model == "iwae":
        raise ValueError("--watch-gradients is not for iwae: its samples lie inside of a vmap of the loss")


def net_of(args: Args, images: ImageSet) -> Config:
    shape, model = tuple(images.train.images.shape[1:]), MODELS[args.model]
    preset, output = preset_of(parts.style(shape[1]), args.kind), OUTPUTS[args.likelihood]
    sizes = {"widths": (args.width, *preset.widths[1:])} if args.kind == "mlp" else {"width": args.width}
    # Rybkin et al. 2021, "Simple and Effective VAE Training with Calibrated Decoders", arXiv:2006.13202: with a fixed
    # variance of 1 the divergence would outweigh the pixels.
    sizes |= {"learned_variance": output == "mean" and model.gaussian, "gaussian": model.gaussian}
    sizes |= {"classes": len(images.classes) if model.conditional else 0, "latent": args.latent}
    return dataclasses.replace(preset, shape=shape, kind=args.kind, output=output, **sizes)


def losses(params, batch, keys, cfg: Config, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss per image (N,), and means of its parts. batch: (images, labels); keys (N, 2)."""
    images, labels = batch
    if not cfg.gaussian:
        shown = images if args.noise is None else corrupted(images, keys, args.noise)
        output = autoencoder.apply(params, shown, cfg, labels=labels)["output"]
        return -log_likelihood(params, output, images, cfg), {}
    q = autoencoder.encode(params, images, cfg, labels=labels)
    if args.samples is not None:
        bound = weighted_bound(params, q, images, labels, keys, cfg, args.samples)
        return -bound, {"bound": bound.mean()}
    output = autoencoder.decode(params, autoencoder.draw(q, keys), cfg, labels=labels)
    log_p, kl = log_likelihood(params, output, images, cfg), variational.kl_divergence(*q)
    means = {"elbo": variational.elbo(log_p, kl).mean(), "reconstruction": log_p.mean(), "kl": kl.sum(1).mean()}
    return -variational.elbo(log_p, kl, args.beta), means  # -log p(x | z) + beta KL(q(z | x) || p(z))


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("data", "steps", "bound_samples", "eval_every"), shards=BY_ROWS)
    check(args)
    images = parts.read(args, labelled=MODELS[args.model].conditional)
    cfg = net_of(args, images)
    understood(print, image_sets.facts(images) | {"model": args.model, "net": cfg})

    init_key, order_key, test_key = random.split(random.key(args.common.seed), 3).unbind(0)
    init_key, test_key = tree.move((init_key, test_key), run.device)
    learn, test = tree.move((images.train, images.test), run.device)
    optimizer, model = optimizers.adam(args.learning_rate), autoencoder.spec(cfg)
    identity = {"model": args.model, "net": cfg, "data": fingerprint(images.train, images.test)}
    state = run.restore(create(init_key, model, optimizer), identity, args.steps, model)
    options = {"donate": True, "update_norm": False, "distributed": run.distributed, "compile": args.common.compile}
    options |= {"watch": watch.watch} if args.watch_gradients else {}
    step = make_step(functools.partial(losses, cfg=cfg, args=args), optimizer, policy=run.policy, **options)

    def batch_at(i: int):
        rows = batching.epoch_batch(order_key, i, len(learn.labels), args.batch)
        return learn.images[rows], learn.labels[rows]

    with run.open({"classes": images.classes}):
        run.log.print(f"{tree.count(model):,} parameters; run in {run.folder}")
        average = watch.begin(run.folder)
        for at, batch in run.steps(map(batch_at, run.remaining)):
            state, metrics = step(state, batch)
            if args.watch_gradients:
                average, metrics = watch.record(run.log, at, metrics, average)
            run.record(at, metrics, args.batch)
            if run.due(at, args.eval_every):
                means = figures_of(run.whole(state.params), cfg, test, test_key, args.noise)
                run.log.metrics(at, {f"test/{name}": value for name, value in means.items()})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        params = run.whole(state.params)
        figures = figures_of(params, cfg, test, test_key, args.noise, args.bound_samples)
        figures |= mean_image(images.train, images.test, cfg)
        run.result(figures)
    watch.draw(run.folder)
    draw_curves(run.folder, cfg)
    model = as_functions(params, cfg, images.classes, args.noise)
    codes = pictures.draw(run.folder, model, test, test_key)
    if cfg.latent == 2:
        pictures.draw_latent_grid(run.folder / "latent_grid.png", model, codes)
    print(f"{format_figures(figures)}; {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def draw_curves(folder: Path, cfg: Config) -> None:
    """loss.png, from the log of a run."""
    names = ("train/loss", "train/elbo", "train/bound", "test/elbo", "test/reconstruction", "test/kl")
    lines = read_curves(folder, *names)
    minus = {name: (steps, [-y for y in values]) for name, (steps, values) in lines.items()}
    if not cfg.gaussian:
        lines = {"train": lines["train/loss"], "test": minus["test/reconstruction"]}
        plots.curves(folder / "loss.png", lines, ylabel="nats per image", title="-log p(x | z)")
        return
    labels = {"train/elbo": "train", "test/elbo": "test", "train/bound": "train, importance-weighted bound"}
    bounds = {label: minus[name] for name, label in labels.items() if lines[name][0]}
    two = {"-log p(x | z)": minus["test/reconstruction"], "KL(q(z | x) || p(z))": lines["test/kl"]}
    with plots.panels(folder / "loss.png", 1, 2, 5.6, 4.0) as (left, right):
        plots.curves(left, bounds, ylabel="nats per image", title="-ELBO")
        plots.curves(right, two, ylabel="nats per image", title="Its parts, test images")


def load(run: SavedRun, device: torch.device) -> Autoencoder:
    cfg = run.read("net", Config)
    values = tree.move(run.learned(autoencoder.spec(cfg), averaged=False), device)
    return as_functions(values, cfg, tuple(run.config["classes"]), run.read("args", Args).noise)


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train, presets), root=RUNS, **pictures.commands(RUNS, load))
