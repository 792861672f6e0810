"""Pictures of an autoencoder that was trained."""

from pathlib import Path

import torch
from torch import Tensor

from core import random, tree
from experiments.parts.autoencoder import Trained, corrupted, decoded, encoded, in_turn, integers, sampled
from nets.generative import vqvae
from train import plots
from train.data.images.arrays import Labelled
from train.plots import gan as gan_plots
from train.run.logs import read_curves

SHOWN = 10  # images in a row
EMBEDDED = 1000  # codes in the plane, at most


def draw(folder: Path, values: tree.Tree, who: Trained, test: Labelled, key: Tensor, log=print) -> None:
    """All pictures of a run."""
    images, labels = test.images[:SHOWN], test.labels[:SHOWN]
    draw_reconstructions(folder / "reconstructions.png", values, who, images, labels, key)
    draw_walks(folder / "walk.png", values, who, test, torch.arange(min(SHOWN, len(labels))))
    if who.quantised or who.variational:
        draw_samples(folder / "samples.png", values, who, random.fold_in(key, 2))
    if not who.quantised and who.cfg.latent == 2:
        draw_latent_grid(folder / "latent_grid.png", values, who, test)
    codes = encoded(values, who, test.images, test.labels)
    if who.quantised:
        draw_usage(folder / "usage.png", integers(values, who, codes), who.cfg)
    log("drawing the codes (PCA, t-SNE) ...")
    draw_codes(folder / "codes.png", codes[:EMBEDDED].flatten(1), test.labels[:EMBEDDED], who.classes)


def draw_reconstructions(path: Path, values: tree.Tree, who: Trained, images, labels, key: Tensor) -> None:
    """Images (count, ...) over what comes back; between them what a denoising autoencoder is shown."""
    rows, shown = {"image": images}, images
    if who.noise:
        rows["shown"] = shown = corrupted(images, random.sites(key, len(images)), who.noise)
    rows["back"] = decoded(values, who, encoded(values, who, shown, labels), labels)
    columns = [who.classes[i] for i in labels.tolist()]
    gan_plots.image_table(path, torch.stack(list(rows.values())), list(rows), columns)


