"""fastText: a linear classifier on the mean of the vectors of a text's tokens and of their n-grams.

    v_i = tokens[id_i];   u_j = ngrams[hash(n-gram_j)];   logits = W mean(v, u) + b

Joulin et al. 2017, "Bag of Tricks for Efficient Text Classification" (arXiv:1607.01759). n-grams whose hashes agree
share a vector (Weinberger et al. 2009, arXiv:0902.2206); the beginning and the end of a text are tokens of n-grams. In
training, dropout leaves out whole tokens and n-grams (Iyyer et al. 2015, "Deep Unordered Composition Rivals Syntactic
Methods for Text Classification").
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers
from core.layers import dropout, embedding, embedding_spec, linear, linear_spec
from core.layers.recurrent import check_sequences

PRIME = 2**31 - 1
MULTIPLIER = 742_938_285
"""A primitive root modulo PRIME (Fishman and Moore 1986); its product with a remainder is below 2**63."""


@dataclass(frozen=True)
class Config:
    """Sizes of fastText."""

    vocabulary: int = 5000
    """Tokens of the embedding."""
    d_in: int = 32
    """Size of the vector of a token or n-gram."""
    embedding_std: float = 0.1
    """Standard deviation of the tokens' initial vectors. Those of n-grams begin as 0: one that no training text has
    adds nothing, unless its hash is another's."""
    ngrams: int = 2
    """Tokens of the longest n-grams; 1 for none."""
    buckets: int = 2**17
    """Vectors for all n-grams together."""
    hidden: int = 0
    """Units of a hidden layer with relu; 0 for none, as published."""
    dropout: float = 0.0
    """Probability that a token or n-gram is left out in training."""
    outputs: int = 2
    """Classes."""

    def __post_init__(self):
        least = {"vocabulary": 1, "d_in": 1, "ngrams": 1, "buckets": 1, "hidden": 0, "outputs": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"fasttext: {name} is {getattr(self, name)}; expected at least {low}")
        if self.buckets > PRIME:
            raise ValueError(f"fasttext: buckets is {self.buckets}; expected up to {PRIME}, the values of the hash")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"fasttext: dropout {self.dropout} is outside [0, 1)")


def spec(cfg: Config) -> dict:
    """Parameters of fastText."""
    parts = {"head": linear_spec(cfg.hidden or cfg.d_in, cfg.outputs)}
    if cfg.hidden:
        parts["hidden"] = linear_spec(cfg.d_in, cfg.hidden)
    if cfg.ngrams > 1:
        parts["ngrams"] = embedding_spec(cfg.buckets, cfg.d_in, init=initializers.zeros)
    init = initializers.normal(cfg.embedding_std)
    return {**parts, "tokens": embedding_spec(cfg.vocabulary, cfg.d_in, init=init)}


def hashed_ngrams(tokens: Tensor, lengths: Tensor, longest: int, buckets: int) -> tuple[Tensor, Tensor]:
    """Buckets of the n-grams of each text, of 2 to `longest` tokens, a boundary before and after the text included.

    h_1 = s_i;   h_n = a h_{n-1} + s_{i+n-1} mod p;   bucket = (a h_n mod p) mod buckets;   p = 2**31 - 1

    s is 0 at the boundaries and token + 1 mod p between them; `lengths` says where the text ends.

    Args:
        tokens: (batch, time), any integers.
        lengths: (batch,).
        longest: at least 2.

    Returns:
        buckets (batch, longest - 1, time + 1), int64 in [0, buckets), by length and beginning; and True for those that
        are in the text, of the same shape. A text of no tokens has none.
    """
    time, lengths = tokens.shape[1], lengths.long()[:, None]  # (batch, 1)
    live = torch.arange(time, device=tokens.device) < lengths  # (batch, time)
    s = torch.where(live, (tokens.long() % PRIME + 1) % PRIME, 0)  # (batch, time)
    s = F.pad(s, (1, longest - 1))  # (batch, 1 + time + longest - 1)
    begins = torch.arange(time + 1, device=tokens.device)  # (time + 1,)
    h, ids, inside = s[:, : time + 1], [], []
    for n in range(2, longest + 1):
        h = (MULTIPLIER * h + s[:, n - 1 : n + time]) % PRIME  # (batch, time + 1)
        ids.append(MULTIPLIER * h % PRIME % buckets)
        inside.append((begins + n <= lengths + 2) & (lengths > 0))
    return torch.stack(ids, 1), torch.stack(inside, 1)  # each (batch, longest - 1, time + 1)


def features(
    params: dict, x: tuple[Tensor, Tensor], cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """The mean vector of each text, (batch, d_in), or its hidden units, (batch, hidden). Arguments as in `apply`."""
    tokens, lengths = check_sequences("fasttext", x)
    dropping = train and cfg.dropout > 0.0
    if dropping and key is None:
        raise ValueError(f"fasttext: training with dropout {cfg.dropout} draws random numbers; pass key=")
    time = tokens.shape[1]
    live = torch.arange(time, device=tokens.device) < lengths[:, None]  # (batch, time)
    tokens = torch.where(live, tokens, 0)  # what fills the positions after an end may be no token
    if cfg.ngrams > 1:
        ids, inside = hashed_ngrams(tokens, lengths, cfg.ngrams, cfg.buckets)  # (batch, ngrams - 1, time + 1)
        live = torch.cat([live, inside.flatten(1)], 1)  # (batch, parts), the tokens first, then the n-grams
    weights = live.to(params["head"]["weight"].dtype) / live.sum(1, keepdim=True).clamp(min=1)  # (batch, parts)
    weights = dropout(weights, cfg.dropout, key if dropping else None, train)[..., None]  # (batch, parts, 1)
    mean = (weights[:, :time] * embedding(params["tokens"], tokens)).sum(1)  # (batch, d_in)
    if cfg.ngrams > 1:
        mean = mean + (weights[:, time:] * embedding(params["ngrams"], ids.flatten(1))).sum(1)  # (batch, d_in)
    return torch.relu(linear(params["hidden"], mean)) if cfg.hidden else mean


def apply(
    params: dict, x: tuple[Tensor, Tensor], cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """Logits of a batch of texts, (batch, outputs).

    Args:
        x: (tokens, lengths): integers (batch, time) and integers (batch,), the tokens of each text. What comes after
            them is not looked at; a text of none has the mean 0.
        key: (2,) or one per example (batch, 2); needed in training if there is dropout.

    Raises:
        TypeError: x is not two tensors.
        ValueError: shapes that do not fit, lengths out of range, no key where one is needed.
    """
    return linear(params["head"], features(params, x, cfg, key=key, train=train))
