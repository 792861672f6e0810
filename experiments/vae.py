"""Autoencoders: plain, denoising, conditional, variational, importance-weighted, and with a codebook.

Kingma and Welling 2014, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), and what is around it, by `--model`.
Without a flag a variational autoencoder learns scikit-learn's 8x8 digits, offline:

    python experiments/vae.py                                            half a minute on 2 CPU cores
    python experiments/vae.py --latent 2                                 and the whole plane of codes as a picture
    python experiments/vae.py --model vq-vae --data FOLDER               the files of MNIST; or any folder of pictures
    python experiments/vae.py --model conditional-vae --beta 4 --likelihood gaussian --kind convolutional
    python experiments/vae.py --model iwae --samples 50
    python experiments/vae.py --watch-gradients
    python experiments/vae.py sample --run runs/vae/NAME                 reconstruct and interpolate likewise
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from core import random, tree
from experiments.parts.autoencoder import (
    Trained,
    encoded,
    figures_of,
    in_turn,
    integers,
    load,
    losses_alone,
    mean_loss,
    measured,
    prior_loss,
    revived,
    sampled,
)
from experiments.parts.autoencoder_pictures import draw, draw_curves, draw_reconstructions, draw_walks
from nets.generative import autoencoder, pixelcnn, vqvae
from train import optimizers, plots
from train.data import batching
from train.data.images import sets as image_sets
from train.data.images.sets import ImageSet
from train.gradients import watch as watching
from train.run import checkpoints, command_line
from train.run import run as runs
from train.step import TrainState, create, make_step

RUNS = Path("runs/vae")


@dataclass(frozen=True)
class Model:
    gaussian: bool = False
    """Codes are drawn from q(z | x), and the loss has its divergence from N(0, I)."""
    conditional: bool = False
    flags: tuple[str, ...] = ("latent", "kind", "likelihood", "width")
    """Those that not every model has."""


COMMON = Model().flags
MODELS = {
    "autoencoder": Model(),
    # Vincent et al. 2008, "Extracting and Composing Robust Features with Denoising Autoencoders".
    "denoising": Model(flags=(*COMMON, "noise")),
    "conditional": Model(conditional=True),
    "vae": Model(gaussian=True, flags=(*COMMON, "beta")),
    # Sohn et al. 2015, "Learning Structured Output Representation using Deep Conditional Generative Models".
    "conditional-vae": Model(gaussian=True, conditional=True, flags=(*COMMON, "beta")),
    # Burda et al. 2016, "Importance Weighted Autoencoders", arXiv:1509.00519.
    "iwae": Model(gaussian=True, flags=(*COMMON, "samples")),
    # van den Oord et al. 2017, "Neural Discrete Representation Learning", arXiv:1711.00937. Afterwards a gated PixelCNN
    # (arXiv:1606.05328) learns the codes, so that there is something to sample from.
    "vq-vae": Model(flags=("width", "codebook", "codes", "commitment", "revive_every", "prior_steps")),
}
DEFAULTS = {"beta": 1.0, "samples": 5, "noise": 0.3, "commitment": 0.25, "revive_every": 50, "prior_steps": 300}


@dataclass(frozen=True)
class Args:
    model: str = "vae"
    """autoencoder, denoising, conditional (an autoencoder), vae, conditional-vae, iwae, vq-vae."""
    data: str = "digits"
    """"digits" (embedded), "mnist", "cifar10" ... (downloaded once), or a folder of images."""
    size: int | None = None
    """Pixels that images are scaled to; their own if not given, 64 for pictures."""
    kind: str | None = None
    """mlp or convolutional; mlp for images of up to 28 pixels."""
    likelihood: str | None = None
    """bernoulli, or gaussian (of a VAE with one learned variance); bernoulli for grey images."""
    latent: int | None = None
    """Numbers of a code; 8 for digits, 20 for MNIST, 128 for pictures."""
    width: int | None = None
    """Units of the encoder's first hidden layer, or channels of the first maps."""
    beta: float | None = None
    """Of a VAE: weight of the divergence; 1."""
    samples: int | None = None
    """Of iwae: samples in its bound; 5."""
    noise: float | None = None
    """Of denoising: the part of the pixels that is put to 0; 0.3."""
    codebook: str | None = None
    """Of vq-vae: ema (moving averages) or loss."""
    codes: int | None = None
    """Of vq-vae: vectors in the codebook; 64 for digits, 128 for MNIST, 512 for pictures."""
    commitment: float | None = None
    """Of vq-vae: weight of the commitment loss; 0.25."""
    revive_every: int | None = None
    """Of vq-vae: in the first half of the steps, after so many of them, codes out of use are replaced; 50."""
    steps: int = 2000
    """Training steps."""
    prior_steps: int | None = None
    """Of vq-vae: further steps, in which the prior learns the codes; 300, after which it overfits the digits."""
    batch: int = 100
    """Images a step."""
    learning_rate: float = 1e-3
    """Of Adam."""
    bound_samples: int = 100
    """Samples of each test image in the importance-weighted bound at the end."""
    test_every: int = 250
    """Steps between two looks at the test images."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    watch_gradients: bool = False
    """Look at the norm of each image's gradient, and record the gradient noise scale."""
    seed: int = 0
    """Seed of everything random."""
    name: str | None = None
    """Folder under runs/vae; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    compile: bool = False
    """Compile the step with torch.compile: it takes 20 seconds, and the step of a VAE on digits is three times faster
    afterwards, so a run of fewer than 5000 such steps ends sooner without."""


@dataclass(frozen=True)
class ReconstructArgs:
    run: Path
    """Folder of a run, such as runs/vae/NAME."""
    count: int = 20
    """How many test images."""
    seed: int = 0
    """Seed of their choice."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


