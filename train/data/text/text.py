"""Text and its tokens: embedded text, the text of a path, the part held out, windows and lanes for language models."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from core import random
from train.data import DataError
from train.data.file_tree import Skipped
from train.data.text import sets
from train.data.text.files import read_text, survey
from train.data.text.token_files import Blocks, TokenFile, open_tokens, separator, tokenize_to_file
from train.files import shown

if TYPE_CHECKING:
    import os

    from train.data.text.tokenizers import Tokenizer

log = logging.getLogger(__name__)

Tokens = TypeVar("Tokens", Tensor, TokenFile)

RULE = re.compile(r"(?=.*([-=*~^\"])\1\1)[\s|+\-=*~^\"]*")
"""A line that is only a rule of a table, or of a heading."""


def embedded_text() -> str:
    """Half a million characters of English that every Python brings along: the help texts of its language reference,
    without the rules of their tables and headings.

    The same for one Python version, slightly different from version to version.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"
    return "\n".join(line for line in text.split("\n") if not RULE.fullmatch(line))


class Text(NamedTuple):
    """The tokens of a text and their tokenizer; the number of `characters`, the `files` (none for the embedded text or
    a stream), and the files that were `skipped`, with the reason."""

    tokens: Tensor | TokenFile
    tokenizer: "Tokenizer"
    name: str
    characters: int
    files: tuple[Path, ...] = ()
    skipped: tuple[Skipped, ...] = ()


def open_text(
    path: "str | os.PathLike | None",
    tokenizer: "Tokenizer | Callable[[Iterable[str]], Tokenizer] | None",
    cache: "str | os.PathLike",
    progress: bool = True,
    lossy: bool = False,
) -> Text:
    """The tokens of a file, plain or gzipped, of all text files below a folder in sorted order, of a stream such as
    /dev/stdin, of a text of `sets.TEXTS` by its name, of `docstrings.corpus()` as "docstrings", or of the embedded text
    if `path` is None.

    Between two files of a folder comes the end-of-text token, or a blank line if the tokenizer has none.

    Args:
        tokenizer: None for the characters of the text itself; or a function that learns one from the texts.
        cache: folder in which byte pairs are stored, under a name made from the fingerprints of text and tokenizer, so
            that the next run only maps them. Of a stream or the embedded text nothing is stored.
        lossy: accept a tokenizer that does not reproduce every text, such as one of words; one that is learned may.

    Raises DataError: there is no text, it cannot be downloaded, it is not UTF-8, or the tokenizer cannot reproduce it.
    """
    from train.data.text.tokenizers import CharTokenizer, loss_of

    problem = None if lossy or callable(tokenizer) else loss_of(tokenizer)
    if problem:
        raise DataError(f"the tokenizer does not reproduce text: {problem}; expected byte-level byte pairs")
    if path is None:
        return _in_memory(embedded_text(), tokenizer, "embedded: the language reference of Python")
    path, name = Path(path), shown(path)
    if not path.exists() and str(path) == "docstrings":
        from train.data.text.docstrings import corpus

        return _in_memory(corpus(), tokenizer, "docstrings of Python's standard library, and its language reference")
    if not path.exists() and str(path) in sets.TEXTS:
        name = f"{path} ({sets.TEXTS[str(path)].about})"
        path = sets.fetch_text(str(path))
    if not path.exists():
        known = ", ".join(["docstrings", *sets.TEXTS])
        raise DataError(f"{path} does not exist, expected a text file, a folder of them, or one of {known}")
    if not path.is_file() and not path.is_dir():
        return _in_memory(read_text(path, minimum=2), tokenizer, name)
    files = survey(path)
    if files.characters < 2:
        raise DataError(f"{path} has {files.characters} characters, expected at least 2")
    about = (name, files.characters, files.paths, files.skipped)
    if callable(tokenizer):
        tokenizer = tokenizer(read_text(file) for file in files.paths)
    if tokenizer is None or isinstance(tokenizer, CharTokenizer):
        text = separator(tokenizer).join(read_text(file) for file in files.paths)
        return Text(*_in_memory(text, tokenizer, "")[:2], *about)
    stem = path.resolve().stem
    stored = Path(cache) / f"{stem}-{files.digest[:16]}-{tokenizer.fingerprint[:8]}.tokens"
    tokens = None
    if stored.exists():
        try:
            tokens = open_tokens(stored, tokenizer)
        except DataError as error:
            log.warning("the tokenized text is damaged, and made anew: %s", error)
    if tokens is None:
        tokens = tokenize_to_file(files.paths, tokenizer, stored, progress=progress)
    return Text(tokens, tokenizer, *about)


def _in_memory(text: str, tokenizer: "Tokenizer | Callable | None", name: str) -> Text:
    from train.data.text.tokenizers import CharTokenizer

    tokenizer = CharTokenizer.from_text(text) if tokenizer is None else tokenizer
    tokenizer = tokenizer([text]) if callable(tokenizer) else tokenizer
    return Text(torch.tensor(tokenizer.encode(text), dtype=torch.int64), tokenizer, name, len(text))


