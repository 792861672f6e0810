"""The cost of a training step on many processes: memory, traffic, flops, by arithmetic alone, before any is started.

Without a flag it plans Llama 3.1 8B over 8 to 1,024 GPUs and stands beside the figures that torchtitan published for
8 and 128 of them (H100, arXiv:2410.06511 and benchmarks/llama3_h100_202412):

    python experiments/estimate.py                                              half a minute; no GPU, no weights
    python experiments/estimate.py --net gpt2-xl --batch 8 --time 1024 --ranks 1 8 64 --speed 30000
    python experiments/estimate.py --net resnet50 --batch 128 --ranks 8 --shard replicate
    python experiments/estimate.py --net llama-3.1-70b --shard tensor --ranks 8

Expected: 15.0 GiB of state on each of 8 GPUs, 39.0 % of their arithmetic at 6,667 tokens per second.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from core import spec, tree
from nets.classifiers import by_name
from nets.language import gpt2, llama
from train import plots
from train.data.understood import understood
from train.files import write_json
from train.losses import cross_entropy
from train.plots.figures import panels
from train.run import Count, NonNegative, command_line
from train.run.run import unused
from train.scale.estimate import Estimate, Traced, by_ranks, traced

STRETCHED = {"theta": 500000.0, "rope_factor": 8.0}
PLANNED = {
    "llama-3.1-8b": llama.Config(128256, 131072, 32, 32, 8, 4096, 14336, **STRETCHED),
    "llama-3.1-70b": llama.Config(128256, 131072, 80, 64, 8, 8192, 28672, **STRETCHED),
    "llama-3.1-405b": llama.Config(128256, 131072, 126, 128, 8, 16384, 53248, **STRETCHED),
}
"""Sizes of Grattafiori et al. 2024, "The Llama 3 Herd of Models" (arXiv:2407.21783), table 3."""
PUBLISHED = {"compiled": {8: 77.0, 128: 62.0}, "eager": {8: 82.4, 128: 67.0}}
"""Peak memory in GiB of torchtitan's Llama 3.1 8B, by GPUs."""
SPEED = 6667.0
"""Its tokens per second and GPU, compiled, on 8 of them."""
GIB, PEAKS = 2**30, {"h100": 989e12, "h200": 989e12, "a100": 312e12, "b200": 2250e12}
"""Dense bfloat16 operations per second, as their maker states them."""
LANGUAGE = (llama, gpt2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Args:
    net: str = "llama-3.1-8b"
    """llama-3.1-8b, -70b or -405b, or any preset of llama, gpt2 or nets.classifiers."""
    ranks: tuple[Count, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of processes."""
    shard: Literal["replicate", "fsdp", "tensor"] = "fsdp"
    """Part of the state on each: replicate (all), fsdp (an equal part), tensor (its part of every layer)."""
    batch: Count = 1
    """Sequences, or images, per step of each process with rows of its own."""
    time: Count = 8192
    """Tokens of a sequence."""
    size: Count = 224
    """Pixels per side of images."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the net; parameters, gradients and optimizer states are float32."""
    speed: NonNegative = 0.0
    """Tokens, or images, per second of a process, of which the share of the device's arithmetic is computed; 0 for
    none, and for torchtitan's 6,667 with llama-3.1-8b."""
    device: Literal["h100", "h200", "a100", "b200"] = "h100"
    """Device of that arithmetic."""
    out: Path | None = None
    """New folder for estimate.json and memory.png; estimate, numbered if it exists, if None."""


def planned(args: Args) -> tuple[ModuleType, Any]:
    """(module, Config) of `--net`."""
    if args.net in PLANNED:
        return llama, PLANNED[args.net]
    for net in (llama, gpt2):
        if args.net in net.PRESETS:
            return net, net.PRESETS[args.net]
    try:
        return by_name.configured(args.net, channels=3, classes=1000, size=args.size)
    except ValueError as error:
        raise ValueError(f"--net: {error}, and {', '.join([*PLANNED, *llama.PRESETS, *gpt2.PRESETS])}") from None


def pass_of(args: Args, net: ModuleType, cfg: Any) -> Traced:
    """Activations and flops of a step of one process that has the whole net, without recomputation; attention keeps its
    matrix of weights, as a trace without values has no fused kernel."""
    model, dtype = net.spec(cfg), DTYPES[args.dtype]
    params, stats = spec.split(model, spec.abstract(model))
    params = tree.cast(params, dtype)
    if net in LANGUAGE:
        x = torch.zeros(args.batch, args.time, dtype=torch.int64, device="meta")
        return traced(lambda params: cross_entropy(net.apply(params, x, cfg), x), params)
    x = torch.empty(args.batch, 3, args.size, args.size, dtype=dtype, device="meta")
    y = torch.zeros(args.batch, dtype=torch.int64, device="meta")

    key = torch.zeros(2, dtype=torch.int32, device="meta")

    def loss(params: tree.Tree) -> torch.Tensor:
        output = net.apply(tree.merge(params, stats), x, cfg, key=key, train=True)
        heads = by_name.weighted_logits(net, output)
        return sum(weight * cross_entropy(logits, y) for weight, logits in heads)

    return traced(loss, params)


def draw(path: Path, args: Args, costs: dict[int, Estimate]) -> None:
    """Memory per process against their number, beside what is published of the net."""
    ranks = list(costs)
    lines = {"state": (ranks, [cost.state / GIB for cost in costs.values()])}
    if any(cost.gathered for cost in costs.values()):
        lines["parameters gathered at once"] = (ranks, [cost.gathered / GIB for cost in costs.values()])
    published = PUBLISHED if args.net == "llama-3.1-8b" and 8 in costs and args.shard == "fsdp" else {}
    for points in published.values():
        rest = points[8] - costs[8].state / GIB
        lines[f"state + {rest:.1f}"] = (ranks, [rest + cost.state / GIB for cost in costs.values()])
    with panels(path, 1, 1, width=6.4, height=4.2) as (axes,):
        title = f"{args.net}, --shard {args.shard}: memory per process"
        plots.curves(axes, lines, "processes", "GiB", title)
        for name, points in published.items():
            mark = "o" if name == "compiled" else "s"
            axes.plot(list(points), list(points.values()), mark, color="black", label=f"torchtitan, {name}")
        axes.legend(frameon=False, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(number) for number in ranks])
        axes.set_ylim(bottom=0)


def plan(args: Args) -> None:
    net, cfg = planned(args)
    ranks, folder = sorted(set(args.ranks)), unused(args.out, Path("estimate"))
    model, once = net.spec(cfg), pass_of(args, net, cfg)
    units = args.batch * (args.time if net in LANGUAGE else 1)
    options = {"tokens": units, "time": args.time if net in LANGUAGE else 0, "compute": DTYPES[args.dtype]}
    costs = by_ranks(model, args.shard, ranks, tied=getattr(cfg, "tied", net is gpt2), **options)
    if net not in LANGUAGE:  # a convolution uses its weight at every place
        costs = {number: cost._replace(flops=once.flops) for number, cost in costs.items()}
    unit = "token" if net in LANGUAGE else "image"
    first = costs[ranks[0]]
    flops = first.flops / units * (ranks[0] if args.shard == "tensor" else 1)
    facts = {"net": args.net, "parameters": first.parameters, f"{unit}s per step and process": units}
    facts[f"GFLOP per {unit}"] = f"{flops / 1e9:.1f}"
    written = ", attention written out" if net in LANGUAGE else ""
    facts["activations"] = f"{once.saved / GIB:.1f} GiB without recomputation{written}, of a process with the whole net"
    speed = args.speed or (SPEED if args.net == "llama-3.1-8b" else 0.0)
    share = flops * speed / PEAKS[args.device]
    if speed:
        facts["of the device"] = f"{share:.1%} of {args.device}'s arithmetic at {speed:,.0f} {unit}s per second"
    understood(print, facts)
    print(table(costs))
    rows = {str(number): {**cost._asdict(), "volumes": cost.volumes} for number, cost in costs.items()}
    folder.mkdir(parents=True)
    result = {"net": args.net, "model": cfg, "shard": args.shard, "traced": once, "mfu": share, "processes": rows}
    if args.net == "llama-3.1-8b" and {8, 128} <= costs.keys() and args.shard == "fsdp":
        fall = (costs[8].state - costs[128].state) / GIB
        published = {name: points[8] - points[128] for name, points in PUBLISHED.items()}
        result["fall"] = {"here": fall, **published}
        words = ", ".join(f"{value:.1f} ({name})" for name, value in published.items())
        print(f"from 8 to 128 processes {fall:.1f} GiB less; torchtitan's peak memory falls by {words}")
    write_json(folder / "estimate.json", result)
    draw(folder / "memory.png", args, costs)
    print(f"files in {folder}/")


def table(costs: dict[int, Estimate]) -> str:
    """A row per number of processes: GiB of state and of gathered parameters, GB that a process sends per step."""
    names = list(dict.fromkeys(name for cost in costs.values() for name in cost.volumes))
    rows = [("processes", "state GiB", "gathered GiB", *(f"{name} GB" for name in names))]
    for number, cost in costs.items():
        volumes = (f"{cost.volumes.get(name, 0) / 1e9:.2f}" for name in names)
        rows.append((str(number), f"{cost.state / GIB:.2f}", f"{cost.gathered / GIB:.2f}", *volumes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{word:>{n}}" for word, n in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
    command_line.run(__doc__, (Args, plan))
