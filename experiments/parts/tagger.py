"""A tagger of words that `experiments/ner.py` has trained: entities of sentences and texts, figures, pictures."""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Encoder, Trainable
from train.data.text import conll, ragged
from train.data.text.conll import Sentence, Tagged
from train.data.text.ragged import Ragged
from train.files import replacing, shown
from train.losses import token_cross_entropy
from train.metrics import classification
from train.metrics import entities as metrics
from train.plots import coloured_text
from train.plots.bars import grouped_bars
from train.plots.figures import COLOURS
from train.run import SavedRun

IGNORED = -100
"""Label of the tokens that stand for no word: all but the first of each."""
UNLIMITED = 10**9


class Tagger(NamedTuple):
    """An encoder whose classes are O, then B- and I- of each type; `longest` is the tokens that it sees at once."""

    encoder: Encoder
    types: tuple[str, ...]
    longest: int

    @property
    def tags(self) -> tuple[str, ...]:
        return tags_of(self.types)


class Window(NamedTuple):
    """The words from `first` on of sentence number `sentence`, and the token of each, -1 for a word without any."""

    sentence: int
    first: int
    places: tuple[int, ...]


def tags_of(types: Sequence[str]) -> tuple[str, ...]:
    return "O", *(f"{prefix}-{type_}" for type_ in types for prefix in "BI")


def load(run: SavedRun, device: torch.device | str = "cpu") -> Tagger:
    """The tagger of a run, at its checkpoint."""
    return Tagger(
        encoders.of_finetuned(run, device), tuple(run.config["types"]), run.config["args"]["tuning"]["longest"]
    )


# Words and tokens.


def words_of_tokens(words: Sequence[str], encoding: Any) -> list[int]:
    """The number of each token's word in a sentence, -1 for special tokens, from the characters of " ".join(words).

    A word that the tokenizer drops, such as a lone variation selector of an emoji, is no token's word.
    """
    firsts = list(accumulate((len(word) + 1 for word in words), initial=0))
    out = []
    for (first, last), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
        word = bisect_right(firsts, last - 1) - 1
        inside = not special and first < last and last - 1 < firsts[word] + len(words[word])
        out.append(word if inside else -1)
    return out


def windows(encoder: Encoder, rows: Sequence[Sequence[str]], longest: int) -> tuple[list[list[int]], list[Window]]:
    """(token ids of each window, the windows): a sentence of more tokens than `longest` is cut, between words.

    So no word is left out; of a word that is longer than a window, only the beginning is seen.
    """
    whole = encoders.encodings(encoder, [" ".join(words) for words in rows], UNLIMITED)
    pieces: list[tuple[int, int, int]] = []  # sentence, first word, last word + 1
    for i, (words, encoding) in enumerate(zip(rows, whole, strict=True)):
        sizes = Counter(words_of_tokens(words, encoding))
        room, first, used = longest - sum(encoding.special_tokens_mask), 0, 0
        for word in range(len(words)):
            if used + sizes[word] > room and used:
                pieces.append((i, first, word))
                first, used = word, 0
            used += sizes[word]
        pieces.append((i, first, len(words)))
    encodings = encoders.encodings(encoder, [" ".join(rows[i][first:last]) for i, first, last in pieces], longest)
    out = []
    for (i, first, last), encoding in zip(pieces, encodings, strict=True):
        owners = words_of_tokens(rows[i][first:last], encoding)
        places = {word: place for place, word in reversed(list(enumerate(owners)))}  # the first token of each word
        out.append(Window(i, first, tuple(places.get(word, -1) for word in range(last - first))))
    return [encoding.ids for encoding in encodings], out


def encoded(encoder: Encoder, types: Sequence[str], part: Tagged, longest: int) -> Ragged:
    """Windows of sentences, with labels (windows, time): the tag of a word at its first token, else `IGNORED`."""
    numbers = {tag: i for i, tag in enumerate(tags_of(types))}
    ids, spots = windows(encoder, [sentence.words for sentence in part.sentences], longest)
    tokens, lengths = ragged.padded(ids, encoder.cfg.padding_id)
    labels = torch.full_like(tokens, IGNORED)
    for row, (sentence, first, places) in enumerate(spots):
        for place, tag in zip(places, part.sentences[sentence].tags[first:], strict=False):
            if place >= 0:
                labels[row, place] = numbers.get(tag, IGNORED)
    return Ragged(tokens, lengths, labels)


