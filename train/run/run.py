"""The run of an experiment: its folder, how it begins or resumes, its records, how it ends.

The loop itself stays in the experiment:

    run = begin(RUNS, args, free=("steps", ...))  # a new run, or the one that --resume continues
    state = run.restore(state, identity, args.steps)  # as it was made, or the last checkpoint
    with run.open(config, unit="tokens"):  # folder, log, checkpoints; Ctrl-C only asks the loop to end
        for at, batch in run.steps(batches):
            state, metrics = step(state, batch)
            run.record(at, metrics, items)
            if run.due(at, args.common.save_every):
                run.save(at, state)
        run.result({...})

experiments/README.md has the whole of it.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.tree import Tree
from train.files import plain, shown
from train.run import checkpoints, command_line, resume
from train.run.checkpoints import Checkpoints, Record
from train.run.logs import RunLog
from train.run.ranks import Ranks
from train.scale.distributed import Distributed
from train.step import Policy

LOG_EVERY = 10  # steps between two records of the train metrics
POLICIES = {"float32": Policy(), "bfloat16": Policy(torch.bfloat16)}


class Run:
    """One run; `begin` makes it.

    Attributes:
        args: the arguments; of a resumed run those it was started with, but for what the command line says.
        device: of `--device`.
        policy: of `--dtype`.
        resumed_from: the folder of the run that is continued, None for a new one.
        folder: the run's folder; from `open` on.
        first: the steps done before: the loop begins with step `first + 1`.
        at: the last step that has begun.
        last: whether step `at` is the last, because all are done or because a signal asks to end.
        log: `train.run.logs.RunLog`; from `open` on.
        distributed: mesh and plan of a run on several processes, for `make_step`; from `restore` on. None on one.

    On several processes each runs the whole script; the first alone prints, logs and writes into the run's folder. The
    others have a folder of their own that goes when they end.
    """

    def __init__(
        self,
        root: Path,
        args: Any,
        resumed_from: Path | None,
        record: Record | None,
        lines: list[str],
        ranks: Ranks | None = None,
    ):
        self.root, self.args, self.resumed_from, self._ranks = root, args, resumed_from, ranks
        self.distributed: Distributed | None = None
        self.device = command_line.device(ranks.device if ranks else args.common.device)
        self.policy = POLICIES[args.common.dtype]
        self.first = self.at = record.step if record else 0
        self.last, self.total = False, None
        self._record, self._identity, self._lines = record, {}, lines

    def restore(self, state: Tree, identity: Mapping[str, Any], total: int, model: Tree = None) -> Tree:
        """The state of the newest checkpoint, in the structure and on the device of `state`; `state` for a new run.

        On several processes, this process's pieces of it.

        Args:
            model: the spec, which a run on several processes is planned by.
            identity: entries of the configuration that a resumed run must share: the net, a fingerprint of the data ...
            total: the run's number of steps.

        Raises:
            ValueError: the checkpoint is of a different net or of different data, is of a later step, or is damaged.
        """
        self._identity, self.total = dict(identity), total
        state = self._restored(state, identity, total)
        if self._ranks is None:
            return state
        self._ranks.check_same({name: plain(value) for name, value in identity.items()})
        self.distributed = self._ranks.distribute(model)
        return self.distributed.cut(state)

    def _restored(self, state: Tree, identity: Mapping[str, Any], total: int) -> Tree:
        if self._record is None:
            return state
        resume.check_identity(self.resumed_from, self._record.config, identity)
        if self.first > total:
            flag = "--steps" if hasattr(self.args, "steps") else "the number of steps"  # of epochs and the batch size
            raise ValueError(f"{flag} is {total}, but '{self.resumed_from}' has done {self.first}")
        return checkpoints.restore(self.resumed_from / "checkpoints", state, self.first)

    def whole(self, values: Tree) -> Tree:
        """Parameters, or a whole state, of which this process has its pieces on several: to evaluate, save or draw.

        Every process must ask for it.
        """
        return values if self.distributed is None else self.distributed.whole(values)

    @property
    def rows(self) -> int:
        """Number of processes with rows of their own, into which a batch is cut; from `restore` on."""
        return 1 if self.distributed is None else self.distributed.mesh.rows

    @property
    def remaining(self) -> range:
        """The numbers of the steps still to do, from 0: batch t is that of step t + 1."""
        return range(self.first, self.total)

    @contextlib.contextmanager
    def open(
        self,
        config: Mapping[str, Any],
        *,
        unit: str = "examples",
        best: str | None = None,
        keep_every: int | None = None,
        files: Mapping[str, Callable[[Path], Any]] | None = None,
    ) -> Iterator[None]:
        """Context in which the run is under way; leaving it waits for the last checkpoint and closes the log.

        Args:
            config: entries of `config.json` and of each checkpoint, beside the arguments and the identity.
            unit: what `record` counts ("tokens", "examples").
            best: the metric whose best checkpoint stays beside the last ones, None for none.
            keep_every: checkpoints of steps that this divides stay too, None for none.
            files: {name: function that writes it}: what a new run's folder must hold from its beginning.

        If a new run cannot begin (a full disk ...), its folder is removed again.

        Raises:
            ValueError: a run of that name exists already, or another process is at work in its folder.
            OSError, CheckpointError: the folder cannot be written.
        """
        config = {
            "experiment": self.root.name,
            "args": self.args,
            **self._identity,
            **config,
            "best": best,
            "torch": torch.__version__,
        }
        if self._ranks:
            config |= self._ranks.config()
        resumed = self.first if self.resumed_from else None
        spent = self._record.metrics["seconds"] if self._record else 0.0
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as held:
            first = self._ranks is None or self._ranks.rank == 0

            def make_folder() -> str:
                self.folder = self.resumed_from
                if self.folder is None:
                    self.folder = new_folder(self.root, self.args.common.name)
                    undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
                held.enter_context(locked(self.folder))
                if self.resumed_from is None:
                    for name, write in (files or {}).items():
                        write(self.folder / name)
                options = {"resume": resumed, "best": best, "keep_every": keep_every}
                self._saved = Checkpoints(self.folder / "checkpoints", config, **options)
                self.log = RunLog(self.folder, config, total=self.total, unit=unit, resume=resumed)
                return str(self.folder)

            folder = self._on_first(make_folder)
            if not first:
                self._scratch, self._saved = scratch_copy(Path(folder)), None  # as long as the run: some read it later
                self.folder = Path(self._scratch.name) / Path(folder).name
                self.log = RunLog(self.folder, config, total=self.total, unit=unit, resume=self.first, quiet=True)
            undo.pop_all()  # from here on the run may be resumed
            self._began = time.perf_counter() - spent
            for line in [*self._lines, *(self._ranks.lines(self.folder) if self._ranks else [])]:
                self.log.print(line)
            saved = self._saved or contextlib.nullcontext()
            with command_line.Stop(patient=self._ranks is not None) as self._stop, self.log, saved:
                yield

    def _on_first(self, f: Callable[[], Any]) -> Any:
        """The result of `f`, called by the first process alone; its errors are those of all."""
        return f() if self._ranks is None else self._ranks.first(f)

    def _wait(self) -> None:
        """Wait for the checkpoint that is being written; of a full disk, every process learns."""
        self._on_first(lambda: self._saved.wait())

    @property
    def seconds(self) -> float:
        """Training time, with the time before the run was resumed."""
        return time.perf_counter() - self._began

    def steps(self, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(number of the step, batch) for each step still to do, of the batches of `remaining`.

        After the last one, the last checkpoint is on disk. After a signal that is the step which `record` marked as the
        last: this then says how to continue, and raises SystemExit with 128 + the signal's number.

        Raises CheckpointError if the last checkpoint could not be written.
        """
        clock = time.perf_counter()
        if self.args.common.compile and self.remaining:
            self.log.print("compiling the train step ...")
        batches = self._ranks.clock.timed(batches) if self._ranks else batches
        for at, batch in zip(range(self.first + 1, self.total + 1), batches, strict=False):
            self.at, self.last = at, at == self.total
            yield at, batch
            if at == self.first + 1:
                self.log.print(f"first step done after {time.perf_counter() - clock:.1f} s")
            if self.last:
                self._wait()  # of a full disk, the save speaks, and not what is written after it
            if self.last and self._signal:
                start = command_line.program() or shlex.join(["python", sys.argv[0]])
                start = self._ranks.command(start) if self._ranks else start
                again = shlex.join(["--resume", "--name", self.folder.name])
                self.log.print(f"stopped at step {at}; continue with: {start} {again}")
                sys.exit(128 + self._signal)
            if self.last:
                return

    def record(
        self, at: int, metrics: Mapping[str, Tensor], items: int, *, group: str = "train/", **shown: Tensor
    ) -> None:
        """Check, show and log the metrics of a step; from here on `last` counts a signal to end.

        Args:
            metrics: {name: () or, from a step under vmap, (members,)}, logged every tenth step under `group` + name.
            items: how many examples or tokens the step took.
            shown: numbers beside the progress bar; the loss by default.

        Raises ValueError: a metric is not finite. The message has all of them and the checkpoint to go back to.
        """
        self._check_finite(at, metrics)
        self._signal = self._stop.signal or 0
        if self._ranks:
            self._signal = self._ranks.processes.largest(self._signal)
        self.last = at == self.total or self._signal > 0
        metrics = {name: value.mean() if value.ndim else value for name, value in metrics.items()}
        self.log.progress(at, items, **(shown or {"loss": metrics["loss"]}))
        if self.due(at, LOG_EVERY):
            numbers = {f"{group}{name}": value for name, value in metrics.items()}
            self.log.metrics(at, numbers | (self._ranks.waits(self.log.print) if self._ranks else {}))

    def due(self, at: int, every: int) -> bool:
        """True every `every` steps and after the last one: evaluations, pictures, checkpoints."""
        return at % every == 0 or self.last

    def save(self, at: int, state: Tree, **metrics: float) -> None:
        """Write a checkpoint with the time spent so far, and metrics such as the one that `best` names.

        It has the whole state, however many processes there are: any number of them can resume from it.
        """
        state = self.whole(state)
        self._on_first(lambda: self._saved.save(at, state, {"seconds": self.seconds, **metrics}))

    def result(self, figures: Mapping[str, Any]) -> None:
        """Write `result.json`: the final figures, and the run's steps and seconds."""
        self.log.result({**figures, "steps": self.at, "seconds": self.seconds})

    def _check_finite(self, at: int, metrics: Mapping[str, Tensor]) -> None:
        finite = torch.stack(list(metrics.values())).isfinite().all(0)
        if finite.all():
            return
        if self._saved:
            self._saved.wait()
        good = checkpoints.latest(self.folder / "checkpoints")
        where = f"the last good checkpoint is that of step {good}" if good else "there is no checkpoint yet"
        member = int(finite.int().argmin())
        step = f"step {at} of member {member}" if finite.ndim else f"step {at}"
        numbers = ", ".join(f"{name} {values.flatten()[member]:g}" for name, values in metrics.items())
        raise ValueError(f"{step} is not finite ({numbers}); stopped, {where}")


