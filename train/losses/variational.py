"""Variational autoencoders: log likelihoods, divergences and bounds, one value per example.

    log p(x) >= ELBO(x) = E_q(z|x)[log p(x | z)] - KL(q(z | x) || p(z)),        p(z) = N(0, I)

Kingma & Welling 2014, "Auto-Encoding Variational Bayes", arXiv:1312.6114; Burda et al. 2016, "Importance Weighted
Autoencoders", arXiv:1509.00519. All in nats, sums over the pixels and not means; (N,) leads, and the loss is minus the
mean over it. Half precision is taken to float32 first. The losses of a codebook (VQ-VAE) are here too.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core import random
from train.losses.basic import gaussian_kl

LOG_2PI = math.log(2 * math.pi)


def bernoulli_log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    """sum over the pixels of x log p + (1 - x) log(1 - p), p = sigmoid(logits): (N, ...) both -> (N,).

    x in [0, 1]; for values strictly between it is no likelihood, but the usual loss.
    """
    _same_shape(logits, x, "logits and x")
    logits = _wide(logits)
    # log p = l + log(1 - p), and log(1 - p) = log sigmoid(-l).
    return _sum(x * logits + F.logsigmoid(-logits))


def gaussian_log_likelihood(mean: Tensor, log_variance: Tensor | float, x: Tensor) -> Tensor:
    """sum over the pixels of log N(x; mean, variance): (N, ...) -> (N,).

    Args:
        mean, x: (N, ...), one shape.
        log_variance: broadcasts to it: one number for all, or one per pixel. 0 is half the squared error and a
            constant.
    """
    _same_shape(mean, x, "mean and x")
    mean = _wide(mean)
    log_variance = torch.as_tensor(log_variance, dtype=mean.dtype, device=mean.device)
    # log N(x; m, v) = -((x - m)^2 / v + log v + log 2 pi) / 2
    values = -0.5 * ((x - mean).square() * torch.exp(-log_variance) + log_variance + LOG_2PI)
    if values.shape != x.shape:
        raise ValueError(f"log_variance {tuple(log_variance.shape)} does not broadcast to x {tuple(x.shape)}")
    return _sum(values)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each latent: (N, latent) both -> (N, latent).

    Appendix B of Kingma & Welling 2014.
    """
    return gaussian_kl(_wide(mean)[..., None], _wide(log_variance)[..., None], reduction="none")


def elbo(log_likelihood: Tensor, kl: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """log_likelihood - beta * sum of kl: (N,). The bound itself for beta 1.

    Args:
        log_likelihood: (N,), log p(x | z) at a sample of z.
        kl: (N, latent), from `kl_divergence`.
        beta: weight of the divergence (Higgins et al. 2017, "beta-VAE"), constant or scheduled.
    """
    if log_likelihood.ndim != 1 or kl.ndim != 2 or len(kl) != len(log_likelihood):
        shapes = f"{tuple(log_likelihood.shape)} and {tuple(kl.shape)}"
        raise ValueError(f"elbo: expected a log likelihood (N,) and divergences (N, latent), found {shapes}")
    return log_likelihood - beta * kl.sum(1)  # log p(x | z) - beta KL(q || p), (N,)


def importance_weighted_bound(
    log_likelihood: Callable[[Tensor], Tensor],
    mean: Tensor,
    log_variance: Tensor,
    key: Tensor,
    samples: int,
    chunk: int | None = None,
) -> Tensor:
    """log 1/k sum_s p(x | z_s) p(z_s) / q(z_s | x), z_s ~ q: (N,). Burda et al. 2016, section 3.

    Its expectation is a lower bound on log p(x), grows with k (theorem 1), and is the ELBO for k = 1. With few samples
    it is an objective, with thousands an estimate of log p(x).

    Args:
        log_likelihood: z (N, latent) -> log p(x | z) (N,); called under vmap.
        mean, log_variance: (N, latent), those of q.
        key: (2,), or one per example (N, 2).
        samples: k.
        chunk: samples at a time, to bound the memory; all by default. The samples do not depend on it.

    Raises:
        ValueError: no sample, or an empty chunk.
    """
    _same_shape(mean, log_variance, "mean and log_variance")
    chunk = samples if chunk is None else chunk
    if samples < 1 or chunk < 1:
        raise ValueError(f"importance_weighted_bound: {samples} samples in chunks of {chunk}; expected at least 1")
    mean, log_variance = _wide(mean), _wide(log_variance)

    def total(start: int) -> Tensor:
        """log sum of a chunk's weights p(x | z) p(z) / q(z | x)."""
        noise = _noise(key, mean, start, min(start + chunk, samples))
        z = mean + torch.exp(0.5 * log_variance) * noise
        # log p(z) - log q(z | x); the constants cancel.
        ratio = 0.5 * (noise.square() - z.square() + log_variance).sum(-1)
        return torch.logsumexp(torch.vmap(log_likelihood)(z) + ratio, 0)

    bound = total(0)
    for start in range(chunk, samples, chunk):
        bound = torch.logaddexp(bound, total(start))
    return bound - math.log(samples)


def activity(means: Tensor) -> Tensor:
    """Activity of each latent: the variance over data of its posterior mean. (N, latent) -> (latent,).

    Burda et al. 2016: a latent is active above `ACTIVE`.
    """
    if means.ndim != 2 or len(means) < 2:
        raise ValueError(f"activity: expected posterior means (2 or more, latent), found {tuple(means.shape)}")
    return _wide(means).var(0)


ACTIVE = 1e-2


def active_units(means: Tensor, threshold: float = ACTIVE) -> Tensor:
    """Number of latents with an `activity` above the threshold; int64, 0-D. means: (N, latent)."""
    return (activity(means) > threshold).sum()


def squared_error(output: Tensor, x: Tensor) -> Tensor:
    """mean (output - x)^2 over all dimensions of an example: (N, ...) both -> (N,)."""
    _same_shape(output, x, "output and x")
    return _mean_square(output, x)


def codebook_loss(encodings: Tensor, nearest: Tensor) -> Tensor:
    """mean (stop(z) - e)^2, which moves the rows of a codebook to the encodings nearest to them: (N, ...) both -> (N,).

    The second term of van den Oord et al. 2017, arXiv:1711.00937, eq. 3; a mean over all dimensions of an example.
    """
    _same_shape(encodings, nearest, "encodings and nearest")
    return _mean_square(encodings.detach(), nearest)


def commitment_loss(encodings: Tensor, nearest: Tensor) -> Tensor:
    """mean (z - stop(e))^2, which keeps the encodings near their rows: (N, ...) both -> (N,).

    The third term of eq. 3; the paper weights it with beta = 0.25 (section 3.2).
    """
    _same_shape(encodings, nearest, "encodings and nearest")
    return _mean_square(encodings, nearest.detach())


def _noise(key: Tensor, mean: Tensor, start: int, stop: int) -> Tensor:
    """Standard normal (samples, N, latent) of the samples from start to stop, each from a key of its own."""
    numbers = torch.arange(start, stop, dtype=torch.int32, device=key.device)
    if key.ndim == 1:
        return random.normal(random.fold_in(key, numbers), mean.shape, mean.dtype)
    return random.normal(random.fold_in(key, numbers[:, None]), mean.shape[1:], mean.dtype)


def _same_shape(a: Tensor, b: Tensor, names: str) -> None:
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"{names} must have one shape (N, ...), got {tuple(a.shape)} and {tuple(b.shape)}")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (_wide(a) - _wide(b)).square().flatten(1).mean(1)
