r"""50 DDIM steps of a batch: our compiled step against the loop of diffusers' DDIMPipeline, the same U-Net compiled.

Theirs is a UNet2DModel under torch.compile with DDIMScheduler.step, written out as its pipeline has it: the pipeline
itself draws its own noise and makes PIL images at the end. Both start from the same weights and noise, and are first
compared: the images must agree.

    python tests/benchmarks/diffusion_sampling.py [--preset mnist] [--batch 64] [--steps 50] [--rounds 5]
    python tests/benchmarks/diffusion_sampling.py --preset cifar --device cuda
"""

import argparse

import torch
import torchvision_operators  # noqa: F401
from diffusers import DDIMScheduler
from diffusion_unet import SIZES, STEPS, diffusers_net
from timing import interleaved, report

from core import random, tree
from nets.generative import unet
from nets.weights import fill
from train.diffusion import samplers, schedules
from train.step import compiled


def functree_loop(cfg, params, steps):
    sampler = samplers.ddim(schedules.make("linear", STEPS), steps)

    def one(params, row, x, memory, noise):
        return sampler.step(lambda x, time: unet.apply(params, x, time, cfg), row, x, memory, noise)

    step = compiled(one, channels_last=True)

    @torch.no_grad()
    def run(x):
        return samplers.sample(sampler, None, x, step=lambda _, *rest: step(params, *rest))

    return run


def diffusers_loop(module, steps):
    scheduler = DDIMScheduler(STEPS)  # its defaults are the linear schedule, the noise predicted, and images clipped
    scheduler.set_timesteps(steps)
    net = torch.compile(module, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def run(x):
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t).sample, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
        return x

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mnist", choices=tuple(SIZES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cfg, side = unet.PRESETS[args.preset], SIZES[args.preset]
    module = diffusers_net(cfg).eval()
    params = tree.move(fill(unet.spec(cfg), module.state_dict(), unet.rename_table(cfg)), device)
    module = module.to(device)
    x = random.normal(random.key(2, device), (args.batch, cfg.channels, side, side))

    loops = {"functree": functree_loop(cfg, params, args.steps), "diffusers": diffusers_loop(module, args.steps)}
    images = {name: run(x) for name, run in loops.items()}
    worst = float((images["functree"] - images["diffusers"]).abs().max())
    print(f"largest difference of the images: {worst:.2e}, their standard deviation {float(x.std()):.2f}")
    assert worst < 1e-2, f"the images differ by {worst}"

    def timed(run):
        def once():
            run(x)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return once

    medians = interleaved({name: timed(run) for name, run in loops.items()}, args.rounds, warmup=1)
    title = f"{args.steps} DDIM steps of the U-Net '{args.preset}', {side} x {side}, batch {args.batch}"
    report(title, medians, "functree", {"diffusers": 0.77})


if __name__ == "__main__":
    main()