def begin(root: Path, args: Any, free: tuple[str, ...] = (), shards: tuple[str, ...] = ()) -> Run:
    """The run that the arguments ask for: a new one under `root`, or with `--resume` the one to continue.

    Args:
        root: `runs/NAME` for the script NAME.py.
        args: a dataclass with a field `common`, of `train.run.flags.Common`. To resume, they are complete: what the
            command line does not say is as the run was started (`train.run.command_line.run` sees to that).
        free: fields that a resumed run may have different, which is then said aloud; `save_every`, `device` and
            `compile` always are.
        shards: ways of `--shard` that the script takes on several processes, such as `train.run.ranks.BY_ROWS`; () for
            a script of one process.

    Raises:
        ValueError: a new run's name is taken; there is nothing to resume, its newest checkpoint is damaged, or a flag
            contradicts the run; several processes, of which the script, the batch or the mesh makes no use, or which
            differ in code, flags or versions.
    """
    ranks = Ranks.of(root.name, args, shards)
    if not args.common.resume:
        check_name(root, args.common.name)  # here too, as what comes before `Run.open` may take long
        return Run(root, args, None, None, [], ranks)
    folder = resume.folder_to_resume(root, args.common.name)
    stored = resume.stored_args(folder, type(args), root.name)
    lines = resume.changes(folder, stored, args, (*free, "save_every", "device", "compile", "shard", "mesh"))
    steps = checkpoints.steps(folder / "checkpoints")
    step = (ranks.first(lambda: steps[-1] if steps else None) if ranks else steps[-1]) if steps or ranks else None
    record = None if step is None else checkpoints.read_record(folder / "checkpoints", step)
    return Run(root, args, folder, record, lines, ranks)


