"""Norms of every example's gradient of modules of others, lifted, beside the plain gradient of the same function.

transformers' BERT that tags tokens (6 layers, 384 wide, 128 tokens, batch 16), and torchvision's ResNet-18 in eval mode
(64 x 64, batch 32), both compiled; the norms must be those of examples alone. Of BERT also Opacus, eager as
it is: its hooks, which form every example's gradient.

    python tests/benchmarks/lifted.py [--net bert|resnet18] [--layers 6] [--width 384] [--vocabulary 30522] [--time 128]
        [--side 64] [--batch 16] [--rounds 9]
    python tests/benchmarks/lifted.py --memory        peak memory of a call instead of its time; no Opacus
"""

import argparse
import copy
import warnings

import torch
import torchvision_operators  # noqa: F401
from memory import peak, require_prompt_free
from timing import interleaved, report
from torch import nn
from torch.func import grad
from torch.nn import functional as F

from core import per_example, tree
from core.lift import lift


def bert(args) -> tuple:
    """(module, batch, losses of its logits)."""
    from transformers import BertConfig, BertForTokenClassification

    sizes = {
        "hidden_size": args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": max(1, args.width // 32),
    }
    sizes |= {"vocab_size": args.vocabulary, "intermediate_size": 4 * args.width, "max_position_embeddings": args.time}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=9)
    module = BertForTokenClassification(config)
    tokens, labels = (torch.randint(n, (args.batch, args.time)) for n in (args.vocabulary, 9))

    def losses(call, batch):
        return F.cross_entropy(call(batch[0]).logits.transpose(1, 2), batch[1], reduction="none").mean(1)

    return module, (tokens, labels), losses


def resnet18(args) -> tuple:
    from torchvision.models import resnet18

    images, labels = torch.randn(args.batch, 3, args.side, args.side), torch.randint(1000, (args.batch,))
    return resnet18(), (images, labels), lambda call, batch: F.cross_entropy(call(batch[0]), batch[1], reduction="none")


def opacus(module: nn.Module, batch: tuple, losses):
    from opacus import GradSampleModule

    wrapped = GradSampleModule(copy.deepcopy(module).train(), loss_reduction="sum")

    def norms():
        losses(wrapped, batch).sum().backward()
        squares = [p.grad_sample.flatten(1).square().sum(1) for p in wrapped.parameters() if p.grad_sample is not None]
        wrapped.zero_grad(set_to_none=True)
        return sum(squares).sqrt()

    return norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=("bert", "resnet18"), default="bert")
    for name, default in (("layers", 6), ("width", 384), ("vocabulary", 30522), ("time", 128), ("side", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="measure the peak memory instead of the time")
    args = parser.parse_args()
    if args.memory:
        require_prompt_free()
    args.batch = args.batch or (16 if args.net == "bert" else 32)
    torch.manual_seed(0)
    module, batch, losses_of = {"bert": bert, "resnet18": resnet18}[args.net](args)
    module.eval()
    params, stats, apply = lift(module)

    def losses(params, batch):
        values = tree.merge(params, stats)
        return losses_of(lambda *inputs: apply(values, *inputs), batch)

    def plain(params, batch):
        return grad(lambda p: losses(p, batch).mean())(params)

    plan = per_example.plan(losses, params, batch)

    def norms(params, batch):
        out = per_example.reports(losses, params, batch, plan=plan)
        return out.mean, out.total_norm

    compiled = {f.__name__: torch.compile(f, fullgraph=True, dynamic=False) for f in (plain, norms)}
    sides = {
        "plain gradient": lambda: compiled["plain"](params, batch),
        "lifted": lambda: compiled["norms"](params, batch),
    }
    for i in (0, args.batch - 1):
        alone = tree.norm(plain(params, tuple(x[i : i + 1] for x in batch)))
        torch.testing.assert_close(sides["lifted"]()[1][i], alone, rtol=1e-3, atol=1e-6)
    targets = {"plain gradient": 1.25 if args.net == "bert" else 1.3}
    title = f"norms and mean gradient of a lifted {type(module).__name__}, batch {args.batch}"
    if args.memory:
        peaks = {name: peak(call) for name, call in sides.items()}
        ratio = peaks["lifted"] / peaks["plain gradient"]
        print(title, *(f"  {name}: {size / 2**20:.0f} MiB" for name, size in peaks.items()), sep="\n")
        verdict = "reached" if ratio <= 1.15 else "missed"
        print(f"  lifted / plain gradient: {ratio:.2f} (target at most 1.15: {verdict})")
        return
    if args.net == "bert":
        warnings.simplefilter("ignore")  # Opacus' hooks on inputs without a gradient
        sides["Opacus, hooks"] = opacus(module, batch, losses_of)
        targets["Opacus, hooks"] = 1.0
    report(title, interleaved(sides, args.rounds), "lifted", targets)


if __name__ == "__main__":
    main()
