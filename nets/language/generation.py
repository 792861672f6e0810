"""Texts by decoder-only nets: a prompt is read once into key-value caches, then one token at a time is written.

The nets share two functions that `stream` and `start` call, here those of `nets.language.gpt2`:

    empty_caches(params, cfg, batch, positions) -> caches
    decode(params, tokens, caches, position, cfg, *, donate) -> (logits, caches)

`stream` yields tokens as they come and goes on past the context. With `start` and `stepper` such a net has the form of
`nets.language.decoding` and `nets.language.beam_search`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from core.attention import Cache
from nets.language.sampling import (
    Options,
    Progress,
    all_done,
    begin,
    check_ends,
    check_key,
    next_token,
    noises,
    occurrences,
    options_of,
)


def check_tokens(tokens: Tensor) -> None:
    """Raise ValueError unless tokens are (batch, time)."""
    if tokens.ndim != 2:
        raise ValueError(f"generation: expected tokens of shape (batch, time), found {tuple(tokens.shape)}")


def check_prompt(prompt: Tensor, lengths: Tensor | None) -> Tensor:
    """The lengths of the prompts, (batch,) int64, each at least 1 and up to prompt.shape[1]."""
    check_tokens(prompt)
    batch, time = prompt.shape
    lengths = torch.full((batch,), time, device=prompt.device) if lengths is None else lengths.to(torch.int64)
    if lengths.shape != (batch,) or int(lengths.max()) > time:
        raise ValueError(f"generation: expected {batch} lengths up to {time}, found {lengths.tolist()}")
    if int(lengths.min()) < 1:
        raise ValueError("generation: generation needs a prompt of at least one token")
    return lengths


def open_texts(
    prompt: Tensor, lengths: Tensor | None, key: Tensor | None, options: Options, vocabulary: int
) -> tuple[Tensor, Tensor, Progress]:
    """The beginning of every text: prompts (batch, time) int64, their lengths (batch,), and the progress.

    One prompt with several keys (n, 2) is repeated n times.
    """
    check_tokens(prompt)
    check_ends(options, vocabulary)
    if key is not None and key.ndim == 2 and len(prompt) == 1:
        prompt = prompt.expand(len(key), -1)  # (n, time)
        lengths = lengths.expand(len(key)) if lengths is not None and len(lengths) == 1 else lengths
    lengths, prompt = check_prompt(prompt, lengths), prompt.to(torch.int64)
    check_key(key, len(prompt), options)
    present = None if options.repetition_penalty == 1.0 else occurrences(prompt, lengths, vocabulary)
    return prompt, lengths, begin(options, len(prompt), prompt.device, present)


def _restart(history: Tensor, lengths: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """The last tokens of each example, up to `room`, moved to the front, (batch, room), and their number, (batch,)."""
    count = lengths.clamp(max=room)
    index = (lengths - count)[:, None] + torch.arange(room, device=history.device)  # (batch, room)
    return history.gather(1, index.clamp(max=history.shape[1] - 1)), count


def stream(
    decode: Callable,
    empty_caches: Callable,
    params: dict,
    prompt: Tensor,
    cfg: Any,
    steps: int,
    *,
    lengths: Tensor | None = None,
    key: Tensor | None = None,
    options: Options = Options(),  # noqa: B008 # immutable
    **overrides,
) -> Iterator[Tensor]:
    """Yield the next token of each example, up to `steps` times, through a key-value cache.

    When the longest example has filled the context, the last half of each (more, if few tokens are to come) is read
    again as a new prompt, so a text may go on for longer than the context. Up to there an example gets the same tokens
    in a batch of any size; past it, this depends on the longest one.

    Args:
        decode, empty_caches: those of the net, such as `nets.language.gpt2`; decode may be compiled.
        prompt: (batch, time) integers, at least one per row; of one longer than the context, the end is read. One row
            (1, time) with several keys (n, 2) is sampled n times.
        cfg: configuration of the net, with its `context` and `vocabulary`.
        lengths: (batch,) length of each row's prompt, by default all of the row; what follows it is ignored.
        key: (2,); token t of example i is drawn from `fold_in(fold_in(key, t), i)`. Or one key per example, (batch, 2).
        options, overrides: `nets.language.sampling.Options`, or its fields by name, such as temperature and end. Once
            every example has ended, the stream stops.

    Yields:
        (batch,) int64.

    Raises:
        ValueError: at the first token: an empty prompt, lengths that do not fit it, or an option outside its range; at
            any: logits with NaN.
    """
    options = options_of(options, overrides)
    prompt, lengths, progress = open_texts(prompt, lengths, key, options, cfg.vocabulary)
    batch, time = prompt.shape
    history = torch.cat([prompt, prompt.new_zeros(batch, steps)], dim=1)  # (batch, time + steps)
    rows = torch.arange(batch, device=prompt.device)
    # The last token that is drawn is never read, so it needs no position.
    positions = min(cfg.context, time + steps - 1)
    room = positions - min(steps - 1, positions // 2)  # how much of the past fits beside the tokens to come
    restarts = time + steps - 1 > positions
    token, longest = prompt[:, 0], positions  # as if the cache were full, so that the prompt is read first
    for t, noise in zip(range(steps), noises(key, options, batch, cfg.vocabulary), strict=False):
        if longest == positions:
            window, position = (prompt, lengths) if t == 0 and time <= positions else _restart(history, lengths, room)
            start = torch.zeros_like(position)
            caches = empty_caches(params, cfg, batch, positions)
            scores, caches = decode(params, window, caches, start, cfg, donate=True)
            scores, longest = scores[rows, position - 1], int(position.max())  # (batch, vocabulary)
        else:
            scores, caches = decode(params, token[:, None], caches, position, cfg, donate=True)
            scores, position, longest = scores[:, -1], position + 1, longest + 1  # (batch, vocabulary)
        token, progress = next_token(scores, progress, options, noise)  # (batch,)
        if restarts:
            history[rows, lengths] = token
            lengths = lengths + 1
        yield token
        if all_done(progress, options):
            return


def generate(
    decode: Callable, empty_caches: Callable, params: dict, prompt: Tensor, cfg: Any, steps: int, **options
) -> Tensor:
    """New tokens, (batch, steps), or as many as the longest text has. The options are those of `stream`."""
    if steps < 1:
        raise ValueError(f"generation: steps is {steps}; expected at least 1")
    return torch.stack(list(stream(decode, empty_caches, params, prompt, cfg, steps, **options)), dim=1)


def start(
    decode: Callable,
    empty_caches: Callable,
    params: dict,
    prompt: Tensor,
    cfg: Any,
    positions: int,
    *,
    lengths: Tensor | None = None,
) -> tuple[list[Cache], Tensor, Tensor]:
    """Read prompts, for `nets.language.decoding.sample` and `nets.language.beam_search.beam_search`.

        caches, first, position = start(gpt2.decode, gpt2.empty_caches, params, prompt, cfg, prompt.shape[1] + 20)
        step = stepper(gpt2.decode, params, cfg)
        beam_search(step, caches, first, position=position, positions_axis=2, beams=4, end=end, max_length=20)

    Args:
        prompt, lengths: as in `stream`; a prompt must fit the context.
        positions: room of the caches, at least the time of the prompt.

    Returns:
        caches that hold the prompts, the last token of each prompt (batch,), and its position (batch,).
    """
    lengths = check_prompt(prompt, lengths)
    caches = empty_caches(params, cfg, len(prompt), positions)
    _, caches = decode(params, prompt, caches, torch.zeros_like(lengths), cfg, donate=True)
    # The first step reads the last token again, and writes the same keys and values.
    return caches, prompt.gather(1, lengths[:, None] - 1)[:, 0], lengths - 1


def stepper(decode: Callable, params: dict, cfg: Any) -> Callable:
    """`decode`, perhaps compiled, as `nets.language.decoding` and `nets.language.beam_search` call it."""

    def call(caches: list[Cache], tokens: Tensor, position: Tensor) -> tuple[Tensor, list[Cache]]:
        scores, caches = decode(params, tokens[:, None], caches, position.expand(tokens.shape), cfg)
        return scores[:, -1], caches

    return call
