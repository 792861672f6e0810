"""Token attribution of a classifier made of an encoder: integrated gradients of the embeddings, as coloured text."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core.scores import integrated_gradients
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Encoder
from train.plots.coloured_text import Passage


class Attributed(NamedTuple):
    """A text in pieces with the contribution of each to a class's logit, less the mean logit of all classes.

    values: NaN for what the net does not see, such as the end of a long text.
    difference: of that logit between the text and one whose tokens are all [MASK]; the sum of the values, but for
        `error`.
    """

    pieces: list[str]
    values: list[float]
    difference: float
    error: float


def attribute(encoder: Encoder, text: str, target: int, longest: int, points: int = 32) -> Attributed:
    """Contributions of a text's tokens to the class `target`.

    Raises ValueError: the text has no tokens.
    """
    encoding = encoders.encodings(encoder, [text], longest)[0]
    device, table = encoder.params["tokens"]["weight"].device, encoder.params["tokens"]["weight"]
    ids, special = torch.tensor(encoding.ids), torch.tensor(encoding.special_tokens_mask).bool()
    if special.all():
        raise ValueError(f"'{text}' has no tokens; expected a text")
    hidden = next((i for i in map(encoder.tokenizer.token_id, ("[MASK]", "<mask>")) if i is not None), None)
    blank = torch.where(special, ids, encoder.cfg.padding_id if hidden is None else hidden)
    x, baseline = (table[rows.to(device)] for rows in (ids, blank))  # each (time, width)

    def logit(embeddings: Tensor) -> Tensor:
        logits = _logits(encoder, embeddings)  # (classes,)
        return logits[target] - logits.mean()

    out = integrated_gradients(logit, x, baseline, points, chunk=16)
    contributions = out.values.sum(1).tolist()  # one per token
    pieces, values = in_pieces(text, encoding.offsets, special.tolist(), contributions)
    return Attributed(pieces, values, float(out.difference), float(out.error))


def _logits(encoder: Encoder, embeddings: Tensor) -> Tensor:
    """Logits (classes,) of a text whose token embeddings (time, width) are free: they are a table of their own."""
    first = encoder.cfg.padding_id + 1  # no token may have the id of the padding
    table = torch.cat([embeddings.new_zeros(first, embeddings.shape[1]), embeddings])
    tokens = torch.arange(first, len(table), device=table.device)[None]  # (1, time)
    params = {**encoder.params, "tokens": {"weight": table}}
    return encoder.net.apply(params, tokens, encoder.cfg)[0]


def in_pieces(
    text: str, offsets: Sequence[tuple[int, int]], special: Sequence[bool], values: Sequence[float]
) -> tuple[list[str], list[float]]:
    """The whole text in pieces, and the value of each: of tokens theirs, of white space between them 0, at the end NaN.

    Tokens that share their characters, as bytes of one letter do, are one piece.
    """
    pieces, sums, at = [], [], 0
    for (first, last), ignored, value in zip(offsets, special, values, strict=True):
        if ignored:
            continue
        if last <= at and pieces:
            sums[-1] += value
            continue
        if first > at:
            pieces, sums = [*pieces, text[at:first]], [*sums, 0.0]
        pieces, sums, at = [*pieces, text[max(first, at) : last]], [*sums, value], last
    if at < len(text):
        pieces, sums = [*pieces, text[at:]], [*sums, math.nan]
    return pieces, sums


def passage(title: str, out: Attributed) -> Passage:
    """Orange for the class, blue against it; the strongest piece has the full colour."""
    top = max((abs(value) for value in out.values if not math.isnan(value)), default=0.0) or 1.0
    return Passage(title, out.pieces, [value / top for value in out.values])
