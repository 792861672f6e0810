"""Generative adversarial networks: thirteen of them, each a line of the table `GANS`.

Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv:1406.2661), and what came of it. Without a flag WGAN-GP
learns scikit-learn's 8x8 digits, offline:

    python experiments/gan.py                                            3.5 minutes on 2 CPU cores
    python experiments/gan.py --gan infogan --data FOLDER                the files of MNIST; or any folder of pictures
    python experiments/gan.py --gan sngan --data grid                    25 Gaussians in the plane; or ring, of 8
    python experiments/gan.py --gan dcgan --objective hinge --regulariser r1         a mixture of your own
    python experiments/gan.py --data grid --seeds 8                      eight at once, and the spread of their figures
    python experiments/gan.py --classifier runs/classify/NAME            Fréchet distance on features of that classifier
    python experiments/gan.py sample --run runs/gan/NAME
"""

import dataclasses
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core import random, tree
from core.spectral import spectral_norm
from experiments.parts.generator import (
    Data,
    Players,
    averaged,
    distances,
    draw_frame,
    draw_study,
    figures_of,
    generated,
    load,
    noise,
)
from nets.generative import autoencoder_critic, dcgan, mlp_gan, sagan
from train import optimizers, plots
from train.adversarial import game as games
from train.adversarial.game import Game
from train.adversarial.regularisers import clip
from train.adversarial.step import State, create, make_step
from train.data import batching
from train.data.images import sets as image_sets
from train.data.points import mixtures
from train.optimizers import schedules
from train.plots import gan as gan_plots
from train.run import command_line
from train.run import run as runs
from train.run.logs import read_curves
from train.step import compiled

RUNS = Path("runs/gan")
NETS = {"autoencoder": autoencoder_critic, "dcgan": dcgan, "mlp": mlp_gan, "sagan": sagan}


@dataclass(frozen=True)
class Gan:
    """A paper's game, nets and optimizers."""

    net: str
    game: Game = Game()
    style: str = ""
    """What the names of the nets' presets begin with."""
    norm: str | None = None
    """Of the critic; the preset's if None."""
    conditional: bool = False
    critic_steps: int = 1
    rate: float = 2e-4
    critic_rate: float | None = None
    """The generator's if None."""
    betas: tuple[float, float] = (0.5, 0.999)
    clip: float = 0.0
    """RMSProp, and the critic's parameters clipped to [-clip, clip]."""
    decay: bool = False
    """Rates fall to 0, in a straight line."""
    spread: float = 1.0
    """Standard deviation of all points of a mixture together, in each direction."""


