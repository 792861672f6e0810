"""One pass over a whole data set, accumulating a function's values per example in constant memory.

    def scores(batch):  # compiled or not; every batch has the same shape
        out = reports(loss, params, batch)
        return {"loss": out.losses, "norm": out.total_norm}

    accumulators = {"norm": {"moments": moments(), "hardest": top(16)}}
    streamed = stream(scores, data, 500, accumulators, keep=("norm",), folder=folder)
    streamed.results["norm"]["hardest"].indices  # (16,)
    streamed.kept["norm"]  # (examples,), from the file norm.npy

With a folder the pass can be stopped, or killed, and resumed: it ends with the same bits.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from core import tree
from core.accumulators import Accumulator
from core.tree import Tree
from train.data.batching import evaluation_batches
from train.files import naming, plain, replacing
from train.run.command_line import Stop
from train.run.resume import check_same

STATE = "stream.safetensors"
HASHED = 4096  # examples at a time


class Streamed(NamedTuple):
    """Results of a pass over data.

    Attributes:
        results: `results[quantity][label]` is the result of that accumulator.
        kept: `kept[quantity]` is an array (examples, ...), read from its file where there is a folder.
    """

    results: dict[str, dict[str, Any]]
    kept: dict[str, np.ndarray]


def stream(
    function: Callable[[Tree], Mapping[str, Tree]],
    data: Tree,
    batch: int,
    accumulators: Mapping[str, Mapping[str, Accumulator]] | None = None,
    *,
    keep: Sequence[str] = (),
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    every: float = 30.0,
    title: str = "stream",
    quiet: bool = False,
) -> Streamed:
    """Run `function` over all examples in order, and accumulate or keep its values.

    Args:
        function: `function(batch) -> {quantity: values}`, values with leading axis N (for `moments`, a tree of such).
            The values of an example must not depend on the others: the last batch is filled up with copies of the last
            example, whose values are dropped.
        data: a tree of tensors with leading axis `examples`.
        batch: N.
        accumulators: {quantity: {label: accumulator}}, from `core.accumulators`; they run on the CPU.
        keep: quantities (one tensor each) whose values of all examples are kept.
        folder: where the state is saved, and the kept quantities are written, memory-mapped, as `<quantity>.npy`; a
            file has this name when it is whole. None has all in memory, and cannot resume.
        resume: continue the pass in `folder`, if there is one; a finished one is only read.
        identity: plain data that a pass must have in common with the one it continues, such as a checkpoint's step.
        every: seconds between two saved states.
        title: title of the progress bar.
        quiet: no progress.

    Raises:
        ValueError: no examples, a quantity that the function does not return or returns in another shape; the folder
            has a pass and `resume` is False; the pass to continue was of other data, another function (other values for
            the first batch), or other settings: it is named.
        KeyboardInterrupt: Ctrl-C or SIGTERM; with a folder the state has been saved.
    """
    accumulators = {name: dict(by) for name, by in (accumulators or {}).items()}
    names, count = sorted({*accumulators, *keep}), _examples(data)
    first = _values(function, data, slice(0, min(batch, count)), batch, names)
    states = {name: {label: a.init(first[name]) for label, a in by.items()} for name, by in accumulators.items()}
    done, path = 0, None if folder is None else Path(folder)
    if path is not None:
        settings = plain(
            {
                "examples": count,
                "batch": batch,
                "data": _identity(data),
                "accumulators": {
                    name: {label: a.settings for label, a in by.items()} for name, by in accumulators.items()
                },
                "keep": sorted(keep),
                "identity": dict(identity or {}),
            }
        )
        if (path / STATE).exists():
            if not resume:
                raise ValueError(f"'{path}' has a pass already; continue it with resume, or choose another folder")
            done, states = _read(path / STATE, settings, states, first)
    rows = {name: _rows(path, name, count, _array(name, first), done) for name in keep}
    saved = time.monotonic()
    with interruptible(path is not None and done < count) as stop, Progress(title, done, count, quiet) as progress:
        for part in evaluation_batches(count, batch):
            if part.stop <= done:
                continue
            values = _values(function, data, part, batch, names) if part.start else first
            indices = torch.arange(part.start, part.stop)
            states = {
                name: {label: a.update(states[name][label], values[name], indices) for label, a in by.items()}
                for name, by in accumulators.items()
            }
            for name, array in rows.items():
                array[part] = _array(name, values)
            done = part.stop
            progress.show(done)
            requested = stop.requested and done < count
            if path is not None and (done == count or requested or time.monotonic() - saved >= every):
                for array in rows.values():
                    array.flush()
                _save(path / STATE, settings, states, first, done)
                saved = time.monotonic()
            if requested:
                raise KeyboardInterrupt(f"stopped after {done} of {count} examples; '{path}' can be resumed")
    if path is not None:
        rows = {name: _whole(path, name) for name in keep}
    results = {
        name: {label: a.result(states[name][label]) for label, a in by.items()} for name, by in accumulators.items()
    }
    return Streamed(results, rows)


def _examples(data: Tree) -> int:
    sizes = {x.shape[0] if x.ndim else None for x in tree.leaves(data)}
    if len(sizes) != 1 or sizes <= {None, 0}:
        shapes = ", ".join(f"'{name}' {tuple(x.shape)}" for name, x in tree.items(data)) or "nothing"
        raise ValueError(f"the leaves of the data must agree in their leading axis, the examples: {shapes}")
    return sizes.pop()


def _values(function: Callable, data: Tree, part: slice, batch: int, names: list[str]) -> dict[str, Tree]:
    """Values of the examples of a part, on the CPU; a shorter part is filled up, so that the shapes stay the same."""
    size = part.stop - part.start

    def filled(x: Tensor) -> Tensor:
        x = x[part]
        return x if size == batch else torch.cat([x, x[-1:].expand(batch - size, *x.shape[1:])])

    out = function(tree.map(filled, data))
    values = {}
    for name in names:
        if name not in out:
            raise ValueError(f"the function returns no '{name}', only {', '.join(out) or 'nothing'}")
        for leaf in tree.leaves(out[name]):
            if leaf.ndim == 0 or leaf.shape[0] != batch:
                shape = tuple(leaf.shape)
                raise ValueError(f"'{name}' has shape {shape}, expected ({batch}, ...), one value per example")
        values[name] = tree.map(lambda x: x[:size].detach().cpu(), out[name])
    return values


def _array(name: str, values: Mapping[str, Tree]) -> np.ndarray:
    """The values as numpy holds them, which has no bfloat16."""
    x = values[name]
    if not isinstance(x, Tensor):
        raise ValueError(f"'{name}' is a {type(x).__name__}; only single tensors can be kept")
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def _partial(path: Path, name: str) -> Path:
    return path / f"{name}.partial.npy"


def _rows(path: Path | None, name: str, count: int, like: np.ndarray, done: int) -> np.ndarray:
    """The array (count, ...) to be filled: in memory, or in a file, where the first `done` rows are there."""
    shape = (count, *like.shape[1:])
    if path is None:
        return np.empty(shape, like.dtype)
    whole, partial = path / f"{name}.npy", _partial(path, name)
    if done == 0:
        if whole.exists():
            raise ValueError(f"'{whole}' exists already, and no state of a pass beside it")
        path.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(partial, "w+", like.dtype, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a crash at some later row
            with naming(partial), open(partial, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        return array
    file = partial if partial.exists() else whole
    try:
        array = np.load(file, mmap_mode="r+")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot resume: '{file}' is missing or damaged ({error})") from None
    if array.shape != shape or array.dtype != like.dtype:
        raise ValueError(f"cannot resume: '{file}' has {array.dtype} {array.shape}, expected {like.dtype} {shape}")
    return array


def _whole(path: Path, name: str) -> np.ndarray:
    if _partial(path, name).exists():
        os.replace(_partial(path, name), path / f"{name}.npy")
    return np.load(path / f"{name}.npy", mmap_mode="r")


def _identity(data: Tree) -> dict[str, Any]:
    """Identity of a data set: name, shape, dtype and a hash of the content of each leaf."""
    leaves = {}
    for name, x in tree.items(data):
        digest = hashlib.blake2b(digest_size=16)
        for rows in x.split(HASHED):
            digest.update(rows.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        leaves[name] = {"dtype": x.dtype, "shape": tuple(x.shape), "digest": digest.hexdigest()}
    return leaves


def _save(path: Path, settings: dict, states: dict, first: dict, done: int) -> None:
    leaves = tree.map(lambda x: x.clone().contiguous(), tree.flatten({"states": states, "first": first}))
    with replacing(path) as temporary:
        metadata = {"settings": json.dumps(settings), "done": str(done)}
        safetensors.torch.save_file(leaves, temporary, metadata=metadata)


def _read(path: Path, settings: dict, states: dict, first: dict) -> tuple[int, dict]:
    """(examples done, states) of a saved pass, checked to be of the same data, function and settings."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata, leaves = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stored, done = json.loads(metadata["settings"]), int(metadata["done"])
    except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot resume: '{path}' is no state of a pass ({error})") from None
    check_same(f"cannot resume '{path}': it has", stored, settings)
    check_same(f"cannot resume '{path}': now asked for", settings, stored)
    saved = tree.nest(leaves, {"states": states, "first": first})
    for name, now in tree.items(first):
        old, now = tree.get(saved["first"], name).double(), now.double()
        size = old[old.isfinite()].abs().max().item() if old.isfinite().any() else 0.0
        if old.shape != now.shape or not torch.allclose(old, now, rtol=1e-3, atol=1e-4 * size, equal_nan=True):
            raise ValueError(
                f"cannot resume '{path}': it is of another function, which had other values of '{name}' for the first "
                "batch"
            )
    return done, saved["states"]


