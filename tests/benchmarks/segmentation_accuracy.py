r"""Mean IoU of the U-Net here and of another one in a plain loop: same windows, steps, loss, schedule and evaluation.

The other is segmentation_models_pytorch's U-Net over an encoder without pretrained weights, if that library is
installed, or a U-Net of the same sizes in torch.nn. Both are judged in the size of the masks' files.

    python tests/benchmarks/segmentation_accuracy.py --data CamVid --steps 600
    python tests/benchmarks/segmentation_accuracy.py --data CamVid --steps 600 --other module
"""

import argparse
import time
from collections.abc import Callable

import torch
import torchvision_operators  # noqa: F401
from module_unet import UNet
from torch import Tensor, nn
from torch.nn import functional as F

from core import random, tree
from nets.dense import unet
from train import optimizers
from train.data.images import mask_sets
from train.data.images.masks import VOID
from train.data.images.windows import Changes, windows
from train.losses.dense import pixel_cross_entropy
from train.metrics import segmentation
from train.optimizers import schedules
from train.step import create, make_step

Net = Callable[[Tensor], Tensor]


def prepared(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels) * 4 - 2


@torch.no_grad()
def mean_iou(net: Net, part: mask_sets.Segmented, classes: int) -> float:
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for image, mask in zip(part.images, part.masks, strict=True):
        probs = net(prepared(image[None])).softmax(1)
        probs = F.interpolate(probs, tuple(mask.shape), mode="bilinear", align_corners=False)
        counts += segmentation.confusion(probs[0].argmax(0), mask, classes, VOID)
    return float(segmentation.iou(counts).nanmean())


def functree(args, batches, classes: int, weight: Tensor | None) -> tuple[Net, int]:
    cfg = unet.Config(args.width, args.depth, classes=classes)
    rate = schedules.warmup_cosine(args.learning_rate, args.steps // 20, args.steps)
    optimizer = optimizers.adamw(rate, weight_decay=0.01, mask=lambda name, leaf: leaf.ndim >= 2)

    def loss(params, batch, keys):
        logits = unet.apply(params, prepared(batch[0]), cfg, train=True)
        return pixel_cross_entropy(logits, batch[1].long(), weight=weight, ignore_id=VOID)

    state = create(random.key(args.seed), unet.spec(cfg), optimizer)
    step = make_step(loss, optimizer, donate=True, compile=args.compile)
    for batch in batches():
        state, _ = step(state, batch)
    values = tree.merge(state.params, state.stats)
    return lambda x: unet.apply(values, x, cfg), tree.count(state.params)


def other(args, batches, classes: int, weight: Tensor | None) -> tuple[Net, int]:
    torch.manual_seed(args.seed)
    if args.other == "smp":
        import segmentation_models_pytorch as smp

        decoder = (64, 48, 32, 24, 16)
        module = smp.Unet(args.encoder, encoder_weights=None, decoder_channels=decoder, classes=classes)
    else:
        module = UNet(args.width, args.depth, False, classes)
    decayed = [p for p in module.parameters() if p.ndim >= 2]
    plain = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.learning_rate)
    rate = schedules.warmup_cosine(args.learning_rate, args.steps // 20, args.steps)
    for at, (pixels, masks) in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(torch.tensor(at)))
        value = F.cross_entropy(module(prepared(pixels)), masks.long(), weight, ignore_index=VOID)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return padded(module.eval()), sum(p.numel() for p in module.parameters())


def padded(module: nn.Module, multiple: int = 32) -> Net:
    """Pictures of any size: padded with their last row and column, the logits cut again."""

    def net(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        whole = F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        return module(whole)[..., :height, :width]

    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--other", default="smp", choices=("smp", "module"))
    parser.add_argument("--encoder", default="mobilenet_v2")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--longest", type=int, default=240)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = mask_sets.open_masks(args.data, args.longest)
    classes = len(data.table.classes)
    weight = mask_sets.median_weights(data.train, classes)
    changes = Changes(zoom=0.25, flip=True, colour_jitter=0.2)

    def batches():
        for step in range(args.steps):
            yield windows(random.key(args.seed + 1), step, args.batch, args.size, data.train, changes)

    print(f"{len(data.train.images)} pictures to learn from, {len(data.test.images)} to test on, {classes} classes")
    for name, train in (("functree", functree), (args.other, other)):
        start = time.process_time()
        net, parameters = train(args, batches, classes, weight)
        seconds = time.process_time() - start
        figure = mean_iou(net, data.test, classes)
        print(f"{name:10} mean IoU {figure:.4f}, {parameters:,} parameters, {seconds:.0f} processor seconds")


if __name__ == "__main__":
    main()
