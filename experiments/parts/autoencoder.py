"""What is learned by an autoencoder, its losses, and what can be done with it: there and back, samples, figures."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from core import random, spec, tree
from nets.generative import autoencoder, pixelcnn, vqvae
from nets.generative.autoencoder import Gaussian
from train.data import batching
from train.data.images.arrays import Labelled
from train.losses import cross_entropy, variational
from train.run import run as runs
from train.step import TrainState


class Trained(NamedTuple):
    """The nets. What they learned, `values`, has a tree for `model` and, if there is one, for `prior`."""

    cfg: autoencoder.Config | vqvae.Config
    classes: tuple[str, ...]
    prior: pixelcnn.Config | None = None
    noise: float = 0.0
    """Denoising: the part of the pixels that is put to 0."""

    @property
    def quantised(self) -> bool:
        return isinstance(self.cfg, vqvae.Config)

    @property
    def variational(self) -> bool:
        return not self.quantised and self.cfg.gaussian

    @property
    def conditional(self) -> int:
        """Classes that a sample can be asked for."""
        return self.prior.classes if self.quantised else self.cfg.classes


def load(folder: Path, who: Trained) -> tree.Tree:
    """What a run has learned. Raises ValueError: there is no checkpoint, or it is of other nets, or damaged."""
    net = vqvae if who.quantised else autoencoder
    values = {"model": runs.learned(folder, net.spec(who.cfg), "model", averaged=False)}
    if who.quantised:
        values["prior"] = runs.learned(folder, pixelcnn.spec(who.prior), "prior", averaged=False)
    return values


def corrupted(images: Tensor, keys: Tensor, part: float) -> Tensor:
    """Each pixel put to 0 with this probability: the masking noise of Vincent et al. 2008, "Extracting and Composing
    Robust Features with Denoising Autoencoders". images (N, ...), keys (N, 2)."""
    return images * random.bernoulli(keys, 1 - part, images.shape[1:])


def log_likelihood(params: tree.Tree, output: Tensor, images: Tensor, cfg: autoencoder.Config) -> Tensor:
    """log p(x | z) of what the decoder says, (N,). Gaussians have the learned variance, else 1."""
    if cfg.output == "logits":
        return variational.bernoulli_log_likelihood(output, images)
    if not cfg.learned_variance:
        return variational.gaussian_log_likelihood(output, 0.0, images)
    of_each = params["decoder"]["log_variance"].expand(len(images))
    return variational.gaussian_log_likelihood(output, of_each.reshape(-1, *(1,) * (images.ndim - 1)), images)


def weighted_bound(params, q: Gaussian, images, labels, key, cfg, samples: int, chunk: int | None = None) -> Tensor:
    """The importance-weighted bound on log p(x), (N,); key (2,) or one an example."""

    def given(z: Tensor) -> Tensor:
        return log_likelihood(params, autoencoder.decode(params, z, cfg, labels=labels), images, cfg)

    return variational.importance_weighted_bound(given, *q, key, samples, chunk)


def losses(params, batch, keys, who: Trained, own: dict[str, float], scale: float) -> tuple[Tensor, dict[str, Tensor]]:
    """What each image of a batch adds to the loss, (N,), and its parts, (N,) each.

    batch: (images, labels); keys (N, 2). own: `chosen`. scale: of the squared error of vq-vae.
    """
    images, labels = batch
    if who.quantised:
        out = vqvae.apply(params, images, who.cfg, train=True)
        error = (out["output"] - images).square().flatten(1).mean(1)
        commitment = variational.commitment_loss(out["encodings"], out["nearest"])
        value = scale * error + own["commitment"] * commitment
        if who.cfg.codebook == "loss":
            value = value + variational.codebook_loss(out["encodings"], out["nearest"])
        return value, {"error": error, "commitment": commitment}
    if not who.variational:
        shown = corrupted(images, keys, who.noise) if who.noise else images
        output = autoencoder.apply(params, shown, who.cfg, labels=labels)["output"]
        return -log_likelihood(params, output, images, who.cfg), {}
    q = autoencoder.encode(params, images, who.cfg, labels=labels)
    if own["weighted"]:
        bound = weighted_bound(params, q, images, labels, keys, who.cfg, own["samples"])
        return -bound, {"bound": bound}
    output = autoencoder.decode(params, autoencoder.draw(q, keys), who.cfg, labels=labels)
    given, kl = log_likelihood(params, output, images, who.cfg), variational.kl_divergence(*q)
    parts = {"elbo": variational.elbo(given, kl), "reconstruction": given, "kl": kl.sum(1)}
    return -variational.elbo(given, kl, own["beta"]), parts


