"""Speculative decoding: a small net drafts, a large one judges several tokens in one pass, and samples as if alone.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192), algorithm 1; the
same in Chen et al. 2023 (arXiv:2302.01318). With the draft's distribution q and the target's p, both after the filters:

    x_1 ... x_k ~ q                                 k passes of the draft
    p of the tokens after x_0, x_1 ... x_k          one pass of the target
    accept x_i with probability min(1, p(x_i) / q(x_i)), up to the first that is not
    then one more token, of norm(max(p - q, 0)) after a rejection, of p after none

so that every token is distributed as p. A net's cache goes back to the last accepted token by its position alone: keys
and values after it are not seen, and are overwritten.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core import random, tree
from nets.language.generation import open_texts, start
from nets.language.sampling import (
    Options,
    Progress,
    append,
    check_logits,
    filter_logits,
    options_of,
    penalise_repetition,
    rounds,
)


class Decoder(NamedTuple):
    """A decoder-only net, such as `Decoder(gpt2.decode, gpt2.empty_caches, params, cfg)`; decode may be compiled."""

    decode: Callable
    empty_caches: Callable
    params: dict
    cfg: Any


class Speculated(NamedTuple):
    """Texts and what they took.

    tokens: (batch, time) int64, padding after a text's end; time is the length of the longest.
    lengths: (batch,) tokens before the padding.
    acceptance: accepted / drafted tokens.
    rounds: passes of the target.
    """

    tokens: Tensor
    lengths: Tensor
    acceptance: float
    rounds: int


def distribution(logits: Tensor, present: Tensor | None, options: Options) -> Tensor:
    """Probabilities from which the next token is sampled, (..., vocabulary): a single 1 at temperature 0."""
    check_logits(logits)
    if present is not None:
        logits = penalise_repetition(logits, present, options.repetition_penalty)
    if options.temperature == 0.0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = filter_logits(logits.float(), options.temperature, options.top_k, options.top_p, options.min_p)
    return torch.softmax(logits, -1)


def judge(p: Tensor, q: Tensor, drafted: Tensor, u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted tokens of each row, then one of the target, and the number accepted.

    Args:
        p: (rows, k + 1, vocabulary) probabilities of the target after the last token and after each drafted one.
        q: (rows, k, vocabulary) those that the drafted tokens (rows, k) were drawn from.
        u: (rows, k) uniform in [0, 1).
        noise: (rows, vocabulary) standard Gumbel.

    Returns:
        tokens (rows, k + 1), of which the first n + 1 count, and n (rows,).
    """
    p_x, q_x = (each.gather(-1, drafted[..., None])[..., 0] for each in (p[:, :-1], q))  # each (rows, k)
    n = (u * q_x < p_x).long().cumprod(1).sum(1)  # (rows,)
    # max(p - q, 0); after the last drafted token there is no q.
    rest = torch.cat([(p[:, :-1] - q).clamp(min=0.0), p[:, -1:]], 1)
    rest, p = (each.gather(1, n[:, None, None].expand(-1, 1, p.shape[-1]))[:, 0] for each in (rest, p))
    rest = torch.where(rest.sum(-1, keepdim=True) > 0.0, rest, p)  # (rows, vocabulary); p = q up to rounding
    last = _drawn(rest, noise)  # (rows,)
    tokens = torch.cat([drafted, drafted[:, :1]], 1).scatter(1, n[:, None], last[:, None])  # (rows, k + 1)
    return tokens, n


def _drawn(p: Tensor, noise: Tensor) -> Tensor:
    return (p.log() + noise).argmax(-1)  # a sample of p / sum p, as in `choose`


