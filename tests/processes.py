"""Processes that tests start: with default signal handlers, a time limit, and ended when the test ends."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

LIMIT = 600  # seconds that a test may wait for what it started: twice what the longest takes
HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
STARTED: list[subprocess.Popen] = []


@contextmanager
def default_handlers() -> Iterator[None]:
    """The handlers of a program that a terminal starts.

    Under nohup, or in the background of a script, SIGINT and SIGHUP are ignored, and so they are by every process that
    is started from there.
    """
    before = {number: signal.signal(number, handler) for number, handler in HANDLERS.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(command: list, **options: Any) -> subprocess.Popen:
    """Start a command in a session of its own; `end_all`, which runs after every test, ends it and its children.

    From now on the test may take LIMIT seconds: then whatever it waits for raises TimeoutError.
    """
    with default_handlers():
        process = subprocess.Popen(command, start_new_session=True, **options)
    STARTED.append(process)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT)
    return process


def end_all() -> None:
    """End every process that `start` started, and what they started."""
    signal.alarm(0)
    while STARTED:
        process = STARTED.pop()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"a process of this test did not end within {LIMIT} s")
