"""Check of influence by removal: a head learns anew without the examples that it says help most, or harm most.

The encoder is frozen, so a head learns in seconds, and it has not seen a label before.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core import random
from core.tree import Tree
from experiments.parts import influences
from experiments.parts.encoder import Encoder
from experiments.parts.influences import Read, Score
from train import optimizers, plots
from train.data import batching
from train.metrics.classification import accuracy
from train.optimizers import schedules
from train.step import create, make_step

ARMS = ("all", "without most helpful", "without random", "without most harmful")


class Recipe(NamedTuple):
    """Training of a head by AdamW; the learning rate rises for a twentieth of the steps, then falls to 0."""

    epochs: float
    batch: int
    learning_rate: float


def train_head(encoder: Encoder, data: Read, rows: Tensor, recipe: Recipe, key: Tensor) -> Tree:
    """A head that learns the examples `rows` of the data."""
    loss = influences.head_loss(encoder)
    create_key, order_key = random.split(key).unbind(0)
    size = min(recipe.batch, len(rows))
    steps = max(1, round(recipe.epochs * len(rows) / size))
    rate = schedules.warmup_cosine(recipe.learning_rate, steps // 20, steps)
    optimizer = optimizers.adamw(rate, weight_decay=0.01)
    state = create(create_key, influences.head_of(encoder, encoder.net.spec(encoder.cfg)), optimizer)
    step = make_step(lambda head, batch, keys: loss(head, batch), optimizer, compile=False, donate=True)
    for t in range(steps):
        batch = rows[batching.epoch_batch(order_key, t, len(rows), size)]
        state, _ = step(state, Read(data.states[batch], data.labels[batch]))
    return state.params


@torch.no_grad()
def accuracy_of(encoder: Encoder, head: Tree, data: Read) -> float:
    return float(accuracy(encoder.net.outputs(head, data.states[:, None], encoder.cfg), data.labels))


def removals(
    encoder: Encoder, parts: dict[str, Read], fraction: float, recipe: Recipe, score: Score, damping: float, key: Tensor
) -> dict[str, dict[str, float]]:
    """{arm: {part: accuracy}} of one seed, for the parts "validation" and "test".

    What helps is judged by the mean loss of the validation part; the test part has no say in it.
    """
    train, validation = parts["train"], parts["validation"]
    fit_key, random_key = random.split(key).unbind(0)
    everything = torch.arange(len(train.labels))
    count = max(1, round(fraction * len(everything)))
    head = train_head(encoder, train, everything, recipe, fit_key)
    order = influences.head_support(encoder, head, train, validation, score, damping).argsort(stable=True)
    shuffled = random.permutation(random_key, len(everything))
    rows = dict(zip(ARMS[1:], (order[:-count], shuffled[count:], order[count:]), strict=True))
    heads = {ARMS[0]: head}
    heads |= {arm: train_head(encoder, train, left.sort().values, recipe, fit_key) for arm, left in rows.items()}
    names = ("validation", "test")
    return {arm: {name: accuracy_of(encoder, own, parts[name]) for name in names} for arm, own in heads.items()}


def summary(seeds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """{part: {arm: change of the accuracy against all examples, one per seed}}; of "all" the accuracies themselves."""
    out: dict[str, dict[str, list[float]]] = {}
    for part in ("validation", "test"):
        out[part] = {ARMS[0]: [seed[ARMS[0]][part] for seed in seeds]}
        out[part] |= {arm: [seed[arm][part] - seed[ARMS[0]][part] for seed in seeds] for arm in ARMS[1:]}
    return out


def table(changes: dict[str, dict[str, list[float]]], fraction: float) -> str:
    """Mean and standard deviation over the seeds, in points."""
    lines = [f"{f'accuracy, {fraction:.0%} removed':<28}{'validation':>18}{'test':>18}"]
    for arm in ARMS:
        cells = [100 * np.array(changes[part][arm]) for part in ("validation", "test")]
        form = "{:.2f} ± {:.2f}" if arm == ARMS[0] else "{:+.2f} ± {:.2f}"
        lines.append(f"{arm:<28}" + "".join(f"{form.format(x.mean(), x.std(ddof=1)):>18}" for x in cells))
    return "\n".join(lines)


def draw(path, changes: dict[str, dict[str, list[float]]], fraction: float) -> None:
    """The change of accuracy of each seed, by arm."""
    with plots.panels(path, 1, 2, 4.6, 3.4) as panels:
        for axes, part in zip(panels, ("validation", "test"), strict=True):
            for i, (arm, colour) in enumerate(zip(ARMS[1:], plots.COLOURS, strict=False)):
                values = 100 * np.array(changes[part][arm])
                spread = np.linspace(-0.15, 0.15, len(values))
                axes.plot(i + spread, values, "o", color=colour, ms=5)
                axes.plot([i - 0.3, i + 0.3], [values.mean()] * 2, color=colour, lw=2)
            axes.axhline(0, color=plots.INK, lw=1, ls=":")
            axes.set_xticks(range(3), [arm.replace("without ", "") for arm in ARMS[1:]])
            title = f"{part.capitalize()}: {fraction:.0%} of the training examples removed"
            plots.curves(axes, {}, "", "change of accuracy (points)", title)
