"""Generative adversarial networks: thirteen of them, each a line of the table `GANS`.

Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv:1406.2661), and its successors. Without a flag WGAN-GP
learns scikit-learn's 8x8 digits, offline:

    python experiments/gan.py                                            3.5 minutes on 2 CPU cores
    python experiments/gan.py --gan infogan --data FOLDER                the files of MNIST; or any folder of pictures
    python experiments/gan.py --gan sngan --data grid                    25 Gaussians in the plane; or ring, of 8
    python experiments/gan.py --gan dcgan --objective hinge --regulariser r1         a mixture of your own
    python experiments/gan.py --data grid --seeds 8                      eight at once, and the spread of their figures
    python experiments/gan.py --classifier runs/classify/NAME            Fréchet distance on features of that classifier
    python experiments/gan.py sample --run runs/gan/NAME
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core import random, tree
from experiments.parts import generator as gans
from experiments.parts.generator import Data
from train import optimizers
from train.adversarial import game as games
from train.adversarial import regularisers
from train.adversarial.game import ENERGIES, Game
from train.adversarial.objectives import OBJECTIVES, PAIRINGS
from train.adversarial.regularisers import REGULARISERS, clip
from train.adversarial.step import State, create, make_step
from train.data.fingerprint import fingerprint
from train.data.points import mixtures
from train.data.understood import understood
from train.optimizers import schedules
from train.run import begin, command_line, open_run
from train.run.flags import Common, Count, FromRun, Natural, NonNegative, Positive, Rate, Shared
from train.run.run import format_figures, unused
from train.step import compiled

RUNS = Path("runs/gan")


@dataclass(frozen=True)
class Gan:
    """A paper's game, nets and optimizers."""

    net: str
    game: Game = Game()
    style: str = ""
    """Prefix of the names of the nets' presets."""
    norm: str | None = None
    """Norm of the critic; the preset's if None."""
    conditional: bool = False
    critic_steps: int = 1
    rate: float = 2e-4
    critic_rate: float | None = None
    """Learning rate of the critic; the generator's if None."""
    betas: tuple[float, float] = (0.5, 0.999)
    clip: float = 0.0
    """RMSprop, and the critic's parameters clipped to [-clip, clip]; 0 for neither."""
    decay: bool = False
    """Linear decay of the learning rates to 0."""
    spread: float = 1.0
    """Standard deviation of a mixture's coordinates."""


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
    # Zhao et al. 2017, arXiv:1609.03126: the critic's score is an autoencoder's error; codes repel each other.
    "ebgan": Gan("autoencoder", Game("energy", pulling_away=0.1, margin=0.5), "ebgan-", rate=5e-4),
    # Berthelot et al. 2017, arXiv:1703.10717: k holds the energies of generated and real images at a ratio. Its rate of
    # 0.001 is for 100,000 steps. k leaves 0 only if the generator is faster than the critic it follows.
    "began": Gan(
        "autoencoder", Game("equilibrium", diversity=0.9, balance_rate=0.5), "began-", rate=1e-3, critic_rate=2e-4
    ),
    # Odena et al. 2017, arXiv:1610.09585: the critic is not told the class but predicts it.
    "acgan": Gan("dcgan", Game("non-saturating", classify=True), conditional=True),
    # Chen et al. 2016, arXiv:1606.03657: it recovers the codes, a bound on their mutual information with the image.
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

# Other choices for points of the plane, in minutes. Gulrajani et al. weigh the penalty with 0.1 there. A critic that
# spectral norm makes smooth takes more steps, and points further apart than the width of its hinge.
ON_POINTS = {"rate": 2e-3, "decay": True}
POINTS = {
    "wgan-gp": ON_POINTS | {"betas": (0.5, 0.9), "game": Game("wasserstein", "none", "gradient-penalty", 0.1)},
    "sngan": ON_POINTS | {"betas": (0.0, 0.9), "critic_steps": 5, "spread": 10.0},
}


