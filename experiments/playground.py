"""The pictures that explain a transformer: positions, masks, smoothed targets, the learning rate, attention, its cost.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762). Each cell draws one of them; an editor that knows
`# %%` opens the file as a notebook and shows them one by one. As a script it draws them all:

    python experiments/playground.py                                 about 20 seconds on 2 CPU cores
    python experiments/playground.py --run runs/translate/NAME "Der dritte Mai ist ein Montag."

Without a run, attention is that of a transformer of one layer, which here learns in a few seconds to write letters in
reverse: its cross attention is the other diagonal. Expected: 100 % of the letters right; attention to sequences of
twice the length takes four times as long, once they are long.
"""

# %% What the cells share
import functools
import statistics
import string
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from core import random
from core.attention import attention, causal_mask
from experiments.parts.translator import Decoder, draw_attention, load, maps, translations
from nets.language import transformer
from train import optimizers, plots
from train.data.text import tokenizers
from train.data.text.tokenizers import BOS, EOS, PAD
from train.data.translation import buckets, corpus
from train.metrics import translation
from train.optimizers import schedules
from train.run import command_line
from train.run import run as runs
from train.run.logs import RunLog
from train.step import create, make_step

RUNS = Path("runs/playground")
NOTEBOOK = "ipykernel" in sys.modules
CELLS: list[Callable] = []


@dataclass(frozen=True)
class Args:
    sentence: Annotated[str, tyro.conf.Positional] = "Am Montag um zwanzig vor zehn fährt der Zug nach München ab."
    """What the trained model of --run translates while its attention is drawn."""
    run: Path | None = None
    """Folder of a run of translate.py, whose attention is drawn instead."""
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    """Lengths of the sequences for which attention is timed."""
    rounds: int = 5
    """How often each time is taken; the median counts."""
    steps: int = 400
    """Training steps of the transformer that learns to reverse."""
    seed: int = 0
    """Seed of everything random."""
    name: str | None = None
    """Folder under runs/playground; the date and time if not given."""


def cell(draw: Callable[[Path, Args], dict]) -> Callable:
    """Mark `draw(file, args) -> figures`; in a notebook it is called at once and its picture shown."""
    CELLS.append(draw)
    if NOTEBOOK:
        from IPython.display import Image, display

        path = RUNS / "notebook" / f"{draw.__name__}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        print(draw(path, Args()))
        display(Image(path))
    return draw


# %% Positions: sines and cosines of ever longer waves, so that the product of two of them tells how far apart they are
@cell
def positions(path: Path, args: Args) -> dict:
    table = transformer.sinusoids(torch.arange(100), 128)  # (places, width)
    with plots.panels(path, 1, 3, 4.8, 4.0) as (left, middle, right):
        plots.heat_map(left, table.T, range(101), range(129), "place", "component", "PE(place, component)")
        some = {f"component {i}": (range(100), table[:, i]) for i in (8, 24, 48)}
        plots.curves(middle, some, "place", "", "Some components")
        near = table @ table.T
        lines = {f"place {i}": (range(100), near[i]) for i in (10, 50, 90)}
        plots.curves(right, lines, "other place", "", "Products of two places")
    return {}


# %% Masks: what may look where. Nothing looks at padding; in a target nothing looks ahead
@cell
def masks(path: Path, args: Args) -> dict:
    pairs = [("Montag", "Monday"), ("Am Montag um zehn", "on Monday at ten")]
    tokenizer = tokenizers.train_sentences((text for pair in pairs for text in pair), 300, words=True)
    known = corpus.open_corpus(pairs, tokenizer)
    ((_, source, target),) = buckets.evaluation_batches(known, 100, 100)
    read, written = tokenizer.tokens(source[0].tolist()), tokenizer.tokens(target[0, :-1].tolist())
    padding = (source[0] != PAD).expand(len(read), -1)
    causal = causal_mask(len(written))
    cross = (source[0] != PAD).expand(len(written), -1)
    with plots.panels(path, 1, 3, 4.4, 4.4) as axes:
        for panel, mask, rows, columns, title in (
            (axes[0], padding, read, read, "Encoder: all but padding"),
            (axes[1], causal, written, written, "Decoder: what is written"),
            (axes[2], cross, written, read, "Cross: the source but padding"),
        ):
            plots.matrix(panel, mask.float(), rows, columns, "looked at", "looks", title, numbers=False)
    return {}


