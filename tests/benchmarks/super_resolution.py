"""The compiled train step of EDSR beside the same nn.Module under torch.compile with fused AdamW; and the norms of the
gradients of all examples, of DRCN and DRRN, whose weights are used again and again, beside the plain compiled one.

    python tests/benchmarks/super_resolution.py [--blocks 16] [--width 64] [--patch 48] [--batch 16] [--rounds 9]
        [--threads 2] [--device cpu]
    python tests/benchmarks/super_resolution.py --norms [--recursions 9] [--width 64] [--patch 48] [--batch 16]

EDSR enlarges x2 from patches of half the size, and minimises the mean absolute error. Both start from the same weights;
the losses of three steps must agree. Of the norms, those of the whole tree are compared with vmap(grad)'s first.
"""

import argparse
import time

import torch
from timing import interleaved, report
from torch import Tensor, nn

from core import per_example, random, spec, tree
from nets.superresolution import drcn, drrn, edsr
from train import losses, optimizers
from train.step import make_step, start

RATE, BETAS, DECAY = 1e-4, (0.9, 0.999), 0.01


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs[1](self.convs[0](x).relu())


class Module(nn.Module):
    """EDSR x2, from our parameters."""

    def __init__(self, cfg: edsr.Config, params: dict):
        super().__init__()
        width = cfg.width
        self.white, self.blocks = cfg.white, nn.ModuleList([Block(width) for _ in range(cfg.blocks)])
        self.head, self.body = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.up, self.tail = nn.Conv2d(width, 4 * width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.register_buffer("mean", torch.tensor(edsr.MEAN)[:, None, None], persistent=False)
        values = dict(tree.items(params))
        names = {f"blocks.{b}.convs.{i}": f"blocks.{b}.{i}" for b in range(cfg.blocks) for i in range(2)}
        names |= {name: name for name in ("head", "body", "tail")} | {"up": "up.0.0"}
        state = {f"{a}.{leaf}": values[f"{b}.{leaf}"] for a, b in names.items() for leaf in ("bias", "weight")}
        self.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.head(self.white * (x - self.mean))
        for block in self.blocks:
            y = block(y)
        x = nn.functional.pixel_shuffle(self.up(x + self.body(y)), 2)
        return self.tail(x) / self.white + self.mean


def module_step(cfg: edsr.Config, params: dict, batch: tuple[Tensor, Tensor], device: str):
    module = Module(cfg, params).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), RATE, BETAS, weight_decay=DECAY, fused=True)
    compiled = torch.compile(lambda: (module(batch[0]) - batch[1]).abs().mean(), fullgraph=True, dynamic=False)

    def step():
        loss = compiled()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def functree_step(cfg: edsr.Config, params: dict, batch: tuple[Tensor, Tensor], device: str):
    optimizer = optimizers.adamw(RATE, *BETAS, weight_decay=DECAY)
    state = start(random.key(1, device), tree.map(torch.clone, params), edsr.spec(cfg), optimizer)

    def loss(params, batch, keys):
        return losses.l1(edsr.apply(params, batch[0], cfg), batch[1])

    train = make_step(loss, optimizer, donate=True, update_norm=False)

    def step():
        nonlocal state
        state, metrics = train(state, batch)
        return metrics["loss"]

    return step


def train_steps(args: argparse.Namespace) -> None:
    cfg = edsr.Config(blocks=args.blocks, width=args.width)
    params = tree.move(spec.init(random.key(0), edsr.spec(cfg)), args.device)
    sizes = args.patch // 2, args.patch
    batch = tuple(random.uniform(random.key(n), (args.batch, 3, n, n)).to(args.device) for n in sizes)
    steps = {make.__name__: make(cfg, params, batch, args.device) for make in (functree_step, module_step)}
    values = {name: [float(step()) for _ in range(3)][-1] for name, step in steps.items()}
    print("loss after 3 steps:", {name: round(value, 6) for name, value in values.items()})
    assert max(values.values()) - min(values.values()) < 1e-4, values
    medians = interleaved(dict(zip(("functree", "nn.Module"), steps.values(), strict=True)), args.rounds)
    title = f"one train step of EDSR, {args.blocks} blocks x {args.width}, patches of {args.patch}, batch {args.batch}"
    report(title, medians, "functree", {"nn.Module": 0.95})


def norms(args: argparse.Namespace) -> None:
    x, y = (random.uniform(random.key(i), (args.batch, 1, args.patch, args.patch)).to(args.device) for i in (0, 1))
    for net, cfg in (
        (drcn, drcn.Config(args.recursions, args.width)),
        (drrn, drrn.Config(1, args.recursions, args.width)),
    ):
        params = tree.move(spec.init(random.key(0), net.spec(cfg)), args.device)

        def loss(params, batch, net=net, cfg=cfg):
            return (net.apply(params, batch[0], cfg) - batch[1]).square().flatten(1).mean(1)

        def plain(params, batch, loss=loss):
            return torch.func.grad(lambda p: loss(p, batch).mean())(params)

        def watched(params, batch, loss=loss):
            out = per_example.reports(loss, params, batch)
            return out.mean, out.norm, out.total_norm

        some = x[:2], y[:2]
        each = per_example.each(loss, params, some)
        expected = torch.stack([g.flatten(1).norm(dim=1) for g in tree.leaves(each)]).norm(dim=0)
        torch.testing.assert_close(watched(params, some)[2], expected, rtol=1e-4, atol=0)
        calls = {"functree": watched, "plain gradient": plain}
        torch._dynamo.reset()
        compiled = {name: torch.compile(f, fullgraph=True, dynamic=False) for name, f in calls.items()}
        runs = {name: lambda f=f, params=params: f(params, (x, y)) for name, f in compiled.items()}
        medians = interleaved(runs, args.rounds, clock=time.process_time if args.device == "cpu" else time.perf_counter)
        title = f"norms of {net.__name__.rpartition('.')[2]}, {args.recursions} recursions, {args.width} wide"
        report(title, medians, "functree", {"plain gradient": 1.5})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", action="store_true")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--recursions", type=int, default=9)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--patch", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    norms(args) if args.norms else train_steps(args)


if __name__ == "__main__":
    main()
