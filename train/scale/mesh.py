"""The mesh: the processes of a run in a grid with named axes, such as data=4,model=2.

    replica    copies of everything below; each has other rows of the batch (hsdp)
    data       other rows of the batch; `--shard fsdp` and `hsdp` cut the state along it
    model      the same rows; `--shard tensor` cuts the layers along it

Ranks count through the last axis first, so that neighbours on it are on one machine.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

AXES = ("replica", "data", "model")


def sizes(text: str) -> dict[str, int]:
    """{axis: processes} of a flag such as "data=4,model=2", all of `AXES`; those left out have size 1.

    Raises ValueError: another form, an unknown axis, one named twice, or a size below 1.
    """
    expected = f"expected axes of {', '.join(AXES)} with their sizes, such as data=4,model=2"
    out: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = (word.strip() for word in part.partition("="))
        if not equals or not number.isdecimal() or int(number) < 1 or name not in AXES:
            raise ValueError(f"--mesh '{text}': '{part.strip()}' is no axis with its size; {expected}")
        if name in out:
            raise ValueError(f"--mesh '{text}' has {name} twice; {expected}")
        out[name] = int(number)
    return {axis: out.get(axis, 1) for axis in AXES}


def default_sizes(shard: str, ranks: int, ranks_per_node: int) -> dict[str, int]:
    """The mesh of a `--shard` without `--mesh`: all ranks along its axis; hsdp has a replica per node."""
    if shard == "tensor":
        return {"replica": 1, "data": 1, "model": ranks}
    if shard == "hsdp":
        nodes = ranks // ranks_per_node
        return {"replica": nodes, "data": ranks // nodes, "model": 1}
    return {"replica": 1, "data": ranks, "model": 1}


def check(sizes: Mapping[str, int], shard: str, ranks: int) -> None:
    """Raise ValueError unless the mesh has as many places as there are ranks, and the axes that `shard` uses."""
    words = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"
    total = math.prod(sizes.values())
    if total != ranks:
        raise ValueError(f"--mesh {words} has {total} places, but {ranks} processes run; expected one for each")
    if shard != "hsdp" and sizes["replica"] > 1:
        raise ValueError(f"--mesh {words} has replicas, which are of --shard hsdp; with {shard} expected them in data")
    if shard != "tensor" and sizes["model"] > 1:
        raise ValueError(f"--mesh {words} has an axis model, which --shard {shard} does not use; expected data alone")


def coordinates(sizes: Mapping[str, int], rank: int) -> dict[str, int]:
    """{axis: place on it} of a rank."""
    out = {}
    for axis in reversed(AXES):
        rank, out[axis] = divmod(rank, sizes[axis])
    return {axis: out[axis] for axis in AXES}


@dataclass(frozen=True)
class Mesh:
    """The place of this process in a mesh.

    Attributes:
        sizes: {axis: processes}.
        place: {axis: place of this process on it}.
        groups: {axis: name of the group of the processes that differ from this one in that axis alone}; "rows" is that
            of replica and data together, all that have other rows of the batch. Axes of size 1 have none.
    """

    sizes: dict[str, int]
    place: dict[str, int]
    groups: dict[str, str]

    @property
    def rows(self) -> int:
        """In how many parts the rows of a batch are cut."""
        return self.sizes["replica"] * self.sizes["data"]

    @property
    def row(self) -> int:
        """Which of these parts is this process's."""
        return self.place["replica"] * self.sizes["data"] + self.place["data"]


def open_mesh(sizes: Mapping[str, int], device: str = "cpu") -> Mesh:
    """This process's place, with the groups of its axes; torch.distributed's default group must be there.

    Raises ValueError: the mesh has another number of places than there are processes.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    if math.prod(sizes.values()) != ranks:
        raise ValueError(f"a mesh of {sizes} has {math.prod(sizes.values())} places, but {ranks} processes run")
    axes = [axis for axis in AXES if sizes[axis] > 1]
    groups = {}
    if axes:
        grid = init_device_mesh(device, tuple(sizes[axis] for axis in axes), mesh_dim_names=tuple(axes))
        groups = {axis: grid.get_group(axis).group_name for axis in axes}
        both = [axis for axis in ("replica", "data") if axis in groups]
        if len(both) == 2:
            groups["rows"] = grid["replica", "data"]._flatten("rows").get_group().group_name
        elif both:
            groups["rows"] = groups[both[0]]
    return Mesh(sizes, coordinates(sizes, rank), groups)
