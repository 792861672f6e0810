"""The pictures that `experiments/imagenet.py` learns from, and which label of a net each of their classes has."""

import contextlib
import io
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from core import random
from train.data import DataError
from train.data.images import arrays, scenes, shards
from train.data.images.sets import ImageSet, open_images

COUNTS = {"train": (4, 400), "val": (1, 400)}
"""Tars of the generated set, and pictures in each."""
SIDE, DIGITS = 48, (24, 40)
"""Pixels per side of its pictures and, from least to most, of the digit in them."""


@contextlib.contextmanager
def opened(data: str, part: str = "split") -> Iterator[ImageSet]:
    """The pictures that `--data` names: "scenes", in tars that are there until this ends, or a folder.

    Raises ValueError: they are no files.
    """
    if data == "scenes":
        with tempfile.TemporaryDirectory(prefix="scenes-") as folder:
            write_scenes(Path(folder))
            yield open_images(folder, part)._replace(name=data)
        return
    images = open_images(data, part)
    if images.in_memory:
        raise ValueError(f"--data '{data}' is no folder of class folders or tars; classify.py learns it")
    yield images


def write_scenes(folder: Path) -> None:
    """Coloured digits on clouds, a class for each number, as PNG files in indexed tars; those to test on were written
    by other hands."""
    pools = dict(zip(COUNTS, arrays.digits(), strict=True))
    for number, (part, (tars, count)) in enumerate(COUNTS.items()):
        options = {"side": SIDE, "sizes": DIGITS, "least": 1, "most": 1}
        batch = scenes.scenes(random.key(number), tars * count, pools[part], **options)
        pixels = (255 * batch.images).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        names = [scenes.NUMBERS[label] for label in batch.labels[:, 0].tolist()]
        (folder / part).mkdir(parents=True)
        for tar in range(tars):
            with tarfile.open(folder / part / f"{tar:03}.tar", "w") as file:
                for i in range(tar * count, (tar + 1) * count):
                    content = io.BytesIO()
                    Image.fromarray(pixels[i]).save(content, "PNG")
                    member = tarfile.TarInfo(f"{names[i]}/{i:04}.png")
                    member.size = content.tell()
                    content.seek(0)
                    file.addfile(member, content)
    shards.write_index(folder)


def with_labels_of(
    classes: Sequence[str], images: ImageSet, order: Path | None = None, published: bool = False
) -> tuple[ImageSet, str]:
    """The same pictures with the labels of a net, and how these were told.

    They are told by the names of the net's classes. Those of published weights are no names of folders, so folders are
    told by their numbers too or, if they are as many as the classes, by their sorted order, as torchvision has it.

    Args:
        classes: those of the net, in the order of its labels.
        order: a file with the name of a folder at the beginning of each line, in the order of the labels, which goes
            before all else: ILSVRC's `LOC_synset_mapping.txt`.

    Raises ValueError: none of these fits.
    """
    own, count = images.classes, len(classes)
    if order is not None:
        names, how = _names(order, count), f"by the order of {order}"
        label_of = {name: label for label, name in enumerate(names)}
    elif set(own) <= set(classes):
        label_of, how = {name: label for label, name in enumerate(classes)}, "by their names"
    elif published and all(name.isdecimal() for name in own) and max(map(int, own)) < count:
        label_of, how = {name: int(name) for name in own}, "by their numbers"
    elif published and len(own) == count:
        label_of, how = {name: label for label, name in enumerate(own)}, "by their sorted order"
    else:
        unknown = next(name for name in own if name not in classes)
        ways = "its names, " + (f"its numbers, {count} folders, " if published else "") + "or --classes-from FILE"
        has = f"{len(own)} classes such as '{unknown}', the net {count}"
        raise ValueError(f"'{images.name}' has {has}; expected {ways}")
    if unknown := [name for name in own if name not in label_of]:
        raise ValueError(f"'{images.name}' has the class '{unknown[0]}', which {order} does not name")
    table = torch.tensor([label_of[name] for name in own])
    train, test = (part._replace(labels=table[part.labels], classes=tuple(classes)) for part in images[1:3])
    return images._replace(train=train, test=test, classes=tuple(classes)), how


def _names(path: Path, count: int) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes-from {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    names = [line.split()[0] for line in lines if line.strip()]
    if not len(set(names)) == len(names) == count:
        lines = f"{len(set(names))} names on {len(names)} lines"
        raise DataError(f"--classes-from {path} has {lines}; the net has {count} classes")
    return names
