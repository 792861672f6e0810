"""The gradient on its way back through time: |dL / dh_t| of an RNN, a GRU and an LSTM, before and after training.

Hochreiter and Schmidhuber 1997, "Long Short-Term Memory"; Pascanu et al. 2013, "On the difficulty of training recurrent
neural networks" (arXiv:1211.5063). The first token of a sequence must be named after its last one, so the loss at the
end must reach the first state. Each state has zeros added to it; the gradient with respect to these is that of the
state, for each example by itself:

    h_t = cell(x_t, h_(t-1)) + e_t,   dL / de_t at e = 0

    python experiments/gradient_flow.py                    about a minute on 2 CPU cores
    python experiments/gradient_flow.py --forget-bias 1    an LSTM that keeps what it has from the beginning
    python experiments/gradient_flow.py --shortest 40      all sequences long: none of the nets learns it
    python experiments/gradient_flow.py --shortest 40 --forget-bias 2      but an LSTM whose gate is open at first

Expected: all three nets right; of the gradient the trained GRU keeps 0.99 per step, the LSTM 0.70, the RNN 0.37.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core import random, spec, tree
from core.layers import embedding, linear
from core.recurrence import CELLS, unroll
from nets.language import sequence_classifier as net
from train import optimizers, plots
from train.data.understood import understood
from train.losses import cross_entropy
from train.metrics.classification import accuracy
from train.optimizers import schedules
from train.run import Common, Count, NonNegative, Positive, Shared, begin, command_line
from train.run.logs import read_curves
from train.step import make_step, start

RUNS = Path("runs/gradient_flow")
KINDS = {"gru": "gru", "lstm": "lstm", "rnn": "tanh"}
"""Nets and their cells."""
QUANTILES = (0.1, 0.5, 0.9)
EXAMPLES = 256
"""Sequences of which gradients and accuracy are measured."""


@dataclass(frozen=True)
class Args:
    time: Count = 40
    """Tokens per sequence."""
    symbols: Count = 4
    """Different tokens: the first one must be remembered, the others are distraction."""
    width: Count = 64
    """Hidden units."""
    forget_bias: NonNegative = 0.0
    """Added to the LSTM's initial biases of the forget gate (Gers et al. 2000)."""
    shortest: Count = 2
    """Tokens of the shortest training sequences; measured are those of --time tokens. With --shortest equal to --time
    no easier sequence shows the way."""
    steps: Count = 800
    """Training steps."""
    batch: Count = 64
    """Sequences per step."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    eval_every: Count = 100
    """Steps between evaluations."""
    common: Shared = Common()


def sequences(key: Tensor, count: int, args: Args, shortest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (count, time), lengths (count,) from `shortest` on, and labels (count,): the first tokens.

    The first token of a sequence is one of ids 0 to symbols - 1, the others are ids from there on.
    """
    first_key, rest_key, length_key = random.split(key, 3).unbind(0)
    labels = random.randint(first_key, (count,), 0, args.symbols).long()
    rest = random.randint(rest_key, (count, args.time - 1), args.symbols, 2 * args.symbols).long()
    lengths = random.randint(length_key, (count,), shortest, args.time + 1).long()
    return torch.cat([labels[:, None], rest], 1), lengths, labels


def losses(params: tree.Tree, batch: tuple, keys: Tensor, cfgs: dict[str, net.Config]):
    """(examples,): the sum of the nets' cross-entropies. Each has parameters and an optimizer of its own."""
    tokens, lengths, labels = batch
    total, metrics = 0.0, {}
    for kind, cfg in cfgs.items():
        logits = net.apply(params[kind], (tokens, lengths), cfg, train=True)
        total = total + cross_entropy(logits, labels, reduction="none")
        metrics[kind] = accuracy(logits.detach(), labels)
    return total, metrics


def states(params: tree.Tree, kind: str, tokens: Tensor, added: tuple[Tensor, ...]) -> tuple[Tensor, tuple]:
    """(xw, states) of a net's layer; `added` (batch, time, width) goes to each state after every step.

    Of an LSTM the states are h and c.
    """
    p, widths = params["layers"][0], [x.shape[-1] for x in added]
    xw = linear(p["ih"], embedding(params["tokens"], tokens))  # (batch, time, gates)

    def perturbed(p, inputs, state):
        x, *e = inputs.split([xw.shape[-1], *widths], -1)
        return tuple(s + d for s, d in zip(CELLS[KINDS[kind]](p, x, state), e, strict=True))

    begin = tuple(torch.zeros_like(x[:, 0]) for x in added)
    return xw, unroll(perturbed, p, torch.cat([xw, *added], -1), begin)


