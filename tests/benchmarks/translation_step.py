"""The compiled train step of a transformer for translation beside torch.nn.Transformer's under torch.compile.

The same sizes, the same weights, one batch of `--tokens` source and target tokens in sentences of 25, label smoothing,
Adam (torch's fused one on the other side). Without dropout first, where the losses of three steps must agree; then with
the paper's dropout of 0.1, which torch.nn.Transformer draws in more places (attention weights, inside the MLPs).

    python tests/benchmarks/translation_step.py [--preset base] [--tokens 1500] [--vocabulary 37000] [--rounds 7]
        [--device cpu]
"""

import argparse
import dataclasses
import math
from functools import partial

import torch
from timing import interleaved, report
from torch import nn

from core import random, spec, tree
from nets.language import transformer
from train import optimizers
from train.metrics import translation
from train.step import make_step, start

LENGTH, SMOOTHING, RATE, BETAS, EPS = 25, 0.1, 1e-4, (0.9, 0.98), 1e-9


class Module(nn.Module):
    """torch.nn.Transformer with one embedding for source, target and output."""

    def __init__(self, cfg: transformer.Config, length: int):
        super().__init__()
        sides = {"num_encoder_layers": cfg.layers, "num_decoder_layers": cfg.layers, "dim_feedforward": cfg.hidden}
        self.net = nn.Transformer(cfg.width, cfg.heads, **sides, dropout=cfg.dropout, batch_first=True)
        self.tokens = nn.Embedding(cfg.target_vocabulary, cfg.width)
        self.drop, self.scale, self.smoothing = nn.Dropout(cfg.dropout), math.sqrt(cfg.width), SMOOTHING
        self.register_buffer("positions", transformer.sinusoids(torch.arange(length), cfg.width).float())
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(length))

    def embed(self, ids):
        return self.drop(self.tokens(ids) * self.scale + self.positions)

    def forward(self, source, target, labels):
        hidden = self.net(self.embed(source), self.embed(target), tgt_mask=self.causal, tgt_is_causal=True)
        logits = hidden @ self.tokens.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=self.smoothing)


def module_step(cfg, params, batch, device):
    module = Module(cfg, LENGTH).to(device)
    load(module, params)
    # Foreach and fused, as one would write it for speed.
    optimizer = torch.optim.Adam(module.parameters(), RATE, BETAS, EPS, fused=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    source, target = batch

    def step():
        value = compiled(source, target[:, :-1].contiguous(), target[:, 1:].contiguous())
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


@torch.no_grad()
def load(module: Module, params: dict) -> None:
    """Our weights into the module; its norms after the last layers are ours too (`final_norms`)."""

    def affine(theirs, ours):
        theirs.weight.copy_(ours["weight"])
        theirs.bias.copy_(ours["bias"])

    def attend(theirs, ours, first="qkv"):
        rows = torch.cat([ours[name]["weight"] for name in first.split()])
        theirs.in_proj_weight.copy_(rows)
        theirs.in_proj_bias.copy_(torch.cat([ours[name]["bias"] for name in first.split()]))
        affine(theirs.out_proj, ours["proj"])

    module.tokens.weight.copy_(params["tokens"]["weight"])
    for side, theirs in (("encoder", module.net.encoder), ("decoder", module.net.decoder)):
        affine(theirs.norm, params[side]["norm"])
        for layer, ours in zip(theirs.layers, params[side]["blocks"], strict=True):
            attend(layer.self_attn, ours["attn"])
            affine(layer.linear1, ours["mlp"]["up"])
            affine(layer.linear2, ours["mlp"]["down"])
            affine(layer.norm1, ours["norm1"])
            if side == "decoder":
                attend(layer.multihead_attn, ours["cross"], "q kv")
                affine(layer.norm2, ours["norm_cross"])
                affine(layer.norm3, ours["norm2"])
            else:
                affine(layer.norm2, ours["norm2"])


def functree_step(cfg, params, batch, device):
    optimizer = optimizers.adam(RATE, *BETAS, eps=EPS)

    def loss(params, batch, keys):
        source, target = batch
        logits = transformer.apply(params, (source, target[:, :-1]), cfg, key=keys, train=True)
        return translation.smoothed_divergence(logits, target[:, 1:], SMOOTHING, padding=cfg.padding_id)

    state = start(random.key(1, device), tree.map(torch.clone, params), transformer.spec(cfg), optimizer)
    train = make_step(loss, optimizer, donate=True, update_norm=False)

    def step():
        nonlocal state
        state, metrics = train(state, batch)
        return metrics["loss"]

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--vocabulary", type=int, default=37000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(2)
    rows, classes = args.tokens // LENGTH, args.vocabulary
    texts = random.randint(random.key(2), (2, rows, LENGTH + 1), 4, classes).long().to(args.device)
    batch = (texts[0, :, 1:].contiguous(), texts[1])
    wrong = SMOOTHING / classes
    right = 1 - SMOOTHING + wrong
    entropy = -right * math.log(right) - (classes - 1) * wrong * math.log(wrong)
    for dropout in (0.0, 0.1):
        sizes = {"source_vocabulary": classes, "target_vocabulary": classes, "final_norms": True, "dropout": dropout}
        cfg = dataclasses.replace(transformer.PRESETS[args.preset], **sizes)
        params = tree.move(spec.init(random.key(0), transformer.spec(cfg)), args.device)
        steps = {
            "functree": functree_step(cfg, params, batch, args.device),
            "torch.nn.Transformer": module_step(cfg, params, batch, args.device),
        }
        losses = {name: [float(step()) for _ in range(3)] for name, step in steps.items()}
        ours, theirs = losses["functree"][-1] + entropy, losses["torch.nn.Transformer"][-1]
        print(f"dropout {dropout}, loss after 3 steps: {ours:.5f} and {theirs:.5f}")
        assert abs(ours - theirs) < (1e-3 if dropout == 0 else 0.1), losses
        medians = interleaved({name: partial(step) for name, step in steps.items()}, args.rounds)
        title = f"one train step, {args.preset}, {rows * LENGTH} source tokens, dropout {dropout}"
        report(title, medians, "functree", {"torch.nn.Transformer": 0.9})


if __name__ == "__main__":
    main()
