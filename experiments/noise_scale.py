"""Gradient noise scale of a GPT while it learns, exact from every example: how large a batch pays.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training" (arXiv:1812.06162): B = tr Σ / |G|². They estimate
both from two batch sizes; with the norm of each example's gradient the small batch is a single example, and the
uncertainty least. Both are taken from the same batches here:

    python experiments/noise_scale.py                                        a minute and a half on 2 CPU cores
    python experiments/noise_scale.py --preset nanogns --text shakespeare    the published run of nanoGNS; an hour

Expected of the first: B is 1 to 4 at the start, passes the batch of 32 after 150 steps, is at most 55 and 24 at the
end; tr Σ of one step is uncertain by 17 % by every example, by 46 % by one small batch of 4 beside the batch.

The second is the run in nanoGNS's README (Gray et al. 2024, "Normalization Layer Per-Example Gradients are Sufficient
to Predict Gradient Noise Scale in Transformers"; https://github.com/CerebrasResearch/nanoGNS) on tiny Shakespeare: a
GPT of 6 layers, 250 steps of 64 windows of 256 characters, moving average 0.95. Published: B 21.96, |G|² 0.933, tr Σ
20.49 at iteration 240 without the token embedding, which is tied to the output layer; here 18.63, 1.045, 19.46
(`--steps 241`): `result.json` has the figures without it and with it. Its learning rate rises over 1.97e9 tokens, as
there (the 100 steps of its configuration file are not read).
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core import initializers, random, tree
from core.per_example import Reports
from core.scores import noise
from nets.language import gpt2
from train import optimizers, plots
from train.data.fingerprint import fingerprint
from train.data.text import text
from train.data.understood import understood
from train.losses import cross_entropy
from train.optimizers import schedules
from train.run import Common, Count, Positive, Rate, Shared, begin, command_line
from train.step import create, make_step

RUNS = Path("runs/noise_scale")
TIED = "tokens.weight"  # the embedding that is also the output layer
NETS = {"small": gpt2.Config(256, 64, 2, 4, 64, 0.0, bias=False), "nanogns": gpt2.PRESETS["nanogpt-gpu"]}


@dataclass(frozen=True)
class Args:
    preset: Literal["small", "nanogns"] = "small"
    """Net, initial values, and the defaults of what follows; nanogns is the published run."""
    text: Path | None = None
    """UTF-8 text to learn from: a file (.gz too), a folder of them, or shakespeare or wikitext-2 (downloaded
    once). None: the language reference inside Python."""
    blocks: Count = 10
    """Stretches of the text, the last tenth of each left out; 1 leaves out the end, as nanoGPT does."""
    steps: Count = 400
    """Training steps."""
    batch: Count = 32
    """Examples per step, a power of two."""
    micro_batches: Count = 1
    """Parts that a batch is cut into to save memory; if there are several, small batches are not compared."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    warmup: Count = 50
    """Steps in which the learning rate rises to its peak."""
    decay: Rate = 0.95
    """Weight of the past in the moving averages."""
    common: Shared = Common(save_every=50)


PRESETS = {"nanogns": Args("nanogns", blocks=1, steps=250, batch=64, micro_batches=4, warmup=120_000)}


def losses(params, batch, keys, cfg: gpt2.Config) -> Tensor:
    """(examples,): the mean cross-entropy of each window."""
    tokens, targets = batch
    return cross_entropy(gpt2.apply(params, tokens, cfg, key=keys, train=True), targets, reduction="none").mean(1)


def small_sizes(batch: int) -> list[int]:
    """Sizes of the small batches that a batch is cut into: 1, 2, 4 ..."""
    return [2**i for i in range(batch.bit_length() - 1)]


def watch(batch: Reports) -> dict[str, Tensor]:
    """tr Σ and |G|² of each parameter; if there is a Gram matrix, |G_b|² of small batches of each size b too: of the
    first alone, and the mean over all that the batch is cut into."""
    rows = {name: torch.stack(tree.leaves(part)) for name, part in noise.estimate(batch)._asdict().items()}
    if batch.gram is None:
        return rows
    gram, one, every = batch.total_gram, [], []
    for b in small_sizes(len(gram)):
        block = torch.arange(len(gram), device=gram.device) // b
        one.append(gram[:b, :b].mean())
        every.append((gram * (block == block[:, None])).sum() / (b * len(gram)))
    return rows | {"one": torch.stack(one), "every": torch.stack(every), "large": gram.mean()[None]}


