"""Many LoRA adapters in one batch against one adapter for the whole batch, and against peft's mixed batches.

GPT-2 of 4 layers, rank 8 on every matrix of a block: each example has an adapter of its own, mapped over by vmap. With
`core.lora.adapted` W x is computed once for the batch; with `core.lora.merge` each example has weights of its own.
Eager, without gradients. The hidden states of both sides are compared first.

    python tests/benchmarks/lora.py [--rounds 7] [--adapters 32] [--width 512] [--tokens 64] [--layers 4]
"""

import argparse
import warnings

import torch
import torchvision_operators  # noqa: F401
from peft import LoraConfig, get_peft_model
from timing import interleaved, report
from torch.func import vmap
from transformers import GPT2Config, GPT2Model

from core import lora, random, tree
from nets.language import gpt2

NAMES = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property under its old name
    torch.manual_seed(0)
    sizes = {"n_layer": args.layers, "n_head": 4, "n_embd": args.width, "vocab_size": 1000, "n_positions": 128}
    model = GPT2Model(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    cfg = gpt2.Config(vocabulary=1000, context=128, layers=args.layers, heads=4, width=args.width)
    params = gpt2.from_published(dict(model.state_dict()), cfg)
    names = [f"adapter{i}" for i in range(args.adapters)]
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    theirs = get_peft_model(model, settings, names[0])
    for name in names[1:]:
        theirs.add_adapter(name, settings)
    theirs.eval()
    for name, p in theirs.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.02)
    each = tree.stack([of_peft(theirs, name) for name in names])
    one, scale = tree.unstack(each)[0], lora.scale(8, 16)
    x = random.randint(random.key(2), (args.adapters, args.tokens), 0, 1000).long()

    def many(form):
        return vmap(lambda a, x: gpt2.features(form(params, a, scale), x[None], cfg)[0])(each, x)

    with torch.no_grad():
        expected = theirs(x, adapter_names=names).last_hidden_state
        for form in (lora.adapted, lora.merge):
            assert float((many(form) - expected).norm() / expected.norm()) < 1e-5
        contestants = {
            "no adapter": lambda: gpt2.features(params, x, cfg),
            "one adapter": lambda: gpt2.features(lora.adapted(params, one, scale), x, cfg),
            "an adapter each": lambda: many(lora.adapted),
            "an adapter each, weights formed": lambda: many(lora.merge),
            "peft, adapter_names": lambda: theirs(x, adapter_names=names),
        }
        medians = interleaved(contestants, args.rounds, warmup=1)
    title = f"{args.adapters} examples of {args.tokens} tokens, {args.layers} layers x {args.width}"
    report(title, medians, "an adapter each", {"one adapter": 1.5, "peft, adapter_names": 1.0})


def of_peft(model, adapter: str):
    """One of peft's adapters as a tree of ours."""
    values = {}
    for name, p in model.named_parameters():
        if f".{adapter}." in name:
            _, _, _, layer, *path, entry, _, _ = name.split(".")
            values[f"blocks.{layer}.{NAMES['.'.join(path)]}.weight.{entry[-1].lower()}"] = p.detach()
    return tree.sort(tree.nest(values))


if __name__ == "__main__":
    main()
