"""An encoder whose sentence embeddings find what belongs together: pairs to learn from, texts in, vectors out."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random, tree
from core.tree import Tree
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Encoder, Tuning
from nets.language import bert
from train import plots
from train.data import batching
from train.data.text import ragged
from train.data.text.files import lines_of
from train.data.text.ragged import Bucket
from train.data.translation.files import Pair, sentences
from train.files import replacing, shown
from train.metrics import retrieval
from train.run import SavedRun, command_line, open_run
from train.run.flags import check_source

TOKENS = 8192
"""Tokens, padding included, that are embedded at once."""
SENTENCE = re.compile(r"(?<=[.!?;:])\s+|(?<=[。！？；])")
WORD = re.compile(r"\w+")


class Embedder(NamedTuple):
    """An encoder, and the number of tokens of a text that it sees."""

    encoder: Encoder
    longest: int


class Pairs(NamedTuple):
    """first, second: tokens (count, longest), filled up with padding; their lengths (count,); numbers (count, 2) of the
    texts, the same for the same text. All int64."""

    first: Tensor
    first_lengths: Tensor
    second: Tensor
    second_lengths: Tensor
    numbers: Tensor


# Loading.


def load(run: SavedRun, device: torch.device | str = "cpu") -> Embedder:
    """The embedder of a run, at its checkpoint."""
    return Embedder(encoders.of_finetuned(run, device), run.config["args"]["tuning"]["longest"])


def of_weights(source: str, longest: int, device: torch.device | str = "cpu") -> Embedder:
    """Published weights, or the encoder of a run of any script."""
    args = Tuning(weights=source, longest=longest)
    encoder = encoders.load(args, (), "features", key=random.key(0))
    return Embedder(encoder._replace(params=tree.move(encoder.params, device)), longest)


def opened(args: Any, root: Path) -> Embedder:
    """The embedder of --run, whose runs are in `root`, or of --weights."""
    check_source(args)
    device = command_line.device(args.device)
    if args.weights:
        return of_weights(args.weights, args.longest, device)
    return load(open_run(args.run, root, args.checkpoint), device)


# Pairs to learn from.


def cloze(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The pairs, and of each second text up to `count` sentences of four words or more, each with all the rest.

    Lee et al. 2019, the inverse cloze task (arXiv:1906.00300).
    """
    out = []
    for first, second in pairs:
        out.append((first, second))
        sentences = SENTENCE.split(second)
        long = [i for i, sentence in enumerate(sentences) if len(WORD.findall(sentence)) >= 4]
        for i in long[:count] if len(sentences) > 1 else ():
            out.append((sentences[i], " ".join([first, *sentences[:i], *sentences[i + 1 :]])))
    return out


def encoded(encoder: Encoder, pairs: Sequence[Pair], longest: int) -> Pairs:
    """The pairs as tokens, cut to `longest` each."""
    numbers: dict[str, int] = {}
    ids = [[numbers.setdefault(text, len(numbers)) for text in pair] for pair in pairs]
    sides = (encoders.tokens_of(encoder, texts, longest) for texts in zip(*pairs, strict=True))
    return Pairs(*(part for side in sides for part in side), torch.tensor(ids))


def make_buckets(data: Pairs, shapes: int, batch: int) -> list[Bucket]:
    """Pairs divided by the longer side, as `ragged.make_buckets`."""
    return ragged.make_buckets(torch.maximum(data.first_lengths, data.second_lengths), shapes, batch)


def batch_at(data: Pairs, buckets: Sequence[Bucket], key: Tensor, step: int, batch: int) -> Pairs:
    """The batch of a step, a pure function of key and step; each side as wide as its bucket's longest."""
    counts = tuple(len(bucket.members) for bucket in buckets)
    number, positions = batching.bucket_batch(key, step, counts, (batch,) * len(buckets))
    members = buckets[number].members
    widths = [int(lengths[members].max()) for lengths in (data.first_lengths, data.second_lengths)]
    rows = Pairs(*(part[members[positions]] for part in data))
    return rows._replace(first=rows.first[:, : widths[0]], second=rows.second[:, : widths[1]])


# Embeddings.


def vectors(params: Tree, tokens: Tensor, lengths: Tensor, encoder: Encoder, **options) -> Tensor:
    """Embeddings (batch, width) of norm 1; options of the net: key, train."""
    mask = encoders.mask_of(tokens, lengths)
    states = encoder.net.features(params, tokens, encoder.cfg, mask=mask, **options)  # (batch, time, width)
    return bert.sentence_embeddings(states, mask)


