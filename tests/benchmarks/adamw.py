"""One donated AdamW step against torch.optim.AdamW(fused=True).step(), on the parameters of a small GPT.

4 layers, 256 wide, vocabulary 65, context 128: 3.2 million numbers in 52 leaves, weight decay on the matrices only.
Both start from the same values, and are compared after the timing.

    python tests/benchmarks/adamw.py [--rounds 200] [--threads 2]
"""

import argparse

import torch
from timing import interleaved, report

from core import tree
from train import optimizers

WIDTH, LAYERS, VOCABULARY, CONTEXT = 256, 4, 65, 128
RATE, DECAY = 1e-3, 0.1


def parameters() -> tree.Tree:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def linear(outputs: int, inputs: int) -> dict:
        return {"bias": draw(outputs), "weight": draw(outputs, inputs)}

    def norm() -> dict:
        return {"bias": draw(WIDTH), "weight": draw(WIDTH)}

    def block() -> dict:
        return {
            "attn": {"proj": linear(WIDTH, WIDTH), "qkv": linear(3 * WIDTH, WIDTH)},
            "ln1": norm(),
            "ln2": norm(),
            "mlp": {"fc": linear(4 * WIDTH, WIDTH), "proj": linear(WIDTH, 4 * WIDTH)},
        }

    return {
        "blocks": [block() for _ in range(LAYERS)],
        "ln": norm(),
        "wpe": {"weight": draw(CONTEXT, WIDTH)},
        "wte": {"weight": draw(VOCABULARY, WIDTH)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    params = parameters()
    grads = tree.map(lambda p: 0.01 * p.flip(0), params)

    modules = [torch.nn.Parameter(p.clone()) for p in tree.leaves(params)]
    for p, g in zip(modules, tree.leaves(grads), strict=True):
        p.grad = g.clone()
    matrices, others = [p for p in modules if p.ndim >= 2], [p for p in modules if p.ndim < 2]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}], RATE, fused=True
    )

    optimizer = optimizers.adamw(RATE, weight_decay=DECAY, mask=lambda name, leaf: leaf.ndim >= 2)
    state = optimizer.init(params)
    pure = tree.map(torch.clone, params), optimizer.init(params)
    step = optimizers.donated_update(optimizer)

    def ours():
        nonlocal params, state
        params, state = step(grads, state, params)

    def ours_pure():
        nonlocal pure
        updates, new = optimizer.update(grads, pure[1], pure[0])
        pure = optimizers.apply_updates(pure[0], updates), new

    contestants = {"functree donated": ours, "torch.optim fused": theirs.step, "functree pure, not compiled": ours_pure}
    medians = interleaved(contestants, args.rounds)
    print(f"{tree.count(params):,} numbers in {len(tree.leaves(params))} leaves, {args.threads} threads")
    report("one AdamW step", medians, "functree donated", {"torch.optim fused": 1.0})

    difference = max((x - y).abs().max().item() for x, y in zip(tree.leaves(params), modules, strict=True))
    print(f"  greatest difference of a parameter after {args.rounds + 3} steps: {difference:.1e}")


if __name__ == "__main__":
    main()