def _noises(
    keys: Tensor | None, options: Options, rows: int, ahead: int, vocabulary: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Uniform numbers (rows, ahead) and Gumbel noise (rows, ahead + 1, vocabulary) of each round; zeros for greedy."""
    if options.temperature == 0.0:
        zeros = torch.zeros(rows, ahead + 1, 1, device=device)
        yield from itertools.repeat((zeros[:, 1:, 0], zeros))
    size = ahead + (ahead + 1) * vocabulary
    for times in rounds(rows * size, device):
        u = random.uniform(random.fold_in(keys[:, None], times), (size,))  # (rows, times, size)
        noise = -torch.log(-torch.log(u[..., ahead:].clamp(min=torch.finfo(u.dtype).tiny)))
        yield from zip(u[..., :ahead].unbind(1), noise.unflatten(-1, (ahead + 1, vocabulary)).unbind(1), strict=True)


def generate(
    target: Decoder,
    draft: Decoder,
    prompt: Tensor,
    steps: int,
    *,
    ahead: int = 4,
    lengths: Tensor | None = None,
    key: Tensor | None = None,
    options: Options = Options(),  # noqa: B008 # immutable
    **overrides,
) -> Speculated:
    """Up to `steps` new tokens per example, distributed as the target's own; those at temperature 0 are the same.

    An example gets the same text in a batch of any size; `nets.language.generation.generate` gives others from the same
    key. The passes have fixed shapes: a compiled `decode` of the target makes two graphs, one of the draft three.

    Args:
        target, draft: nets of one tokenizer, whose tables may be padded to different sizes. Prompt, steps and `ahead`
            tokens must fit the context of both.
        prompt, lengths, key, options, overrides: as in `nets.language.generation.stream`.
        ahead: k, tokens that are drafted before each pass of the target.

    Raises:
        ValueError: no room in a context, steps or ahead below 1, and as `generation.stream` does.
    """
    options = options_of(options, overrides)
    draft = _of_vocabulary(draft, target.cfg.vocabulary)
    if steps < 1 or ahead < 1:
        raise ValueError(f"speculative: steps is {steps} and ahead {ahead}; expected at least 1")
    prompt, lengths, progress = open_texts(prompt, lengths, key, options, target.cfg.vocabulary)
    (batch, time), device = prompt.shape, prompt.device
    rows, positions = torch.arange(batch, device=device), time + steps + ahead
    own, theirs = (
        start(net.decode, net.empty_caches, net.params, prompt, net.cfg, positions, lengths=lengths)[0]
        for net in (target, draft)
    )
    keys = random.fold_in(key, rows) if key is not None and key.ndim == 1 else key  # (batch, 2)
    history = torch.cat([prompt, prompt.new_zeros(batch, steps + ahead + 1)], 1)  # (batch, time + steps + ahead + 1)
    ends, first = lengths + steps, lengths
    accepted = proposed = passes = 0
    for u, noise in _noises(keys, options, batch, ahead, target.cfg.vocabulary, device):
        # x_1 ... x_k ~ q. The draft reads two tokens first, as it has not read the last one that it drafted before.
        position = lengths - 1
        before = (position - 1).clamp(min=0)
        pair = history.gather(1, before[:, None] + torch.arange(2, device=device))
        logits, theirs = draft.decode(draft.params, pair, theirs, before, draft.cfg, donate=True)
        logits, present = logits[rows, position - before], progress.present  # (batch, vocabulary)
        drafted, q, marks = [], [], [present]
        for i in range(ahead):
            q.append(distribution(logits, present, options))
            drafted.append(_drawn(q[-1], noise[:, i]))
            present = None if present is None else present.scatter(1, drafted[-1][:, None], True)
            marks.append(present)
            if i + 1 < ahead:
                step = drafted[-1][:, None], theirs, position + 1 + i
                logits, theirs = draft.decode(draft.params, *step, draft.cfg, donate=True)
                logits = logits[:, 0]
        drafted = torch.stack(drafted, 1)  # (batch, ahead)
        # p after x_0, x_1 ... x_k
        window = torch.cat([history.gather(1, position[:, None]), drafted], 1)  # (batch, ahead + 1)
        logits, own = target.decode(target.params, window, own, position, target.cfg, donate=True)
        p = distribution(logits, None if present is None else torch.stack(marks, 1), options)
        tokens, n = judge(p, torch.stack(q, 1), drafted, u, noise[:, -1])
        going, passes = ~progress.done, passes + 1
        accepted, proposed = accepted + int(n[going].sum()), proposed + ahead * int(going.sum())
        # All are written; what lies after a text's length does not count, and is overwritten.
        history = history.scatter(1, lengths[:, None] + torch.arange(ahead + 1, device=device), tokens)
        progress, lengths = _advance(progress, tokens, n, lengths, ends, options)
        if bool(progress.done.all()):
            break
    steps = int((lengths - first).max())
    new = torch.arange(steps, device=device) + first[:, None]  # (batch, steps)
    texts = torch.where(new < lengths[:, None], history.gather(1, new), options.padding)
    return Speculated(texts, lengths - first, accepted / proposed, passes)


def _of_vocabulary(draft: Decoder, vocabulary: int) -> Decoder:
    """The draft with logits of as many tokens as the target has; it proposes no token that it does not know."""
    own = draft.cfg.vocabulary
    if own == vocabulary:
        return draft

    def decode(params: dict, tokens: Tensor, *args, **options) -> tuple[Tensor, Any]:
        logits, caches = draft.decode(params, tokens.clamp(max=own - 1), *args, **options)
        return F.pad(logits[..., :vocabulary], (0, max(0, vocabulary - own)), value=-torch.inf), caches

    return draft._replace(decode=decode)


def _advance(
    progress: Progress, tokens: Tensor, n: Tensor, lengths: Tensor, ends: Tensor, options: Options
) -> tuple[Progress, Tensor]:
    """Progress and lengths after the first n + 1 of a round's tokens (rows, k + 1), up to the end of each text."""
    for i, token in enumerate(tokens.unbind(1)):
        going = ~progress.done & (i <= n)  # (rows,)
        lengths = lengths + going
        after = append(progress, token, options)
        after = after._replace(done=after.done | (lengths >= ends))

        def chosen(new: Tensor, old: Tensor, going: Tensor = going) -> Tensor:
            return torch.where(going if new.ndim == 1 else going[:, None], new, old)

        progress = tree.map(chosen, after, progress)
    return progress, lengths
