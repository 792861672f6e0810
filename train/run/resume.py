"""Runs on disk: which one `--resume` continues, what it was started with, and the net that a run has trained."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core import spec, tree
from core.tree import Tree
from train.files import plain
from train.run import checkpoints, flags
from train.scale import launch


def folder_to_resume(root: Path, name: str | None) -> Path:
    """The run called `name` under `root`, or the newest. Raises ValueError: there is none."""
    folder = root / name if name else newest(root)
    if not (folder / "config.json").exists():
        raise ValueError(f"nothing to resume: '{folder}' has no config.json; {_runs_of(root)}")
    return folder


def newest(root: Path) -> Path:
    """The run under `root` that was begun last. Raises ValueError: there is none."""
    folders = _folders(root)
    if not folders:
        raise ValueError(f"nothing to resume: no run in '{root}'")
    return folders[-1]


def begun_by_launcher(root: Path) -> str | None:
    """The name of the newest run that this launcher began before it started its processes anew; None for none."""
    for folder in reversed(_folders(root)):
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and config.get("launcher") == launch.identity():
            return folder.name
    return None


def _folders(root: Path) -> list[Path]:
    configs = sorted(root.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in configs]


def _runs_of(root: Path) -> str:
    names = [folder.name for folder in _folders(root)]
    return f"the runs in '{root}' are {', '.join(names[-9:])}" if names else f"there is no run in '{root}'"


def read_config(folder: Path, experiment: str) -> dict[str, Any]:
    """The `config.json` of a run. Raises ValueError: it cannot be read, or is of another experiment."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"'{folder}' is not the folder of a run: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' is not readable as a run's configuration") from error
    check_experiment(config, experiment, folder)
    return config


def check_experiment(config: Any, experiment: str, folder: Path) -> None:
    """Raise ValueError for a run of another experiment."""
    other = config.get("experiment") if isinstance(config, dict) else None
    if other is not None and other != experiment:
        raise ValueError(f"'{folder}' is a run of {other}.py, expected one of {experiment}.py")


def stored_args(folder: Path, kind: type, experiment: str) -> Any:
    """The arguments that a run was started with, as the dataclass `kind`.

    Raises ValueError: the configuration cannot be read, or is of another experiment or an older form of it.
    """
    config = read_config(folder, experiment)
    return from_json(kind, config, "args", f"'{folder / 'config.json'}'")


def changes(folder: Path, stored: Any, args: Any, free: tuple[str, ...]) -> list[str]:
    """Differences of a resumed run from its start, one line per flag.

    Raises ValueError: a flag that is not free contradicts the run.
    """
    before, lines = flags.values(stored), []
    for name, value in flags.values(args).items():
        old = before[name]
        if value == old or name in ("common.name", "common.resume"):
            continue
        if name.removeprefix("common.") not in free:
            raise ValueError(f"cannot resume '{folder}' with {flags.flag(name)} {value}: it was started with {old}")
        lines.append(f"resumed with {flags.flag(name)} {value} (it was started with {old})")
    return lines


class SavedRun(NamedTuple):
    """A run that has been trained, at one of its checkpoints; `open_run` gives it."""

    folder: Path
    step: int
    config: dict[str, Any]

    def read(self, name: str, kind: type) -> Any:
        """An entry of the configuration as the dataclass it was. Raises ValueError if it does not fit."""
        return from_json(kind, self.config, name, f"the configuration of '{self.folder}'")

    def restore(self, like: Tree, part: str = "") -> Tree:
        """A part of the checkpoint, as `train.run.checkpoints.restore`; leaves of a spec come on the CPU."""
        return checkpoints.restore(self.folder / "checkpoints", like, self.step, part)

    def learned(self, model: Tree, part: str = "", *, averaged: bool = True, members: int = 1) -> Tree:
        """A model's parameters and Stats, on the CPU.

        Args:
            model: its spec, of Param and Stat.
            part: the dotted path of its `train.step.TrainState` in the state of the run; "" if it is the state.
            averaged: the moving average of the parameters, by `optimizers.ema` with debias, instead of the parameters.
            members: if more than 1, the state is stacked, of that many members trained at once; the first is taken.

        Raises CheckpointError: the checkpoint is of another model, or damaged.
        """

        def read(like: Tree, name: str) -> Tree:
            name = f"{part}.{name}" if part else name
            if members == 1:
                return self.restore(like, name)
            return tree.map(lambda leaf: leaf[0], self.restore(tree.stack([like] * members), name))

        params, stats = spec.split(model, spec.abstract(model))
        if averaged:
            correction = read(torch.zeros((), device="meta"), "opt_state.correction")
            params = tree.map(lambda leaf: leaf / correction, read(params, "opt_state.average"))
        else:
            params = read(params, "params")
        return tree.merge(params, read(stats, "stats") if tree.leaves(stats) else stats)


