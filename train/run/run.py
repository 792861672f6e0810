"""The run of an experiment: its folder, how it begins or resumes, what it records, how it ends.

The loop itself stays in the experiment:

    origin, args = runs.begin(RUNS, args, free=("steps", ...))  # a new run, or the one that --resume continues
    state = runs.restore(origin, state, identity, args.steps)  # as it was made, or the last checkpoint
    with runs.opened(origin, config, total=args.steps) as run:  # its folder, log, checkpoints, and Ctrl-C
        for at, batch in enumerate(batches(range(run.first, args.steps)), run.first + 1):
            ...

experiments/README.md has the whole of it.
"""

import contextlib
import dataclasses
import json
import shlex
import shutil
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import spec, tree
from core.tree import Tree
from train.files import plain
from train.run import checkpoints
from train.run.checkpoints import Checkpoints, Record
from train.run.command_line import Stop
from train.run.logs import RunLog


class Origin(NamedTuple):
    """Where a run begins.

    `folder` is None for a new run, which `opened` makes under `root` as `name` (None: date and time). `record` is what
    the newest checkpoint says of itself; None for a new run, or one that was stopped before its first checkpoint.
    """

    root: Path
    name: str | None
    folder: Path | None = None
    record: Record | None = None


class Run(NamedTuple):
    """A run that is under way; `opened` gives it."""

    folder: Path
    log: RunLog
    saved: Checkpoints
    stop: Stop
    first: int  # steps done before: the loop begins with step `first + 1`
    began: float  # where time.perf_counter would have stood at step 0


def begin(root: Path, args: Any, free: tuple[str, ...]) -> tuple[Origin, Any]:
    """The run that the command line asks for: a new one under `root`, or with `args.resume` the one to continue.

    Args:
        args: a dataclass with the fields `name` (str or None) and `resume` (bool).
        free: fields that a resumed run may be given anew; any other must be as the run was started.

    Returns:
        (origin, arguments): the arguments of a resumed run are those it was started with, but for what is said anew.

    Raises:
        ValueError: there is nothing to resume, its newest checkpoint is damaged, or a flag contradicts the run.
    """
    if not args.resume:
        return Origin(root, args.name), args
    folder, args = resume(root, args, free)
    record = checkpoints.read_record(folder / "checkpoints") if checkpoints.steps(folder / "checkpoints") else None
    return Origin(root, args.name, folder, record), args


def restore(origin: Origin, state: Tree, identity: Mapping[str, Any], steps: int) -> Tree:
    """The state of the newest checkpoint, in the structure and on the device of `state`; `state` if there is none.

    Args:
        identity: what must be in the checkpoint's config as it is now: the net, the size of the data ...
        steps: how many the run is to have at its end.

    Raises:
        ValueError: the checkpoint is of another net or other data, is of a later step, or is damaged.
    """
    if origin.record is None:
        return state
    check_same(f"cannot resume '{origin.folder}': its checkpoint has", origin.record.config, plain(identity))
    if origin.record.step > steps:
        raise ValueError(f"--steps is {steps}, but '{origin.folder}' has done {origin.record.step}")
    return checkpoints.restore(origin.folder / "checkpoints", state, origin.record.step)


@contextlib.contextmanager
def opened(
    origin: Origin,
    config: Mapping[str, Any],
    *,
    total: int,
    unit: str = "examples",
    best: str | None = None,
    files: Mapping[str, Callable[[Path], Any]] | None = None,
) -> Iterator[Run]:
    """Context in which a run is under way; leaving it waits for the last checkpoint and closes the log.

    Args:
        config: goes into `config.json` and each checkpoint; its entry "args" is what `begin` reads.
        total: the run's number of steps.
        unit: what the log counts ("tokens", "examples").
        best: the metric whose best checkpoint stays beside the last ones, None for none.
        files: {name: function that writes it}: what a new run's folder must hold from its beginning.

    If a new run cannot begin (a full disk ...), its folder is removed again. Ctrl-C and SIGTERM only set
    `run.stop.requested`, so that the loop can save and end.

    Raises:
        ValueError: a run of that name exists already.
        OSError, CheckpointError: the folder cannot be written.
    """
    record = origin.record
    first, spent = (record.step, record.metrics["seconds"]) if record else (0, 0.0)
    resumed = first if origin.folder else None
    with contextlib.ExitStack() as undo:
        folder = origin.folder
        if folder is None:
            folder = new_folder(origin.root, origin.name)
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            for name, write in (files or {}).items():
                write(folder / name)
        saved = Checkpoints(folder / "checkpoints", config, resume=resumed, best=best)
        log = RunLog(folder, config, total=total, unit=unit, resume=resumed)
        undo.pop_all()  # from here on the run may be resumed
    with Stop() as stop, log, saved:
        yield Run(folder, log, saved, stop, first, time.perf_counter() - spent)


