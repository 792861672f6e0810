"""Decoding: pure functions from logits to tokens, for any net that writes one token at a time.

Such a net is here a pure function

    step(cache, tokens, position) -> (logits, cache)

of the last token of each row (rows,), its position (one for all, or one per row) and a cache, a tree of tensors with a
leading axis of rows: keys and values, the state of a recurrent net, or all tokens so far. The logits (rows, vocabulary)
are those of the next token. `greedy` and `sample` are here, beams in `nets.language.beam_search`, and the choice of one
token in `nets.language.sampling`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core import tree
from core.tree import Tree
from nets.language.sampling import (
    Options,
    begin,
    check_ends,
    check_key,
    next_token,
    noises,
    occurrences,
    options_of,
)

Step = Callable[..., tuple[Tensor, Tree]]


class Decoded(NamedTuple):
    """Decoded texts; `beam_search` has one more axis, (batch, n best, ...).

    tokens: (batch, time) int64, with the end token, then padding; time is the length of the longest.
    lengths: (batch,) tokens before the padding.
    scores: (batch,) log-probability of the tokens under the net; from `beam_search`, over the length penalty.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor


def greedy(step: Step, cache: Tree, first: Tensor, **options) -> Decoded:
    """The most probable token at each position. Arguments and errors as in `sample`, without a key and its filters."""
    return sample(step, cache, first, **(options | {"temperature": 0.0}))


def sample(
    step: Step,
    cache: Tree,
    first: Tensor,
    key: Tensor | None = None,
    *,
    max_length: int,
    min_length: int = 0,
    position: int | Tensor = 0,
    shared: Tree = None,
    positions_axis: int | None = None,
    batch_sizes: Sequence[int] | None = None,
    present: Tensor | None = None,
    options: Options = Options(),  # noqa: B008 # immutable
    **overrides,
) -> Decoded:
    """Sample tokens one after the other, until each example has ended or written `max_length` tokens.

    Finished examples leave the batch. An example gets the same tokens in a batch of any size.

    Args:
        step: (cache, tokens (rows,), position) -> (logits (rows, vocabulary), cache), perhaps compiled.
        cache: tree of tensors (batch, ...), as the step expects them before `first` is read.
        first: (batch,) integers, the token each example goes on from: a start token, or the last one of its prompt.
        key: (2,); token t of example i is drawn from `fold_in(fold_in(key, t), i)`. Or one key per example, (batch, 2):
            `fold_in(key[i], t)`.
        max_length: maximal number of new tokens, with the end token.
        min_length: number of tokens before which no text ends. Default 0.
        position: position of `first`, a number or (batch,). The step gets it plus t. Default 0.
        shared: tree of tensors (batch, ...) that the step reads and does not change, such as the keys and values of
            an encoder's output: its fourth argument.
        positions_axis: axis of positions of every leaf of the cache. When they are full, as many zeros again as the
            cache had at first are added; so it starts short and its attention is never much longer than the text.
        batch_sizes: sizes to which the batch may shrink, so that a step compiled for fixed shapes meets few. Default
            any.
        present: (batch, vocabulary) boolean, tokens under the repetition penalty before any is written; `first` if
            None. See `nets.language.sampling.occurrences`.
        options, overrides: `nets.language.sampling.Options`, or its fields by name: temperature, end and others.

    Raises:
        ValueError: an option outside its range, a cache that is not of this batch, logits of another shape, NaN.
    """
    options = options_of(options, overrides)
    check_start(cache, shared, first, max_length, min_length)
    batch, device = first.shape[0], first.device
    check_key(key, batch, options)
    position, farthest, chunk = starting_positions(position, first, cache, positions_axis)
    token, examples = first.long(), torch.arange(batch, device=device)
    progress = begin(options, batch, device, present)
    columns, lengths, scores = [], torch.zeros_like(examples), None
    for t in range(max_length if batch else 0):
        cache = with_room(cache, positions_axis, farthest + t + 1, chunk)
        logits, cache = call(step, cache, token, position + t, shared)  # (rows, vocabulary)
        if t == 0:
            check_ends(options, logits.shape[-1], "decoding")
            scores, noise = logits.new_zeros(batch), noises(key, options, batch, logits.shape[-1])
            if options.repetition_penalty != 1.0 and present is None:
                ones = torch.ones_like(first)
                progress = progress._replace(present=occurrences(token[:, None], ones, logits.shape[-1]))
        allowed, done = without_end(logits, options.end if t < min_length else None), progress.done
        now = next(noise)
        now = None if now is None else now[examples]  # (rows, vocabulary)
        token, progress = next_token(allowed, progress, options, now, ending=t >= min_length)  # (rows,)
        log_p = torch.log_softmax(logits, dim=-1).gather(-1, token[:, None])[:, 0]  # (rows,)
        scores = scores.index_add(0, examples, torch.where(done, 0.0, log_p))  # (batch,)
        lengths = lengths.index_add(0, examples, (~done).long())
        columns.append(token.new_full((batch,), options.padding).index_copy(0, examples, token))
        rows = remaining(progress.done, batch_sizes)
        if rows is not None:
            if not len(rows):
                break
            cache, shared, token, progress, examples = take((cache, shared, token, progress, examples), rows)
            position = position[rows] if position.ndim else position
    if not columns:
        return Decoded(first.new_zeros(batch, 0).long(), lengths, torch.zeros(batch, device=device))
    return Decoded(torch.stack(columns, dim=1), lengths, scores)