def mean_loss(params, batch, keys, **settings) -> tuple[Tensor, dict[str, Tensor]]:
    value, parts = losses(params, batch, keys, **settings)
    return value.mean(), {name: part.mean().detach() for name, part in parts.items()}


def losses_alone(params, batch, keys, **settings) -> Tensor:
    """For `--watch-gradients`."""
    return losses(params, batch, keys, **settings)[0]


def prior_loss(params, batch, keys, cfg: pixelcnn.Config) -> Tensor:
    codes, labels = batch
    logits = pixelcnn.apply(params, codes, cfg, labels=labels, train=True)
    return cross_entropy(logits.flatten(0, -2), codes.flatten())


@torch.no_grad()
def revived(state: TrainState, who: Trained, model: tree.Tree, images: Tensor, key: Tensor, every: bool) -> TrainState:
    """The state with codes out of use, or every code, replaced by vectors of these images."""
    values = tree.merge(state.params, state.stats)
    z, size = vqvae.encode(values, images, who.cfg), None
    if who.cfg.codebook == "loss":
        size = vqvae.usage(vqvae.quantise(values["codebook"]["weight"], z).codes, who.cfg)
    new = vqvae.revive(values["codebook"], z, key, math.inf if every else 1.0, size)
    params, measured = spec.split(model, {**values, "codebook": new})
    return state._replace(params=params, stats=measured)


def _in_parts(f, *inputs: Tensor, size: int = 256) -> Tensor:
    return torch.cat([f(*(x[part] for x in inputs)) for part in batching.evaluation_batches(len(inputs[0]), size)])


@torch.no_grad()
def encoded(values: tree.Tree, who: Trained, images: Tensor, labels: Tensor) -> Tensor:
    """Codes, means of q, or vectors at each place that are not yet quantised: (N, ...)."""

    def f(images: Tensor, labels: Tensor) -> Tensor:
        if who.quantised:
            return vqvae.encode(values["model"], images, who.cfg)
        code = autoencoder.encode(values["model"], images, who.cfg, labels=labels)
        return code.mean if who.cfg.gaussian else code

    return _in_parts(f, images, labels)


@torch.no_grad()
def decoded(values: tree.Tree, who: Trained, codes: Tensor, labels: Tensor) -> Tensor:
    """Expected pixels of `encoded` codes, or of integers of a codebook: (N, channels, height, width)."""

    def f(z: Tensor, labels: Tensor) -> Tensor:
        if who.quantised:
            return vqvae.decode(values["model"], integers(values, who, z), who.cfg)
        return autoencoder.images(autoencoder.decode(values["model"], z, who.cfg, labels=labels), who.cfg)

    return _in_parts(f, codes, labels)


def integers(values: tree.Tree, who: Trained, codes: Tensor) -> Tensor:
    """Vectors (N, height, width, code) -> numbers in the codebook (N, height, width); these stay as they are."""
    if not codes.is_floating_point():
        return codes
    return vqvae.quantise(vqvae.codebook(values["model"]["codebook"], who.cfg.smoothing), codes).codes


