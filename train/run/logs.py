"""Run logging: progress bar, metrics (JSON lines, TensorBoard), config and result."""

import json
import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.files import naming, plain, read_json, replacing, write_json


class RunLog:
    """The records of one run in its folder; a context manager.

    - `config.json`, written at once;
    - `metrics.jsonl`: one JSON object a call of `metrics`; numbers that are not finite are the strings "NaN",
      "Infinity" and "-Infinity", which `float()` reads back;
    - `events.out.tfevents.*` for TensorBoard;
    - `result.json`, written by `result`.

    Args:
        directory: the run's folder, made if missing.
        config: anything that `train.files.plain` turns into JSON.
        total: the run's number of steps, for the progress bar and the time left.
        unit: what `items` counts in `progress` ("tokens", "examples").
        resume: the step the run continues from: metrics of later steps are dropped from the record, new ones appended.
            None for a new run.
        quiet: no progress.
        every: where stdout is not a terminal, seconds between two lines of progress.

    Raises ValueError if the folder already has metrics and `resume` is None.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        config: Any = None,
        *,
        total: int | None = None,
        unit: str = "examples",
        resume: int | None = None,
        quiet: bool = False,
        every: float = 15.0,
    ):
        self.directory = Path(directory)
        self._total, self._unit, self._quiet, self._every = total, unit, quiet, every
        self._path = self.directory / "metrics.jsonl"
        if resume is None and self._path.exists() and self._path.stat().st_size:
            raise ValueError(
                f"{self.directory} holds the record of another run: continue that run or choose another folder"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        if config is not None:
            write_json(self.directory / "config.json", config)
        if resume is not None:
            keep_metrics(self._path, resume)
        self._lines = open(self._path, "a", encoding="utf-8")
        self._events = _EventFile(self.directory, resume)
        self._bar = self._console = None
        self._first = resume or 0
        self._updates: deque[tuple[float, int]] = deque(maxlen=50)
        self._items = 0
        self._shown = -float("inf")

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Record numbers of a step: a JSON line with `step`, `time` (seconds since 1970) and the values, and events.

        Args:
            values: {name: number or 0-D tensor}. "train/loss" and "validation/loss" share a chart group in TensorBoard.
        """
        numbers = {name: plain(value) for name, value in values.items()}
        record = {"step": int(step), "time": round(time.time(), 3), **numbers}
        with naming(self._path):
            self._lines.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            self._lines.flush()
            self._events.scalars(int(step), {name: float(value) for name, value in numbers.items()})

    def histogram(self, step: int, name: str, edges: Any, counts: Any) -> None:
        """Record how many values of a step lie between two edges: a JSON line {name: {"edges", "counts"}} and an event.

        Args:
            edges: (bins + 1,).
            counts: (bins,).
        """
        limits, numbers = plain(edges), plain(counts)
        record = {"step": int(step), "time": round(time.time(), 3), name: {"edges": limits, "counts": numbers}}
        with naming(self._path):
            self._lines.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            self._lines.flush()
            self._events.histogram(int(step), name, limits, numbers)

    def progress(self, step: int, items: int = 0, **values: Any) -> None:
        """Show that `step` steps are done; cheap enough for every step.

        Args:
            items: how many examples or tokens went into the steps since the last call.
            values: numbers to show, such as `loss`. A tensor is read only when it is shown, so that the loop does not
                wait for the device at each step.
        """
        if self._quiet:
            return
        now = time.monotonic()
        self._items += items
        self._updates.append((now, self._items))
        if self._console is None:
            from rich.console import Console

            self._console = Console()
        if self._console.is_terminal:
            if self._bar is None:
                self._bar, self._task = self._make_bar(step)
            if now - self._shown < 0.2 and step != self._total:
                return
            self._bar.update(self._task, completed=step, text=self._text(values))
        else:
            if now - self._shown < self._every and step != self._total:
                return
            place = f"step {step}" + (f"/{self._total}" if self._total else "")
            self._console.print(f"{place}  {self._text(values)}{self._left(step, now)}", markup=False, highlight=False)
        self._shown = now

    def print(self, line: str) -> None:
        """Print a line, above the progress bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def result(self, values: Mapping[str, Any]) -> None:
        """Write `result.json`: the run's final figures by name."""
        write_json(self.directory / "result.json", values)

    def close(self) -> None:
        """Close the files, and end the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        with naming(self._path):
            self._lines.close()
            self._events.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _make_bar(self, step: int) -> tuple[Any, Any]:
        from rich import progress

        columns = (
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[text]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )
        bar = progress.Progress(*columns, console=self._console)
        bar.start()
        return bar, bar.add_task("", total=self._total, completed=step, text="")

    def _text(self, values: Mapping[str, Any]) -> str:
        parts = [f"{name} {float(value):.4g}" for name, value in values.items()]
        (t0, n0), (t1, n1) = self._updates[0], self._updates[-1]
        if n1 > n0 and t1 > t0:
            parts.append(f"{_short((n1 - n0) / (t1 - t0))} {self._unit}/s")
        return "  ".join(parts)

    def _left(self, step: int, now: float) -> str:
        if self._shown == -float("inf"):
            self._started = (now, step)
            return ""
        then, first = self._started
        if not self._total or step <= first or step >= self._total:
            return ""
        seconds = round((now - then) / (step - first) * (self._total - step))
        return f"  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`; a last line that was cut off when the run was killed is left out.

    Raises ValueError if there is no such file or another line is garbled.
    """
    path = Path(directory) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line end is nothing, or half a line
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} line {number} is not a record of metrics") from None
        records.append(record)
    return records


