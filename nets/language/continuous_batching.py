"""Continuous batching: texts of different lengths share the rows of one key-value cache.

Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models" (OSDI): after every token a
text that has ended leaves its row, and another takes it at once, while the others go on.

    batch = Batch(gpt2, params, cfg, rows=16)
    batch.add("a", Text(prompt, steps=100, key=random.key(0), options=Options(temperature=0.8)))
    while batch.count:
        for name, token, ended in batch.step(): ...

A text has the tokens that `nets.language.generation.stream` gives its prompt, its key and its options alone.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random
from nets.language.sampling import Options, check_ends, check_key

SLEEPING = Options(temperature=0.0)


class Text(NamedTuple):
    """A text to write.

    prompt: token ids, at least one.
    steps: new tokens, at most.
    key: (2,); token t is drawn from `fold_in(key, t)`. Needed at a temperature above 0.
    options: without a repetition penalty.
    """

    prompt: tuple[int, ...]
    steps: int
    key: Tensor | None = None
    options: Options = Options()


@dataclass
class _Row:
    """A text that is being written. `tokens` begins with the prompt; its last one is read at `position` next."""

    name: Hashable
    text: Text
    tokens: list[int]
    position: int

    @property
    def count(self) -> int:
        return len(self.tokens) - len(self.text.prompt)

    @property
    def positions(self) -> int:
        """Tokens that are read before the last half of the text is read again, as in `generation.stream`."""
        return len(self.text.prompt) + self.text.steps - 1

    @property
    def ended(self) -> bool:
        end, stop = self.text.options.end, self.text.options.stop
        new = self.tokens[len(self.text.prompt) :]
        ends = [*([] if end is None else [(end,)]), *stop]
        return len(new) >= self.text.steps or any(tuple(new[-len(ids) :]) == ids for ids in ends)


class NotFinite(ArithmeticError):
    """A text's logits have NaN, or -inf for every token."""


