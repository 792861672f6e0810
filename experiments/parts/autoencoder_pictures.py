"""Pictures of a trained autoencoder, and the sub-commands that draw them: sample, reconstruct, interpolate."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core import random, tree
from experiments.parts.autoencoder import Autoencoder, every_class
from train import plots
from train.data.images import sets as image_sets
from train.data.images.arrays import Labelled
from train.losses import variational
from train.plots import gan as gan_plots
from train.run import Count, FromRun, Natural, Positive, SavedRun, command_line, open_run
from train.run.run import unused

SHOWN = 10  # images in a row
EMBEDDED = 1000  # codes in the plane, at most


def draw(folder: Path, model: Autoencoder, test: Labelled, key: Tensor) -> Tensor:
    """The pictures that every autoencoder has, in the folder of its run; returns the codes of the test images."""
    first = Labelled(*(part[:SHOWN] for part in test))
    draw_reconstructions(folder / "reconstructions.png", model, first, key)
    draw_walks(folder / "walk.png", model, test, torch.arange(len(first.labels)))
    if model.sample is not None:
        draw_samples(folder / "samples.png", model, random.fold_in(key, 2))
    codes = model.encode(*test)
    print("drawing the codes (PCA, t-SNE) ...")
    draw_codes(folder / "codes.png", codes[:EMBEDDED].flatten(1), test.labels[:EMBEDDED], model.classes)
    return codes


def draw_reconstructions(path: Path, model: Autoencoder, images: Labelled, key: Tensor) -> Tensor:
    """Images above their reconstructions, which are returned; between them the corrupted ones, if there are any."""
    rows = {"image": images.images}
    if model.corrupt is not None:
        rows["corrupted"] = model.corrupt(images.images, random.sites(key, len(images.labels)))
    shown = list(rows.values())[-1]
    rows["back"] = model.decode(model.encode(shown, images.labels), images.labels)
    columns = [model.classes[i] for i in images.labels.tolist()]
    gan_plots.image_table(path, torch.stack(list(rows.values())), list(rows), columns)
    return rows["back"]


def draw_walks(path: Path, model: Autoencoder, test: Labelled, ends: Tensor, steps: int = 9) -> None:
    """Straight lines between codes, one per row, with the two images at its ends: ends[0] to ends[1], ends[2] to
    ends[3] ... The class changes at half of the way."""
    ends = ends[: len(ends) // 2 * 2].to(test.labels.device)
    images, labels = test.images[ends], test.labels[ends]
    codes = model.encode(images, labels)
    way = torch.linspace(0, 1, steps, device=codes.device).reshape(1, -1, *(1,) * (codes.ndim - 1))
    between = (1 - way) * codes[::2, None] + way * codes[1::2, None]  # (rows, steps, ...)
    second_half = torch.arange(steps, device=codes.device) >= steps / 2
    classes = torch.where(second_half, labels[1::2, None], labels[::2, None])  # (rows, steps)
    decoded = model.decode(between.flatten(0, 1), classes.flatten()).unflatten(0, classes.shape)
    table = torch.cat([images[::2, None], decoded, images[1::2, None]], 1)
    columns = ["image", *(f"{w:.2f}" for w in way.flatten().tolist()), "image"]
    gan_plots.image_table(path, table, None, columns, "From the code of one image to that of another")


def draw_samples(path: Path, model: Autoencoder, key: Tensor) -> None:
    """64 samples, or a row per class where the model is conditional."""
    if not model.conditional:
        images = model.sample(key, every_class(model, 64, key.device), 1.0)
        plots.image_grid(path, images, 8, title="Samples", scale=0.6)
        return
    labels = torch.arange(len(model.classes), device=key.device).repeat_interleave(SHOWN)
    table = model.sample(key, labels, 1.0).unflatten(0, (-1, SHOWN))  # (classes, SHOWN, channels, height, width)
    gan_plots.image_table(path, table, model.classes, None, "Samples, a row per class", scale=0.6)


def draw_codes(path: Path, codes: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
    """Codes (count, dimensions) in the plane: by their first two principal components, and by t-SNE."""
    from sklearn.manifold import TSNE

    x, labels = codes.double().cpu(), labels.cpu()
    dimensions = x.shape[1]
    flat, name = x, "The codes, of two dimensions"
    if dimensions != 2:
        # X = U S V^T, centred: the first principal components are U S, and U S^2 U^T = X X^T.
        squares, axes = torch.linalg.eigh((x - x.mean(0)) @ (x - x.mean(0)).T)  # ascending
        flat = axes[:, [-1, -2]] * squares[[-1, -2]].clamp(min=0).sqrt()
        name = f"PCA of the codes, of {dimensions} dimension{'s' * (dimensions > 1)}"
    perplexity = min(30, (len(x) - 1) / 3)
    near = TSNE(2, perplexity=perplexity, init="random", random_state=0, n_jobs=1).fit_transform(x.numpy())
    with plots.panels(path, 1, 2, 5.2, 4.8) as (left, right):
        plots.scatter(left, flat, labels, classes, name)
        plots.scatter(right, near, labels, classes, "t-SNE of the codes")


def draw_latent_grid(path: Path, model: Autoencoder, codes: Tensor, side: int = 20) -> None:
    """The decoder over codes of two dimensions: at the quantiles of the Gaussian prior (Kingma and Welling 2014, figure
    4), or, where there is none, of `codes` (N, 2). A conditional decoder draws the class in the middle of its list."""
    quantiles = (torch.arange(side, device=codes.device) + 0.5) / side
    if model.sample is not None:
        xs = ys = torch.special.ndtri(quantiles)
    else:
        xs, ys = torch.quantile(codes, quantiles, 0).unbind(1)
    grid = torch.stack(torch.meshgrid(xs, ys.flip(0), indexing="xy"), -1).reshape(-1, 2)
    middle = len(model.classes) // 2
    table = model.decode(grid, torch.full_like(grid[:, 0], middle, dtype=torch.int64)).unflatten(0, (side, side))
    label = f", class {model.classes[middle]}" if model.conditional else ""
    of = "the prior" if model.sample is not None else "the codes"
    gan_plots.image_table(path, table, None, None, f"The decoder at quantiles of {of}{label}", scale=0.36)


@dataclass(frozen=True)
class SampleArgs(FromRun):
    count: Count = 64
    """Number of samples."""
    label: Natural | None = None
    """Class of all samples, where the model is conditional; every class in turn if None."""
    temperature: Positive = 1.0
    """Standard deviation of Gaussian codes; divisor of the logits of a prior of discrete ones."""
    seed: Natural = 0
    """Seed of the codes."""
    out: Path | None = None
    """New picture; RUN/sampled.png, numbered if it exists, if None."""


@dataclass(frozen=True)
class ReconstructArgs(FromRun):
    count: Count = 20
    """Number of test images."""
    seed: Natural = 0
    """Seed of their choice."""
    out: Path | None = None
    """New picture; RUN/reconstructed.png, numbered if it exists, if None."""


@dataclass(frozen=True)
class InterpolateArgs(FromRun):
    indices: tuple[Natural, ...] = (0, 1, 2, 3, 4, 5)
    """Indices of test images: from the first to the second, from the third to the fourth ..."""
    count: Count = 9
    """Number of images on the way from one to another."""
    out: Path | None = None
    """New picture; RUN/interpolated.png, numbered if it exists, if None."""


Load = Callable[[SavedRun, torch.device], Autoencoder]


def commands(root: Path, load: Load) -> dict[str, tuple]:
    """The sub-commands of a script whose runs are in `root`; `load` gives the autoencoder of a run, on a device."""
    table = ((SampleArgs, sample), (ReconstructArgs, reconstruct), (InterpolateArgs, interpolate))
    return {f.__name__: (kind, functools.partial(f, root, load)) for kind, f in table}


def sample(root: Path, load: Load, args: SampleArgs) -> None:
    """Sample images from a run's prior, of every class or of one."""
    run, device = open_run(args.run, root, args.checkpoint), command_line.device(args.device)
    model = load(run, device)
    if model.sample is None:
        raise ValueError(f"'{args.run}' has an autoencoder without a prior to sample codes from")
    if args.label is not None and not (model.conditional and args.label < len(model.classes)):
        kinds = f"0 to {len(model.classes) - 1}" if model.conditional else "none: this model is not conditional"
        raise ValueError(f"--label is {args.label}; expected {kinds}")
    path = unused(args.out, args.run / "sampled.png")
    labels = every_class(model, args.count, device)
    labels = labels if args.label is None else torch.full_like(labels, args.label)
    plots.image_grid(path, model.sample(random.key(args.seed, device), labels, args.temperature), scale=0.6)
    print(f"{args.count} samples in {path}")


