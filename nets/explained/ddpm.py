"""Denoising diffusion in 100 lines, with torch and `nets/explained/unet.py` alone: equal to `train.diffusion`.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239); sections and equations are its. n images
in [-1, 1], noised in T steps; times t count from 0 here, from 1 there. `model(x, time)` predicts the noise in x, such
as the U-Net. The full ones have other schedules, targets and samplers; `experiments/diffusion.py` runs them.

`python nets/explained/ddpm.py` learns digits of 8 x 8 pixels in a minute and draws new ones into runs/ddpm.png.
"""

from pathlib import Path

import torch
from torch.nn.functional import pad

from nets.explained import unet


def schedule(steps):
    """ᾱ_t = Π_{s <= t} (1 - β_s), the part of the image in x_t, for β that rise linearly: (T,) (section 4)."""
    betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * 1000 / steps  # the paper's for T = 1000
    return torch.cumprod(1 - betas, 0)


def diffuse(alpha_bars, image, time, noise):
    """x_t = sqrt(ᾱ) image + sqrt(1 - ᾱ) ε, ε ~ N(0, I): (n, c, s, s), times (n,) (equation 4)."""
    alpha_bar = alpha_bars[time].to(image.dtype)[:, None, None, None]  # (n, 1, 1, 1)
    return alpha_bar.sqrt() * image + (1 - alpha_bar).sqrt() * noise


def loss(model, alpha_bars, image, time, noise):
    """mean (ε - model(x_t, t))²: (n,) (equation 14)."""
    return (noise - model(diffuse(alpha_bars, image, time, noise), time)).square().flatten(1).mean(1)


@torch.no_grad()
def sample(model, alpha_bars, x, noises):
    """Images from x ~ N(0, I) (n, c, s, s), with new noise per step, (T, n, c, s, s) (algorithm 2)."""
    before = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])  # ᾱ_(t-1), of the image itself 1
    for t, noise in zip(reversed(range(len(alpha_bars))), noises, strict=True):
        now, last = float(alpha_bars[t]), float(before[t])
        beta = 1 - now / last
        predicted = model(x, torch.full((len(x),), t))
        image = ((x - (1 - now) ** 0.5 * predicted) / now**0.5).clamp(-1, 1)  # equation 4, solved for the image
        # N(mean, variance) of x_(t-1) if the image were that (equation 7).
        mean = (last**0.5 * beta * image + (1 - beta) ** 0.5 * (1 - last) * x) / (1 - now)
        variance = beta * (1 - last) / (1 - now)  # 0 in the last step
        x = mean + variance**0.5 * noise
    return x


def leaves(tree):
    """The tensors of nested dicts and lists."""
    parts = tree.values() if isinstance(tree, dict) else tree
    return [tree] if isinstance(tree, torch.Tensor) else [leaf for part in parts for leaf in leaves(part)]


def train(params, alpha_bars, images, steps, rng, batch=64, rate=3e-3):
    """Descends the loss at random images, times and noise by Adam, in place; the rate falls to 0 (algorithm 1)."""
    optimizer = torch.optim.Adam(leaves(params), rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        image = images[torch.randint(len(images), (batch,), generator=rng)]  # (batch, 1, s, s)
        time = torch.randint(len(alpha_bars), (batch,), generator=rng)  # (batch,)
        noise = torch.randn(image.shape, generator=rng)
        value = loss(lambda x, time: unet.unet(params, x, time), alpha_bars, image, time, noise).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def frechet(a, b):
    """|μ - μ'|² + tr(S + S' - 2 (S S')^(1/2)) of two samples' means and covariances (Dowson and Landau 1982)."""
    (m, s), (n, t) = ((x.flatten(1).double().mean(0), x.flatten(1).double().T.cov()) for x in (a, b))
    return (m - n).square().sum() + (s + t).trace() - 2 * torch.linalg.eigvals(s @ t).real.clamp(min=0).sqrt().sum()


if __name__ == "__main__":
    from matplotlib.pyplot import imsave
    from sklearn.datasets import load_digits

    rng = torch.Generator().manual_seed(0)
    images = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None]  # (1797, 1, 8, 8)
    params, alpha_bars = unet.init(rng, 16, 32), schedule(100)
    train(params, alpha_bars, images, 600, rng)
    noises = torch.randn(101, 512, 1, 8, 8, generator=rng)
    new = sample(lambda x, time: unet.unet(params, x, time), alpha_bars, noises[0], noises[1:])
    halves = frechet(images[::2], images[1::2])
    print(f"Fréchet distance of the pixels: {frechet(images, new):.2f}; of halves of the digits: {halves:.2f}")
    Path("runs").mkdir(exist_ok=True)
    grid = pad(new[:64, 0].view(8, 8, 8, 8), (1, 1, 1, 1), value=-1.0).transpose(1, 2).reshape(80, 80)
    imsave("runs/ddpm.png", grid.clamp(-1, 1).numpy(), cmap="gray_r")
