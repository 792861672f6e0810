"""Several processes of one script, as torchrun starts them, for tests: rank 0 hosts the store."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import processes

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """That of one process; gloo listens on the loopback interface."""
    launcher = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1}
    launcher |= {"PYTHONPATH": ROOT, "FUNCTREE_TIMEOUT": 100, "COLUMNS": 200}
    return {**os.environ, **{name: str(value) for name, value in launcher.items()}}


def begin(
    script: Path, *argv: Any, ranks: int = 2, others: tuple[str, ...] = (), **options: Any
) -> list[subprocess.Popen]:
    """The processes of a script, in order of rank; all but the first get the flags `others` too."""
    port, command = free_port(), [sys.executable, str(script), *map(str, argv)]
    pipes, started = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}, []
    for rank in range(ranks):
        env, own = environment(rank, ranks, port), others if rank else ()
        started.append(processes.start([*command, *own], env=env, **{**pipes, **options}))
    return started


def together(script: Path, *argv: Any, ranks: int = 2, **options: Any) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process of a script, when all have ended."""
    started = begin(script, *argv, ranks=ranks, **options)
    outputs = [process.communicate() for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]
