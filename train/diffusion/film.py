"""Pictures of sampling: images as they lose their noise."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.diffusion.tables import Sampler
from train.plots import gan


def unit(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return ((images.float() + 1) / 2).clamp(0, 1)


class Film:
    """Callback of `train.diffusion.samplers.sample` that keeps the first `shown` images of the first batch after each
    step."""

    def __init__(self, sampler: Sampler, shown: int = 64):
        self.times, self.shown = sampler.table[:, 0].long().tolist(), shown
        self.noisy: list[Tensor] = []
        self.predicted: list[Tensor] = []

    def __call__(self, i: int, x: Tensor, image: Tensor) -> None:
        if len(self.noisy) < len(self.times):
            self.noisy.append(unit(x[: self.shown].cpu()))
            self.predicted.append(unit(image[: self.shown].cpu()))

    def moments(self, most: int) -> list[int]:
        """The numbers of up to `most` steps, at equal distances."""
        count = len(self.times)
        return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()

    def draw(self, folder: Path, rows: int = 8, columns: int = 10) -> None:
        """`film.png`, images as they lose their noise; `film_predicted.png`, the image that the model predicts at that
        time; `sampling.gif`."""
        moments = self.moments(columns)
        labels = [f"t = {self.times[i]}" for i in moments]
        for name, frames, title in (
            ("film", self.noisy, "x after the step at time t"),
            ("film_predicted", self.predicted, "Image predicted at time t"),
        ):
            table = torch.stack([frames[i][:rows] for i in moments], 1)  # (rows, columns, channels, height, width)
            gan.image_table(folder / f"{name}.png", table, None, labels, title)
        moments, zoom = self.moments(60), max(1, 48 // self.noisy[0].shape[-1])
        pictures = [gan.tile(self.noisy[i], 8, zoom=zoom) for i in moments]
        gan.animation(folder / "sampling.gif", pictures, 0.08, [f"t = {self.times[i]}" for i in moments])
