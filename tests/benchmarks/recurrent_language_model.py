"""The train step of pytorch/examples' word_language_model, two LSTM layers of 200, against its own form in torch.nn.

20 lanes of 35 words, the embedding tied to the logits, gradient clipped to 0.25, SGD, the state carried from batch to
batch. Ours is compiled; theirs runs eagerly, as its script does (torch.compile refuses to open nn.LSTM, so it compiles
what is around it). The vocabulary is that of WikiText-2's training part, the words here are drawn. Both start from the
same weights and are first compared: the loss after five steps must agree.

    python tests/benchmarks/recurrent_language_model.py [--rounds 30] [--kind gru] [--cpu-time]
"""

import argparse
import functools
import time

import torch
from module_rnn import LAYERS, module_of, module_step
from timing import interleaved, report

from core import random, spec, tree
from nets.language import rnn
from train import optimizers
from train.losses import cross_entropy
from train.step import make_step, start

BATCH, TIME, CLIP, RATE = 20, 35, 0.25, 1.0


def functree_step(cfg: rnn.Config, params, **options):
    optimizer = optimizers.chain(optimizers.clip_by_global_norm(CLIP), optimizers.sgd(RATE))

    def loss(params, inputs, keys):
        (tokens, targets), carry = inputs
        logits, carry = rnn.apply(params, tokens, cfg, state=carry, key=keys, train=True)
        return cross_entropy(logits, targets), {}, carry

    train = make_step(loss, optimizer, carry=True, update_norm=False, **options)
    state = start(random.key(1), tree.map(torch.clone, params), rnn.spec(cfg), optimizer)
    carry = rnn.empty_state(cfg, BATCH)

    def step(batch):
        nonlocal state, carry
        state, metrics, carry = train(state, (batch, carry))
        return metrics["loss"]

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--kind", choices=sorted(LAYERS), default="lstm")
    parser.add_argument("--vocabulary", type=int, default=33278)
    parser.add_argument("--width", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, where other work runs beside it")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.cpu_time else 2)
    clock = time.process_time if args.cpu_time else time.perf_counter
    sizes = {"embedding": args.width, "width": args.width, "dropout": args.dropout, "tied": True}
    cfg = rnn.Config(args.vocabulary, kind=args.kind, **sizes)
    params = spec.init(random.key(0), rnn.spec(cfg))
    words = random.randint(random.key(2), (BATCH, TIME + 1), 0, args.vocabulary).long()
    batch = (words[:, :-1].contiguous(), words[:, 1:].contiguous())
    steps = {
        "functree, donated": functree_step(cfg, params, donate=True),
        "functree, pure": functree_step(cfg, params),
        "torch.nn, eager": module_step(module_of(cfg, params).train(), RATE, CLIP),
    }
    losses = {name: [float(step(batch)) for _ in range(5)][-1] for name, step in steps.items()}
    print("loss after 5 steps:", {name: round(value, 5) for name, value in losses.items()})
    assert args.dropout or max(losses.values()) - min(losses.values()) < 1e-3, losses
    medians = interleaved(
        {name: functools.partial(step, batch) for name, step in steps.items()}, args.rounds, clock=clock
    )
    title = f"one train step, {args.kind}, 2 layers of {args.width}, {args.vocabulary} words, {BATCH} x {TIME}"
    report(title, medians, "functree, donated", {"torch.nn, eager": 0.9})


if __name__ == "__main__":
    main()