def scratch_copy(folder: Path) -> tempfile.TemporaryDirectory:
    """A folder with a copy of a run's, its checkpoints by a link, for a process that is not the first; it goes with
    the object."""
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    if folder.is_dir():
        copy = Path(scratch.name) / folder.name
        ignored = shutil.ignore_patterns("checkpoints", ".lock", "events.*")
        shutil.copytree(folder, copy, ignore=ignored)
        (copy / "checkpoints").symlink_to((folder / "checkpoints").absolute())
    return scratch


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which no other process may be at work in a run's folder; the lock ends with the process at the latest.

    Raises ValueError: another process is.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"'{folder}' is in use by another process (pid {file.read().strip() or '?'})") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def check_name(root: Path, name: str | None) -> None:
    """Raise ValueError if `name` cannot be that of a new run under `root`."""
    if name is not None and (Path(name).name != name or name in ("", ".", "..") or not name.isprintable()):
        raise ValueError(f"--name '{shown(name)}' is not the name of a folder")
    if name is not None and (root / name).exists():
        raise ValueError(f"'{root / name}' exists already; continue it with --resume or choose another --name")


def new_folder(root: Path, name: str | None) -> Path:
    """Make the folder of a new run, named by the date and time if `name` is None.

    Raises:
        ValueError: a run of that name exists already.
    """
    check_name(root, name)
    root.mkdir(parents=True, exist_ok=True)
    if name is not None:
        (root / name).mkdir()
        return root / name
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ["", *(f"_{i}" for i in range(2, 1000))]:
        try:
            (root / (stamp + suffix)).mkdir()
            return root / (stamp + suffix)
        except FileExistsError:
            continue
    raise ValueError(f"no free name for a run in '{root}'")


def unused(out: Path | None, default: Path) -> Path:
    """A file or folder that does not exist yet: `out`, or if that is None `default`, numbered where it exists.

    Raises ValueError: `out` exists.
    """
    if out is not None:
        if out.exists():
            raise ValueError(f"'{out}' exists already; choose another --out")
        return out
    stem, suffix = default.stem, default.suffix
    names = itertools.chain([default], (default.with_name(f"{stem}_{i}{suffix}") for i in itertools.count(2)))
    return next(path for path in names if not path.exists())


def format_figures(figures: Mapping[str, Any]) -> str:
    """The numbers among figures as `name value, name value`."""
    return ", ".join(f"{name} {value:.4g}" for name, value in plain(figures).items() if isinstance(value, (int, float)))