@contextlib.contextmanager
def interruptible(resumable: bool):
    """A Stop, where a signal can be caught and there is something to save; else one that nothing sets."""
    if resumable and threading.current_thread() is threading.main_thread():
        with Stop() as stop:
            yield stop
    else:
        yield Stop()


class Progress:
    """A progress bar with the rate and the time left; lines of it where stdout is no terminal."""

    def __init__(self, title: str, done: int, count: int, quiet: bool, every: float = 15.0):
        self._title, self._first, self._count, self._quiet, self._every = title, done, count, quiet, every
        self._bar = self._console = None
        self._began = self._shown = time.monotonic()

    def show(self, done: int) -> None:
        """Show how many examples are done: a bar on a terminal, lines elsewhere."""
        if self._quiet:
            return
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._began, 1e-9)
        if self._console is None:
            from rich.console import Console

            self._console = Console()
        if self._console.is_terminal:
            if self._bar is None:
                self._bar = self._new_bar()
            self._bar.update(self._task, completed=done, text=f"{rate:,.0f} examples/s")
        elif now - self._shown >= self._every or done == self._count:
            self._shown, left = now, round((self._count - done) / rate)
            line = f"{self._title} {done}/{self._count}  {rate:,.0f} examples/s"
            ending = f"  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left" if done < self._count else ""
            self._console.print(line + ending, markup=False, highlight=False)

    def _new_bar(self) -> Any:
        from rich import progress

        columns = (
            progress.TextColumn(self._title, markup=False),
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[text]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )
        bar = progress.Progress(*columns, console=self._console)
        bar.start()
        self._task = bar.add_task("", total=self._count, completed=self._first, text="")
        return bar

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
