"""The command line of an experiment: sub-commands, presets, resuming, one-line errors, stopping on request."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from train.run import compiler, flags, resume
from train.scale import launch

PLACES = ("data", "tokenizer", "weights")
"""Flags of a name or a path, "SOURCE,TARGET" too."""


DASHES = "\u2010\u2011\u2012\u2013\u2014\u2212"
"""Typeset hyphens, of a command that was copied from a page."""


class Command(NamedTuple):
    """A dataclass that a command line is parsed into, and the function that it calls.

    `presets` are the defaults of the arguments: by the name that `--preset` gives, or a function of the flags on the
    command line, {"preset": "tiny", ...}. A plain `(Args, function)` will do where there are none.
    """

    args: type
    function: Callable[[Any], None]
    presets: Mapping[str, Any] | Callable[[dict[str, str]], Any] | None = None


class Interrupted(KeyboardInterrupt):
    """A signal that ends the program; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def run(description: str, default: tuple, *, root: Path | None = None, **others: tuple) -> None:
    """Parse the command line and call what it asks for; the body of an experiment's `if __name__ == "__main__"`.

    Args:
        description: the head of `--help`.
        default: the `Command`, or (dataclass of arguments, function), for a command line without a sub-command.
        root: folder of the experiment's runs. With `--resume`, the defaults are the arguments of the run to continue.
        others: the same as `default` for each sub-command, by name.

    User errors (a ValueError or OSError of the command, a wrong flag) print one line on stderr and exit with code 2;
    with FUNCTREE_DEBUG=1 in the environment they keep their traceback. Outside of a `Stop`, SIGINT, SIGTERM and SIGHUP
    exit with 130, 143 and 129. Of the processes of a launcher (torchrun), the first prints, and all exit with the code.
    """
    print_any_text()
    os.environ["MPLBACKEND"] = "agg"  # a script draws files; a notebook's backend, inherited from it, is not to be had
    argv = sys.argv[1:]
    name = argv[0] if argv and argv[0] in others else None
    command = Command(*(others[name] if name else default))
    if name:
        description = _of_command(description, name, command)
    elif others:
        lines = (f"    {other:12}{_summary(Command(*entry))}" for other, entry in others.items())
        description += "\n\nSub-commands, each with a --help of its own:\n\n" + "\n".join(lines)
    words = (program() or os.path.basename(sys.argv[0])) + (f" {name}" if name else "")
    previous = {number: signal.getsignal(number) for number in _signals()}
    for number in previous:
        signal.signal(number, _interrupt)
    processes = None
    try:
        processes = launch.current()
        if processes:
            launch.check_trains(name)
            launch.quiet(processes)
        if argv and not name and others and not argv[0].startswith("-"):
            dash = "; flags begin with two hyphens" if argv[0][0] in DASHES else ""
            commands = f"expected flags, or one of the sub-commands {', '.join(others)}"
            raise ValueError(f"'{argv[0]}' is unknown; {commands}{dash}")
        argv = argv[1:] if name else argv
        argv = _with_paths(command.args, argv)
        if processes and processes.restarts and root and not name:
            argv = _after_restart(argv, processes.first(lambda: resume.begun_by_launcher(root)))
        args = _parse(command.args, words, description, argv, _defaults(command, argv, root))
        flags.check(args)
        if getattr(getattr(args, "common", args), "compile", False):
            compiler.configure()
        command.function(args)
    except BrokenPipeError:  # whoever read our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get("FUNCTREE_DEBUG"):
            raise
        if processes:
            _end_together(processes.fail(_one_line(error)))
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not processes or not processes.is_of_a_collective(error) or os.environ.get("FUNCTREE_DEBUG"):
            raise
        _end_together(processes.fail(f"another process has gone ({_one_line(error)[:200]})", lost=True))
    except KeyboardInterrupt as interruption:
        print("interrupted", file=sys.stderr)
        code = 128 + getattr(interruption, "number", signal.SIGINT)
        _leave_threads_behind(code)
        sys.exit(code)
    finally:
        if processes:
            processes.close()
        _restore(previous)