PENALTY = {"norm": "layer", "critic_steps": 5, "rate": 3e-4, "betas": (0.0, 0.9)}
GANS = {
    # Goodfellow et al. 2014, arXiv:1406.2661: min max log D(x) + log(1 - D(G(z))); its generator ascends log D(G(z)).
    "gan": Gan("mlp", Game("non-saturating")),
    # Mirza and Osindero 2014, arXiv:1411.1784: both players are told the class.
    "cgan": Gan("mlp", Game("non-saturating"), conditional=True),
    # Radford et al. 2016, arXiv:1511.06434: convolutions, batch norm, Adam with beta1 = 0.5.
    "dcgan": Gan("dcgan", Game("non-saturating")),
    # Arjovsky et al. 2017, arXiv:1701.07875: the earth mover's distance; clipped weights keep the critic Lipschitz.
    "wgan": Gan("dcgan", Game("wasserstein"), critic_steps=5, rate=5e-4, clip=0.01),
    # Gulrajani et al. 2017, arXiv:1704.00028: the gradient's norm between real and generated is pulled to 1.
    "wgan-gp": Gan("dcgan", Game("wasserstein", regulariser="gradient-penalty"), **PENALTY),
    # Wu et al. 2018, arXiv:1712.01026: the Wasserstein divergence, k |gradient|^p without a Lipschitz constraint.
    "wgan-div": Gan("dcgan", Game("wasserstein", regulariser="wgan-div"), **PENALTY),
    # Mao et al. 2017, arXiv:1611.04076: squares instead of logarithms.
    "lsgan": Gan("dcgan", Game("least-squares")),
    # Zhao et al. 2017, arXiv:1609.03126: the critic's score is an auto-encoder's error; codes repel each other.
    "ebgan": Gan("autoencoder", Game("energy", pulling_away=0.1, margin=0.5), "ebgan-", rate=5e-4),
    # Berthelot et al. 2017, arXiv:1703.10717: k holds the energies of generated and real images at a ratio. Its rate of
    # 0.001 is for 100,000 steps. k leaves 0 only if the generator is faster than the critic it follows.
    "began": Gan(
        "autoencoder",
        Game("equilibrium", diversity=0.9, balance_rate=0.5),
        "began-",
        rate=1e-3,
        critic_rate=2e-4,
    ),
    # Odena et al. 2017, arXiv:1610.09585: the critic is not told the class but tells it.
    "acgan": Gan("dcgan", Game("non-saturating", classify=True), conditional=True),
    # Chen et al. 2016, arXiv:1606.03657: it tells the codes, a bound on their mutual information with the image.
    "infogan": Gan("dcgan", Game("non-saturating", categories=10, codes=2)),
    # Miyato et al. 2018, arXiv:1802.05957: weights over their spectral norms make the critic 1-Lipschitz.
    "sngan": Gan("dcgan", Game("hinge", spectral=True), norm="none"),
    # Zhang et al. 2019, arXiv:1805.08318: self-attention, hinge loss, a faster critic instead of more of its steps.
    "sagan": Gan(
        "sagan",
        Game("hinge", spectral=True, spectral_generator=True),
        "attention-",
        rate=1e-4,
        critic_rate=4e-4,
        betas=(0.0, 0.9),
    ),
}


# What else is right for points of the plane, in minutes. Gulrajani et al. weigh the penalty with 0.1 there. A critic
# that spectral norm makes smooth takes more steps, and points further apart than the width of its hinge.
ON_POINTS = {"rate": 2e-3, "decay": True}
POINTS = {
    "wgan-gp": ON_POINTS | {"betas": (0.5, 0.9), "game": Game("wasserstein", "none", "gradient-penalty", 0.1)},
    "sngan": ON_POINTS | {"betas": (0.0, 0.9), "critic_steps": 5, "spread": 10.0},
}


@dataclass(frozen=True)
class Args:
    gan: str = "wgan-gp"
    """gan, cgan, dcgan, wgan, wgan-gp, wgan-div, lsgan, ebgan, began, acgan, infogan, sngan, sagan."""
    data: str = "digits"
    """"digits", "mnist", "cifar10" ... (downloaded once), a folder of images, or the mixtures "ring" and "grid"."""
    size: int | None = None
    """Pixels that images are scaled to; their own if not given, 64 for pictures."""
    objective: str | None = None
    """minimax, non-saturating, wasserstein, least-squares, hinge; as all of these, the paper's if not given."""
    pairing: str | None = None
    """none, average, paired: relativistic scores."""
    regulariser: str | None = None
    """none, gradient-penalty, dragan, r1, r2, wgan-div."""
    weight: float | None = None
    """Of the regulariser."""
    spectral: bool | None = None
    """Spectral norm of the critic."""
    critic_steps: int | None = None
    """Steps of the critic for one of the generator."""
    learning_rate: float | None = None
    """The generator's, and the critic's in the paper's proportion."""
    latent: int | None = None
    """Numbers that the generator begins from."""
    width: int | None = None
    """Channels of the nets."""
    steps: int | None = None
    """Steps of the generator; 3000 on images and 6000 on points if not given."""
    batch: int | None = None
    """Examples a step; 64 images or 256 points if not given."""
    average: float = 0.999
    """Decay of the moving average of the generator's parameters, which is what is looked at."""
    classifier: Path | None = None
    """A run of classify.py on the same data; figures are then of its features, otherwise of the pixels."""
    seeds: int = 1
    """How many are trained at once, each from another seed; figures are of all, pictures of the first."""
    sample_every: int = 250
    """Steps between two pictures of samples; the frames of training.gif."""
    save_every: int = 500
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random."""
    name: str | None = None
    """Folder under runs/gan; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    compile: bool = True
    """Compile the step with torch.compile."""