def flow(params: tree.Tree, kind: str, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Norms of the gradients of each example's loss with respect to its states, {"h": (batch, time), perhaps "c"}.

    Examples do not see each other, so that the gradient of the sum of their losses is that of each.
    """
    weight = params["layers"][0]["hh"]["weight"]  # (gates, width)
    width = weight.shape[1]
    zeros = tuple(weight.new_zeros(*tokens.shape, width) for _ in range(2 if kind == "lstm" else 1))

    def loss(added):
        _, (h, *_) = states(params, kind, tokens, added)
        return cross_entropy(linear(params["head"], h[:, -1]), labels, reduction="sum")

    return dict(zip("hc", (g.norm(dim=-1) for g in torch.func.grad(loss)(zeros)), strict=False))


def numbers(params: tree.Tree, kind: str, tokens: Tensor) -> dict[str, float]:
    """Spectral radius of the recurrent matrix (of a gated cell: of its candidate's), and the mean of the gate that
    keeps the state: f of an LSTM, z of a GRU."""
    p = params["layers"][0]
    weight = p["hh"]["weight"]  # (gates, width)
    width = weight.shape[1]
    candidate = {"gru": 2, "lstm": 2, "rnn": 0}[kind]  # r z n; i f g o
    block = weight[candidate * width : (candidate + 1) * width]
    out = {"spectral_radius": float(torch.linalg.eigvals(block).abs().max())}
    if kind != "rnn":
        zeros = tuple(weight.new_zeros(*tokens.shape, width) for _ in range(2 if kind == "lstm" else 1))
        xw, (h, *_) = states(params, kind, tokens, zeros)
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)  # (batch, time, width)
        gate = torch.sigmoid(xw + linear(p["hh"], before))[..., width : 2 * width]
        out["kept"] = float(gate.mean())
    return out


def initial(key: Tensor, model: tree.Tree, forget_bias: float) -> tree.Tree:
    params = spec.init(key, model)
    p = params["lstm"]["layers"][0]["ih"]
    i, f, rest = p["bias"].tensor_split((len(p["bias"]) // 4, len(p["bias"]) // 2))
    layer = {**params["lstm"]["layers"][0], "ih": {**p, "bias": torch.cat([i, f + forget_bias, rest])}}
    return {**params, "lstm": {**params["lstm"], "layers": [layer]}}


def study(params: tree.Tree, tokens: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """({curve: norms (batch, time)}, {name: figure}) of the three nets at one time of training.

    `NAME_per_step` is the factor by which the median gradient changes per step that it goes back, a geometric mean.
    """
    norms, out, params = {}, {}, tree.cast(params, torch.float64)  # what vanishes needs small numbers
    for kind in KINDS:
        for state, values in flow(params[kind], kind, tokens, labels).items():
            name = kind if state == "h" else f"{kind}_cell"
            norms[name] = values
            first, last = values.median(0).values[[0, -2]].clamp(min=1e-300).tolist()
            out[f"{name}_per_step"] = (first / last) ** (1 / max(1, values.shape[1] - 2))
        out |= {f"{kind}_{name}": value for name, value in numbers(params[kind], kind, tokens).items()}
    return {name: norms[name] for name in LABELS}, out


LABELS = {"gru": "GRU, h", "lstm": "LSTM, h", "rnn": "RNN, h", "lstm_cell": "LSTM, c"}


def draw(path: Path, flows: dict[str, dict[str, Tensor]], curves: dict) -> None:
    """Gradients by time, the median and from tenth to nine tenths of the examples; accuracy while training."""
    everything = torch.cat([x.quantile(0.1, 0) for norms in flows.values() for x in norms.values()])
    low = float(everything[everything > 0].min())  # c after the last step has no influence
    with plots.panels(path, 1, 3, width=4.6, height=3.8) as (*panels, right):
        for axes, (title, norms) in zip(panels, flows.items(), strict=True):
            bands = {LABELS[name]: torch.stack([x.quantile(q, 0) for q in QUANTILES]) for name, x in norms.items()}
            times = list(range(1, 1 + len(next(iter(bands.values()))[0])))
            middle = {name: (times, band[1]) for name, band in bands.items()}
            plots.curves(axes, middle, "step t", "|dL / dh_t|, |dL / dc_t|", title, log=True)
            for line, band in zip(axes.lines, bands.values(), strict=True):
                axes.fill_between(times, *band[[0, 2]].tolist(), color=line.get_color(), alpha=0.2, lw=0)
            axes.set_ylim(low / 3, 10)
        plots.curves(right, curves, ylabel="accuracy at full length", title="Remembering the first token")
        right.set_ylim(0, 1.03)


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("steps", "learning_rate", "eval_every"))
    if args.time < 3 or args.symbols < 2:
        raise ValueError(f"--time is {args.time} and --symbols {args.symbols}; expected at least 3 and 2")
    if args.shortest > args.time:
        raise ValueError(f"--shortest is {args.shortest}; expected up to --time, {args.time}")
    sizes = {"vocabulary": 2 * args.symbols, "d_in": 2 * args.symbols, "width": args.width, "outputs": args.symbols}
    cfgs = {kind: net.Config(kind=kind, **sizes) for kind in KINDS}
    model = {kind: net.spec(cfg) for kind, cfg in cfgs.items()}
    understood(print, {"sequences": f"{args.time} tokens, the first of {args.symbols} to be named", "net": cfgs["rnn"]})

    init_key, run_key, data_key, test_key = random.split(random.key(args.common.seed), 4).unbind(0)
    rate = schedules.warmup_cosine(args.learning_rate, args.steps // 20, args.steps)
    each = {kind: optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.adam(rate)) for kind in KINDS}
    optimizer = optimizers.by_path(each, lambda name, leaf: name.partition(".")[0])
    values = initial(init_key, model, args.forget_bias)
    copies = tree.map(torch.clone, tree.move(values, run.device))  # the step overwrites them
    state = start(run_key.to(run.device), copies, model, optimizer)
    state = run.restore(state, {"net": cfgs["rnn"]}, args.steps)
    objective = functools.partial(losses, cfgs=cfgs)
    step = make_step(objective, optimizer, policy=run.policy, donate=True, compile=args.common.compile)
    tokens, _, labels = sequences(test_key, EXAMPLES, args, args.time)
    test = tree.move((tokens, torch.full_like(labels, args.time), labels), run.device)

    with run.open({}):
        run.log.print(f"{tree.count(model):,} parameters of three nets; run in {run.folder}")
        batches = (sequences(random.fold_in(data_key, t), args.batch, args, args.shortest) for t in run.remaining)
        for at, batch in run.steps(batches):
            state, metrics = step(state, tree.move(batch, run.device))
            run.record(at, metrics, args.batch)
            if run.due(at, args.eval_every):
                with torch.no_grad():
                    figures = losses(state.params, test, None, cfgs)[1]
                run.log.metrics(at, {f"test/{kind}": value for kind, value in figures.items()})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        flows, result = {}, {}
        for name, params in (("initial", values), ("trained", tree.move(state.params, "cpu"))):
            flows[name], figures = study(params, tokens, labels)
            result |= {f"{name}_{key}": value for key, value in figures.items()}
        with torch.no_grad():
            right = losses(state.params, test, None, cfgs)[1]
        result |= {f"{kind}_accuracy": float(right[kind]) for kind in KINDS}
        run.result({**result, "guessing_accuracy": 1 / args.symbols, "parameters": tree.count(model)})
    lines = read_curves(run.folder, *(f"test/{kind}" for kind in KINDS))
    curves = {LABELS[name.removeprefix("test/")].partition(",")[0]: line for name, line in lines.items()}
    titles = {"initial": "At initialisation", "trained": f"After {run.at} steps"}
    draw(run.folder / "gradient_flow.png", {titles[name]: norms for name, norms in flows.items()}, curves)
    for kind in KINDS:
        line = f"{kind:5} {result[f'{kind}_accuracy']:7.2%} right (guessing: {1 / args.symbols:.0%});"
        for name in flows:
            cell = f" (c {result[f'{name}_lstm_cell_per_step']:.3f})" if kind == "lstm" else ""
            gate = f", gate {result[f'{name}_{kind}_kept']:.2f}" if kind != "rnn" else ""
            line += f"  {name}: gradient x {result[f'{name}_{kind}_per_step']:.3f} per step{cell}"
            line += f", spectral radius {result[f'{name}_{kind}_spectral_radius']:.2f}{gate}"
        print(line)
    print(f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), root=RUNS)
