"""The table of architectures of other libraries: whose per-example norms are exact; functree's Gram matrix, squares and
clipped sum are judged too. README.md explains the words.

python tests/comparisons/modules.py            prints it
python tests/comparisons/modules.py --write    puts it between its markers of README.md
python tests/comparisons/modules.py --modules gpt2 swin --tools "Opacus hooks" --errors
"""

import argparse
import copy
import logging
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, whose tests are no package that is installed

import torch
from table import EXACT, markdown, on_purpose, percent, relative_error, versions, write
from torch import Tensor, nn

from core import per_example, tree
from core.lift import lift
from tests.registry.public_modules import BUILDS, N, Public, public

BEGIN, END = "<!-- modules.py begins -->", "<!-- modules.py ends -->"


def oracle(about: Public) -> Tensor:
    """(N, entries of all parameters): the gradient of each example, by plain autograd on batches of one."""
    rows, parameters = [], list(about.module.parameters())
    for i in range(N):
        loss = about.losses(about.module, tuple(x[i : i + 1] for x in about.batch)).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def lifted(about: Public) -> tuple:
    """(loss, parameters) of the lifted module."""
    params, stats, apply = lift(about.module)

    def loss(params, batch):
        values = tree.merge(params, stats)
        return about.losses(lambda *args, **kwargs: apply(values, *args, **kwargs), batch)

    return loss, params


class Partial(NamedTuple):
    """The norms that a tool found, and the names of the parameters that these are of."""

    norms: Tensor
    names: set[str]


def functree(about: Public) -> Tensor:
    loss, params = lifted(about)
    return per_example.reports(loss, params, about.batch).total_norm


def functree_compiled(about: Public) -> Tensor:
    loss, params = lifted(about)
    plan = per_example.plan(loss, params, about.batch)
    torch._dynamo.reset()
    norms = torch.compile(
        lambda params, batch: per_example.reports(loss, params, batch, plan=plan).total_norm,
        backend="aot_eager",
        fullgraph=True,
        dynamic=False,
    )
    return norms(params, about.batch)


def errors(about: Public, each: Tensor) -> dict[str, float]:
    """Largest error of each of functree's other quantities, relative to the largest entry. each: (N, entries)."""
    loss, params = lifted(about)
    out = per_example.reports(loss, params, about.batch, ("gram", "square"))
    limit = each.norm(dim=1).mean()
    clipped = per_example.clipped(loss, params, about.batch, float(limit)).sum
    names = [name for name, _ in about.module.named_parameters()]

    def flat(values: tree.Tree) -> Tensor:
        return torch.cat([tree.get(values, name).flatten() for name in names])

    expected = {
        "Gram": (out.total_gram, each @ each.T),
        "squares": (flat(out.square), each.square().sum(0)),
        "clipped sum": (flat(clipped), ((limit / each.norm(dim=1)).clamp(max=1)[:, None] * each).sum(0)),
    }
    return {name: float((ours - theirs).abs().max() / theirs.abs().max()) for name, (ours, theirs) in expected.items()}


def vmap_grad(about: Public) -> Tensor:
    def loss(params, *example):
        def call(*args, **kwargs):
            return torch.func.functional_call(about.module, params, args, kwargs)

        return about.losses(call, tuple(x[None] for x in example)).sum()

    params = {name: p.detach() for name, p in about.module.named_parameters()}
    dims = (None, *(0 for _ in about.batch))
    gradients = torch.func.vmap(torch.func.grad(loss), dims)(params, *about.batch)
    return sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()


def _in_training(module: nn.Module) -> None:
    """Opacus looks at layers in training mode only; what draws stays in eval mode."""
    for layer in module.modules():
        layer.training = any(True for _ in layer.parameters(recurse=False))


def opacus_hooks(about: Public) -> Partial:
    from opacus import GradSampleModule

    module = GradSampleModule(about.module, loss_reduction="sum")
    _in_training(about.module)
    about.losses(module, about.batch).sum().backward()
    own = {n: p for n, p in about.module.named_parameters() if getattr(p, "grad_sample", None) is not None}
    return Partial(sum(p.grad_sample.flatten(1).square().sum(1) for p in own.values()).sqrt(), {*own})