def batch_at(data: Ragged, buckets: Sequence[ragged.Bucket], key: Tensor, step: int, batch: int) -> Ragged:
    """As `ragged.batch_at`, whose labels are one per sequence."""
    out = ragged.batch_at(data, buckets, key, step, batch)
    return out._replace(labels=out.labels[:, : out.tokens.shape[1]].contiguous())


def losses(params: tree.Tree, batch: Ragged, keys: Tensor, encoder: Encoder, own: Trainable):
    """Cross-entropy in nats per word, `WeightedLoss`."""
    mask = encoders.mask_of(batch.tokens, batch.lengths)
    logits = encoder.net.apply(own.whole(params), batch.tokens, encoder.cfg, mask=mask, key=keys, train=True)
    hits = classification.accuracy(logits.detach(), batch.labels, ignore_id=IGNORED)
    return token_cross_entropy(logits, batch.labels, ignore_id=IGNORED), {"accuracy": hits}


# Tagging.


@torch.no_grad()
def tag(model: Tagger, rows: Sequence[Sequence[str]]) -> list[list[tuple[str, float]]]:
    """(tag, probability) of each word of each sentence; a word without a token is surely O."""
    if not rows:
        return []
    encoder, tags = model.encoder, model.tags
    ids, spots = windows(encoder, rows, model.longest)
    tokens, lengths = ragged.padded(ids, encoder.cfg.padding_id)
    device = tree.leaves(encoder.params)[0].device
    out = [[("O", 1.0)] * len(words) for words in rows]
    for members, batch in ragged.evaluation_batches(tokens, lengths, 64):
        tokens_, lengths_ = tree.move(batch, device)
        logits = encoder.net.apply(encoder.params, tokens_, encoder.cfg, mask=encoders.mask_of(tokens_, lengths_))
        best = logits.float().softmax(-1).max(-1)  # each (windows, time)
        values, indices = best.values.cpu().tolist(), best.indices.cpu().tolist()
        for row, number in enumerate(members.tolist()):
            sentence, first, places = spots[number]
            for word, place in enumerate(places):
                if place >= 0:
                    out[sentence][first + word] = tags[indices[row][place]], values[row][place]
    return out


def predicted_tags(model: Tagger, part: Tagged) -> list[list[str]]:
    tagged = tag(model, [sentence.words for sentence in part.sentences])
    return [[name for name, _ in row] for row in tagged]


