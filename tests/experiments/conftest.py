"""Fixtures of the tests of all experiments."""

import shutil

import pytest
import torch

from tests.experiments.runs import THREADS, undrawn


@pytest.fixture(autouse=True, scope="module")
def threads():
    """As many as in the processes that are started."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def pictures(request):
    """Files of tests that look at what pictures show say `DRAWN = True`; for the others they are black squares."""
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "DRAWN", False):
            undrawn(patch)
        yield


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of the folder `place`, which each file of tests makes once; which is the current folder of the test."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