def _end_together(line: str | None) -> NoReturn:
    """Print the line, if it is this process's to print, and end at once with exit code 2: threads that still talk to a
    process that has gone are not waited for, and a launcher that ends all of them comes too late."""
    if line is not None:
        print(f"error: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def _leave_threads_behind(code: int, seconds: float = 5.0) -> None:
    """End the process some seconds after its main thread, whatever other threads still wait for.

    Python waits for them, and a thread that writes a checkpoint waits five minutes for a main thread that was
    interrupted before its answer.
    """
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if all(thread.daemon for thread in others):
        return

    def end() -> None:
        threading.main_thread().join()
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()


def print_any_text() -> None:
    """Letters that the encoding of stdout lacks (under LC_ALL=C, or PYTHONIOENCODING) are printed as \\u4eca."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and (out.errors == "strict" or out.encoding.lower() != "utf-8"):
        out.reconfigure(errors="backslashreplace")


def _summary(command: Command) -> str:
    """The first paragraph of the docstring of what a command calls."""
    function = getattr(command.function, "func", command.function)  # of a functools.partial
    return " ".join((function.__doc__ or "").partition("\n\n")[0].split())


def _of_command(description: str, name: str, command: Command) -> str:
    """The head of a sub-command's --help: its summary, and the lines of the script's examples that show it."""
    lines = [line for line in description.splitlines() if re.match(rf" +python \S+ {name}\b", line)]
    return "\n\n".join([_summary(command), "\n".join(lines)])


def program() -> str | None:
    """The words `functree NAME`, if `experiments/__main__.py` started the script; else None."""
    return getattr(sys.modules["__main__"], "PROGRAM", None)


def _restore(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not from Python


def _signals() -> list[int]:
    """The signals that end a run, except those that whoever started the program made it ignore, as nohup does."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _interrupt(number, frame):
    raise Interrupted(number)


def _with_paths(kind: type, argv: list[str]) -> list[str]:
    """The command line with the home folder in place of `~`, which a shell leaves alone after `=`, `,` and in quotes.

    Raises ValueError for a path that is empty, as an unset variable of a shell is: it would be the current folder.
    """
    hints, out = typing.get_type_hints(kind), [*argv, "--"]
    for i, (word, following) in enumerate(itertools.pairwise(out)):
        flag, equals, value = word.partition("=")
        name, value = flag[2:].replace("-", "_"), value if equals else following
        is_path = Path in (hints.get(name), *typing.get_args(hints.get(name)))
        if not flag.startswith("--") or not (is_path or name in PLACES):
            continue
        if is_path and not value:
            raise ValueError(f"{flag} is empty; expected a path")
        home = ",".join(map(os.path.expanduser, [value] if is_path else value.split(",")))
        out[i if equals else i + 1] = f"{flag}={home}" if equals else home
    return out[:-1]


def _words(argv: list[str]) -> dict[str, str]:
    """{field: word} of the flags on a command line; a switch has the word ""."""
    words = {}
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            words[name.replace("-", "_")] = value if equals else "" if following.startswith("--") else following
    return words


def _after_restart(argv: list[str], begun: str | None) -> list[str]:
    """The command line that continues the run which was `begun` before a launcher started its processes anew."""
    words = _words(argv)
    if begun is None or "resume" in words:
        return argv
    return [*argv, "--resume"] if "name" in words else [*argv, "--resume", "--name", begun]


def _defaults(command: Command, argv: list[str], root: Path | None) -> Any:
    """The defaults of the arguments: those of the run to continue, or of a preset; None for the dataclass's own."""
    words = _words(argv)
    if root is not None and "resume" in words and "help" not in words:
        folder = resume.folder_to_resume(root, words.get("name"))
        args = resume.stored_args(folder, command.args, root.name)
        common = dataclasses.replace(args.common, name=folder.name, resume=True)
        return dataclasses.replace(args, common=common)
    if isinstance(command.presets, Mapping):
        return command.presets.get(words.get("preset", ""))
    return command.presets(words) if command.presets else None


def _parse(kind: type, program: str, description: str, argv: list[str], default: Any) -> Any:
    import tyro

    if {"-h", "--help"} & set(argv):  # ahead of tyro's, which would not wrap it
        print(_fitted(description, shutil.get_terminal_size().columns), end="\n\n")
    options = {"prog": program, "description": " ", "args": argv}
    if default is not None:
        options["default"] = default
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    error = _condensed(errors.getvalue())
    if error in ("Unrecognized options: True", "Unrecognized options: False"):
        error += "; a switch has no value: --NAME switches it on, --no-NAME off"
    unknown = re.match(r"Unrecognized options: --([\w-]+)", error)
    if unknown and (here := flags.called_here(unknown[1], kind)):
        error = f"{unknown[0]}; this script has {here}"
    raise ValueError(error)


def _fitted(text: str, width: int) -> str:
    """A description in lines of up to `width` columns: prose is wrapped, and the remark beside an example, after two
    spaces or more, goes to the next line where both are too long for one."""
    lines = []
    for paragraph in re.split(r"\n(?: *\n)+", text.strip("\n")):
        if not paragraph.startswith(" "):
            lines += [*textwrap.wrap(paragraph, width), ""]
            continue
        for line in paragraph.splitlines():
            example, remark = re.fullmatch(r"( *\S.*?)(?: {2,}(\S.*))?", line).groups()
            if len(line) <= width or not remark:
                lines.append(line)
            else:
                lines += [example, *textwrap.wrap(remark, width, initial_indent=" " * 8, subsequent_indent=" " * 8)]
        lines.append("")
    return "\n".join(lines).strip("\n")


def _condensed(box: str) -> str:
    """tyro's box of an error as one line, without its title and its hint at `--help`."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    lines = [line for line in lines if line.strip("─-")][1:]
    ends = ("For full helptext", "Argument helptext", "╰")
    return " ".join(itertools.takewhile(lambda line: not line.startswith(ends), lines))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        # What fails without a path is a write to an open file.
        return f"'{error.filename}': {error.strerror}" if error.filename else f"cannot write: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def device(name: str) -> torch.device:
    """The device of a `--device` flag, checked to be there.

    Raises:
        ValueError: no such device, or none on this machine.
    """
    try:
        place = torch.device(name)
        torch.zeros((), device=place).item()  # meta tensors can be made but have no values
    except Exception as error:  # each kind of device that is not there raises its own
        available = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        available += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"--device '{name}' cannot be used; available here: {', '.join(available)}") from error
    return place


class Stop:
    """Context in which SIGINT (Ctrl-C), SIGTERM and SIGHUP only set `requested`, so that a loop can save and end.

    A second signal raises `Interrupted`. A signal that the program was started to ignore, as by nohup, stays ignored.
    With `patient`, later signals are not heeded: a launcher sends a process those that its terminal has sent already.
    """

    def __init__(self, patient: bool = False):
        self.signal: int | None = None
        self._patient = patient

    @property
    def requested(self) -> bool:
        """True once a signal has asked to stop."""
        return self.signal is not None

    def _request(self, number, frame):
        if self.requested and self._patient:
            return
        if self.requested:
            raise Interrupted(number)
        self.signal = number
        # Not print: the signal may have interrupted one, and a stream does not let itself be entered twice. Whoever
        # hangs up has closed the terminal.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step (once more: at once)\n")

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._request) for number in _signals()}
        return self

    def __exit__(self, kind, error, traceback):
        _restore(self._previous)
        # The signal also reaches the compiler's own processes; that they died of it is not an error of the run. A full
        # disk while saving is one.
        if self.requested and isinstance(error, Exception) and not isinstance(error, (ValueError, OSError)):
            raise Interrupted(self.signal) from error
