"""Examples for `experiments/examine.py`: pictures, labelled texts, lines of text, or what a Python function returns."""

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core import random
from train.data import DataError
from train.data.images import picture, sets
from train.data.images.arrays import Labelled
from train.data.images.files import Decoder
from train.data.images.folders import Files
from train.data.text import labelled
from train.data.text.files import decoded_lines, unpacked
from train.files import shown

TEXTS = ("docstrings", "brackets")
SIDE = 64  # most pixels per side of a picture that is a file, where nothing else says


class Examples(NamedTuple):
    """N examples.

    inputs: pixels (N, channels, height, width), bytes or numbers in [0, 1]; any tensor (N, ...); or texts.
    labels: (N,) int64, None where there are none; `classes[label]` is the name of a class.
    names: of each example: its file, line or number.
    test: others like them, (inputs, labels), for the accuracy of what has learned from these; None if there are none.
    """

    inputs: Tensor | tuple[str, ...]
    labels: Tensor | None
    classes: tuple[str, ...]
    names: tuple[str, ...]
    test: Labelled | None
    facts: dict[str, Any]
    skipped: int = 0

    @property
    def are_texts(self) -> bool:
        return isinstance(self.inputs, tuple)

    def some(self, rows: Tensor) -> "Examples":
        """Those of some indices."""
        indices = rows.tolist()
        texts = tuple(self.inputs[i] for i in indices) if self.are_texts else None
        return self._replace(
            inputs=self.inputs[rows] if texts is None else texts,
            labels=None if self.labels is None else self.labels[rows],
            names=tuple(self.names[i] for i in indices),
        )


class Preparation(NamedTuple):
    """Pictures as a model takes them; None where any will do: those of the data, or 64 pixels per side of files."""

    size: int | None = None
    resize: int | None = None
    channels: int | None = None
    interpolation: str = "bilinear"


def subset(total: int, count: int | None, key: Tensor) -> Tensor:
    """Indices of `count` examples in their order, a random choice as files are sorted by class; all if None.

    Raises DataError: there are fewer.
    """
    if count is not None and count > total:
        raise DataError(f"--examples is {count}; the data has {total}")
    return torch.arange(total) if count is None else random.permutation(key, total)[:count].sort().values


def images(
    data: str,
    preparation: Preparation,
    count: int | None,
    key: Tensor,
    workers: int = 0,
    classes: Sequence[str] | None = None,
    test: bool = False,
) -> Examples:
    """The pictures to train on that `data` names; see `train.data.images.sets.open_images`.

    Files are decoded once, to a memory map in a temporary file. One that cannot be read is skipped and named.

    Args:
        classes: those of a trained model, in its order.
        test: read those to test on as well.
    """
    opened = sets.open_images(data, classes=classes)
    rows, skipped = subset(len(opened.train.labels), count, key), ()
    if opened.in_memory:
        opened = opened if preparation.size is None else sets.resized(opened, preparation.size)
        pixels, labels = (x[rows] for x in opened.train)
        names, held = tuple(f"number {i}" for i in rows.tolist()), opened.test
    else:
        if preparation.size is None:
            preparation = preparation._replace(size=side_of(opened.train))
        files = opened.train._replace(
            paths=tuple(opened.train.paths[i] for i in rows.tolist()), labels=opened.train.labels[rows]
        )
        with Decoder(workers) as decoder:
            pixels, labels = decoded(files, preparation, decoder)
            held = Labelled(*decoded(opened.test, preparation, decoder)) if test else None
        skipped = decoder.skipped
        unreadable = {path for path, _ in skipped}
        root = Path(data)
        names = tuple(shown(path.relative_to(root)) for path in files.paths if path not in unreadable)
    held = held._replace(images=with_channels(held.images, preparation.channels)) if test and held else None
    facts = sets.facts(opened, skipped) | {"images to examine": len(labels)}
    facts["pixels per side"] = " x ".join(map(str, dict.fromkeys(pixels.shape[2:])))
    pixels = with_channels(pixels, preparation.channels)
    return Examples(pixels, labels, opened.classes, names, held, facts, len(skipped))


def side_of(files: Files) -> int:
    """Pixels per side for a model that takes any: those of the first picture that can be read, 64 at most."""
    for path in files.paths:
        with contextlib.suppress(DataError), picture.opened(path) as image:
            return min(SIDE, *image.size)
    return SIDE


