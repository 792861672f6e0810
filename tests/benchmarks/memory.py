"""The peak memory of a call, as the operating system sees it."""

import ctypes
import gc
import os
from collections.abc import Callable


def peak(run: Callable[[], object], warmup: int = 2) -> int:
    """Bytes by which the resident memory of this process rises, at its highest, while `run` runs. Linux only.

    Start the process with MALLOC_MMAP_THRESHOLD_=65536 in its environment, so that freed tensors go back at once;
    `require_prompt_free` sees to that.
    """
    for _ in range(warmup):
        run()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # forget the peak so far
    before = _status("VmRSS")
    outputs = run()
    after = _status("VmHWM")
    del outputs
    return after - before


def _status(name: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name + ":"))


def require_prompt_free() -> None:
    """Start this program again with the setting that `peak` needs, unless it has it."""
    import sys

    if os.environ.get("MALLOC_MMAP_THRESHOLD_") != "65536":
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
