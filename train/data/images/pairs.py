"""Pictures for translation: pairs side by side in one file, pairs in two folders, and two folders without pairs.

    pairs = side_by_side("facades", "train", source="right", size=286)
    sources, targets = drawn(key, step, 16, 256, pairs.sources, pairs.targets)  # one window and flip a pair

    photographs, paintings = unpaired("photographs", "paintings", size=286)
    x, y = drawn(key_x, step, 4, 256, photographs.images)[0], drawn(key_y, step, 4, 256, paintings.images)[0]

Loading a little larger than what is cut out later is the jitter of Isola et al. 2017 (arXiv:1611.07004), section 6.2:
286 and 256 pixels a side.
"""

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from core import random
from train.data import DataError
from train.data.batching import epoch_batch
from train.data.images import augment
from train.data.images.picture import converted, is_picture, opened


class Pairs(NamedTuple):
    """sources and targets (count, channels, height, width) uint8; `paths[i]` is the file of source i."""

    sources: Tensor
    targets: Tensor
    paths: tuple[Path, ...]


class Images(NamedTuple):
    """images (count, channels, height, width) uint8; `paths[i]` is the file of image i."""

    images: Tensor
    paths: tuple[Path, ...]


def side_by_side(
    directory: str | os.PathLike,
    split: str | None = None,
    *,
    source: str = "left",
    size: int | None = None,
    channels: int | None = None,
) -> Pairs:
    """The layout of pix2pix: every file has two pictures of one size side by side.

    Args:
        split: the sub-folder to read, such as "train", "val" or "test"; None reads the folder itself.
        source: which half is the source, left or right.
        size: pixels a side: each half is scaled to cover this square and its middle is cut out. None leaves them as
            they are; then all must have one size.
        channels: 3 for colour, 1 for grey; None is what the files have, which must then be the same in all.

    Raises DataError: no such folder or split, no picture, one that cannot be read or halved, different sizes, grey
    pictures among coloured ones.
    """
    if source not in ("left", "right"):
        raise DataError(f"source is '{source}', expected left or right")
    folder = Path(directory) if split is None else _split(Path(directory), split)
    paths, halves = _pictures(folder), []
    for path in paths:
        image = _read(path, channels)
        middle, odd = divmod(image.width, 2)
        if odd:
            raise DataError(f"{path} is {_size(image)}, which has no two halves; expected two pictures side by side")
        boxes = [(0, 0, middle, image.height), (middle, 0, image.width, image.height)]
        halves.append([_pixels(image.crop(box), size) for box in boxes])
    left, right = (_stacked(paths, side) for side in zip(*halves, strict=True))
    return Pairs(left, right, paths) if source == "left" else Pairs(right, left, paths)


def paired(
    sources: str | os.PathLike, targets: str | os.PathLike, *, size: int | None = None, channels: int | None = None
) -> Pairs:
    """Two folders whose files are paired by name, whatever their suffix.

    Arguments as in `side_by_side`; with channels None the sources may be grey and the targets coloured.

    Raises DataError: as there; a file without its pair, two files of one name in a folder, a pair that differs in size.
    """
    sides = [_named(Path(sources)), _named(Path(targets))]
    for side, other, folder in ((sides[0], sides[1], targets), (sides[1], sides[0], sources)):
        lone = [name for name in side if name not in other]
        if lone:
            more = f" (and {len(lone) - 1} more)" if len(lone) > 1 else ""
            raise DataError(f"{side[lone[0]]} has no pair: {folder} has no picture '{lone[0]}'{more}")
    read = ([], [])
    for name, path in sides[0].items():
        images = _read(path, channels), _read(sides[1][name], channels)
        if images[0].size != images[1].size:
            found = f"{path} is {_size(images[0])}, {sides[1][name]} is {_size(images[1])}"
            raise DataError(f"a pair differs in size: {found}")
        for side, image in zip(read, images, strict=True):
            side.append(_pixels(image, size))
    both = [_stacked(side.values(), pixels) for side, pixels in zip(sides, read, strict=True)]
    return Pairs(*both, tuple(sides[0].values()))


def unpaired(
    first: str | os.PathLike, second: str | os.PathLike, *, size: int | None = None, channels: int | None = None
) -> tuple[Images, Images]:
    """Two folders of pictures that have nothing to do with one another.

    Arguments and errors as in `side_by_side`; all pictures of both must agree in size and channels.
    """
    sides = [_pictures(Path(folder)) for folder in (first, second)]
    paths = sides[0] + sides[1]
    images = _stacked(paths, [_pixels(_read(path, channels), size) for path in paths])
    return tuple(map(Images, images.split([len(side) for side in sides]), sides))


def folder(directory: str | os.PathLike, *, size: int | None = None, channels: int | None = None) -> Images:
    """The pictures of one folder, for translation by a trained net. Arguments and errors as in `side_by_side`."""
    paths = _pictures(Path(directory))
    return Images(_stacked(paths, [_pixels(_read(path, channels), size) for path in paths]), paths)


def picture(path: str | os.PathLike, *, size: int, channels: int) -> Tensor:
    """One picture, (channels, size, size) uint8. Raises DataError if it cannot be read."""
    return _pixels(_read(Path(path), channels), size)


def signed(images: Tensor) -> Tensor:
    """Bytes as numbers in [-1, 1]."""
    return augment.unit(images) * 2 - 1


