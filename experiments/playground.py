"""The pictures that explain a transformer: positions, masks, smoothed targets, the learning rate, attention, its cost.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762). Each cell draws one of them; an editor that knows
`# %%` opens the file as a notebook and shows them one by one. As a script it draws them all:

    python experiments/playground.py                                 about 20 seconds on 2 CPU cores
    python experiments/playground.py --run runs/translate/NAME "Der dritte Mai ist ein Montag."

Without --run, attention is that of a transformer of one layer, which first learns in a few seconds to write letters in
reverse: its cross attention is the other diagonal. Expected: 100 % of the letters right (12.6 % if they are copied);
attention to sequences of twice the length takes four times as long, once they are long.
"""

# %% What the cells share
import experiments.parts.interrupts  # noqa: F401 # isort: skip
import contextlib
import functools
import statistics
import string
import sys
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from core import random, tree
from core.attention import attention, causal_mask
from experiments.parts.translator import RUNS as TRANSLATORS
from experiments.parts.translator import Decoder, Translator, draw_attention, draw_maps, load, maps, translations
from nets.language import transformer
from train import optimizers, plots
from train.data.text import tokenizers
from train.data.text.tokenizers import BOS, EOS, PAD
from train.data.translation import buckets, corpus
from train.data.understood import understood
from train.losses import WeightedLoss
from train.metrics import translation
from train.optimizers import schedules
from train.run import Common, Count, Run, Shared, begin, command_line, open_run
from train.run.run import format_figures
from train.step import create, make_step

RUNS = Path("runs/playground")
SENTENCE = "Am Montag um zwanzig vor zehn fährt der Zug nach München ab."
NOTEBOOK = "ipykernel" in sys.modules
if NOTEBOOK:
    sys.argv[1:] = []  # those of the kernel
CELLS: list[Callable] = []


@dataclass(frozen=True)
class Args:
    sentence: Annotated[str | None, tyro.conf.Positional] = None
    """Sentence that the translator of --run translates while its attention is drawn; one about a train if None."""
    run: Path | None = None
    """Folder of a run of translate.py, whose attention is drawn instead."""
    lengths: tuple[Count, ...] = (64, 128, 256, 512, 1024, 2048)
    """Lengths of the sequences for which attention is timed."""
    rounds: Count = 5
    """Measurements per time, of which the median counts."""
    steps: Count = 400
    """Training steps of the transformer that learns to reverse."""
    common: Shared = Common(save_every=200, compile=False)


def cell(draw: Callable[[Path, Args, Translator | None], dict]) -> Callable:
    """Mark `draw(file, args, model) -> figures`; in a notebook it is called at once and its picture shown."""
    CELLS.append(draw)
    if NOTEBOOK:
        from IPython.display import Image, display

        path = RUNS / "notebook" / f"{draw.__name__}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        print(draw(path, Args(), None))
        display(Image(path))
    return draw


# %% Positions: sines and cosines of ever longer waves, so that the product of two of them tells how far apart they are
@cell
def positions(path: Path, args: Args, model: Translator | None) -> dict:
    table = transformer.sinusoids(torch.arange(100), 128)  # (positions, width)
    with plots.panels(path, 1, 3, 4.8, 4.0) as (left, middle, right):
        plots.heat_map(left, table.T, range(101), range(129), "position", "component", "PE(position, component)")
        some = {f"component {i}": (range(100), table[:, i]) for i in (8, 24, 48)}
        plots.curves(middle, some, "position", "", "Some components")
        near = table @ table.T
        lines = {f"position {i}": (range(100), near[i]) for i in (10, 50, 90)}
        plots.curves(right, lines, "other position", "", "Products of two positions")
    return {}


# %% Masks: which tokens may look where. Nothing looks at padding; in a target nothing looks ahead
@cell
def masks(path: Path, args: Args, model: Translator | None) -> dict:
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
def smoothed_targets(path: Path, args: Args, model: Translator | None) -> dict:
    labels = torch.tensor([3, 1, 6, 4, 2])
    smoothed = 0.6 * torch.nn.functional.one_hot(labels, 8) + 0.4 / 8
    right = torch.linspace(0.3, 0.9995, 200)
    lines = {}
    for smoothing in (0.0, 0.1, 0.4):
        logits = torch.stack([right, *[(1 - right) / 7] * 7], 1).log()  # (200, 8): the rest is spread evenly
        label = torch.zeros(200, 1, dtype=torch.int64)
        losses, _ = translation.smoothed_divergence(logits[:, None], label, smoothing, -1)  # (200,)
        lines[f"smoothing {smoothing}"] = (right, losses.tolist())
    with plots.panels(path, 1, 2, 4.8, 4.0) as (left, right_panel):
        title = "Targets of five positions, smoothing 0.4"
        plots.matrix(left, smoothed, [f"position {i}" for i in range(5)], list("abcdefgh"), "token", "", title)
        plots.curves(right_panel, lines, "probability of the right token", "divergence (nats)", "What it costs")
    return {f"divergence_when_sure_{name[-3:]}": values[1][-1] for name, values in lines.items()}


