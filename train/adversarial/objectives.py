"""Objectives of GANs: the losses of critic and generator, as functions of the critic's scores.

Scores are unbounded, (batch,) or (batch, 1, height, width) of a patch critic, high for what the critic believes real;
C(x) is that of a real x, C(y) of a generated y. Each loss is a scalar, the mean over examples and patches.

| name             | critic minimises                           | generator minimises          |
| ---------------- | ------------------------------------------ | ---------------------------- |
| `minimax`        | -log s(C(x)) - log(1 - s(C(y)))            | log(1 - s(C(y)))             |
| `non-saturating` | the same                                   | -log s(C(y))                 |
| `wasserstein`    | C(y) - C(x)                                | -C(y)                        |
| `least-squares`  | (C(x) - 1)^2 / 2 + C(y)^2 / 2              | (C(y) - 1)^2 / 2             |
| `hinge`          | max(0, 1 - C(x)) + max(0, 1 + C(y))        | -C(y)                        |

with s the sigmoid. Where the critic is an auto-encoder its score is an energy, *low* for what is real: `energy` (EBGAN)
and `equilibrium` (BEGAN). Scores in half precision are taken to float32 first.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Objective(NamedTuple):
    """critic: `(real_scores, fake_scores) -> scalar`; generator: `(fake_scores, real_scores=None) -> scalar`.

    `needs_real` says whether the generator's loss depends on the real scores.
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[..., Tensor]
    needs_real: bool = False


def _objective(critic: Callable, generator: Callable, needs_real: bool = False) -> Objective:
    """An Objective of scores in float32 or wider."""

    def wide_critic(real: Tensor, fake: Tensor) -> Tensor:
        return critic(_wide(real), _wide(fake))

    def wide_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
        return generator(_wide(fake), None if real is None else _wide(real))

    return Objective(wide_critic, wide_generator, needs_real)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logistic(real: Tensor, fake: Tensor) -> Tensor:
    """-log s(C(x)) - log(1 - s(C(y)))"""
    # -log s(c) = softplus(-c) and -log(1 - s(c)) = softplus(c), neither of which overflows.
    return F.softplus(-real).mean() + F.softplus(fake).mean()


# Goodfellow et al. 2014, arXiv:1406.2661, eq. 1: the generator descends what the critic ascends, log(1 - s(C(y))) ...
MINIMAX = _objective(_logistic, lambda fake, real: -F.softplus(fake).mean())
# ... or, after its section 3, ascends log s(C(y)): the same fixed point, and a gradient when the critic is sure.
NON_SATURATING = _objective(_logistic, lambda fake, real: F.softplus(-fake).mean())
# Arjovsky et al. 2017, arXiv:1701.07875, eq. 2: the dual of the earth mover's distance, over 1-Lipschitz critics only.
WASSERSTEIN = _objective(
    lambda real, fake: fake.mean() - real.mean(),  # C(y) - C(x)
    lambda fake, real: -fake.mean(),  # -C(y)
)
# Lim and Ye 2017, arXiv:1705.02894; Miyato et al. 2018, arXiv:1802.05957, eqs. 16 and 17.
HINGE = _objective(
    lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),  # max(0, 1 - C(x)) + max(0, 1 + C(y))
    lambda fake, real: -fake.mean(),  # -C(y)
)


def least_squares(fake_label: float = 0.0, real_label: float = 1.0, target: float = 1.0) -> Objective:
    """((C(x) - b)^2 + (C(y) - a)^2) / 2, and (C(y) - c)^2 / 2 (Mao et al. 2017, arXiv:1611.04076, eq. 2).

    Args:
        fake_label, real_label, target: a, b, c; the paper's two choices are (0, 1, 1), its eq. 9, and (-1, 1, 0), its
            eq. 8, which minimises Pearson's chi-squared divergence.
    """
    return _objective(
        lambda real, fake: ((real - real_label).square().mean() + (fake - fake_label).square().mean()) / 2,
        lambda fake, real: (fake - target).square().mean() / 2,
    )


OBJECTIVES = {
    "minimax": MINIMAX,
    "non-saturating": NON_SATURATING,
    "wasserstein": WASSERSTEIN,
    "least-squares": least_squares(),
    "hinge": HINGE,
}
PAIRINGS = ("none", "average", "paired")


def relativistic(objective: Objective, pairing: str = "average") -> Objective:
    """Scores become differences: how much more real x looks than y (Jolicoeur-Martineau 2018, arXiv:1807.00734).

    average:  C(x) - mean C(y)   and   C(y) - mean C(x)
    paired:   C(x_i) - C(y_i)    and   C(y_i) - C(x_i)

    in the place of C(x) and C(y). Of pairs, half of the sum of the critic's two terms: in most objectives the two are
    then equal, and the paper keeps one. The generator minimises the critic's loss with real and fake exchanged, so the
    `generator` of `objective` plays no part.

    Raises:
        ValueError: another pairing; when called, no real scores, or for pairs other shapes.
    """
    if pairing not in PAIRINGS[1:]:
        raise ValueError(f"pairing must be 'average' or 'paired', got {pairing!r}")

    def critic(real: Tensor, fake: Tensor) -> Tensor:
        if pairing == "average":
            return objective.critic(real - fake.mean(0), fake - real.mean(0))  # C(x) - mean C(y), C(y) - mean C(x)
        if real.shape != fake.shape:
            raise ValueError(f"pairs need as many real as fake scores: got {tuple(real.shape)} and {tuple(fake.shape)}")
        return objective.critic(real - fake, fake - real) / 2

    def generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
        if real is None:
            raise ValueError("a relativistic generator's loss needs the real scores too")
        return critic(fake, real)

    return _objective(critic, generator, needs_real=True)


