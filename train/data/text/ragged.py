"""Sequences of tokens of different lengths, a label each: batches in a few fixed shapes, for a compiled step."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from train.data import DataError, batching
from train.data.text.labelled import Records
from train.data.text.tokenizers import SentenceTokenizer, train_sentences


class Ragged(NamedTuple):
    """tokens (count, longest), filled up with 0; lengths (count,); labels (count,); all int64."""

    tokens: Tensor
    lengths: Tensor
    labels: Tensor


class Bucket(NamedTuple):
    """Sequences of similar length: their largest length, and their numbers (count,), ascending in length."""

    width: int
    members: Tensor


SPACE = "▁"
"""Token of the white space between characters, as in SentencePiece."""


def spaced(text: str, kind: str) -> str:
    """The text as the tokenizer of this kind takes it: each character a word, white space left out ("characters") or a
    word, too ("characters-and-spaces"); else the text itself."""
    if kind == "characters-and-spaces":
        text, kind = SPACE.join(text.split()), "characters"
    return " ".join(c for c in text if not c.isspace()) if kind == "characters" else text


def learn_tokenizer(texts: Sequence[str], vocabulary: int, kind: str, min_count: int = 1) -> SentenceTokenizer:
    """A tokenizer of the most frequent words, characters or byte pairs ("words", "characters", "characters-and-spaces",
    "bpe").

    Where no text has a capital, as in SST-2, it makes all texts lower-case: else their words would be unknown.

    Args:
        min_count: occurrences of a word or character, at least. With rarer ones <unk> occurs in training too.

    Raises DataError: no room for the special tokens.
    """
    words = {"words": kind != "bpe", "min_count": min_count}
    tokenizer = train_sentences((spaced(text, kind) for text in texts), vocabulary, **words)
    if is_lower(texts):
        from tokenizers.normalizers import Lowercase

        tokenizer.tokenizer.normalizer = Lowercase()
    return tokenizer


def is_lower(texts: Sequence[str]) -> bool:
    """True if there are letters with a case and none is a capital."""
    return any(text != text.upper() for text in texts) and all(text == text.lower() for text in texts)


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as a table (rows, longest) and their lengths (rows,), both int64."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = max([1, *lengths.tolist()])
    table = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)
    return table.reshape(len(rows), width), lengths


def encode(texts: Sequence[str], tokenizer: SentenceTokenizer, kind: str, longest: int) -> tuple[Tensor, Tensor]:
    """tokens (count, longest of the texts) and lengths (count,); of a longer text only its first `longest` tokens."""
    rows = [ids[:longest] for ids in tokenizer.encode_batch([spaced(text, kind) for text in texts])]
    return padded(rows)


def encoded(records: Records, classes: Sequence[str], tokenizer: SentenceTokenizer, kind: str, longest: int) -> Ragged:
    """Labelled texts as ids, up to `longest` each, and the numbers of their classes."""
    numbers = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([numbers[name] for name in records.labels], dtype=torch.int64)
    return Ragged(*encode(records.texts, tokenizer, kind, longest), labels)


def make_buckets(lengths: Tensor, shapes: int, batch: int) -> list[Bucket]:
    """Sequences divided by length into up to `shapes` equal parts, each large enough for a batch.

    Raises DataError: there are fewer sequences than a batch has.
    """
    if len(lengths) < batch:
        raise DataError(f"a batch of {batch} is more than the {len(lengths)} sequences to learn from")
    order = lengths.argsort(stable=True)
    parts = order.tensor_split(min(shapes, len(lengths) // batch))
    return [Bucket(max(1, int(lengths[part].max())), part) for part in parts]


def steps_per_epoch(buckets: Sequence[Bucket], batch: int) -> int:
    """Number of full batches in the buckets."""
    return sum(len(bucket.members) // batch for bucket in buckets)


def batch_at(data: Ragged, buckets: Sequence[Bucket], key: Tensor, step: int, batch: int) -> Ragged:
    """The batch of a step, a pure function of key and step: tokens (batch, width of its bucket), lengths, labels.

    Every epoch goes through the batches of all buckets in an order of its own, and through the sequences of a bucket in
    an order of its own; the sequences that fill no batch are left out of that epoch.
    """
    counts = tuple(len(bucket.members) for bucket in buckets)
    number, positions = batching.bucket_batch(key, step, counts, (batch,) * len(buckets))
    bucket = buckets[number]
    rows = bucket.members[positions]
    return Ragged(data.tokens[rows, : bucket.width], data.lengths[rows], data.labels[rows])


def evaluation_batches(
    tokens: Tensor, lengths: Tensor, batch: int = 256
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """(their numbers, (tokens, lengths)) of all sequences, short ones first, each batch as wide as its longest."""
    order = lengths.argsort(stable=True)
    for rows in order.split(batch):
        yield rows, (tokens[rows, : max(1, int(lengths[rows].max()))], lengths[rows])


def baselines(train: Ragged, test: Ragged, vocabulary: int) -> dict[str, float]:
    """Test accuracies without a net: of always the commonest class, and of logistic regression (with scikit-learn's own
    penalty) on the numbers of each token, without their order."""
    from sklearn.linear_model import LogisticRegression

    regression = LogisticRegression(max_iter=2000).fit(_bag_of_words(train, vocabulary), train.labels.numpy())
    bags, labels = _bag_of_words(test, vocabulary), test.labels
    return {
        "commonest_class_accuracy": float((labels == train.labels.mode().values).float().mean()),
        "bag_of_words_accuracy": float(regression.score(bags, labels.numpy())),
    }


def _bag_of_words(data: Ragged, vocabulary: int):
    """Counts (sequences, vocabulary), a sparse matrix of scipy."""
    from scipy.sparse import csr_matrix

    live = torch.arange(data.tokens.shape[1]) < data.lengths[:, None]  # (sequences, time)
    rows = live.nonzero()[:, 0].numpy()
    ids = data.tokens[live].numpy()
    return csr_matrix(([1.0] * len(ids), (rows, ids)), shape=(len(data.labels), vocabulary))
