"""What the experiments with GANs share: a generator that was trained, its samples, their figures and their pictures."""

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random, spec, stats, tree
from core.spectral import spectral_norm, spectral_vectors
from experiments.parts import classifier as trained_classifiers
from train import optimizers, plots
from train.adversarial import game as games
from train.adversarial.game import Game
from train.data import batching
from train.data.images.arrays import Labelled
from train.data.points import mixtures
from train.metrics import generative
from train.plots import gan as gan_plots
from train.run import run as runs
from train.step import TrainState

SHOWN = 64  # examples in a picture
MEASURED = 10_000  # examples that the figures are of, at most


class Data(NamedTuple):
    """What is learned: images in [-1, 1] with labels, or a mixture in the plane."""

    train: Labelled | None
    test: Labelled | None
    classes: tuple[str, ...]
    mixture: mixtures.Mixture | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,) if self.train is None else tuple(self.train.images.shape[1:])


class Players(NamedTuple):
    net: ModuleType
    cfg: Any
    game: Game
    conditional: bool


@torch.no_grad()
def generated(values: tree.Tree, who: Players, z: Tensor, labels: Tensor) -> Tensor:
    parts = batching.evaluation_batches(len(z), 256)
    return torch.cat([who.net.generator(values, z[part], who.cfg, labels=labels[part]) for part in parts])


def calibrated(params: tree.Tree, measured: tree.Tree, who: Players, classes: int) -> tree.Tree:
    """The generator as it is used: weights over their spectral norms, if that is how it was trained, and running
    statistics that were measured anew with these parameters, such as averaged ones: over 50 batches, after which
    0.9^50 = 0.5 % is left of the old ones."""
    key = random.key(0, tree.leaves(params)[0].device)
    if who.game.spectral_generator:
        params, _ = spectral_norm(params, spectral_vectors(key, params, steps=50))

    def total(measured: tree.Tree, z: Tensor, labels: Tensor) -> Tensor:
        return who.net.generator(tree.merge(params, measured), z, who.cfg, labels=labels, train=True).sum()

    for i in range(50 if tree.leaves(measured) else 0):
        z, labels = noise(who, random.fold_in(key, i), 100, classes)
        measured = stats.update(measured, torch.func.grad(total)(measured, z, labels))
    return tree.merge(params, measured)


def averaged(player: TrainState, who: Players, classes: int) -> tree.Tree:
    """The generator with averaged parameters, the outermost optimizer being `ema`."""
    return calibrated(optimizers.averaged(player.opt_state), player.stats, who, classes)


def load(folder: Path, who: Players, classes: int, seeds: int = 1) -> tree.Tree:
    """The averaged generator of a run, of several seeds the first's.

    Raises ValueError: there is no checkpoint, or it is of other nets, or damaged.
    """
    model = who.net.generator_spec(who.cfg)
    params, measured = spec.split(model, runs.learned(folder, model, "generator", members=seeds))
    return calibrated(params, measured, who, classes)


def noise(who: Players, key: Tensor, count: int, classes: int) -> tuple[Tensor, Tensor]:
    """(z, labels): as in training, and every class in turn."""
    z = games.latents(who.game, key, count, who.cfg.latent).z
    return z, torch.arange(count, device=key.device) % max(classes, 1)


def figures_of(values: tree.Tree, who: Players, data: Data, key: Tensor, classifier: Path | None) -> dict[str, float]:
    """Of mixtures: modes and good samples. Of images: distances between features, or pixels, of test images and as many
    generated ones."""
    if data.mixture is not None:
        points = generated(values, who, *noise(who, key, MEASURED, 0))
        found = generative.modes(points, data.mixture.centres.to(points.device), data.mixture.deviation)
        return {"modes": int(found.covered), "good": float(found.good)}
    real = torch.cat([data.test.images, data.train.images])[:MEASURED]
    fake = generated(values, who, *noise(who, key, len(real), len(data.classes)))
    return distances((real + 1) / 2, (fake + 1) / 2, classifier)


def distances(real: Tensor, fake: Tensor, classifier: Path | None) -> dict[str, float]:
    """How far generated images are from real ones, (count, channels, height, width) each in [0, 1]: of the features of
    a run of classify.py, or of the pixels if there is none."""
    if classifier is None:
        a, b = real.flatten(1), fake.flatten(1)
    else:
        trained, values = trained_classifiers.load(classifier)
        if trained.channels != real.shape[1]:
            found = f"--classifier '{classifier}' sees {trained.channels} channels"
            raise ValueError(f"{found}, the data has {real.shape[1]}")
        a, b = (trained_classifiers.features(values, trained, x.cpu()) for x in (real, fake))
    near, both = generative.density_coverage(a, b), generative.precision_recall(a, b)
    found = {"frechet_distance": generative.frechet_distance(a, b), **both._asdict(), **near._asdict()}
    return {name: float(value) for name, value in found.items()}


def draw_frame(
    path: Path, values: tree.Tree, critic: tree.Tree, who: Players, data: Data, key: Tensor, title: str
) -> None:
    """Samples of always the same noise; of points, over the critic's scores and gradients."""
    if data.mixture is None:
        z, labels = noise(who, key, SHOWN, len(data.classes))
        plots.image_grid(path, (generated(values, who, z, labels) + 1) / 2, 8, title=title, scale=0.6)
        return
    on_cpu = tree.move(critic, "cpu")
    points = generated(values, who, *noise(who, key, 500, 0)).cpu()
    real = mixtures.sample(data.mixture, random.fold_in(random.key(0), 1), 500)[0]
    gan_plots.critic_plane(path, lambda x: who.net.critic(on_cpu, x, who.cfg), real, points, title)


def draw_study(folder: Path, values: tree.Tree, who: Players, data: Data, key: Tensor) -> None:
    """The ways from one sample to another, all classes, and what each code does."""
    classes = len(data.classes)
    z, labels = noise(who, random.fold_in(key, 1), 16, classes)
    device = z.device

    def table(name: str, z: Tensor, labels: Tensor, rows, columns, title: str) -> None:
        """z: (rows, columns, latent), labels (rows, columns)."""
        images = generated(values, who, z.flatten(0, 1), labels.flatten())
        images = (images.reshape(*z.shape[:2], *images.shape[1:]) + 1) / 2
        gan_plots.image_table(folder / f"{name}.png", images, rows, columns, title)

    way = torch.linspace(0, 1, 9, device=device)[:, None]
    between = (1 - way) * z[:8, None] + way * z[8:, None]
    # Of the same length as noise is: the middle of two Gaussian vectors is short.
    length = (1 - way) * z[:8, None].norm(dim=-1, keepdim=True) + way * z[8:, None].norm(dim=-1, keepdim=True)
    between = between * length / between.norm(dim=-1, keepdim=True)
    table("interpolation", between, labels[:8, None].expand(8, 9), None, None, "From one sample to another")
    if who.conditional:
        numbers = torch.arange(classes, device=device)[:, None].expand(classes, 10)
        several = z[:10].expand(classes, 10, -1)
        table("classes", several, numbers, data.classes, None, "A class a row, the same noise a column")
    game, latent = who.game, who.cfg.latent
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
