r"""The compiled train step of an image classifier against torchvision's module under torch.compile, optimizer fused.

Both start from the same weights, and are first compared: the losses of two steps must agree. (Later ones drift apart:
batch norm amplifies rounding.) Dropout and stochastic depth are off in both.

    python tests/benchmarks/classifiers.py [--net resnet18] [--size 64] [--batch 32] [--optimizer sgd] [--rounds 30]
    python tests/benchmarks/classifiers.py --net resnet50 --size 224 --batch 256 --device cuda \
        --bfloat16 --channels-last

Nets: resnet18, resnet50, convnext_tiny, mobilenet_v2, vit_s_16, vit_b_16.
"""

import argparse
import contextlib
import dataclasses
import functools

import torch
import torchvision_operators  # noqa: F401
from timing import interleaved, report
from torchvision import models

from core import random, tree
from nets.classifiers import by_name
from nets.weights import fill
from train import optimizers
from train.losses import cross_entropy
from train.step import Policy, make_step, start

CLASSES = 1000


def torchvision_net(name: str, size: int) -> torch.nn.Module:
    small = {"patch_size": 16, "num_layers": 12, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536}
    make = {
        "convnext_tiny": functools.partial(models.convnext_tiny, stochastic_depth_prob=0.0),
        "mobilenet_v2": functools.partial(models.mobilenet_v2, dropout=0.0),
        "vit_s_16": functools.partial(models.VisionTransformer, image_size=size, **small),
        "vit_b_16": functools.partial(models.vit_b_16, image_size=size),
    }
    return make.get(name) or getattr(models, name)


def our_net(name: str, size: int):
    net, cfg = by_name.configured(name, channels=3, classes=CLASSES, size=size)
    off = {
        field.name: 0.0 for field in dataclasses.fields(cfg) if "dropout" in field.name or "stochastic" in field.name
    }
    return net, dataclasses.replace(cfg, **off)


def functree_step(net, cfg, values, device, args):
    model = net.spec(cfg)
    rules = {
        "sgd": lambda: optimizers.sgd(1e-3, momentum=0.9, weight_decay=1e-4),
        "adamw": lambda: optimizers.adamw(1e-4, weight_decay=0.05),
    }
    optimizer = rules[args.optimizer]()

    def loss(params, batch, keys):
        pixels, labels = batch
        return cross_entropy(net.apply(params, pixels, cfg, train=True), labels)

    state = start(random.key(1, device), tree.map(torch.clone, values), model, optimizer)
    policy = Policy(torch.bfloat16) if args.bfloat16 else Policy()
    train = make_step(loss, optimizer, donate=True, update_norm=False, policy=policy)

    def step(batch):
        nonlocal state
        state, metrics = train(state, batch)
        return metrics["loss"]

    return step


def module_step(module, args):
    rules = {
        "sgd": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, weight_decay=1e-4, fused=True),
        "adamw": lambda p: torch.optim.AdamW(p, 1e-4, weight_decay=0.05, fused=True),
    }
    optimizer = rules[args.optimizer](list(module.parameters()))
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    half = torch.autocast(args.device, torch.bfloat16) if args.bfloat16 else contextlib.nullcontext()

    def step(batch):
        pixels, labels = batch
        with half:
            value = torch.nn.functional.cross_entropy(compiled(pixels), labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "adamw"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(2)
    torch.manual_seed(0)
    net, cfg = our_net(args.net, args.size)
    module = torchvision_net(args.net, args.size)(num_classes=CLASSES)
    if getattr(module, "heads", None) is not None:  # torchvision starts a ViT's head at zero, which hides differences
        torch.nn.init.normal_(module.heads.head.weight, std=0.02)
    values = tree.move(fill(net.spec(cfg), module.state_dict(), net.rename_table(cfg)), device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    module = module.to(device).to(memory_format=layout)
    pixels = random.normal(random.key(2, device), (args.batch, 3, args.size, args.size))
    labels = random.randint(random.key(3, device), (args.batch,), 0, CLASSES).long()
    batch = (pixels.contiguous(memory_format=layout), labels)

    steps = {"functree": functree_step(net, cfg, values, device, args), "torchvision": module_step(module, args)}
    losses = {name: [float(step(batch)) for _ in range(2)] for name, step in steps.items()}
    print("loss of two steps:", {name: [round(x, 4) for x in values] for name, values in losses.items()})
    tolerance = 0.05 if args.bfloat16 else 2e-3
    worst = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    assert worst < tolerance, f"the losses differ by {worst}"

    def timed(step):
        def run():
            step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    medians = interleaved({name: timed(step) for name, step in steps.items()}, args.rounds)
    title = f"one train step of {args.net}, {args.size} x {args.size}, batch {args.batch}, {args.optimizer}"
    report(title, medians, "functree", {"torchvision": 0.95 if device.type == "cpu" else 1.0})
    print("  images/s:", {name: round(args.batch / seconds, 1) for name, seconds in medians.items()})


if __name__ == "__main__":
    main()
