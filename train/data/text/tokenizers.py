"""Tokenizers with one face, `Tokenizer`: characters, byte-level byte pairs (GPT-2's kind), and those of sentences, byte
pairs or words, for translation."""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train.data import DataError
from train.files import read_json, replacing, write_json

FORMAT = "functree characters 1"
END_OF_TEXT = "<|endoftext|>"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)
"""What fills a batch up, begins a translation, ends a sentence, and stands for a word that is not in the vocabulary."""


class Tokenizer(Protocol):
    vocabulary_size: int
    fingerprint: str  # the same for equal tokenizers, in every process

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def save(self, path: str | os.PathLike) -> None: ...


@dataclass(frozen=True)
class CharTokenizer:
    """One token a character; `chars[i]` is the character of id i."""

    chars: tuple[str, ...]

    def __post_init__(self):
        if not self.chars or len(set(self.chars)) != len(self.chars) or any(len(c) != 1 for c in self.chars):
            raise DataError("the vocabulary of a character tokenizer must be single characters, each once")

    @staticmethod
    def from_text(text: str) -> "CharTokenizer":
        """The characters of a text, in order of their code points."""
        return CharTokenizer(tuple(sorted(set(text))))

    @property
    def vocabulary_size(self) -> int:
        return len(self.chars)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([FORMAT, *self.chars]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Raises DataError naming the first character that is not in the vocabulary, and where it is."""
        table, codes = _table(self.chars), _codes(text)
        ids = table[np.minimum(codes, len(table) - 1)]
        unknown = ids < 0
        if unknown.any():
            position = int(unknown.argmax())
            size = self.vocabulary_size
            raise DataError(
                f"character {text[position]!r} at position {position} is not among the {size} of the vocabulary"
            )
        return ids.tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """Raises DataError naming an id outside the vocabulary."""
        ids = _as_list(ids)
        _check_ids(ids, self.vocabulary_size)
        return "".join([self.chars[i] for i in ids])

    def save(self, path: str | os.PathLike) -> None:
        write_json(path, {"format": FORMAT, "chars": "".join(self.chars)})


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@functools.lru_cache(maxsize=8)
def _table(chars: tuple[str, ...]) -> np.ndarray:
    """The id of each code point, -1 for unknown; the last entry is always -1 and stands for all code points beyond."""
    codes = _codes("".join(chars))
    table = np.full(int(codes.max()) + 2, -1, np.int64)
    table[codes] = np.arange(len(chars))
    return table


class BytePairTokenizer:
    """Byte-level byte-pair encoding by the `tokenizers` library; any text can be encoded.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        # Not the number of tokens: a file may leave ids out.
        self.vocabulary_size = 1 + max(tokenizer.get_vocab().values(), default=-1)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Raises DataError naming the first character that no UTF-8 has: a lone surrogate."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            position = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
            raise DataError(f"character {text[position]!r} at position {position} is no Unicode text") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD. Raises DataError naming an id outside the vocabulary."""
        ids = _as_list(ids)
        _check_ids(ids, self.vocabulary_size)
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """The id of a token such as "<|endoftext|>", None if there is no such token."""
        return self.tokenizer.token_to_id(token)

    def save(self, path: str | os.PathLike) -> None:
        """Write the library's own format, `tokenizer.json`."""
        with replacing(path) as temporary:
            temporary.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")


class SentenceTokenizer(BytePairTokenizer):
    """Byte pairs or whole words of sentences, shared by two languages; ids 0 to 3 are `SPECIAL`.

    What a sentence contains is text, even if it looks like a special token. A word begins with the white space before
    it, and the first word is treated as if some stood before it: so it has the ids that it has elsewhere.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.

    Raises DataError if ids 0 to 3 are other tokens.
    """

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        if not _is_for_sentences(tokenizer):
            found = [tokenizer.id_to_token(i) for i in range(len(SPECIAL))]
            raise DataError(f"the tokenizer begins with {found}, expected {list(SPECIAL)}")
        tokenizer.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, by several threads. Raises DataError as `encode` does."""
        try:
            return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        except TypeError:
            return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Without <pad>, <bos> and <eos>; unknown words are written as <unk>. Raises as `BytePairTokenizer.decode`."""
        ids = _as_list(ids)
        _check_ids(ids, self.vocabulary_size)
        known = [[]]
        for i in ids:
            if i == UNK:
                known.append([])
            elif i > UNK:
                known[-1].append(i)
        return " <unk>".join(self.tokenizer.decode(part) for part in known).removeprefix(" ")

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Each id as text, special tokens too: labels for the rows and columns of attention."""
        return [SPECIAL[i] if i <= UNK else self.tokenizer.decode([i]).strip() for i in _as_list(ids)]


def _is_for_sentences(tokenizer: Any) -> bool:
    return all(tokenizer.token_to_id(token) == i for i, token in enumerate(SPECIAL))


def train_byte_pairs(
    texts: Iterable[str], vocabulary_size: int, special: Sequence[str] = (END_OF_TEXT,), progress: bool = False
) -> BytePairTokenizer:
    """Learn byte pairs from texts; ids are the special tokens, the 256 bytes, then the pairs in order of frequency.

    Raises DataError if the vocabulary has no room for the bytes and special tokens.
    """
    import tokenizers

    if vocabulary_size < 256 + len(special):
        raise DataError(f"a vocabulary of {vocabulary_size} is too small: expected at least {256 + len(special)}")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer = _byte_level(tokenizers.models.BPE())
    tokenizer.train_from_iterator(texts, trainer)
    return BytePairTokenizer(tokenizer)


def train_sentences(
    sentences: Iterable[str], vocabulary_size: int, words: bool = False, progress: bool = False
) -> SentenceTokenizer:
    """Learn one vocabulary from the sentences of both languages (Sennrich et al. 2016, arXiv:1508.07909, joint BPE).

    Ids are `SPECIAL`, then the 256 bytes and the byte pairs in order of frequency; or, with `words`, the most frequent
    words and punctuation marks, the others being <unk>.

    Args:
        vocabulary_size: at most so many ids.

    Raises DataError if the vocabulary has no room for bytes and special tokens.
    """
    import tokenizers

    least = len(SPECIAL) + (1 if words else 256)
    if vocabulary_size < least:
        raise DataError(f"a vocabulary of {vocabulary_size} is too small: expected at least {least}")
    options = {"vocab_size": vocabulary_size, "special_tokens": list(SPECIAL), "show_progress": progress}
    if words:
        model = tokenizers.models.WordLevel(unk_token=SPECIAL[UNK])
        trainer = tokenizers.trainers.WordLevelTrainer(**options)
    else:
        model = tokenizers.models.BPE()
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    tokenizer = _byte_level(model, add_prefix_space=True)
    tokenizer.train_from_iterator(sentences, trainer)
    return SentenceTokenizer(tokenizer)


def load(path: str | os.PathLike) -> CharTokenizer | BytePairTokenizer | SentenceTokenizer:
    """Read what `save` wrote, or a folder with GPT-2's `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Raises DataError if there is nothing of the kind.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    try:
        content = read_json(path)
    except ValueError as error:
        raise DataError(f"not a tokenizer: {error}") from None
    if isinstance(content, dict) and content.get("format") == FORMAT and isinstance(content.get("chars"), str):
        return CharTokenizer(tuple(content["chars"]))
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{path} is not a tokenizer: {error}") from None
    return SentenceTokenizer(tokenizer) if _is_for_sentences(tokenizer) else BytePairTokenizer(tokenizer)


def _load_folder(folder: Path) -> BytePairTokenizer:
    import tokenizers

    if (folder / "tokenizer.json").is_file():
        return load(folder / "tokenizer.json")
    files = [folder / "vocab.json", folder / "merges.txt"]
    if not all(file.is_file() for file in files):
        raise DataError(f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json and merges.txt")
    try:
        tokenizer = _byte_level(tokenizers.models.BPE.from_file(*map(str, files)))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"cannot read the tokenizer in {folder}: {error}") from None
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return BytePairTokenizer(tokenizer)


def _byte_level(model: Any, add_prefix_space: bool = False) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _as_list(ids: Any) -> list[int]:
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)


def _check_ids(ids: list[int], size: int) -> None:
    if ids and not (0 <= min(ids) and max(ids) < size):
        bad = next(i for i in ids if not 0 <= i < size)
        raise DataError(f"token id {bad} is outside the vocabulary of {size}")
