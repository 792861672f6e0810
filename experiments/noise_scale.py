"""How large a batch is worth it? The gradient noise scale of a GPT while it learns, exact from every example.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training" (arXiv:1812.06162): B = tr Σ / |G|². They estimate
both from two batch sizes; with the norm of each example's gradient the small batch is a single example, and the
uncertainty least. Both are taken from the same batches here:

    python experiments/noise_scale.py                                        a minute and a half on 2 CPU cores
    python experiments/noise_scale.py --setting nanogns --text input.txt     the published run of nanoGNS; an hour

Expected of the first: B is 2 to 3 at the start, passes the batch of 32 after 200 steps, is at most 57 and 27 at the
end; tr Σ of one step is uncertain by 17 % by every example, by 46 % by one small batch of 4 beside the batch.

The second is the run in nanoGNS's README (Gray et al. 2024, "Normalization Layer Per-Example Gradients are Sufficient
to Predict Gradient Noise Scale in Transformers"; https://github.com/CerebrasResearch/nanoGNS) on tiny Shakespeare: a
GPT of 6 layers, 250 steps of 64 windows of 256 characters, moving average 0.95. Published: B 21.96, |G|² 0.933, tr Σ
20.49 at iteration 240 without the token embedding, which is tied to the output layer; here 18.63, 1.045, 19.46
(`--steps 241`): `result.json` has the figures without it and with it. Its learning rate rises over 1.97e9 tokens, as
there (the 100 steps of its configuration file are not read).
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core import initializers, random, tree
from core.per_example import Reports
from core.scores import noise
from nets.language import gpt2
from train import optimizers, plots
from train.data.text import text, token_files
from train.losses import cross_entropy
from train.optimizers import schedules
from train.run import command_line
from train.run import run as runs
from train.step import create, make_step

RUNS = Path("runs/noise_scale")
TIED = "tokens.weight"  # the embedding that is also the output layer


@dataclass(frozen=True)
class Setting:
    """The net, and how it is trained: AdamW, the learning rate rises linearly to its peak over `warmup` steps."""

    net: gpt2.Config
    steps: int
    batch: int
    warmup: int
    micro_batches: int = 1
    truncated: bool = False  # initial values cut at two standard deviations

    def schedule(self) -> optimizers.Schedule:
        return schedules.warmup(schedules.constant(1e-3), self.warmup)


SETTINGS = {
    "small": Setting(gpt2.Config(256, 64, 2, 4, 64, 0.0, bias=False), steps=400, batch=32, warmup=50),
    "nanogns": Setting(gpt2.PRESETS["nanogpt-gpu"], 250, 64, warmup=120_000, micro_batches=4, truncated=True),
}


@dataclass(frozen=True)
class Args:
    setting: str = "small"
    """Net and recipe: small, or nanogns for the published run."""
    text: Path | None = None
    """A UTF-8 file to learn from, its last tenth left out; without it, the language reference inside Python."""
    steps: int | None = None
    """Training steps; the setting's if not given."""
    batch: int | None = None
    """Examples a step, a power of two; the setting's if not given."""
    decay: float = 0.95
    """Weight of the past in the moving averages."""
    save_every: int = 50
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random: initial values, order of the data, dropout."""
    name: str | None = None
    """Folder under runs/noise_scale; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    compile: bool = True
    """Compile the train step with torch.compile."""


def loss(params, batch, keys, cfg: gpt2.Config) -> Tensor:
    """(examples,): the mean cross-entropy of each window."""
    tokens, targets = batch
    return cross_entropy(gpt2.apply(params, tokens, cfg, key=keys, train=True), targets, reduction="none").mean(1)


def sizes(batch: int) -> list[int]:
    """Of the small batches that a batch is cut into: 1, 2, 4 ..."""
    return [2**i for i in range(batch.bit_length() - 1)]


def watch(found: Reports) -> dict[str, Tensor]:
    """tr Σ and |G|² of each parameter, and if there is a Gram matrix |G_b|² of small batches of each size b: of the
    first alone, and the mean over all that the batch is cut into."""
    estimated = noise.estimate(found)
    seen = {name: torch.stack(tree.leaves(part)) for name, part in estimated._asdict().items()}
    if found.gram is not None:
        gram, one, every = found.total_gram, [], []
        for b in sizes(len(gram)):
            block = torch.arange(len(gram), device=gram.device) // b
            one.append(gram[:b, :b].mean())
            every.append((gram * (block == block[:, None])).sum() / (b * len(gram)))
        seen |= {"one": torch.stack(one), "every": torch.stack(every), "large": gram.mean()[None]}
    return seen


