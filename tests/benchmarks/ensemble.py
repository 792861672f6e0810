"""One train step of 16 small classifiers: all at once as `compile(vmap(step))`, against one after the other, eager and
compiled (one compiled step, called 16 times).

Unless told otherwise the sizes are those of experiments/ensemble.py: an MLP of 64, 128, 128, 10, batch 50. All
start from the same values and are first compared: every member's loss after five steps must agree.

    python tests/benchmarks/ensemble.py [--rounds 200] [--threads 2] [--members 16]
    python tests/benchmarks/ensemble.py --net cifar-resnet8 --members 8 --size 32 --channels 3 --batch 32 --rounds 20
"""

import argparse
import functools

import torch
from timing import interleaved, report

from core import random, tree
from nets.classifiers import by_name
from train import optimizers
from train.losses import cross_entropy
from train.step import compiled, create, make_step

CLASSES = 10


def loss(params, batch, keys, net, cfg):
    pixels, labels = batch
    return cross_entropy(net.apply(params, pixels, cfg, train=True), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--net", default="digits", help="a preset of nets.classifiers; digits is the perceptron")
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keys = random.split(random.key(0), args.members)
    optimizer = optimizers.adamw(1e-3)
    net, cfg = by_name.configured(args.net, channels=args.channels, classes=CLASSES, size=args.size)
    objective = functools.partial(loss, net=net, cfg=cfg)
    pixels = random.uniform(random.key(1), (args.members, args.batch, args.channels, args.size, args.size))
    labels = random.randint(random.key(2), (args.members, args.batch), 0, CLASSES).long()
    batches = [(x.clone(), y.clone()) for x, y in zip(pixels, labels, strict=True)]
    beginning = [create(key, net.spec(cfg), optimizer) for key in keys]

    def one_by_one(**options):
        # A donated step overwrites the states that it is given.
        step, states = make_step(objective, optimizer, **options), tree.map(torch.clone, beginning)

        def run():
            losses = []
            for i, batch in enumerate(batches):
                states[i], metrics = step(states[i], batch)
                losses.append(metrics["loss"])
            return torch.stack(losses)

        return run

    def at_once(compile: bool):
        step, states = torch.vmap(make_step(objective, optimizer, compile=False)), tree.stack(beginning)
        step = compiled(step) if compile else step

        def run():
            nonlocal states
            states, metrics = step(states, (pixels, labels))
            return metrics["loss"]

        return run

    ours = "compile(vmap(step))"
    contestants = {
        ours: at_once(compile=True),
        "vmap(step), eager": at_once(compile=False),
        "one by one, eager": one_by_one(compile=False),
        "one by one, compiled": one_by_one(),
        "one by one, compiled, donated": one_by_one(donate=True, update_norm=False),
    }
    finals = {name: [run() for _ in range(5)][-1] for name, run in contestants.items()}
    for name, final in finals.items():
        torch.testing.assert_close(final, finals[ours], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    medians = interleaved(contestants, args.rounds)
    title = f"one step of {args.members} members, {args.net}, batch {args.batch}, {args.threads} threads"
    report(title, medians, ours, {"one by one, eager": 1 / 5, "one by one, compiled": 1 / 2})


if __name__ == "__main__":
    main()
