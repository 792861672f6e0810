"""A translator that `experiments/translate.py` has trained, to be used: sentences in, translations out, and pictures of
where its attention looks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from core import random, tree
from nets.language import transformer
from nets.language.beam_search import beam_search
from nets.language.decoding import Decoded, greedy, sample
from train import plots
from train.data.text import tokenizers
from train.data.text.tokenizers import BOS, EOS, PAD, SentenceTokenizer
from train.data.translation import buckets, corpus
from train.run import checkpoints, command_line
from train.run import run as runs

DECODED = 4000  # tokens of sentences that are translated at once
LONGER = 50  # a translation has at most so many tokens more than its source (section 6.1 of the paper)


class Translator(NamedTuple):
    params: tree.Tree
    cfg: transformer.Config
    tokenizer: SentenceTokenizer


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """How translations are found; flags of whatever translates."""

    beam: int = 4
    """Beams of the search; 1 takes the most likely token at each place."""
    length_penalty: float = 0.6
    """Alpha: log-probabilities are divided by the length to this power."""
    temperature: float | None = None
    """Draw each token at this temperature instead of searching."""
    top_k: int | None = None
    """... from the k most likely tokens."""
    top_p: float | None = None
    """... from the fewest tokens of this probability."""
    seed: int = 0
    """Seed of the draws."""

    def check(self) -> None:
        command_line.at_least_one(beam=self.beam)
        if self.temperature is None and (self.top_k is not None or self.top_p is not None):
            raise ValueError("--top-k and --top-p are for drawing tokens; give --temperature too")
        if self.temperature is not None:
            command_line.positive(temperature=self.temperature)


GREEDY = Decoder(beam=1)


def averaged(folder: Path, model: tree.Tree, count: int) -> tree.Tree:
    """The mean of the parameters of the last checkpoints of a run (section 6.1 of the paper)."""
    saved = folder / "checkpoints"
    parts = [checkpoints.restore(saved, model, step, part="params") for step in checkpoints.steps(saved)[-count:]]
    return tree.map(lambda *leaves: torch.stack(leaves).mean(0), *parts)


def load(folder: Path, device: str, average: int) -> Translator:
    """What a run has learned, averaged over its last checkpoints.

    Raises ValueError: there is no checkpoint or no tokenizer, it is of another experiment, or damaged.
    """
    cfg, tokenizer = runs.read_config(folder, "net", transformer.Config), tokenizers.load(folder / "tokenizer.json")
    params = averaged(folder, transformer.spec(cfg), average)
    return Translator(tree.move(params, command_line.device(device)), cfg, tokenizer)


@torch.no_grad()
def decode(
    params: tree.Tree,
    cfg: transformer.Config,
    source: Tensor,
    decoder: Decoder,
    n_best: int = 1,
    keys: Tensor | None = None,
) -> Decoded:
    """Translations of source (batch, time), padded: n_best of each, (batch, n_best, tokens).

    Args:
        keys: (batch, 2), for drawing.
    """
    mask = source != cfg.padding_id
    memory = transformer.encode(params, source, cfg, mask=mask)
    most = min(cfg.context, source.shape[1] + LONGER)
    cache = transformer.start(params, memory, mask, cfg, min(16, most))
    first = torch.full((len(source),), BOS, device=source.device)
    step = transformer.stepper(params, cfg, partial(transformer.step, donate=True))
    options = {"max_length": most, "end": EOS, "padding": PAD, "shared": cache["shared"], "positions_axis": 2}
    if decoder.temperature is None and decoder.beam > 1:
        options |= {"beams": decoder.beam, "n_best": n_best, "length_penalty": decoder.length_penalty}
        return beam_search(step, cache["past"], first, **options)
    if decoder.temperature is None:
        found = greedy(step, cache["past"], first, **options)
    else:
        options |= {"temperature": decoder.temperature, "top_k": decoder.top_k, "top_p": decoder.top_p}
        found = sample(step, cache["past"], first, keys, **options)
    return Decoded(*(part[:, None] for part in found))


def translations(
    translator: Translator, sentences: Sequence[str], decoder: Decoder = GREEDY, n_best: int = 1
) -> list[list[tuple[str, float]]]:
    """The best translations of each sentence with their scores, best first; that of nothing is nothing.

    With a temperature they are n_best draws, sentence i drawn with the key `fold_in(fold_in(seed, draw), i)`.
    """
    params, cfg, tokenizer = translator
    device = tree.leaves(params)[0].device
    pairs = corpus.of_sentences(sentences, tokenizer, cfg.context)
    found: list[list[tuple[str, float]]] = [[] for _ in sentences]
    draws = 1 if decoder.temperature is None else n_best
    for indices, source, _ in buckets.evaluation_batches(pairs, DECODED, cfg.context):
        for draw in range(draws):
            key = random.fold_in(random.key(decoder.seed), draw)
            keys = random.fold_in(key, indices).to(device)
            decoded = decode(params, cfg, source.to(device), decoder, n_best, keys)
            for i, texts, scores in zip(
                indices.tolist(), decoded.tokens.tolist(), decoded.scores.tolist(), strict=True
            ):
                found[i] += [(tokenizer.decode(ids), s) for ids, s in zip(texts, scores, strict=True) if s > -math.inf]
    return [best if sentence.strip() else [("", 0.0)] for sentence, best in zip(sentences, found, strict=True)]


def maps(translator: Translator, sentence: str, translation: str) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """(`transformer.attention_maps` of one pair, its source tokens, its target tokens), each with the end token."""
    params, cfg, tokenizer = translator
    source, target = [*tokenizer.encode(sentence), EOS], tokenizer.encode(translation)
    x = torch.tensor([source]), torch.tensor([[BOS, *target]])
    found = transformer.attention_maps(tree.move(params, "cpu"), x, cfg)
    return found, tokenizer.tokens(source), tokenizer.tokens([*target, EOS])


def draw_attention(folder: Path, translator: Translator, sentence: str, translation: str) -> None:
    """`encoder.png`, `decoder.png` and `cross.png`: a row a layer, a column a head."""
    found, read, written = maps(translator, sentence, translation)
    layers, heads = translator.cfg.layers, translator.cfg.heads
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, columns in (
        ("encoder", read, read),
        ("decoder", written, ["<bos>", *written[:-1]]),
        ("cross", written, read),
    ):
        size = {"width": 1.6 + 0.17 * len(columns), "height": 1.6 + 0.17 * len(rows)}
        with plots.panels(folder / f"{name}.png", layers, heads, **size) as axes:
            for i, panel in enumerate(axes):
                layer, head = divmod(i, heads)
                title = f"layer {layer + 1}, head {head + 1}"
                plots.matrix(panel, found[name][0, layer, head], rows, columns, title=title, numbers=False)