# %% Smoothed targets: the right token less than all, the others more than nothing; then being too sure costs
@cell
def smoothed_targets(path: Path, args: Args) -> dict:
    labels = torch.tensor([3, 1, 6, 4, 2])
    smoothed = 0.6 * torch.nn.functional.one_hot(labels, 8) + 0.4 / 8
    right = torch.linspace(0.3, 0.9995, 200)
    lines = {}
    for smoothing in (0.0, 0.1, 0.4):
        logits = torch.stack([right, *[(1 - right) / 7] * 7], 1).log()  # the rest is spread evenly
        losses = [float(translation.smoothed_divergence(row, torch.tensor(0), smoothing, -1)) for row in logits]
        lines[f"smoothing {smoothing}"] = (right, losses)
    with plots.panels(path, 1, 2, 4.8, 4.0) as (left, right_panel):
        title = "Targets of five places, smoothing 0.4"
        plots.matrix(left, smoothed, [f"place {i}" for i in range(5)], list("abcdefgh"), "token", "", title)
        plots.curves(right_panel, lines, "probability of the right token", "divergence (nats)", "What it costs")
    return {f"divergence_when_sure_{name[-3:]}": values[1][-1] for name, values in lines.items()}


# %% The learning rate: up to the warm-up's last step, then down with the root of the step
@cell
def learning_rate(path: Path, args: Args) -> dict:
    steps = torch.arange(0, 20_000, 50)
    options = {"width 512, warm-up 4000": (512, 4000), "width 512, warm-up 8000": (512, 8000)}
    options |= {"width 256, warm-up 4000": (256, 4000), "width 1024, warm-up 4000": (1024, 4000)}
    lines = {name: (steps, schedules.noam(*option)(steps)) for name, option in options.items()}
    plots.curves(path, lines, "step", "learning rate", "width^-0.5 min(step^-0.5, step warm-up^-1.5)")
    return {"peak_width_512": float(lines["width 512, warm-up 4000"][1].max())}


# %% Attention of a model that was trained: by translate.py, or here, to write letters in reverse
REVERSE = transformer.Config(32, 32, layers=1, heads=2, width=64, hidden=128, dropout=0.0, context=16)
LETTERS = 10


