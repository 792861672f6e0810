"""Packages against eager torch: a cached decode step of a GPT in AOTInductor, ResNet-8 in onnxruntime, and 8-bit nets.

decode: GPT-2 of 4 layers, 128 wide, a token after a cache of 64 positions; --form onnx is quicker to build.
resnet: CIFAR's ResNet-8 on batches of 32x32 pictures, as it is and with 8-bit convolutions (static, onnxruntime).
quality: a GPT that learns tiny Shakespeare and a ResNet-8 that learns MNIST, in 8 bits against float32: size, loss, the
    share of equal argmaxes, accuracy. Both are in $FUNCTREE_DATA.

    python tests/benchmarks/ship.py [--what decode resnet quality] [--rounds 50] [--batch 1] [--steps 345]
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from timing import interleaved, report

from core import int4, int8, random, spec, tree
from nets.classifiers import resnet
from nets.language import gpt2
from train import optimizers
from train.data import batching
from train.data.images import sets
from train.data.text import text
from train.losses import cross_entropy
from train.optimizers import schedules
from train.run import compiler
from train.ship import Axis, compare, export, load, save
from train.ship import int8 as integers
from train.step import create, make_step


@torch.no_grad()
def decode(args: argparse.Namespace, folder: Path) -> None:
    cfg = gpt2.Config(256, 64, layers=4, heads=4, width=128, dropout=0.0)
    params = spec.init(random.key(0), gpt2.spec(cfg))
    inputs = {
        "caches": gpt2.empty_caches(params, cfg, args.batch, 64),
        "position": torch.full((args.batch,), 32),
        "tokens": torch.zeros(args.batch, 1, dtype=torch.int64),
    }

    def step(params, caches, position, tokens):
        return gpt2.decode(params, tokens, caches, position, cfg)

    program = export(step, params, inputs)
    one = load(save(program, folder / "decode", args.form))
    error = compare.difference(tree.leaves(step(params, **inputs)), tree.leaves(one(**inputs)))
    seconds = one.manifest["build_seconds"]
    ours = f"{args.form} (built in {seconds:.0f} s, error {error:.0e})"
    medians = interleaved({"eager": partial(step, params, **inputs), ours: partial(one, **inputs)}, args.rounds)
    report(f"cached decode step, batch {args.batch}", medians, ours, {"eager": 0.5})


def calibrated(name: str, apply, params, pixels, folder: Path, high: int):
    """A classifier's ONNX package, and that with 8-bit convolutions."""
    program = export(apply, params, {"x": pixels[:2]}, {"x": {0: Axis("batch", 1, high)}})
    one = load(save(program, folder / name, "onnx"))
    batches = ({"x": pixels[i : i + 1]} for i in range(32))
    return one, load(integers.quantise(one, program, folder / f"{name}-int8", batches))


@torch.no_grad()
def classifier(args: argparse.Namespace, folder: Path) -> None:
    cfg = resnet.PRESETS["cifar-resnet8"]
    params = spec.init(random.key(0), resnet.spec(cfg))
    x = random.normal(random.key(1), (max(64, args.batch), cfg.channels, 32, 32))
    apply = partial(resnet.apply, cfg=cfg)
    one, small = calibrated("resnet8", apply, params, x, folder, max(64, args.batch))
    x = x[: args.batch]
    counts = small.manifest["quantised"]
    ours, eight = "onnxruntime", f"onnxruntime, {counts['quantised']} of {counts['products']} products of 8 bits"
    calls = {"eager": partial(apply, params, x), ours: partial(one, x=x), eight: partial(small, x=x)}
    medians = interleaved(calls, args.rounds)
    report(f"ResNet-8, batch {args.batch}", medians, ours, {"eager": 0.3})
    report("", medians, eight, {ours: 0.7})


