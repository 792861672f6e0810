"""Recurrent layers against torch's: one layer, its gradient, ragged sequences, ensembles, per-example norms.

Every comparison starts from the same weights and is first checked for the same values.

    python tests/benchmarks/recurrent.py [--rounds 30] [--batch 16] [--time 128] [--width 128]
    python tests/benchmarks/recurrent.py --compile-times
    python tests/benchmarks/recurrent.py --memory --batch 32 --time 64 --width 128
"""

import argparse
import time

import torch
from memory import peak, require_prompt_free
from timing import interleaved, report
from torch import nn
from torch.func import grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from core import per_example, random, tree
from core.layers import gru, lstm, rnn
from core.lift import lift
from core.per_example import reports

LAYERS = {"gru": (gru, nn.GRU), "lstm": (lstm, nn.LSTM), "rnn": (rnn, nn.RNN)}
LEARNING_RATE = 1e-6  # so that the weights, and with them the times, stay what they are


def parameters(module: nn.Module) -> dict:
    state = module.state_dict()
    return {p: {k: state[f"{k}_{p}_l0"].clone() for k in ("bias", "weight")} for p in ("hh", "ih")}


def losses(layer, p, x, **options):
    return layer(p, x, **options)[0].square().sum((1, 2))


def loss(layer, p, x, **options):
    return losses(layer, p, x, **options).sum()


def gradient_of(layer, **options):
    return lambda p, x: grad(lambda p: loss(layer, p, x, **options))(p)


