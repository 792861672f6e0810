"""Sets for image-to-image translation by name: downloaded once from their authors' server, kept in the user's cache."""

from collections.abc import Sequence
from pathlib import Path

from train.data import DataError
from train.data.downloads import Download, fetch_all

_BERKELEY = "http://efrosgans.eecs.berkeley.edu"
DOWNLOADS = {
    # Photographs (left) beside labels (right), 400 in train, 100 in val, 106 in test: CMP Facades (Tylecek and Sara
    # 2013) as Isola et al. 2017 prepared it. No checksum is published.
    "facades": Download(f"{_BERKELEY}/pix2pix/datasets/facades.tar.gz", None, None),
    # trainA, testA (1067 and 120 horses), trainB, testB (1334 and 140 zebras): photographs of ImageNet, chosen by Zhu
    # et al. 2017. The SHA-256 by which TensorFlow Datasets checks this archive.
    "horse2zebra": Download(
        f"{_BERKELEY}/cyclegan/datasets/horse2zebra.zip",
        "sha256:a74d9d392eecca9966b51287a76ca126af473d9de4f3e8fc0e9cda08fa1730a1",
        None,
    ),
}
"""Both are for research: the pictures are others' photographs, and have no licence of their own."""


def download(name: str, directory: Path | str | None = None, base_url: str | None = None) -> Path:
    """Fetch a set of `DOWNLOADS`, unless it is there already and whole, and return the folder of its parts.

    Args as `train.data.downloads.fetch_all`. Raises DataError: no connection, wrong checksum.
    """
    return fetch_all(name, [DOWNLOADS[name]], directory, base_url) / name


def folder_of(data: str, names: Sequence[str], expected: str) -> Path:
    """The folder that `--data` names, or the one of a set of `DOWNLOADS`, if it is among `names` and no folder is so
    called.

    Raises DataError, which lists `expected`, if it is neither; or as `download`.
    """
    path = Path(data)
    if data in names and not path.exists():
        return download(data)
    if not data or not path.is_dir():  # Path("") is the current folder
        problem = "is a file" if data and path.exists() else "does not exist"
        raise DataError(f"--data '{data}' {problem}; expected {expected}")
    return path