def averaged(series: Tensor, decay: float) -> Tensor:
    """The moving average (steps, ...) that begins with the first step's value, as nanoGNS has it."""
    state, rows = noise.begin(noise.Noise(series[0], series[0])), [series[0]]
    for row in series[1:]:
        state = noise.update(state, noise.Noise(row, row), decay)
        rows.append(noise.average(state).trace)
    return torch.stack(rows)


def spread(estimates: Tensor, decay: float) -> Tensor:
    """Relative standard deviation of an estimate from step to step, around its moving average, in the second half."""
    half = len(estimates) // 2
    smooth = noise.smooth(estimates, decay)
    return (estimates - smooth)[half:].square().mean(0).sqrt() / smooth[half:].mean(0)


def study(folder: Path, record: dict[str, Tensor], names: list[str], batch: int, decay: float) -> dict[str, float]:
    """Draw the record; returns the figures after the last step."""
    steps, others = len(record["trace"]), [i for i, name in enumerate(names) if name != TIED]
    smooth = noise.Noise(*(averaged(record[part], decay) for part in noise.Noise._fields))  # (steps, parameters) each
    whole, rest = (noise.Noise(*(part[:, at].sum(1) for part in smooth)) for at in (range(len(names)), others))
    scale, small = whole.trace / whole.square, small_sizes(batch)
    middle = len(small) // 2
    scales, spreads = {"every example": (range(1, steps + 1), positive(scale))}, {}
    for name, kind in (("one small batch", "one"), ("all small batches", "every")) if "one" in record else ():
        large = record["large"][:, 0]
        estimates = [noise.two_batches(record[kind][:, i], large, b, batch) for i, b in enumerate(small)]
        spreads[name] = [float(spread(estimate.trace, decay)) for estimate in estimates]
        if kind == "one":
            two = noise.Noise(*(averaged(x, decay) for x in estimates[middle]))
            label = f"batches of {small[middle]} and {batch}"
            scales = {label: (range(1, steps + 1), positive(two.trace / two.square)), **scales}
    draw(folder, whole, scales, (smooth.trace / smooth.square).T, names, spreads, batch)
    figures = {}
    for name, parts in (("", whole), ("_without_embedding", rest)):
        trace, square = parts.trace[-1], parts.square[-1]
        figures |= {f"noise_scale{name}": trace / square, f"square{name}": square, f"trace{name}": trace}
    figures |= {f"spread_{name.replace(' ', '_')}": values[middle] for name, values in spreads.items()}
    figures |= {"spread_every_example": spreads["all small batches"][0]} if spreads else {}
    figures["steps_with_noise_scale_above_batch"] = ((scale > batch) | (whole.square <= 0)).sum()
    return {name: float(value) for name, value in figures.items()}


def positive(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.nan)


def draw(folder: Path, parts: noise.Noise, scales: dict, layers: Tensor, names: list[str], spreads: dict, batch: int):
    """`noise_scale.png`; `layers` (parameters, steps) are noise scales, `spreads` have a value per small size."""
    steps = range(1, layers.shape[1] + 1)
    with plots.panels(folder / "noise_scale.png", 2, 2, 5.8, 4.2) as (left, right, below, sizes):
        lines = {"tr Σ": (steps, positive(parts.trace)), "|G|²": (steps, positive(parts.square))}
        plots.curves(left, lines, title="Noise and signal, moving averages", log=True)
        plots.curves(right, scales, ylabel="examples", title="Noise scale tr Σ / |G|²", log=True)
        right.axhline(batch, ls="--", lw=1, color="#888888", label=f"the batch of {batch}")
        right.legend(frameon=False, fontsize=9)
        edges, labels = torch.arange(len(steps) + 1) + 0.5, [name.removesuffix(".weight") for name in names]
        options = {"title": "Noise scale of layers", "label": "examples", "log_colour": True}
        plots.heat_map(below, layers, edges, labels, **options)
        if not spreads:
            sizes.set_axis_off()
            return
        lines = {name: (small_sizes(batch), values) for name, values in spreads.items()}
        plots.curves(sizes, lines, "examples in a small batch", "relative spread", "tr Σ of one step")
        sizes.set_xscale("log", base=2)
        sizes.set_ylim(bottom=0)
        sizes.plot(1, spreads["all small batches"][0], "o", color=plots.COLOURS[2], label="every example")
        sizes.legend(frameon=False, fontsize=9)


