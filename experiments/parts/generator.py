"""Parts of the experiments with GANs: a generator that was trained, its samples, their figures and their pictures."""

import dataclasses
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random, spec, stats, tree
from core.spectral import spectral_norm, spectral_vectors
from experiments.parts import classifier as classifiers
from nets.generative import autoencoder_critic, dcgan, mlp_gan, sagan
from train import optimizers, plots
from train.adversarial import game as games
from train.adversarial.game import Game
from train.adversarial.regularisers import input_gradient
from train.adversarial.step import State
from train.data import batching
from train.data.images import sets as image_sets
from train.data.images.arrays import Labelled
from train.data.points import mixtures
from train.metrics import generative
from train.plots import gan as gan_plots
from train.run import Run, SavedRun
from train.run.logs import read_curves
from train.step import TrainState

NETS = {"autoencoder": autoencoder_critic, "dcgan": dcgan, "mlp": mlp_gan, "sagan": sagan}
SHOWN = 64  # examples in a picture
MEASURED = 10_000  # examples that the figures are of, at most
FEWEST = 12  # images whose halves have the neighbours that the figures look for


class Data(NamedTuple):
    """Training data: images in [-1, 1] with labels, or a mixture in the plane; `facts` are for `understood`."""

    train: Labelled | None
    test: Labelled | None
    classes: tuple[str, ...]
    mixture: mixtures.Mixture | None = None
    facts: dict[str, Any] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,) if self.train is None else tuple(self.train.images.shape[1:])


def read_images(data: str, size: int | None, labelled: bool = False) -> Data:
    """The images that `--data` names; without labels a flat folder or a single class will do."""
    images = image_sets.read_all(data, size, labelled)
    train, test = (part._replace(images=2 * part.images - 1) for part in (images.train, images.test))
    return Data(train, test, images.classes, facts=image_sets.facts(images))


def check_images(data: Data, batch: int, classifier: Path | None) -> None:
    """Raise ValueError now, rather than at the end, if there are too few images for a batch or for the figures, or if
    the classifier, a run of classify.py, cannot compare them."""
    count, images = len(data.train.labels), (data.train.images[:FEWEST] + 1) / 2
    if batch > count:
        raise ValueError(f"--batch is {batch}, but there are {count} images")
    if count < FEWEST:
        raise ValueError(f"there are {count} images to train on; expected at least {FEWEST}, to compare with samples")
    distances(images, images, classifier)


class Players(NamedTuple):
    net: ModuleType
    cfg: Any
    game: Game
    conditional: bool


