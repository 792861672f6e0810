"""Pictures for image-to-image translation: pairs side by side in one file, pairs in two folders, two folders without
pairs.

    pairs = side_by_side("facades", "train", source="right", size=286)
    sources, targets = batch_at(key, step, 16, 256, pairs.sources, pairs.targets)  # one window and flip per pair

    photographs, paintings = unpaired("photographs", "paintings", size=286)
    x, y = batch_at(key_x, step, 4, 256, photographs.images)[0], batch_at(key_y, step, 4, 256, paintings.images)[0]

Loading a little larger than the windows that are cut out later is the jitter of Isola et al. 2017 (arXiv:1611.07004),
section 6.2: 286 and 256 pixels per side.

A file that cannot be used (unreadable, an odd width, without its pair) is skipped, logged and listed. Grey pictures
among coloured ones become coloured, and coloured ones among grey ones grey, as most of them are; this is logged too.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from core import random
from train.data import DataError
from train.data.batching import epoch_batch
from train.data.file_tree import Skipped, is_ignored, subfolders
from train.data.images import augment
from train.data.images.picture import converted, is_picture, opened
from train.files import shown

log = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """sources and targets (count, channels, height, width) uint8; `paths[i]` is the file of source i; `skipped` files
    with the reason, `recoloured` those that changed between grey and colour."""

    sources: Tensor
    targets: Tensor
    paths: tuple[Path, ...]
    skipped: tuple[Skipped, ...] = ()
    recoloured: tuple[Path, ...] = ()


class Images(NamedTuple):
    """images (count, channels, height, width) uint8; the rest as in `Pairs`."""

    images: Tensor
    paths: tuple[Path, ...]
    skipped: tuple[Skipped, ...] = ()
    recoloured: tuple[Path, ...] = ()


def facts(name: str, train: Pairs | Images, test: Pairs | Images | None = None) -> dict[str, Any]:
    """Names and values of pictures, for `train.data.understood`. name: the pictures in the plural, such as "pairs"."""
    pictures = train[0]
    out: dict[str, Any] = {f"{name} to train on": len(pictures)}
    out[f"size of {name}"] = " x ".join(map(str, pictures.shape[1:]))
    parts = [train] if test is None else [train, test]
    out["folders"] = list(dict.fromkeys(str(path.parent) for part in parts for path in part.paths))
    if test is not None:
        out[f"{name} to test on"] = len(test[0])
    out["made grey or coloured"] = list(dict.fromkeys(path for part in parts for path in part.recoloured))
    return out | {"skipped": list(dict.fromkeys(item for part in parts for item in part.skipped))}


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
        source: the half that is the source, left or right.
        size: pixels per side: each half is scaled to cover this square and its middle is cut out. None leaves them as
            they are; then all must have one size.
        channels: 3 for colour, 1 for grey; None for the kind that most files are of.

    Raises DataError: no such folder or split, no picture that can be read and halved, different sizes.
    """
    _check(channels)
    if source not in ("left", "right"):
        raise DataError(f"source is '{source}', expected left or right")
    folder = Path(directory) if split is None else _split(Path(directory), split)

    def halves(path: Path) -> list[Tensor]:
        image = _read(path, channels)
        middle, odd = divmod(image.width, 2)
        if odd:
            raise DataError(f"{path} is {_size(image)}, which has no two halves; expected two pictures side by side")
        boxes = [(0, 0, middle, image.height), (middle, 0, image.width, image.height)]
        return [_pixels(image.crop(box), size) for box in boxes]

    paths, both, skipped = _each(_pictures(folder), halves, str(folder))
    left, right = zip(*both, strict=True)
    (left, recoloured), (right, _) = _stacked(paths, left), _stacked(paths, right)
    images = (left, right) if source == "left" else (right, left)
    return Pairs(*images, paths, skipped, recoloured)


def paired(
    sources: str | os.PathLike, targets: str | os.PathLike, *, size: int | None = None, channels: int | None = None
) -> Pairs:
    """Two folders whose files are paired by name; by the name without its suffix where the suffixes differ.

    Arguments as in `side_by_side`; with channels None the sources may be grey and the targets coloured.

    Raises DataError: as there; not one pair; two files in a folder that differ by their suffix alone.
    """
    _check(channels)
    first, second = _pictures(Path(sources)), _pictures(Path(targets))
    names = [{path.name: path for path in side} for side in (first, second)]
    if names[0].keys() != names[1].keys():
        names = [_by_stem(side) for side in (first, second)]
    skipped = []
    for side, other, folder in ((names[0], names[1], targets), (names[1], names[0], sources)):
        skipped += [(side[name], f"has no pair in {shown(folder)}") for name in side if name not in other]
    common = [name for name in names[0] if name in names[1]]
    if not common:
        raise DataError(f"{first[0]} has no pair in {targets}, nor has any other picture of {sources}")
    _warn(skipped)

    def pair(path: Path) -> list[Tensor]:
        other = partners[path]
        images = _read(path, channels), _read(other, channels)
        if images[0].size != images[1].size:
            sizes = f"{path} is {_size(images[0])}, {other} is {_size(images[1])}"
            raise DataError(f"a pair differs in size: {sizes}")
        return [_pixels(image, size) for image in images]

    partners = {names[0][name]: names[1][name] for name in common}
    paths, both, unreadable = _each(tuple(partners), pair, f"{sources} and {targets}")
    source, target = zip(*both, strict=True)
    (source, grey), (target, coloured) = _stacked(paths, source), _stacked([partners[p] for p in paths], target)
    return Pairs(source, target, paths, (*skipped, *unreadable), grey + coloured)


