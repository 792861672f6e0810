"""The compiled train step of BERT on masked tokens beside transformers' model under torch.compile with fused AdamW.

6 layers, 384 wide, texts of 64 to 128 tokens padded to 128, batch 16, 15 % of the tokens masked. Both start from the
same weights; without dropout, the losses of three steps must agree. Logits are computed at all places, as transformers
does; one more row computes them at the masked places alone.

With --norms, instead: the norm of every example's gradient with the mean gradient, beside the mean gradient alone, both
compiled, with logits at the masked places; the norms must be those of texts alone.

    python tests/benchmarks/bert_step.py [--layers 6] [--width 384] [--vocabulary 30522] [--time 128] [--batch 16]
        [--rounds 9] [--device cpu] [--norms]
"""

import argparse
import dataclasses
from functools import partial

import torch
import torchvision_operators  # noqa: F401
from timing import interleaved, report
from torch.func import grad
from transformers import BertConfig, BertForMaskedLM

from core import per_example, random, spec, tree
from nets.language import bert
from train import optimizers
from train.losses import cross_entropy
from train.step import make_step, start

RATE, BETAS, DECAY = 1e-4, (0.9, 0.999), 0.01
IGNORED = -100


def module_of(cfg: bert.Config, params: dict) -> BertForMaskedLM:
    """transformers' model with our weights."""
    module = BertForMaskedLM(
        BertConfig(
            vocab_size=cfg.vocabulary,
            hidden_size=cfg.width,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads,
            intermediate_size=cfg.hidden,
            max_position_embeddings=cfg.context,
            hidden_dropout_prob=cfg.dropout,
            attention_probs_dropout_prob=cfg.attention_dropout,
        )
    )
    theirs, values = dict(module.named_parameters()), dict(tree.items(params))
    with torch.no_grad():
        for name, rename in bert.rename_table(cfg).items():
            for target, value in zip(rename.names, values[name].chunk(len(rename.names)), strict=True):
                theirs[target if target in theirs else f"bert.{target}"].copy_(value)
    return module.train()


def module_step(cfg, params, batch, device):
    module = module_of(cfg, params).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), RATE, BETAS, weight_decay=DECAY, fused=True)
    tokens, mask, labels, _ = batch
    compiled = torch.compile(
        lambda: module(tokens, attention_mask=mask.long(), labels=labels).loss, fullgraph=True, dynamic=False
    )

    def step():
        loss = compiled()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def masked_losses(params, batch, cfg, **options):
    """(batch,): mean losses at the masked places of each text, whose logits alone are computed."""
    tokens, mask, labels, places = batch
    x = bert.features(params, tokens, cfg, mask=mask, **options)  # (batch, time, width)
    x = x.gather(1, places[..., None].expand(-1, -1, cfg.width))  # (batch, masked, width)
    logits = bert.token_logits(params, x, cfg)  # (batch, masked, vocabulary)
    return cross_entropy(logits, labels.gather(1, places), reduction="none").mean(1)


def compare_norms(cfg, params, batch, rounds):
    losses = partial(masked_losses, cfg=cfg)

    def plain(params, batch):
        return grad(lambda p: losses(p, batch).mean())(params)

    def norms(params, batch):
        out = per_example.reports(losses, params, batch)
        return out.mean, out.norm

    compiled = [torch.compile(f, fullgraph=True, dynamic=False) for f in (plain, norms)]
    sides = {"plain gradient": lambda: compiled[0](params, batch), "norms": lambda: compiled[1](params, batch)}
    for i in (0, len(batch[0]) - 1):
        alone = tree.map(lambda g: g.norm(), plain(params, tuple(x[i : i + 1] for x in batch)))
        actual = tree.map(lambda norm, i=i: norm[i], sides["norms"]()[1])
        tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6), actual, alone)
    title = f"norms and mean gradient, {cfg.layers} x {cfg.width}, {batch[0].shape[1]} tokens, batch {len(batch[0])}"
    report(title, interleaved(sides, rounds), "norms", {"plain gradient": 1.15})


def functree_step(cfg, params, batch, device, masked_only):
    optimizer = optimizers.adamw(RATE, *BETAS, weight_decay=DECAY)

    def loss(params, batch, keys):
        tokens, mask, labels, _ = batch
        if masked_only:
            return masked_losses(params, batch, cfg, key=keys, train=True).mean()
        logits = bert.apply(params, tokens, cfg, mask=mask, key=keys, train=True)
        return cross_entropy(logits, labels, ignore_id=IGNORED)

    state = start(random.key(1, device), tree.map(torch.clone, params), bert.spec(cfg), optimizer)
    train = make_step(loss, optimizer, donate=True, update_norm=False)

    def step():
        nonlocal state
        state, metrics = train(state, batch)
        return metrics["loss"]

    return step


def texts(cfg, args):
    """(tokens, mask, labels, masked places): equally many masked places per text, all before its shortest length."""
    shape, half = (args.batch, args.time), args.time // 2
    tokens = random.randint(random.key(2), shape, 1, cfg.vocabulary).long()
    lengths = random.randint(random.key(3), (args.batch, 1), half, args.time + 1)
    mask = torch.arange(args.time) < lengths  # (batch, time)
    places = random.uniform(random.key(4), (args.batch, half)).argsort(1)[:, : max(1, round(0.15 * args.time))]
    masked = torch.zeros(shape, dtype=torch.bool).scatter(1, places, True)
    labels = torch.where(masked, tokens, IGNORED)
    tokens = torch.where(mask, torch.where(masked, cfg.vocabulary - 1, tokens), cfg.padding_id)
    return tuple(x.to(args.device) for x in (tokens, mask, labels, places))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--time", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--norms", action="store_true", help="time the norms of every example's gradient instead")
    args = parser.parse_args()
    torch.set_num_threads(2)
    sizes = {"vocabulary": args.vocabulary, "layers": args.layers, "width": args.width, "hidden": 4 * args.width}
    cfg = bert.Config(**sizes, heads=max(1, args.width // 32), context=args.time, head="masked_tokens")
    batch = texts(cfg, args)
    params = tree.move(spec.init(random.key(0), bert.spec(cfg)), args.device)
    if args.norms:
        return compare_norms(dataclasses.replace(cfg, dropout=0.0, attention_dropout=0.0), params, batch, args.rounds)
    for dropout in (0.0, 0.1):
        cfg = dataclasses.replace(cfg, dropout=dropout, attention_dropout=dropout)
        steps = {
            "functree": functree_step(cfg, params, batch, args.device, False),
            "functree, masked places only": functree_step(cfg, params, batch, args.device, True),
            "transformers": module_step(cfg, params, batch, args.device),
        }
        losses = {name: [float(step()) for _ in range(3)][-1] for name, step in steps.items()}
        print(f"dropout {dropout}, loss after 3 steps:", {name: round(value, 5) for name, value in losses.items()})
        assert max(losses.values()) - min(losses.values()) < (1e-3 if dropout == 0 else 0.1), losses
        medians = interleaved({name: partial(step) for name, step in steps.items()}, args.rounds)
        title = (
            f"one train step, {args.layers} x {args.width}, {args.time} tokens, batch {args.batch}, dropout {dropout}"
        )
        report(title, medians, "functree", {"transformers": 0.95})


if __name__ == "__main__":
    main()
