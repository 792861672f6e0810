"""Draws from a key, compiled, against torch's own generator: 2**20 uniform numbers against torch.rand, and dropout of
2**20 values (one key, and one key for each of 64 examples) against torch.nn.functional.dropout.

    python tests/benchmarks/random_bits.py [--rounds 200] [--threads 2]
"""

import argparse

import torch
import torch.nn.functional as F
from timing import interleaved, report

from core import random
from core.layers import dropout

EXAMPLES, WIDTH, RATE = 64, 2**14, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    key = random.key(0)
    keys = random.split(key, EXAMPLES)
    x = random.normal(random.fold_in(key, 1), (EXAMPLES, WIDTH))

    uniform = torch.compile(lambda key: random.uniform(key, (EXAMPLES * WIDTH,)), fullgraph=True, dynamic=False)
    drop = torch.compile(lambda x, key: dropout(x, RATE, key), fullgraph=True, dynamic=False)
    assert torch.equal(uniform(key), random.uniform(key, (EXAMPLES * WIDTH,)))

    medians = interleaved({"uniform": lambda: uniform(key), "torch.rand": lambda: torch.rand(x.numel())}, args.rounds)
    report("uniform, 2**20 numbers", medians, "uniform", {"torch.rand": 0.5})

    contestants = {
        "dropout": lambda: drop(x, key),
        "dropout, a key an example": lambda: drop(x, keys),
        "F.dropout": lambda: F.dropout(x, RATE),
    }
    medians = interleaved(contestants, args.rounds)
    report("dropout, 2**20 values", medians, "dropout", {"F.dropout": 0.3})
    report("dropout with keys (64, 2), 2**20 values", medians, "dropout, a key an example", {"F.dropout": 0.3})


if __name__ == "__main__":
    main()