def unpaired(
    first: str | os.PathLike, second: str | os.PathLike, *, size: int | None = None, channels: int | None = None
) -> tuple[Images, Images]:
    """Two folders of pictures that have nothing to do with one another.

    Arguments and errors as in `side_by_side`; all pictures of both become of one kind, and must agree in size.
    """
    _check(channels)
    sides = [
        _each(_pictures(Path(folder)), lambda path: _pixels(_read(path, channels), size), str(folder))
        for folder in (first, second)
    ]
    (a, pixels_a, skipped_a), (b, pixels_b, skipped_b) = sides
    images, recoloured = _stacked(a + b, pixels_a + pixels_b)
    changed = set(recoloured)
    return (
        Images(images[: len(a)], a, skipped_a, tuple(path for path in a if path in changed)),
        Images(images[len(a) :], b, skipped_b, tuple(path for path in b if path in changed)),
    )


def folder(directory: str | os.PathLike, *, size: int | None = None, channels: int | None = None) -> Images:
    """The pictures of one folder, for translation by a trained net. Arguments and errors as in `side_by_side`."""
    return pictures(_pictures(Path(directory)), size=size, channels=channels)


def pictures(paths: Sequence[Path], *, size: int | None = None, channels: int | None = None) -> Images:
    """The pictures of a list of files (`folders.picture_paths` makes one of a command's arguments).

    Arguments and errors as in `side_by_side`.
    """
    _check(channels)
    paths, pixels, skipped = _each(paths, lambda path: _pixels(_read(path, channels), size), "the list")
    images, recoloured = _stacked(paths, pixels)
    return Images(images, paths, skipped, recoloured)


def picture(path: str | os.PathLike, *, size: int, channels: int) -> Tensor:
    """One picture, (channels, size, size) uint8. Raises DataError if it cannot be read."""
    _check(channels)
    return _pixels(_read(Path(path), channels), size)


def signed(images: Tensor) -> Tensor:
    """Bytes scaled to [-1, 1]."""
    return augment.unit(images) * 2 - 1


def batch_at(key: Tensor, step: int, batch: int, size: int, *images: Tensor, flip: bool = True) -> tuple[Tensor, ...]:
    """The batch of a step, a function of key and step: a random window per example, and half of them mirrored.

    With `order, site = random.sites(key, 2)`, the examples are `epoch_batch(order, step, ...)`, and the keys of their
    windows and flips `random.sites(random.fold_in(site, step), batch)`.

    Args:
        key: (2,).
        size: pixels per side of the window.
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
        raise DataError(f"cannot cut {size} pixels per side out of images of {height}x{width}")
    order, site = random.sites(key, 2)
    indices = epoch_batch(order, step, count, batch).to(images[0].device)
    keys = random.sites(random.fold_in(site, step), batch).to(images[0].device)  # (batch, 2)
    together = torch.cat([x[indices] for x in images], 1)  # (batch, all channels, height, width)
    window_key, flip_key = random.sites(keys, 2).unbind(0)
    together = window(window_key, together, size)  # (batch, all channels, size, size)
    together = augment.flip(flip_key, together) if flip else together
    return tuple(signed(x) for x in together.split([x.shape[1] for x in images], 1))


def window(keys: Tensor, images: Tensor, size: int) -> Tensor:
    """A square of `size` pixels anywhere in each image: (N, channels, height, width) -> (N, channels, size, size).

    keys: (N, 2), one per example.
    """
    positions = torch.tensor([n - size + 1 for n in images.shape[2:]], device=images.device)
    start = random.randint(keys, (2,), 0, positions).long()  # (N, 2)
    rows, columns = (start[..., None] + torch.arange(size, device=images.device)).unbind(1)  # each (N, size)
    example = torch.arange(len(images), device=images.device)[:, None, None]
    channels_last = images.movedim(1, -1)  # (N, height, width, channels)
    return channels_last[example, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)  # (N, channels, size, size)


def _check(channels: int | None) -> None:
    if channels not in (None, 1, 3):
        raise DataError(f"channels is {channels}, expected 1 or 3")


def _split(directory: Path, split: str) -> Path:
    """The sub-folder of this name, in any case."""
    if not directory.is_dir():
        return directory / split  # an error about it names this part
    names = subfolders(directory, "a folder of pictures")
    for name in sorted(names, key=lambda name: name != split):  # the name itself before one in other letters
        if name.lower() == split.lower():
            return directory / name
    raise DataError(f"{directory} has no sub-folder '{split}', expected one of: {', '.join(names) or 'none there'}")


def _pictures(directory: Path) -> tuple[Path, ...]:
    """The picture files of a folder itself, sorted."""
    subfolders(directory, "a folder of pictures")  # an error if it cannot be read
    paths = sorted(p for p in directory.iterdir() if is_picture(p.name) and not is_ignored(p.name) and not p.is_dir())
    if not paths:
        raise DataError(f"no picture in {directory}")
    return tuple(paths)


def _by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Pictures by name without suffix."""
    names: dict[str, Path] = {}
    for path in paths:
        if path.stem in names:
            raise DataError(f"{names[path.stem]} and {path} have one name, expected one picture per name")
        names[path.stem] = path
    return names


