"""Public pictures for super-resolution, T91 and Set5, where FUNCTREE_DATA names the folder of data sets."""

import os
import zipfile
from pathlib import Path

import pytest

DATA = os.environ.get("FUNCTREE_DATA")
needs_pictures = pytest.mark.skipif(not DATA, reason="FUNCTREE_DATA does not name a folder with real data sets")


def unpacked(folder: Path, name: str = "set5") -> Path:
    """The pictures of a set, set5 or yang91 (T91), in a folder of this name."""
    with zipfile.ZipFile(Path(DATA) / "sr_set5_t91" / "sr_set5_t91.zip") as file:
        names = [entry for entry in file.namelist() if f"/{name}/" in entry]
        file.extractall(folder, names)
    return folder / "data" / name
