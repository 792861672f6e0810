"""Fixtures of the tests of all experiments."""

import shutil

import pytest
import torch

from tests.experiments.runs import THREADS, coarse, undrawn


@pytest.fixture(autouse=True, scope="module")
def threads():
    """As many as in the processes that are started."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def pictures(request):
    """Coarse pictures for files of tests that look at them, which say `DRAWN = True`; black squares for the others."""
    with pytest.MonkeyPatch.context() as patch:
        coarse(patch) if getattr(request.module, "DRAWN", False) else undrawn(patch)
        yield


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of the folder `place`, which each file of tests makes once; which is the current folder of the test."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