def _each(
    paths: Sequence[Path], read: Callable[[Path], Any], where: str
) -> tuple[tuple[Path, ...], list, tuple[Skipped, ...]]:
    """(paths, values, skipped): `read` of each path, without those for which it raises DataError."""
    used, values, skipped = [], [], []
    for path in paths:
        try:
            values.append(read(path))
        except DataError as error:
            skipped.append((path, str(error).removeprefix(f"{shown(path)} ")))
        else:
            used.append(path)
    if not used:
        path, reason = skipped[0]
        raise DataError(f"none of the {len(skipped)} pictures in {where} can be used; {path} {reason}")
    _warn(skipped)
    return tuple(used), values, tuple(skipped)


def _warn(skipped: Sequence[Skipped]) -> None:
    for path, reason in skipped:
        log.warning("skipped: %s %s", shown(path), reason)


def _read(path: Path, channels: int | None) -> Image.Image:
    """In mode L or RGB."""
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


def _stacked(paths: Sequence[Path], pixels: Sequence[Tensor]) -> tuple[Tensor, tuple[Path, ...]]:
    """(one tensor, files that were made grey or coloured), all of the kind that most of the pictures are of.

    Raises DataError for different sizes.
    """
    grey = sum(len(image) == 1 for image in pixels)
    channels = 1 if 2 * grey > len(pixels) else 3
    changed = tuple(path for path, image in zip(paths, pixels, strict=True) if len(image) != channels)
    if changed:
        kind = {1: "grey", 3: "coloured"}[channels]
        log.warning("made %s, as most of the pictures are: %s", kind, ", ".join(shown(path) for path in changed))
    pixels = [_recoloured(image, channels) for image in pixels]
    first = pixels[0].shape
    for path, image in zip(paths, pixels, strict=True):
        if image.shape != first:
            sizes = f"{path} has {image.shape[1]}x{image.shape[2]} pixels, those before it {first[1]}x{first[2]}"
            raise DataError(f"the pictures differ in size: {sizes}; give a size to scale them to")
    return torch.stack(pixels), changed


def _recoloured(image: Tensor, channels: int) -> Tensor:
    """(1 or 3, height, width) uint8 -> (channels, height, width)."""
    if len(image) == channels:
        return image
    if channels == 3:
        return image.expand(3, -1, -1)
    grey = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).convert("L")
    return torch.from_numpy(np.array(grey))[None]  # (1, height, width)


def photographs(tile: int = 96, test_tile: int = 64) -> tuple[Pairs, Pairs]:
    """(train, test): grey sources and coloured targets, tiles of the two photographs in scikit-learn.

    The photographs (a temple, a flower; 427 x 640 pixels) lie in every installation. Test tiles do not overlap and come
    from two upright bands of each (one, where that leaves no room for training tiles), training tiles overlap and come
    from the parts between.

    Args:
        tile, test_tile: pixels per side.

    Raises DataError if the photographs are missing, or too small for the tiles.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError("the embedded photographs are part of scikit-learn, which is not installed")
    paths = [Path(package.origin).parent / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    parts: dict[str, list[Tensor]] = {"train": [], "test": []}
    for path in paths:
        image = _read(path, 3)
        both = torch.cat([_pixels(image.convert("L"), None), _pixels(image, None)])  # (4, height, width)
        for bands in (2, 1):
            between = (image.width - bands * test_tile) // (bands + 1)
            if tile <= between:
                break
        if not 0 < tile <= min(image.height, between) or not 0 < test_tile <= image.height:
            raise DataError(f"cannot cut tiles of {tile} and {test_tile} pixels out of {path}, {_size(image)}")
        for i in range(bands + 1):
            start = i * (between + test_tile)
            end = start + between
            parts["train"].append(_tiles(both[..., start:end], tile, max(1, tile // 3)))
            if i < bands:
                parts["test"].append(_tiles(both[..., end : end + test_tile], test_tile, test_tile))
    train, test = (torch.cat(tiles) for tiles in parts.values())
    return tuple(Pairs(x[:, :1].contiguous(), x[:, 1:].contiguous(), tuple(paths)) for x in (train, test))


def _tiles(image: Tensor, side: int, stride: int) -> Tensor:
    """(channels, height, width) -> (count, channels, side, side)."""
    tiles = image.unfold(1, side, stride).unfold(2, side, stride)  # (channels, rows, columns, side, side)
    return tiles.flatten(1, 2).movedim(1, 0)  # (rows * columns, channels, side, side)
