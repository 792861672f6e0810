"""The compiled step of a GAN on MNIST-sized images against the same nets as nn.Modules. Same weights in both.

    python tests/benchmarks/gan_step.py [--game wgan-gp] [--rounds 20]      gradient penalty; eager, create_graph=True
    python tests/benchmarks/gan_step.py --game dcgan                        torch.compile, fused Adam

A step is one of the critic and one of the generator. Both sides get the same real images, noise and, of the penalty,
points between the two; they are first compared: the losses of three steps must agree. (Batch norm amplifies rounding,
so that later ones drift apart.) torch.compile refuses the second gradient that a penalty needs, which is why that side
runs eagerly.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from timing import interleaved, report
from torch import Tensor, nn
from torch.nn import functional as F

from core import random, tree
from nets.generative import dcgan
from train import optimizers
from train.adversarial import objectives
from train.adversarial.regularisers import gradient_penalty
from train.adversarial.step import State, create, make_step

PENALTY, RATE, BETAS = 10.0, 2e-4, (0.5, 0.999)


class Batch(NamedTuple):
    real: Tensor
    critic_noise: Tensor
    generator_noise: Tensor
    key: Tensor


def modules(cfg: dcgan.Config) -> tuple[nn.Module, nn.Module]:
    """Critic and generator."""
    widths, last = cfg.widths, cfg.widths[-1] * cfg.base**2
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(zip((cfg.channels, *widths[:-1]), widths, strict=True)):
        normed = i > 0 and cfg.norm != "none"
        layers.append(nn.Conv2d(d_in, d_out, 4, 2, 1, bias=not (normed and cfg.norm == "batch")))
        if normed:
            layers.append(nn.BatchNorm2d(d_out) if cfg.norm == "batch" else nn.GroupNorm(1, d_out))
        layers.append(nn.LeakyReLU(0.2))
    critic = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last, 1), nn.Flatten(0))
    layers = [nn.Linear(cfg.latent, last, bias=False), nn.Unflatten(1, (widths[-1], cfg.base, cfg.base))]
    outputs = (*widths[-2::-1], cfg.channels)
    for i, (d_in, d_out) in enumerate(zip(widths[::-1], outputs, strict=True)):
        end = i == cfg.stages - 1
        layers += [nn.BatchNorm2d(d_in), nn.ReLU(), nn.ConvTranspose2d(d_in, d_out, 4, 2, 1, bias=end)]
    return critic, nn.Sequential(*layers, nn.Tanh())


def fill(module: nn.Module, params: dict) -> None:
    """Ours have the same leaves in another order: convolutions and norms are found by their shapes, in turn."""
    kinds = [(nn.Conv2d, nn.ConvTranspose2d), (nn.BatchNorm2d, nn.GroupNorm), (nn.Linear,)]
    norms = [p for p in params["norms"] if p]
    ends = [params[name] for name in ("project", "out") if name in params]
    with torch.no_grad():
        for kind, ours in zip(kinds, (params["convs"], norms, ends), strict=True):
            theirs = [m for m in module.modules() if isinstance(m, kind)]
            assert len(theirs) == len(ours), (kind, len(theirs), len(ours))
            for m, p in zip(theirs, ours, strict=True):
                m.weight.copy_(p["weight"])
                if m.bias is not None:
                    m.bias.copy_(p["bias"])


def our_step(cfg: dcgan.Config, wasserstein: bool) -> tuple[State, Callable]:
    goal = objectives.OBJECTIVES["wasserstein" if wasserstein else "non-saturating"]

    def critic_loss(own, other, batch, key, memory):
        fake = dcgan.generator(other, batch.critic_noise, cfg, train=True)
        real_scores, fake_scores = (dcgan.critic(own, x, cfg, train=True) for x in (batch.real, fake))
        value = goal.critic(real_scores, fake_scores)
        if wasserstein:
            critic = functools.partial(dcgan.critic, own, cfg=cfg, train=True)
            value = value + gradient_penalty(critic, batch.real, fake, batch.key, weight=PENALTY)
        return value, ({}, memory)

    def generator_loss(own, other, batch, key, memory):
        fake = dcgan.generator(own, batch.generator_noise, cfg, train=True)
        return goal.generator(dcgan.critic(other, fake, cfg, train=True)), ({}, memory)

    optimizer = optimizers.adam(RATE, *BETAS)
    state = create(random.key(0), dcgan.critic_spec(cfg), dcgan.generator_spec(cfg), optimizer, optimizer)
    return state, make_step(critic_loss, generator_loss, optimizer, optimizer)


def module_step(cfg: dcgan.Config, state: State, wasserstein: bool) -> Callable:
    players = modules(cfg)
    for module, player in zip(players, (state.critic, state.generator), strict=True):
        fill(module, player.params)
    # Each optimizer steps in one kernel; what is compiled is what torch.compile takes.
    critic_optimizer, generator_optimizer = (
        torch.optim.Adam(module.parameters(), RATE, BETAS, fused=True) for module in players
    )
    critic, generator = players if wasserstein else (torch.compile(m, fullgraph=True, dynamic=False) for m in players)

    def step(batch: Batch, u: Tensor) -> tuple[Tensor, Tensor]:
        real = batch.real
        with torch.no_grad():
            fake = generator(batch.critic_noise)
        if wasserstein:
            points = (fake + u * (real - fake)).requires_grad_()
            gradients = torch.autograd.grad(critic(points).sum(), points, create_graph=True)[0]
            penalty = PENALTY * (gradients.flatten(1).norm(dim=1) - 1).square().mean()
            critic_value = critic(fake).mean() - critic(real).mean() + penalty
        else:
            critic_value = F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()
        critic_optimizer.zero_grad(set_to_none=True)
        critic_value.backward()
        critic_optimizer.step()
        scores = critic(generator(batch.generator_noise))
        generator_value = -scores.mean() if wasserstein else F.softplus(-scores).mean()
        generator_optimizer.zero_grad(set_to_none=True)
        generator_value.backward()
        generator_optimizer.step()
        return critic_value.detach(), generator_value.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--game", default="wgan-gp", choices=("wgan-gp", "dcgan"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()

    wasserstein = args.game == "wgan-gp"
    cfg = dataclasses.replace(dcgan.PRESETS["mnist"], norm="layer" if wasserstein else "batch")
    state, train = our_step(cfg, wasserstein)
    theirs = module_step(cfg, state, wasserstein)

    def batch_at(i: int) -> tuple[Batch, Tensor]:
        keys = random.split(random.fold_in(random.key(1), i), 4).unbind(0)
        real = random.uniform(keys[0], (args.batch, 1, cfg.size, cfg.size), minval=-1.0, maxval=1.0)
        noise = (random.normal(key, (args.batch, cfg.latent)) for key in keys[1:3])
        return Batch(real, *noise, keys[3]), random.uniform(keys[3], (args.batch, 1, 1, 1))

    def ours(batch: Batch) -> tuple[Tensor, Tensor]:
        nonlocal state
        state, metrics = train(state, tree.map(lambda x: x[None], batch))
        return metrics["critic/loss"], metrics["generator/loss"]

    for i in range(3):
        batch, u = batch_at(i)
        torch.testing.assert_close(ours(batch), theirs(batch, u), atol=1e-3, rtol=1e-3)
    other = "nn.Module, eager, create_graph" if wasserstein else "nn.Module, compiled, fused Adam"
    contestants = {"functree": lambda: ours(batch), other: lambda: theirs(batch, u)}
    medians = interleaved(contestants, args.rounds)
    title = f"{args.game}, {cfg.size} x {cfg.size}, batch {args.batch}, {torch.get_num_threads()} threads"
    report(title, medians, "functree", {other: 1 / 1.8 if wasserstein else 0.95})


if __name__ == "__main__":
    main()