def reversals(key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(letters and the end, the start, the letters in reverse and the end), each (count, LETTERS + 1 or 2)."""
    letters = random.randint(key, (count, LETTERS), 4, 30).long()
    end, start = torch.full((count, 1), EOS), torch.full((count, 1), BOS)
    return torch.cat([letters, end], 1), torch.cat([start, letters.flip(1), end], 1)


def reverse_loss(params, batch, keys) -> tuple[Tensor, dict]:
    source, target = batch
    logits = transformer.apply(params, (source, target[:, :-1]), REVERSE)
    right = translation.token_accuracy(logits, target[:, 1:], PAD)
    return translation.smoothed_divergence(logits, target[:, 1:], 0.0, PAD), {"accuracy": right}


@cell
def attention_maps(path: Path, args: Args) -> dict:
    if args.run is not None:
        translator = load(args.run, "cpu", average=1)
        ((found, _),) = translations(translator, [args.sentence], Decoder())[0]
        draw_attention(path.with_suffix(""), translator, args.sentence, found)
        weights, read, written = maps(translator, args.sentence, found)
        cross, heads, figures = weights["cross"][0, -1], translator.cfg.heads, {"translation": found}
    else:
        optimizer = optimizers.adam(schedules.warmup_cosine(5e-3, args.steps // 10, args.steps), 0.9, 0.98)
        step = make_step(reverse_loss, optimizer, compile=False)
        state = create(random.key(args.seed), transformer.spec(REVERSE), optimizer)
        batches = random.fold_in(random.key(args.seed), 2)  # `create` has 0 and 1
        for at in range(args.steps):
            state, _ = step(state, reversals(random.fold_in(batches, at), 64))
        source, target = reversals(random.fold_in(batches, args.steps), 200)
        with torch.no_grad():
            accuracy = reverse_loss(state.params, (source, target), None)[1]["accuracy"]
            cross = transformer.attention_maps(state.params, (source[:1], target[:1, :-1]), REVERSE)["cross"][0, -1]
        names = dict(enumerate(string.ascii_lowercase, 4)) | {EOS: "<eos>"}
        read, written = ([names[i] for i in ids[0].tolist()] for ids in (source, target[:, 1:]))
        heads, figures = REVERSE.heads, {"reversed_letters_right": float(accuracy)}
    size = {"width": 1.6 + 0.2 * len(read), "height": 1.6 + 0.2 * len(written)}
    with plots.panels(path, 1, heads, **size) as axes:
        for i, panel in enumerate(axes):
            title = f"last layer, head {i + 1}"
            plots.matrix(panel, cross[i], written, read, "read", "written", title, numbers=False)
    return figures


# %% What attention costs: every place looks at every other, so twice the length is four times the work and the weights
@cell
def cost(path: Path, args: Args) -> dict:
    seconds: dict[str, list[float]] = {"explicit": [], "fused": []}
    for number, length in enumerate(args.lengths):
        keys = random.split(random.fold_in(random.key(args.seed), number), 3)
        q, k, v = (random.normal(key, (1, 4, length, 64)) for key in keys)
        for method, times in seconds.items():
            call = functools.partial(attention, q, k, v, method=method)
            call()  # the first is to warm up
            taken = []
            for _ in range(args.rounds):
                began = time.perf_counter()
                call()
                taken.append(time.perf_counter() - began)
            times.append(statistics.median(taken))
    first = seconds["explicit"][-1] / args.lengths[-1] ** 2
    lines = {name: (args.lengths, [1e3 * t for t in times]) for name, times in seconds.items()}
    lines["length squared"] = (args.lengths, [1e3 * first * n**2 for n in args.lengths])
    memory = {"explicit": (args.lengths, [4 * 4 * n**2 / 2**20 for n in args.lengths])}  # 4 heads of 4 bytes
    memory["fused"] = (args.lengths, [4 * 4 * n * 64 / 2**20 for n in args.lengths])  # what it returns
    with plots.panels(path, 1, 2, 5.0, 4.0) as axes:
        plots.curves(axes[0], lines, "length", "ms", "Time of attention, 4 heads of 64", log=True)
        plots.curves(axes[1], memory, "length", "MiB", "What it must write", log=True)
        for panel in axes:
            panel.set_xscale("log", base=2)
            panel.set_xticks(args.lengths, map(str, args.lengths))
    return {
        f"ms/{name}/{n}": 1e3 * t for name, times in seconds.items() for n, t in zip(args.lengths, times, strict=True)
    }


# %% All of them, as a script
def main(args: Args) -> None:
    command_line.at_least_one(rounds=args.rounds, steps=args.steps, lengths=min(args.lengths, default=0))
    if args.run is not None:
        load(args.run, "cpu", average=1)  # fails now rather than in the middle
    folder, began, figures = runs.new_folder(RUNS, args.name), time.perf_counter(), {}
    with RunLog(folder, {"args": args, "torch": torch.__version__}, total=len(CELLS), unit="pictures") as log:
        for at, draw in enumerate(CELLS, 1):
            figures |= draw(folder / f"{draw.__name__}.png", args)
            log.progress(at, 1)
        log.result({**figures, "seconds": time.perf_counter() - began})
    for name, value in figures.items():
        print(f"{name}: {value if isinstance(value, str) else format(value, '.4g')}")
    print(f"{time.perf_counter() - began:.0f} s; files in {folder}/")


if __name__ == "__main__" and not NOTEBOOK:
    command_line.run(__doc__, (Args, main))
