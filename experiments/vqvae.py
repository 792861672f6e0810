"""VQ-VAE: an autoencoder whose codes are integers, and a gated PixelCNN that learns these, so that it can be sampled.

van den Oord et al. 2017, "Neural Discrete Representation Learning" (arXiv:1711.00937); the prior is that of van den
Oord et al. 2016 (arXiv:1606.05328). Two stages of one run: `--steps` of the autoencoder, then `--prior-steps` of the
prior, on the codes of the training images. Without a flag they learn scikit-learn's 8x8 digits, offline:

    python experiments/vqvae.py
    python experiments/vqvae.py --data FOLDER --steps 1500 --prior-steps 1500 --compile      the files of MNIST
    python experiments/vqvae.py --data FOLDER --size 32 --codebook loss  any folder of pictures; gradient descent
    python experiments/vqvae.py sample --run runs/vqvae/NAME --label 3   reconstruct and interpolate likewise

It ends with the squared error per pixel beside that of the mean image, the use of the codebook, and the prior's nats
per code beside those of an even guess and of a guess by the codes' frequencies.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core import random, spec, tree
from experiments.parts import autoencoder as parts
from experiments.parts import autoencoder_pictures as pictures
from experiments.parts.autoencoder import Autoencoder
from nets.generative import pixelcnn, vqvae
from train import optimizers, plots
from train.data import batching
from train.data.fingerprint import fingerprint
from train.data.images import sets as image_sets
from train.data.images.arrays import Labelled
from train.data.images.sets import ImageSet
from train.data.understood import understood
from train.gradients import watch
from train.losses import cross_entropy, variational
from train.run import Common, Count, NonNegative, Positive, SavedRun, Shared, begin, command_line
from train.run.logs import read_curves
from train.run.run import format_figures
from train.step import TrainState, create, make_step

RUNS = Path("runs/vqvae")


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits" (embedded), "mnist", "cifar10" ... (downloaded once), or a folder of pictures."""
    size: Count | None = None
    """Pixels per side that images are scaled to; None keeps the size of sets like MNIST, and is 64 for pictures."""
    width: Count = 32
    """Channels of the feature maps (this help shows the defaults for the --data and --size on its command line)."""
    codes: Count = 64
    """Number of vectors in the codebook."""
    codebook: Literal["ema", "loss"] = "ema"
    """Learn the codebook as moving averages of the encodings, or by gradient descent on a loss."""
    commitment: NonNegative = 0.25
    """Weight of the commitment loss."""
    revive_every: Count = 50
    """Steps between replacements of unused codes, in the first half of the steps."""
    steps: Count = 2000
    """Training steps of the autoencoder."""
    prior_steps: Count = 300
    """Training steps of the prior, after those; it overfits the digits from about 300 on."""
    batch: Count = 100
    """Images per step."""
    learning_rate: Positive = 1e-3
    """Learning rate of Adam, in both stages."""
    eval_every: Count = 250
    """Steps between evaluations on the test images."""
    watch_gradients: bool = False
    """Record the norm of each image's gradient and the gradient noise scale (with --codebook loss)."""
    common: Shared = Common(save_every=1000, compile=False)


def presets(words: dict[str, str]) -> Args:
    preset = vqvae.PRESETS[parts.expected_images(words)[0]]
    return Args(width=preset.width, codes=preset.codes)