class Batch:
    """Texts that are written together, each in a row of the caches.

    Args:
        net: a decoder with `empty_caches` and `decode`, such as `nets.language.gpt2`.
        rows: texts at once, at most.
        context: tokens that a row has room for; the net's own context if None.
        exact: step all rows, used or not. Products of other sizes round differently, by about 1e-6 of a logit, so
            without it a text could depend on its neighbours where two tokens are as likely as that; with it, no bit of
            the logits does.
        decode: the net's `decode`, or a compiled form of it, for the steps. Prompts are read by the net's own.

    Raises:
        ValueError: fewer than one row, a context that the net has not.
    """

    def __init__(
        self,
        net: ModuleType,
        params: dict,
        cfg: Any,
        rows: int,
        *,
        context: int | None = None,
        exact: bool = False,
        decode: Callable | None = None,
    ):
        self.context = cfg.context if context is None else context
        if rows < 1 or not 1 <= self.context <= cfg.context:
            sizes = f"{rows} rows of {self.context} tokens"
            raise ValueError(f"continuous batching: found {sizes}; expected at least 1, of 1 to {cfg.context}")
        self.net, self.params, self.cfg, self.exact = net, params, cfg, exact
        self.decode = net.decode if decode is None else decode
        self.caches = net.empty_caches(params, cfg, rows, self.context)
        self.rows: list[_Row | None] = [None] * rows
        like = self.caches[0].keys
        self.device = like.device
        # Token t is drawn with the noise of `fold_in(key, t)`; as in `sampling.noises`, for several t in one go.
        self.ahead = max(1, min(16, 2**18 // (rows * cfg.vocabulary)))
        self.noise = torch.zeros(rows, self.ahead, cfg.vocabulary, device=self.device)
        self.drawn = self.ahead  # rounds of the noise that have been used; all: it is drawn anew

    @property
    def count(self) -> int:
        """Texts that are being written."""
        return sum(row is not None for row in self.rows)

    @property
    def free(self) -> int:
        """Rows without a text."""
        return len(self.rows) - self.count

    def check(self, text: Text) -> None:
        """Raise ValueError unless the text can be written here."""
        if not 1 <= len(text.prompt) <= self.context:
            raise ValueError(f"the prompt has {len(text.prompt)} tokens; expected 1 to {self.context}")
        if min(text.prompt) < 0 or max(text.prompt) >= self.cfg.vocabulary:
            raise ValueError(f"the prompt has tokens outside the vocabulary of {self.cfg.vocabulary}")
        if text.steps < 1:
            raise ValueError(f"continuous batching: steps is {text.steps}; expected at least 1")
        if text.options.repetition_penalty != 1.0:
            raise ValueError("continuous batching has no repetition penalty")
        check_ends(text.options, self.cfg.vocabulary, "continuous batching")
        check_key(text.key, 1, text.options)

    @torch.inference_mode()
    def add(self, name: Hashable, text: Text) -> None:
        """Read a prompt into a free row. Raises ValueError: no row is free, or the text cannot be written."""
        self.check(text)
        if None not in self.rows:
            raise ValueError(f"continuous batching: all {len(self.rows)} rows are taken")
        i = self.rows.index(None)
        row = _Row(name, text, list(text.prompt), 0)
        row.position = self._read(i, row.tokens)
        self.rows[i] = row
        self.drawn = self.ahead

    def remove(self, name: Hashable) -> None:
        """Free the row of a text, if it has one."""
        for i, row in enumerate(self.rows):
            if row is not None and row.name == name:
                self._free(i)

    def _free(self, i: int) -> None:
        """Free row i. Used rows are the first ones, so that a step can leave out the others, unless `exact`."""
        self.rows[i] = None
        last = self.count
        if not self.exact and i != last:
            self.rows[i], self.rows[last] = self.rows[last], None
            self.noise[i] = self.noise[last]
            for cache in self.caches:
                for values in cache:
                    values[i] = values[last]

    def _read(self, i: int, tokens: list[int]) -> int:
        """Read all tokens but the last into row i; the position of the last."""
        if before := tokens[:-1]:
            caches = self.net.empty_caches(self.params, self.cfg, 1, len(before))
            prompt, start = torch.tensor([before], device=self.device), torch.zeros(1, dtype=torch.int64)
            _, caches = self.net.decode(self.params, prompt, caches, start.to(self.device), self.cfg, donate=True)
            for cache, new in zip(self.caches, caches, strict=True):
                for old, values in zip(cache, new, strict=True):
                    old[i, :, : len(before)] = values[0]  # (heads, time, depth)
        return len(before)

    @torch.inference_mode()
    def step(self) -> list[tuple[Hashable, int | NotFinite, bool]]:
        """(name, next token, whether the text has ended) of each text; one that has ended leaves its row.

        In place of the token of a text whose logits are not finite stands the error, and it ends.
        """
        used = [i for i, row in enumerate(self.rows) if row is not None]
        if not used:
            return []
        size = len(self.rows) if self.exact else min(1 << (len(used) - 1).bit_length(), len(self.rows))
        for i in used:
            row = self.rows[i]
            positions = min(self.context, row.positions)
            if row.position == positions:  # the cache is full: the last half is read again
                left = row.text.steps - 1
                row.position = self._read(i, row.tokens[-(positions - min(left, positions // 2)) :])
        tokens = [row.tokens[-1] if row else 0 for row in self.rows[:size]]
        position = [row.position if row else 0 for row in self.rows[:size]]
        caches = [type(cache)(*(values[:size] for values in cache)) for cache in self.caches]
        ids = torch.tensor(tokens, device=self.device)[:, None]  # (size, 1)
        where = torch.tensor(position, device=self.device)  # (size,)
        logits, caches = self.decode(self.params, ids, caches, where, self.cfg, donate=True)
        self._keep(caches, size)
        next_tokens, finite = self._choose(logits[:, -1].float(), size)
        out = []
        for i, token, good in [(i, next_tokens[i], finite[i]) for i in used]:
            row = self.rows[i]
            row.tokens.append(token)
            row.position += 1
            problem = None if good else NotFinite("the net gave logits with NaN, or with -inf for every token")
            out.append((row.name, problem or token, bool(problem) or row.ended))
        for name, _, ended in out:
            if ended:
                self.remove(name)
        return out

    def _keep(self, caches: list, size: int) -> None:
        """The caches after a step; a compiled one may have made new ones in place of writing into the old."""
        for old, new in zip(self.caches, caches, strict=True):
            for values, changed in zip(old, new, strict=True):
                if changed.data_ptr() != values.data_ptr():
                    values[:size] = changed

    def _choose(self, logits: Tensor, size: int) -> tuple[list[int], list[bool]]:
        """(next token, whether its logits are finite) of each row; logits: (size, vocabulary)."""
        options = [row.text.options if row else SLEEPING for row in self.rows[:size]]
        finite = logits.amax(-1).isfinite().tolist()
        if all(one.temperature == 0.0 for one in options):
            return logits.argmax(-1).tolist(), finite
        if self.drawn == self.ahead:
            self._draw()
        noise, self.drawn = self.noise[:size, self.drawn], self.drawn + 1
        return choose(logits, noise, options).tolist(), finite

    def _draw(self) -> None:
        """Noise of the next tokens of every text that is sampled."""
        rows = [(i, row) for i, row in enumerate(self.rows) if row and row.text.options.temperature]
        keys = torch.stack([row.text.key for _, row in rows]).to(self.device)  # (texts, 2)
        counts = torch.tensor([row.count for _, row in rows], device=self.device)  # (texts,)
        times = counts[:, None] + torch.arange(self.ahead, device=self.device)  # (texts, ahead)
        keys = random.fold_in(keys[:, None], times)  # (texts, ahead, 2)
        self.noise[[i for i, _ in rows]] = random.gumbel(keys, (self.cfg.vocabulary,), torch.float32)
        self.drawn = 0


def choose(logits: Tensor, noise: Tensor, options: list[Options]) -> Tensor:
    """Next token of each row by its own options, (rows,) int64.

    Args:
        logits: (rows, vocabulary) float32.
        noise: Gumbel noise of the same shape; of a row at temperature 0 it is ignored.

    Each row gets the token that `nets.language.sampling.next_token` gives it with its options.
    """
    vocabulary, device = logits.shape[-1], logits.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]  # (rows, 1)

    sampled = column([float(one.temperature > 0.0) for one in options]) > 0
    logits = logits / column([one.temperature or 1.0 for one in options])
    if any(one.top_k or one.top_p for one in options):
        ordered, order = logits.sort(dim=-1, descending=True)
        least = column([min(one.top_k or vocabulary, vocabulary) - 1 for one in options]).to(torch.int64)
        ordered = torch.where(ordered < ordered.gather(-1, least), -torch.inf, ordered)
        probabilities = torch.softmax(ordered, dim=-1)
        share = column([torch.inf if one.top_p in (None, 1.0) else one.top_p for one in options])
        ordered = torch.where(probabilities.cumsum(-1) - probabilities < share, ordered, -torch.inf)
        logits = ordered.gather(-1, order.argsort(dim=-1))
    if any(one.min_p for one in options):  # p_i < min_p max_j p_j
        shares = column([one.min_p or 0.0 for one in options])
        logits = torch.where(logits < logits.amax(-1, keepdim=True) + shares.log(), -torch.inf, logits)
    # argmax(logits + Gumbel noise) is a sample of softmax(logits).
    return (logits + torch.where(sampled, noise, 0.0)).argmax(-1)
