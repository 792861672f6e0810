"""Folders of pictures with masks: which mask belongs to which picture, and the parts to train and to test on.

Layouts, of a folder or of its parts `train` and `test` (or `val`):

- FOLDER/images and FOLDER/masks (any of the names `IMAGES` and `MASKS`), files of one name; a mask may have an ending
  such as "_mask". `train` and `test` may also lie in each of the two. A folder "instances" has maps of objects.
- FOLDER/train and FOLDER/trainannot, as SegNet's CamVid.
- FOLDER/NAME/images and FOLDER/NAME/masks, a picture and a mask for each object, as the Data Science Bowl of 2018.
- FOLDER with x.png and x_mask.png.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from train.data import DataError
from train.data.file_tree import Skipped, files_below, subfolders
from train.data.images.folders import TEST, TRAIN
from train.data.images.picture import is_picture
from train.files import shown

IMAGES = ("images", "image", "imgs", "img", "pictures", "photos", "jpegimages", "inputs", "input")
OBJECTS = ("instances", "instance", "objects")
MASKS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "annot", "segmentationclass", "targets"),
    *("ground_truth", "groundtruth", "gt", *OBJECTS),
)
"""Names of folders, in any case."""
TESTING = tuple(sorted(TEST, key=lambda name: not name.startswith("test")))
"""Names of the part to test on: test rather than val, if there are both."""
MASK_ENDINGS = r"[_-](masks?|labels?|labelids|gt|seg|segmentation|annotation|instances?|l)$"
IMAGE_ENDINGS = r"[_-](images?|img|sat|leftimg8bit)$"
TABLES = ("classes.txt", "classes.csv", "class_dict.csv", "label_colors.txt")
"""Names of a file of classes."""
EXPECTED = "expected folders images and masks with files of one name, or train and test with them"


class Pairs(NamedTuple):
    """Pictures with their masks, one each, or one per object; `skipped` files with the reason; `objects`: the masks are
    maps of objects, or masks of one."""

    images: tuple[Path, ...]
    masks: tuple[tuple[Path, ...], ...]
    skipped: tuple[Skipped, ...] = ()
    objects: bool = False


class Layout(NamedTuple):
    """The pairs to train on and to test on, None if there is no such part; the file of classes, if there is one; and
    whether it is SegNet's CamVid by its names."""

    train: Pairs
    test: Pairs | None
    table: Path | None
    camvid: bool = False


def layout(data: str) -> Layout:
    """The pairs of a folder, or of "IMAGES,MASKS".

    Raises DataError: no such folder, no pair in it, or two files that could be one picture's mask.
    """
    if "," in data and not Path(data).exists():
        images, masks = map(Path, data.split(",", 1))
        return Layout(_paired(images, masks), None, _table(masks, images))
    root = Path(data)
    names = subfolders(root, EXPECTED)
    parts = {name.lower(): name for name in names}
    annotated = [part for part in (*TRAIN, *TESTING) if part in parts and f"{part}annot" in parts]
    if annotated:
        pairs = {part: _paired(root / parts[part], root / parts[f"{part}annot"]) for part in annotated}
        return _split(pairs, _table(root), "trainannot" in parts)
    images, masks = _of(parts, IMAGES), _of(parts, MASKS)
    if images and masks:
        inner = {name.lower(): name for name in subfolders(root / images)}
        both = [part for part in (*TRAIN, *TESTING) if part in inner and (root / masks / inner[part]).is_dir()]
        if both:
            pairs = {part: _paired(root / images / inner[part], root / masks / inner[part]) for part in both}
            return _split(pairs, _table(root, root / masks), False)
        return Layout(_paired(root / images, root / masks), None, _table(root, root / masks))
    train = next((part for part in TRAIN if part in parts), None)
    if train is not None:
        both = [train, *(part for part in TESTING if part in parts)][:2]
        layouts = {part: layout(str(root / parts[part])) for part in both}
        table = next((one.table for one in layouts.values() if one.table), None)
        return _split({part: one.train for part, one in layouts.items()}, _table(root) or table, False)
    return Layout(_one_folder(root, names), None, _table(root))


def _split(pairs: dict[str, Pairs], table: Path | None, camvid: bool) -> Layout:
    """The first part to train on; without any, what there is."""
    trains, tests = ([part for part in names if part in pairs] for names in (TRAIN, TESTING))
    first, *others = [*trains, *tests]
    return Layout(pairs[first], pairs[others[0]] if trains and others else None, table, camvid)


