"""What the tests of all experiments stand on."""

import shutil

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the processes that are started: how a sum is cut into parts, and so its last bit, depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of the folder `place`, which each file of tests makes once; the test stands in it."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