def open_run(folder: Path, root: Path, checkpoint: str = "latest") -> SavedRun:
    """A run of the experiment whose runs are in `root`, for `--run FOLDER --checkpoint latest|best|STEP`.

    Raises ValueError, CheckpointError: it is no run (those there are are listed), or of another experiment, or has no
    such checkpoint.
    """
    saved = folder / "checkpoints"
    if not saved.is_dir():
        raise ValueError(f"'{folder}' is not the folder of a run; {_runs_of(root)}")
    config = checkpoints.read_config(saved)
    check_experiment(config, root.name, folder)
    if checkpoint == "latest":
        step = checkpoints.latest(saved)
    elif checkpoint == "best":
        metric = config.get("best")
        step = checkpoints.best(saved, metric) if metric else None
        if step is None:
            raise ValueError(f"--checkpoint best: '{folder}' keeps no best checkpoint; expected latest or a step")
    elif checkpoint.isdecimal():
        step = int(checkpoint)
        config = checkpoints.read_config(saved, step)
    else:
        raise ValueError(f"--checkpoint '{checkpoint}' is unknown; expected latest, best or a step")
    return SavedRun(folder, step, config)


def from_json(kind: type, config: Any, name: str, what: str) -> Any:
    """`config[name]` as the dataclass that it was before `train.files.plain`; missing fields keep their defaults.

    Raises ValueError, which begins with `what`, if it is something else.
    """
    try:
        return _dataclass(config[name], kind)
    except (KeyError, TypeError, AttributeError):
        fields = [field.name for field in dataclasses.fields(kind)]
        values = config.get(name) if isinstance(config, dict) else None
        unknown = [field for field in values if field not in fields] if isinstance(values, dict) else []
        problem = f"; it has '{unknown[0]}'" if unknown else ""
        expected = f"expected '{name}' with the fields {', '.join(fields)}"
        raise ValueError(f"{what} does not fit: {expected}{problem}") from None


def _dataclass(values: Mapping[str, Any], kind: type) -> Any:
    kinds = typing.get_type_hints(kind)
    return kind(**{field: _field(value, kinds[field]) for field, value in values.items()})


def _field(value: Any, kind: Any) -> Any:
    """`value` in the type of its field: a class, or a union of classes; TypeError if it fits none of them."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            if value in typing.get_args(option):
                return value
            continue
        option = typing.get_origin(option) or option
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return _dataclass(value, option)
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
    """Raise ValueError naming the first entry of `now` (nested dicts of JSON) that is different in `stored`."""
    for name, value in now.items():
        old = stored.get(name) if isinstance(stored, dict) else None
        if isinstance(value, dict):
            check_same(f"{what} {name}", old, value)
        elif old != value:
            raise ValueError(f"{what} {name} {old}, expected {value}")


def check_identity(folder: Path, config: Any, identity: Mapping[str, Any]) -> None:
    """Raise ValueError unless the configuration of a run's checkpoint has this identity: the net, the data ..."""
    check_same(f"cannot resume '{folder}': its checkpoint has", config, plain(identity))