def players(args: Any, gan: Any, data: Data) -> Players:
    """The nets of gan.py's arguments and line, fitted to the data; on points of the plane MLPs."""
    game = gan.game
    sizes = {name: getattr(args, name) for name in ("latent", "width") if getattr(args, name) is not None}
    if data.mixture is not None:
        unfit = {"conditional": gan.conditional, "codes": game.codes, "energies": gan.net == "autoencoder"}
        for name in (name for name, on in unfit.items() if on):
            raise ValueError(f"--data {args.data} is for unconditional GANs with scores; '{args.gan}' has {name}")
        widths = (sizes.pop("width", 128),) * 3
        cfg = dataclasses.replace(mlp_gan.PRESETS["points"], generator_widths=widths, critic_widths=widths, **sizes)
        return Players(mlp_gan, cfg, game, False)
    net, (channels, size, _), classes = NETS[gan.net], data.shape, len(data.classes)
    preset = net.PRESETS[f"{gan.style}{'digits' if size < 16 else 'mnist' if size == 28 else 'small'}"]
    sizes |= {"shape": data.shape} if net is mlp_gan else {"size": size, "channels": channels}
    if size > 32 and size % 4 == 0 and net in (dcgan, autoencoder_critic):
        sizes["stages"] = (size // 4).bit_length() - 1
    if net is sagan:
        sizes["attention"] = size // 2
    heads = {"category": game.categories, "classes": classes * game.classify, "codes": game.codes}
    sizes |= {"norm": gan.norm} if gan.norm else {}
    sizes |= {"classes": classes} if gan.conditional else {}
    sizes |= {"heads": tuple((n, width) for n, width in heads.items() if width)} if any(heads.values()) else {}
    for name in sizes.keys() - {field.name for field in dataclasses.fields(preset)}:
        raise ValueError(f"--{name} is not for the nets of '{args.gan}'")
    return Players(net, dataclasses.replace(preset, **sizes), game, gan.conditional)


def batch_at(data: Data, key: Tensor, step: int, parts: int, size: int) -> tuple[Tensor, Tensor]:
    """(examples (parts, size, ...), labels (parts, size)): a function of key and step."""
    if data.mixture is not None:
        points, modes = mixtures.sample(data.mixture, random.fold_in(key, step), parts * size)
        return points.reshape(parts, size, 2), modes.reshape(parts, size)
    count = len(data.train.labels)
    rows = torch.stack([batching.epoch_batch(key, step * parts + i, count, size) for i in range(parts)])
    return data.train.images[rows], data.train.labels[rows]


@torch.no_grad()
def generated(values: tree.Tree, model: Players, z: Tensor, labels: Tensor) -> Tensor:
    parts = batching.evaluation_batches(len(z), 256)
    return torch.cat([model.net.generator(values, z[part], model.cfg, labels=labels[part]) for part in parts])


def calibrated(params: tree.Tree, running: tree.Tree, model: Players, data: Data) -> tree.Tree:
    """The generator as it is used: weights over their spectral norms, if that is how it was trained, and running
    statistics that were running anew with these parameters, such as averaged ones: over 50 batches, after which
    0.9^50 = 0.5 % is left of the old ones."""
    key = random.key(0, tree.leaves(params)[0].device)
    if model.game.spectral_generator:
        params, _ = spectral_norm(params, spectral_vectors(key, params, steps=50))

    def total(running: tree.Tree, z: Tensor, labels: Tensor) -> Tensor:
        return model.net.generator(tree.merge(params, running), z, model.cfg, labels=labels, train=True).sum()

    for i in range(50 if tree.leaves(running) else 0):
        z, labels = noise(model, random.fold_in(key, i), 100, data)
        running = stats.update(running, torch.func.grad(total)(running, z, labels))
    return tree.merge(params, running)


def averaged(player: TrainState, model: Players, data: Data) -> tree.Tree:
    """The generator with averaged parameters, the outermost optimizer being `ema`."""
    return calibrated(optimizers.averaged(player.opt_state), player.stats, model, data)


def load(run: SavedRun, model: Players, data: Data, seeds: int = 1) -> tree.Tree:
    """The averaged generator of a run, of several seeds the first's.

    Raises ValueError: there is no checkpoint, or it is of other nets, or damaged.
    """
    player = model.net.generator_spec(model.cfg)
    params, running = spec.split(player, run.learned(player, "generator", members=seeds))
    return calibrated(params, running, model, data)


def noise(model: Players, key: Tensor, count: int, data: Data, label: int | None = None) -> tuple[Tensor, Tensor]:
    """(z, labels): noise as in training, and every class in turn, or `label` alone.

    Raises ValueError: the generator is not conditional, or there is no such class.
    """
    if label is not None and not (model.conditional and label < len(data.classes)):
        kinds = f"0 to {len(data.classes) - 1}" if model.conditional else "none: this generator is not conditional"
        raise ValueError(f"--label is {label}; expected {kinds}")
    z, labels = games.latents(model.game, key, count, model.cfg.latent).z, torch.arange(count, device=key.device)
    return z, labels % max(len(data.classes), 1) if label is None else torch.full_like(labels, label)


def some_of(count: int, *parts: Tensor) -> Tensor:
    """At most `count` images (count, channels, height, width) of one part after the other, from each drawn at random,
    always the same ones in the same order.

    Files may lie in the order of their classes, and those of MNIST come from two groups of writers in turn: the first
    images, or every other one, are no sample of all.
    """
    samples: list[Tensor] = []
    for images in parts:
        order = random.permutation(random.key(0), len(images))[: count - sum(map(len, samples))]
        samples.append(images[order.to(images.device)])
    return torch.cat(samples)


def real_images(data: Data) -> Tensor:
    """The images in [0, 1] that samples are compared with, (count, channels, size, size): those for testing first."""
    return (some_of(MEASURED, data.test.images, data.train.images) + 1) / 2


def figures_of(values: tree.Tree, model: Players, data: Data, key: Tensor, classifier: Path | None) -> dict[str, float]:
    """For mixtures: modes and good samples. For images: distances between features, or pixels, of test images and of as
    many generated ones."""
    if data.mixture is not None:
        points = generated(values, model, *noise(model, key, MEASURED, data))
        modes = generative.modes(points, data.mixture.centres.to(points.device), data.mixture.deviation)
        return {"modes": int(modes.covered), "good": float(modes.good)}
    real = real_images(data)
    return distances(real, (generated(values, model, *noise(model, key, len(real), data)) + 1) / 2, classifier)


def figures_of_all(
    generators: list[tree.Tree], model: Players, data: Data, key: Tensor, classifier: Path | None
) -> dict[str, float]:
    """The means of `figures_of` over several generators, their standard deviations `NAME_std`, and the baseline."""
    each = [figures_of(values, model, data, key, classifier) for values in generators]
    table = {name: torch.tensor([float(one[name]) for one in each]) for name in each[0]}
    figures = {name: float(values.mean()) for name, values in table.items()}
    if len(generators) > 1:
        figures |= {f"{name}_std": float(values.std()) for name, values in table.items()}
    return figures if data.mixture is not None else figures | baseline(data, classifier)


def baseline(data: Data, classifier: Path | None) -> dict[str, float]:
    """The distance without a net: between two halves of the real images, of up to 2 * MEASURED of them."""
    return distance_of_halves((some_of(2 * MEASURED, data.train.images) + 1) / 2, classifier)


def distance_of_halves(images: Tensor, classifier: Path | None) -> dict[str, float]:
    """Fréchet distance of the first half of images in [0, 1] from the second."""
    first, second = (features(part, classifier) for part in images.split(len(images) // 2)[:2])
    return {"real_frechet_distance": float(generative.frechet_distance(first, second))}


def distances(real: Tensor, fake: Tensor, classifier: Path | None) -> dict[str, float]:
    """Distances of generated images from real ones, (count, channels, height, width) each in [0, 1]."""
    a, b = (features(x, classifier) for x in (real, fake))
    near, both = generative.density_coverage(a, b), generative.precision_recall(a, b)
    figures = {"frechet_distance": generative.frechet_distance(a, b), **both._asdict(), **near._asdict()}
    return {name: float(value) for name, value in figures.items()}


def features(images: Tensor, classifier: Path | None) -> Tensor:
    """Vectors by which images in [0, 1] are compared, (count, width): the features of a run of classify.py, or the
    pixels if there is none."""
    if classifier is None:
        return images.cpu().flatten(1)
    trained, values = classifiers.load(classifier)
    if trained.channels != images.shape[1]:
        seen = f"--classifier '{classifier}' sees {trained.channels} channels"
        raise ValueError(f"{seen}, the data has {images.shape[1]}")
    return classifiers.features(values, trained, images.cpu())


def draw_frame(
    path: Path, values: tree.Tree, critic: tree.Tree, model: Players, data: Data, key: Tensor, title: str
) -> None:
    """Samples of always the same noise; of points, over the critic's scores and gradients."""
    if data.mixture is None:
        z, labels = noise(model, key, SHOWN, data)
        plots.image_grid(path, (generated(values, model, z, labels) + 1) / 2, 8, title=title, scale=0.6)
        return
    on_cpu = tree.move(critic, "cpu")
    points = generated(values, model, *noise(model, key, 500, data)).cpu()
    real = mixtures.sample(data.mixture, random.fold_in(random.key(0), 1), 500)[0]

    def score(x: Tensor) -> Tensor:
        return model.net.critic(on_cpu, x, model.cfg)

    gan_plots.critic_plane(path, score, real, points, title, lambda x: input_gradient(score, x)[1])


def draw_look(run: Run, state: State, model: Players, data: Data, key: Tensor) -> None:
    """A frame of training.gif: samples of the averaged generator; on points, over the critic's scores."""
    critic = state.critic.params
    if model.game.spectral:
        critic, _ = spectral_norm(critic, state.memory["vectors"], steps=0)
    values = averaged(state.generator, model, data)
    path, title = run.folder / "frames" / f"{run.at:07}.png", f"{run.args.gan}, step {run.at}"
    draw_frame(path, values, tree.merge(critic, state.critic.stats), model, data, key, title)


def draw_samples(path: Path, samples: Tensor, data: Data, key: Tensor) -> None:
    """Images, or points of the plane beside as many of the mixture."""
    if data.mixture is None:
        plots.image_grid(path, ((samples + 1) / 2).cpu(), scale=0.6)
    else:
        gan_plots.points(path, mixtures.sample(data.mixture, key, len(samples))[0], samples.cpu())


def draw_training(folder: Path, title: str) -> None:
    """samples.png and training.gif of the frames, and the losses of both players."""
    frames = sorted((folder / "frames").glob("*.png"))
    shutil.copy(frames[-1], folder / "samples.png")
    gan_plots.animation(folder / "training.gif", frames)
    lines = read_curves(folder, "critic/loss", "generator/loss")
    plots.curves(folder / "loss.png", lines, ylabel="loss", title=f"{title}: both players")


def draw_study(folder: Path, values: tree.Tree, model: Players, data: Data, key: Tensor) -> None:
    """The ways from one sample image to another, all classes, and what each code does; nothing for points."""
    if data.mixture is not None:
        return
    classes = len(data.classes)
    z, labels = noise(model, random.fold_in(key, 1), 16, data)
    device = z.device

    def table(name: str, z: Tensor, labels: Tensor, rows, columns, title: str) -> None:
        """z: (rows, columns, latent), labels (rows, columns)."""
        images = generated(values, model, z.flatten(0, 1), labels.flatten())
        images = (images.reshape(*z.shape[:2], *images.shape[1:]) + 1) / 2
        gan_plots.image_table(folder / f"{name}.png", images, rows, columns, title)

    way = torch.linspace(0, 1, 9, device=device)[:, None]
    between = (1 - way) * z[:8, None] + way * z[8:, None]
    # Of the same length as noise is: the middle of two Gaussian vectors is short.
    length = (1 - way) * z[:8, None].norm(dim=-1, keepdim=True) + way * z[8:, None].norm(dim=-1, keepdim=True)
    between = between * length / between.norm(dim=-1, keepdim=True)
    table("interpolation", between, labels[:8, None].expand(8, 9), None, None, "From one sample to another")
    if model.conditional:
        numbers = torch.arange(classes, device=device)[:, None].expand(classes, 10)
        several = z[:10].expand(classes, 10, -1)
        table("classes", several, numbers, data.classes, None, "A class a row, the same noise a column")
    game, latent = model.game, model.cfg.latent
    if game.categories:
        rows = torch.eye(game.categories, device=device)
        swept = z[:8].expand(game.categories, 8, latent).clone()
        swept[..., latent - game.codes - game.categories : latent - game.codes] = rows[:, None]
        names = [f"category {i}" for i in range(game.categories)]
        table("categories", swept, labels[:8].expand(game.categories, 8), names, None, "The categorical code")
    for i in range(game.codes):
        swept = z[:8, None].expand(8, 9, latent).clone()
        swept[..., latent - game.codes + i] = torch.linspace(-1.5, 1.5, 9, device=device)
        columns = [f"{v:.1f}" for v in torch.linspace(-1.5, 1.5, 9).tolist()]
        table(f"code_{i + 1}", swept, labels[:8, None].expand(8, 9), None, columns, f"Continuous code {i + 1}")
