"""A run on several processes: its flags, the checks that all processes are alike, its lines in the log."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

import core
from core.tree import Tree
from train.files import plain
from train.run import flags
from train.run.waits import Waits
from train.scale import launch, mesh, shards
from train.scale.distributed import Distributed, distribute

BY_ROWS = ("replicate", "fsdp", "hsdp")
"""The ways of `--shard` for any loss that is a mean over examples; "tensor" needs a net that knows of it."""
PLAN = "plan.txt"
SLOW = 0.05
"""Seconds a step for its data, above which a process that is slower than the others is named."""


class Ranks:
    """The processes of a run; `of` makes it.

    Attributes:
        processes: `train.scale.launch.Processes`.
        rank: the number of this process.
        device: that of this process.
        clock: of the batches that this process waits for.
    """

    def __init__(self, args: Any, processes: launch.Processes):
        common = args.common
        self.processes, self.rank, self.first = processes, processes.rank, processes.first
        self.device = f"cuda:{processes.local_rank}" if common.device == "cuda" else common.device
        self._way, self._local_norm, self._model = common.shard, common.local_norm, None
        self.clock, self._calls, self._named = Waits(), 0, False  # of `waits`, and whether it has named a process
        if common.mesh:
            self.sizes = mesh.sizes(common.mesh)
        else:
            self.sizes = mesh.default_sizes(common.shard, processes.ranks, processes.ranks_per_node)
        mesh.check(self.sizes, common.shard, processes.ranks)
        check_batch(args, self.sizes["replica"] * self.sizes["data"])
        words = {flags.flag(name): plain(value) for name, value in flags.values(args).items()}
        self.check_same({"code": code_hash(), "torch": torch.__version__, **words})
        if self.device.startswith("cuda"):
            torch.cuda.set_device(self.device)
        processes.open_group(self.device)

    @staticmethod
    def of(script: str, args: Any, ways: tuple[str, ...]) -> "Ranks | None":
        """The processes of a run of a script that takes these ways of `--shard`; None where no launcher is at work.

        Raises ValueError: see `train.run.run.begin`.
        """
        processes, common = launch.current(), args.common
        if processes is None or not ways:
            if processes is not None and processes.ranks > 1:
                raise ValueError(
                    f"{script}.py trains on one process, but {processes.ranks} run; start it without torchrun"
                )
            if not common.resume:
                _check_unused(common, script, ways)
            if ways:
                check_batch(args, 1)
            return None
        if common.shard not in ways:
            raise ValueError(f"--shard {common.shard}: {script}.py takes {', '.join(ways)}")
        return Ranks(args, processes)

    def check_same(self, what: Mapping[str, Any]) -> None:
        """Raise ValueError on all processes, naming the first entry that differs between them."""
        self.processes.check_same({name: json.dumps(value, sort_keys=True) for name, value in what.items()})

    def distribute(self, model: Tree) -> Distributed:
        """Mesh and plan of a spec. Raises ValueError: nothing can be cut over an axis of the mesh."""
        self._model = model
        places = (
            mesh.alone() if self.processes.ranks == 1 else mesh.open_mesh(self.sizes, self.device.partition(":")[0])
        )
        return distribute(model, places, self._way, self._local_norm)

    def config(self) -> dict[str, Any]:
        """Entries of a run's configuration."""
        return {"processes": self.processes.ranks, "mesh": self.sizes, "launcher": launch.identity()}

    def lines(self, folder: Path) -> list[str]:
        """Lines for the log on the processes; the whole plan goes to a file of its folder."""
        cuts = shards.plan(self._model, self.sizes, shards.RULES[self._way])
        (folder / PLAN).write_text(shards.table(self._model, self.sizes, cuts) + "\n", encoding="utf-8")
        grid = ", ".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "alone"
        share = shards.local_bytes(self._model, self.sizes, cuts) / shards.local_bytes(self._model, {}, {})
        number = sum(cut is not None for cut in cuts.values())
        cut = f"{number} of {len(cuts)} leaves cut, each has {share:.0%} of the parameters" if number else "nothing cut"
        return [f"{self.processes.ranks} processes ({grid}), --shard {self._way}: {cut}; {folder / PLAN}"]

    def waits(self, say: Callable[[str], None]) -> dict[str, float]:
        """Seconds a step that the processes wait for their batches, their mean and the slowest's, for the log.

        The others wait for the slowest inside the step, whose time is therefore the same for all. One that takes long,
        and much longer than the others, is named once; not by the first call, which has everybody's start in it.
        """
        if self.processes.ranks == 1:
            return {}
        each = [float(text) for text in self.processes.exchange(repr(self.clock.mean()))]
        slowest = max(range(len(each)), key=each.__getitem__)
        others = median(x for rank, x in enumerate(each) if rank != slowest)
        self._calls += 1
        if not self._named and self._calls > 1 and each[slowest] > max(SLOW, 4 * others):
            self._named = True
            say(f"process {slowest} takes {each[slowest]:.2f} s a step for its data, the others {others:.2f} s")
        return {"data/seconds": sum(each) / len(each), "data/slowest_seconds": each[slowest]}

    def command(self, start: str) -> str:
        """The command line that starts this script on as many processes; `start` is that for one."""
        nodes = self.processes.ranks // self.processes.ranks_per_node
        if nodes > 1:
            return f"the same torchrun on {nodes} nodes, {sys.argv[0]}"
        return f"torchrun --nproc-per-node {self.processes.ranks} {start.removeprefix('python ')}"


def alone(flag: str) -> tuple[str, ...]:
    """The ways of `--shard` of a run with a flag that is for one process: none.

    Raises ValueError: several processes run.
    """
    processes = launch.current()
    if processes is not None and processes.ranks > 1:
        raise ValueError(f"{flag} trains on one process, but {processes.ranks} run; start it without torchrun")
    return ()


def check_batch(args: Any, rows: int) -> None:
    """Raise ValueError unless the flags' batch divides over `rows` processes, and each part into its micro-batches."""
    words = {name.rpartition(".")[2]: value for name, value in flags.values(args).items()}
    batch, micro = words.get("batch"), words.get("micro_batches", 1)
    if batch is not None and batch % rows:
        raise ValueError(f"--batch {batch} does not divide over {rows} processes with rows of their own")
    if batch is not None and batch // rows % micro:
        what = f"--batch {batch}, over {rows} processes," if rows > 1 else f"--batch {batch}"
        raise ValueError(f"{what} does not divide into --micro-batches {micro}")


def _check_unused(common: flags.Common, script: str, ways: tuple[str, ...]) -> None:
    """Raise ValueError at a flag of several processes."""
    for name, default in (("shard", "replicate"), ("mesh", None), ("local_norm", False)):
        value = getattr(common, name)
        if value != default:
            start = f"torchrun --nproc-per-node 2 experiments/{script}.py"
            hint = f"start it as {start}" if ways else f"{script}.py trains on one"
            word = "" if value is True else f" {value}"
            raise ValueError(f"{flags.flag(name)}{word} is for several processes; {hint}")


def code_hash() -> str:
    """A hash of the program: every file of core, nets, train and experiments beside the modules that run."""
    root, out = Path(core.__file__).parents[1], hashlib.blake2b(digest_size=8)
    for floor in ("core", "nets", "train", "experiments"):
        for path in sorted((root / floor).rglob("*.py")):
            out.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return out.hexdigest()
