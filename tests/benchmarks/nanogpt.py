"""nanoGPT's CPU setting on tiny Shakespeare: validation loss after 2000 steps, and time per step beside nanoGPT's own.

4 layers, 4 heads, 128 wide, 64 characters, batch 12. The loss is that of `experiments/gpt.py --preset nanogpt-cpu` over
the whole validation part (the last tenth). For the time, nanoGPT's model and optimizer come from a clone of it, run
eagerly as its README does on a CPU:

    git clone https://github.com/karpathy/nanoGPT
    FUNCTREE_DATA=folder-with/tinyshakespeare python tests/benchmarks/nanogpt.py --nanogpt nanoGPT
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timing import interleaved, report

from core import random
from nets.language import gpt2
from train import optimizers
from train.data.text import text, tokenizers
from train.losses import cross_entropy
from train.step import create, make_step

BATCH = 12


def functree_step(cfg: gpt2.Config):
    adamw = optimizers.adamw(1e-3, 0.9, 0.99, weight_decay=0.1, mask=lambda name, leaf: leaf.ndim >= 2)
    optimizer = optimizers.chain(optimizers.clip_by_global_norm(1.0), adamw)
    state = create(random.key(0), gpt2.spec(cfg), optimizer)

    def loss(params, batch, keys):
        return cross_entropy(gpt2.apply(params, batch[0], cfg, train=True), batch[1])

    train = make_step(loss, optimizer, donate=True)

    def step(batch):
        nonlocal state
        state, metrics = train(state, batch)
        return float(metrics["loss"])

    return step


def nanogpt_step(folder: Path, cfg: gpt2.Config):
    sys.path.insert(0, str(folder))
    import model as nanogpt

    sizes = {"n_layer": cfg.layers, "n_head": cfg.heads, "n_embd": cfg.width, "block_size": cfg.context}
    net = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=cfg.vocabulary, dropout=0.0, bias=False, **sizes))
    optimizer = net.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def step(batch):
        _, loss = net(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT; without it only the loss is measured")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if "FUNCTREE_DATA" not in os.environ:
        sys.exit("set FUNCTREE_DATA to the folder that holds tinyshakespeare/input.txt")
    shakespeare = Path(os.environ["FUNCTREE_DATA"]).absolute() / "tinyshakespeare" / "input.txt"

    if args.nanogpt:
        torch.set_num_threads(2)
        cfg = gpt2.PRESETS["nanogpt-cpu"]
        content = text.read_text(shakespeare)
        tokens = torch.tensor(tokenizers.CharTokenizer.from_text(content).encode(content))
        batch = tuple(x.contiguous() for x in text.token_batch(tokens, random.key(0), 0, BATCH, cfg.context))
        steps = {"functree": functree_step(cfg), "nanoGPT, eager": nanogpt_step(args.nanogpt, cfg)}
        medians = interleaved({name: functools.partial(f, batch) for name, f in steps.items()}, args.rounds)
        report("one train step of nanoGPT's CPU setting", medians, "functree", {"nanoGPT, eager": 0.8})

    script = Path(__file__).parents[2] / "experiments" / "gpt.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), "--preset", "nanogpt-cpu", "--text", str(shakespeare), "--name", "run"]
        command += ["--steps", str(args.steps), *([] if args.compile else ["--no-compile"])]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        result = json.loads((Path(folder) / "runs/gpt/run/result.json").read_text())
    verdict = "reached" if result["val_loss"] <= 1.88 else "missed"
    print(f"validation loss after {result['steps']} steps: {result['val_loss']:.4f} (target at most 1.88: {verdict})")


if __name__ == "__main__":
    main()
