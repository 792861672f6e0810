"""Pictures of GANs: the critic over the plane, tables of generated images, and animations of training."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from train.files import replacing
from train.plots import fonts
from train.plots.figures import COLOURS, INK, array, axes_for, new_figure, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image


def _points(name: str, values: Any) -> np.ndarray:
    coordinates = array(values).astype(float)
    if coordinates.ndim != 2 or coordinates.shape[1] != 2 or not len(coordinates):
        raise ValueError(f"{name} points have shape {coordinates.shape}, expected (count, 2)")
    return coordinates


def _square(points: np.ndarray, reach: float | None) -> tuple[np.ndarray, float]:
    """(middle, half the side) of the square that is drawn.

    It lies around the real points, so that all pictures of a run show the same square.
    """
    low, high = points.min(0), points.max(0)
    return (low + high) / 2, reach or 0.65 * float((high - low).max()) or 1.0


def critic_plane(
    path: "str | os.PathLike | Axes",
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    title: str = "",
    gradient: Callable[[Tensor], Tensor] | None = None,
    reach: float | None = None,
    arrows: int = 80,
    cells: int = 90,
) -> None:
    """The scores of a critic of points as colours, with real and generated points, and arrows along its gradient.

    A generator that ascends the score is pulled along the arrows; the longest is a twelfth of the picture's width, the
    others are in proportion.

    Args:
        critic: (n, 2) -> scores (n,).
        real, fake: (count, 2).
        gradient: (n, 2) -> gradients of the scores (n, 2), drawn at the first generated points; none without.
        reach: half the side of the square that is drawn; from the real points if None.
        arrows: largest number of arrows.
        cells: colours along each side.
    """
    from matplotlib.colors import LinearSegmentedColormap

    true, generated = _points("real", real), _points("fake", fake)
    middle, half = _square(true, reach)
    xs, ys = (torch.linspace(float(c) - half, float(c) + half, cells, dtype=real.dtype) for c in middle)
    plane = torch.cartesian_prod(ys, xs).flip(1).to(real.device)  # (cells * cells, 2)
    with torch.no_grad():
        scores = array(critic(plane)).astype(float).reshape(cells, cells)
    if not np.isfinite(scores).any():
        raise ValueError("no score of the critic is finite")
    figure, axes = axes_for(path, 5.4, 4.6, "", "", title)
    axes.grid(False)
    # Greys that end before black, so that points of any colour and the arrows stand out.
    greys = LinearSegmentedColormap.from_list("greys", ["#FFFFFF", "#7A7A7A"])
    mesh = axes.contourf(xs.numpy(), ys.numpy(), np.ma.masked_invalid(scores), levels=20, cmap=greys)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, color="#888888", labelcolor=INK)
    bar.set_label("critic: higher is more real", color=INK, fontsize=9)
    _scatter(axes, true, generated)
    inside = np.flatnonzero(np.abs(generated - middle).max(1) < half)[:arrows]
    if gradient is not None and len(inside):
        at = fake[torch.from_numpy(inside).to(fake.device)].detach()  # (arrows, 2)
        pull = array(gradient(at)).astype(float)
        longest = np.linalg.norm(pull, axis=1).max()
        if np.isfinite(longest) and longest > 0:
            pull = pull / longest * half / 6
            x, y = generated[inside].T
            axes.quiver(x, y, *pull.T, angles="xy", scale_units="xy", scale=1, width=0.004, color="black", zorder=4)
    _finish(axes, middle, half)
    write(path, figure)


def points(path: "str | os.PathLike | Axes", real: Any, fake: Any, title: str = "", reach: float | None = None) -> None:
    """Real and generated points of the plane, (count, 2) each; points outside of `reach` are not drawn."""
    true, generated = _points("real", real), _points("fake", fake)
    figure, axes = axes_for(path, 4.6, 4.6, "", "", title)
    _scatter(axes, true, generated)
    _finish(axes, *_square(true, reach))
    write(path, figure)


def _scatter(axes: "Axes", true: np.ndarray, generated: np.ndarray) -> None:
    axes.scatter(*true.T, s=7, color=COLOURS[0], alpha=0.6, lw=0, label="real", zorder=2)
    axes.scatter(*generated.T, s=9, color=COLOURS[1], alpha=0.8, lw=0, label="generated", zorder=3)


def _finish(axes: "Axes", middle: np.ndarray, half: float) -> None:
    axes.set(xlim=middle[0] + np.array([-half, half]), ylim=middle[1] + np.array([-half, half]), aspect="equal")
    legend = axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([28])


def image_table(
    path: str | os.PathLike,
    images: Any,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    title: str = "",
    scale: float = 0.8,
) -> None:
    """Images in rows and columns with labels: a class per row, the values of a code, before and after.

    Args:
        images: (rows, columns, channels, height, width) with 1 or 3 channels; bytes, or floats in [0, 1].
        rows, columns: the labels; None for none.
        scale: the width of one image in inches.
    """
    pixels = array(images)
    if pixels.ndim != 5 or pixels.shape[2] not in (1, 3) or not pixels.size:
        raise ValueError(f"images have shape {pixels.shape}, expected (rows, columns, 1 or 3, height, width)")
    for what, labels, length in (("row", rows, len(pixels)), ("column", columns, pixels.shape[1])):
        if labels is not None and len(labels) != length:
            raise ValueError(f"{len(labels)} {what} labels for {length} {what}s")
    down, across, _, height, width = pixels.shape
    sheet = tile(pixels.reshape(-1, *pixels.shape[2:]), across, gap=max(1, width // 24))
    font, letter = 9, 0.6 * 9 / 72  # points, and the width of a letter in inches
    beside = letter * max(map(fonts.width, rows or ("",))) + 0.12
    tallest = max(map(fonts.width, columns or ("",)))
    turned = tallest * letter > scale
    above = (letter * tallest if turned else 0.17) + 0.08 if columns else 0.05
    head = 0.32 if title else 0.0
    table = across * scale, across * scale * sheet.shape[0] / sheet.shape[1]
    size = max(beside + table[0] + 0.06, 0.1 * fonts.width(title) + 0.2), head + above + table[1] + 0.06
    figure = new_figure(*size)
    axes = figure.add_axes((beside / size[0], 0.06 / size[1], table[0] / size[0], table[1] / size[1]))
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    style = {"transform": axes.transAxes, "fontsize": font, "color": INK, "parse_math": False}
    for i, label in enumerate(columns or ()):
        at = ((i + 0.5) / across, 1 + 0.06 / table[1])
        axes.text(*at, label, ha="center", va="bottom", rotation=90 if turned else 0, **style)
    for i, label in enumerate(rows or ()):
        at = (-0.06 / table[0], 1 - (i + 0.5) / down)
        axes.text(*at, label, ha="right", va="center", **style)
    if title:
        figure.text(0.5, 1 - 0.17 / size[1], title, ha="center", va="center", fontsize=11, color=INK)
    write(path, figure)


def tile(images: Any, columns: int, gap: int = 1, zoom: int = 1) -> np.ndarray:
    """Images as one: bytes (height, width, 3), white between and around them, row after row.

    Args:
        images: (count, channels, height, width) with 1 or 3 channels; bytes, or floats in [0, 1] (clipped).
        gap: pixels between two images.
        zoom: each pixel becomes zoom x zoom.
    """
    pixels = array(images)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not len(pixels):
        raise ValueError(f"images have shape {pixels.shape}, expected (count, 1 or 3, height, width)")
    if columns < 1 or zoom < 1 or gap < 0:
        raise ValueError(f"columns {columns} and zoom {zoom} must be at least 1, gap {gap} at least 0")
    if pixels.dtype != np.uint8:
        pixels = np.rint(np.nan_to_num(pixels.astype(float)).clip(0, 1) * 255).astype(np.uint8)
    pixels = pixels.repeat(zoom, 2).repeat(zoom, 3).transpose(0, 2, 3, 1)  # (count, height, width, channels)
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((gap + rows * (height + gap), gap + columns * (width + gap), 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (
            gap + index * (side + gap) for index, side in zip(divmod(i, columns), (height, width), strict=True)
        )
        sheet[top : top + height, left : left + width] = image
    return sheet


def save(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Bytes (height, width, 3), as of `tile`, as a PNG."""
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")


