"""Sentence pairs as token ids: tokenized once, stored on disk, read by memory map."""

import hashlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from train.data import DataError
from train.data.fingerprint import fingerprint
from train.data.text.token_files import TokenFile, open_tokens, write_tokens
from train.data.text.tokenizers import BOS, EOS, SentenceTokenizer
from train.data.translation.files import Pair, Pairs, lines, name_of, no_pairs, report_empty
from train.files import read_json, replacing, shown, write_json

log = logging.getLogger(__name__)

FORMAT = "functree corpus 1"
CHUNK = 4096  # pairs that are tokenized in one call
SHORT = 60  # characters of a sentence in a message


@dataclass(frozen=True)
class Corpus:
    """Token ids of sentence pairs, without the ones before and after a sentence.

    Attributes:
        tokens: the ids of the first source, the first target, the second source ...
        lengths: (count, 2) int32, the number of ids of source and target.
        starts: (count, 2) int64, their positions in `tokens`.
        first: id before a target, of the tokenizer.
        last: id after each side.
        empty: number of further pairs that were left out because a side is empty.
        left_out: indices of the pairs that were too long (`open_corpus`), or of the sentences that were left empty
            (`of_sentences`).
        notes: one line per reason for which pairs were left out.
    """

    tokens: TokenFile
    lengths: np.ndarray
    starts: np.ndarray
    empty: int = 0
    left_out: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    first: int = BOS
    last: int = EOS

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int, side: int) -> list[int]:
        """The ids of one sentence; side 0 is the source, 1 the target."""
        start = self.starts[index, side]
        return self.tokens.ids[start : start + self.lengths[index, side]].tolist()


def open_corpus(
    pairs: Pairs,
    tokenizer: SentenceTokenizer,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
    longest: int | None = None,
) -> Corpus:
    """Pairs as token ids; those with an empty side, or too long, are left out, counted and logged.

    Args:
        cache: folder in which they are stored, under a name made from the tokenizer's and the pairs' fingerprints, so
            that next time they are only mapped. None keeps them in memory.
        longest: the network's positions, as in `exceeds`; None keeps pairs of any length.

    Raises DataError as `files.lines` does, or if no pair is left.
    """
    if cache is None:
        ids, lengths, empty = [], [], 0
        for chunk, chunk_lengths, chunk_empty in _encoded(pairs, tokenizer, progress):
            ids.append(np.asarray(chunk, np.uint32))
            lengths.append(chunk_lengths)
            empty += chunk_empty
        corpus = _corpus(TokenFile(np.concatenate(ids), tokenizer.fingerprint), np.concatenate(lengths), empty)
    else:
        key = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint} {fingerprint(pairs)}".encode()).hexdigest()
        folder = Path(cache) / f"pairs-{key[:16]}"
        corpus = _opened(folder, tokenizer) or _written(folder, pairs, tokenizer, progress)
    report_empty(pairs, corpus.empty)
    if not len(corpus):
        raise no_pairs(pairs)
    notes = (f"{corpus.empty:,} pairs with an empty side",) if corpus.empty else ()
    too_long = np.flatnonzero(exceeds(corpus.lengths, longest)) if longest is not None else ()
    if len(too_long):
        first = max((corpus.ids(too_long[0], side) for side in (0, 1)), key=len)
        note = f"{len(too_long):,} pairs with over {longest} tokens, such as '{_short(tokenizer.decode(first))}'"
        log.warning("%s: %s are left out", shown(name_of(pairs)), note)
        if len(too_long) == len(corpus):
            problem = f"not one of {len(corpus)} pairs has up to {longest} tokens on both sides"
            raise DataError(f"{name_of(pairs)}: {problem}")
        keep = np.setdiff1d(np.arange(len(corpus)), too_long)
        corpus = replace(corpus, lengths=corpus.lengths[keep], starts=corpus.starts[keep])
        notes += (note,)
    ends = {"first": tokenizer.start, "last": tokenizer.end}
    return replace(corpus, left_out=tuple(map(int, too_long)), notes=notes, **ends)


def exceeds(lengths: np.ndarray, longest: int) -> np.ndarray:
    """(count,) True for pairs (count, 2) of which a side has more tokens than `longest`, the network's positions.

    A source has <eos> besides its own tokens, a target either <bos> or <eos>.
    """
    return (lengths + 1).max(1, initial=0) > longest


def fitting(pairs: Sequence[Pair], tokenizer: SentenceTokenizer, longest: int) -> tuple[list[Pair], list[int]]:
    """(the pairs of which neither side is too long, the indices of the rest), by the rule of `open_corpus`."""
    encoded = tokenizer.encode_batch(list(itertools.chain.from_iterable(pairs)))
    too_long = exceeds(np.array([len(ids) for ids in encoded], np.int32).reshape(-1, 2), longest)
    return [pair for pair, bad in zip(pairs, too_long, strict=True) if not bad], np.flatnonzero(too_long).tolist()


