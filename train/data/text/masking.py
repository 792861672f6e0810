"""Corrupted texts that a net repairs: BERT's masked tokens and T5's corrupted spans, functions of keys and tokens.

Devlin et al. 2019 (arXiv:1810.04805), section 3.1: of the tokens 15 % are predicted; of these 80 % become [MASK], 10 %
a random token, 10 % stay. Raffel et al. 2020 (arXiv:1910.10683), section 3.1.4: spans of 3 tokens on average, 15 % of
all, become one sentinel each, and the target has the sentinels and what they stand for:

    Thank you <0> me to your party <1> week </s>        <0> for inviting <1> last </s>

Keys are one per example, (batch, 2): with a new key, an example is corrupted anew.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from core import random
from train.data import DataError
from train.data.text.tokenizers import BytePairTokenizer, Tokenizer

NAMES = {
    "first": ("[CLS]", "<s>"),
    "last": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "padding": ("[PAD]", "<pad>"),
}
"""Special tokens of BERT and of RoBERTa."""


class Marks(NamedTuple):
    """Ids of the special tokens of a BERT.

    Attributes:
        first: before a text.
        last: after a text.
        mask: replaces a hidden token.
        padding: fills up a batch.
        special: (n,) ids that are never predicted, unknown words among them.
        ordinary: (m,) all other ids of the vocabulary.
    """

    first: int
    last: int
    mask: int
    padding: int
    special: Tensor
    ordinary: Tensor


def marks_of(tokenizer: Tokenizer) -> Marks:
    """The special tokens of a tokenizer. Raises DataError naming one that it does not have."""
    if not isinstance(tokenizer, BytePairTokenizer):
        raise DataError("a tokenizer of characters has no special tokens, which masked tokens need")
    ids = {}
    for name, tokens in NAMES.items():
        known = [i for token in tokens if (i := tokenizer.token_id(token)) is not None]
        if not known:
            raise DataError(f"the tokenizer has no {' or '.join(tokens)}, which masked tokens need")
        ids[name] = known[0]
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special} | set(ids.values())
    ordinary = [i for i in range(tokenizer.vocabulary_size) if i not in special]
    return Marks(**ids, special=torch.tensor(sorted(special)), ordinary=torch.tensor(ordinary))


def surrounded(tokens: Tensor, marks: Marks) -> Tensor:
    """[CLS] tokens [SEP]: (batch, time) -> (batch, time + 2)."""
    ends = [tokens.new_full((len(tokens), 1), token) for token in (marks.first, marks.last)]
    return torch.cat([ends[0], tokens, ends[1]], 1)  # (batch, time + 2)


class Masked(NamedTuple):
    """A batch with masked tokens.

    Attributes:
        tokens: (batch, time), corrupted.
        positions: (batch, most) of the tokens to predict, in no order.
        targets: (batch, most), the original tokens there.
        counted: (batch, most), False at positions that only fill up the shape, where tokens are as they were.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    counted: Tensor


def mask_tokens(keys: Tensor, tokens: Tensor, marks: Marks, rate: float = 0.15) -> Masked:
    """Hide a share of each example's tokens, never special ones, as BERT does.

    n tokens that are not special have floor(rate n + u) of them to predict, u uniform in [0, 1), so that each has the
    probability `rate`; but at least one. The shape depends on `tokens.shape` alone.

    Args:
        keys: (batch, 2).
        tokens: (batch, time) integers, special tokens included.
    """
    eligible = ~torch.isin(tokens, marks.special)  # (batch, time)
    order_key, count_key, kind_key, token_key = random.split(keys, 4).unbind(-2)
    most = min(tokens.shape[1], int(rate * tokens.shape[1]) + 1)
    order = torch.where(eligible, random.uniform(order_key, tokens.shape[1:]), 2.0)
    positions = order.topk(most, largest=False).indices  # (batch, most)
    count = (rate * eligible.sum(1) + random.uniform(count_key, ())).floor().clamp(min=1)  # (batch,)
    counted = (torch.arange(most) < count[:, None]) & eligible.gather(1, positions)  # (batch, most)
    targets = tokens.gather(1, positions)

    kind = random.uniform(kind_key, (most,))  # below 0.8 [MASK], below 0.9 a random token, else the token itself
    others = marks.ordinary[random.randint(token_key, (most,), 0, len(marks.ordinary)).long()]
    new = torch.where(kind < 0.8, marks.mask, torch.where(kind < 0.9, others, targets))
    return Masked(tokens.scatter(1, positions, torch.where(counted, new, targets)), positions, targets, counted)