def animation(
    path: str | os.PathLike,
    frames: Sequence[Any],
    seconds: float = 0.2,
    labels: Sequence[str] | None = None,
    hold: float = 2.0,
) -> None:
    """An endless animated GIF.

    Args:
        frames: files of pictures, or bytes (height, width, 3) as of `tile`; all of one size.
        seconds: seconds per frame; the last one stays `hold` seconds.
        labels: one per frame, written under it.
    """
    if not len(frames):
        raise ValueError("an animation needs at least one frame")
    if labels is not None and len(labels) != len(frames):
        raise ValueError(f"{len(labels)} labels for {len(frames)} frames")
    if not seconds > 0 or not hold > 0:
        raise ValueError(f"seconds {seconds} and hold {hold} must be positive")
    pictures = [_picture(frame) for frame in frames]
    for i, picture in enumerate(pictures):
        if picture.size != pictures[0].size:
            raise ValueError(f"frame {i} has width and height {picture.size}, frame 0 has {pictures[0].size}")
    if labels is not None:
        pictures = [_labelled(picture, label) for picture, label in zip(pictures, labels, strict=True)]
    # GIF counts in hundredths of a second; viewers slow down what is faster than 2 of them.
    durations = [max(20, round(1000 * seconds))] * (len(pictures) - 1) + [round(1000 * hold)]
    with replacing(path) as temporary:
        first, *rest = pictures
        first.save(temporary, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def _picture(frame: Any) -> "Image":
    from PIL import Image

    if isinstance(frame, (str, Path)):
        with Image.open(frame) as image:
            return image.convert("RGB")
    pixels = array(frame)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a frame is {pixels.dtype} {pixels.shape}, expected a file or bytes (height, width, 3)")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _labelled(picture: "Image", label: str) -> "Image":
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 12)
    width, height = picture.size
    sheet = Image.new("RGB", (width, height + 20), "white")
    sheet.paste(picture, (0, 0))
    ImageDraw.Draw(sheet).text((width // 2, height + 10), label, fill=INK, font=font, anchor="mm")
    return sheet