@dataclass(frozen=True)
class SampleArgs:
    run: Path
    """Folder of a run, such as runs/vae/NAME."""
    count: int = 64
    """How many samples."""
    label: int | None = None
    """Of this class, where the model is conditional."""
    temperature: float = 1.0
    """Deviation of the codes that are decoded; of vq-vae what the prior's logits are divided by."""
    seed: int = 0
    """Seed of the codes."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


@dataclass(frozen=True)
class InterpolateArgs:
    run: Path
    """Folder of a run, such as runs/vae/NAME."""
    images: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Numbers of test images: from the first to the second, from the third to the fourth ..."""
    steps: int = 9
    """Images on the way."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


def chosen(args: Args) -> dict[str, float]:
    """The values of the flags that only some models have, with their defaults."""
    command_line.choice("--model", args.model, MODELS)
    own = MODELS[args.model].flags
    for name in sorted({flag for model in MODELS.values() for flag in model.flags}):
        if getattr(args, name) is not None and name not in own:
            owners = ", ".join(other for other, model in MODELS.items() if name in model.flags)
            raise ValueError(f"--{name.replace('_', '-')} is for {owners}; the model is '{args.model}'")
    found = {name: value if getattr(args, name) is None else getattr(args, name) for name, value in DEFAULTS.items()}
    command_line.at_least_one(**{name: getattr(args, name) for name in COUNTS}, samples=found["samples"])
    command_line.at_least_one(revive_every=found["revive_every"], prior_steps=found["prior_steps"])
    sizes = {name: getattr(args, name) for name in ("latent", "width", "codes", "size")}
    command_line.at_least_one(**{name: size for name, size in sizes.items() if size is not None})
    command_line.positive(learning_rate=args.learning_rate)
    if args.watch_gradients and args.model == "iwae":
        raise ValueError("--watch-gradients is not for iwae: its samples lie inside of a vmap of the loss")
    if found["beta"] < 0 or found["commitment"] < 0 or not math.isfinite(found["beta"] + found["commitment"]):
        raise ValueError("--beta and --commitment must be numbers of at least 0")
    if not 0 < found["noise"] < 1:
        raise ValueError(f"--noise is {found['noise']}; expected a number between 0 and 1")
    return found


COUNTS = ("steps", "batch", "bound_samples", "test_every", "save_every")


def nets(args: Args, data: ImageSet, noise: float) -> Trained:
    """The nets of a model, fitted to the images."""
    shape, classes = tuple(data.train.images.shape[1:]), len(data.classes)
    small = "digits" if shape[1] < 16 else "mnist" if shape[1] <= 28 else "small"
    if args.model == "vq-vae":
        given = {name: getattr(args, name) for name in ("width", "codes", "codebook")}
        sizes = {name: value for name, value in given.items() if value is not None}
        cfg = dataclasses.replace(vqvae.PRESETS[small], channels=shape[0], **sizes)
        if any(side % 2**cfg.stages for side in shape[1:]):
            raise ValueError(f"vq-vae: images of {shape[1]} x {shape[2]} pixels cannot be halved {cfg.stages} times")
        if args.watch_gradients and cfg.codebook == "ema":
            raise ValueError("--watch-gradients: the averages of an ema codebook mix the images; use --codebook loss")
        grid = tuple(side // 2**cfg.stages for side in shape[1:])
        prior = dataclasses.replace(pixelcnn.PRESETS[small], shape=grid, categories=cfg.codes, classes=classes)
        return Trained(cfg, data.classes, prior)
    kind = args.kind or ("convolutional" if small == "small" else "mlp")
    likelihood = args.likelihood or ("bernoulli" if shape[0] == 1 else "gaussian")
    outputs = {"bernoulli": "logits", "gaussian": "mean"}
    output = outputs[command_line.choice("--likelihood", likelihood, outputs)]
    command_line.choice("--kind", kind, ("mlp", "convolutional"))
    preset = autoencoder.PRESETS[f"{small}-conv" if kind == "convolutional" or small == "small" else small]
    sizes = {} if args.latent is None else {"latent": args.latent}
    if kind == "mlp":
        first, *rest = preset.widths
        sizes["widths"] = (args.width or first, *rest)
    elif args.width is not None:
        sizes["width"] = args.width
    model = MODELS[args.model]
    cfg = dataclasses.replace(
        preset,
        shape=shape,
        kind=kind,
        output=output,
        gaussian=model.gaussian,
        # Rybkin et al. 2021, "Simple and Effective VAE Training with Calibrated Decoders", arXiv:2006.13202: with a
        # fixed variance of 1 the divergence would outweigh what the pixels say.
        learned_variance=output == "mean" and model.gaussian,
        classes=classes if model.conditional else 0,
        **sizes,
    )
    return Trained(cfg, data.classes, noise=noise if args.model == "denoising" else 0.0)


def train(args: Args) -> None:
    free = ("steps", "prior_steps", "test_every", "save_every", "device", "compile", "bound_samples")
    origin, args = runs.begin(RUNS, args, free=free)
    own = {**chosen(args), "weighted": args.model == "iwae"}
    device, data = command_line.device(args.device), image_sets.read_all(args.data, args.size)
    who = nets(args, data, own["noise"])
    images, test = tree.move(data.train, device), tree.move(data.test, device)
    if args.batch > len(images.labels):
        raise ValueError(f"--batch is {args.batch}, but there are {len(images.labels)} images")
    key, optimizer = random.key(args.seed, device), optimizers.adam(args.learning_rate)
    keys = dict(zip(("model", "prior", "order", "prior_order", "look", "revive"), random.split(key, 6), strict=True))
    model = (vqvae if who.quantised else autoencoder).spec(who.cfg)
    state = {"model": create(keys["model"], model, optimizer)}
    total = args.steps
    identity = {"model": args.model, "net": who.cfg, "images": len(images.labels)}
    if who.quantised:
        state["prior"] = create(keys["prior"], pixelcnn.spec(who.prior), optimizer)
        total += own["prior_steps"]
        identity |= {"prior": who.prior, "steps": args.steps}  # where the prior begins
    state = runs.restore(origin, state, identity, total)
    settings = {"who": who, "own": own, "scale": float(1 / images.images.var()) if who.quantised else 1.0}
    step = make_step(
        functools.partial(losses_alone if args.watch_gradients else mean_loss, **settings),
        optimizer,
        watch=watching.watch if args.watch_gradients else None,
        donate=True,
        update_norm=False,
        compile=args.compile,
    )
    learn_prior = functools.partial(prior_loss, cfg=who.prior)
    prior_step = make_step(learn_prior, optimizer, donate=True, update_norm=False, compile=args.compile)

    def now(state: dict[str, TrainState]) -> tree.Tree:
        return {name: tree.merge(part.params, part.stats) for name, part in state.items()}

    config = {"args": args, **identity, "classes": data.classes, "torch": torch.__version__}
    with runs.opened(origin, config, total=total) as run:
        counts = " and ".join(f"{tree.count(part.params):,} ({name})" for name, part in state.items())
        run.log.print(f"{counts} parameters, {len(images.labels):,} images to learn from; run in {run.folder}")
        if args.compile and run.first < total:
            run.log.print("compiling the step ...")
        at, codes, watched = run.first, None, watching.begin(run.folder)
        for at in range(run.first + 1, total + 1):
            part = "model" if at <= args.steps else "prior"
            if part == "model":
                rows = batching.epoch_batch(keys["order"], at - 1, len(images.labels), args.batch)
                batch = images.images[rows], images.labels[rows]
                if who.quantised and (at == 1 or (at <= args.steps // 2 and at % own["revive_every"] == 0)):
                    revive_key = random.fold_in(keys["revive"], at)
                    state["model"] = revived(state["model"], who, model, batch[0], revive_key, every=at == 1)
                state["model"], metrics = step(state["model"], batch)
                if args.watch_gradients:
                    watched, metrics = watching.record(run.log, at, metrics, watched)
            else:
                if codes is None:
                    run.log.print("the prior learns the codes ...")
                    values = now(state)
                    codes = integers(values, who, encoded(values, who, *images))
                rows = batching.epoch_batch(keys["prior_order"], at - 1 - args.steps, len(codes), args.batch)
                state["prior"], metrics = prior_step(state["prior"], (codes[rows], images.labels[rows]))
            runs.check_finite(run, at, metrics)
            last = at == total or run.stop.requested
            run.log.progress(at, args.batch, loss=metrics["loss"])
            if at % 10 == 0 or last:
                prefix = "train" if part == "model" else "prior"
                run.log.metrics(at, {f"{prefix}/{name}": value for name, value in metrics.items()})
            if at % args.test_every == 0 or last:
                seen = measured(now(state), who, test, keys["look"])
                # The prior's figures mean nothing before it learns, the others do not change any more.
                mine = {name: x for name, x in seen.items() if (name == "prior_nats") == (part == "prior")}
                run.log.metrics(at, {f"test/{name}": value for name, value in mine.items()})
            if at % args.save_every == 0 or last:
                runs.save(run, at, state)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        figures = figures_of(now(state), who, test, keys["look"], args.bound_samples)
        run.log.result({**figures, "steps": at, "seconds": seconds})
    watching.draw(run.folder)
    draw_curves(run.folder, who)
    draw(run.folder, now(state), who, test, keys["look"])
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{shown}; {at} steps in {seconds:.0f} s; files in {run.folder}/")


def open_run(folder: Path, device: str) -> tuple[Args, Trained, tree.Tree, torch.device]:
    """What a run was started with, its nets and what they learned, on the device."""
    trained, place = runs.read_config(folder, "args", Args), command_line.device(device)
    quantised = trained.model == "vq-vae"
    cfg = runs.read_config(folder, "net", vqvae.Config if quantised else autoencoder.Config)
    prior = runs.read_config(folder, "prior", pixelcnn.Config) if quantised else None
    noise = chosen(trained)["noise"] if trained.model == "denoising" else 0.0
    who = Trained(cfg, tuple(checkpoints.read_config(folder / "checkpoints")["classes"]), prior, noise)
    return trained, who, tree.move(load(folder, who), place), place


def sample(args: SampleArgs) -> None:
    command_line.at_least_one(count=args.count)
    command_line.positive(temperature=args.temperature)
    trained, who, values, device = open_run(args.run, args.device)
    if not (who.quantised or who.variational):
        raise ValueError(f"'{args.run}' has a model '{trained.model}', without a prior to sample codes from")
    if args.label is not None and not 0 <= args.label < who.conditional:
        kinds = f"0 to {who.conditional - 1}" if who.conditional else "none: this model is not conditional"
        raise ValueError(f"--label is {args.label}; expected {kinds}")
    labels = in_turn(who, args.count, device)
    labels = labels if args.label is None else torch.full_like(labels, args.label)
    images = sampled(values, who, random.key(args.seed, device), labels, args.temperature)
    plots.image_grid(args.run / "sampled.png", images, scale=0.6)
    print(f"{args.count} samples in {args.run / 'sampled.png'}")


def reconstruct(args: ReconstructArgs) -> None:
    command_line.at_least_one(count=args.count)
    trained, who, values, device = open_run(args.run, args.device)
    test = image_sets.read_all(trained.data, trained.size).test
    if args.count > len(test.labels):
        raise ValueError(f"--count is {args.count}, but there are {len(test.labels)} test images")
    key = random.key(args.seed)
    rows = random.permutation(key, len(test.labels))[: args.count]
    part = tree.move(test._replace(images=test.images[rows], labels=test.labels[rows]), device)
    error = measured(values, who, part, key.to(device))["error"]
    path = args.run / "reconstructed.png"
    draw_reconstructions(path, values, who, *part, key.to(device))
    print(f"{args.count} test images, squared error of a pixel {error:.4g}, in {path}")


def interpolate(args: InterpolateArgs) -> None:
    command_line.at_least_one(steps=args.steps)
    trained, who, values, device = open_run(args.run, args.device)
    test = image_sets.read_all(trained.data, trained.size).test
    if len(args.images) < 2 or len(args.images) % 2 or not all(0 <= i < len(test.labels) for i in args.images):
        given = " ".join(map(str, args.images))
        raise ValueError(f"--images {given}: expected pairs of numbers from 0 to {len(test.labels) - 1}")
    path = args.run / "interpolated.png"
    draw_walks(path, values, who, tree.move(test, device), torch.tensor(args.images), args.steps)
    print(f"{len(args.images) // 2} walks in {path}")


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train),
        sample=(SampleArgs, sample),
        reconstruct=(ReconstructArgs, reconstruct),
        interpolate=(InterpolateArgs, interpolate),
    )
