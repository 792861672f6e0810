"""Beam search: at each position only the few most probable texts so far are continued.

A text y of n tokens, its end among them, scores

    log p(y) / n**alpha                     length_penalty alpha, as transformers and fairseq have it
    log p(y) / ((5 + n) / 6)**alpha         Wu et al. 2016, "Google's Neural Machine Translation System", eq. 14

At each position, of all continuations of a sentence's beams, take the best 2 * beams, or with m tokens that may end a
text (1 + m) * beams. Those among the first `beams` that end are finished and leave the beams; the best that have not
ended are the beams of the next position. A sentence has up to `beams` finished texts, the best ones; it is done when no
beam may overtake them, and leaves the batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core.tree import Tree
from nets.language.decoding import (
    Decoded,
    Step,
    call,
    check_scores,
    check_start,
    remaining,
    starting_positions,
    take,
    with_room,
    without_end,
)
from nets.language.sampling import Options, check_ends, ended, occurrences, options_of, penalise_repetition

_BLOCK = 64  # tokens of the vocabulary that stand or fall by their maximum at first


class Beams(NamedTuple):
    """The beams of each sentence and its best finished texts, both best first.

    tokens: (sentences, beams, t) so far.
    scores: (sentences, beams) log-probability; -inf for none.
    best_tokens: (sentences, beams, t), the end token, then padding.
    best_lengths, best_scores: (sentences, beams); 0 and -inf for none.
    """

    tokens: Tensor
    scores: Tensor
    best_tokens: Tensor
    best_lengths: Tensor
    best_scores: Tensor


def beam_search(
    step: Step,
    cache: Tree,
    first: Tensor,
    *,
    beams: int,
    max_length: int,
    min_length: int = 0,
    n_best: int = 1,
    length_penalty: float = 1.0,
    normalization: str = "length",
    early_stopping: bool | str = False,
    position: int | Tensor = 0,
    shared: Tree = None,
    positions_axis: int | None = None,
    batch_sizes: Sequence[int] | None = None,
    present: Tensor | None = None,
    options: Options = Options(),  # noqa: B008 # immutable
    **overrides,
) -> Decoded:
    """The n best texts of each example, best first, among those that a beam search meets.

    Args:
        step: (cache, tokens (rows,), position) -> (logits (rows, vocabulary), cache), perhaps compiled. `first` is read
            with one row per sentence; later, row r is beam r % beams of sentence r // beams, and the cache's rows are
            reordered as the beams are.
        cache, first: one row per example, as in `nets.language.decoding.sample`.
        beams: texts of each sentence that are continued at each position.
        min_length: number of tokens before which no text ends; the other tokens keep their probabilities.
        n_best: texts to return per example, up to `beams`.
        length_penalty: alpha above; longer texts gain as it grows, 0 compares log-probabilities.
        normalization: "length" or "gnmt", the two divisors above.
        early_stopping: when a sentence is done, once as many of its texts have finished as there are beams. True: then.
            False: when the best beam, if it ended at its present length, would not be among the finished. "never": when
            no beam may come among the n best at any length up to `max_length`, which is exact. As in transformers.
        max_length, position, positions_axis, batch_sizes, present: as in `nets.language.decoding.sample`. A text that
            reaches `max_length` is finished without an end.
        options, overrides: `nets.language.sampling.Options`, or its fields by name: end, stop, padding and
            repetition_penalty, whose penalised logits give the probabilities (transformers' beams penalise
            log-probabilities instead). Nothing is drawn, so those of sampling have no place.
        shared: tree of tensors that all beams of a sentence share, such as an encoder's output, with one row per
            sentence, not per beam. The step's fourth argument; not reordered, but finished sentences leave it.

    Returns:
        Decoded with tokens (batch, n_best, time). Where fewer texts exist, length 0 and score -inf.

    Raises:
        ValueError: an option outside its range, a cache that is not of this batch, logits of another shape, NaN.
    """
    options = options_of(options, overrides)
    check_start(cache, shared, first, max_length, min_length)
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if (value := getattr(options, name)) not in (getattr(Options, name), 0.0):
            raise ValueError(f"beam_search: {name} is {value}, which is for sampling; beams draw nothing")
    if beams < 1 or not 1 <= n_best <= beams:
        raise ValueError(f"beam_search: expected 1 <= n_best <= beams, found {n_best} and {beams}")
    if normalization not in ("length", "gnmt"):
        raise ValueError(f"beam_search: normalization '{normalization}' is unknown; expected length or gnmt")
    if not -10 <= length_penalty <= 10:  # the score of a longer text would underflow
        raise ValueError(f"beam_search: length_penalty is {length_penalty}; expected -10 to 10")
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise ValueError(f"beam_search: early_stopping is {early_stopping!r}; expected True, False or 'never'")

    def divisor(length: int) -> float:
        return (length if normalization == "length" else (5 + length) / 6) ** length_penalty

    def ends(texts: Tensor) -> Tensor:
        """Which of texts (sentences, any, time) end here, (sentences, any)."""
        if min_length < texts.shape[2] < max_length:
            return ended(texts, options)
        return torch.full_like(texts[..., -1], texts.shape[2] == max_length, dtype=torch.bool)

    position, farthest, chunk = starting_positions(position, first, cache, positions_axis)
    batch, device = first.shape[0], first.device
    examples = torch.arange(batch, device=device)
    spread = examples.repeat_interleave(beams)  # (batch * beams,)
    tokens, done = first.long(), torch.zeros(batch, dtype=torch.bool, device=device)
    state, finished, penalised = None, [], options.repetition_penalty != 1.0
    last = {sequence[-1] for sequence in options.stop} | ({options.end} - {None})  # tokens that may end a text
    count = max(2, 1 + len(last)) * beams
    for t in range(max_length if batch else 0):
        cache = with_room(cache, positions_axis, farthest + t + 1, chunk)
        logits, cache = call(step, cache, tokens, position + t, shared)  # (rows, vocabulary)
        if t == 0:
            check_ends(options, logits.shape[1], "decoding")
            state = _start(batch, beams, logits)
            if penalised and present is None:
                present = occurrences(tokens[:, None], torch.ones_like(first), logits.shape[1])
        if penalised:
            logits = penalise_repetition(logits, present, options.repetition_penalty)
        values, ids = _best(logits, min(count, logits.shape[1]), options.end if t < min_length else None)  # (rows, k)
        values, ids = take((values, ids), spread) if t == 0 else (values, ids)
        state, parents = _advance(state, values, ids, done, ends, count, divisor(t + 1), options.padding)

        # A beam's score only falls; over its length it may rise, but no further than at the maximal length.
        longest = max_length if early_stopping == "never" and length_penalty > 0.0 else t + 1
        least = state.best_scores[:, n_best - 1 if early_stopping == "never" else beams - 1]  # (sentences,)
        done = done | ~(state.scores[:, 0] / divisor(longest) > least)
        if early_stopping is True:
            done = done | (least > -torch.inf)

        going = remaining(done, batch_sizes)
        sentences = torch.arange(len(done), device=device) if going is None else going
        if going is not None:
            leaves = torch.ones_like(done).index_fill(0, going, False).nonzero()[:, 0]
            finished.append((examples[leaves], take(state, leaves)))
            if not len(going):
                break
            state, shared, examples, done, parents = take((state, shared, examples, done, parents), going)
        rows = sentences[:, None].expand_as(parents) if t == 0 else sentences[:, None] * beams + parents
        order = rows.flatten()  # (sentences * beams,)
        cache = take(cache, order)
        position = position[order] if position.ndim else position
        tokens = state.tokens[:, :, -1].flatten().contiguous()  # a compiled step would not know the strides
        present = present[order].scatter(1, tokens[:, None], True) if penalised else None
    return _collect(finished, first, n_best, options.padding)


def _start(sentences: int, beams: int, like: Tensor) -> Beams:
    """All beams of a sentence are the same text at first, so only one of them counts."""
    none = like.new_full((sentences, beams), -torch.inf)
    tokens = torch.zeros(sentences, beams, 0, dtype=torch.int64, device=like.device)
    scores = none.index_fill(1, torch.tensor([0], device=like.device), 0.0)
    return Beams(tokens, scores, tokens, torch.zeros_like(none, dtype=torch.int64), none)


def _advance(
    state: Beams,
    values: Tensor,
    ids: Tensor,
    done: Tensor,
    ends: Callable[[Tensor], Tensor],
    count: int,
    divisor: float,
    padding: int,
) -> tuple[Beams, Tensor]:
    """One position on, by the best continuations of each row, log-probabilities and ids (rows, k), `count` of them.

    Returns:
        The new beams, and the beam of its sentence that each of them continues, (sentences, beams).
    """
    sentences, beams, t = state.tokens.shape
    totals = (state.scores.reshape(-1, 1) + values).reshape(sentences, -1)  # (sentences, beams * k)
    totals, indices = totals.topk(min(count, totals.shape[1]), dim=1)  # each (sentences, n)
    parents = indices // values.shape[1]
    ids = ids.reshape(sentences, -1).gather(1, indices)  # (sentences, n)
    tokens = torch.cat([_texts(state.tokens, parents), ids[:, :, None]], dim=2)  # (sentences, n, t + 1)
    ending = ends(tokens)  # (sentences, n)

    finished = torch.where(ending[:, :beams] & ~done[:, None], totals[:, :beams] / divisor, -torch.inf)
    best_scores, order = torch.cat([state.best_scores, finished], dim=1).topk(beams, dim=1)  # (sentences, beams)
    lengths = torch.where(finished > -torch.inf, t + 1, 0)
    best_lengths = torch.cat([state.best_lengths, lengths], dim=1).gather(1, order)
    before = torch.cat([state.best_tokens, state.best_tokens.new_full((sentences, beams, 1), padding)], dim=2)
    best_tokens = _texts(torch.cat([before, tokens[:, :beams]], dim=1), order)  # (sentences, beams, t + 1)

    scores, order = torch.where(ending, -torch.inf, totals).topk(beams, dim=1)  # (sentences, beams)
    state = Beams(_texts(tokens, order), scores, best_tokens, best_lengths, best_scores)
    return state, parents.gather(1, order)


def _texts(tokens: Tensor, order: Tensor) -> Tensor:
    """The texts (sentences, any, t) in this order (sentences, n) of each sentence."""
    return tokens.gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2]))  # (sentences, n, t)


def _best(logits: Tensor, k: int, forbidden: int | None) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities of each row and their ids, (rows, k)."""
    log_p = without_end(torch.log_softmax(logits, dim=-1), forbidden)
    rows, vocabulary = log_p.shape
    whole = vocabulary // _BLOCK * _BLOCK
    if log_p.device.type != "cpu" or whole // _BLOCK <= 2 * k:
        return log_p.topk(k, dim=1)
    # On a CPU topk is slow and a maximum fast: the k best are in the k blocks with the largest maxima, or the rest.
    blocks = log_p[:, :whole].unflatten(1, (-1, _BLOCK))  # (rows, blocks, _BLOCK)
    largest = blocks.amax(-1).topk(k, dim=1, sorted=False).indices  # (rows, k)
    candidates = [blocks[torch.arange(rows)[:, None], largest].flatten(1), log_p[:, whole:]]
    values, indices = torch.cat(candidates, dim=1).topk(k, dim=1)
    in_block = largest.gather(1, (indices // _BLOCK).clamp(max=k - 1)) * _BLOCK + indices % _BLOCK
    return values, torch.where(indices < k * _BLOCK, in_block, indices + (whole - k * _BLOCK))


def _collect(finished: list[tuple[Tensor, Beams]], first: Tensor, n_best: int, padding: int) -> Decoded:
    """The n best texts of all examples, in the order of the batch."""
    time = max((int(state.best_lengths[:, :n_best].max()) for _, state in finished), default=0)
    batch = first.shape[0]
    tokens = torch.full((batch, n_best, time), padding, dtype=torch.int64, device=first.device)
    lengths = torch.zeros(batch, n_best, dtype=torch.int64, device=first.device)
    scores = finished[0][1].scores.new_zeros(batch, n_best) if finished else torch.zeros(0, n_best, device=first.device)
    for examples, state in finished:
        check_scores(state.scores)
        check_scores(state.best_scores)
        width = min(time, state.best_tokens.shape[2])
        tokens[examples, :, :width] = state.best_tokens[:, :n_best, :width]
        lengths[examples] = state.best_lengths[:, :n_best]
        scores[examples] = state.best_scores[:, :n_best]
    return Decoded(torch.where((lengths > 0)[:, :, None], tokens, padding), lengths, scores)