def learned(model, losses, batches, steps: int, rate: float):
    """The parameters and Stats after some steps of AdamW."""
    optimizer = optimizers.adamw(schedules.warmup_cosine(rate, max(1, steps // 20), steps))
    state, step = create(random.key(0), model, optimizer), make_step(losses, optimizer, donate=True, compile=False)
    for t in range(steps):
        state, _ = step(state, batches(t))
    return tree.merge(state.params, state.stats)


def language(args: argparse.Namespace) -> None:
    path = Path(os.environ["FUNCTREE_DATA"]) / "tinyshakespeare/input.txt"
    data = text.open_text(path, None, Path(tempfile.gettempdir()), progress=False)
    train, held = text.split(data.tokens, blocks=1, least=256)
    cfg = gpt2.Config(data.tokenizer.vocabulary_size, 64, layers=4, heads=4, width=128, dropout=0.0)

    def losses(params, batch, keys):
        return cross_entropy(gpt2.apply(params, batch[0], cfg).flatten(0, 1), batch[1].flatten())

    batches = partial(text.token_batch, train, random.key(1), batch=16, length=64)
    params = learned(gpt2.spec(cfg), losses, lambda t: batches(step=t), args.steps, 2e-3)
    x, y = next(text.windows(held, 64, 64))  # each (windows, 64)
    small, four = int8.quantise(params), int4.quantise(params)
    forms = {"8 bits": (int8.unformed(small), small), "4 bits in groups": (int4.unformed(four), four)}
    with torch.no_grad():
        expected = gpt2.apply(params, x, cfg)
        loss = cross_entropy(expected.flatten(0, 1), y.flatten())
        print(f"GPT after {args.steps} steps, {y.numel()} held-out tokens: loss {loss:.5f}")
        for name, (leaves, stored) in forms.items():
            logits = gpt2.apply(leaves, x, cfg)
            more = cross_entropy(logits.flatten(0, 1), y.flatten()) - loss
            size, same = int8.nbytes(stored) / int8.nbytes(params), compare.agreement(expected, logits, -1)
            print(f"  {name}: size {size:.3f} of float32, loss {more:+.5f}, same argmax {same:.2%}")


def pictures(args: argparse.Namespace, folder: Path) -> None:
    data = sets.read_all(str(Path(os.environ["FUNCTREE_DATA"]) / "mnist"))
    std, mean = torch.std_mean(data.train.images)
    cfg = resnet.Config(**{**vars(resnet.PRESETS["cifar-resnet8"]), "channels": 1, "classes": len(data.classes)})

    def apply(params, x):
        return resnet.apply(params, (x - mean) / std, cfg)

    def losses(params, batch, keys):
        return cross_entropy(resnet.apply(params, (batch[0] - mean) / std, cfg, train=True), batch[1])

    def batch(t):
        rows = batching.epoch_batch(random.key(1), t, len(data.train.labels), 100)
        return data.train.images[rows], data.train.labels[rows]

    params = learned(resnet.spec(cfg), losses, batch, args.steps, 5e-3)
    one, small = calibrated("mnist", apply, params, data.train.images, folder, 500)
    right = {}
    for name, call in {"float32": one, "8 bits": small}.items():
        parts = [call(x=x).argmax(1) for x in data.test.images.split(500)]
        right[name] = float((torch.cat(parts) == data.test.labels).float().mean())
    sizes = [package.manifest["bytes"] / 1e6 for package in (one, small)]
    counts = small.manifest["quantised"]
    print(
        f"ResNet-8 after {args.steps} steps on MNIST: {right['float32']:.2%} right, with 8 bits {right['8 bits']:.2%};"
    )
    print(f"  {counts['quantised']} of {counts['products']} products; {sizes[0]:.2f} MB, {sizes[1]:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("decode", "resnet", "quality")
    parser.add_argument("--what", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=345)
    parser.add_argument("--form", choices=("aoti", "onnx", "torchscript"), default="aoti")
    args = parser.parse_args()
    compiler.configure()
    with tempfile.TemporaryDirectory() as place:
        if "decode" in args.what:
            decode(args, Path(place))
        if "resnet" in args.what:
            classifier(args, Path(place))
        if "quality" in args.what:
            language(args)
            pictures(args, Path(place))


if __name__ == "__main__":
    main()
