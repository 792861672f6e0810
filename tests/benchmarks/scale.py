"""Cost of several processes, each on one thread, joined by gloo.

reduction: 52 leaves of 3.26 million numbers summed over two processes in one graph (core.collectives.sum_all), against
one flat dist.all_reduce outside of it.
gpt, resnet: a step of two processes with twice the rows, against one process; in between, a step of one process with a
mesh of one, against the plain step.

    python tests/benchmarks/scale.py [--what reduction gpt resnet] [--way replicate] [--rounds 30] [--no-compile]
"""

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from adamw import parameters
from timing import interleaved, report

from core import collectives, random, tree
from nets.classifiers import resnet
from nets.language import gpt2
from train import optimizers
from train.compiled import compiled
from train.losses import cross_entropy
from train.scale import launch
from train.scale.distributed import distribute
from train.scale.mesh import open_mesh
from train.step import create, make_step


def gpt_losses(params, batch, keys, cfg):
    return cross_entropy(gpt2.apply(params, batch[0], cfg), batch[1], reduction="none").mean(1)


def resnet_losses(params, batch, keys, cfg):
    return cross_entropy(resnet.apply(params, batch[0], cfg, train=True), batch[1], reduction="none")


def steps_of(what: str, way: str, ranks: int, compile: bool) -> dict[str, Callable[[], object]]:
    """{name: one step of a training run}, with 16 rows for each process."""
    if what == "gpt":
        cfg, losses = gpt2.PRESETS["tiny"], gpt_losses
        model, tokens = gpt2.spec(cfg), random.randint(random.key(1), (16 * ranks, cfg.context), 0, cfg.vocabulary)
        batch = tokens, tokens
    else:
        cfg, losses = resnet.PRESETS["cifar-resnet8"], resnet_losses
        images = random.normal(random.key(1), (16 * ranks, 3, 32, 32))
        model, batch = resnet.spec(cfg), (images, torch.arange(16 * ranks) % 10)
    optimizer = optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.adamw(1e-3))
    place = open_mesh({"model" if way == "tensor" else "data": ranks})

    def training(over) -> Callable[[], object]:
        loss = functools.partial(losses, cfg=cfg)
        step = make_step(loss, optimizer, donate=True, distributed=over, compile=compile)
        state = create(random.key(0), model, optimizer)
        state = state if over is None else over.cut(state)

        def run():
            nonlocal state
            state, metrics = step(state, batch)
            return float(metrics["loss"])

        return run

    out = {"mesh": training(distribute(model, place, way))}
    return out if ranks > 1 else {**out, "plain": training(None)}


def reductions(compile: bool) -> dict[str, Callable[[], object]]:
    leaves = tree.leaves(parameters())
    flat, group = torch.cat([x.flatten() for x in leaves]), dist.group.WORLD.group_name
    in_graph = compiled(lambda xs: collectives.sum_all(xs, group)) if compile else None

    def together():
        return (in_graph or (lambda xs: collectives.sum_all(xs, group)))(leaves)

    return {"in one graph": together, "flat, outside": lambda: dist.all_reduce(flat)}


def child(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    processes = launch.current()
    processes.open_group("cpu")
    if args.child == "reduction":
        contestants = reductions(args.compile)
    else:
        contestants = steps_of(args.child, args.way, processes.ranks, args.compile)
    medians = interleaved(contestants, args.rounds)
    if not processes.rank:
        print(json.dumps(medians))
    processes.close()


def measured(args: argparse.Namespace, what: str, ranks: int) -> dict[str, float]:
    """Median seconds of what `ranks` processes do, each a program of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    compile = "--compile" if args.compile else "--no-compile"
    command = [sys.executable, __file__, "--child", what, "--way", args.way, "--rounds", str(args.rounds), compile]
    started = []
    for rank in range(ranks):
        env = {**os.environ, **{name: str(value) for name, value in {**shared, "RANK": rank}.items()}}
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"{what} on {ranks} processes failed")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", nargs="+", default=["reduction", "gpt", "resnet"])
    parser.add_argument("--way", default="replicate")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    for what in args.what:
        if what == "reduction":
            report(
                "sum of 52 leaves over two processes", measured(args, what, 2), "in one graph", {"flat, outside": 1.1}
            )
            continue
        one, two = measured(args, what, 1), measured(args, what, 2)
        medians = {"mesh of one": one["mesh"], "one process": one["plain"], "two processes": two["mesh"]}
        report(f"a step of {what}, {args.way}", medians, "mesh of one", {"one process": 1.02})
        report("twice the rows", medians, "two processes", {"one process": 1.15})


if __name__ == "__main__":
    main()