@dataclass(frozen=True)
class Args:
    gan: Literal[tuple(GANS)] = "wgan-gp"
    """Paper: its line of the table has the nets, and the defaults of what follows (this help shows those of the --gan
    and --data on its command line)."""
    data: str = "digits"
    """"digits", "mnist", "cifar10" ... (downloaded once), a folder of pictures, or the mixtures "ring" and "grid"."""
    size: Count | None = None
    """Pixels per side that images are scaled to; None keeps the size of sets like MNIST, and is 64 for pictures."""
    objective: Literal[(*OBJECTIVES, *ENERGIES)] = "wasserstein"
    """Objective of both players; energy and equilibrium take autoencoders as critics."""
    pairing: Literal[tuple(PAIRINGS)] = "none"
    """Relativistic scores: against the average of the other side, or in pairs."""
    regulariser: Literal[("none", *REGULARISERS)] = "gradient-penalty"
    """Regulariser of the critic."""
    regulariser_weight: NonNegative = 10.0
    """Weight of the regulariser."""
    spectral: bool = False
    """Spectral norm of the critic."""
    critic_steps: Count = 5
    """Steps of the critic per step of the generator."""
    learning_rate: Positive = 3e-4
    """Learning rate of the generator."""
    critic_learning_rate: Positive = 3e-4
    """Learning rate of the critic; it follows --learning-rate in the paper's proportion."""
    latent: Count | None = None
    """Latent dimensions; None fits the size of the images."""
    width: Count | None = None
    """Channels of the nets, or hidden units on points; None fits the size of the images."""
    steps: Count = 3000
    """Training steps of the generator."""
    batch: Count = 64
    """Examples per step."""
    ema: Rate = 0.999
    """Decay of the moving average of the generator's parameters, which is evaluated."""
    classifier: Path | None = None
    """Run of classify.py on the same data, whose features the figures compare; the pixels if None."""
    seeds: Count = 1
    """Number of GANs trained at once, each from another seed; figures are of all, pictures of the first."""
    sample_every: Count = 250
    """Steps between pictures of samples, the frames of training.gif."""
    common: Shared = Common()


def line_of(args: Args) -> Gan:
    """The paper's line with the flags applied; on points with the choices for points."""
    gan = GANS[args.gan]
    if args.data in mixtures.MIXTURES:
        gan = dataclasses.replace(gan, **POINTS.get(args.gan, ON_POINTS))
    game = {name: getattr(args, name) for name in ("objective", "pairing", "regulariser", "spectral")}
    rates = {"rate": args.learning_rate, "critic_rate": args.critic_learning_rate, "critic_steps": args.critic_steps}
    return dataclasses.replace(gan, game=dataclasses.replace(gan.game, weight=args.regulariser_weight, **game), **rates)


def presets(words: dict[str, str]) -> Args | None:
    """The paper's line as arguments; what depends on another flag follows it."""
    name, on_points = words.get("gan", "wgan-gp"), words.get("data") in mixtures.MIXTURES
    if name not in GANS:
        return None
    gan = dataclasses.replace(GANS[name], **POINTS.get(name, ON_POINTS)) if on_points else GANS[name]
    game, rate, regulariser = gan.game, gan.rate, words.get("regulariser", gan.game.regulariser)
    with contextlib.suppress(ValueError):  # a word that is no number is refused later
        rate = float(words.get("learning_rate", gan.rate))
    weight = regularisers.weight_of(regulariser) if regulariser in REGULARISERS else 0.0
    if game.weight is not None and regulariser == game.regulariser:
        weight = game.weight
    rates = {"learning_rate": gan.rate, "critic_learning_rate": (gan.critic_rate or gan.rate) * (rate / gan.rate)}
    choices = {field: getattr(game, field) for field in ("objective", "pairing", "regulariser", "spectral")}
    sizes = {"steps": 6000, "batch": 256} if on_points else {}
    return Args(name, regulariser_weight=weight, critic_steps=gan.critic_steps, **choices, **rates, **sizes)


@dataclass(frozen=True)
class SampleArgs(FromRun):
    count: Count = 64
    """Number of samples."""
    label: Natural | None = None
    """Class of all samples, where the generator is conditional; every class in turn if None."""
    seed: Natural = 0
    """Seed of the noise."""
    out: Path | None = None
    """New picture; RUN/sampled.png, numbered if it exists, if None."""


def read(args: Args) -> Data:
    gan = line_of(args)
    if args.data in mixtures.MIXTURES:
        mixture = mixtures.standardised(mixtures.MIXTURES[args.data](), gan.spread)
        return Data(None, None, (), mixture, {"data": args.data})
    return gans.read_images(args.data, args.size, labelled=gan.conditional or gan.game.classify)