def facts(text: Text, train: Any = None, validation: Any = None) -> dict[str, Any]:
    """Names and values of a text and its two parts, for `train.data.understood`."""
    from train.data.text.tokenizers import UNK, SentenceTokenizer, kind_of

    out: dict[str, Any] = {"text": text.name, "characters": text.characters}
    if len(text.files) > 1:
        out["files"] = list(text.files)
    out |= {"tokenizer": kind_of(text.tokenizer), "vocabulary": text.tokenizer.vocabulary_size}
    if train is not None and validation is not None:
        out |= {"training tokens": len(train), "validation tokens": len(validation)}
    else:
        out["tokens"] = len(text.tokens)
    if isinstance(text.tokenizer, SentenceTokenizer) and kind_of(text.tokenizer) == "words":
        counts = token_counts(text.tokens if validation is None else validation, text.tokenizer.vocabulary_size)
        out["<unk>"] = (
            f"{float(counts[UNK] / counts.sum()):.1%} of the {'' if validation is None else 'validation '}tokens"
        )
    return out | {"skipped": list(text.skipped)}


def split(
    tokens: Tokens, validation: float = 0.1, blocks: int = 10, least: int = 256
) -> tuple[Tokens | Blocks, Tokens | Blocks]:
    """(training part, validation part): the last tenth, or the share `validation`, of each of `blocks` equal stretches.

    So both parts come from all over the text, which may be sorted; neighbours are in different parts only at the
    blocks' borders. `blocks=1` holds out the end of the text, as nanoGPT does with tiny Shakespeare.

    Args:
        least: tokens that a held-out block has at least; a short text is divided into fewer stretches.
    """
    if not 0 < validation < 1 or blocks < 1:
        raise DataError(
            f"the validation part is {validation} of the tokens in {blocks} blocks, "
            "expected a number between 0 and 1 and at least 1 block"
        )
    count = len(tokens)
    for stretches in range(min(blocks, int(count * validation) // least), 1, -1):
        stretch = count // stretches
        size = int(stretch * (1 - validation))  # of the training part of a stretch
        rest = count % stretches  # tokens at the end, which belong to training
        if 0 < size < stretch and rest <= size:
            return (
                _blocks(tokens, 0, size, stretch, size * stretches + rest),
                _blocks(tokens, size, stretch - size, stretch, (stretch - size) * stretches),
            )
    cut = int(count * (1 - validation))
    return tokens[:cut], tokens[cut:]


def _blocks(tokens: Tokens, first: int, size: int, period: int, count: int) -> Tensor | Blocks:
    if isinstance(tokens, TokenFile):
        return Blocks(tokens, first, size, period, count)
    i = torch.arange(count, device=tokens.device)
    return tokens[first + i // size * period + i % size]


def unigram_entropy(
    train: Tensor | TokenFile | Blocks, validation: Tensor | TokenFile | Blocks, vocabulary: int | None = None
) -> float:
    """Cross-entropy of the validation part under the training part's token frequencies, in nats per token: the baseline
    of a model that sees no context.

    -1/M sum_j log p(v_j), p(w) = (n_w + 1) / (N + V), where n_w counts w among the N training tokens.

    Args:
        vocabulary: V; one more than the largest id if None. The 1 keeps a token that training lacks from being
            impossible.
    """
    if not len(train) or not len(validation):
        raise DataError(f"no entropy of {len(validation)} tokens by the frequencies of {len(train)}")
    counts = [token_counts(tokens, vocabulary or 0) for tokens in (train, validation)]
    size = max(map(len, counts))
    n, m = (torch.nn.functional.pad(c, (0, size - len(c))).double() for c in counts)
    log_p = (n + 1).log() - math.log(float(n.sum()) + size)
    return float(-(m * log_p).sum() / m.sum())


def commonest_share(train: Tensor | TokenFile | Blocks, validation: Tensor | TokenFile | Blocks) -> float:
    """Share of the validation part's tokens that are the commonest token of the training part: how often who always
    guesses it is right."""
    counts, commonest = token_counts(validation), int(token_counts(train).argmax())
    return float(counts[commonest] / counts.sum()) if commonest < len(counts) else 0.0


def token_counts(
    tokens: Tensor | TokenFile | Blocks, vocabulary: int = 0, *, chunk: int = 1 << 20, most: int = 64
) -> Tensor:
    """Counts of the ids (vocabulary or more,), int64: in all chunks, or in about `most` of them at equal distances if
    there are more."""
    starts = range(0, len(tokens), chunk)
    starts = starts[:: max(1, len(starts) // most)]
    total = torch.zeros(vocabulary, dtype=torch.int64)
    for start in starts:
        part = tokens[torch.arange(start, min(start + chunk, len(tokens)))].cpu().long()
        count = torch.bincount(part, minlength=len(total))
        count[: len(total)] += total
        total = count
    return total


def token_batch(tokens: Tensor | TokenFile, key: Tensor, step: int | Tensor, batch: int, length: int) -> tuple:
    """Random windows and the tokens that follow each position; a pure function of key and step.

    Args:
        tokens: (count,) integers, or a TokenFile.
        key: (2,). Window starts are uniform, of the key `fold_in(key, step)`.

    Returns:
        inputs (batch, length) and targets (batch, length), int64, on the tokens' device (the CPU for a TokenFile);
        targets[i, t] is the token after inputs[i, t].

    Raises DataError if there are not `length + 1` tokens.
    """
    _check(tokens, batch, length)
    starts = random.randint(random.fold_in(key, step), (batch,), 0, len(tokens) - length, dtype=torch.int64)
    return _windows_at(tokens, starts, length)


def token_batches(
    tokens: Tensor | TokenFile, key: Tensor, steps: range, batch: int, length: int, block: int = 128
) -> Iterator[tuple[Tensor, Tensor]]:
    """`token_batch` of each step; the starts of `block` steps are computed in one call, which is faster."""
    _check(tokens, batch, length)
    for first in range(steps.start, steps.stop, block):
        several = torch.arange(first, min(first + block, steps.stop), device=key.device)
        starts = random.randint(random.fold_in(key, several), (batch,), 0, len(tokens) - length, dtype=torch.int64)
        for row in starts.unbind(0):
            yield _windows_at(tokens, row, length)


def _windows_at(tokens: Tensor | TokenFile, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    starts = starts.to(getattr(tokens, "device", "cpu"))
    window = tokens[starts[:, None] + torch.arange(length + 1, device=starts.device)].long()  # (batch, length + 1)
    return window[:, :-1], window[:, 1:]  # each (batch, length)


def lane_batch(
    tokens: Tensor | TokenFile | Blocks, step: int | Tensor, batch: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows that continue those of the step before, for a net that carries a state; a pure function of the step.

    The tokens are cut into `batch` lanes of n = count // batch tokens, one after the other (the rest of the text is not
    used). Step t reads positions [t length, (t + 1) length) of each lane, modulo the `lane_steps` of a pass; up to
    `length` tokens at the end of a lane fill no window and are not read as inputs.

    A lane is one stretch of the tokens as they are. Where these are joined, from several files or from the training
    blocks of `split`, a window may cross the joint, and the state is carried over it: 9 joints for 10 blocks.

    Args:
        tokens: (count,) integers, or those in a file.

    Returns:
        inputs (batch, length) and targets (batch, length) as in `token_batch`, and fresh (batch,) bool, on the same
        device: True at the first step of a pass, where the state must begin anew (`train.carry.reset`).

    Raises DataError if a lane has not `length + 1` tokens.
    """
    steps, position = lane_steps(tokens, batch, length), int(step)
    starts = torch.arange(batch) * (len(tokens) // batch) + position % steps * length  # (batch,)
    inputs, targets = _windows_at(tokens, starts, length)
    return inputs, targets, torch.full((batch,), position % steps == 0, device=inputs.device)


def lane_steps(tokens: Tensor | TokenFile | Blocks, batch: int, length: int) -> int:
    """Steps of one pass of `lane_batch`: (count // batch - 1) // length. Raises DataError as there."""
    _check(tokens, batch, length)
    lane = len(tokens) // batch
    if lane <= length:
        raise DataError(
            f"{len(tokens)} tokens in {batch} lanes are {lane} each, too few for windows of {length}: "
            f"expected at least {batch * (length + 1)}"
        )
    return (lane - 1) // length


def windows(tokens: Tensor | TokenFile, length: int, batch: int, whole: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive windows for evaluation: (inputs, targets) pairs, int64, in which no token is a target twice.

    Args:
        tokens: (count,) integers, or a TokenFile.
        whole: every token but the first is a target once: the last pair of full windows has fewer than `batch` rows,
            and the tokens that fill no window come as one pair (1, rest). If False only pairs (batch, length) come, so
            that a compiled function sees one shape.

    Raises DataError if there are not `length + 1` tokens, or no pair because `whole` is False.
    """
    _check(tokens, batch, length)
    count = (len(tokens) - 1) // length
    if not whole and count < batch:
        raise DataError(f"{len(tokens)} tokens make {count} windows of {length}, expected at least {batch}")
    for first in range(0, count if whole else count // batch * batch, batch):
        rows = min(batch, count - first)
        start = torch.arange(first, first + rows, device=getattr(tokens, "device", "cpu")) * length
        window = tokens[start[:, None] + torch.arange(length + 1, device=start.device)].long()  # (rows, length + 1)
        yield window[:, :-1], window[:, 1:]
    rest = torch.arange(count * length, len(tokens), device=getattr(tokens, "device", "cpu"))
    if whole and len(rest) > 1:
        window = tokens[rest[None]].long()
        yield window[:, :-1], window[:, 1:]


def _check(tokens: Tensor | TokenFile, batch: int, length: int) -> None:
    if batch < 1 or length < 1:
        raise DataError(f"cannot make batches of {batch} windows of {length} tokens")
    if len(tokens) <= length:
        raise DataError(f"{len(tokens)} tokens are too few for windows of {length}: expected at least {length + 1}")
