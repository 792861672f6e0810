"""Every example's gradient norm, layer by layer, with the mean gradient of a GPT: what it costs beyond the gradient.

4 layers, 256 wide, 65 characters, 128 tokens, tied output layer, batch 16, float32. Beside the plain compiled gradient:
ours compiled, vmap(grad) compiled, and Opacus with hooks and with ghost clipping on the same weights (ghost clipping
refuses a tied output layer, so it gets a copy of it). First the norms must be the same.

    python tests/benchmarks/per_example_gpt.py [--rounds 15] [--threads 2] [--batch 16]
    python tests/benchmarks/per_example_gpt.py --memory        peak memory of a call instead of its time

Needs opacus for its rows: pip install --no-deps opacus opt_einsum.
"""

import argparse
import copy
import importlib.util
import warnings
from collections.abc import Callable

import torch
from memory import peak, require_prompt_free
from module_gpt import Block
from timing import interleaved, report
from torch import Tensor, nn

from core import per_example, random, spec, tree
from nets.language import gpt2
from train.losses import cross_entropy

CFG = gpt2.Config(vocabulary=65, context=128, layers=4, heads=8, width=256, dropout=0.0, bias=True)
# Opacus runs its layers through hooks, so every weight is used by the layer that owns it.
TIED = "tokens.weight"


def losses(params: tree.Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = gpt2.apply(params, batch[0], CFG)
    return cross_entropy(logits, batch[1], reduction="none").mean(1)


class Module(nn.Module):
    """Logits of tokens, from our parameters, tied or with a copy of the table as output layer."""

    def __init__(self, params: tree.Tree, tied: bool):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(CFG.vocabulary, CFG.width), nn.Embedding(CFG.context, CFG.width)
        self.blocks = nn.ModuleList([Block(CFG) for _ in range(CFG.layers)])
        self.norm = nn.LayerNorm(CFG.width)
        self.load_state_dict({n.replace(".attn.", ".").replace(".mlp.", "."): x for n, x in tree.items(params)})
        self.head = nn.Linear(CFG.width, CFG.vocabulary, bias=False)
        self.head.weight = self.tokens.weight if tied else copy.deepcopy(self.tokens.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def plain(params: tree.Tree, batch: tuple):
    return torch.func.grad(lambda p: losses(p, batch).mean())(params)


def functree(params: tree.Tree, batch: tuple):
    out = per_example.reports(losses, params, batch)
    return out.mean, out.norm


def vmap_grad(params: tree.Tree, batch: tuple):
    def alone(params, tokens, targets):
        return losses(params, (tokens[None], targets[None]))[0]

    each = torch.func.vmap(torch.func.grad(alone), (None, 0, 0))(params, *batch)
    return tree.map(lambda g: g.mean(0), each), tree.map(lambda g: g.flatten(1).norm(dim=1), each)


def opacus(params: tree.Tree, batch: tuple, ghost: bool) -> Callable:
    """A call that gives the norms by their names, and the mean gradient."""
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrap = GradSampleModuleFastGradientClipping if ghost else GradSampleModule
    module = wrap(Module(params, tied=not ghost), loss_reduction="mean")

    def run():
        logits = module(batch[0])
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten()).backward()
        norms = {}
        for name, p in module.named_parameters():
            # The mean over N was undone by Opacus for the gradients of the examples, as its loss_reduction says.
            norm = p._norm_sample if ghost else p.grad_sample.flatten(1).norm(dim=1)
            norms[name.removeprefix("_module.")] = norm
        gradients = [p.grad for p in module.parameters()]
        module.zero_grad(set_to_none=True)  # nothing is left allocated, so that the peak of the next call is its own
        for p in module.parameters():
            p._norm_sample = None
        return norms, gradients

    return run


def check(runs: dict[str, Callable], params: tree.Tree) -> None:
    """All norms are those of vmap(grad); those of an output layer apart are not compared."""
    expected = tree.flatten(runs["vmap(grad), compiled"]()[1])
    for name, run in runs.items():
        if name == "plain gradient":
            continue
        out = run()
        norms = out[0] if name.startswith("Opacus") else tree.flatten(out[1])
        for leaf, norm in expected.items():
            theirs = norms[leaf if leaf in norms else leaf.replace(".attn.", ".").replace(".mlp.", ".")]
            if not (name == "Opacus, ghost" and leaf == TIED):
                where = f"{name}, {leaf}"
                torch.testing.assert_close(theirs, norm, rtol=1e-3, atol=1e-6, msg=lambda m, at=where: f"{at}: {m}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--memory", action="store_true", help="measure the peak memory instead of the time")
    args = parser.parse_args()
    if args.memory:
        require_prompt_free()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    params = spec.init(random.key(0), gpt2.spec(CFG))
    text = random.randint(random.key(1), (args.batch, CFG.context + 1), 0, CFG.vocabulary).long()
    batch = (text[:, :-1].contiguous(), text[:, 1:].contiguous())

    functions = {"plain gradient": plain, "functree": functree, "vmap(grad), compiled": vmap_grad}
    compiled = {name: torch.compile(f, fullgraph=True, dynamic=False) for name, f in functions.items()}
    runs = {name: lambda f=f: f(params, batch) for name, f in compiled.items()}
    if importlib.util.find_spec("opacus") is None:
        print("Opacus: not installed")
    else:
        runs |= {f"Opacus, {way}": opacus(params, batch, way == "ghost") for way in ("hooks", "ghost")}
    check(runs, params)
    if args.memory:
        peaks = {name: peak(run) for name, run in runs.items()}
        for name, size in peaks.items():
            print(f"  {name:<24} {size / 2**20:8.1f} MiB   {size / peaks['plain gradient']:5.2f} of the plain gradient")
        return
    targets = {"plain gradient": 1.15, "vmap(grad), compiled": 0.8, "Opacus, hooks": 0.5, "Opacus, ghost": 0.5}
    targets = {name: target for name, target in targets.items() if name in runs}
    title = f"norms and mean gradient, batch {args.batch}, {args.threads} threads"
    report(title, interleaved(runs, args.rounds), "functree", targets)


if __name__ == "__main__":
    main()
