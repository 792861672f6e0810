"""Checkpoints: a whole tree of tensors on disk, written by orbax in the background.

`<directory>/<step>/` is one checkpoint, holding two orbax items:

- `state`: the leaves as a flat {dotted name: array}, so that nothing depends on a Python type;
- `manifest`: JSON with the shape, dtype and CRC-32 of each leaf, the config, the command line, the metrics, and a
  CRC-32 of all of these.

A checkpoint is written under another name and renamed when it is complete, so a folder named by a plain number is
always a finished one, whenever the process is killed.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from core import tree
from core.tree import Tree
from train.files import plain, replacing
from train.run import checkpoint_storage as storage
from train.run.checkpoint_storage import CheckpointError, Damaged

FORMAT = "functree checkpoint 2"
# Folders on their way to a plain number or to nothing; the first suffix is orbax's own.
UNFINISHED, REPLACEMENT, DISCARDED = LEFTOVERS = (".orbax-checkpoint-tmp", ".replacement", ".discarded")


class Record(NamedTuple):
    """The manifest of a checkpoint; `leaves` is {name: {"dtype", "shape", "crc32"}}."""

    step: int
    config: Any
    argv: list[str]
    metrics: dict[str, Any]
    leaves: dict[str, dict]


class Checkpoints:
    """The checkpoints of one run, being written.

    A context manager: leaving it waits for the last save.

    Args:
        directory: the folder of the checkpoints, made if missing.
        config: anything that `train.files.plain` turns into JSON; kept in each checkpoint.
        resume: the step this run continues from, None for a new run. Later checkpoints in the folder belong to another
            history; they go once the first checkpoint of this run is safe.
        keep_last: how many of the newest checkpoints stay.
        best: the name of the metric whose best checkpoint stays too, None for none.
        best_mode: "min" or "max".
        keep_every: checkpoints of steps that this divides stay, None for none.
        argv: the command line to keep, `sys.argv` if None.

    Raises CheckpointError if the directory cannot be used, or holds checkpoints and `resume` is None.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        config: Any = None,
        *,
        resume: int | None = None,
        keep_last: int = 3,
        best: str | None = None,
        best_mode: str = "min",
        keep_every: int | None = None,
        argv: list[str] | None = None,
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, but at least one checkpoint must stay")
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode is {best_mode!r}, expected 'min' or 'max'")
        self.directory = Path(directory).absolute()
        self._config, self._argv = plain(config), list(sys.argv if argv is None else argv)
        self._keep_last, self._best, self._best_mode, self._keep_every = keep_last, best, best_mode, keep_every
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the checkpoint folder {directory}: {error.strerror}") from None
        present = steps(self.directory)
        if present and resume is None:
            raise CheckpointError(
                f"{directory} holds checkpoints of another run (newest: step {present[-1]}): continue that run or "
                "choose another folder"
            )
        self._foreign = {step for step in present if resume is not None and step > resume}
        self._clear_leftovers()
        self._writer = None
        self._pending: tuple[int, Path] | None = None
        self._quiet = storage.Quiet()

    def save(self, step: int, state: Tree, metrics: dict[str, Any] | None = None, wait: bool = False) -> None:
        """Write `state` as the checkpoint of `step`; a checkpoint of that step is replaced.

        The leaves are copied to host memory before this returns, so the next training step may overwrite them. The rest
        happens in a thread; an error there is raised by the next `save`, `wait` or `close`.

        Args:
            state: any tree of tensors.
            metrics: numbers to keep with it, among them the one that `best` names.
            wait: return only when the checkpoint is on disk.

        Raises CheckpointError if it cannot be written (full disk ...); the checkpoints written before stay.
        """
        step = int(step)
        if step < 0:
            raise ValueError(f"step is {step}, expected 0 or more")
        self.wait()
        try:
            flat = tree.flatten(state)
        except ValueError as error:
            raise CheckpointError(f"cannot save the state: {error}") from None
        arrays = {name: storage.to_array(name, leaf) for name, leaf in flat.items()}
        manifest = {
            "format": FORMAT,
            "step": step,
            "config": self._config,
            "argv": self._argv,
            "metrics": plain(metrics or {}),
            "leaves": {name: storage.describe(array) for name, array in arrays.items()},
        }
        manifest["crc32"] = _checksum(manifest)
        # Orbax refuses arrays without elements; the manifest alone says all there is to say of them.
        stored = {name: array for name, array in arrays.items() if array.size}
        if not stored:
            raise CheckpointError("cannot save the state: it holds no numbers")

        if self._writer is None:
            self._writer = storage.writer()
        target = self.directory / str(step)
        if target.exists():
            target, wait = target.with_name(target.name + REPLACEMENT), True
        self._pending = (step, target)
        self._quiet.on()
        try:
            storage.start_write(self._writer, target, stored, manifest)
        except Exception as error:
            self._fail(error)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Block until the running save is on disk, then drop the checkpoints that need not stay.

        Raises CheckpointError if that save failed.
        """
        if self._pending is None:
            return
        step, target = self._pending
        try:
            self._writer.wait_until_finished()
            if not target.is_dir():
                raise OSError(errno.ENOENT, "the finished folder has disappeared")
            if target.name.endswith(REPLACEMENT):
                _discard(self.directory / str(step))
                target.rename(self.directory / str(step))
        except Exception as error:
            self._fail(error)
        self._quiet.off()
        self._pending = None
        for other in self._foreign - {step}:
            _discard(self.directory / str(other))
        self._foreign = set()
        self._drop_old()

    def close(self) -> None:
        """Wait for the running save and end the background thread."""
        try:
            self.wait()
        finally:
            writer, self._writer = self._writer, None
            if writer is not None:
                # What it may still say of a failed save has been raised above.
                with self._quiet, contextlib.suppress(Exception):
                    writer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def _fail(self, error: Exception) -> None:
        """Clear up after a failed save and raise it as one line."""
        (step, _), self._pending = self._pending, None
        self._quiet.off()
        self._clear_leftovers()
        last = latest(self.directory)
        safe = "there is no earlier one" if last is None else f"the last good one is step {last}"
        raise CheckpointError(
            f"cannot write checkpoint {self.directory / str(step)}: {storage.reason(error)}; {safe}"
        ) from None

    def _clear_leftovers(self) -> None:
        for path in self.directory.iterdir():
            if any(suffix in path.name for suffix in LEFTOVERS):
                shutil.rmtree(path, ignore_errors=True)

    def _drop_old(self) -> None:
        present = steps(self.directory)
        keep = set(present[-self._keep_last :])
        if self._best:
            keep.add(best(self.directory, self._best, self._best_mode))
        if self._keep_every:
            keep.update(step for step in present if step % self._keep_every == 0)
        for step in present:
            if step not in keep:
                _discard(self.directory / str(step))


def steps(directory: str | os.PathLike) -> list[int]:
    """The steps that have a checkpoint, ascending; [] if the directory does not exist."""
    try:
        entries = list(os.scandir(directory))
    except OSError:
        return []
    # isdecimal alone accepts other alphabets' digits and leading zeros.
    return sorted(int(e.name) for e in entries if e.name.isdecimal() and str(int(e.name)) == e.name and e.is_dir())


def latest(directory: str | os.PathLike) -> int | None:
    """The newest step that has a checkpoint, None if there is none."""
    present = steps(directory)
    return present[-1] if present else None


def best(directory: str | os.PathLike, metric: str, mode: str = "min") -> int | None:
    """The step whose checkpoint has the best finite value of a metric (of equal ones the earliest), None if none has.

    Checkpoints whose manifest cannot be read do not count.
    """
    values = {}
    for step in steps(directory):
        try:
            value = read_record(directory, step).metrics.get(metric)
        except CheckpointError:
            continue
        if isinstance(value, (int, float)) and math.isfinite(value):
            values[step] = value
    return {"min": min, "max": max}[mode](values, key=values.get) if values else None


def read_record(directory: str | os.PathLike, step: int | None = None) -> Record:
    """Step, config, argv, metrics and the table of leaves of a checkpoint (the newest if `step` is None).

    Raises CheckpointError if there is none or its manifest cannot be read.
    """
    folder = _folder(directory, step)
    path = folder / "manifest" / "metadata"
    foreign = f"{folder} is not a checkpoint of functree"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Damaged(f"{foreign}, or is damaged: it has no manifest/metadata") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{folder} is damaged: cannot read its manifest/metadata ({storage.reason(error)})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        version = manifest.get("format") if isinstance(manifest, dict) else None
        raise Damaged(f"{foreign}: its manifest says format {version!r}, expected {FORMAT!r}")
    if manifest.get("crc32") != _checksum(manifest):
        raise Damaged(f"{folder} is damaged: its manifest is not what was written (wrong checksum)")
    try:
        record = Record(*(manifest[field] for field in Record._fields))
        for leaf in record.leaves.values():
            leaf["dtype"], leaf["crc32"], tuple(leaf["shape"])
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder} is damaged: its manifest is incomplete ({storage.reason(error)})") from None
    return record


def _checksum(manifest: dict) -> int:
    """CRC-32 of a manifest without its own."""
    rest = {name: value for name, value in manifest.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def read_config(directory: str | os.PathLike, step: int | None = None) -> Any:
    """The config that was saved with a checkpoint (the newest if `step` is None), as plain JSON data."""
    return read_record(directory, step).config


def restore(directory: str | os.PathLike, like: Tree, step: int | None = None, part: str = "") -> Tree:
    """Read a checkpoint into the structure of `like`.

    Args:
        like: the template: a tree of tensors (values are not used; meta tensors will do) or of Param and Stat. Leaves
            come back on the device of their template, those of a meta tensor or a Param on the CPU.
        step: the newest if None.
        part: the dotted path of the subtree that `like` describes, "" for the whole state: `part="params"` reads the
            parameters of a TrainState and nothing else.

    Returns:
        Tensors in the template's structure (NamedTuple types too), dict keys sorted.

    Raises CheckpointError: there is no checkpoint; it is damaged (if `step` is None the error names the newest intact
    one, it is not taken silently); or it does not fit, naming the first leaf that differs.
    """
    folder = _folder(directory, step)
    try:
        leaves = read_record(directory, step).leaves
        template = tree.flatten(like)
        path = {name: f"{part}.{name}" if part and name else part or name for name in template}
        prefix = f"{part}." if part else ""
        stored = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
        if part in leaves:
            stored[""] = leaves[part]
        storage.check_fits(folder, stored, template, part)
        arrays = storage.read_arrays(folder, {path[name]: stored[name] for name in template})
    except Damaged as error:
        raise CheckpointError(f"{error}{_advice(directory) if step is None else ''}") from None
    flat = {name: storage.to_tensor(arrays[path[name]], leaf) for name, leaf in template.items()}
    return tree.sort(tree.nest(flat, like=like))


def _folder(directory: str | os.PathLike, step: int | None) -> Path:
    """The folder of a step, or of the newest; CheckpointError if it is not there."""
    directory = Path(directory)
    if not directory.is_dir():
        problem = "is a file, expected a folder" if directory.exists() else "does not exist, expected a folder"
        raise CheckpointError(f"{directory} {problem} with checkpoints named by their step")
    present = steps(directory)
    if not present:
        raise CheckpointError(f"no checkpoint in {directory}: expected folders named by their step")
    if step is not None and step not in present:
        raise CheckpointError(f"no checkpoint of step {step} in {directory}: it has {', '.join(map(str, present))}")
    return directory / str(present[-1] if step is None else step)


def _advice(directory: str | os.PathLike) -> str:
    """Advice for an error: the checkpoint to take instead of the newest."""
    for step in reversed(steps(directory)[:-1]):
        try:
            verify(directory, step)
        except CheckpointError:
            continue
        return f"; step {step} is intact: choose it with step={step}, or remove the damaged folder"
    return "; no older checkpoint is intact"


def _discard(folder: Path) -> None:
    """Delete a checkpoint; killed half way, it leaves nothing that is named like one."""
    if folder.exists():
        condemned = folder.with_name(folder.name + DISCARDED)
        shutil.rmtree(condemned, ignore_errors=True)
        folder.rename(condemned)
        shutil.rmtree(condemned, ignore_errors=True)


def verify(directory: str | os.PathLike, step: int | None = None) -> None:
    """Read a checkpoint whole and compare its checksums. Raises CheckpointError if anything is wrong."""
    storage.read_arrays(_folder(directory, step), read_record(directory, step).leaves)


def export_params(path: str | os.PathLike, params: Tree, metadata: dict[str, str] | None = None) -> None:
    """Write a tree of tensors as one safetensors file under its dotted names; atomic."""
    from safetensors.torch import save_file

    flat = {name: leaf.detach().cpu().clone().contiguous() for name, leaf in tree.flatten(params).items()}
    try:
        with replacing(path) as temporary:
            save_file(flat, temporary, metadata=metadata)
    except Exception as error:
        raise CheckpointError(f"cannot write {path}: {storage.reason(error)}") from None


def import_params(path: str | os.PathLike, like: Tree = None) -> Tree:
    """Read a safetensors file into nested dicts and lists (`core.tree.nest`), or into the structure of `like`.

    Raises CheckpointError if the file cannot be read or does not fit `like`, naming the first leaf that differs.
    """
    from safetensors.torch import load_file

    try:
        flat = load_file(path)
    except Exception as error:
        raise CheckpointError(f"cannot read {path} as a safetensors file: {storage.reason(error)}") from None
    if like is None:
        return tree.nest(flat)
    stored = {name: {"shape": list(x.shape), "dtype": storage.dtype_name(x)} for name, x in flat.items()}
    storage.check_fits(path, stored, tree.flatten(like), "")
    return tree.sort(tree.nest(flat, like=like))