def check_start(cache: Tree, shared: Tree, first: Tensor, max_length: int, min_length: int) -> None:
    """Raise ValueError, in one line, for arguments that decoding cannot start from."""
    if first.ndim != 1 or first.is_floating_point() or first.dtype == torch.bool:
        raise ValueError(f"decoding: expected first tokens (batch,) integers, found {tuple(first.shape)} {first.dtype}")
    if max_length < 1 or not 0 <= min_length < max_length:
        raise ValueError(f"decoding: expected 0 <= min_length < max_length, found {min_length} and {max_length}")
    for part, leaves in (("cache", tree.items(cache)), ("shared", tree.items(shared))):
        for name, leaf in leaves:
            if leaf.ndim < 1 or leaf.shape[0] != first.shape[0]:
                shape = f"'{name}' of {part} is {tuple(leaf.shape)}"
                raise ValueError(f"decoding: {shape}; expected {first.shape[0]} rows, one per example")


def check_scores(scores: Tensor) -> None:
    """Raise ValueError for logits that allow no token."""
    if bool(scores.isnan().any()):
        raise ValueError("decoding: the step gave logits with NaN, or with -inf for every token")


def starting_positions(position: int | Tensor, first: Tensor, cache: Tree, axis: int | None) -> tuple[Tensor, int, int]:
    """The position as a tensor, () or (batch,), the largest as a number, and the positions that the cache has."""
    position = torch.as_tensor(position, dtype=torch.int64, device=first.device)
    if position.ndim and position.shape != first.shape:
        raise ValueError(f"decoding: expected a position, or {len(first)}, found {tuple(position.shape)}")
    if axis is None or not first.shape[0]:
        return position, 0, 0
    sizes = {leaf.shape[axis] if 0 < axis < leaf.ndim else 0 for leaf in tree.leaves(cache)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"decoding: axis {axis} is not the positions of every leaf of the cache; its sizes are {sorted(sizes)}"
        )
    return position, int(position.max()), sizes.pop()


def with_room(cache: Tree, axis: int | None, positions: int, chunk: int) -> Tree:
    """The cache with at least `positions` positions along the axis; zeros are added in chunks."""
    if axis is None:
        return cache
    missing = positions - tree.leaves(cache)[0].shape[axis]
    if missing <= 0:
        return cache
    added = -(-missing // chunk) * chunk
    return tree.map(lambda leaf: F.pad(leaf, [0, 0] * (leaf.ndim - 1 - axis) + [0, added]), cache)


def call(step: Step, cache: Tree, tokens: Tensor, position: Tensor, shared: Tree) -> tuple[Tensor, Tree]:
    """The step's logits, in at least single precision, and its cache."""
    logits, cache = step(cache, tokens, position) if shared is None else step(cache, tokens, position, shared)
    if logits.ndim != 2 or logits.shape[0] != tokens.shape[0] or logits.shape[1] < 2:
        raise ValueError(f"decoding: expected logits ({tokens.shape[0]}, vocabulary), found {tuple(logits.shape)}")
    return (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits), cache


def without_end(scores: Tensor, end: int | None) -> Tensor:
    """Scores (rows, vocabulary) with that of the end token at -inf; unchanged for None."""
    return scores if end is None else scores.index_fill(-1, torch.tensor([end], device=scores.device), -torch.inf)


def remaining(done: Tensor, batch_sizes: Sequence[int] | None) -> Tensor | None:
    """Indices of the rows that go on, and of finished ones that fill the batch to an allowed size; None for all."""
    flags = done.tolist()
    going = [i for i, stops in enumerate(flags) if not stops]
    if going and batch_sizes is not None:
        size = min((n for n in batch_sizes if n >= len(going)), default=len(flags))
        going = sorted(going + [i for i, stops in enumerate(flags) if stops][: size - len(going)])
    return None if len(going) == len(flags) else torch.tensor(going, dtype=torch.int64, device=done.device)


def take(rows: Tree, order: Tensor) -> Tree:
    """These rows of every leaf, along the leading axis."""
    return tree.map(lambda leaf: leaf.index_select(0, order), rows)
