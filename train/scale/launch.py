"""The processes of a run as a launcher starts them (torchrun, or whoever sets RANK, WORLD_SIZE and MASTER_ADDR): who
this one is, how all of them agree, and how they fail together.

A process that raises alone, before a collective that the others enter, leaves them waiting. So what can go wrong on one
of them is said to all (`first`, `exchange`, `fail`), by way of the launcher's key-value store, without tensors.
"""

import contextlib
import datetime
import functools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

TIMEOUT = 300.0  # seconds that a process waits for the others: as long as they may compile, evaluate or save
GRACE = 10.0  # seconds that a process which failed waits for the others to learn of it


class Processes:
    """This process among those of its launcher; `current` gives it.

    Attributes:
        rank: the number of this process, from 0.
        ranks: number of processes.
        local_rank: the number of this process among those of this machine.
        ranks_per_node: number of processes on this machine.
        restarts: how often the launcher has started all of them anew.
    """

    def __init__(self):
        number = {name: int(os.environ.get(name, default)) for name, default in _VARIABLES.items()}
        self.rank, self.ranks = number["RANK"], number["WORLD_SIZE"]
        self.local_rank, self.ranks_per_node = number["LOCAL_RANK"], number["LOCAL_WORLD_SIZE"] or self.ranks
        self.restarts = number["TORCHELASTIC_RESTART_COUNT"]
        self.timeout = datetime.timedelta(seconds=float(os.environ.get("FUNCTREE_TIMEOUT", TIMEOUT)))
        self._exchanges, self._grouped = 0, False

    @functools.cached_property
    def _store(self):
        import torch.distributed as dist

        store, _, _ = next(dist.rendezvous("env://", timeout=self.timeout))
        store.set_timeout(self.timeout)
        return dist.PrefixStore(f"start/{self.restarts}", store)  # a launcher keeps the store when it starts anew

    def open_group(self, device: str) -> None:
        """Start torch.distributed's default group: gloo, and nccl for tensors on a GPU."""
        import torch.distributed as dist
        import torch.distributed.nn.functional  # noqa: F401 - later, its default arguments would keep the group open

        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        prefixed = dist.PrefixStore("group", self._store)
        options = {"store": prefixed, "rank": self.rank, "world_size": self.ranks, "timeout": self.timeout}
        dist.init_process_group(backend, **options)
        self._grouped = True

    def exchange(self, text: str) -> list[str]:
        """The texts of all processes, in order of rank."""
        if self.ranks == 1:
            return [text]
        self._exchanges += 1
        place = f"exchange/{self._exchanges}"
        if self.rank:
            self._store.set(f"{place}/{self.rank}", text)
            return json.loads(self._store.get(place))
        texts = [text, *(self._store.get(f"{place}/{rank}").decode() for rank in range(1, self.ranks))]
        self._store.set(place, json.dumps(texts))
        for rank in range(1, self.ranks):
            self._store.delete_key(f"{place}/{rank}")
        return texts

    def first(self, f: Callable[[], Any]) -> Any:
        """The result of `f` on the first process, as JSON, on every process.

        Raises ValueError on all of them where `f` raises a ValueError or an OSError.
        """
        if self.ranks == 1:
            return f()
        self._exchanges += 1
        place = f"first/{self._exchanges}"
        if self.rank:
            result = json.loads(self._store.get(place))
            if "error" in result:
                raise ValueError(result["error"])
            return result["value"]
        try:
            value = f()
        except (ValueError, OSError) as error:
            self._store.set(place, json.dumps({"error": str(error)}))
            raise
        self._store.set(place, json.dumps({"value": value}))
        return value

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers; cheap enough for every step."""
        if self.ranks == 1:
            return number
        import torch
        import torch.distributed as dist

        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def check_same(self, what: dict[str, str]) -> None:
        """Raise ValueError on all processes, naming the first entry that one of them has different from the first."""
        others = [json.loads(text) for text in self.exchange(json.dumps(what))]
        for rank, other in enumerate(others):
            for name, value in others[0].items():
                if other.get(name) != value:
                    raise ValueError(
                        f"process {rank} has {name} {other.get(name)}, process 0 has {value}; expected the same on all"
                    )

    def fail(self, line: str, *, lost: bool = False) -> str | None:
        """Say that this process ends with an error, and wait until all others have learned of it, or for `GRACE`
        seconds.

        Args:
            lost: the error is that another process has gone.

        Returns the line to print, None where another process prints it: the first prints one line for all of them.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the launcher sends once the first has ended
        with contextlib.suppress(Exception):  # the store goes with the launcher
            line = (lost and self._elsewhere()) or line
            self._store.set(f"failed/{self.rank}", line)
            self.close()  # a collective that others wait in fails at once
            if self._wait_for_the_others(2.0 if lost else GRACE) and self.rank:
                return None
        return line if not self.rank or lost else f"process {self.rank}: {line}"

    def is_of_a_collective(self, error: RuntimeError) -> bool:
        """True if an error says that another process does not answer."""
        import torch.distributed as dist

        return isinstance(error, dist.DistError) or any(word in str(error) for word in _OF_GLOO)

    def _elsewhere(self) -> str | None:
        """The error of another process that has failed, waited for a moment."""
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            for rank in range(self.ranks):
                if rank != self.rank and self._store.check([f"failed/{rank}"]):
                    return f"process {rank}: {self._store.get(f'failed/{rank}').decode()}"
            time.sleep(0.05)
        return None

    def _wait_for_the_others(self, seconds: float) -> bool:
        """Wait up to `seconds`; True if all processes, or at the end at least the first one, have failed too."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if all(self._store.check([f"failed/{rank}"]) for rank in range(self.ranks)):
                time.sleep(0.0 if self.rank else 0.3)  # the store may be the first process's: the others look once more
                return True
            time.sleep(0.02)
        return self._store.check(["failed/0"])

    def close(self) -> None:
        """End the default group, if there is one."""
        if self._grouped:
            import torch.distributed as dist

            self._grouped = False
            with contextlib.suppress(Exception):
                dist.destroy_process_group()


_OF_GLOO = ("gloo", "Gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 0, "TORCHELASTIC_RESTART_COUNT": 0}


@functools.cache
def current() -> Processes | None:
    """This process among those of its launcher, None where no launcher started it.

    Raises ValueError: the launcher's variables are not numbers.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    try:
        return Processes()
    except ValueError as error:
        names = ", ".join(_VARIABLES)
        raise ValueError(f"the launcher's environment ({names}) is not made of numbers: {error}") from None


def quiet(processes: Processes) -> None:
    """Let the first process alone print, and warn of the data; errors are those of all."""
    if processes.rank:
        logging.disable(logging.WARNING)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process


def check_trains(sub_command: str | None) -> None:
    """Raise ValueError if several processes were started for a sub-command, which is for one."""
    if sub_command not in (None, "finetune") and current().ranks > 1:
        raise ValueError(f"'{sub_command}' is for one process, but {current().ranks} run; start it without torchrun")


def identity() -> str:
    """The launcher, the same for every time that it starts the processes anew: its run id, or its process."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"process {os.getppid()}" if name == "none" else name
