"""Tokenizers with one face, `Tokenizer`: characters, byte-level byte pairs (GPT-2's kind), those of sentences (byte
pairs or words, for translation), and other files of the `tokenizers` library, which may lose text."""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train.data import DataError
from train.data.text.token_files import END_OF_TEXT
from train.files import read_json, replacing, shown, write_json

log = logging.getLogger(__name__)

FORMAT = "functree characters 1"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)
"""Ids of the tokens that fill up a batch, begin a translation, end a sentence, and replace an unknown word."""
KINDS = {"BPE": "byte pairs", "WordPiece": "WordPiece", "Unigram": "unigram", "WordLevel": "words"}
"""Models of the `tokenizers` library."""
_VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = {chr(byte): byte for byte in _VISIBLE} | {
    chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(_VISIBLE)))
}
"""The byte of each letter in GPT-2's byte pairs: a visible one of Latin-1 stands for itself."""
PROBES = ("A cat.", "the 1st  of\n\n\tJune", "naïve Ünïcode", "你好，世界", "🙂 \u2028")
"""Texts that a tokenizer of any text gives back as they are."""


class Tokenizer(Protocol):
    """Texts to ids and back."""

    vocabulary_size: int
    fingerprint: str  # the same for equal tokenizers, in every process

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        ...

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer to a file, which `load` reads."""
        ...


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
        """Number of characters."""
        return len(self.chars)

    @property
    def fingerprint(self) -> str:
        """Hash of the characters."""
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
        """Write the characters to a JSON file."""
        write_json(path, {"format": FORMAT, "chars": "".join(self.chars)})


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@functools.lru_cache(maxsize=8)
def _table(chars: tuple[str, ...]) -> np.ndarray:
    """The id of each code point, -1 for unknown; the last entry is always -1 and covers all code points beyond."""
    codes = _codes("".join(chars))
    table = np.full(int(codes.max()) + 2, -1, np.int64)
    table[codes] = np.arange(len(chars))
    return table


class BytePairTokenizer:
    """A tokenizer of the `tokenizers` library. Byte-level byte pairs encode any text; for other kinds see `loss_of`.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; truncation, padding and dropout of merges, which a file may carry, are
            switched off.
    """

    def __init__(self, tokenizer: Any):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        self.tokenizer = tokenizer
        # Not the number of tokens: a file may leave ids out.
        self.vocabulary_size = 1 + max(tokenizer.get_vocab().values(), default=-1)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer's JSON."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Raises DataError naming the first character that no UTF-8 has: a lone surrogate.

        special: with the tokens that the tokenizer puts around a text, such as <s>.
        """
        try:
            return self.tokenizer.encode(text, add_special_tokens=special).ids
        except TypeError:
            position = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
            raise DataError(f"character {text[position]!r} at position {position} is no Unicode text") from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, by several threads. Raises DataError as `encode` does."""
        try:
            return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        except TypeError:
            return [self.encode(text) for text in texts]

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

    A sentence is all text, even where it looks like a special token. A word begins with the white space before it, and
    the first word is treated as if it came after a space: so it has the ids that it has elsewhere.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.

    Raises DataError if ids 0 to 3 are different tokens.
    """

    start, end = BOS, EOS

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        if not _is_for_sentences(tokenizer):
            first = [tokenizer.id_to_token(i) for i in range(len(SPECIAL))]
            raise DataError(f"the tokenizer begins with {first}, expected {list(SPECIAL)}")
        tokenizer.encode_special_tokens = True

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
        """The text of each id, special tokens included: labels for the rows and columns of attention.

        Bytes of a character that is in several tokens, as rare Chinese ones are, become `\\xe4\\xbd`; a space alone
        becomes `␣`.
        """
        return [SPECIAL[i] if i <= UNK else self._label(i) for i in _as_list(ids)]

    def _label(self, i: int) -> str:
        text, letters = self.tokenizer.decode([i]), self.tokenizer.id_to_token(i)
        if "\ufffd" in text and all(letter in BYTES for letter in letters):
            text = bytes(BYTES[letter] for letter in letters).decode(errors="backslashreplace")
        return text.strip() or "␣" * bool(text)


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
    sentences: Iterable[str], vocabulary_size: int, words: bool = False, progress: bool = False, min_count: int = 1
) -> SentenceTokenizer:
    """Learn one vocabulary from the sentences of both languages (Sennrich et al. 2016, arXiv:1508.07909, joint BPE).

    Ids are `SPECIAL`, then the 256 bytes and the byte pairs in order of frequency; or, with `words`, the most frequent
    words and punctuation marks, all the rest being <unk>.

    Args:
        vocabulary_size: the largest number of ids.
        min_count: occurrences of a word, at least; rarer ones are <unk>. Default 1.

    Raises DataError if the vocabulary has no room for bytes and special tokens.
    """
    import tokenizers

    least = len(SPECIAL) + (1 if words else 256)
    if vocabulary_size < least:
        raise DataError(f"a vocabulary of {vocabulary_size} is too small: expected at least {least}")
    options = {"vocab_size": vocabulary_size, "special_tokens": list(SPECIAL), "show_progress": progress}
    if words:
        model = tokenizers.models.WordLevel(unk_token=SPECIAL[UNK])
        trainer = tokenizers.trainers.WordLevelTrainer(min_frequency=min_count, **options)
    else:
        model = tokenizers.models.BPE()
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    tokenizer = _byte_level(model, add_prefix_space=True)
    tokenizer.train_from_iterator(sentences, trainer)
    return SentenceTokenizer(tokenizer)