def draw_walks(path: Path, values: tree.Tree, who: Trained, test: Labelled, chosen: Tensor, steps: int = 9) -> None:
    """Straight lines between the codes of two images a row, chosen[0] to chosen[1], chosen[2] to chosen[3] ..., between
    the images themselves. A class goes over into the other at half of the way."""
    chosen = chosen[: len(chosen) // 2 * 2].to(test.labels.device)
    images, labels = test.images[chosen], test.labels[chosen]
    codes = encoded(values, who, images, labels)
    way = torch.linspace(0, 1, steps, device=codes.device).reshape(1, -1, *(1,) * (codes.ndim - 1))
    between = (1 - way) * codes[::2, None] + way * codes[1::2, None]
    later = torch.arange(steps, device=codes.device) >= steps / 2
    classes = torch.where(later, labels[1::2, None], labels[::2, None])
    found = decoded(values, who, between.flatten(0, 1), classes.flatten()).reshape(*classes.shape, *images.shape[1:])
    table = torch.cat([images[::2, None], found, images[1::2, None]], 1)
    columns = ["image", *(f"{w:.2f}" for w in way.flatten().tolist()), "image"]
    gan_plots.image_table(path, table, None, columns, "From the code of one image to that of another")


def draw_samples(path: Path, values: tree.Tree, who: Trained, key: Tensor) -> None:
    """64 samples, or a class a row where the model knows classes."""
    device, classes = key.device, who.conditional
    labels = in_turn(who, 64, device) if not classes else torch.arange(classes, device=device).repeat_interleave(SHOWN)
    images = sampled(values, who, key, labels)
    if not classes:
        plots.image_grid(path, images, 8, title="Samples", scale=0.6)
        return
    table = images.reshape(classes, SHOWN, *images.shape[1:])
    gan_plots.image_table(path, table, who.classes, None, "Samples, a class a row", scale=0.6)


def draw_latent_grid(path: Path, values: tree.Tree, who: Trained, test: Labelled, side: int = 20) -> None:
    """The decoder over a code of two numbers: at the quantiles of the Gaussian prior (Kingma and Welling 2014, figure
    4), or, where there is none, of the codes of the test images. A conditional decoder draws the class in the middle of
    its list."""
    place = (torch.arange(side, device=test.labels.device) + 0.5) / side
    if who.variational:
        xs = ys = torch.special.ndtri(place)
    else:
        xs, ys = torch.quantile(encoded(values, who, test.images, test.labels), place, 0).unbind(1)
    codes = torch.stack(torch.meshgrid(xs, ys.flip(0), indexing="xy"), -1).reshape(-1, 2)
    labels = torch.full_like(codes[:, 0], len(who.classes) // 2, dtype=torch.int64)
    images = decoded(values, who, codes, labels)
    what = f", class {who.classes[len(who.classes) // 2]}" if who.conditional else ""
    of = "the prior" if who.variational else "the codes"
    table = images.reshape(side, side, *images.shape[1:])
    gan_plots.image_table(path, table, None, None, f"The decoder at quantiles of {of}{what}", scale=0.36)


def draw_usage(path: Path, codes: Tensor, cfg: vqvae.Config) -> None:
    """How often each row of the codebook is chosen, in descending order."""
    counts = vqvae.usage(codes, cfg).cpu()
    share, rank = 100 * counts.sort(descending=True).values / counts.sum(), torch.arange(1, cfg.codes + 1)
    lines = {"test images": (rank, share), "even use": (rank, torch.full_like(share, 100 / cfg.codes))}
    title = f"{int((counts > 0).sum())} of {cfg.codes} codes used, perplexity {float(vqvae.perplexity(counts)):.1f}"
    plots.curves(path, lines, "code, by its use", "% of the places", title)


def draw_codes(path: Path, codes: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
    """Codes (count, numbers) in the plane: by their first two principal components, and by t-SNE."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x, labels = codes.double().cpu().numpy(), labels.cpu()
    flat = x if x.shape[1] == 2 else PCA(2, random_state=0).fit_transform(x)
    near = TSNE(2, perplexity=min(30, (len(x) - 1) / 3), init="random", random_state=0, n_jobs=1).fit_transform(x)
    with plots.panels(path, 1, 2, 5.2, 4.8) as (left, right):
        name = "The two numbers of a code" if x.shape[1] == 2 else f"PCA of the {x.shape[1]} numbers of a code"
        plots.scatter(left, flat, labels, classes, name)
        plots.scatter(right, near, labels, classes, "t-SNE of the codes")


def draw_curves(folder: Path, who: Trained) -> None:
    """loss.png, from the log of a run."""
    if who.quantised:
        with plots.panels(folder / "loss.png", 1, 2, 5.6, 4.0) as (left, right):
            lines = read_curves(folder, "train/error", "test/error")
            plots.curves(left, lines, ylabel="squared error of a pixel", title="Reconstruction", log=True)
            plots.curves(
                right, read_curves(folder, "prior/loss", "test/prior_nats"), ylabel="nats a code", title="Prior"
            )
        return
    if not who.variational:
        lines = read_curves(folder, "train/loss", "test/reconstruction")
        lines = {"train": lines["train/loss"], "test": _minus(lines["test/reconstruction"])}
        plots.curves(folder / "loss.png", lines, ylabel="nats an image", title="-log p(x | z)")
        return
    names = {"train/elbo": "train", "test/elbo": "test", "train/bound": "train, importance-weighted bound"}
    lines = read_curves(folder, *names, "test/reconstruction", "test/kl")
    bound = {said: _minus(lines[name]) for name, said in names.items() if lines[name][0]}
    parts = {"-log p(x | z)": _minus(lines["test/reconstruction"]), "KL(q(z | x) || p(z))": lines["test/kl"]}
    with plots.panels(folder / "loss.png", 1, 2, 5.6, 4.0) as (left, right):
        plots.curves(left, bound, ylabel="nats an image", title="-ELBO")
        plots.curves(right, parts, ylabel="nats an image", title="Its parts, test images")


def _minus(line: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    return line[0], [-y for y in line[1]]
