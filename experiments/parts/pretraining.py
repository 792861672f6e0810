"""Objectives of `experiments/pretrain.py` and their figures; masked tokens. The others have modules of their own."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random, tree
from core import spec as specs
from core.tree import Tree
from experiments.parts import encoder as encoders
from experiments.parts import filling
from experiments.parts.encoder import Encoder
from experiments.parts.examples import Examples, keyed, make_lines, open_windows, read_lines
from nets import weights
from nets.language import bert
from train import plots
from train.data.fingerprint import fingerprint
from train.data.text import masking, text, tokenizers
from train.data.text.masking import Marks, Masked
from train.data.text.subwords import train_word_piece
from train.losses import WeightedLoss, cross_entropy
from train.run import checkpoints, open_run
from train.run.logs import read_curves

RUNS = Path("runs/pretrain")
CACHE = RUNS / "tokens"
LAYERS = 4
GROUPS = 10
"""Points of the loss by position, about."""
MOST = 300
"""Batches of held-out text that are evaluated at the end."""
EVALUATION = random.key(0)
"""Key of the masks of evaluations, the same in all runs."""


class Scores(NamedTuple):
    """Predictions of a batch, each (batch, predicted tokens): cross-entropy in nats, whether the likeliest token is
    right, the position in the example, and False where nothing was predicted."""

    nats: Tensor
    hits: Tensor
    positions: Tensor
    counted: Tensor


class Objective(NamedTuple):
    """Data and objective of a run.

    Attributes:
        facts: what was understood.
        stored: entries of the run's configuration.
        identity: what a resumed run must share.
        corrupt: (keys (batch, 2), batch of the examples) -> batch of the loss.
        model, values: spec of what is trained, and its initial values; None: those of the spec.
        loss: as `train.step.make_step` takes it.
        score: (params, batch) -> `Scores`; None: nothing is predicted.
        compare: (params, batch) -> sums and numbers of further figures, {name: (sum, number)}.
        baselines: (the objective) -> figures without a net, or without training.
        net: the trained net, merged: (params) -> an Encoder or Writer.
    """

    facts: dict[str, Any]
    stored: dict[str, Any]
    identity: dict[str, Any]
    tokenizer: Any
    examples: Examples
    corrupt: Callable[[Tensor, Any], Tree]
    model: Tree
    values: Tree | None
    loss: Callable
    score: Callable[[Tree, Tree], Scores] | None
    compare: Callable[[Tree, Tree], dict[str, tuple[Tensor, Tensor]]]
    net: Callable[[Tree], Any]
    baselines: Callable[[Any], dict[str, float]]

    def batches(self, key: Tensor, steps: range, batch: int) -> Iterator[Tree]:
        """The batch of each step, a function of key and step."""
        order_key, mask_key = random.split(key).unbind(0)
        return keyed(mask_key, steps, self.examples.batches(order_key, steps, batch), self.corrupt)

    def held_out_batches(self, most: int = MOST, draw: int = 0) -> Iterator[Tree]:
        """Held-out batches, up to about `most` of them at equal distances; corrupted anew for each `draw`."""
        count = self.examples.held_out_count
        numbers = range(0, count, max(1, count // most))
        batches = itertools.islice(self.examples.held_out_batches(), 0, None, numbers.step)
        return keyed(random.fold_in(EVALUATION, draw), numbers, batches, self.corrupt)


def heads_of(args: Any) -> int:
    """Attention heads, of 32 numbers each. Raises ValueError: a width that does not divide into them."""
    if args.width % 32:
        raise ValueError(f"--width is {args.width}; expected a multiple of 32")
    return args.width // 32


def nothing(params: Tree, batch: Tree) -> dict:
    """No further figures."""
    return {}


def total_of(scores: Scores) -> tuple[Tensor, Tensor]:
    """(values, weights) per example, of a `WeightedLoss`."""
    counted = scores.counted.to(scores.nats.dtype)
    return (scores.nats * counted).sum(1), counted.sum(1)  # each (batch,)


def share_right(scores: Scores) -> Tensor:
    return (scores.hits & scores.counted).sum() / scores.counted.sum().clamp(min=1)


@torch.no_grad()
def measure(
    objective: Objective, params: Tree, *, most: int = MOST, draws: int = 1
) -> tuple[dict[str, float], list[float]]:
    """(figures, nats by position) on held-out examples."""
    device, sums, further = tree.leaves(params)[0].device, torch.zeros(3, 1, dtype=torch.float64), {}
    for draw in range(draws):
        for batch in objective.held_out_batches(most, draw):
            batch = tree.move(batch, device)
            for name, pair in objective.compare(params, batch).items():
                further[name] = further.get(name, 0) + torch.stack(pair).double().cpu()
            if objective.score is None:
                continue
            scores = tree.move(objective.score(params, batch), "cpu")
            positions, size = scores.positions[scores.counted], int(scores.positions.max()) + 1
            if size > sums.shape[1]:
                sums = torch.nn.functional.pad(sums, (0, size - sums.shape[1]))
            for row, values in zip(sums, (scores.nats, scores.hits, torch.ones_like(scores.nats)), strict=True):
                row.index_add_(0, positions, values[scores.counted].double())
    figures = {name: float(total / number) for name, (total, number) in further.items()}
    if objective.score is None:
        return figures, []
    nats, hits, count = sums.sum(1).tolist()
    return {"val_loss": nats / max(count, 1), "accuracy": hits / max(count, 1), **figures}, (sums[0] / sums[2]).tolist()


def token_baselines(objective: "Objective") -> dict[str, float]:
    """Figures without a net: by the frequencies of the training part's tokens, and by its commonest one."""
    parts = objective.examples.train, objective.examples.held_out
    size = objective.tokenizer.vocabulary_size
    share = text.commonest_share(*parts)
    return {"unigram_entropy": text.unigram_entropy(*parts, size), "commonest_token_accuracy": share}