def kind_of(tokenizer: Tokenizer) -> str:
    """The kind in a word or two: characters, byte pairs, words, WordPiece, unigram."""
    if isinstance(tokenizer, CharTokenizer):
        return "characters"
    name = type(tokenizer.tokenizer.model).__name__
    return KINDS.get(name, name)


def loss_of(tokenizer: Tokenizer | None) -> str | None:
    """An example of text that the tokenizer does not give back; None if it reproduces any.

    A space before the first word is no loss. None means the characters of the text itself.
    """
    if tokenizer is None or isinstance(tokenizer, CharTokenizer):
        return None
    for text in PROBES:
        back = tokenizer.decode(tokenizer.encode(text))
        if back.removeprefix(" ") != text:
            return f"'{text}' comes back as '{back}' ({kind_of(tokenizer)})"
    return None


def load(path: str | os.PathLike, lossy: bool = False) -> CharTokenizer | BytePairTokenizer | SentenceTokenizer:
    """Read the file of `save`, or a folder with GPT-2's `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Truncation, padding and dropout of merges that the file carries are switched off and logged.

    Args:
        lossy: accept a tokenizer that does not reproduce every text, such as BERT's WordPiece; `loss_of` has an
            example. Those of sentences, whose unknown words are <unk>, are always accepted.

    Raises DataError: there is no tokenizer; it does not reproduce text.
    """
    path = Path(path)
    tokenizer = _load_folder(path) if path.is_dir() else _load_file(path)
    if not lossy and not isinstance(tokenizer, SentenceTokenizer) and (problem := loss_of(tokenizer)):
        raise DataError(f"the tokenizer of {path} does not reproduce text: {problem}; expected byte-level byte pairs")
    return tokenizer


def _load_file(path: Path) -> CharTokenizer | BytePairTokenizer | SentenceTokenizer:
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
    carried = []
    if tokenizer.truncation:
        carried.append(f"truncation to {tokenizer.truncation['max_length']} tokens")
    if tokenizer.padding:
        carried.append(f"padding to {tokenizer.padding['length'] or 'the longest text'}")
    if getattr(tokenizer.model, "dropout", None):
        carried.append(f"dropout of merges, {tokenizer.model.dropout:.2g}")
    for setting in carried:
        log.warning("%s carries %s, which is switched off", shown(path), setting)
    return SentenceTokenizer(tokenizer) if _is_for_sentences(tokenizer) else BytePairTokenizer(tokenizer)


def _load_folder(folder: Path) -> BytePairTokenizer:
    import tokenizers

    if (folder / "tokenizer.json").is_file():
        return _load_file(folder / "tokenizer.json")
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
