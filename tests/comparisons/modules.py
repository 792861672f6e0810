"""The table of architectures of other libraries: whose per-example norms are exact. README.md explains the words.

python tests/comparisons/modules.py            prints it
python tests/comparisons/modules.py --write    puts it between its markers of README.md
python tests/comparisons/modules.py --modules gpt2 swin --errors
"""

import argparse
import copy
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, whose tests are no package that is installed

import torch
from table import EXACT, markdown, on_purpose, percent, versions, write
from torch import Tensor

from core import per_example, tree
from core.lift import lift
from tests.registry.public_modules import BUILDS, N, Public, public

BEGIN, END = "<!-- modules.py begins -->", "<!-- modules.py ends -->"


def oracle(about: Public) -> Tensor:
    """(N,): plain autograd on batches of one."""
    norms, parameters = [], list(about.module.parameters())
    for i in range(N):
        loss = about.losses(about.module, tuple(x[i : i + 1] for x in about.batch)).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norms.append(torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt())
    return torch.stack(norms)


def functree(about: Public) -> Tensor:
    params, stats, apply = lift(about.module)

    def loss(params, batch):
        values = tree.merge(params, stats)
        return about.losses(lambda *args, **kwargs: apply(values, *args, **kwargs), batch)

    return per_example.reports(loss, params, about.batch).total_norm


def vmap_grad(about: Public) -> Tensor:
    def loss(params, *example):
        def call(*args, **kwargs):
            return torch.func.functional_call(about.module, params, args, kwargs)

        return about.losses(call, tuple(x[None] for x in example)).sum()

    params = {name: p.detach() for name, p in about.module.named_parameters()}
    dims = (None, *(0 for _ in about.batch))
    gradients = torch.func.vmap(torch.func.grad(loss), dims)(params, *about.batch)
    return sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()


def opacus_hooks(about: Public) -> Tensor:
    from opacus import GradSampleModule

    module = GradSampleModule(about.module, loss_reduction="sum")
    for layer in about.module.modules():  # it looks at layers in training mode only; what draws stays in eval mode
        layer.training = any(True for _ in layer.parameters(recurse=False))
    about.losses(module, about.batch).sum().backward()
    left = [p.grad_sample for p in module.parameters() if getattr(p, "grad_sample", None) is not None]
    return sum(g.flatten(1).square().sum(1) for g in left).sqrt()


def torchjd(about: Public) -> Tensor:
    from torchjd.autogram import Engine

    engine = Engine(about.module, batch_dim=0)
    return engine.compute_gramian(about.losses(about.module, about.batch)).diagonal().sqrt()


TOOLS = {
    "functree": functree,
    "vmap(grad)": vmap_grad,
    "Opacus hooks": opacus_hooks,
    "TorchJD batch_dim=0": torchjd,
}


def verdict(tool: str, name: str) -> tuple[str, str]:
    """(the verdict on a tool for an architecture, its own message)."""
    about = public(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            norms = TOOLS[tool](about._replace(module=copy.deepcopy(about.module))).detach()
    except Exception as error:
        return ("refuses" if on_purpose(error) else "stops"), f"{type(error).__name__}: {error}"
    if norms.shape != (N,):
        return f"shape {tuple(norms.shape)}", ""
    expected = oracle(about)
    error = float(((norms - expected).abs() / expected).max())
    return ("exact" if error <= EXACT else f"wrong: {percent(error)}"), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--errors", action="store_true", help="print what the tools raise, too")
    parser.add_argument("--modules", nargs="+", default=list(BUILDS), choices=list(BUILDS))
    args = parser.parse_args()
    if args.write and args.modules != list(BUILDS):
        parser.error("--write needs all modules")
    logging.disable(logging.WARNING)
    rows = {}
    for name in args.modules:
        verdicts = {tool: verdict(tool, name) for tool in TOOLS}
        rows[name.replace("_", " ")] = [words for words, _ in verdicts.values()]
        print(name, *rows[name.replace("_", " ")], sep="; ", flush=True)
        for tool, (words, text) in verdicts.items():
            if args.errors and text:
                print(f"{name}, {tool}: {words}: {' '.join(text.split())[:300]}")
    text = f"{markdown(rows, list(TOOLS))}\n\n{versions(list(TOOLS), 'transformers', 'torchvision', 'diffusers')}"
    print(text)
    if args.write:
        write(text, BEGIN, END)


if __name__ == "__main__":
    main()
