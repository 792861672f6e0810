r"""The compiled train step of the denoising U-Net against diffusers' UNet2DModel under torch.compile, AdamW fused.

The loss is the simple one, the mean squared error of the noise. Both start from the same weights, and are first
compared: the losses of two steps must agree. Dropout is off in both. On a CPU both are compiled without inductor's
layout optimization: with it, torch 2.13 returns zeros for most gradients of diffusers' module.

    python tests/benchmarks/diffusion_unet.py [--preset mnist] [--batch 64] [--rounds 30]
    python tests/benchmarks/diffusion_unet.py --preset cifar --batch 128 --device cuda --bfloat16 --channels-last
"""

import argparse
import contextlib
import dataclasses

import torch
import torchvision_operators  # noqa: F401
from diffusers import UNet2DModel
from timing import interleaved, report

from core import random, tree
from nets.generative import unet
from nets.weights import fill
from train import optimizers
from train.step import Policy, make_step, start

SIZES = {"digits": 8, "mnist": 28, "small": 32, "cifar": 32}
STEPS = 1000


def diffusers_net(cfg: unet.Config) -> torch.nn.Module:
    attentive = ["Attn" if i in cfg.attention else "" for i in range(len(cfg.widths))]
    return UNet2DModel(
        in_channels=cfg.channels,
        out_channels=cfg.outputs,
        freq_shift=cfg.frequency_shift,
        flip_sin_to_cos=cfg.cosine_first,
        down_block_types=tuple(f"{name}DownBlock2D" for name in attentive),
        up_block_types=tuple(f"{name}UpBlock2D" for name in reversed(attentive)),
        block_out_channels=cfg.widths,
        layers_per_block=cfg.blocks,
        downsample_padding=1 if cfg.padding == "symmetric" else 0,
        attention_head_dim=cfg.head_width or None,
        norm_num_groups=cfg.groups,
        norm_eps=cfg.eps,
    )


def noisy(batch) -> torch.Tensor:
    """sqrt(a) x + sqrt(1 - a) noise, with the a of a cosine schedule."""
    x, noise, time = batch
    angle = (time[:, None, None, None] / STEPS) * (torch.pi / 2)
    return angle.cos() * x + angle.sin() * noise


def functree_step(cfg, values, device, args):
    model = unet.spec(cfg)
    optimizer = optimizers.adamw(2e-4, weight_decay=0.01)

    def loss(params, batch, keys):
        predicted = unet.apply(params, noisy(batch).to(batch[0].dtype), batch[2], cfg, train=True)
        return (predicted.float() - batch[1].float()).square().mean()

    state = start(random.key(1, device), tree.map(torch.clone, values), model, optimizer)
    policy = Policy(torch.bfloat16) if args.bfloat16 else Policy()
    train = make_step(loss, optimizer, donate=True, update_norm=False, policy=policy)

    def step(batch):
        nonlocal state
        state, metrics = train(state, batch)
        return metrics["loss"]

    return step


def module_step(module, args):
    optimizer = torch.optim.AdamW(module.parameters(), 2e-4, weight_decay=0.01, fused=True)
    half = torch.autocast(args.device, torch.bfloat16) if args.bfloat16 else contextlib.nullcontext()

    def loss(batch):
        predicted = module(noisy(batch), batch[2], return_dict=False)[0]
        return (predicted.float() - batch[1]).square().mean()

    options = {"layout_optimization": False} if args.device == "cpu" else None
    compiled = torch.compile(loss, fullgraph=True, dynamic=False, options=options)

    def step(batch):
        with half:
            value = compiled(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mnist", choices=tuple(SIZES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cfg = dataclasses.replace(unet.PRESETS[args.preset], dropout=0.0)
    module = diffusers_net(cfg)
    values = tree.move(fill(unet.spec(cfg), module.state_dict(), unet.rename_table(cfg)), device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    module = module.to(device).to(memory_format=layout)
    shape = (2, args.batch, cfg.channels, SIZES[args.preset], SIZES[args.preset])
    x, noise = (part.contiguous(memory_format=layout) for part in random.normal(random.key(2, device), shape))
    time = random.randint(random.key(3, device), (args.batch,), 0, STEPS).long()
    batch = (x, noise, time)

    steps = {"functree": functree_step(cfg, values, device, args), "diffusers": module_step(module, args)}
    losses = {name: [float(step(batch)) for _ in range(2)] for name, step in steps.items()}
    print("loss of two steps:", {name: [round(x, 5) for x in values] for name, values in losses.items()})
    tolerance = 0.02 if args.bfloat16 else 1e-3
    worst = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    assert worst < tolerance, f"the losses differ by {worst}"

    def timed(step):
        def run():
            step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    medians = interleaved({name: timed(step) for name, step in steps.items()}, args.rounds)
    side = SIZES[args.preset]
    title = f"one train step of the U-Net '{args.preset}', {side} x {side}, batch {args.batch}, adamw"
    report(title, medians, "functree", {"diffusers": 0.95})
    print("  images/s:", {name: round(args.batch / seconds, 1) for name, seconds in medians.items()})


if __name__ == "__main__":
    main()