def of_sentences(
    sentences: Sequence[str], tokenizer: SentenceTokenizer, longest: int, skip: bool = False, first: int = 1
) -> Corpus:
    """Sentences to translate, with empty targets; an empty sentence stays one.

    Args:
        longest: the network's positions, one of them for <eos>.
        skip: leave a sentence empty that is longer or no Unicode text, log it, and list its index in `left_out`.
        first: the number of the first sentence, for messages.

    Raises DataError naming the first such sentence, unless `skip`.
    """
    encoded, left_out = [], []
    for i, (sentence, ids) in enumerate(zip(sentences, _each_encoded(sentences, tokenizer), strict=True)):
        problem = ids if isinstance(ids, str) else ""
        if not problem and len(ids) + 1 > longest:
            problem = f"has {len(ids) + 1} tokens, the network positions for {longest}"
        if problem and not skip:
            raise DataError(f"sentence {i + first} {problem}: '{_short(sentence)}'")
        if problem:
            log.warning("sentence %d %s; it is left empty: '%s'", i + first, problem, _short(sentence))
            left_out.append(i)
        encoded.append([] if problem else ids)
    ids = np.fromiter(itertools.chain.from_iterable(encoded), np.uint32)
    lengths = np.array([(len(i), 0) for i in encoded], np.int32).reshape(-1, 2)
    corpus = _corpus(TokenFile(ids, tokenizer.fingerprint), lengths, 0)
    notes = (f"{len(left_out):,} sentences, too long or no text",) if left_out else ()
    return replace(corpus, left_out=tuple(left_out), notes=notes)


def _each_encoded(sentences: Sequence[str], tokenizer: SentenceTokenizer) -> list[list[int] | str]:
    """The ids of each sentence, or what is wrong with it."""
    try:
        return tokenizer.encode_batch(sentences)
    except DataError:  # of one of them, which only `encode` tells from the rest
        pass
    encoded: list[list[int] | str] = []
    for sentence in sentences:
        try:
            encoded.append(tokenizer.encode(sentence))
        except DataError as error:
            encoded.append(f"cannot be encoded ({error})")
    return encoded


def _short(sentence: str) -> str:
    return shown(sentence if len(sentence) <= SHORT else sentence[: SHORT - 3] + "...")


def _encoded(pairs: Pairs, tokenizer: SentenceTokenizer, progress: bool) -> Iterator[tuple[list[int], np.ndarray, int]]:
    """(ids, lengths (count, 2), number of pairs with an empty side) per chunk, for at least one chunk."""
    from rich.progress import Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("tokenizing, {task.completed} pairs"))
    remaining = lines(pairs)
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("", total=None)
        while True:
            chunk = list(itertools.islice(remaining, CHUNK))
            whole = [pair for pair in chunk if all(pair)]
            encoded = tokenizer.encode_batch(list(itertools.chain.from_iterable(whole)))
            lengths = np.array([len(ids) for ids in encoded], np.int32).reshape(-1, 2)
            yield list(itertools.chain.from_iterable(encoded)), lengths, len(chunk) - len(whole)
            bar.advance(task, len(chunk))
            if len(chunk) < CHUNK:
                return


def _corpus(tokens: TokenFile, lengths: np.ndarray, empty: int) -> Corpus:
    ends = np.cumsum(lengths, dtype=np.int64).reshape(-1, 2)
    return Corpus(tokens, lengths, ends - lengths, empty)


def _written(folder: Path, pairs: Pairs, tokenizer: SentenceTokenizer, progress: bool) -> Corpus:
    lengths, empty = [], 0

    def chunks() -> Iterator[list[int]]:
        nonlocal empty
        for ids, chunk_lengths, chunk_empty in _encoded(pairs, tokenizer, progress):
            lengths.append(chunk_lengths)
            empty += chunk_empty
            yield ids

    tokens = write_tokens(folder / "tokens", chunks(), tokenizer)
    together = np.concatenate(lengths)
    with replacing(folder / "lengths.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, together)
    # Written last, so that a corpus with this file is whole.
    write_json(folder / "corpus.json", {"format": FORMAT, "pairs": len(together), "empty": empty})
    return _corpus(tokens, together, empty)


def _opened(folder: Path, tokenizer: SentenceTokenizer) -> Corpus | None:
    """The corpus that `_written` stored; None if there is none, or a damaged one."""
    if not (folder / "corpus.json").exists():
        return None
    try:
        about = read_json(folder / "corpus.json")
        tokens, lengths = open_tokens(folder / "tokens", tokenizer), np.load(folder / "lengths.npy")
        if lengths.shape != (about["pairs"], 2) or int(lengths.sum(dtype=np.int64)) != len(tokens):
            raise ValueError("its lengths are those of another corpus")
        return _corpus(tokens, lengths, about["empty"])
    except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
        log.warning("the tokenized corpus %s is damaged (%s); it is made anew", shown(folder), error)
        return None