def optimizer_of(gan: Gan, rate: float, steps: int) -> optimizers.Optimizer:
    schedule = schedules.linear(rate, 0.0, steps) if gan.decay else rate
    return optimizers.rmsprop(schedule) if gan.clip else optimizers.adam(schedule, *gan.betas)


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("data", "steps", "sample_every", "classifier"))
    data, gan = read(args), line_of(args)
    model = gans.players(args, gan, data)
    understood(print, data.facts | {"game": model.game, "net": model.cfg})
    if data.mixture is None:
        gans.check_images(data, args.batch, args.classifier)
    identity = {"net": model.cfg, "game": model.game, "gan": args.gan, "seeds": args.seeds}
    identity |= {"data": fingerprint(data.mixture if data.train is None else (data.train, data.test))}

    init_key, order_key, look_key = random.split(random.key(args.common.seed), 3).unbind(0)
    init_key, look_key = tree.move((init_key, look_key), run.device)
    specs = model.net.critic_spec(model.cfg), model.net.generator_spec(model.cfg)
    critic_optimizer = optimizer_of(gan, gan.critic_rate, args.steps * gan.critic_steps)
    generator_optimizer = optimizer_of(gan, gan.rate, args.steps)
    both = critic_optimizer, optimizers.ema(generator_optimizer, args.ema, debias=True)

    def start(key: Tensor) -> State:
        state = create(key, *specs, *both)
        params = state.critic.params, state.generator.params
        return state._replace(memory=games.memory(model.game, random.fold_in(key, 2), *params))

    def generate(params, latents, labels, key):
        return model.net.generator(params, latents.z, model.cfg, labels=labels, key=key, train=True)

    def outputs(params, x, labels, key):
        return model.net.critic_outputs(params, x, model.cfg, labels=labels, key=key, train=True)

    constrain = functools.partial(clip, limit=gan.clip) if gan.clip else None
    options = {"policy": run.policy, "critic_steps": args.critic_steps, "constrain": constrain}
    losses, compiling = games.losses(model.game, model.cfg.latent, generate, outputs), args.common.compile
    if args.seeds == 1:
        state, step = start(init_key), make_step(*losses, *both, **options, compile=compiling)
    else:
        state = torch.vmap(start)(random.split(init_key, args.seeds))
        state = tree.map(Tensor.contiguous, state)  # vmap repeats what they share, such as the step
        step = torch.vmap(make_step(*losses, *both, **options, compile=False), in_dims=(0, None))
        step = compiled(step) if compiling else step
    state, vanished = run.restore(state, identity, args.steps), 0

    with run.open({"conditional": model.conditional, "classes": data.classes}, files={"frames": Path.mkdir}):
        counts = [tree.count(player.params) // args.seeds for player in (state.generator, state.critic)]
        run.log.print(f"generator {counts[0]:,} parameters, critic {counts[1]:,} parameters; run in {run.folder}")
        batches = (gans.batch_at(data, order_key, i, args.critic_steps, args.batch) for i in run.remaining)
        for at, batch in run.steps(batches):
            state, metrics = step(state, tree.move(batch, run.device))
            shown = {"critic": metrics["critic/loss"].mean(), "generator": metrics["generator/loss"].mean()}
            run.record(at, metrics, args.batch * args.seeds, group="", **shown)
            # A critic that is sure of everything has no slope left for the generator to climb.
            vanished = vanished + 1 if float(metrics["generator/grad_norm"].mean()) < 1e-6 else 0
            if vanished == 100:
                run.log.print(f"saturated critic: the generator's gradient is below 1e-6 for 100 steps (step {at})")
            if run.due(at, args.sample_every):
                gans.draw_look(run, member(state, args, 0), model, data, look_key)
            if run.due(at, args.common.save_every):
                run.save(at, state)
        generators = [gans.averaged(member(state, args, i).generator, model, data) for i in range(args.seeds)]
        run.log.print("comparing samples with the data ...")
        figures = gans.figures_of_all(generators, model, data, random.fold_in(look_key, 2), args.classifier)
        run.result({**figures, "features": str(args.classifier or "pixels")})
    gans.draw_study(run.folder, generators[0], model, data, look_key)
    gans.draw_training(run.folder, args.gan)
    print(f"{format_figures(figures)}; {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def member(state: State, args: Args, i: int) -> State:
    return state if args.seeds == 1 else tree.map(lambda x: x[i], state)


def sample(args: SampleArgs) -> None:
    """Sample images or points with a run's averaged generator."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    trained = run.read("args", Args)
    model = gans.players(trained, line_of(trained), data := read(trained))
    path, key = unused(args.out, args.run / "sampled.png"), random.key(args.seed)
    z, labels = gans.noise(model, key.to(device), args.count, data, args.label)
    values = tree.move(gans.load(run, model, data, trained.seeds), device)
    gans.draw_samples(path, gans.generated(values, model, z, labels), data, key)
    print(f"{args.count} samples in {path}")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train, presets), root=RUNS, sample=(SampleArgs, sample))
