"""Sentence pairs as token ids: made once, kept on disk, read by memory map."""

import hashlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.data import DataError
from train.data.text.token_files import TokenFile, open_tokens, write_tokens
from train.data.text.tokenizers import SentenceTokenizer
from train.data.translation.files import Pairs, fingerprint, lines, name_of, report_empty
from train.files import read_json, replacing, write_json

log = logging.getLogger(__name__)

FORMAT = "functree corpus 1"
CHUNK = 4096  # pairs that are tokenized in one call


@dataclass(frozen=True)
class Corpus:
    """Token ids of sentence pairs, without <bos> and <eos>.

    Attributes:
        tokens: the ids of the first source, the first target, the second source ...
        lengths: (count, 2) int32, how many ids source and target have.
        starts: (count, 2) int64, where they begin in `tokens`.
        empty: how many further pairs were left out because a side is empty.
    """

    tokens: TokenFile
    lengths: np.ndarray
    starts: np.ndarray
    empty: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int, side: int) -> list[int]:
        """The ids of one sentence; side 0 is the source, 1 the target."""
        start = self.starts[index, side]
        return self.tokens.ids[start : start + self.lengths[index, side]].tolist()


def open_corpus(
    pairs: Pairs, tokenizer: SentenceTokenizer, cache: str | os.PathLike | None = None, progress: bool = True
) -> Corpus:
    """Pairs as token ids; those with an empty side are left out, counted and logged.

    Args:
        cache: folder in which they are kept, under a name made from the tokenizer's and the pairs' fingerprints, so
            that next time they are only mapped. None keeps them in memory.

    Raises DataError as `parallel.lines` does, or if no pair is left.
    """
    if cache is None:
        ids, lengths, empty = [], [], 0
        for chunk, measured, left_out in _encoded(pairs, tokenizer, progress):
            ids.append(np.asarray(chunk, np.uint32))
            lengths.append(measured)
            empty += left_out
        found = _corpus(TokenFile(np.concatenate(ids), tokenizer.fingerprint), np.concatenate(lengths), empty)
    else:
        key = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint} {fingerprint(pairs)}".encode()).hexdigest()
        folder = Path(cache) / f"pairs-{key[:16]}"
        found = _opened(folder, tokenizer) or _written(folder, pairs, tokenizer, progress)
    report_empty(pairs, found.empty)
    if not len(found):
        raise DataError(f"{name_of(pairs)}: there is not one pair of sentences")
    return found


def of_sentences(sentences: Sequence[str], tokenizer: SentenceTokenizer, longest: int) -> Corpus:
    """Sentences to translate, with empty targets; an empty sentence stays one.

    Args:
        longest: how many tokens the network has positions for, <eos> among them.

    Raises DataError naming the first sentence that is longer.
    """
    encoded = tokenizer.encode_batch(sentences)
    for number, (sentence, ids) in enumerate(zip(sentences, encoded, strict=True), 1):
        if len(ids) + 1 > longest:
            shown = sentence if len(sentence) <= 60 else sentence[:57] + "..."
            raise DataError(
                f"sentence {number} has {len(ids) + 1} tokens, the network positions for {longest}: '{shown}'"
            )
    ids = np.fromiter(itertools.chain.from_iterable(encoded), np.uint32)
    lengths = np.array([(len(i), 0) for i in encoded], np.int32).reshape(-1, 2)
    return _corpus(TokenFile(ids, tokenizer.fingerprint), lengths, 0)


def _encoded(pairs: Pairs, tokenizer: SentenceTokenizer, progress: bool) -> Iterator[tuple[list[int], np.ndarray, int]]:
    """(ids, lengths (count, 2), pairs left out) of one chunk after the other, at least one."""
    from rich.progress import Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("tokenizing, {task.completed} pairs"))
    remaining = lines(pairs)
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("", total=None)
        while True:
            chunk = list(itertools.islice(remaining, CHUNK))
            kept = [pair for pair in chunk if all(pair)]
            encoded = tokenizer.encode_batch(list(itertools.chain.from_iterable(kept)))
            lengths = np.array([len(ids) for ids in encoded], np.int32).reshape(-1, 2)
            yield list(itertools.chain.from_iterable(encoded)), lengths, len(chunk) - len(kept)
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
        for ids, measured, left_out in _encoded(pairs, tokenizer, progress):
            lengths.append(measured)
            empty += left_out
            yield ids

    tokens = write_tokens(folder / "tokens", chunks(), tokenizer)
    together = np.concatenate(lengths)
    with replacing(folder / "lengths.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, together)
    # Last, so that a corpus of which this is there is whole.
    write_json(folder / "corpus.json", {"format": FORMAT, "pairs": len(together), "empty": empty})
    return _corpus(tokens, together, empty)


def _opened(folder: Path, tokenizer: SentenceTokenizer) -> Corpus | None:
    """What `_written` wrote, None if there is nothing, or nothing whole."""
    if not (folder / "corpus.json").exists():
        return None
    try:
        about = read_json(folder / "corpus.json")
        tokens, lengths = open_tokens(folder / "tokens", tokenizer), np.load(folder / "lengths.npy")
        if lengths.shape != (about["pairs"], 2) or int(lengths.sum(dtype=np.int64)) != len(tokens):
            raise ValueError("its lengths are those of another corpus")
        return _corpus(tokens, lengths, about["empty"])
    except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
        log.warning("the tokenized corpus %s is damaged (%s); it is made anew", folder, error)
        return None
