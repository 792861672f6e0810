"""The command line of an experiment: sub-commands, one-line errors, checks of flags, stopping on request."""

import math
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch


def run(description: str, default: tuple[type, Callable], **others: tuple[type, Callable]) -> None:
    """Parse the command line and call what it asks for; the body of an experiment's `if __name__ == "__main__"`.

    Args:
        description: what `--help` says first.
        default: (dataclass of arguments, function of one) for a command line without a sub-command.
        others: the same for each sub-command, by name.

    A ValueError or OSError becomes one line on stderr and exit code 2; with FUNCTREE_DEBUG=1 in the environment it
    keeps its traceback. Ctrl-C and SIGTERM outside of a `Stop` exit with 130.
    """
    import torch._inductor.config as inductor
    import tyro

    argv = sys.argv[1:]
    name = argv[0] if argv and argv[0] in others else None
    arguments, command = others[name] if name else default
    if others and not name:
        description += "\n\nSub-commands (each has its own --help): " + ", ".join(others)
    program = os.path.basename(sys.argv[0]) + (f" {name}" if name else "")
    # The processor's own flags say which vector instructions it has. Inductor would also build, load and run a program
    # for each kind, at every start.
    if inductor.cpp.vec_isa_ok is None:
        inductor.cpp.vec_isa_ok = True
    parsed = tyro.cli(arguments, prog=program, description=description, args=argv[1:] if name else argv)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command(parsed)
    except BrokenPipeError:  # whoever read our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get("FUNCTREE_DEBUG"):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        # What fails without a path is a write to an open file.
        return f"'{error.filename}': {error.strerror}" if error.filename else f"cannot write: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def choice(flag: str, value: str, options: Any) -> str:
    """`value` if it is one of the options; otherwise a ValueError that lists them."""
    if value not in options:
        raise ValueError(f"{flag} '{value}' is unknown; expected one of {', '.join(options)}")
    return value


def at_least_one(**counts: int) -> None:
    """Raise ValueError naming the first flag whose number is below 1: `at_least_one(batch=args.batch, ...)`."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {count}; expected at least 1")


def positive(**numbers: float) -> None:
    """Raise ValueError naming the first flag whose number is not above 0, or not finite."""
    for name, number in numbers.items():
        if not 0.0 < number < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {number}; expected a positive number")


def device(name: str) -> torch.device:
    """The device of a `--device` flag, checked to be there.

    Raises:
        ValueError: no such device, or none on this machine.
    """
    try:
        found = torch.device(name)
        torch.zeros((), device=found).item()  # meta tensors can be made but have no values
    except Exception as error:  # each kind of device that is not there raises its own
        available = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        available += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"--device '{name}' cannot be used; available here: {', '.join(available)}") from error
    return found


class Stop:
    """Context in which Ctrl-C and SIGTERM only set `requested`, so that a loop can save and end; a second raises."""

    def __init__(self):
        self.requested = False

    def _request(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may have interrupted one, and a stream does not let itself be entered twice.
        os.write(2, b"\nstopping after this step (once more: at once)\n")

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # The signal also reaches the compiler's own processes; that they died of it is not an error of the run. A full
        # disk while saving is one.
        if self.requested and isinstance(error, Exception) and not isinstance(error, (ValueError, OSError)):
            raise KeyboardInterrupt from error
