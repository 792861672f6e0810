"""Parts of samplers: the times they visit, a table of coefficients, and a step's prediction."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from train.diffusion.process import check_choice, convert, heads
from train.diffusion.schedules import Schedule

Model = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Model, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
SPACINGS = ("leading", "trailing", "linspace")


class Sampler(NamedTuple):
    """table (steps, columns) float64, one row per step, the model's time first. step: see `train.diffusion.samplers`.

    alpha_bars (steps + 1,) float64: those of x before each step, and after the last. noisy: the steps take noise.
    """

    table: Tensor
    step: Step
    alpha_bars: Tensor
    noisy: bool


def spaced(total: int, steps: int, spacing: str = "leading") -> Tensor:
    """`steps` of the times 0 to total - 1, falling, (steps,) int64 (Lin et al. 2023, arXiv:2305.08891, table 2).

    leading:   0, r, 2 r, ... with r = total // steps: without the noisiest times
    trailing:  total - 1, total - 1 - r, ... with r = total / steps, rounded: without the least noisy
    linspace:  both ends, equally spaced, rounded

    Raises:
        ValueError: another spacing, less than 1 step, or more steps than times.
    """
    check_choice("spacing", spacing, SPACINGS)
    if not 1 <= steps <= total:
        raise ValueError(f"a schedule of {total} steps is sampled in 1 to {total} steps, got {steps}")
    if spacing == "leading":
        return torch.arange(steps - 1, -1, -1) * (total // steps)
    if spacing == "trailing":
        offsets = torch.arange(steps, dtype=torch.float64) * (total / steps)
        return torch.round(total - offsets).to(torch.int64) - 1
    return torch.linspace(0, total - 1, steps, dtype=torch.float64).round().to(torch.int64).flip(0)


def levels_of(
    schedule: Schedule, steps: int | None, spacing: str, without_first: bool = False
) -> tuple[Tensor, Tensor]:
    """(time (steps,) falling, alpha_bars (steps + 1,) of x before each step and after the last: 1)."""
    total = len(schedule.alpha_bars)
    steps = total if steps is None else steps
    if without_first and not 1 <= steps < total:
        raise ValueError(f"spacing {spacing!r} without time 0 takes 1 to {total - 1} of {total} steps, got {steps}")
    time = spaced(total, steps + 1, spacing)[:-1] if without_first else spaced(total, steps, spacing)
    alpha_bars = schedule.alpha_bars.cpu()
    return time, torch.cat([alpha_bars[time], alpha_bars.new_ones(1)])


def table_of(columns: Sequence[Tensor]) -> Tensor:
    """Columns (steps,) as one table (steps, columns), float64."""
    return torch.stack([column.to(torch.float64) for column in columns], 1)


def unpack(row: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The row's entries as 0-D tensors of x's dtype; the first, a time, as (batch,) int64."""
    time, *rest = row.unbind()
    return (time.to(torch.int64).expand(len(x)), *(value.to(x.dtype) for value in rest))


def predict(
    model: Model, time: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, predicts: str, clip: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(image, noise, fraction of the variance or None) predicted at x; the noise follows a clipped image."""
    prediction, fraction = heads(model(x, time), x)
    image = convert(predicts, "image", prediction, x, alpha, sigma)
    if not clip:
        return image, convert(predicts, "noise", prediction, x, alpha, sigma), fraction
    image = image.clamp(-1, 1)
    return image, convert("image", "noise", image, x, alpha, sigma), fraction
