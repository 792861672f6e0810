"""Parts of vae.py: likelihoods of nets.generative.autoencoder, test figures, and its functions as an `Autoencoder`."""

import functools

import torch
from torch import Tensor

from core import random, tree
from experiments.parts import autoencoder as parts
from experiments.parts.autoencoder import Autoencoder
from nets.generative import autoencoder
from nets.generative.autoencoder import Config, Gaussian
from train.data.images.arrays import Labelled
from train.losses import variational


def corrupted(images: Tensor, keys: Tensor, share: float) -> Tensor:
    """Masking noise (Vincent et al. 2008): each pixel set to 0 with this probability. images (N, ...), keys (N, 2)."""
    return images * random.bernoulli(keys, 1 - share, images.shape[1:])


def log_likelihood(params: tree.Tree, output: Tensor, images: Tensor, cfg: Config) -> Tensor:
    """log p(x | z), (N,), of the decoder's output. Gaussians have the learned variance, else 1."""
    if cfg.output == "logits":
        return variational.bernoulli_log_likelihood(output, images)
    log_variance = params["decoder"]["log_variance"] if cfg.learned_variance else torch.zeros((), device=output.device)
    per_image = log_variance.expand(len(images)).reshape(-1, *(1,) * (images.ndim - 1))  # (N, 1, 1, 1)
    return variational.gaussian_log_likelihood(output, per_image, images)


def weighted_bound(params, q: Gaussian, images, labels, key, cfg, samples: int, chunk: int | None = None) -> Tensor:
    """The importance-weighted bound on log p(x), (N,); key (2,), or one per image."""

    def log_p(z: Tensor) -> Tensor:
        output = autoencoder.decode(params, z.to(q.mean.dtype), cfg, labels=labels)
        return log_likelihood(params, output, images, cfg)

    return variational.importance_weighted_bound(log_p, *q, key, samples, chunk)


def figures_of(
    values: tree.Tree, cfg: Config, test: Labelled, key: Tensor, noise: float | None = None, samples: int = 0
) -> dict[str, float]:
    """Means over the test images: nats of an image, and the squared error per pixel at the mean of q.

    Args:
        noise: share of the pixels that the encoder does not see.
        samples: those per image in the importance-weighted bound; 0 leaves out the bound and the active units.
    """

    def per_image(images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
        shown = images if noise is None else corrupted(images, keys, noise)
        code = autoencoder.encode(values, shown, cfg, labels=labels)
        output = autoencoder.decode(values, code.mean if cfg.gaussian else code, cfg, labels=labels)
        error = variational.squared_error(autoencoder.images(output, cfg), images)
        if not cfg.gaussian:
            return {"reconstruction": log_likelihood(values, output, images, cfg), "error": error}
        sampled = autoencoder.decode(values, autoencoder.draw(code, keys), cfg, labels=labels)
        log_p, kl = log_likelihood(values, sampled, images, cfg), variational.kl_divergence(*code)
        return {"elbo": variational.elbo(log_p, kl), "reconstruction": log_p, "kl": kl.sum(1), "error": error}

    def bound(images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        q = autoencoder.encode(values, images, cfg, labels=labels)
        return weighted_bound(values, q, images, labels, keys, cfg, samples, chunk=20)

    figures = parts.averages(per_image, test, key)
    if cfg.gaussian and samples:
        bounds = parts.in_parts(bound, *test, random.sites(random.fold_in(key, 1), len(test.labels)))
        figures |= {"log_likelihood": float(bounds.double().mean()), "bound_samples": samples}
        figures["active_units"] = int(variational.active_units(as_functions(values, cfg, ()).encode(*test)))
    return figures


def mean_image(train: Labelled, test: Labelled, cfg: Config) -> dict[str, float]:
    """Figures without a net: the decoder says the mean training image, and the variance around it."""
    mean = train.images.mean(0)
    params = {"decoder": {"log_variance": (train.images - mean).square().mean().log()}}
    output = (mean.logit(1e-6) if cfg.output == "logits" else mean).expand_as(test.images)
    nats = float(log_likelihood(params, output, test.images, cfg).mean())
    return {"mean_image_error": parts.mean_image_error(train, test), "mean_image_log_likelihood": nats}


def as_functions(values: tree.Tree, cfg: Config, classes: tuple[str, ...], noise: float | None = None) -> Autoencoder:
    def encode(images: Tensor, labels: Tensor) -> Tensor:
        code = autoencoder.encode(values, images, cfg, labels=labels)
        return code.mean if cfg.gaussian else code

    def decode(z: Tensor, labels: Tensor) -> Tensor:
        return autoencoder.images(autoencoder.decode(values, z, cfg, labels=labels), cfg)

    def sample(key: Tensor, labels: Tensor, temperature: float) -> Tensor:
        # z ~ N(0, I), with a key per sample, so that the first ones are the same for any count.
        z = random.normal(random.sites(key, len(labels)), (cfg.latent,))
        return decode(temperature * z, labels)

    encode, decode = (functools.partial(parts.in_parts, f) for f in (encode, decode))
    corrupt = None if noise is None else functools.partial(corrupted, share=noise)
    return Autoencoder(encode, decode, classes, cfg.classes > 0, sample if cfg.gaussian else None, corrupt)
