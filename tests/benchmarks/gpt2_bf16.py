"""GPT-2 124M in bfloat16 on a GPU: tokens/s and model FLOP utilisation beside the same net as a compiled nn.Module.

Both keep float32 weights and compute in bfloat16: ours by its policy, the module under torch.autocast; AdamW, fused.
Utilisation counts 6 operations a parameter and token, 12 * layers * width * time for attention (Chowdhery et al. 2022,
appendix B), over the card's dense bfloat16 peak.

    python tests/benchmarks/gpt2_bf16.py [--batch 16] [--peak 989e12]           an H100 or H200
    python tests/benchmarks/gpt2_bf16.py --device cpu --preset tiny --batch 2   the same code, small
"""

import argparse
import dataclasses

import torch
from module_gpt import Module
from timing import interleaved, report

from core import random, spec, tree
from nets.language import gpt2
from train import optimizers
from train.losses import cross_entropy
from train.step import Policy, make_step, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="gpt2", choices=gpt2.PRESETS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--peak", type=float, default=989e12, help="operations/s of the card in bfloat16")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    cfg = dataclasses.replace(gpt2.PRESETS[args.preset], dropout=0.0, bias=True)
    if args.preset == "gpt2":
        cfg = dataclasses.replace(cfg, vocabulary=50304)  # a multiple of 64, as everyone trains it
    key = random.key(0, args.device)
    params = spec.init(key, gpt2.spec(cfg))
    text = random.randint(key, (args.batch, cfg.context + 1), 0, cfg.vocabulary).long()
    batch = (text[:, :-1].contiguous(), text[:, 1:].contiguous())

    optimizer = optimizers.adamw(6e-4, 0.9, 0.95, weight_decay=0.1, mask=lambda name, leaf: leaf.ndim >= 2)

    def loss(params, batch, keys):
        return cross_entropy(gpt2.apply(params, batch[0], cfg, train=True), batch[1])

    policy = Policy(torch.bfloat16)
    train = make_step(loss, optimizer, policy=policy, donate=True, update_norm=False)
    state = start(key, tree.map(torch.clone, params), gpt2.spec(cfg), optimizer)

    def ours():
        nonlocal state
        state, metrics = train(state, batch)
        return metrics["loss"].item()

    module = Module(cfg, params).to(args.device)
    adamw = module.adamw(6e-4, (0.9, 0.95), 0.1)
    compiled = torch.compile(module, fullgraph=True, dynamic=False)

    def theirs():
        with torch.autocast(args.device, torch.bfloat16):
            value = compiled(*batch)
        value.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return value.item()

    steps = {"functree": ours, "nn.Module, torch.compile": theirs}
    losses = {name: [step() for _ in range(5)][-1] for name, step in steps.items()}
    print("loss after 5 steps:", {name: round(value, 3) for name, value in losses.items()})
    medians = interleaved(steps, args.rounds)
    tokens = args.batch * cfg.context
    matrices = tree.count(gpt2.spec(cfg)) - cfg.context * cfg.width
    operations = tokens * (6 * matrices + 12 * cfg.layers * cfg.width * cfg.context)
    for name, seconds in medians.items():
        print(f"{name}: {tokens / seconds:,.0f} tokens/s, utilisation {operations / seconds / args.peak:.1%}")
    report(f"one train step, {args.preset}, batch {args.batch}", medians, "functree", {"nn.Module, torch.compile": 1.0})


if __name__ == "__main__":
    main()