@dataclass(frozen=True)
class SampleArgs:
    run: Path
    """Folder of a run, such as runs/gan/NAME."""
    count: int = 64
    """How many samples."""
    label: int | None = None
    """Of this class, where the generator is conditional."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


def read(args: Args) -> Data:
    if args.data in mixtures.MIXTURES:
        return Data(None, None, (), mixtures.standardised(mixtures.MIXTURES[args.data](), chosen(args).spread))
    found = image_sets.read_all(args.data, args.size)
    train, test = (part._replace(images=2 * part.images - 1) for part in (found.train, found.test))
    return Data(train, test, found.classes)


def chosen(args: Args) -> Gan:
    """The paper's line with the flags applied."""
    command_line.choice("--gan", args.gan, GANS)
    gan = GANS[args.gan]
    if args.data in mixtures.MIXTURES:
        gan = dataclasses.replace(gan, **POINTS.get(args.gan, ON_POINTS))
    said = {name: getattr(args, name) for name in ("objective", "pairing", "regulariser", "weight", "spectral")}
    gan = dataclasses.replace(
        gan, game=dataclasses.replace(gan.game, **{n: v for n, v in said.items() if v is not None})
    )
    if args.learning_rate is not None:
        command_line.positive(learning_rate=args.learning_rate)
        rates = args.learning_rate, (gan.critic_rate or gan.rate) * args.learning_rate / gan.rate
        gan = dataclasses.replace(gan, rate=rates[0], critic_rate=rates[1])
    return gan if args.critic_steps is None else dataclasses.replace(gan, critic_steps=args.critic_steps)