def nothing_seen(steps: int, parameters: int, small: int) -> dict[str, Tensor]:
    """The record of a run, a row a step, which its checkpoints hold."""
    widths = {"trace": parameters, "square": parameters} | ({"one": small, "every": small, "large": 1} if small else {})
    return {name: torch.zeros(steps, width) for name, width in widths.items()}


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


def study(folder: Path, seen: dict[str, Tensor], names: list[str], batch: int, decay: float) -> dict[str, float]:
    """Draw the record; returns the figures after the last step."""
    steps, others = len(seen["trace"]), [i for i, name in enumerate(names) if name != TIED]
    smooth = noise.Noise(*(averaged(seen[part], decay) for part in noise.Noise._fields))
    whole, rest = (noise.Noise(*(part[:, at].sum(1) for part in smooth)) for at in (range(len(names)), others))
    exact, xs, small = whole.trace / whole.square, list(range(1, steps + 1)), sizes(batch)
    lines, spreads = {"every example": (xs, exact)}, {}
    if "one" in seen:
        estimates = {
            name: [noise.two_batches(seen[kind][:, i], seen["large"][:, 0], b, batch) for i, b in enumerate(small)]
            for name, kind in (("one small batch", "one"), ("all small batches", "every"))
        }
        two = noise.Noise(*(averaged(x, decay) for x in estimates["one small batch"][len(small) // 2]))
        lines = {f"batches of {small[len(small) // 2]} and {batch}": (xs, two.trace / two.square), **lines}
        spreads = {name: (small, [spread(e.trace, decay) for e in found]) for name, found in estimates.items()}
    with plots.panels(folder / "noise_scale.png", 2, 2, 5.8, 4.2) as (parts, scale, layers, sizes_axes):
        both = {"tr Σ": (xs, positive(whole.trace)), "|G|²": (xs, positive(whole.square))}
        plots.curves(parts, both, title=f"Noise and signal, moving average {decay:g}", log=True)
        lines = {name: (x, positive(y)) for name, (x, y) in lines.items()}
        plots.curves(scale, lines, ylabel="examples", title="Noise scale tr Σ / |G|²", log=True)
        scale.axhline(batch, ls="--", lw=1, color="#888888", label=f"the batch of {batch}")
        scale.legend(frameon=False, fontsize=9)
        edges, shown = torch.arange(steps + 1) + 0.5, [name.removesuffix(".weight") for name in names]
        cells, title = (smooth.trace / smooth.square).T, "Noise scale of layers"
        plots.heat_map(layers, cells, edges, shown, title=title, label="examples", log_colour=True)
        if spreads:
            plots.curves(sizes_axes, spreads, "examples in a small batch", "relative spread", "tr Σ of one step")
            sizes_axes.set_xscale("log", base=2)
            sizes_axes.set_ylim(bottom=0)
            every = float(spreads["all small batches"][1][0])
            sizes_axes.plot(1, every, "o", color=plots.COLOURS[2], label="every example")
            sizes_axes.legend(frameon=False, fontsize=9)
        else:
            sizes_axes.set_axis_off()
    figures = {}
    for name, found in (("", whole), ("_without_embedding", rest)):
        trace, square = found.trace[-1], found.square[-1]
        figures |= {f"noise_scale{name}": trace / square, f"square{name}": square, f"trace{name}": trace}
    figures |= {f"spread_{name.replace(' ', '_')}": values[len(small) // 2] for name, (_, values) in spreads.items()}
    figures |= {"spread_every_example": spreads["all small batches"][1][0]} if spreads else {}
    figures["steps_with_noise_scale_above_batch"] = ((exact > batch) | (whole.square <= 0)).sum()
    return {name: float(value) for name, value in figures.items()}


def positive(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.nan)


def net_spec(setting: Setting) -> tree.Tree:
    """With `truncated`, the matrices that nanoGNS draws so: all but those that write into the residual stream."""

    def initial(name: str, leaf):
        cut = setting.truncated and len(leaf.shape) > 1 and not name.endswith(("attn.proj.weight", "mlp.down.weight"))
        return dataclasses.replace(leaf, init=initializers.truncated_normal(0.02)) if cut else leaf

    return tree.map_with_names(initial, gpt2.spec(setting.net))


def train(args: Args) -> None:
    origin, args = runs.begin(RUNS, args, free=("save_every", "device", "compile"))
    setting = SETTINGS[command_line.choice("--setting", args.setting, SETTINGS)]
    setting = dataclasses.replace(setting, steps=args.steps or setting.steps, batch=args.batch or setting.batch)
    command_line.at_least_one(steps=setting.steps, save_every=args.save_every)
    if setting.batch < 4 or setting.batch & (setting.batch - 1):
        raise ValueError(f"--batch is {setting.batch}; expected a power of two from 4 on")
    if not 0 <= args.decay < 1:
        raise ValueError(f"--decay is {args.decay}; expected a number in [0, 1)")
    device, whole = command_line.device(args.device), setting.micro_batches == 1
    tokens, tokenizer = token_files.tokens_of(args.text, None, cache=RUNS / "tokens")
    setting = dataclasses.replace(setting, net=dataclasses.replace(setting.net, vocabulary=tokenizer.vocabulary_size))
    learn, _ = text.split(tokens)

    model, key = net_spec(setting), random.key(args.seed, device)
    adamw = optimizers.adamw(setting.schedule(), 0.9, 0.99, weight_decay=0.1, mask=lambda name, leaf: leaf.ndim >= 2)
    optimizer, names = optimizers.chain(optimizers.clip_by_global_norm(1.0), adamw), tree.names(model)
    seen = nothing_seen(setting.steps, len(names), len(sizes(setting.batch)) if whole else 0)
    identity = {"net": setting.net, "tokens": len(tokens)}
    state, seen = runs.restore(origin, (create(key, model, optimizer), seen), identity, setting.steps)
    seen = tree.move(seen, "cpu")
    watching = {"watch": watch, "want": ("norm", "gram") if whole else ("norm",)}
    options = {"micro_batches": setting.micro_batches, "donate": True, "compile": args.compile}
    step = make_step(functools.partial(loss, cfg=setting.net), optimizer, **watching, **options)
    config = {"args": args, **identity, "setting": setting, "torch": torch.__version__}
    with runs.opened(origin, config, total=setting.steps, unit="tokens") as run:
        run.log.print(f"{tree.count(model):,} parameters, {len(learn):,} tokens to learn from; run in {run.folder}")
        at, steps, data_key = run.first, range(run.first, setting.steps), random.fold_in(key, 2)
        batches = text.token_batches(learn, data_key, steps, setting.batch, setting.net.context)
        for at, batch in enumerate(batches, run.first + 1):
            state, metrics = step(state, tree.move(batch, device))
            scalars = {name: value for name, value in metrics.items() if name not in seen}
            runs.check_finite(run, at, scalars)
            seen = {n: rows.index_copy(0, torch.tensor([at - 1]), metrics[n].cpu()[None]) for n, rows in seen.items()}
            last = at == setting.steps or run.stop.requested
            run.log.progress(at, setting.batch * setting.net.context, loss=metrics["loss"])
            if at % 10 == 0 or last:
                recent = [averaged(seen[part][:at].sum(1), args.decay)[-1] for part in noise.Noise._fields]
                found = {"noise_scale": recent[0] / recent[1], "noise_trace": recent[0], "noise_square": recent[1]}
                run.log.metrics(at, {f"train/{name}": value for name, value in {**scalars, **found}.items()})
            if at % args.save_every == 0 or last:
                runs.save(run, at, (state, seen))
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        figures = study(run.folder, seen, names, setting.batch, args.decay)
        run.log.result({**figures, "steps": at, "seconds": seconds})
    print("noise scale {noise_scale:.4g}, |G|² {square:.4g}, tr Σ {trace:.4g} of all parameters".format(**figures))
    without = [figures[f"{name}_without_embedding"] for name in ("noise_scale", "square", "trace")]
    print("noise scale {:.4g}, |G|² {:.4g}, tr Σ {:.4g} without the tied embedding".format(*without))
    print(f"{at} steps in {seconds:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train))