@torch.no_grad()
def embed(embedder: Embedder, texts: Sequence[str]) -> Tensor:
    """Embeddings (texts, width) of norm 1, on the CPU: their products are cosines."""
    encoder, longest = embedder
    tokens, lengths = encoders.tokens_of(encoder, texts, longest)
    device, out = tree.leaves(encoder.params)[0].device, torch.empty(len(texts), encoder.cfg.width)
    if not texts:
        return out
    for rows, batch in ragged.evaluation_batches(tokens, lengths, max(1, TOKENS // tokens.shape[1])):
        out[rows] = vectors(encoder.params, *tree.move(batch, device), encoder).float().cpu()
    return out


def cut(embedder: Embedder, texts: Sequence[str]) -> str:
    """A note on the texts with more tokens than the net sees, of which the rest does not count; "" if there is none."""
    count = sum(bool(e.overflowing) for e in encoders.encodings(embedder.encoder, texts, embedder.longest))
    return f"{count:,} of {len(texts):,} texts have more than {embedder.longest} tokens" if count else ""


def embed_lines(embedder: Embedder, texts: Sequence[str]) -> Tensor:
    """`embed`, with the note on cut texts on standard error."""
    if note := cut(embedder, texts):
        print(f"{note}; the rest does not count", file=sys.stderr)
    return embed(embedder, texts)


def nearest(embedder: Embedder, items: Tensor, query: str, count: int) -> list[tuple[float, int]]:
    """(cosine, number) of the items (items, width) nearest to a text, best first."""
    cosines = items @ embed(embedder, [query])[0]  # (items,)
    scores, numbers = cosines.topk(min(count, len(items)))
    return list(zip(scores.tolist(), numbers.tolist(), strict=True))


def numbered(file: Path | None) -> dict[int, str]:
    """The lines of a file by number, from 1, without empty ones. Raises ValueError: there is no file, or no line."""
    if file is None:
        raise ValueError("name the file to search in with --file")
    lines = {i: line for i, line in enumerate(sentences(file), 1) if line}
    if not lines:
        raise ValueError(f"{file} has no text to search in")
    return lines


def texts_of(texts: Sequence[str], file: Path | None) -> list[str]:
    """`lines_of` the texts, the file or standard input. Raises ValueError: there is none."""
    lines = list(lines_of(texts, file))
    if not lines:
        raise ValueError(f"{file or 'standard input'} is empty; expected a text per line")
    return lines


# Figures and pictures.


def figures(embedder: Embedder, pairs: Sequence[Pair]) -> dict[str, float]:
    """Recalls and reciprocal rank of the second texts among all, each looked for by its first."""
    firsts, seconds = zip(*pairs, strict=True)
    cosines = embed(embedder, firsts) @ embed(embedder, seconds).T  # (pairs, pairs)
    return retrieval.figures(cosines, retrieval.equal_texts(seconds, seconds))


def unshared(pair: Pair) -> Pair:
    """The pair, words of the first text that the second has too being blanked."""
    words = set(WORD.findall(pair[1].lower()))
    return WORD.sub(lambda match: "_" if match[0].lower() in words else match[0], pair[0]), pair[1]


def study(folder: Path | None, embedder: Embedder, pairs: Sequence[Pair]) -> dict[str, Any]:
    """`figures` beside those of TF-IDF and of chance, and without the words that pairs share; in the folder
    similarity.png and mistakes.txt."""
    firsts, seconds = zip(*pairs, strict=True)
    relevant = retrieval.equal_texts(seconds, seconds)
    cosines = embed(embedder, firsts) @ embed(embedder, seconds).T  # (pairs, pairs)
    words = retrieval.figures(retrieval.tfidf_similarities(firsts, seconds), relevant)
    out: dict[str, Any] = {**retrieval.figures(cosines, relevant), **{f"tfidf_{name}": x for name, x in words.items()}}
    out["chance_recall_at_1"] = float(relevant.float().mean())
    out["unshared_recall_at_1"] = figures(embedder, [unshared(pair) for pair in pairs])["recall_at_1"]
    out["pairs"] = len(pairs)
    if folder:
        some = list(range(0, len(pairs), -(-len(pairs) // 14)))
        labels = ([texts[i] for i in some] for texts in (firsts, seconds))
        draw_similarities(folder / "similarity.png", cosines[some][:, some], *labels)
        ranks = retrieval.ranks(cosines, relevant)
        others = cosines.masked_fill(relevant, -torch.inf).argmax(1).tolist()
        lines = ["rank\tfirst text\tits second text\tfound instead"]
        for i in ranks.argsort(descending=True, stable=True).tolist():
            if ranks[i] > 1:
                lines.append("\t".join(map(shown, (str(int(ranks[i])), *pairs[i], seconds[others[i]]))))
        with replacing(folder / "mistakes.txt") as path:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def draw_similarities(path: Path, cosines: Tensor, rows: Sequence[str], columns: Sequence[str]) -> None:
    """A table of cosines between texts."""
    labels = ([text if len(text) <= 32 else text[:30] + "..." for text in side] for side in (rows, columns))
    plots.matrix(path, cosines, *labels, title="cosine similarity")


def draw_map(path: Path, points: Tensor, labels: Sequence[str], method: str) -> None:
    """Embeddings (texts, width) in two dimensions by "pca" or "tsne", coloured by label."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    names = sorted(set(labels))
    if method == "pca":
        flat = PCA(2, random_state=0).fit_transform(points.numpy())
    else:
        perplexity = min(30.0, (len(points) - 1) / 3)
        flat = TSNE(2, perplexity=perplexity, metric="cosine", init="pca", random_state=0).fit_transform(points.numpy())
    title = {"pca": "principal components", "tsne": "t-SNE"}[method]
    plots.scatter(path, flat, [names.index(label) for label in labels], names, title=f"sentence embeddings, {title}")