def drawn(key: Tensor, step: int, batch: int, size: int, *images: Tensor, flip: bool = True) -> tuple[Tensor, ...]:
    """The batch of a step, a function of key and step: a window of each example, and half of them mirrored.

    With `order, site = random.sites(key, 2)`, the examples are `epoch_batch(order, step, ...)`, and what happens to
    them is drawn from `random.sites(random.fold_in(site, step), batch)`.

    Args:
        key: (2,).
        size: pixels a side of the window.
        images: (count, channels, height, width) uint8; of several, the examples are the same, and so are the windows.

    Returns:
        (batch, channels, size, size) in [-1, 1] each.

    Raises DataError: fewer examples than the batch, a window larger than the images, or pairs that do not match.
    """
    count, _, height, width = images[0].shape
    for other in images[1:]:
        if (len(other), *other.shape[2:]) != (count, height, width):
            raise DataError(f"{tuple(images[0].shape)} and {tuple(other.shape)} are no pairs of images")
    if not 0 < size <= min(height, width):
        raise DataError(f"cannot cut {size} pixels a side out of images of {height}x{width}")
    order, site = random.sites(key, 2)
    indices = epoch_batch(order, step, count, batch).to(images[0].device)
    keys = random.sites(random.fold_in(site, step), batch).to(images[0].device)
    together = torch.cat([x[indices] for x in images], 1)
    place_key, flip_key = random.sites(keys, 2).unbind(0)
    together = window(place_key, together, size)
    together = augment.flip(flip_key, together) if flip else together
    return tuple(signed(x) for x in together.split([x.shape[1] for x in images], 1))


def window(keys: Tensor, images: Tensor, size: int) -> Tensor:
    """A square of `size` pixels anywhere in each image: (N, channels, height, width) -> (N, channels, size, size).

    keys: (N, 2), one an example.
    """
    places = torch.tensor([n - size + 1 for n in images.shape[2:]], device=images.device)
    start = random.randint(keys, (2,), 0, places).long()
    rows, columns = (start + torch.arange(size, device=images.device)[:, None, None]).movedim(0, -1).unbind(1)
    example = torch.arange(len(images), device=images.device)[:, None, None]
    # The channels' axis goes behind for the lookup, and back.
    return images.movedim(1, -1)[example, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _split(directory: Path, split: str) -> Path:
    if directory.is_dir() and not (directory / split).is_dir():
        found = sorted(p.name for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
        raise DataError(f"{directory} has no sub-folder '{split}', expected one of: {', '.join(found) or 'none there'}")
    return directory / split


def _pictures(directory: Path) -> tuple[Path, ...]:
    """The picture files of a folder itself, sorted."""
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        raise DataError(f"{directory} {problem}, expected a folder of pictures")
    try:
        paths = tuple(sorted(p for p in directory.iterdir() if is_picture(p.name) and not p.is_dir()))
    except OSError as error:
        raise DataError(f"cannot read {directory}: {error.strerror}") from None
    if not paths:
        raise DataError(f"no picture in {directory}")
    return paths


def _named(directory: Path) -> dict[str, Path]:
    """The pictures of a folder by name without suffix."""
    named = {}
    for path in _pictures(directory):
        if path.stem in named:
            raise DataError(f"{named[path.stem]} and {path} have one name, expected one picture a name")
        named[path.stem] = path
    return named


def _read(path: Path, channels: int | None) -> Image.Image:
    """In mode L or RGB."""
    if channels not in (None, 1, 3):
        raise DataError(f"channels is {channels}, expected 1 or 3")
    with opened(path) as image:
        grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
        return converted(image, channels or (1 if grey else 3)).copy()


def _pixels(image: Image.Image, size: int | None) -> Tensor:
    """(channels, height, width) uint8."""
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()]))


def _size(image: Image.Image) -> str:
    return f"{image.height}x{image.width}"


def _stacked(paths: Iterable[Path], pixels: Iterable[Tensor]) -> Tensor:
    """One tensor, once all are known to be of one shape."""
    pixels = list(pixels)
    first = pixels[0].shape
    for path, image in zip(paths, pixels, strict=True):
        if len(image) != first[0]:
            kinds = {1: "grey", 3: "in colour"}
            found = f"{path} is {kinds[len(image)]}, those before it are {kinds[first[0]]}"
            raise DataError(f"grey against colour: {found}; give channels, 1 or 3, to convert them")
        if image.shape != first:
            sizes = f"{path} has {image.shape[1]}x{image.shape[2]} pixels, those before it {first[1]}x{first[2]}"
            raise DataError(f"the pictures differ in size: {sizes}; give a size to scale them to")
    return torch.stack(pixels)


def photographs(tile: int = 96, test_tile: int = 64) -> tuple[Pairs, Pairs]:
    """(train, test): grey sources and coloured targets, tiles of the two photographs in scikit-learn.

    The photographs (a temple, a flower; 427 x 640 pixels) lie in every installation. Tiles to learn from overlap and
    come from the left three quarters; those for testing do not overlap and come from the rest.

    Raises DataError if the photographs are missing.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError("the embedded photographs are part of scikit-learn, which is not installed")
    paths = [Path(found.origin).parent / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    parts: dict[str, list[Tensor]] = {"train": [], "test": []}
    for path in paths:
        image = _read(path, 3)
        cut = image.width * 3 // 4
        colour, grey = _pixels(image, None), _pixels(image.convert("L"), None)
        both = torch.cat([grey, colour])
        for part, columns, side, stride in (
            ("train", both[..., :cut], tile, tile // 3),
            ("test", both[..., cut:], test_tile, test_tile),
        ):
            tiles = columns.unfold(1, side, stride).unfold(2, side, stride)  # (4, rows, columns, side, side)
            parts[part].append(tiles.flatten(1, 2).movedim(1, 0))
    train, test = (torch.cat(tiles) for tiles in parts.values())
    return tuple(Pairs(x[:, :1].contiguous(), x[:, 1:].contiguous(), tuple(paths)) for x in (train, test))