def _of(parts: dict[str, str], known: Sequence[str]) -> str | None:
    return next((parts[name] for name in known if name in parts), None)


def _table(*folders: Path) -> Path | None:
    return next((folder / name for folder in folders for name in TABLES if (folder / name).is_file()), None)


def _pictures(folder: Path) -> tuple[list[Path], tuple[Skipped, ...]]:
    below = files_below(folder)
    return [path for path in below.paths if is_picture(path.name)], below.skipped


def _paired(images: Path, masks: Path) -> Pairs:
    """Two folders, files of one name: in folders of one name in them, or anywhere; with endings or without."""
    pictures, skipped = _pictures(images)
    files, others = _pictures(masks)
    for paths, folder in ((pictures, images), (files, masks)):
        if not paths:
            raise DataError(f"no picture in {folder}; {EXPECTED}")

    def whole(path: Path, root: Path, ending: str) -> str:
        return path.relative_to(root).with_suffix("").as_posix()

    def bare(path: Path, root: Path, ending: str) -> str:
        return re.sub(ending, "", whole(path, root, ending), flags=re.IGNORECASE)

    def name(path: Path, root: Path, ending: str) -> str:
        return bare(path, root, ending).rpartition("/")[2]

    def common(key: Callable) -> int:
        return len({key(p, images, IMAGE_ENDINGS) for p in pictures} & {key(p, masks, MASK_ENDINGS) for p in files})

    key = max((whole, bare, name), key=common)  # the first of the best
    sides = [
        _by_name(paths, lambda path, root=root, ending=ending: key(path, root, ending))
        for paths, root, ending in ((pictures, images, IMAGE_ENDINGS), (files, masks, MASK_ENDINGS))
    ]
    alone = [(path, f"has no mask in {shown(masks)}") for name, path in sides[0].items() if name not in sides[1]]
    alone += [(path, f"has no picture in {shown(images)}") for name, path in sides[1].items() if name not in sides[0]]
    both = [name for name in sides[0] if name in sides[1]]
    if not both:
        raise DataError(f"{pictures[0]} has no mask of its name in {masks}, nor has any other picture of {images}")
    pairs = [sides[0][name] for name in both], [(sides[1][name],) for name in both]
    objects = masks.name.lower() in OBJECTS or masks.parent.name.lower() in OBJECTS
    return Pairs(*map(tuple, pairs), (*skipped, *others, *alone), objects)


def _by_name(paths: Sequence[Path], key: Callable[[Path], str]) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for path in paths:
        if (other := names.setdefault(key(path), path)) is not path:
            raise DataError(f"{other} and {path} have one name, expected one file per name")
    return names


def _one_folder(root: Path, names: Sequence[str]) -> Pairs:
    """Pictures with their masks beside them, or a sub-folder per picture with a mask per object."""
    inner = {name: {part.lower(): part for part in subfolders(root / name)} for name in names}
    if names and any(_of(parts, IMAGES) and _of(parts, MASKS) for parts in inner.values()):
        images, masks, skipped = [], [], []
        for name, parts in inner.items():
            pictures, objects = (
                _pictures(root / name / own)[0] if (own := _of(parts, known)) else [] for known in (IMAGES, MASKS)
            )
            if len(pictures) == 1 and objects:
                images.append(pictures[0])
                masks.append(tuple(objects))
            else:
                skipped.append((root / name, f"has {len(pictures)} pictures and {len(objects)} masks of objects"))
        if images:
            return Pairs(tuple(images), tuple(masks), tuple(skipped), True)
    pictures, skipped = _pictures(root)
    files = [path for path in pictures if re.search(MASK_ENDINGS, path.stem, re.IGNORECASE)]
    if not files:
        raise DataError(f"no pictures with masks in {root}; {EXPECTED}")

    def key(path: Path) -> str:
        stem = path.relative_to(root).with_suffix("").as_posix()
        return re.sub(MASK_ENDINGS, "", re.sub(IMAGE_ENDINGS, "", stem, flags=re.IGNORECASE), flags=re.IGNORECASE)

    own = _by_name(files, key)
    others = _by_name([path for path in pictures if path not in set(files)], key)
    both = [name for name in others if name in own]
    alone = [(path, "has no mask beside it") for name, path in others.items() if name not in own]
    alone += [(path, "has no picture beside it") for name, path in own.items() if name not in others]
    if not both:
        raise DataError(f"{files[0]} has no picture of its name beside it, nor has any other mask of {root}")
    return Pairs(tuple(others[n] for n in both), tuple((own[n],) for n in both), (*skipped, *alone))