def opacus_ghost(about: Public) -> Tensor:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    module = GradSampleModuleFastGradientClipping(about.module, max_grad_norm=1.0, loss_reduction="sum")
    _in_training(about.module)
    about.losses(module, about.batch).sum().backward()
    return module.get_norm_sample()


def backpack_norms(about: Public) -> Partial:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    loss = about.losses(extend(about.module), about.batch).sum()
    with backpack(BatchL2Grad()):
        loss.backward()
    own = {n: p.batch_l2 for n, p in about.module.named_parameters() if hasattr(p, "batch_l2")}
    return Partial(sum(own.values()).sqrt(), {*own})


def torchjd(about: Public) -> Tensor:
    from torchjd.autogram import Engine

    engine = Engine(about.module, batch_dim=0)
    return engine.compute_gramian(about.losses(about.module, about.batch)).diagonal().sqrt()


TOOLS = {
    "functree": functree,
    "functree, compiled": functree_compiled,
    "vmap(grad)": vmap_grad,
    "Opacus hooks": opacus_hooks,
    "Opacus ghost": opacus_ghost,
    "BackPACK BatchL2Grad": backpack_norms,
    "TorchJD batch_dim=0": torchjd,
}
LIBRARIES = ("transformers", "torchvision", "timm", "diffusers")


def verdict(tool: str, name: str) -> tuple[str, str]:
    """(the verdict on a tool for an architecture, its own message)."""
    about, default = public(name), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # some tools make tensors of the default precision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = TOOLS[tool](about._replace(module=copy.deepcopy(about.module)))
    except ModuleNotFoundError as error:
        return "not installed", str(error)
    except Exception as error:
        return ("refuses" if on_purpose(error) else "stops"), f"{type(error).__name__}: {error}"
    finally:
        torch.set_default_dtype(default)
    sizes = {n: p.numel() for n, p in about.module.named_parameters()}
    norms, names = out if isinstance(out, Partial) else (out, {*sizes})
    norms = norms.detach()
    if norms.shape != (N,):
        return f"shape {tuple(norms.shape)}", ""
    each = oracle(about)
    distances = {"norms": relative_error(norms, each.square().sum(1))}
    if tool == "functree":
        distances |= errors(about, each)
    elif not distances["norms"] <= EXACT and len(names) < len(sizes):
        entries = torch.cat([torch.full((size,), name in names) for name, size in sizes.items()])
        if relative_error(norms, each[:, entries].square().sum(1)) <= EXACT:
            return f"leaves out {len(sizes) - len(names)} of {len(sizes)}: {percent(distances['norms'])}", ""
    wrong = [f"{name} {percent(error)}" for name, error in distances.items() if not error <= EXACT]
    return (f"wrong: {', '.join(wrong)}".replace("norms ", "") if wrong else "exact"), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--errors", action="store_true", help="print what the tools raise, too")
    parser.add_argument("--modules", nargs="+", default=list(BUILDS), choices=list(BUILDS))
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    args = parser.parse_args()
    if args.write and (args.modules, args.tools) != (list(BUILDS), list(TOOLS)):
        parser.error("--write needs all modules and tools")
    logging.disable(logging.WARNING)
    rows = {}
    for name in args.modules:
        verdicts = {tool: verdict(tool, name) for tool in args.tools}
        rows[name.replace("_", " ")] = [words for words, _ in verdicts.values()]
        print(name, *rows[name.replace("_", " ")], sep="; ", flush=True)
        for tool, (words, text) in verdicts.items():
            if args.errors and text:
                print(f"{name}, {tool}: {words}: {' '.join(text.split())[:300]}")
    text = f"{markdown(rows, args.tools)}\n\n{versions([*TOOLS][2:], *LIBRARIES)}"
    print(text)
    if args.write:
        write(text, BEGIN, END)


if __name__ == "__main__":
    main()
