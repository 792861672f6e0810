"""CLIP's tokenizer: byte pairs of lower-case words that end with `</w>`, and a token before and after each text.

Radford et al. 2021 (arXiv:2103.00020), section 2.4; Sennrich et al. 2016 (arXiv:1508.07909).
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from train.data import DataError
from train.data.text import ragged, tokenizers
from train.data.text.tokenizers import BYTES, BytePairTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
"""End of a word's last piece."""
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""Words of OpenAI's tokenizer: letters, single digits, other characters."""
OPENAI = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt")
LETTERS = (*BYTES, *(letter + SUFFIX for letter in BYTES))
MERGES = 49152 - 256 - 2
"""Merges of OpenAI's file that count; more are in it."""
SURROGATES = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
"""Halves of characters alone, as JSON and bytes of a command line that are no UTF-8 bring."""


def train_clip_pairs(texts: Iterable[str], vocabulary_size: int) -> BytePairTokenizer:
    """Learn CLIP's byte pairs from texts; the largest ids are `START` and `END`.

    Raises DataError: the vocabulary has no room for the bytes, alone and at the end of a word.
    """
    import tokenizers as library

    if vocabulary_size < len(LETTERS) + 2:
        raise DataError(f"a vocabulary of {vocabulary_size} is too small: expected at least {len(LETTERS) + 2}")
    learner = _parts(library.models.BPE(end_of_word_suffix=SUFFIX))
    # Ties go by the number of a letter, which the trainer gives in an order that varies: so number them.
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary_size - 2, special_tokens=[*LETTERS], end_of_word_suffix=SUFFIX, show_progress=False
    )
    learner.train_from_iterator((text.translate(SURROGATES) for text in texts), trainer)
    return _of_merges([tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]])


def load(folder: str | Path) -> BytePairTokenizer:
    """The tokenizer of published weights: `tokenizer.json`, or `vocab.json` and `merges.txt`, or OpenAI's `OPENAI`.

    Raises DataError: there is none; it is damaged, or not CLIP's.
    """
    import tokenizers as library

    folder = Path(folder)
    openai = next((folder / name for name in OPENAI if (folder / name).is_file()), None)
    files = [folder / "vocab.json", folder / "merges.txt"]
    if (folder / "tokenizer.json").is_file():
        return _checked(tokenizers.load(folder / "tokenizer.json", lossy=True), folder)
    if all(file.is_file() for file in files):
        try:
            model = library.models.BPE.from_file(*map(str, files), end_of_word_suffix=SUFFIX, unk_token=END)
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"cannot read the tokenizer in {folder}: {error}") from None
        return _checked(BytePairTokenizer(_parts(model)), folder)
    if openai is None:
        raise DataError(f"no tokenizer in {folder}: expected tokenizer.json, vocab.json and merges.txt, or {OPENAI[0]}")
    try:
        content = openai.read_bytes()
        content = gzip.decompress(content) if openai.suffix == ".gz" else content
        lines = content.decode("utf-8").split("\n")[1 : MERGES + 1]  # after the version
        return _of_merges([(first, second) for first, second in (line.split() for line in lines if line)])
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise DataError(f"{openai} is truncated or garbled: {error}") from None


def _parts(model: Any) -> Any:
    """A tokenizer of the library with this model, and the rest of CLIP's."""
    import tokenizers as library
    from tokenizers import decoders, normalizers, pre_tokenizers

    out = library.Tokenizer(model)
    clean = [normalizers.NFC(), normalizers.Replace(library.Regex(r"\s+"), " "), normalizers.Lowercase()]
    out.normalizer = normalizers.Sequence(clean)
    words = pre_tokenizers.Split(library.Regex(PATTERN), behavior="removed", invert=True)
    out.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    out.decoder = decoders.ByteLevel()
    return out


def _of_merges(merges: Sequence[tuple[str, str]]) -> BytePairTokenizer:
    """The ids of OpenAI's tokenizer: letters, letters that end a word, merges in order, `START`, `END`."""
    import tokenizers as library

    tokens = [*LETTERS, *map("".join, merges), START, END]
    model = library.models.BPE(
        {token: i for i, token in enumerate(dict.fromkeys(tokens))}, [*merges], end_of_word_suffix=SUFFIX, unk_token=END
    )
    return BytePairTokenizer(_parts(model))


def _checked(tokenizer: BytePairTokenizer, folder: Path) -> BytePairTokenizer:
    missing = [token for token in (START, END) if tokenizer.token_id(token) is None]
    if missing:
        raise DataError(f"the tokenizer in {folder} has no {missing[0]}; expected CLIP's byte pairs")
    tokenizer.tokenizer.encode_special_tokens = True  # a caption is all text
    return tokenizer


def encode(tokenizer: BytePairTokenizer, texts: Sequence[str], context: int) -> tuple[Tensor, list[bool]]:
    """(tokens (texts, longest of them), filled up with 0; True for each text that was cut to `context` tokens).

    Each text is between `START` and `END`, which stay where it is cut.
    """
    start, end = (tokenizer.token_id(token) for token in (START, END))
    rows = tokenizer.encode_batch([text.translate(SURROGATES) for text in texts])
    tokens, _ = ragged.padded([[start, *row[: context - 2], end] for row in rows])
    return tokens, [len(row) > context - 2 for row in rows]