# Spans.


class SpanSizes(NamedTuple):
    """Numbers of corrupted tokens and of spans of a text, and of tokens of the input and the target it becomes."""

    noise: int
    spans: int
    inputs: int
    targets: int


def span_sizes(tokens: int, rate: float = 0.15, mean: float = 3.0) -> SpanSizes:
    """Sizes of a text of at least two tokens: 568 -> 85 in 28 spans, an input of 512, a target of 114.

    Each span has a sentinel in both; both end in </s>.
    """
    noise = min(max(round(tokens * rate), 1), tokens - 1)
    spans = min(max(round(noise / mean), 1), noise, tokens - noise)
    return SpanSizes(noise, spans, tokens - noise + spans + 1, noise + spans + 1)


def tokens_of_input(inputs: int, rate: float = 0.15, mean: float = 3.0) -> int:
    """The largest number of tokens whose input has up to `inputs` of them, 512 -> 568; at least 2."""
    tokens = 2
    while span_sizes(tokens + 1, rate, mean).inputs <= inputs:
        tokens += 1
    return tokens


def composition(keys: Tensor, total: int, parts: int) -> Tensor:
    """`parts` positive integers with the sum `total`, every such sequence equally likely: (batch, 2) -> (batch, parts).

    The numbers between parts - 1 of the total - 1 places where they can be cut.
    """
    cuts = random.uniform(keys, (total - 1,)).topk(parts - 1).indices.sort(1).values + 1  # (batch, parts - 1)
    ends = [cuts.new_full((len(keys), 1), value) for value in (0, total)]
    return torch.cat([ends[0], cuts, ends[1]], 1).diff(dim=1)  # (batch, parts)


def corrupt_spans(
    keys: Tensor, tokens: Tensor, sentinel: int, end: int, rate: float = 0.15, mean: float = 3.0
) -> tuple[Tensor, Tensor]:
    """T5's inputs (batch, inputs) and targets (batch, targets), of the sizes that `span_sizes` has.

    A text begins with a part that stays and ends with a span that does not.

    Args:
        keys: (batch, 2).
        tokens: (batch, time) integers without </s>, at least two per example.
        sentinel: id of the first span's sentinel; those of the next ones count down from it.
        end: id of </s>.
    """
    (batch, time), sizes = tokens.shape, span_sizes(tokens.shape[1], rate, mean)
    noise_key, other_key = random.split(keys).unbind(-2)
    noise = composition(noise_key, sizes.noise, sizes.spans)
    other = composition(other_key, time - sizes.noise, sizes.spans)
    starts = torch.stack([other, noise], 2).flatten(1).cumsum(1)[:, :-1]  # (batch, 2 spans - 1), of all but the first
    part = torch.zeros_like(tokens).scatter(1, starts, 1).cumsum(1)  # (batch, time): odd inside a span
    hidden = part % 2 == 1
    first = torch.zeros_like(hidden).scatter(1, starts, True) & hidden  # of a span
    sentinels = sentinel - part // 2  # (batch, time), where hidden
    last = tokens.new_full((batch, 1), end)
    inputs = torch.where(hidden, sentinels, tokens)[~hidden | first].reshape(batch, -1)
    pairs = torch.stack([sentinels, tokens], 2)  # (batch, time, 2)
    targets = pairs[torch.stack([first, hidden], 2)].reshape(batch, -1)
    return torch.cat([inputs, last], 1), torch.cat([targets, last], 1)
