"""Peak memory of the first backward pass with every example's gradient norm, beside a plain one.

A multilayer perceptron 5120, 2560, 1280, batch 32, float32: the example with which Opacus presents ghost clipping
(https://pytorch.org/blog/clipping-in-opacus: 62.5 MB plain, 63 MB with ghost clipping, 3663 MB with hooks). Measured is
the rise of resident memory over what stays: parameters and inputs are not in it, gradients are. The norms must be the
same.

    python tests/benchmarks/per_example_memory.py

Needs opacus for its rows: pip install --no-deps opacus opt_einsum.
"""

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

CFG, BATCH, TARGET = mlp.Config((5120, 2560, 1280)), 32, 1.05


def losses(params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(mlp.apply(params, batch[0], CFG), batch[1], reduction="none")


def plain(params, batch):
    return torch.func.grad(lambda p: losses(p, batch).mean())(params)


def functree(params, batch):
    found = per_example.reports(losses, params, batch)
    return found.sum, found.total_norm


def module(params) -> nn.Module:
    made = nn.Sequential(nn.Linear(5120, 2560), nn.ReLU(), nn.Linear(2560, 1280))
    for layer, values in zip((made[0], made[2]), params["layers"], strict=True):
        layer.load_state_dict(values)
    return made


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
                [p.grad_sample.norm(dim=-1).reshape(BATCH, -1).norm(dim=1) for p in wrapped.parameters()]
            )
        gradients = [p.grad for p in wrapped.parameters()]
        wrapped.zero_grad(set_to_none=True)
        return gradients, norms.norm(dim=0)

    return run


def main() -> None:
    require_prompt_free()
    warnings.simplefilter("ignore")
    params = spec.init(random.key(0), mlp.spec(CFG))
    batch = random.normal(random.key(1), (BATCH, 5120)), random.randint(random.key(2), (BATCH,), 0, 1280).long()
    compiled = torch.compile(functree, fullgraph=True, dynamic=False)
    runs = {
        "plain gradient, eager": lambda: plain(params, batch),
        "functree, eager": lambda: functree(params, batch),
        "functree, compiled": lambda: compiled(params, batch),
    }
    if importlib.util.find_spec("opacus") is None:
        print("Opacus: not installed")
    else:
        runs |= {f"Opacus, {way}": opacus(params, batch, way == "ghost") for way in ("ghost", "hooks")}
    expected = functree(params, batch)[1]
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
