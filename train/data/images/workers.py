"""A pool of processes that decode pictures batch by batch: the ground of `train.data.images.files.Decoder`.

Worker processes run this, so it does without torch: a worker starts at once and is small.
"""

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection as connections
from multiprocessing.connection import Connection

import numpy as np

from train.data import DataError
from train.data.images.picture import Cut, Member, decode

Row = tuple[int, str | Member, np.ndarray | None]
"""The position in the batch, the file, and the random numbers for `decode`."""


@dataclass
class Task:
    """A batch under way: its start in the file of pixels, the number of workers that have not answered yet, the rows
    that could not be read with the reasons, and whether its pixels have been given up."""

    cut: Cut
    rows: list[Row]
    count: int
    start: int = 0
    missing: int = 0
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    dropped: bool = False

    @property
    def size(self) -> int:
        """Bytes of the cut images."""
        return self.count * self.cut.size * self.cut.size * self.cut.channels


class Pool:
    """`workers` processes that decode; with 0 this process does it.

    Tasks and answers go through one socket per worker. Pixels lie in a file without a name that all have open, in
    memory: nothing is left of it when a process is killed, and it may be larger than the /dev/shm of a container.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._processes: list[subprocess.Popen] = []
        self._sockets: list[Connection] = []
        self._memory = _nameless() if workers else -1
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self._tasks: dict[int, Task] = {}
        self._number = 0
        self.close = weakref.finalize(self, _stop, self._processes, self._sockets, self._memory)
        for _ in range(workers):
            self._connect()

    def _connect(self) -> None:
        # A new interpreter with nothing but Pillow and numpy: a fork of this process is not safe once torch has
        # threads, and `multiprocessing` would import the running script, and torch with it, into each worker. A session
        # of its own spares it the terminal's Ctrl-C; it ends when this process closes the socket, or ends itself.
        ours, theirs = connections.Pipe()
        call = f"from train.data.images.workers import work; work({theirs.fileno()}, {self._memory})"
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {call}"],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._memory),
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        self._processes.append(process)
        self._sockets.append(ours)

    def start(self, cut: Cut, rows: list[Row], count: int) -> Task:
        """Start decoding these rows of a batch of `count` pictures."""
        if not self.close.alive:
            raise DataError("the decoder is closed")
        task = Task(cut, rows, count)
        if not self.workers:
            return task
        if free := self._free.get(task.size):
            task.start = free.pop()
        else:
            task.start, self._end = self._end, self._end + task.size
        self._number += 1
        self._tasks[self._number] = task
        parts = [(socket, rows[k :: self.workers]) for k, socket in enumerate(self._sockets) if rows[k:]]
        task.missing = len(parts)
        for socket, part in parts:
            try:
                socket.send((self._number, cut, part, task.start))
            except OSError:
                self._died(socket)
        return task

    def finish(self, task: Task) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """Wait for the pixels (count, channels, size, size) uint8, and the rows that could not be read, with reasons.

        Raises DataError: a worker died.
        """
        cut = task.cut
        pixels = np.empty((task.count, cut.channels, cut.size, cut.size), np.uint8)
        if not self.workers:
            return pixels, _decode(cut, task.rows, pixels.__setitem__)
        while task.missing:
            self._receive()
        left, start = memoryview(pixels).cast("B"), task.start
        while left and (count := os.preadv(self._memory, [left], start)):
            left, start = left[count:], start + count
        self.drop(task)
        return pixels, sorted(task.unreadable)

    def drop(self, task: Task) -> None:
        """Give up a task's pixels, whether they are decoded already or not."""
        task.dropped = True
        if not task.missing:
            self._free.setdefault(task.size, []).append(task.start)

    def _receive(self) -> None:
        """Wait for answers."""
        for socket in connections.wait(self._sockets):
            try:
                number, unreadable, failure = socket.recv()
            except (EOFError, OSError):
                self._died(socket)
            if failure:
                self.close()
                raise DataError(f"a decoding worker failed: {failure}")
            task = self._tasks[number]
            task.unreadable += unreadable
            task.missing -= 1
            if not task.missing:
                del self._tasks[number]
                if task.dropped:
                    self.drop(task)

    def _died(self, socket: Connection) -> None:
        number = self._sockets.index(socket)
        self.close()
        code = self._processes[number].returncode
        end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise DataError(f"decoding worker {number + 1} of {self.workers} {end}") from None


def _nameless() -> int:
    """The descriptor of an empty file without a name, in memory where the system allows that."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pictures")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _stop(processes: list[subprocess.Popen], sockets: list[Connection], memory: int) -> None:
    """A worker ends when its socket is closed; one that cannot, because it waits for a disk, is killed."""
    for socket in sockets:
        socket.close()
    for process in processes:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if memory >= 0:
        os.close(memory)


def _decode(cut: Cut, rows: Sequence[Row], write: Callable[[int, np.ndarray], None]) -> list[tuple[int, str]]:
    unreadable = []
    for row, path, draws in rows:
        try:
            pixels = decode(path, cut, draws)
        except DataError as error:
            unreadable.append((row, str(error)))
        else:
            write(row, pixels)
    return unreadable


def work(socket: int, memory: int) -> None:
    """Run a worker: answer tasks (number, cut, rows, start) by (number, [(unreadable row, reason), ...], failure).

    The batch begins at `start` of the file `memory`. `failure` is an error that is no picture's fault, usually None.
    """
    connection, tasks = Connection(socket), queue.SimpleQueue()
    threading.Thread(target=_take, args=(connection, tasks), daemon=True).start()
    while True:
        number, cut, rows, start = tasks.get()

        def write(row: int, pixels: np.ndarray, start: int = start) -> None:
            if os.pwrite(memory, pixels, start + row * pixels.nbytes) < pixels.nbytes:
                raise OSError("no room for the pixels")

        unreadable, failure = [], None
        try:
            unreadable = _decode(cut, rows, write)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        try:
            connection.send((number, unreadable, failure))
        except OSError:
            return


def _take(connection: Connection, tasks: queue.SimpleQueue) -> None:
    """Take tasks as they come, so that the sender never waits; end when the sender ends, however it ends."""
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)
