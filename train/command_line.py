"""The command line of an experiment: sub-commands, one-line errors, stopping on request, and runs that resume."""

import dataclasses
import json
import os
import signal
import sys
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
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


def resume(root: Path, args: Any, free: tuple[str, ...]) -> tuple[Path, Any]:
    """The folder and the arguments of the run that `--resume` continues: `--name`, or the newest under `root`.

    Args:
        args: a dataclass, whose field `name` is a str or None.
        free: fields that a resumed run may be given anew; any other must be as the run was started.

    What the command line says is what differs from the default, or stands in `sys.argv` as a flag.

    Returns:
        (folder, arguments): what the command line does not say comes from the run's `config.json`.

    Raises:
        ValueError: there is nothing to resume, or a flag contradicts the run.
    """
    folder = root / args.name if args.name else _latest(root)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"nothing to resume: '{folder}' has no config.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot resume: '{folder / 'config.json'}' is not readable as a run's configuration"
        ) from error
    stored = from_json(type(args), config, "args", f"cannot resume: '{folder / 'config.json'}'")
    defaults, merged = type(args)(), {}
    for field in dataclasses.fields(args):
        name, given, old = field.name, getattr(args, field.name), getattr(stored, field.name)
        if name in ("name", "resume"):
            merged[name] = given
            continue
        flag = "--" + name.replace("_", "-")
        said = given != getattr(defaults, name) or _on_command_line(flag)
        if said and given != old and name not in free:
            raise ValueError(f"cannot resume '{folder}' with {flag} {given}: it was started with {old}")
        merged[name] = given if said else old
    return folder, dataclasses.replace(args, **{**merged, "name": folder.name})


def _on_command_line(flag: str) -> bool:
    given = {argument.partition("=")[0].replace("_", "-") for argument in sys.argv[1:]}
    return not given.isdisjoint((flag, f"--no-{flag[2:]}"))


def from_json(kind: type, config: Any, name: str, what: str) -> Any:
    """`config[name]` as the dataclass that it was before `train.files.plain`; missing fields keep their defaults.

    Raises ValueError, which begins with `what`, if it is something else.
    """
    kinds = typing.get_type_hints(kind)
    try:
        return kind(**{field: _field(value, kinds[field]) for field, value in config[name].items()})
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{what} does not fit: expected '{name}' with the fields {', '.join(kinds)}") from None


def _field(value: Any, kind: Any) -> Any:
    """`value` in the type of its field: a class, or a union of classes; TypeError if it fits none of them."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for option in (typing.get_origin(option) or option for option in options):
        if option is Path and isinstance(value, str):
            return Path(value)
        if option is tuple and isinstance(value, list):
            return tuple(value)
        if option is float and (type(value) is int or value in ("NaN", "Infinity", "-Infinity")):
            return float(value)
        if not isinstance(option, type) or type(value) is option:
            return value
    raise TypeError(f"{value!r} is no {kind}")


def check_same(what: str, stored: Any, now: Any) -> None:
    """Raise ValueError naming the first entry of `now` (nested dicts of JSON) that is another in `stored`."""
    for name, value in now.items():
        old = stored.get(name) if isinstance(stored, dict) else None
        if isinstance(value, dict):
            check_same(f"{what} {name}", old, value)
        elif old != value:
            raise ValueError(f"{what} {name} {old}, expected {value}")


def new_folder(root: Path, name: str | None) -> Path:
    """Make the folder of a new run, named by the time of day unless told otherwise.

    Raises:
        ValueError: a run of that name exists already.
    """
    if name is not None and (Path(name).name != name or name in ("", ".", "..")):
        raise ValueError(f"--name '{name}' is not the name of a folder")
    root.mkdir(parents=True, exist_ok=True)
    if name is not None:
        try:
            (root / name).mkdir()
        except FileExistsError:
            raise ValueError(
                f"'{root / name}' exists already; continue it with --resume or choose another --name"
            ) from None
        return root / name
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ["", *(f"_{i}" for i in range(2, 1000))]:
        try:
            (root / (stamp + suffix)).mkdir()
            return root / (stamp + suffix)
        except FileExistsError:
            continue
    raise ValueError(f"no free name for a run in '{root}'")


def _latest(root: Path) -> Path:
    runs = sorted(root.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError(f"nothing to resume: no run in '{root}'")
    return runs[-1].parent