def players(gan: Gan, args: Args, data: Data) -> Players:
    """The nets of a line, fitted to the data. Points of the plane take perceptrons, whatever the line says."""
    sizes = {name: getattr(args, name) for name in ("latent", "width") if getattr(args, name) is not None}
    if data.mixture is not None:
        for name, given in (
            ("conditional", gan.conditional),
            ("codes", gan.game.codes),
            ("energies", gan.net == "autoencoder"),
        ):
            if given:
                raise ValueError(f"--data {args.data} is for unconditional GANs with scores; '{args.gan}' has {name}")
        widths = (sizes.pop("width", 128),) * 3
        cfg = dataclasses.replace(mlp_gan.PRESETS["points"], generator_widths=widths, critic_widths=widths, **sizes)
        return Players(mlp_gan, cfg, gan.game, False)
    net, (channels, size, _), classes = NETS[gan.net], data.shape, len(data.classes)
    kind = "digits" if size < 16 else "mnist" if size == 28 else "small"
    preset = net.PRESETS[f"{gan.style}{kind}"]
    sizes |= {"shape": data.shape} if net is mlp_gan else {"size": size, "channels": channels}
    if size > 32 and size % 4 == 0 and net in (dcgan, autoencoder_critic):
        sizes["stages"] = (size // 4).bit_length() - 1
    if net is sagan:
        sizes["attention"] = size // 2
    heads = {"category": gan.game.categories, "classes": classes * gan.game.classify, "codes": gan.game.codes}
    sizes |= {"norm": gan.norm} if gan.norm else {}
    sizes |= {"classes": classes} if gan.conditional else {}
    sizes |= {"heads": tuple((n, width) for n, width in heads.items() if width)} if any(heads.values()) else {}
    for name in sizes:
        if name not in {field.name for field in dataclasses.fields(preset)}:
            raise ValueError(f"--{name} is not for the nets of '{args.gan}'")
    return Players(net, dataclasses.replace(preset, **sizes), gan.game, gan.conditional)


def optimizer_of(gan: Gan, rate: float, steps: int) -> optimizers.Optimizer:
    schedule = schedules.linear(rate, 0.0, steps) if gan.decay else rate
    return optimizers.rmsprop(schedule) if gan.clip else optimizers.adam(schedule, *gan.betas)


def batch_at(data: Data, key: Tensor, step: int, parts: int, size: int) -> tuple[Tensor, Tensor]:
    """(examples (parts, size, ...), labels (parts, size)): a function of key and step."""
    if data.mixture is not None:
        points, modes = mixtures.sample(data.mixture, random.fold_in(key, step), parts * size)
        return points.reshape(parts, size, 2), modes.reshape(parts, size)
    count = len(data.train.labels)
    rows = torch.stack([batching.epoch_batch(key, step * parts + i, count, size) for i in range(parts)])
    return data.train.images[rows], data.train.labels[rows]


def train(args: Args) -> None:
    origin, args = runs.begin(
        RUNS, args, free=("steps", "sample_every", "save_every", "device", "compile", "classifier")
    )
    steps, batch = (6000, 256) if args.data in mixtures.MIXTURES else (3000, 64)
    steps, batch = steps if args.steps is None else args.steps, batch if args.batch is None else args.batch
    args, gan = dataclasses.replace(args, steps=steps, batch=batch), chosen(args)
    command_line.at_least_one(steps=args.steps, batch=args.batch, seeds=args.seeds, critic_steps=gan.critic_steps)
    command_line.at_least_one(sample_every=args.sample_every, save_every=args.save_every)
    device, data = command_line.device(args.device), read(args)
    if data.train is not None:
        if args.batch > len(data.train.labels):
            raise ValueError(f"--batch is {args.batch}, but there are {len(data.train.labels)} images")
        data = data._replace(train=tree.move(data.train, device), test=tree.move(data.test, device))
    who = players(gan, args, data)
    if args.classifier is not None and data.train is not None:
        distances(*2 * [(data.test.images[:8] + 1) / 2], args.classifier)  # fails now rather than at the end

    def generate(params, given, labels, key):
        return who.net.generator(params, given.z, who.cfg, labels=labels, key=key, train=True)

    def outputs(params, x, labels, key):
        return who.net.critic_outputs(params, x, who.cfg, labels=labels, key=key, train=True)

    def begin(key: Tensor) -> State:
        state = create(key, *specs, *both)
        params = state.critic.params, state.generator.params
        return state._replace(memory=games.memory(who.game, random.fold_in(key, 2), *params))

    specs = who.net.critic_spec(who.cfg), who.net.generator_spec(who.cfg)
    critic_optimizer = optimizer_of(gan, gan.critic_rate or gan.rate, args.steps * gan.critic_steps)
    both = critic_optimizer, optimizers.ema(optimizer_of(gan, gan.rate, args.steps), args.average, debias=True)
    key = random.key(args.seed, device)
    order_key, look_key = random.fold_in(key, 3), random.fold_in(key, 4)  # `begin` has 0 to 2
    constrain = functools.partial(clip, limit=gan.clip) if gan.clip else None
    parts = {"critic_steps": gan.critic_steps, "constrain": constrain}
    players_losses = games.losses(who.game, who.cfg.latent, generate, outputs)
    if args.seeds == 1:
        state, step = begin(key), make_step(*players_losses, *both, **parts, compile=args.compile)
    else:
        state = torch.vmap(begin)(random.split(random.fold_in(key, 5), args.seeds))
        state = tree.map(torch.Tensor.contiguous, state)  # vmap repeats what they share, such as the step
        step = torch.vmap(make_step(*players_losses, *both, **parts, compile=False), in_dims=(0, None))
        step = compiled(step) if args.compile else step
    identity = {"net": who.cfg, "game": who.game, "gan": args.gan, "seeds": args.seeds}
    state = runs.restore(origin, state, identity, args.steps)

    def member(state: State, i: int) -> State:
        return state if args.seeds == 1 else tree.map(lambda x: x[i], state)

    def look(at: int) -> tree.Tree:
        one = member(state, 0)
        values = averaged(one.generator, who, len(data.classes))
        frame = run.folder / "frames" / f"{at:07}.png"
        frame.parent.mkdir(exist_ok=True)
        critic = one.critic.params
        if who.game.spectral:
            critic, _ = spectral_norm(critic, one.memory["vectors"], steps=0)
        critic = tree.merge(critic, one.critic.stats)
        draw_frame(frame, values, critic, who, data, look_key, f"{args.gan}, step {at}")
        return values

    config = {
        "args": args,
        **identity,
        "conditional": who.conditional,
        "classes": data.classes,
        "torch": torch.__version__,
    }
    with runs.opened(origin, config, total=args.steps) as run:
        counts = [tree.count(player.params) // args.seeds for player in (state.generator, state.critic)]
        run.log.print(f"{counts[0]:,} parameters generate, {counts[1]:,} judge; run in {run.folder}")
        if args.compile and run.first < args.steps:
            run.log.print("compiling the step ...")
        at, vanished = run.first, 0
        for at in range(run.first + 1, args.steps + 1):
            batch = batch_at(data, order_key, at - 1, gan.critic_steps, args.batch)
            state, metrics = step(state, batch)
            runs.check_finite(run, at, metrics)
            metrics = tree.map(lambda x: x.mean(), metrics)
            # A critic that is sure of everything has no slope left for the generator to climb.
            vanished = vanished + 1 if float(metrics["generator/grad_norm"]) < 1e-6 else 0
            if vanished == 100:
                run.log.print(
                    f"the critic is saturated: for 100 steps the generator's gradient is below 1e-6 (step {at})"
                )
            last = at == args.steps or run.stop.requested
            run.log.progress(
                at, args.batch * args.seeds, critic=metrics["critic/loss"], generator=metrics["generator/loss"]
            )
            if at % 10 == 0 or last:
                run.log.metrics(at, metrics)
            if at % args.sample_every == 0 or last:
                look(at)
            if at % args.save_every == 0 or last:
                runs.save(run, at, state)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        generators = [averaged(member(state, i).generator, who, len(data.classes)) for i in range(args.seeds)]
        measure_key = random.fold_in(look_key, 2)
        found = [figures_of(values, who, data, measure_key, args.classifier) for values in generators]
        table = {name: torch.tensor([float(one[name]) for one in found]) for name in found[0]}
        figures = {name: float(values.mean()) for name, values in table.items()}
        if args.seeds > 1:
            figures |= {f"{name}_std": float(values.std()) for name, values in table.items()}
        run.log.result({**figures, "steps": at, "seconds": seconds, "features": str(args.classifier or "pixels")})
    if data.mixture is None:
        draw_study(run.folder, generators[0], who, data, look_key)
    frames = sorted((run.folder / "frames").glob("*.png"))
    shutil.copy(frames[-1], run.folder / "samples.png")
    gan_plots.animation(run.folder / "training.gif", frames)
    lines = read_curves(run.folder, "critic/loss", "generator/loss")
    plots.curves(run.folder / "loss.png", lines, ylabel="loss", title=f"{args.gan}: both players")
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{shown}; {at} steps in {seconds:.0f} s; files in {run.folder}/")


def sample(args: SampleArgs) -> None:
    command_line.at_least_one(count=args.count)
    trained = runs.read_config(args.run, "args", Args)
    data, device = read(trained), command_line.device(args.device)
    who = players(chosen(trained), trained, data)
    if args.label is not None and not (who.conditional and 0 <= args.label < len(data.classes)):
        kinds = f"0 to {len(data.classes) - 1}" if who.conditional else "none: this generator is not conditional"
        raise ValueError(f"--label is {args.label}; expected {kinds}")
    values = tree.move(load(args.run, who, len(data.classes), trained.seeds), device)
    z, labels = noise(who, random.key(args.seed, device), args.count, len(data.classes))
    labels = labels if args.label is None else torch.full_like(labels, args.label)
    found, path = generated(values, who, z, labels).cpu(), args.run / "sampled.png"
    if data.mixture is None:
        plots.image_grid(path, (found + 1) / 2, scale=0.6)
    else:
        real, _ = mixtures.sample(data.mixture, random.key(args.seed), args.count)
        gan_plots.points(path, real, found)
    print(f"{args.count} samples in {path}")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), sample=(SampleArgs, sample))
