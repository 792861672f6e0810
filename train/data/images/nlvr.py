"""Sentences about pictures, true or false: the files of NLVR.

Suhr et al. 2017, "A Corpus of Natural Language for Visual Reasoning" (ACL). A part PART has PART.json with a JSON
object per line, and pictures images/DIRECTORY/PART-IDENTIFIER-K.png: each sentence with up to six pictures, in which
the same three boxes come in another order. One bad record or picture is named, skipped and counted.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.data import DataError
from train.data.file_tree import Skipped
from train.data.images.captions import WORD
from train.data.text.files import decoded_lines, unpacked

PARTS = ("train", "dev", "test")


class Statements(NamedTuple):
    """Pictures, the sentence about each, and whether it is true (count,), 1 or 0 in int64."""

    paths: tuple[Path, ...]
    sentences: tuple[str, ...]
    labels: Tensor

    def some(self, rows: Sequence[int]) -> "Statements":
        """The statements with these numbers."""
        paths, sentences = (tuple(part[i] for i in rows) for part in self[:2])
        return Statements(paths, sentences, self.labels[list(rows)])


class StatementSet(NamedTuple):
    """Statements to train on and to test on, the parts they are, and what is not used."""

    train: Statements
    test: Statements
    parts: tuple[str, str]
    skipped: tuple[Skipped, ...] = ()


def open_statements(folder: str) -> StatementSet:
    """The first and the last of `PARTS` that a folder, or the folder "nlvr" in it, has.

    Raises DataError: no such folder, no two parts, a part without a statement that can be used.
    """
    root = Path(folder)
    if not root.is_dir():
        kind = "is no folder" if root.exists() else "does not exist"
        raise DataError(f"{root} {kind}; expected one with NLVR's parts, such as dev/dev.json and test/test.json")
    root = root / "nlvr" if (root / "nlvr").is_dir() else root
    parts = [name for name in PARTS if (root / name / f"{name}.json").is_file()]
    if len(parts) < 2:
        there = f"has {parts[0]}/{parts[0]}.json alone" if parts else "has no part of NLVR"
        raise DataError(f"{root} {there}; expected two of {', '.join(f'{name}/{name}.json' for name in PARTS)}")
    skipped: list[Skipped] = []
    train, test = (_part(root / name, name, skipped) for name in (parts[0], parts[-1]))
    return StatementSet(train, test, (parts[0], parts[-1]), tuple(skipped))


def _part(folder: Path, name: str, skipped: list[Skipped]) -> Statements:
    file = folder / f"{name}.json"
    with unpacked(file) as content:
        lines, _ = decoded_lines(content.read())
    rows: list[tuple[Path, str, int]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        fields = [record.get(key) if isinstance(record, dict) else None for key in ("sentence", "label", "identifier")]
        sentence, label, identifier = (str(value or "") for value in fields)
        where = folder / "images" / str(record.get("directory", "") if isinstance(record, dict) else "")
        paths = [where / f"{name}-{identifier}-{k}.png" for k in range(6)]
        paths = [path for path in paths if path.is_file()]
        problem = None
        if not isinstance(record, dict):
            problem = "is no JSON object"
        elif not WORD.search(sentence):
            problem = "has a sentence of no words"
        elif label not in ("true", "false"):
            problem = f"has the label '{label}', expected true or false"
        elif not paths:
            problem = f"has no picture {where / f'{name}-{identifier}-0.png'}"
        if problem:
            skipped.append((file, f"line {number} {problem}"))
        else:
            rows += [(path, " ".join(sentence.split()), int(label == "true")) for path in paths]
    if not rows:
        reason = f"; {skipped[-1][1]}" if skipped else ""
        raise DataError(f"{file} has no statement with a picture{reason}")
    paths, sentences, labels = zip(*rows, strict=True)
    return Statements(paths, sentences, torch.tensor(labels))


def facts(data: StatementSet) -> dict[str, Any]:
    """Names and values of a set, for `train.data.understood`."""
    both = dict(zip(("train", "test"), (data.train, data.test), strict=True))
    return {
        "parts": dict(zip(both, data.parts, strict=True)),
        "statements": {name: len(part.paths) for name, part in both.items()},
        "sentences": {name: len(set(part.sentences)) for name, part in both.items()},
        "true": {name: float(part.labels.float().mean()) for name, part in both.items()},
        "skipped": list(data.skipped),
    }
