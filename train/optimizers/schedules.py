"""Schedules: functions that return `schedule(count) -> value`, the value to use after `count` finished steps.

`count` is a 0-D integer tensor and the value a 0-D float32 tensor on its device, so a schedule inside a compiled step
never recompiles it, and works under vmap. `steps` are counts of optimizer steps.

A warm-up over w steps gives step t = count + 1 the part t / w of the peak, so that no step is lost: the first step uses
peak / w, the last one of the warm-up the peak. optax and transformers give it count / w, and so nothing to the first
step: their value after `count` steps is ours after `count - 1`. With `start`, the rise begins there in the same way.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from train.optimizers.protocol import Schedule


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def _fraction(count: Tensor, steps: float) -> Tensor:
    """Fraction of `steps` that is over, in [0, 1]; 1 if there are none."""
    if steps == 0:
        return torch.ones_like(count, dtype=torch.float32)
    return (count.to(torch.float32) / steps).clamp(0.0, 1.0)


def constant(value: float) -> Schedule:
    """`value` at every step."""
    return lambda count: torch.full_like(count, value, dtype=torch.float32)


def linear(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` over `steps`, then `end`."""
    _not_negative(steps=steps)
    return lambda count: start + (end - start) * _fraction(count, steps)


def cosine(peak: float, steps: int, final: float = 0.0) -> Schedule:
    """Half a cosine from `peak` to `final * peak` over `steps`.

    SGDR without restarts (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5).
    """
    _not_negative(steps=steps)

    def schedule(count: Tensor) -> Tensor:
        wave = 0.5 * (1.0 + torch.cos(math.pi * _fraction(count, steps)))  # (1 + cos(π count / steps)) / 2
        return peak * (final + (1.0 - final) * wave)

    return schedule


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after the other: number i + 1 takes over at `boundaries[i]` and counts from there.

    Raises:
        ValueError: unless there is one boundary fewer than schedules and they increase.
    """
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(f"{len(schedules)} schedules need {len(schedules) - 1} boundaries, got {len(boundaries)}")
    if any(b < a for a, b in zip([0, *boundaries], boundaries, strict=False)):
        raise ValueError(f"boundaries must increase from 0, got {list(boundaries)}")

    def schedule(count: Tensor) -> Tensor:
        value = schedules[0](count)
        for later, boundary in zip(schedules[1:], boundaries, strict=True):
            value = torch.where(count < boundary, value, later(count - boundary))
        return value

    return schedule


def warmup(schedule: Schedule, steps: int, start: float = 0.0, peak: float | None = None) -> Schedule:
    """Linear warm-up from `start` to `peak` over `steps`, then `schedule` from its beginning.

    start + (peak - start) (count + 1) / steps

    Args:
        peak: the first value of `schedule` if None.
    """
    _not_negative(steps=steps)

    def rise(count: Tensor) -> Tensor:
        top = schedule(torch.zeros_like(count)) if peak is None else peak
        return start + (top - start) * _fraction(count + 1, steps)

    return join([rise, schedule], [steps])


def warmup_cosine(peak: float, warmup_steps: int, steps: int, final: float = 0.0, start: float = 0.0) -> Schedule:
    """Linear warm-up to `peak` over `warmup_steps`, then half a cosine to `final * peak` at `steps` (in all)."""
    _not_negative(warmup_steps=warmup_steps)
    if steps < warmup_steps:
        raise ValueError(f"steps counts the warm-up too: it must be at least {warmup_steps}, got {steps}")
    return warmup(cosine(peak, steps - warmup_steps, final), warmup_steps, start, peak)


def noam(width: int, warmup_steps: int, factor: float = 1.0) -> Schedule:
    """factor * width^-0.5 * min(step^-0.5, step * warmup_steps^-1.5), step = count + 1.

    Vaswani et al. 2017, "Attention is all you need" (arXiv:1706.03762), eq. 3.
    """
    _positive(width=width, warmup_steps=warmup_steps)

    def schedule(count: Tensor) -> Tensor:
        step = count.to(torch.float32) + 1.0
        return factor * width**-0.5 * torch.minimum(step.rsqrt(), step * warmup_steps**-1.5)

    return schedule


def step_decay(value: float, every: int, factor: float = 0.1) -> Schedule:
    """`value`, times `factor` after every `every` steps: value * factor^floor(count / every)."""
    _positive(every=every, factor=factor)
    return lambda count: value * torch.pow(factor, (count // every).to(torch.float32))


def milestones(value: float, at: Sequence[int], factor: float = 0.1) -> Schedule:
    """`value`, times `factor` at each of the counts `at`."""
    _positive(factor=factor)
    _not_negative(**{"a milestone": min(at, default=0)})

    def schedule(count: Tensor) -> Tensor:
        passed = sum(((count >= step).to(torch.float32) for step in at), torch.zeros_like(count, dtype=torch.float32))
        return value * torch.pow(factor, passed)

    return schedule


def exponential(value: float, factor: float, steps: int = 1) -> Schedule:
    """value * factor^(count / steps)."""
    _positive(factor=factor, steps=steps)
    return lambda count: value * torch.pow(factor, count.to(torch.float32) / steps)


def one_cycle(
    peak: float, steps: int, rise: float = 0.3, start_divisor: float = 25.0, final_divisor: float = 1e4
) -> Schedule:
    """One-cycle policy (Smith & Topin 2018, arXiv:1708.07120) in two half cosines, as torch's OneCycleLR.

    From `peak / start_divisor` up to `peak` in the fraction `rise` of `steps`, then down to the start value divided by
    `final_divisor`, which the last step, count = steps - 1, uses.
    """
    _positive(steps=steps, start_divisor=start_divisor, final_divisor=final_divisor)
    if not 0.0 <= rise <= 1.0:
        raise ValueError(f"rise must be in [0, 1], got {rise}")
    start, top, end = peak / start_divisor, rise * steps - 1.0, steps - 1.0

    def schedule(count: Tensor) -> Tensor:
        step = count.to(torch.float32)
        up = (step / top).clamp(0.0, 1.0) if top > 0 else torch.ones_like(step)
        down = ((step - top) / (end - top)).clamp(0.0, 1.0) if end > top else torch.zeros_like(step)
        rising = peak + (start - peak) * 0.5 * (1.0 + torch.cos(math.pi * up))
        final = start / final_divisor
        falling = final + (peak - final) * 0.5 * (1.0 + torch.cos(math.pi * down))
        return torch.where(step <= top, rising, falling)

    return schedule


def warmup_stable_decay(
    peak: float,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    final: float = 0.0,
    decay: str = "linear",
) -> Schedule:
    """Linear warm-up to `peak`, a plateau, and a decay to `final * peak` (Hu et al. 2024, MiniCPM, arXiv:2404.06395).

    Args:
        decay: the shape of the decay over a fraction t: "linear", "cosine", or "sqrt", 1 - sqrt(t), the best of those
            of Hägele et al. 2024 (arXiv:2405.18392).
    """
    _not_negative(warmup_steps=warmup_steps, stable_steps=stable_steps, decay_steps=decay_steps)

    def root(count: Tensor) -> Tensor:
        return peak * (final + (1.0 - final) * (1.0 - _fraction(count, decay_steps).sqrt()))

    shapes = {
        "linear": linear(peak, final * peak, decay_steps),
        "cosine": cosine(peak, decay_steps, final),
        "sqrt": root,
    }
    if decay not in shapes:
        raise ValueError(f"decay must be one of {', '.join(shapes)}, got {decay!r}")
    return warmup(join([constant(peak), shapes[decay]], [stable_steps]), warmup_steps, peak=peak)
