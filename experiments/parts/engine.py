"""The thread that computes for a service: jobs wait in a queue, and what a job gives goes to the task that reads it.

The event loop of the service submits jobs and never computes; the thread computes and never waits for a reader.
"""

import asyncio
import contextlib
import threading
from collections import deque
from typing import Any, NamedTuple

from nets.language.continuous_batching import Batch


class Full(Exception):
    """The queue has as many jobs as it may have."""


class Event(NamedTuple):
    """A value that a job gives (of a text, a token), or the exception that ends it; `last` ends it too."""

    value: Any
    last: bool


class Job:
    """A request, from its arrival to its last event; `cancelled` tells the thread that nobody reads it any more."""

    def __init__(self, content: Any):
        self.content = content
        self.cancelled = False
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()


class Engine:
    """A queue of jobs and the thread that takes them; subclasses say how many at once, and compute.

    capacity: jobs that may wait.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []
        self.closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def room(self) -> int:
        """Jobs that may join the active ones."""
        raise NotImplementedError

    def turn(self, jobs: list[Job]) -> list[tuple[Job, Event]]:
        """Take these jobs, and compute a piece of all active ones."""
        raise NotImplementedError

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.closing

    def submit(self, content: Any) -> Job:
        """A job in the queue; called in an event loop. Raises Full."""
        job = Job(content)
        with self._changed:
            if len(self.waiting) >= self.capacity:
                raise Full
            self.waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Let go of a job: it leaves the queue at once, the active ones before their next piece."""
        with self._changed:
            job.cancelled = True
            with contextlib.suppress(ValueError):
                self.waiting.remove(job)
            self._changed.notify()

    def close(self) -> None:
        """End the thread when all jobs have ended, and wait for it."""
        with self._changed:
            self.closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self.waiting or self.active or self.closing):
                    self._changed.wait()
                if self.closing and not self.waiting and not self.active:
                    return
                jobs = [self.waiting.popleft() for _ in range(min(self.room, len(self.waiting)))]
            events = self.turn(jobs)
            for loop in {job.loop for job, _ in events}:
                with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits
                    loop.call_soon_threadsafe(_deliver, [pair for pair in events if pair[0].loop is loop])


def _deliver(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.events.put_nowait(event)


class Texts(Engine):
    """Texts by continuous batching; a job's content is a `nets.language.continuous_batching.Text`."""

    def __init__(self, batch: Batch, capacity: int):
        super().__init__(capacity)
        self.batch = batch

    @property
    def room(self) -> int:
        return len(self.batch.rows) - len(self.active)

    def turn(self, jobs: list[Job]) -> list[tuple[Job, Event]]:
        for job in [job for job in self.active if job.cancelled]:
            self.batch.remove(job)
            self.active.remove(job)
        events = []
        for job in jobs:
            try:
                self.batch.add(job, job.content)
                self.active.append(job)
            except Exception as error:  # of this prompt alone
                events.append((job, Event(error, True)))
        try:
            events += [(job, Event(value, last)) for job, value, last in self.batch.step()]
        except Exception as error:  # of all texts of this step: no memory, a driver ...
            for job in self.active:
                self.batch.remove(job)
                events.append((job, Event(error, True)))
        ended = {job for job, event in events if event.last}
        self.active = [job for job in self.active if job not in ended]
        return events


class Pictures(Engine):
    """Pictures, several at a time; a job's content is one, and `answer` gives each an answer or an exception."""

    def __init__(self, answer: Any, together: int, capacity: int):
        super().__init__(capacity)
        self.answer, self.together = answer, together

    @property
    def room(self) -> int:
        return self.together

    def turn(self, jobs: list[Job]) -> list[tuple[Job, Event]]:
        if not jobs:
            return []
        self.active = jobs
        try:
            values = self.answer([job.content for job in jobs])
        except Exception as error:
            values = [error] * len(jobs)
        self.active = []
        return [(job, Event(value, True)) for job, value in zip(jobs, values, strict=True)]