def choose(name: str, pairing: str = "none") -> Objective:
    """An objective of `OBJECTIVES`, as it is or `relativistic`.

    Raises:
        ValueError: a name or pairing that is not there; the choices are listed.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"no objective {name!r}: choose one of {', '.join(OBJECTIVES)}")
    if pairing not in PAIRINGS:
        raise ValueError(f"no pairing {pairing!r}: choose one of {', '.join(PAIRINGS)}")
    if pairing == "none":
        return OBJECTIVES[name]
    # Differences are centred on 0, so the labels of least squares are -1 and 1 (RaLSGAN).
    return relativistic(least_squares(-1, 1) if name == "least-squares" else OBJECTIVES[name], pairing)


def energy(margin: float) -> Objective:
    """E(x) + max(0, m - E(y)) for the critic, E(y) for the generator (Zhao et al. 2017, arXiv:1609.03126, eqs. 1, 2).

    Args:
        margin: m; energies of generated examples above it cost the critic nothing.
    """
    if not margin > 0:
        raise ValueError(f"margin must be positive, got {margin}")
    return _objective(
        lambda real, fake: real.mean() + F.relu(margin - fake).mean(),  # E(x) + max(0, m - E(y))
        lambda fake, real: fake.mean(),  # E(y)
    )


def pulling_away(embeddings: Tensor) -> Tensor:
    """1 / (n (n - 1)) sum over i != j of cos(S_i, S_j)^2: generated examples should not all look alike (EBGAN, eq. 4).

    Args:
        embeddings: (n, width), n at least 2.
    """
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"embeddings have shape {tuple(embeddings.shape)}, expected (2 or more, width)")
    count = len(embeddings)
    unit = F.normalize(_wide(embeddings), dim=1)
    others = 1 - torch.eye(count, dtype=unit.dtype, device=unit.device)  # 1 where i != j
    cosines = unit @ unit.T  # (n, n)
    return (cosines.square() * others).sum() / (count * (count - 1))


def equilibrium(k: Tensor) -> Objective:
    """E(x) - k E(y) for the critic, E(y) for the generator (BEGAN, Berthelot et al. 2017, arXiv:1703.10717, sec. 3.4).

    Args:
        k: weight of the generated examples in the critic's loss; starts at 0, `next_equilibrium` moves it.
    """
    return _objective(
        lambda real, fake: real.mean() - k * fake.mean(),  # E(x) - k E(y)
        lambda fake, real: fake.mean(),  # E(y)
    )


def next_equilibrium(
    k: Tensor, real_energies: Tensor, fake_energies: Tensor, *, diversity: float = 0.5, rate: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """(k, M) after a step: control that holds E(y) / E(x) at the diversity ratio, and BEGAN's measure of convergence.

    k <- clip(k + rate (diversity E(x) - E(y)), 0, 1),    M = E(x) + |diversity E(x) - E(y)|    (section 3.4)

    Args:
        k: 0-D.
        diversity: the paper's gamma in [0, 1]; smaller is sharper and less varied.
        rate: the paper's lambda_k.
    """
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity must be in [0, 1], got {diversity}")
    real, fake = _wide(real_energies.detach()).mean(), _wide(fake_energies.detach()).mean()
    balance = diversity * real - fake
    return (k + rate * balance).clamp(0, 1), real + balance.abs()  # k, M


def categorical_information(logits: Tensor, codes: Tensor) -> Tensor:
    """Lower bound, in nats, on the mutual information between a uniform categorical code and the image.

    I(c; x) >= E[log Q(c | x)] + H(c),   H(c) = log categories      (InfoGAN, Chen et al. 2016, arXiv:1606.03657, eq. 4)

    Both players minimise minus this. At most log categories; 0 if Q knows nothing and says so.

    Args:
        logits: (batch, categories), Q's.
        codes: (batch,) integers, the inputs of the generator.
    """
    if logits.ndim != 2 or codes.shape != logits.shape[:1]:
        shapes = f"logits {tuple(logits.shape)} and codes {tuple(codes.shape)}"
        raise ValueError(f"expected logits (batch, categories) and codes (batch,), got {shapes}")
    return math.log(logits.shape[1]) - F.cross_entropy(_wide(logits), codes)  # H(c) + E[log Q(c | x)]


def gaussian_information(
    mean: Tensor, codes: Tensor, log_variance: Tensor | None = None, *, entropy: float = math.log(2)
) -> Tensor:
    """As `categorical_information` for continuous codes, Q a Gaussian independent in each code:

    E[sum_j log N(c_j; mean_j, variance_j)] + H(c)

    Args:
        mean, codes: (batch, codes).
        log_variance: (batch, codes), or what broadcasts to it; 0 if None, which makes it a squared error.
        entropy: of one code in nats; log 2 is that of the paper's codes, uniform in [-1, 1].
    """
    if mean.ndim != 2 or codes.shape != mean.shape:
        shapes = f"mean {tuple(mean.shape)} and codes {tuple(codes.shape)}"
        raise ValueError(f"expected mean and codes of one shape (batch, codes), got {shapes}")
    mean = _wide(mean)
    log_variance = torch.zeros_like(mean) if log_variance is None else _wide(log_variance)
    density = -0.5 * ((codes - mean).square() * torch.exp(-log_variance) + log_variance + math.log(2 * math.pi))
    return (density + entropy).sum(1).mean()