def read_curves(directory: str | os.PathLike, *names: str) -> dict[str, tuple[list[int], list[float]]]:
    """{name: (steps, values)} of a run's metrics, the form that `train.plots.curves` draws."""
    records = read_metrics(directory)
    points = {name: [(r["step"], float(r[name])) for r in records if name in r] for name in names}
    return {name: ([x for x, _ in pairs], [y for _, y in pairs]) for name, pairs in points.items()}


def keep_metrics(path: str | os.PathLike, step: int) -> None:
    """Drop the lines of `metrics.jsonl` that are later than `step`, so that a resumed run's record has no doubles."""
    path = Path(path)
    if not path.exists():
        return
    records = [record for record in read_metrics(path.parent) if record["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def read_result(directory: str | os.PathLike) -> dict[str, Any]:
    """The final figures of a run. Raises ValueError if it has none."""
    return read_json(Path(directory) / "result.json")


class _EventFile:
    """A file of TensorBoard events.

    Only the record format and the protocol buffers come from the tensorboard package: its own writer would import
    TensorFlow where that is installed, and torch's takes two seconds to import.
    """

    _count = 0

    def __init__(self, directory: Path, resume: int | None):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        _EventFile._count += 1
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{_EventFile._count}"
        self._file = RecordWriter(open(directory / name, "wb"))
        self._write(file_version="brain.Event:2")
        if resume is not None:
            # Tells TensorBoard to forget what an earlier process wrote for the steps from here on.
            self._write(step=resume + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self._file.flush()

    def _write(self, **fields: Any) -> None:
        self._file.write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        entries = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self._summary.Summary(value=entries))
        self._file.flush()

    def histogram(self, step: int, name: str, edges: list[float], counts: list[int]) -> None:
        middles = [(a + b) / 2 for a, b in zip(edges[:-1], edges[1:], strict=True)]
        entry = self._summary.HistogramProto(
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(m * n for m, n in zip(middles, counts, strict=True)),
            sum_squares=sum(m * m * n for m, n in zip(middles, counts, strict=True)),
            bucket_limit=edges,
            bucket=[0, *counts],
        )
        value = self._summary.Summary.Value(tag=name, histo=entry)
        self._write(step=step, summary=self._summary.Summary(value=[value]))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
