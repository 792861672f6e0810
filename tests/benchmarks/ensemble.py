"""One train step of 16 small classifiers: all at once as `compile(vmap(step))`, against one after the other, eager and
compiled (one compiled step, called 16 times).

The sizes of experiments/ensemble.py: a multilayer perceptron of 64, 128, 128, 10, batch 50, AdamW. All start from the
same values and are first compared: every member's loss after five steps must agree.

    python tests/benchmarks/ensemble.py [--rounds 200] [--threads 2] [--members 16]
"""

import argparse

import torch
from timing import interleaved, report

from core import random, tree
from nets import mlp
from train import optimizers
from train.losses import cross_entropy
from train.step import create, make_step

CFG, BATCH = mlp.Config((64, 128, 128, 10)), 50


def loss(params, batch, keys):
    pixels, labels = batch
    return cross_entropy(mlp.apply(params, pixels, CFG, train=True), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--members", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keys = random.split(random.key(0), args.members)
    optimizer = optimizers.adamw(1e-3)
    pixels = random.uniform(random.key(1), (args.members, BATCH, 64))
    labels = random.randint(random.key(2), (args.members, BATCH), 0, 10).long()
    batches = [(x.clone(), y.clone()) for x, y in zip(pixels, labels, strict=True)]
    beginning = [create(key, mlp.spec(CFG), optimizer) for key in keys]

    def one_by_one(**options):
        # A donated step overwrites the states that it is given.
        step, states = make_step(loss, optimizer, **options), tree.map(torch.clone, beginning)

        def run():
            losses = []
            for i, batch in enumerate(batches):
                states[i], metrics = step(states[i], batch)
                losses.append(metrics["loss"])
            return torch.stack(losses)

        return run

    def at_once(compiled: bool):
        step, states = torch.vmap(make_step(loss, optimizer, compile=False)), tree.stack(beginning)
        step = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step

        def run():
            nonlocal states
            states, metrics = step(states, (pixels, labels))
            return metrics["loss"]

        return run

    ours = "compile(vmap(step))"
    contestants = {
        ours: at_once(compiled=True),
        "vmap(step), eager": at_once(compiled=False),
        "one by one, eager": one_by_one(compile=False),
        "one by one, compiled": one_by_one(),
        "one by one, compiled, donated": one_by_one(donate=True, update_norm=False),
    }
    finals = {name: [run() for _ in range(5)][-1] for name, run in contestants.items()}
    for name, final in finals.items():
        torch.testing.assert_close(final, finals[ours], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    medians = interleaved(contestants, args.rounds)
    title = f"one step of {args.members} members, widths 64, 128, 128, 10, batch {BATCH}, {args.threads} threads"
    report(title, medians, ours, {"one by one, eager": 1 / 5, "one by one, compiled": 1 / 2})


if __name__ == "__main__":
    main()
