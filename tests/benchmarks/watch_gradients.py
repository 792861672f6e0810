"""Cost of `experiments/gpt.py --watch-gradients`: a compiled step that looks at every gradient beside the plain one.

4 layers, 256 wide, 65 characters, 128 tokens, batch 16, AdamW, donated; float32 on the CPU. Watched are the norms of
each example by parameter, the noise scale and the histogram of the norms. After five steps both have the same loss.

    python tests/benchmarks/watch_gradients.py [--rounds 15] [--threads 2]
    python tests/benchmarks/watch_gradients.py --device cuda --preset gpt2 --batch 8 --bfloat16      on a GPU
"""

import argparse
import dataclasses

import torch
from timing import interleaved, report

from core import random, spec, tree
from nets.language import gpt2
from train import optimizers
from train.gradients import watch as watching
from train.losses import cross_entropy
from train.step import Policy, make_step, start

SMALL = gpt2.Config(vocabulary=65, context=128, layers=4, heads=8, width=256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", choices=gpt2.PRESETS, help="the net above if not given")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16, with float32 parameters")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    cfg = dataclasses.replace(gpt2.PRESETS[args.preset] if args.preset else SMALL, dropout=0.0)
    key = random.key(0, args.device)
    params = spec.init(key, gpt2.spec(cfg))
    text = random.randint(random.fold_in(key, 2), (args.batch, cfg.context + 1), 0, cfg.vocabulary).long()
    batch = (text[:, :-1].contiguous(), text[:, 1:].contiguous())
    optimizer = optimizers.adamw(1e-3, 0.9, 0.99, weight_decay=0.1, mask=lambda name, leaf: leaf.ndim >= 2)

    def losses(params, batch, keys):
        return cross_entropy(gpt2.apply(params, batch[0], cfg), batch[1], reduction="none").mean(1)

    def loss(params, batch, keys):
        return losses(params, batch, keys).mean()

    policy = Policy(torch.bfloat16) if args.bfloat16 else Policy()
    steps = {
        "plain step": make_step(loss, optimizer, policy=policy, donate=True),
        "watched step": make_step(losses, optimizer, policy=policy, donate=True, watch=watching.watch),
    }
    states = {name: start(key, tree.map(torch.clone, params), gpt2.spec(cfg), optimizer) for name in steps}

    def run(name: str) -> float:
        states[name], metrics = steps[name](states[name], batch)
        return metrics["loss"].item()

    after = {name: [run(name) for _ in range(5)][-1] for name in steps}
    torch.testing.assert_close(*(torch.tensor(x) for x in after.values()), rtol=1e-2 if args.bfloat16 else 1e-5, atol=0)
    medians = interleaved({name: lambda name=name: run(name) for name in steps}, args.rounds)
    report(f"train step, batch {args.batch}, {args.device}", medians, "watched step", {"plain step": 1.15})
    if args.device == "cuda":
        for name in steps:
            torch.cuda.reset_peak_memory_stats()
            run(name)
            print(f"  {name}: peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB (both states are in it)")


if __name__ == "__main__":
    main()
