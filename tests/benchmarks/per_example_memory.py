"""Peak memory of the first backward pass with every example's gradient norm, beside a plain one.

An MLP of 5120, 2560, 1280, batch 32, float32: the example with which Opacus presents ghost clipping
(https://pytorch.org/blog/clipping-in-opacus: 62.5 MB plain, 63 MB with ghost clipping, 3663 MB with hooks). Measured is
the rise of resident memory over what stays: parameters and inputs are not in it, gradients are. The norms must be the
same.

    python tests/benchmarks/per_example_memory.py [--sizes 5120 2560 1280] [--batch 32]

Needs opacus for its rows: pip install --no-deps opacus opt_einsum.
"""

import argparse
import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from memory import peak, require_prompt_free
from torch import Tensor, nn

from core import per_example, random, spec
from nets.classifiers import mlp
from train.losses import cross_entropy

TARGET = 1.05


def losses(params, batch: tuple[Tensor, Tensor], cfg: mlp.Config) -> Tensor:
    return cross_entropy(mlp.apply(params, batch[0], cfg), batch[1], reduction="none")


def plain(params, batch, cfg):
    return torch.func.grad(lambda p: losses(p, batch, cfg).mean())(params)


def functree(params, batch, cfg):
    out = per_example.reports(functools.partial(losses, cfg=cfg), params, batch)
    return out.sum, out.total_norm


def module(params) -> nn.Module:
    layers: list[nn.Module] = []
    for values in params["layers"]:
        layers += [nn.Linear(*values["weight"].shape[::-1]), nn.ReLU()]
        layers[-2].load_state_dict(values)
    return nn.Sequential(*layers[:-1])


def opacus(params, batch, ghost: bool) -> Callable:
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrap = GradSampleModuleFastGradientClipping if ghost else GradSampleModule
    wrapped = wrap(module(params), loss_reduction="sum")

    def run():
        F.cross_entropy(wrapped(batch[0]), batch[1], reduction="sum").backward()
        if ghost:
            norms = torch.stack([p._norm_sample for p in wrapped.parameters()])
        else:
            # Row by row: over all entries at once, float32 is off by 3e-4.
            norms = torch.stack(
                [p.grad_sample.norm(dim=-1).reshape(len(batch[1]), -1).norm(dim=1) for p in wrapped.parameters()]
            )
        gradients = [p.grad for p in wrapped.parameters()]
        wrapped.zero_grad(set_to_none=True)
        return gradients, norms.norm(dim=0)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5120, 2560, 1280])
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    require_prompt_free()
    warnings.simplefilter("ignore")
    cfg = mlp.Config(tuple(args.sizes))
    params = spec.init(random.key(0), mlp.spec(cfg))
    batch = (
        random.normal(random.key(1), (args.batch, args.sizes[0])),
        random.randint(random.key(2), (args.batch,), 0, args.sizes[-1]).long(),
    )
    compiled = torch.compile(functree, fullgraph=True, dynamic=False)
    runs = {
        "plain gradient, eager": lambda: plain(params, batch, cfg),
        "functree, eager": lambda: functree(params, batch, cfg),
        "functree, compiled": lambda: compiled(params, batch, cfg),
    }
    if importlib.util.find_spec("opacus") is None:
        print("Opacus: not installed")
    else:
        runs |= {f"Opacus, {way}": opacus(params, batch, way == "ghost") for way in ("ghost", "hooks")}
    expected = functree(params, batch, cfg)[1]
    for name, run in runs.items():
        if not name.startswith("plain"):
            torch.testing.assert_close(run()[1], expected, rtol=1e-4, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    peaks = {name: peak(run) for name, run in runs.items()}
    least = peaks["plain gradient, eager"]
    for name, size in peaks.items():
        verdict = ("reached" if size <= TARGET * least else "missed") if name.startswith("functree") else ""
        print(f"  {name:<24} {size / 2**20:8.1f} MiB  {size / least:6.3f} of the plain gradient's  {verdict}")


if __name__ == "__main__":
    main()
