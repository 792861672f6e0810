"""Originals: pictures of any sizes to learn super-resolution from, or to test it on, from whatever `--data` names.

The photographs in scikit-learn and the portrait in matplotlib lie in every installation. T91 (Yang et al. 2010, "Image
super-resolution via sparse representation") and Set5 (Bevilacqua et al. 2012) are downloaded once, from a repository
under the MIT licence; the pictures themselves are benchmarks of research without a stated licence.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.data import DataError
from train.data.downloads import Download, fetch_all
from train.data.file_tree import Skipped, files_below, subfolders
from train.data.fingerprint import fingerprint
from train.data.images import resize
from train.data.images.picture import converted, is_picture, opened
from train.files import shown

log = logging.getLogger(__name__)

HIGH = ("hr", "gtmod12", "gt", "high", "original")
"""Names, in any case, of the sub-folder of originals beside one of small pictures, as in EDSR's benchmarks."""

_COMMIT = "d382bc30d41c94ac72f8cb148d61cc4864b3b380"
_ADDRESS = f"https://raw.githubusercontent.com/jiny2001/dcscn-super-resolution/{_COMMIT}/data"
_T91 = [*(f"t{i}" for i in range(1, 67) if i != 41), *(f"tt{i}" for i in range(1, 28) if i != 11)]
DOWNLOADS = {
    "set5": [Download(f"{_ADDRESS}/set5/img_{i:03}.png", None) for i in range(1, 6)],
    "t91": [Download(f"{_ADDRESS}/yang91/{name}.bmp", None) for name in _T91],
}
DIGESTS = {"set5": "a1dbae14f1820dda2f87a2d6084b9341", "t91": "a8a2b9c1915e38642da3313e82f92a13"}
"""`fingerprint` of the files in this order: no checksums are published."""

EMBEDDED = {
    "photographs": (("sklearn", "datasets/images/china.jpg"), ("sklearn", "datasets/images/flower.jpg")),
    "portrait": (("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),),
}


class Originals(NamedTuple):
    """pictures[i] (channels, height, width) uint8, of the file paths[i]; `skipped` lists files that are not used, with
    the reason."""

    pictures: tuple[Tensor, ...]
    paths: tuple[Path, ...]
    skipped: tuple[Skipped, ...] = ()


def facts(name: str, originals: Originals) -> dict[str, Any]:
    """Names and values of pictures, for `train.data.understood`. name: of these pictures, such as "test pictures"."""
    sizes = [x.shape[1] * x.shape[2] for x in originals.pictures]
    folders = list(dict.fromkeys(str(path.parent) for path in originals.paths))
    value = f"{len(sizes)} of {min(sizes):,} to {max(sizes):,} pixels, {sum(sizes) / 1e6:.1f} million in all"
    return {name: f"{value}, in {', '.join(folders)}", f"{name} skipped": originals.skipped}


def open_originals(data: str, channels: int, least: int, directory: Path | None = None) -> Originals:
    """The pictures that `--data` names: all of a folder and those below it, one file, or a set by its name.

    Of a folder with a sub-folder called as in `HIGH`, only that one is read. Transparent parts are white.

    Args:
        channels: 3 for colour, 1 for luminance (`resize.luminance`, rounded).
        least: pixels per side below which a picture is skipped.
        directory: folder of downloads.

    Raises DataError: no such folder or set, no picture that can be used.
    """
    paths, skipped = [], []
    for path in _paths(data, directory):
        try:
            picture = _read(path, channels)
            if min(picture.shape[1:]) < least:
                size = f"{picture.shape[1]} x {picture.shape[2]}"
                raise DataError(f"{path} has {size} pixels; expected at least {least} a side")
        except DataError as error:
            skipped.append((path, str(error).removeprefix(f"{shown(path)} ")))
            log.warning("skipped: %s", error)
        else:
            paths.append((path, picture))
    if not paths:
        path, reason = skipped[0]
        raise DataError(f"none of the {len(skipped)} pictures of '{data}' can be used; {path} {reason}")
    names, pictures = zip(*paths, strict=True)
    return Originals(pictures, names, tuple(skipped))


def _paths(data: str, directory: Path | None) -> tuple[Path, ...]:
    path, name = Path(data), data.lower()
    if data and path.is_dir():
        high = [child for child in subfolders(path) if child.lower() in HIGH]
        paths = files_below(path / high[0] if high else path).paths
        if pictures := tuple(path for path in paths if is_picture(path.name)):
            return pictures
        raise DataError(f"no picture in {data}")
    if data and path.exists():
        if not is_picture(path.name):
            raise DataError(f"'{data}' is a file, but no picture; expected a folder of pictures (unpack an archive)")
        return (path,)
    if name in EMBEDDED:
        return tuple(_embedded(*entry) for entry in EMBEDDED[name])
    if name in DOWNLOADS:
        folder = fetch_all(name, DOWNLOADS[name], directory)
        paths = tuple(folder / download.address.rpartition("/")[2] for download in DOWNLOADS[name])
        if fingerprint(paths) != DIGESTS[name]:
            raise DataError(f"the files in {folder} are not those of {name}; remove them to fetch them again")
        return paths
    known = ", ".join((*EMBEDDED, *DOWNLOADS))
    raise DataError(f"'{data}' does not exist; expected a folder of pictures, or one of {known}")


def _embedded(package: str, file: str) -> Path:
    module = importlib.util.find_spec(package)
    path = Path(module.origin).parent / file if module and module.origin else None
    if path is None or not path.exists():
        raise DataError(f"the embedded pictures are part of {package}, which is not installed with them: {file}")
    return path


def _read(path: Path, channels: int) -> Tensor:
    """(channels, height, width) uint8."""
    with opened(path) as image:
        image = converted(image, 3)
        pixels = torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()]))
    if channels == 3:
        return pixels
    return (resize.luminance(pixels[None] / 255) * 255).round().to(torch.uint8)[0]