@torch.no_grad()
def sampled(values: tree.Tree, who: Trained, key: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """An image a label, of classes if the model knows any: z ~ N(0, I), or codes that the prior draws."""
    if who.quantised:
        given = labels if who.prior.classes else None
        codes = pixelcnn.sample(values["prior"], key, who.prior, len(labels), given, temperature)
        return decoded(values, who, codes, labels)
    # A key a sample, so that the first ones are the same of any count.
    z = random.normal(random.sites(key, len(labels)), (who.cfg.latent,))
    return decoded(values, who, temperature * z, labels)


def in_turn(who: Trained, count: int, device: torch.device) -> Tensor:
    """Labels (count,): each class after the other."""
    return torch.arange(count, device=device) % max(len(who.classes), 1)


@torch.no_grad()
def measured(values: tree.Tree, who: Trained, test: Labelled, key: Tensor) -> dict[str, float]:
    """Means over the test images. `error` is the squared error of a pixel; nats are of an image, or of a code."""
    total: dict[str, float] = {}
    keys = random.sites(key, len(test.labels))
    for part in batching.evaluation_batches(len(test.labels), 500):
        images, labels = test.images[part], test.labels[part]
        for name, each in _of_each(values, who, images, labels, keys[part]).items():
            total[name] = total.get(name, 0.0) + float(each.double().sum())
    return {name: value / len(test.labels) for name, value in total.items()}


def _of_each(values: tree.Tree, who: Trained, images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
    params, cfg = values["model"], who.cfg
    if who.quantised:
        found = vqvae.apply(params, images, cfg)
        nats = cross_entropy(
            pixelcnn.apply(values["prior"], found["codes"], who.prior, labels=labels).flatten(0, -2),
            found["codes"].flatten(),
            reduction="none",
        )
        return {"error": _error(found["output"], images), "prior_nats": nats.reshape(len(images), -1).mean(1)}
    shown = corrupted(images, keys, who.noise) if who.noise else images
    code = autoencoder.encode(params, shown, cfg, labels=labels)
    output = autoencoder.decode(params, code.mean if cfg.gaussian else code, cfg, labels=labels)
    error = {"error": _error(autoencoder.images(output, cfg), images)}
    if not cfg.gaussian:
        return {**error, "reconstruction": log_likelihood(params, output, images, cfg)}
    drawn = autoencoder.decode(params, autoencoder.draw(code, keys), cfg, labels=labels)
    given, kl = log_likelihood(params, drawn, images, cfg), variational.kl_divergence(*code)
    return {"elbo": variational.elbo(given, kl), "reconstruction": given, "kl": kl.sum(1), **error}


def _error(output: Tensor, images: Tensor) -> Tensor:
    return (output - images).square().flatten(1).mean(1)


@torch.no_grad()
def figures_of(values: tree.Tree, who: Trained, test: Labelled, key: Tensor, bound_samples: int) -> dict[str, float]:
    """`measured`, and what needs all codes together, or many samples: active units, the importance-weighted bound with
    `bound_samples`, the use of a codebook (the part of it that occurs, and the perplexity)."""
    found = measured(values, who, test, key)
    codes = encoded(values, who, test.images, test.labels)
    if who.quantised:
        counts = vqvae.usage(integers(values, who, codes), who.cfg)
        use = {"codes_used": float((counts > 0).float().mean()), "perplexity": float(vqvae.perplexity(counts))}
        return {**found, **use, "prior_nats_uniform": float(torch.tensor(who.cfg.codes).log())}
    if not who.variational:
        return found

    def bound(images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        q = autoencoder.encode(values["model"], images, who.cfg, labels=labels)
        return weighted_bound(values["model"], q, images, labels, keys, who.cfg, bound_samples, chunk=20)

    keys = random.sites(random.fold_in(key, 1), len(test.labels))
    of_each = _in_parts(bound, test.images, test.labels, keys)
    return {
        **found,
        "log_likelihood": float(of_each.double().mean()),
        "bound_samples": bound_samples,
        "active_units": int(variational.active_units(codes)),
    }
