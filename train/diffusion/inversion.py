"""DDIM inversion, from images to the noise that `ddim` makes them of, and interpolation between noises."""

import torch
from torch import Tensor

from train.diffusion.process import PREDICTIONS, check_choice, convert
from train.diffusion.schedules import Schedule
from train.diffusion.tables import Model, Sampler, levels_of, predict, table_of, unpack


def ddim_inversion(
    schedule: Schedule, steps: int | None = None, *, predicts: str = "noise", spacing: str = "leading"
) -> Sampler:
    """`ddim` with eta 0 run backwards: from an image to noise that `ddim` with clip=False makes into nearly that image.

    A step to a noisier time calls the model at that time, but on the x before the step. So the noise is only
    approximate; the more steps, the better. Nothing is clipped: clipping cannot be inverted.
    """
    check_choice("predicts", predicts, PREDICTIONS)
    time, alpha_bars = levels_of(schedule, steps, spacing)
    time, alpha_bars = time.flip(0), alpha_bars.flip(0)
    now, after = alpha_bars[:-1], alpha_bars[1:]

    def step(model: Model, row: Tensor, x: Tensor, memory: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        time, alpha, sigma, to_image, to_noise = unpack(row, x)
        # The prediction is read as at its own time; without noise in x, an image could not be turned into noise.
        _, predicted, _ = predict(model, time, x, to_image, to_noise, predicts, False)
        image = convert("noise", "image", predicted, x, alpha, sigma)
        return to_image * image + to_noise * predicted, image

    columns = (time, now.sqrt(), (1 - now).sqrt(), after.sqrt(), (1 - after).sqrt())
    return Sampler(table_of(columns), step, alpha_bars, False)


def slerp(a: Tensor, b: Tensor, fraction: float | Tensor) -> Tensor:
    """Spherical interpolation from a to b (batch, ...), per example; a and b are noise.

    sin((1 - f) w) / sin w a + sin(f w) / sin w b, with w the angle (Shoemake 1985). The straight line, which is its
    limit, where w is nearly 0. The norm stays that of noise; along a straight line it shrinks.

    Args:
        fraction: a number, or (batch,).
    """
    if a.shape != b.shape:
        raise ValueError(f"slerp takes two tensors of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    shape = (-1,) + (1,) * (a.ndim - 1)
    fraction = torch.as_tensor(fraction, dtype=a.dtype, device=a.device).reshape(shape)
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = torch.acos(cosine.clamp(-1, 1)).reshape(shape)
    near = angle.sin().abs() < 1e-4
    sine = torch.where(near, 1, angle.sin())
    of_a = torch.where(near, 1 - fraction, torch.sin((1 - fraction) * angle) / sine)
    of_b = torch.where(near, fraction, torch.sin(fraction * angle) / sine)
    return of_a * a + of_b * b  # (batch, ...)
