"""Files enlarged by a net: tile by tile, so that only the result itself takes memory, in the range of the file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.parts.upscaler import Upscaler, enlarge, windows, within
from train.data import DataError
from train.data.file_tree import Skipped
from train.data.images import full_range, resize
from train.data.images.full_range import FullRange
from train.data.understood import understood
from train.files import distinct_stems, shown


def upscale(
    model: Upscaler,
    paths: Sequence[Path],
    skipped: Sequence[Skipped],
    folder: Path,
    tile: int,
    ensemble: bool = False,
    white: float | None = None,
) -> None:
    """Write the enlargement of each file into a new folder; one that cannot be read is skipped, named and counted.

    Raises DataError: none can be read.
    """
    (scale,) = model.scales
    facts = {"net": f"{model.name}, x{scale}", "pictures to enlarge": len(paths), "skipped": list(skipped)}
    understood(print, facts)
    missing: list[Skipped] = []
    for path, stem in zip(paths, distinct_stems(paths), strict=True):
        try:
            picture = full_range.read(path, white)
        except DataError as error:
            missing.append((path, str(error).removeprefix(f"{shown(path)} ")))
            print(f"skipped: {error}")
            continue
        large = enlarged(model, picture, scale, tile, ensemble)
        file = folder / f"{stem}{large.suffix}"
        full_range.write(file, large)
        sizes = " to ".join(f"{p.pixels.shape[0]} x {p.pixels.shape[1]}" for p in (picture, large))
        print(f"{shown(file)}  {sizes}{f'; {picture.note}' if picture.note else ''}", flush=True)
    if len(missing) == len(paths):
        raise DataError(f"none of the {len(paths)} pictures can be used; {missing[0][0]} {missing[0][1]}")
    print(f"{len(paths) - len(missing)} pictures enlarged, {len(missing)} skipped; files in {shown(folder)}/")


def enlarged(model: Upscaler, picture: FullRange, scale: int, tile: int, ensemble: bool = False) -> FullRange:
    """The enlargement in the picture's own dtype; alpha is enlarged by bicubic interpolation."""
    height, width, channels = picture.pixels.shape
    out = np.empty((scale * height, scale * width, channels), picture.pixels.dtype)
    small, large = picture.pixels.transpose(2, 0, 1), out.transpose(2, 0, 1)  # (channels, height, width) views
    colours = channels - picture.alpha
    for outer, inner in windows(height, width, tile, model.overlap(scale)):
        x = torch.from_numpy(outer.of(small).astype(np.float32) / picture.white)[None]
        parts = [enlarge(model, x[:, :colours], scale, ensemble)]
        parts += [resize.enlarged(x[:, colours:], scale)] if picture.alpha else []
        part = within(outer, inner).of(torch.cat(parts, 1), scale)
        inner.of(large, scale)[:] = _in_range(part, picture)
    return picture._replace(pixels=out)


def _in_range(x: Tensor, picture: FullRange) -> np.ndarray:
    """(1, channels, height, width) with 1 for white -> (channels, height, width) in the picture's dtype and range."""
    values = x[0].clamp(0, 1).numpy() * picture.white
    whole = picture.pixels.dtype != np.float32
    return (np.rint(values) if whole else values).astype(picture.pixels.dtype)
