"""From logits to the next token: filters, penalties, the draw, and where a text ends.

`Options` holds all choices; `begin` and `next_token` apply them in every loop that writes texts, whichever net gives
the logits: `nets.language.generation`, `nets.language.decoding` and `nets.language.rnn`. Beams
(`nets.language.beam_search`) take those that need no random number.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random

TINY = 1e-30
"""Least divisor: logits over a smaller one are infinite, and equal."""


@dataclass(frozen=True)
class Options:
    """Choices of sampling, and of where a text ends.

    Raises ValueError: an option outside its range, such as a stop sequence of no tokens.
    """

    temperature: float = 1.0
    """Divisor of the logits; 0, and below 1e-20, where these would overflow, takes the most probable token."""
    top_k: int | None = None
    """Sample only from the k most probable tokens."""
    top_p: float | None = None
    """Sample only from the most probable tokens, of those left, that together have probability p."""
    min_p: float | None = None
    """Sample only from tokens, of those left, with at least min_p times the probability of the best one."""
    repetition_penalty: float = 1.0
    """Penalty of tokens that the prompt or the text so far contains, as in `penalise_repetition`; 1 for none."""
    end: int | None = None
    """Id of the token that ends a text; None for none."""
    padding: int = 0
    """Token id that fills positions after the end of a text."""
    stop: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that end a text: it ends after the first that it has written in whole, which stays part of
    it. A sequence that began in the prompt does not count."""

    def __post_init__(self):
        object.__setattr__(self, "stop", tuple(tuple(map(int, sequence)) for sequence in self.stop))
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature {self.temperature} is not above 0, nor 0 for greedy decoding")
        if self.temperature < 1e-20:
            object.__setattr__(self, "temperature", 0.0)
        _check_filters(self.top_k, self.top_p, self.min_p)
        _check_penalty(self.repetition_penalty)
        if self.end is not None and self.end < 0:
            raise ValueError(f"decoding: the end token is {self.end}; expected an id, or None")
        for sequence in self.stop:
            if not sequence or min(sequence) < 0:
                raise ValueError(f"a stop sequence is {list(sequence)}; expected at least one token id")


def options_of(options: Options, overrides: dict[str, Any]) -> Options:
    """`options` with some fields replaced, by keyword arguments of their names."""
    return replace(options, **overrides) if overrides else options


def check_ends(options: Options, vocabulary: int, what: str = "generation") -> None:
    """Raise ValueError for an end or a stop sequence with a token outside the vocabulary."""
    if options.end is not None and not 0 <= options.end < vocabulary:
        raise ValueError(f"{what}: the end token is {options.end}; expected an id below {vocabulary}, or None")
    for sequence in options.stop:
        if max(sequence) >= vocabulary:
            raise ValueError(f"{what}: a stop sequence is {list(sequence)}; expected ids below {vocabulary}")


def _check_filters(top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} is not at least 1")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p {top_p} is outside (0, 1]")
    if min_p is not None and not 0.0 < min_p <= 1.0:
        raise ValueError(f"min_p {min_p} is outside (0, 1]")


def _check_penalty(penalty: float) -> None:
    if not penalty > 0.0:
        raise ValueError(f"repetition_penalty {penalty} is not above 0")


def filter_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Logits over the temperature, with every token that may not be drawn at -inf.

    Args:
        logits: (..., vocabulary).
        temperature: divisor of the logits; above 0.
        top_k: keep the k most probable tokens only (Fan et al. 2018, arXiv:1805.04833).
        top_p: of these, keep only the smallest set of most probable tokens whose probabilities add up to p (Holtzman et
            al. 2020, arXiv:1904.09751).
        min_p: of these, keep only tokens with at least min_p times the probability of the best one (Nguyen et al. 2024,
            arXiv:2407.01082). As the probabilities are those at the temperature, a higher one keeps more.

    Raises:
        ValueError: an option outside its range.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature {temperature} is not above 0; the limit of 0 is greedy decoding")
    _check_filters(top_k, top_p, min_p)
    logits = logits / max(temperature, TINY)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]  # (..., 1)
        logits = torch.where(logits < least, -torch.inf, logits)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = torch.softmax(ordered, dim=-1)
        # A token stays if the tokens before it have not yet reached p; so the best one always does.
        ordered = torch.where(probabilities.cumsum(-1) - probabilities < top_p, ordered, -torch.inf)
        logits = ordered.gather(-1, order.argsort(dim=-1))
    if min_p is not None:  # p_i < min_p max_j p_j
        least = logits.amax(-1, keepdim=True) + math.log(min_p)  # (..., 1)
        logits = torch.where(logits < least, -torch.inf, logits)
    return logits