# %% The learning rate: up to the warm-up's last step, then down with the root of the step
@cell
def learning_rate(path: Path, args: Args, model: Translator | None) -> dict:
    steps = torch.arange(0, 20_000, 50)
    options = {"width 512, warm-up 4000": (512, 4000), "width 512, warm-up 8000": (512, 8000)}
    options |= {"width 256, warm-up 4000": (256, 4000), "width 1024, warm-up 4000": (1024, 4000)}
    lines = {name: (steps, schedules.noam(*option)(steps)) for name, option in options.items()}
    plots.curves(path, lines, "step", "learning rate", "width^-0.5 min(step^-0.5, step warm-up^-1.5)")
    return {"peak_width_512": float(lines["width 512, warm-up 4000"][1].max())}


# %% Attention of a model that was trained: by translate.py, or here, to write letters in reverse
REVERSE = transformer.Config(32, 32, layers=1, heads=2, width=64, hidden=128, dropout=0.0, context=16)
LETTERS = tokenizers.train_sentences(string.ascii_lowercase, 30, words=True)
LENGTH, BATCH = 10, 64


def reversals(key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(letters and the end, the start, the letters in reverse and the end), each (count, LENGTH + 1 or 2)."""
    letters = random.randint(key, (count, LENGTH), 4, 30).long()
    end, start = torch.full((count, 1), EOS), torch.full((count, 1), BOS)
    return torch.cat([letters, end], 1), torch.cat([start, letters.flip(1), end], 1)


def reverse_loss(params, batch, keys) -> tuple[WeightedLoss, dict]:
    source, target = batch
    logits = transformer.apply(params, (source, target[:, :-1]), REVERSE)
    right = translation.token_accuracy(logits, target[:, 1:], PAD)
    return translation.smoothed_divergence(logits, target[:, 1:], 0.0, PAD), {"accuracy": right}


@contextlib.contextmanager
def reverser(run: Run) -> Iterator[Translator]:
    """Context in which the run is open, and a transformer has learned to reverse letters; on the CPU."""
    create_key, data_key = random.split(random.key(run.args.common.seed)).unbind(0)
    steps, model = run.args.steps, transformer.spec(REVERSE)
    optimizer = optimizers.adam(schedules.warmup_cosine(5e-3, steps // 10, steps), 0.9, 0.98)
    state = create(create_key.to(run.device), model, optimizer)
    state = run.restore(state, {"net": REVERSE}, 0 if run.args.run else steps)
    step = make_step(reverse_loss, optimizer, donate=True, policy=run.policy, compile=run.args.common.compile)
    with run.open({}):
        run.log.print(f"{tree.count(model):,} parameters; run in {run.folder}")
        for at, batch in run.steps(reversals(random.fold_in(data_key, t), BATCH) for t in run.remaining):
            state, metrics = step(state, tree.move(batch, run.device))
            run.record(at, metrics, BATCH)
            if run.due(at, run.args.common.save_every):
                run.save(at, state)
        yield Translator(tree.move(state.params, "cpu"), REVERSE, LETTERS)


@cell
def attention_maps(path: Path, args: Args, model: Translator | None) -> dict:
    if model is None:  # in a notebook
        with reverser(begin(RUNS, args)) as model:
            pass
    if args.run is not None:
        sentence = args.sentence or SENTENCE
        ((text, _, ids),) = translations(model, [sentence], Decoder())[0]
        draw_attention(path.with_suffix(""), model, sentence, ids)
        figures = {"translation": text}
    else:
        source, target = reversals(random.key(args.common.seed), 200)
        with torch.no_grad():
            accuracy = reverse_loss(model.params, (source, target), None)[1]["accuracy"]
        copied = (source == target[:, 1:]).float().mean()
        figures = {"reversed_letters_right": float(accuracy), "copied_letters_right": float(copied)}
        sentence, ids = LETTERS.decode(source[0].tolist()), target[0, 1:-1].tolist()
    weights, read, written = maps(model, sentence, ids)
    draw_maps(path, weights["cross"], written, read)
    return figures


# %% Cost of attention: every position looks at every other, so twice the length is four times the work and the weights
@cell
def cost(path: Path, args: Args, model: Translator | None) -> dict:
    seconds: dict[str, list[float]] = {"explicit": [], "fused": []}
    for number, length in enumerate(args.lengths):
        keys = random.split(random.fold_in(random.key(args.common.seed), number), 3)
        q, k, v = (random.normal(key, (1, 4, length, 64)) for key in keys)
        for method, times in seconds.items():
            call = functools.partial(attention, q, k, v, method=method)
            call()  # the first is to warm up
            times.append(statistics.median(timeit.repeat(call, number=1, repeat=args.rounds)))
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
    return {f"{name}/{n}/seconds": seconds[name][i] for name in seconds for i, n in enumerate(args.lengths)}


# %% All of them, as a script
def main(args: Args) -> None:
    run = begin(RUNS, args, free=("sentence", "lengths", "rounds", "steps"))
    if args.sentence is not None and args.run is None:
        raise ValueError(f"'{args.sentence}' is for a translator; name its run with --run")
    if not args.lengths:
        raise ValueError("--lengths is empty; expected at least one length")
    translator = args.run and load(open_run(args.run, TRANSLATORS), "cpu")
    understood(print, {"attention of": args.run or "a net that learns to reverse", "lengths": args.lengths})
    with reverser(run) as letters:
        figures = {}
        for draw in CELLS:
            figures |= draw(run.folder / f"{draw.__name__}.png", args, translator or letters)
        run.result(figures)
    print(figures.get("translation", ""), format_figures(figures), sep="\n")
    print(f"{run.seconds:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, main), root=RUNS)
