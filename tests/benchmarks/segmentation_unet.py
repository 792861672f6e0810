r"""The compiled train step of the U-Net of segmentation against the same nn.Module under torch.compile, AdamW fused.

The loss is the cross-entropy of each pixel. Both start from the same weights, and are first compared: the losses of two
steps must agree.

    python tests/benchmarks/segmentation_unet.py [--width 16] [--side 128] [--batch 8] [--rounds 20]
    python tests/benchmarks/segmentation_unet.py --clock process    where other work runs beside it
"""

import argparse
import time

import torch
from module_unet import UNet
from timing import interleaved, report
from torch.nn import functional as F

from core import random
from nets.dense import unet
from nets.weights import fill
from train import optimizers
from train.losses.dense import pixel_cross_entropy
from train.step import make_step, start


def functree_step(cfg, values):
    optimizer = optimizers.adamw(1e-3, weight_decay=0.01)

    def loss(params, batch, keys):
        return pixel_cross_entropy(unet.apply(params, batch[0], cfg, train=True), batch[1])

    state = start(random.key(1), values, unet.spec(cfg), optimizer)
    train = make_step(loss, optimizer, donate=True, update_norm=False)

    def step(batch):
        nonlocal state
        state, metrics = train(state, batch)
        return metrics["loss"]

    return step


def module_step(module):
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3, weight_decay=0.01, fused=True)
    compiled = torch.compile(lambda x, y: F.cross_entropy(module(x), y), fullgraph=True, dynamic=False)

    def step(batch):
        value = compiled(*batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 16), ("depth", 4), ("side", 128), ("batch", 8), ("classes", 11), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=("wall", "process"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cfg = unet.Config(args.width, args.depth, classes=args.classes)
    module = UNet(cfg.width, cfg.depth, cfg.bilinear, cfg.classes)
    values = fill(unet.spec(cfg), module.state_dict(), unet.rename_table(cfg))
    images = random.normal(random.key(2), (args.batch, 3, args.side, args.side))
    labels = random.randint(random.key(3), (args.batch, args.side, args.side), 0, args.classes).long()
    batch = (images, labels)

    steps = {"functree": functree_step(cfg, values), "nn.Module, compiled": module_step(module)}
    losses = {name: [float(step(batch)) for _ in range(2)] for name, step in steps.items()}
    print("loss of two steps:", {name: [round(x, 5) for x in values] for name, values in losses.items()})
    worst = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    assert worst < 1e-3, f"the losses differ by {worst}"
    clock = time.process_time if args.clock == "process" else time.perf_counter
    contestants = {name: lambda step=step: step(batch) for name, step in steps.items()}
    medians = interleaved(contestants, args.rounds, clock=clock)
    title = f"one train step of a U-Net of width {args.width}, {args.side} x {args.side}, batch {args.batch}, adamw"
    report(title, medians, "functree", {"nn.Module, compiled": 0.95})


if __name__ == "__main__":
    main()