def occurrences(tokens: Tensor, lengths: Tensor, vocabulary: int) -> Tensor:
    """Tokens that occur in each text: ids (batch, time) -> boolean (batch, vocabulary).

    lengths: (batch,); what follows the first `lengths[i]` tokens of row i is ignored.
    """
    counted = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # (batch, time)
    counts = torch.zeros(tokens.shape[0], vocabulary, dtype=torch.int32, device=tokens.device)
    return counts.scatter_add(1, tokens, counted.to(torch.int32)) > 0  # (batch, vocabulary)


def penalise_repetition(logits: Tensor, present: Tensor, penalty: float) -> Tensor:
    """Penalised sampling: smaller logits of tokens that occurred already. Keskar et al. 2019, arXiv:1909.05858, 4.1.

        x_i / penalty where x_i > 0,   x_i penalty where x_i < 0,   for every token i in `present`

    The paper divides both kinds, which makes a token with a negative logit more probable; this is transformers' form.

    Args:
        logits: (..., vocabulary).
        present: boolean, of the same shape; see `occurrences`.
        penalty: 1 changes nothing, the paper takes 1.2; below 1 it rewards repetition.

    Raises:
        ValueError: a penalty that is not above 0.
    """
    _check_penalty(penalty)
    return torch.where(present, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def choose(
    logits: Tensor,
    key: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Next token of each example: the most probable at temperature 0, otherwise sampled from the filtered logits.

    Args:
        logits: (batch, vocabulary).
        key: (2,); example i draws from `fold_in(key, i)`, so that it gets the same token in a batch of any size. Or one
            key per example, (batch, 2).
        temperature, top_k, top_p, min_p: as in `filter_logits`.

    Returns:
        (batch,) int64.

    Raises:
        ValueError: no key, or keys of another shape, at a temperature above 0; an option outside its range.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    if key is None:
        raise ValueError("drawing a token at a temperature above 0 needs key=")
    if key.ndim > 2 or (key.ndim == 2 and key.shape[0] != logits.shape[0]):
        raise ValueError(f"expected a key (2,) or ({logits.shape[0]}, 2), found {tuple(key.shape)}")
    keys = random.sites(key, logits.shape[0]) if key.ndim == 1 else key  # (batch, 2)
    # argmax(logits + Gumbel noise) is a sample of softmax(logits).
    noise = random.gumbel(keys, (logits.shape[-1],), torch.float32)  # (batch, vocabulary)
    return (filter_logits(logits.float(), temperature, top_k, top_p, min_p) + noise).argmax(-1)


# Texts, a token at a time.


class Progress(NamedTuple):
    """Texts that are being written.

    done: (rows,) boolean, True for those that have ended.
    present: (rows, vocabulary) boolean, tokens under the repetition penalty; None without one.
    recent: (rows, length of the longest stop sequence) last tokens written, -1 before the first; None without one.
    """

    done: Tensor
    present: Tensor | None
    recent: Tensor | None


def begin(options: Options, rows: int, device: torch.device, present: Tensor | None = None) -> Progress:
    """The progress of `rows` empty texts.

    present: tokens of the prompts, (rows, vocabulary) boolean; needed if there is a repetition penalty.
    """
    longest = max(map(len, options.stop), default=0)
    recent = torch.full((rows, longest), -1, device=device) if longest else None
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    return Progress(done, None if options.repetition_penalty == 1.0 else present, recent)


def check_key(key: Tensor | None, rows: int, options: Options) -> None:
    """Raise ValueError unless a token of each of `rows` texts can be drawn from the key, (2,) or (rows, 2)."""
    if options.temperature == 0.0:
        return
    if key is None:
        raise ValueError("drawing a token at a temperature above 0 needs key=")
    if tuple(key.shape) not in ((2,), (rows, 2)):
        raise ValueError(f"expected a key (2,) or ({rows}, 2), found {tuple(key.shape)}")


def check_logits(logits: Tensor) -> None:
    """Raise ValueError for rows that have no best token."""
    if not bool(logits.amax(-1).isfinite().all()):
        raise ValueError("decoding: the net gave logits with NaN, or with -inf for every token")


def noises(key: Tensor | None, options: Options, rows: int, vocabulary: int) -> Iterator[Tensor | None]:
    """Gumbel noise (rows, vocabulary) of token 0, 1 ... of each text; None at temperature 0.

    key: (2,); example i draws from `fold_in(fold_in(key, t), i)`. Or one key per example: `fold_in(key[i], t)`.
    """
    if options.temperature == 0.0:
        yield from itertools.repeat(None)
    examples = torch.arange(rows, device=key.device)
    for times in rounds(rows * vocabulary, key.device):
        if key.ndim == 1:
            keys = random.fold_in(random.fold_in(key, times)[:, None], examples)  # (times, rows, 2)
        else:
            keys = random.fold_in(key, times[:, None])
        yield from random.gumbel(keys, (vocabulary,), torch.float32).unbind(0)


def rounds(size: int, device: torch.device) -> Iterator[Tensor]:
    """The numbers 0, 1 ... in stretches for which `size` random numbers each are drawn in one go.

    However few the numbers, a draw takes hundreds of small kernels: as long as a layer of a small net.
    """
    count = max(1, min(16, 2**18 // max(size, 1)))
    for first in itertools.count(0, count):
        yield torch.arange(first, first + count, device=device)


def next_token(
    logits: Tensor, progress: Progress, options: Options, noise: Tensor | None, *, ending: bool = True
) -> tuple[Tensor, Progress]:
    """Next token of each text, (rows,) int64, and the progress with it; padding where a text has ended.

    Args:
        logits: (rows, vocabulary).
        noise: of the same shape, from `noises`.
        ending: False if no text may end here. The end token then needs logits of -inf.

    Raises:
        ValueError: logits with NaN.
    """
    check_logits(logits)
    if progress.present is not None:
        logits = penalise_repetition(logits, progress.present, options.repetition_penalty)
    if noise is not None:
        filters = (options.temperature, options.top_k, options.top_p, options.min_p)
        logits = filter_logits(logits.float(), *filters) + noise  # as in `choose`
    token = torch.where(progress.done, options.padding, logits.argmax(-1))  # (rows,)
    return token, append(progress, token, options, ending=ending)


def append(progress: Progress, token: Tensor, options: Options, *, ending: bool = True) -> Progress:
    """The progress after one more token of each text, (rows,). ending: False if no text may end with it."""
    done, present, recent = progress
    if present is not None:
        present = present.scatter(1, token[:, None], True)
    if recent is not None:
        recent = torch.cat([recent[:, 1:], token[:, None]], 1)
    if ending:
        done = done | ended(token[:, None] if recent is None else recent, options)
    return Progress(done, present, recent)


def ended(texts: Tensor, options: Options) -> Tensor:
    """True of texts (..., time) whose last tokens are the end or a stop sequence: (...) boolean."""
    done = torch.zeros_like(texts[..., -1], dtype=torch.bool)
    for sequence in (*(() if options.end is None else ((options.end,),)), *options.stop):
        if len(sequence) <= texts.shape[-1]:
            done = done | (texts[..., -len(sequence) :] == texts.new_tensor(sequence)).all(-1)
    return done


def all_done(progress: Progress, options: Options) -> bool:
    """True once no text goes on; without an end or a stop sequence they all do."""
    return (options.end is not None or bool(options.stop)) and bool(progress.done.all())
