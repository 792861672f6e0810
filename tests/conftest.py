"""Settings for all tests.

Two workers share two cores, so each of them, and what it starts, computes on one thread, or on as many as
OMP_NUM_THREADS says: `OMP_NUM_THREADS=2 pytest`. What inductor compiles is kept by instruction set, so that
`ATEN_CPU_CAPABILITY=default pytest` (or avx2) computes with those kernels.
"""

import gc
import os

import pooch  # noqa: F401  its logger keeps the stderr of its import, which a test's capture closes
import pytest
import torch

import tests.benchmarks.torchvision_operators  # noqa: F401
from tests import processes
from train.run import compiler

compiler.configure()
# Tracing makes millions of objects, and what jax and transformers import is searched with them at each collection.
gc.set_threshold(100_000, 10, 10)
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
    """Nothing that a test or its fixtures started outlives it."""
    try:
        return (yield)
    finally:
        processes.end_all()


@pytest.fixture
def default_handlers():
    """The signal handlers of a program that a terminal starts, whatever pytest was started by."""
    with processes.default_handlers():
        yield
