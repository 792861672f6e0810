"""Inpainting: fill the unknown part of an image, with a model trained on whole images (Lugmayr et al. 2022)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from core import random
from train.diffusion.process import draw_noise
from train.diffusion.tables import Model, Sampler, Step


def inpaint(
    sampler: Sampler,
    model: Model | None,
    x: Tensor,
    image: Tensor,
    mask: Tensor,
    key: Tensor,
    *,
    repeats: int = 1,
    step: Step | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Run all steps from x, with the known part replaced by its own noised version after each.

    That is RePaint (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1, jumps of one step): the unknown part only
    learns of the known part in the next step, so a step may be repeated from its own result, noised again.

    Args:
        x: (batch, channels, ...) standard normal.
        image: of the shape of x, in [-1, 1]; where known, it is part of the result.
        mask: 1 or True where the image is known. (height, width), or with channel and batch axes, of full size or 1.
        key: one (2,), or one per example (batch, 2).
        repeats: runs of each step but the last; 1 is replacement alone, the paper repeats 10 times.
        step, callback: as for `train.diffusion.samplers.sample`.

    Raises:
        ValueError: an image or mask of another size, or less than 1 repeat.
    """
    if image.shape != x.shape:
        raise ValueError(f"the image has shape {tuple(image.shape)}, expected that of x, {tuple(x.shape)}")
    mask = _fit(mask, x)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    step = sampler.step if step is None else step
    table, memory, noise = sampler.table.to(x.device), torch.zeros_like(x), None
    steps = len(table)
    for i in range(steps):
        now, after = sampler.alpha_bars[i : i + 2].tolist()
        before, times = memory, repeats if i < steps - 1 else 1
        for j in range(times):
            for_step, for_known, for_repeat = random.sites(random.fold_in(random.fold_in(key, i), j), 3)
            if sampler.noisy:
                noise = draw_noise(for_step, x)
            x, memory = step(model, table[i], x, before, noise)
            # sqrt(alpha_bar) image + sqrt(1 - alpha_bar) noise
            known = after**0.5 * image + (1 - after) ** 0.5 * draw_noise(for_known, x)
            x = torch.where(mask, known, x)
            if j < times - 1:  # back to the noise before the step
                x = (now / after) ** 0.5 * x + (1 - now / after) ** 0.5 * draw_noise(for_repeat, x)
        if callback is not None:
            callback(i, x, memory)
    return x


def _fit(mask: Tensor, x: Tensor) -> Tensor:
    space = x.ndim - 2
    leading = mask.shape[: max(mask.ndim - space, 0)]
    fits = mask.ndim <= x.ndim and mask.shape[len(leading) :] == x.shape[2:]
    if not fits or any(m not in (1, n) for m, n in zip(leading[::-1], x.shape[:2][::-1], strict=False)):
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, expected one that fits images {tuple(x.shape)}")
    return mask.to(torch.bool)


def mask_of(mask: str, height: int, width: int) -> Tensor:
    """(height, width), True where an image is known: "half" leaves the right half free, "box" the middle, a picture
    what is dark in it.

    Raises ValueError or OSError: a picture of another size, or none.
    """
    from PIL import Image

    known = torch.ones(height, width, dtype=torch.bool)
    if mask == "half":
        known[:, width // 2 :] = False
        return known
    if mask == "box":
        known[height // 4 : -(height // 4), width // 4 : -(width // 4)] = False
        return known
    with Image.open(mask) as picture:
        pixels = np.asarray(picture.convert("L"))
    if pixels.shape != (height, width):
        size = f"{pixels.shape[0]} x {pixels.shape[1]}"
        raise ValueError(f"the mask '{mask}' has {size} pixels; expected those of the images, {height} x {width}")
    return torch.from_numpy(pixels >= 128)