# What a run leaves.


def study(folder: Path, task: Objective, params: Tree, objective: str) -> dict[str, float]:
    """Final figures; the pictures that the net's kind has."""
    figures, by_position = measure(task, params, draws=3 if objective == "masked" else 1)
    net = task.net(params)
    batch = next(task.held_out_batches(1))
    if by_position:
        size = max(1, len(by_position) // GROUPS)
        groups = [by_position[i : i + size] for i in range(0, len(by_position), size)]
        groups = [[value for value in group if math.isfinite(value)] for group in groups]
        means = [(i * size + (size - 1) / 2, sum(g) / len(g)) for i, g in enumerate(groups) if g]
        lines = {objective: tuple(zip(*means, strict=True))}
        title = "Held-out cross-entropy by position"
        plots.curves(folder / "loss_by_position.png", lines, "position in the example", "nats per token", title)
        if objective != "causal":
            filling.draw_filled(folder, filling.passages(net, batch))
    if isinstance(net, Encoder):
        tokens = batch[0][0]
        filling.draw_attention(folder / "attention.png", net, tokens[tokens != net.cfg.padding_id][:16])
    return figures


def draw_curves(folder: Path, objective: str, figures: dict[str, float]) -> None:
    """loss.png: of tokens beside the unigram entropy; of distil, the losses or cosines."""
    names = ("train/loss", "validation/val_loss")
    if objective == "distil":
        names = ("train/soft", "train/masked", "train/hidden", "train/embedding", "validation/cosine")
    lines = {name: line for name, line in read_curves(folder, *names).items() if line[0]}
    if "unigram_entropy" in figures:
        steps = [step for xs, _ in lines.values() for step in xs]
        ends = [min(steps, default=0), max(steps, default=1)]
        lines["unigram entropy"] = (ends, [figures["unigram_entropy"]] * 2)
    plots.curves(
        folder / "loss.png", lines, ylabel="loss" if objective == "distil" else "nats per token", title=objective
    )


def summary(objective: str, figures: dict[str, float]) -> str:
    """The figures beside those without a net."""
    parts = []
    if "val_loss" in figures:
        parts.append("{val_loss:.4f} nats per predicted token, {accuracy:.2%} right (unigram entropy: "
                     "{unigram_entropy:.4f}, commonest token: {commonest_token_accuracy:.2%})")  # fmt: skip
    if objective == "causal":
        parts.append(f"perplexity {math.exp(figures['val_loss']):.4g}")
    if "teacher_val_loss" in figures:
        parts.append("its teacher {teacher_val_loss:.4f} nats, before training {untrained_val_loss:.4f}")
    if "cosine" in figures:
        parts.append("cosine to the teacher's hidden states {cosine:.4f} (before training: {untrained_cosine:.4f})")
    if "embedding_cosine" in figures:
        parts.append("to its sentence embeddings {embedding_cosine:.4f} (before training: "
                     "{untrained_embedding_cosine:.4f}, the mean embedding: {mean_embedding_cosine:.4f})")  # fmt: skip
    return "; ".join(parts).format(**figures)


# Masked tokens.


def is_run(source: str) -> bool:
    return (Path(source) / "checkpoints").is_dir()


def open_encoder(source: str, key: Tensor | None = None) -> tuple[Encoder, bool]:
    """(an encoder with a head for masked tokens, whether the run or the weights have that head).

    Args:
        key: draws the head where there is none; None: then the head is "features".
    """
    if is_run(source):
        experiment = checkpoints.read_config(Path(source) / "checkpoints").get("experiment", RUNS.name)
        whole = encoders.of_finetuned(open_run(Path(source), RUNS.with_name(experiment)))
        if whole.cfg.head == "masked_tokens":
            return whole, True
        if key is None:
            return encoders.of_run(Path(source), "features", key=EVALUATION), False
        return encoders.of_run(Path(source), "masked_tokens", key=key), False
    try:
        return encoders.of_weights(source, "masked_tokens", key=None), True
    except weights.WeightsError:
        return encoders.of_weights(source, "masked_tokens" if key is not None else "features", key=key), False


def scratch(args: Any, tokenizer: Any, key: Tensor) -> Encoder:
    """A BERT of the flags' size."""
    sizes = {"layers": args.layers or LAYERS, "width": args.width, "heads": heads_of(args), "hidden": 4 * args.width}
    # A fine-tuned net may read somewhat longer texts.
    cfg = bert.Config(tokenizer.vocabulary_size, max(args.context, 128), **sizes, head="masked_tokens")
    return Encoder("bert", specs.init(key, bert.spec(cfg)), cfg, tokenizer)


def with_dropout(encoder: Encoder, rate: float) -> Encoder:
    return encoder._replace(cfg=dataclasses.replace(encoder.cfg, dropout=rate, attention_dropout=rate))


def encoder_and_examples(
    args: Any, folder: Path | None, make: Callable[[Any], Encoder], tokenizer: Any = None, *, split: bool = True
) -> tuple[Encoder, Examples, dict[str, Any]]:
    """(encoder, examples, facts) of the flags.

    Args:
        folder: of the run that is resumed, whose tokenizer is kept.
        make: from a tokenizer to the encoder.
        tokenizer: that of the encoder; None: that of --tokenizer, or one that is learned from the texts.
    """
    if args.context < 3:
        raise ValueError(f"--context is {args.context}; expected at least 3, room for [CLS] and [SEP]")
    if folder or (tokenizer is None and args.tokenizer):
        tokenizer = tokenizers.load(folder / "tokenizer.json" if folder else args.tokenizer, lossy=True)
    encoder = make(tokenizer) if tokenizer else None
    if encoder and args.context > encoder.cfg.context:
        raise ValueError(f"--context is {args.context}; expected up to the {encoder.cfg.context} of the net")
    learn = functools.partial(train_word_piece, vocabulary_size=args.vocabulary, lower_case=not args.cased)
    if args.lines:
        lines, facts = read_lines(args.data, CACHE)
        encoder = encoder or make(learn(lines))
        marks = masking.marks_of(encoder.tokenizer)
        examples = make_lines(lines, encoder, args.context, args.batch if split else 0)
        plain = [part[~torch.isin(part, marks.special)] for part in examples[:2]]
        examples = examples._replace(train=plain[0], held_out=plain[1])
        facts |= {"vocabulary": encoder.tokenizer.vocabulary_size}
        facts |= {"held-out lines": len(examples.held_out_rows.lengths)} if split else {}
        return encoder, examples, facts
    windows, tokenizer, facts = open_windows(args.data, tokenizer or learn, args.context - 2, CACHE, split=split)
    return encoder or make(tokenizer), windows, facts


def log_frequencies(tokens: Any, vocabulary: int) -> Tensor:
    """(vocabulary,): with these as the biases of the output, a net begins at the unigram entropy."""
    counts = text.token_counts(tokens, vocabulary).float() + 1
    return (counts / counts.sum()).log()


def tokens_of(batch: Any, marks: Marks, lines: bool) -> Tensor:
    """(batch, time) with [CLS] and [SEP], which lines have already."""
    return batch[0] if lines else masking.surrounded(batch[0], marks)


def mask_of(encoder: Encoder, tokens: Tensor) -> Tensor:
    return tokens != encoder.cfg.padding_id


def at(x: Tensor, positions: Tensor) -> Tensor:
    """x (batch, time, width) at positions (batch, most): (batch, most, width)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def scores_of(logits: Tensor, batch: Masked) -> Scores:
    """Scores of logits (batch, most, vocabulary) at the positions of the batch."""
    nats = cross_entropy(logits, batch.targets, reduction="none")
    return Scores(nats, logits.detach().argmax(-1) == batch.targets, batch.positions, batch.counted)


def predict_masked(encoder: Encoder, params: Tree, batch: Masked, **options: Any) -> Scores:
    """Logits are computed at the masked positions alone."""
    mask = mask_of(encoder, batch.tokens)
    x = encoder.net.features(params, batch.tokens, encoder.cfg, mask=mask, **options)  # (batch, time, width)
    return scores_of(encoder.net.token_logits(params, at(x, batch.positions), encoder.cfg), batch)


def masked(args: Any, folder: Path | None, key: Tensor, *, split: bool = True) -> Objective:
    """BERT's masked tokens, from scratch or from an encoder; adapters and the head alone with --lora."""
    if args.tokenizer and args.weights:
        raise ValueError("--tokenizer is for a net from scratch; --weights have their own")
    net_key, head_key, lora_key = random.split(key, 3).unbind(0)
    source, has_head = open_encoder(args.weights, head_key) if args.weights else (None, True)
    make = functools.partial(scratch, args, key=net_key) if source is None else lambda tokenizer: source
    known = None if source is None else source.tokenizer
    encoder, examples, facts = encoder_and_examples(args, folder, make, known, split=split)
    encoder, marks = with_dropout(encoder, args.dropout), masking.marks_of(encoder.tokenizer)
    if source is None:
        encoder.params["masked_tokens"]["bias"] = log_frequencies(examples.train, encoder.cfg.vocabulary)
    own = encoders.trainable(encoder, args, lora_key)
    facts |= {"masked": f"{args.mask_rate:.0%} of the tokens: 80 % [MASK], 10 % random, 10 % as they are"}
    facts |= {"weights": args.weights, "head": None if has_head else "drawn anew: the weights have none"}

    def corrupt(keys: Tensor, batch: Any) -> Masked:
        return masking.mask_tokens(keys, tokens_of(batch, marks, args.lines), marks, args.mask_rate)

    def loss(params: Tree, batch: Masked, keys: Tensor):
        scores = predict_masked(encoder, own.whole(params), batch, key=keys, train=True)
        return WeightedLoss(*total_of(scores)), {"accuracy": share_right(scores)}

    return Objective(
        facts={**facts, "net": encoder.cfg},
        stored=encoders.stored(encoder),
        identity={"data": fingerprint(*examples[:2]), "net": encoder.cfg, **encoders.identity(encoder, args)},
        tokenizer=encoder.tokenizer,
        examples=examples,
        corrupt=corrupt,
        model=own.model,
        values=own.values,
        loss=loss,
        score=lambda params, batch: predict_masked(encoder, own.whole(params), batch),
        compare=nothing,
        net=lambda params: encoder._replace(params=own.merged(params)),
        baselines=token_baselines,
    )