def module_gradient(module, x, lengths=None):
    if lengths is None:
        out, _ = module(x)
    else:
        packed, _ = module(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        out, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
    return torch.autograd.grad(out.square().sum(), list(module.parameters()))


def compare(ours: dict, theirs) -> None:
    """Both gradients, in torch's order of names."""
    flat = [ours["ih"]["weight"], ours["hh"]["weight"], ours["ih"]["bias"], ours["hh"]["bias"]]
    for g, t in zip(flat, theirs, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-3, atol=1e-3 * t.abs().max().item())


def layers_against_torch(args, x, lengths) -> None:
    for name, (layer, kind) in LAYERS.items():
        module = kind(args.width, args.width, batch_first=True)
        p = parameters(module)
        compare(gradient_of(layer)(p, x), module_gradient(module, x))
        compare(gradient_of(layer, lengths=lengths)(p, x), module_gradient(module, x, lengths))
        times = interleaved(
            {
                "functree": lambda: gradient_of(layer)(p, x),  # noqa: B023
                "torch": lambda: module_gradient(module, x),  # noqa: B023
            },
            args.rounds,
        )
        report(f"{name}, gradient, eager", times, "functree", {"torch": 1.1})
        times = interleaved(
            {
                "functree": lambda: gradient_of(layer, lengths=lengths)(p, x),  # noqa: B023
                "torch, packed": lambda: module_gradient(module, x, lengths),  # noqa: B023
            },
            args.rounds,
        )
        report(f"{name}, ragged", times, "functree", {"torch, packed": 0.6})


def step_against_torch(args, x) -> None:
    module = nn.LSTM(args.width, args.width, batch_first=True)
    p = parameters(module)
    optimizer = torch.optim.SGD(module.parameters(), LEARNING_RATE, fused=True)

    def theirs():
        optimizer.zero_grad()
        module(x)[0].square().sum().backward()
        optimizer.step()

    def step(p, x):
        return tree.map(lambda x, g: x - LEARNING_RATE * g, p, gradient_of(lstm)(p, x))

    ours = torch.compile(step, fullgraph=True, dynamic=False) if args.compile else step
    times = interleaved({"functree": lambda: ours(p, x), "torch, fused SGD": theirs}, args.rounds)
    report("lstm, SGD step; ours compiled", times, "functree", {"torch, fused SGD": 1.0})


def transforms_of_one_layer(args, x) -> None:
    p = parameters(nn.LSTM(args.width, args.width, batch_first=True))
    four = tree.map(lambda x: torch.stack([x * (1 - i / 10) for i in range(4)]), p)
    members = vmap(lambda p: gradient_of(lstm)(p, x))
    each = vmap(lambda p, x: grad(lambda p: loss(lstm, p, x[None]))(p), (None, 0))
    by_operator = gradient_of(lstm, method="op")
    times = interleaved(
        {
            "one gradient": lambda: gradient_of(lstm)(p, x),
            "one gradient, by the operator": lambda: by_operator(p, x),
            "4 members": lambda: members(four),
            "vmap(grad)": lambda: each(p, x),
        },
        args.rounds,
    )
    report("lstm, 4 members", times, "4 members", {"one gradient": 4.0, "one gradient, by the operator": 4.0})
    report("lstm, every example", times, "vmap(grad)", {"one gradient": 1.3, "one gradient, by the operator": 1.3})


def norms(args, x) -> None:
    module = nn.LSTM(args.width, args.width, batch_first=True)
    p, (params, _, apply) = parameters(module), lift(module)

    def ours(p, x):
        return losses(lstm, p, x)

    def lifted(p, x):
        return apply(p, x)[0].square().sum((1, 2))

    plan, lifted_plan = per_example.plan(ours, p, x), per_example.plan(lifted, params, x)
    out, again = reports(ours, p, x, plan=plan), reports(lifted, params, x, plan=lifted_plan)
    torch.testing.assert_close(out.total_norm, again.total_norm, rtol=1e-4, atol=0)
    by_operator = gradient_of(lstm, method="op")
    times = interleaved(
        {
            "norms": lambda: reports(ours, p, x, plan=plan),
            "norms, lifted nn.LSTM": lambda: reports(lifted, params, x, plan=lifted_plan),
            "plain gradient, by the operator": lambda: by_operator(p, x),
            "plain gradient": lambda: gradient_of(lstm)(p, x),
            "plain gradient, lifted": lambda: grad(lambda p: lifted(p, x).sum())(params),
        },
        args.rounds,
    )
    report("lstm, norms", times, "norms", {"plain gradient, by the operator": 1.3, "plain gradient": 2.0})
    report("lstm, norms of the module", times, "norms, lifted nn.LSTM", {"plain gradient, lifted": 2.0})
    print(f"  uses of a weight: {max(len(leaf.uses) for leaf in lifted_plan.leaves.values())}")


def compile_times(args) -> None:
    """Process time of the first call, with the compilers' own: caches off."""
    seconds = {}
    for steps in (8, 16, 256):  # the first one pays for what is done once in a process
        torch._dynamo.reset()
        p = parameters(nn.LSTM(args.width, args.width, batch_first=True))
        x = random.normal(random.key(0), (args.batch, steps, args.width))
        f = torch.compile(gradient_of(lstm, method=args.method), fullgraph=True, dynamic=False)
        start = time.perf_counter()
        f(p, x)
        seconds[steps] = time.perf_counter() - start
        print(f"  time {steps}: {seconds[steps]:.1f} s")
    print(f"  256 steps / 16 steps: {seconds[256] / seconds[16]:.2f} (target at most 1.2)")


def memory(args, x) -> None:
    p = parameters(nn.LSTM(args.width, args.width, batch_first=True))
    each = vmap(lambda p, x: grad(lambda p: loss(lstm, p, x[None]))(p), (None, 0))
    plain = peak(lambda: gradient_of(lstm, method="op")(p, x))
    print(f"  vmap(grad) / plain gradient by the operator, peak memory: {peak(lambda: each(p, x)) / plain:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--time", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--compile-times", action="store_true")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    x = random.normal(random.key(0), (args.batch, args.time, args.width))
    lengths = random.randint(random.key(1), (args.batch,), 1, args.time + 1).long()
    lengths[0] = args.time
    mean = lengths.double().mean()
    print(f"batch {args.batch}, {args.time} steps, width {args.width}; lengths {mean:.0f} on average")
    if args.compile_times:
        return compile_times(args)
    if args.memory:
        require_prompt_free()
        return memory(args, x)
    layers_against_torch(args, x, lengths)
    step_against_torch(args, x)
    transforms_of_one_layer(args, x)
    norms(args, x)


if __name__ == "__main__":
    main()