def seconds(run: Run) -> float:
    """How long the run has trained, with the time before it was resumed."""
    return time.perf_counter() - run.began


def save(run: Run, step: int, state: Tree, **metrics: float) -> None:
    """Write a checkpoint with the time spent so far, and metrics such as the one that `best` names."""
    run.saved.save(step, state, {"seconds": seconds(run), **metrics})


def check_finite(run: Run, step: int, metrics: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a metric of a step is not finite, with all of them and the checkpoint to go back to.

    Args:
        metrics: {name: () or, from a step under vmap, (members,)}.
    """
    finite = torch.stack(list(metrics.values())).isfinite().all(0)
    if finite.all():
        return
    run.saved.wait()
    kept = checkpoints.latest(run.folder / "checkpoints")
    where = f"the last good checkpoint is that of step {kept}" if kept else "there is no checkpoint yet"
    member = int(finite.int().argmin())
    who = f"step {step} of member {member}" if finite.ndim else f"step {step}"
    found = ", ".join(f"{name} {values.flatten()[member]:g}" for name, values in metrics.items())
    raise ValueError(f"{who} is not finite ({found}); stopped, {where}")


def stopped(run: Run, step: int) -> bool:
    """Whether Ctrl-C or SIGTERM ended the loop after `step`; if so, say how to continue."""
    if run.stop.requested:
        run.saved.wait()
        again = shlex.join(["python", sys.argv[0], "--resume", "--name", run.folder.name])
        run.log.print(f"stopped at step {step}; continue with: {again}")
    return run.stop.requested


def read_config(folder: Path, name: str, kind: type) -> Any:
    """The entry `name` of the configuration of a run, from its newest checkpoint, as the dataclass it was.

    Raises:
        ValueError: there is no checkpoint, or the entry does not fit: it is of another experiment.
    """
    config = checkpoints.read_config(folder / "checkpoints")
    return from_json(kind, config, name, f"the configuration of '{folder}'")


def learned(folder: Path, model: Tree, part: str = "", *, averaged: bool = True, members: int = 1) -> Tree:
    """What the newest checkpoint of a run has for a model: its parameters and Stats, on the CPU.

    Args:
        model: as specified, of Param and Stat.
        part: the dotted path of its `train.step.TrainState` in the state of the run; "" if it is the state.
        averaged: the moving average of the parameters, by `optimizers.ema` with debias, instead of the parameters.
        members: if more than 1, the state is stacked, of so many that were trained at once; the first is taken.

    Raises CheckpointError: there is no checkpoint, or it is of another model, or damaged.
    """

    def read(like: Tree, name: str) -> Tree:
        name = f"{part}.{name}" if part else name
        if members == 1:
            return checkpoints.restore(folder / "checkpoints", like, part=name)
        stacked = tree.map(lambda leaf: leaf.expand(members, *leaf.shape), like)
        return tree.map(lambda leaf: leaf[0], checkpoints.restore(folder / "checkpoints", stacked, part=name))

    params, measured = spec.split(model, spec.abstract(model))
    if averaged:
        correction = read(torch.zeros((), device="meta"), "opt_state.correction")
        params = tree.map(lambda leaf: leaf / correction, read(params, "opt_state.average"))
    else:
        params = read(params, "params")
    return tree.merge(params, read(measured, "stats") if tree.leaves(measured) else measured)


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