def decoded(files: Files, preparation: Preparation, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """(bytes (readable, 3, size, size) in a temporary file, labels)."""
    size = preparation.size or SIDE
    options = (3, preparation.resize or size, preparation.interpolation)
    batches = decoder.evaluation_batches(files, sets.EVALUATED, size, *options)
    labels, shape = [], (3, size, size)
    with tempfile.TemporaryFile() as file:
        for pixels, part in batches:
            file.write(pixels.contiguous().numpy().tobytes())
            labels.append(part)
        file.flush()
        count = sum(map(len, labels))
        pixels = np.memmap(file, np.uint8, "r+", shape=(count, *shape))  # lives on without the file's name
    return torch.from_numpy(pixels), torch.cat(labels)


def with_channels(pixels: Tensor, channels: int | None) -> Tensor:
    """Grey pictures in the channels of a model; what does not fit stays as it is."""
    fits = channels is None or pixels.shape[1] != 1
    return pixels if fits else pixels.expand(-1, channels, -1, -1)


def labelled_texts(
    data: str, columns: labelled.Columns, count: int | None, key: Tensor, classes: Sequence[str] | None = None
) -> tuple[Examples, labelled.Records | None]:
    """Texts with labels, and those to test on: of a net that has still to learn (`classes` is None) the training part,
    of a trained one all of a file.

    Raises DataError: as `labelled.open_labelled`, labels that are missing among them.
    """
    if classes is not None and data not in TEXTS:
        records, unknown = labelled.open_test(data, classes, columns)
        facts = {"data": data, "form": records.form, "classes": list(classes), "skipped": list(unknown)}
        test, skipped = None, len(unknown)
    else:
        opened = labelled.open_labelled(data, columns=columns)
        records, test, facts, skipped = opened.train, opened.test, labelled.facts(opened), len(opened.skipped)
        if classes is not None and set(opened.classes) - set(classes):
            raise DataError(f"--data '{data}' has the classes {', '.join(opened.classes)}; the model {list(classes)}")
        classes = opened.classes if classes is None else classes
    numbers = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([numbers[name] for name in records.labels], dtype=torch.int64)
    names = tuple(f"record {i + 1}" for i in range(len(labels)))
    everything = Examples(records.texts, labels, tuple(classes), names, None, facts, skipped)
    rows = subset(len(labels), count, key)
    return everything.some(rows)._replace(facts=facts | {"texts to examine": len(rows)}), test


def lines(data: str, columns: labelled.Columns, count: int | None, key: Tensor) -> Examples:
    """Texts without labels: the lines of a file that are not empty, or the texts of a table (CSV, TSV, JSON Lines)."""
    path = Path(data)
    if data in TEXTS and not path.exists():
        texts, form = labelled.open_labelled(data).train.texts, "texts of records"
    elif path.suffix.lower() in (".csv", ".tsv", ".jsonl", ".ndjson"):
        records = labelled.read(path, columns)
        texts, form = records.texts, records.form
    else:
        with unpacked(path, "a file with a text per line") as file:
            everything, _ = decoded_lines(file.read())
        texts, form = tuple(line.strip() for line in everything if line.strip()), "a text per line"
    if not texts:
        raise DataError(f"{path} is empty, expected a text per line")
    names = tuple(f"text {i + 1}" for i in range(len(texts)))
    rows = subset(len(texts), count, key)
    facts = {"data": data, "form": form, "texts to examine": len(rows)}
    return Examples(texts, None, (), names, None, facts).some(rows)


def of_function(value: Any, source: str, count: int | None, key: Tensor) -> Examples:
    """Examples that a function of the user returned: (inputs, labels) or (inputs, labels, classes); labels may be None.

    Raises DataError: something else.
    """
    expected = "expected (inputs, labels) or (inputs, labels, classes): a tensor or texts, integers or None, names"
    if not isinstance(value, tuple) or len(value) not in (2, 3):
        raise DataError(f"--data {source} returns a {type(value).__name__}; {expected}")
    inputs, labels, *rest = value
    if isinstance(inputs, np.ndarray):
        inputs = torch.from_numpy(inputs)
    if not isinstance(inputs, Tensor):
        if isinstance(inputs, str) or not all(isinstance(text, str) for text in inputs):
            raise DataError(f"--data {source} returns inputs of type {type(inputs).__name__}; {expected}")
        inputs = tuple(inputs)
    if labels is not None:
        labels = torch.as_tensor(labels)
        if labels.shape != (len(inputs),) or labels.is_floating_point():
            kind = f"{labels.dtype} {tuple(labels.shape)}"
            raise DataError(f"--data {source} returns labels {kind} for {len(inputs)} inputs; {expected}")
        if len(labels) and int(labels.min()) < 0:
            raise DataError(f"--data {source} returns the label {int(labels.min())}; expected 0 or more")
        labels = labels.long()
    number = 0 if labels is None else int(labels.max()) + 1
    classes = tuple(map(str, rest[0])) if rest else tuple(str(i) for i in range(number))
    if len(classes) < number:
        raise DataError(f"--data {source} returns {len(classes)} classes and the label {number - 1}; {expected}")
    names = tuple(f"number {i}" for i in range(len(inputs)))
    rows = subset(len(inputs), count, key)
    facts = {"data": source, "classes": list(classes), "examples to examine": len(rows)}
    return Examples(inputs, labels, classes, names, None, facts).some(rows)


def of_python(source: str) -> Any:
    """The function that `python:FILE.py:FUNCTION` names. Raises ValueError: there is no such file or function."""
    file, _, name = source.removeprefix("python:").rpartition(":")
    path = Path(file)
    if not file or not name:
        raise ValueError(f"'{source}' names no function; expected python:FILE.py:FUNCTION")
    if not path.is_file():
        raise ValueError(f"'{file}' does not exist; expected python:FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.path.insert(0, str(path.parent.resolve()))  # for what lies beside it
    try:
        sys.modules[path.stem] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"'{file}' fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
        if before is not None:
            sys.modules[path.stem] = before
    if not callable(getattr(module, name, None)):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"'{file}' has no function '{name}'; it has {', '.join(names) or 'none'}")
    return getattr(module, name)


def called(source: str) -> Any:
    """The value that the function of `python:FILE.py:FUNCTION` returns. Raises ValueError: it fails."""
    try:
        return of_python(source)()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{source} fails: {type(error).__name__}: {error}") from error


def unit(pixels: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1]."""
    return pixels / 255 if pixels.dtype == torch.uint8 else pixels


def scaled(pixels: Tensor, size: int) -> Tensor:
    """(N, channels, size, size), smoothed where it shrinks."""
    return F.interpolate(unit(pixels), (size, size), mode="bilinear", antialias=True, align_corners=False)