def nets_of(args: Args, images: ImageSet) -> tuple[vqvae.Config, pixelcnn.Config]:
    (channels, *sides), classes = images.train.images.shape[1:], len(images.classes)
    style, sizes = parts.style(sides[0]), {"width": args.width, "codes": args.codes, "codebook": args.codebook}
    cfg = dataclasses.replace(vqvae.PRESETS[style], channels=channels, **sizes)
    if any(side % 2**cfg.stages for side in sides):
        raise ValueError(f"images of {sides[0]} x {sides[1]} pixels cannot be halved {cfg.stages} times")
    if args.watch_gradients and cfg.codebook == "ema":
        raise ValueError("--watch-gradients: the averages of an ema codebook mix the images; use --codebook loss")
    grid, classes = tuple(side // 2**cfg.stages for side in sides), classes if classes > 1 else 0
    prior = dataclasses.replace(pixelcnn.PRESETS[style], shape=grid, categories=cfg.codes, classes=classes)
    return cfg, prior


def losses(
    params, batch, keys, cfg: vqvae.Config, beta: float, scale: float, ways: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss per image (N,), eq. 3 of the paper, and means of its parts.

    scale: of the squared error. ways: as in `vqvae.apply`.
    """
    images, _ = batch
    out = vqvae.apply(params, images, cfg, train=True, ways=ways)
    error = variational.squared_error(out["output"], images)
    commitment = variational.commitment_loss(out["encodings"], out["nearest"])
    value = scale * error + beta * commitment  # |x - D(e)|^2 / variance + beta |z - stop(e)|^2
    if cfg.codebook == "loss":
        value = value + variational.codebook_loss(out["encodings"], out["nearest"])  # + |stop(z) - e|^2
    return value, {"error": error.mean(), "commitment": commitment.mean()}


def prior_losses(params, batch, keys, cfg: pixelcnn.Config) -> Tensor:
    """Nats per code, (N,): the mean over an image's codes of -log p(code | the codes before it)."""
    codes, labels = batch
    logits = pixelcnn.apply(params, codes, cfg, labels=labels, train=True)  # (N, height', width', codes)
    nats = cross_entropy(logits.flatten(0, -2), codes.flatten(), reduction="none")
    return nats.reshape(len(codes), -1).mean(1)


@torch.no_grad()
def revived(state: TrainState, cfg: vqvae.Config, images: Tensor, key: Tensor, every: bool) -> TrainState:
    """The state with unused codes, or every code, replaced by encodings of these images."""
    values = tree.merge(state.params, state.stats)
    z, size = vqvae.encode(values, images, cfg), None
    if cfg.codebook == "loss":
        size = vqvae.usage(vqvae.quantise(values["codebook"]["weight"], z).codes, cfg)
    codebook = vqvae.revive(values["codebook"], z, key, math.inf if every else 1.0, size)
    params, stats = spec.split(vqvae.spec(cfg), {**values, "codebook": codebook})
    return state._replace(params=params, stats=stats)


def learned(state: dict[str, TrainState]) -> tree.Tree:
    """Parameters and Stats of both nets."""
    return {name: tree.merge(part.params, part.stats) for name, part in state.items()}


def codes_of(values: tree.Tree, cfg: vqvae.Config, images: Tensor) -> Tensor:
    """(N, height', width') integers."""
    return parts.in_parts(lambda x: vqvae.apply(values["model"], x, cfg)["codes"], images)


def means_of(values: tree.Tree, cfg: vqvae.Config, prior: pixelcnn.Config, test: Labelled, key: Tensor):
    """Means over the test images: the squared error per pixel, and the prior's nats per code."""

    def per_image(images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
        out = vqvae.apply(values["model"], images, cfg)
        nats = prior_losses(values["prior"], (out["codes"], labels), keys, prior)
        return {"error": variational.squared_error(out["output"], images), "prior_nats": nats}

    return parts.averages(per_image, test, key)


def as_functions(values: tree.Tree, cfg: vqvae.Config, prior: pixelcnn.Config, classes: tuple[str, ...]) -> Autoencoder:
    rows = vqvae.codebook(values["model"]["codebook"], cfg.smoothing)

    def encode(images: Tensor, labels: Tensor) -> Tensor:
        return vqvae.encode(values["model"], images, cfg)

    def decode(z: Tensor, labels: Tensor) -> Tensor:
        return vqvae.decode(values["model"], vqvae.quantise(rows, z).codes, cfg)

    @torch.no_grad()
    def sample(key: Tensor, labels: Tensor, temperature: float) -> Tensor:
        conditions = labels if prior.classes else None
        codes = pixelcnn.sample(values["prior"], key, prior, len(labels), conditions, temperature)
        return parts.in_parts(lambda part: vqvae.decode(values["model"], part, cfg), codes)

    encode, decode = (functools.partial(parts.in_parts, f) for f in (encode, decode))
    return Autoencoder(encode, decode, classes, prior.classes > 0, sample)


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("data", "prior_steps", "eval_every"), shards=("replicate",))
    images, total = parts.read(args, labelled=False), args.steps + args.prior_steps
    cfg, prior = nets_of(args, images)
    understood(print, image_sets.facts(images) | {"net": cfg, "prior": prior})
    if run.first > total:
        raise ValueError(
            f"--prior-steps is {args.prior_steps}, but '{run.resumed_from}' has done {run.first - args.steps}"
        )

    names = ("model", "prior", "order", "prior_order", "test", "revive")
    keys = dict(zip(names, random.split(random.key(args.common.seed), len(names)), strict=True))
    keys |= {name: keys[name].to(run.device) for name in ("model", "prior", "test", "revive")}
    learn, test = tree.move((images.train, images.test), run.device)
    optimizer = optimizers.adam(args.learning_rate)
    specs = {"model": vqvae.spec(cfg), "prior": pixelcnn.spec(prior)}
    identity = {"net": cfg, "prior": prior, "data": fingerprint(images.train, images.test)}
    state = {name: create(keys[name], model, optimizer) for name, model in specs.items()}
    state = run.restore(state, identity, total, specs)
    scale = float(1 / learn.images.var())
    loss = functools.partial(losses, cfg=cfg, beta=args.commitment, scale=scale, ways=run.rows)
    options = {"policy": run.policy, "distributed": run.distributed, "compile": args.common.compile}
    options |= {"donate": True, "update_norm": False}
    step = make_step(loss, optimizer, watch=watch.watch if args.watch_gradients else None, **options)
    prior_step = make_step(functools.partial(prior_losses, cfg=prior), optimizer, **options)

    def rows_at(i: int) -> Tensor:
        first = i < args.steps
        order, i = (keys["order"], i) if first else (keys["prior_order"], i - args.steps)
        return batching.epoch_batch(order, i, len(learn.labels), args.batch)

    with run.open({"classes": images.classes}):
        counts = " and ".join(f"{tree.count(part.params):,} ({name})" for name, part in state.items())
        run.log.print(f"{counts} parameters; run in {run.folder}")
        codes, average = None, watch.begin(run.folder)
        for at, rows in run.steps(map(rows_at, run.remaining)):
            if at <= args.steps:
                batch, group = (learn.images[rows], learn.labels[rows]), "train/"
                if at == 1 or (at <= args.steps // 2 and at % args.revive_every == 0):
                    revive_key = random.fold_in(keys["revive"], at)
                    state["model"] = revived(state["model"], cfg, batch[0], revive_key, every=at == 1)
                state["model"], metrics = step(state["model"], batch)
                if args.watch_gradients:
                    average, metrics = watch.record(run.log, at, metrics, average)
            else:
                if codes is None:
                    run.log.print("the prior learns the codes ...")
                    codes = codes_of(learned(state), cfg, learn.images)
                state["prior"], metrics = prior_step(state["prior"], (codes[rows], learn.labels[rows]))
                group = "prior/"
            run.record(at, metrics, args.batch, group=group)
            if run.due(at, args.eval_every):
                means = means_of(learned(state), cfg, prior, test, keys["test"])
                # The prior's figure means nothing before it learns; then the others do not change any more.
                name = "error" if group == "train/" else "prior_nats"
                run.log.metrics(at, {f"test/{name}": means[name]})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        values = learned(state)
        counts = vqvae.usage(codes_of(values, cfg, test.images), cfg)
        figures = means_of(values, cfg, prior, test, keys["test"])
        figures |= {"codes_used": float((counts > 0).float().mean()), "perplexity": float(vqvae.perplexity(counts))}
        figures |= {"mean_image_error": parts.mean_image_error(images.train, images.test)}
        figures |= {"prior_nats_uniform": math.log(cfg.codes), "prior_nats_unigram": math.log(figures["perplexity"])}
        run.result(figures)
    watch.draw(run.folder)
    draw_curves(run.folder)
    draw_usage(run.folder / "usage.png", counts, figures["perplexity"])
    pictures.draw(run.folder, as_functions(values, cfg, prior, images.classes), test, keys["test"])
    print(f"{format_figures(figures)}; {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def draw_curves(folder: Path) -> None:
    """loss.png, from the log of a run."""
    error, nats = ("train/error", "test/error"), ("prior/loss", "test/prior_nats")
    with plots.panels(folder / "loss.png", 1, 2, 5.6, 4.0) as (left, right):
        plots.curves(left, read_curves(folder, *error), ylabel="squared error per pixel", title="Autoencoder", log=True)
        plots.curves(right, read_curves(folder, *nats), ylabel="nats per code", title="Prior")


def draw_usage(path: Path, counts: Tensor, perplexity: float) -> None:
    """Uses of each row of the codebook (codes,), in descending order."""
    share, rank = 100 * counts.sort(descending=True).values / counts.sum(), torch.arange(1, len(counts) + 1)
    lines = {"test images": (rank, share.cpu()), "even use": (rank, torch.full_like(share, 100 / len(counts)).cpu())}
    title = f"{int((counts > 0).sum())} of {len(counts)} codes used, perplexity {perplexity:.1f}"
    plots.curves(path, lines, "code, by its use", "% of the positions", title)


def load(run: SavedRun, device: torch.device) -> Autoencoder:
    cfg, prior = run.read("net", vqvae.Config), run.read("prior", pixelcnn.Config)
    specs = {"model": vqvae.spec(cfg), "prior": pixelcnn.spec(prior)}
    values = {name: run.learned(model, name, averaged=False) for name, model in specs.items()}
    return as_functions(tree.move(values, device), cfg, prior, tuple(run.config["classes"]))


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train, presets), root=RUNS, **pictures.commands(RUNS, load))