def reconstruct(root: Path, load: Load, args: ReconstructArgs) -> None:
    """Test images beside their reconstructions by a run's net."""
    run, device = open_run(args.run, root, args.checkpoint), command_line.device(args.device)
    test = test_images(run)
    if args.count > len(test.labels):
        raise ValueError(f"--count is {args.count}, but there are {len(test.labels)} test images")
    path, key = unused(args.out, args.run / "reconstructed.png"), random.key(args.seed)
    rows = random.permutation(key, len(test.labels))[: args.count]
    some = tree.move(Labelled(test.images[rows], test.labels[rows]), device)
    back = draw_reconstructions(path, load(run, device), some, key.to(device))
    error = float(variational.squared_error(back, some.images).mean())
    print(f"{args.count} test images, squared error per pixel {error:.4g}, in {path}")


def interpolate(root: Path, load: Load, args: InterpolateArgs) -> None:
    """From one test image to another through the codes of a run's net."""
    run, device = open_run(args.run, root, args.checkpoint), command_line.device(args.device)
    test, ends = test_images(run), args.indices
    if len(ends) < 2 or len(ends) % 2 or max(ends) >= len(test.labels):
        numbers = " ".join(map(str, ends))
        raise ValueError(f"--indices {numbers}: expected pairs of numbers from 0 to {len(test.labels) - 1}")
    path = unused(args.out, args.run / "interpolated.png")
    draw_walks(path, load(run, device), tree.move(test, device), torch.tensor(ends), args.count)
    print(f"{len(ends) // 2} walks in {path}")


def test_images(run: SavedRun) -> Labelled:
    return image_sets.read_all(run.config["args"]["data"], run.config["args"]["size"]).test
