"""Metrics of retrieval: the ranks of items that fit a query among all, by similarity; TF-IDF to compare with."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WORD = r"[^\W\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]"
"""A word, or one character of a script without spaces between words."""


def ranks(similarities: Tensor, relevant: Tensor) -> Tensor:
    """The rank of each query's best relevant item among the others, from 1: (queries, items) both -> (queries,).

    Of equal similarities the relevant one comes last, so that embeddings that are all the same find nothing.

    Args:
        relevant: boolean, True where the item fits the query; at least once per query.
    """
    if similarities.shape != relevant.shape or similarities.ndim != 2 or not bool(relevant.any(1).all()):
        shapes = f"{tuple(similarities.shape)} and {tuple(relevant.shape)}"
        raise ValueError(f"ranks: expected two tables (queries, items) with an item for each query, found {shapes}")
    best = torch.where(relevant, similarities, -torch.inf).amax(1, keepdim=True)  # (queries, 1)
    return 1 + ((similarities >= best) & ~relevant).sum(1)


def figures(similarities: Tensor, relevant: Tensor, at: Sequence[int] = (1, 5)) -> dict[str, float]:
    """recall_at_1, recall_at_5: fractions of queries with a relevant item that high; mean_reciprocal_rank."""
    places = ranks(similarities, relevant)
    values = {f"recall_at_{k}": (places <= k).float().mean() for k in at}
    values["mean_reciprocal_rank"] = (1 / places.float()).mean()
    return {name: float(value) for name, value in values.items()}


def chance(relevant: Tensor, at: Sequence[int] = (1, 5)) -> dict[str, float]:
    """The recalls of a random order: 1 - (n - r over k) / (n over k), for r relevant items of n."""
    items, counts, out = relevant.shape[1], relevant.sum(1).double(), {}
    for k in at:
        misses = [((items - counts - i) / (items - i)).clamp(min=0) for i in range(min(k, items))]
        out[f"recall_at_{k}"] = float(1 - torch.stack(misses).prod(0).mean())
    return out


def equal_texts(targets: Sequence[str], items: Sequence[str]) -> Tensor:
    """`relevant` of queries that look for a text: (targets, items), True where both are the same."""
    numbers: dict[str, int] = {}
    a, b = ([numbers.setdefault(text, len(numbers)) for text in texts] for texts in (targets, items))
    return torch.tensor(a)[:, None] == torch.tensor(b)


def tfidf_similarities(queries: Sequence[str], items: Sequence[str]) -> Tensor:
    """Cosines of TF-IDF vectors, the frequencies of words being those of the items: (queries, items).

    Spärck Jones 1972; with scikit-learn's smoothed idf and 1 + log of the counts. 0 where no word is shared.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=WORD)
    try:
        vectors = vectorizer.fit_transform(items)
    except ValueError:  # not one word in all items
        return torch.zeros(len(queries), len(items))
    return torch.from_numpy((vectorizer.transform(queries) @ vectors.T).toarray().astype(np.float32))


def nearest_by_letters(queries: Sequence[str], items: Sequence[str]) -> list[int]:
    """The number of the item nearest to each query, by the cosine of TF-IDF vectors of 2 to 4 letters in a row."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    neighbours = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectorizer.fit_transform(items))
    return neighbours.kneighbors(vectorizer.transform(queries), return_distance=False)[:, 0].tolist()