def recognise(model: Tagger, texts: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The entities of each text: start and end character, type, text, and the mean probability of its words' tags."""
    places = [conll.words_of(text) for text in texts]
    rows = [[text[a:b] for a, b in spots] for text, spots in zip(texts, places, strict=True)]
    out = []
    for text, spots, tagged in zip(texts, places, tag(model, rows), strict=True):
        entities = []
        for type_, first, last in conll.entities([name for name, _ in tagged]):
            start, end = spots[first][0], spots[last - 1][1]
            mean = sum(value for _, value in tagged[first:last]) / (last - first)
            entities.append({"start": start, "end": end, "type": type_, "text": text[start:end], "probability": mean})
        out.append(entities)
    return out


def print_entities(model: Tagger, lines: Iterator[str], as_json: bool) -> None:
    """The entities of each text: a line `text number, start, end, type, probability, words` each, separated by tabs, or
    a JSON object per text."""
    for number, text in enumerate(lines, 1):
        (entities,) = recognise(model, [text])
        if as_json:
            print(json.dumps({"text": text, "entities": entities}, ensure_ascii=False), flush=True)
            continue
        for e in entities:
            cells = number, e["start"], e["end"], shown(e["type"]), f"{e['probability']:.4f}", shown(e["text"])
            print(*cells, sep="\t", flush=True)


# Figures.


def memorised(train: Tagged, part: Tagged) -> list[list[str]]:
    """A baseline without a net: each word has the tag that it has most often in training, O if it is not there."""
    counts: dict[str, Counter[str]] = {}
    for sentence in train.sentences:
        for word, name in zip(*sentence, strict=True):
            counts.setdefault(word, Counter())[name] += 1
    best = {word: counter.most_common(1)[0][0] for word, counter in counts.items()}
    return [[best.get(word, "O") for word in sentence.words] for sentence in part.sentences]


def study(folder: Path, model: Tagger, part: Tagged, baseline: dict[str, Any] | None = None) -> dict[str, Any]:
    """Figures of `train.metrics.entities`; writes f1_by_type.png, entities.png, entities.html and predictions.tsv.

    Args:
        baseline: figures of another method, to stand beside the net's in the picture.
    """
    gold, predicted = [list(sentence.tags) for sentence in part.sentences], predicted_tags(model, part)
    figures = metrics.figures(gold, predicted)
    counts = Counter(entity.type for tags in gold for entity in conll.entities(tags))
    series = {"net": figures, **({"commonest tag of the word" if baseline else "": baseline} if baseline else {})}
    table = {
        name: {f"{type_} ({counts[type_]})": value["f1_by_type"].get(type_, 0.0) for type_ in sorted(counts)}
        | {f"all ({counts.total()})": value["f1"]}
        for name, value in series.items()
    }
    grouped_bars(folder / "f1_by_type.png", table, "F1 of whole entities", "F1 by type (number of entities)")
    passages = [
        passage
        for number, (sentence, tags) in enumerate(zip(part.sentences, predicted, strict=True), 1)
        if set(sentence.tags) | set(tags) != {"O"}
        for passage in [passage_of(model, sentence, tags, number)]
    ]
    coloured_text.picture(folder / "entities.png", [legend(model.types), *passages[:12]])
    coloured_text.page(
        folder / "entities.html", [legend(model.types), *passages[:200]], "Entities of the test sentences"
    )
    lines = []
    for sentence, tags in zip(part.sentences, predicted, strict=True):
        lines += ["\t".join((shown(word), *pair)) for word, *pair in zip(*sentence, tags, strict=True)] + [""]
    with replacing(folder / "predictions.tsv") as path:
        path.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
    return figures


PALETTE = [COLOURS[i] for i in (0, 1, 2, 3, 7, 4, 5, 6)]
"""Neighbours are unlike each other, also when pale."""


def colour_of(types: Sequence[str], type_: str) -> tuple[int, int, int]:
    return coloured_text.pale(PALETTE[types.index(type_) % len(PALETTE)]) if type_ in types else (0xDD, 0xDD, 0xDD)


def legend(types: Sequence[str]) -> coloured_text.Passage:
    pieces = [piece for type_ in types for piece in (f" {shown(type_)} ", "  ")]
    colours = [colour for type_ in types for colour in (colour_of(types, type_), (255, 255, 255))]
    return coloured_text.Passage("types", pieces, torch.tensor(colours, dtype=torch.uint8), [""] * len(pieces))


def passage_of(model: Tagger, sentence: Sentence, predicted: Sequence[str], number: int) -> coloured_text.Passage:
    """A sentence with its predicted entities, and below it the right ones if these are others."""
    gold, own = conll.entities(sentence.tags), conll.entities(predicted)
    lines = {"": own} if own == gold else {"predicted  ": own, "\nright      ": gold}
    pieces, colours, notes = [], [], []
    for name, entities in lines.items():
        rows = [(name, (255, 255, 255), "")]
        inside = {word: entity for entity in entities for word in range(entity.first, entity.last)}
        for word, text in enumerate(sentence.words):
            entity = inside.get(word)
            colour = colour_of(model.types, entity.type) if entity else (255, 255, 255)
            rows.append((text, colour, entity.type if entity else ""))
            joined = entity and word + 1 < entity.last
            rows.append((" ", colour if joined else (255, 255, 255), ""))
        for piece, colour, note in rows:
            pieces.append(piece)
            colours.append(colour)
            notes.append(note)
    right = len(set(own) & set(gold))
    title = f"test sentence {number}: {right} of {len(gold)} right, {len(own) - right} wrong"
    return coloured_text.Passage(title, pieces, torch.tensor(colours, dtype=torch.uint8), notes)