def net_spec(cfg: gpt2.Config, preset: str) -> tree.Tree:
    """The spec; nanoGNS cuts initial values at two standard deviations, but in the matrices that write into the
    residual stream."""

    def initial(name: str, leaf):
        truncated = len(leaf.shape) > 1 and not name.endswith(("attn.proj.weight", "mlp.down.weight"))
        return dataclasses.replace(leaf, init=initializers.truncated_normal(0.02)) if truncated else leaf

    return tree.map_with_names(initial, gpt2.spec(cfg)) if preset == "nanogns" else gpt2.spec(cfg)


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("text",))
    if args.batch < 4 or args.batch & (args.batch - 1):
        raise ValueError(f"--batch is {args.batch}; expected a power of two from 4 on")
    if args.batch % args.micro_batches:
        raise ValueError(f"--batch {args.batch} does not divide into --micro-batches {args.micro_batches}")
    data = text.open_text(args.text, None, cache=RUNS / "tokens")
    tokens, held_out = text.split(data.tokens, blocks=args.blocks)
    cfg = dataclasses.replace(NETS[args.preset], vocabulary=data.tokenizer.vocabulary_size)
    understood(print, text.facts(data, tokens, held_out) | {"net": cfg})

    create_key, data_key = random.split(random.key(args.common.seed)).unbind(0)
    model, schedule = net_spec(cfg, args.preset), schedules.warmup(schedules.constant(args.learning_rate), args.warmup)
    adamw = optimizers.adamw(schedule, 0.9, 0.99, weight_decay=0.1, mask=lambda name, leaf: leaf.ndim >= 2)
    optimizer, names = optimizers.chain(optimizers.clip_by_global_norm(1.0), adamw), tree.names(model)
    whole, small = args.micro_batches == 1, len(small_sizes(args.batch))
    columns = {"trace": len(names), "square": len(names)} | (
        {"one": small, "every": small, "large": 1} if whole else {}
    )
    record = {name: torch.zeros(args.steps, count) for name, count in columns.items()}  # a row per step
    state = create(create_key.to(run.device), model, optimizer)
    identity = {"net": cfg, "data": fingerprint(data.tokens)}
    state, record = run.restore((state, record), identity, args.steps)
    options = {"policy": run.policy, "micro_batches": args.micro_batches, "compile": args.common.compile}
    watching = {"watch": watch, "want": ("norm", "gram") if whole else ("norm",)}
    step = make_step(functools.partial(losses, cfg=cfg), optimizer, donate=True, **options, **watching)

    with run.open({}, unit="tokens"):
        run.log.print(f"{tree.count(model):,} parameters; run in {run.folder}")
        for at, batch in run.steps(text.token_batches(tokens, data_key, run.remaining, args.batch, cfg.context)):
            state, metrics = step(state, tree.move(batch, run.device))
            row = torch.tensor([at - 1])
            record = {name: rows.index_copy(0, row, metrics[name].cpu()[None]) for name, rows in record.items()}
            scalars = {name: value for name, value in metrics.items() if name not in record}
            run.record(at, scalars, args.batch * cfg.context)
            if run.due(at, 10):
                trace, square = (averaged(record[part][:at].sum(1), args.decay)[-1] for part in noise.Noise._fields)
                parts = {"noise_scale": trace / square, "noise_trace": trace, "noise_square": square}
                run.log.metrics(at, {f"train/{name}": value for name, value in parts.items()})
            if run.due(at, args.common.save_every):
                run.save(at, (state, record))
        figures = study(run.folder, record, names, args.batch, args.decay)
        run.result(figures)
    print("noise scale {noise_scale:.4g}, |G|² {square:.4g}, tr Σ {trace:.4g} of all parameters".format(**figures))
    without = [figures[f"{name}_without_embedding"] for name in ("noise_scale", "square", "trace")]
    print("noise scale {:.4g}, |G|² {:.4g}, tr Σ {:.4g} without the tied embedding".format(*without))
    print(f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train, PRESETS), root=RUNS)
