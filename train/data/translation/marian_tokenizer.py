"""The tokenizer of published Marian models: source.spm cuts a sentence into pieces, vocab.json has the ids of those of
both languages."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from train.data import DataError
from train.data.text import sentencepiece
from train.data.text.sentencepiece import SPACE
from train.files import read_json

END, UNKNOWN, PADDING = SPECIAL = ("</s>", "<unk>", "<pad>")


class MarianTokenizer:
    """Sentences of the source language to ids, ids to sentences of the target language.

    Of a model with several target languages, a sentence begins with the code of one of them, as in ">>fra<< A cat.".

    Args:
        source: a `tokenizers.Tokenizer` that cuts sentences into pieces.
        ids: {piece: id}.

    Raises DataError if one of `SPECIAL` has no id.
    """

    def __init__(self, source: Any, ids: dict[str, int]):
        missing = [token for token in SPECIAL if token not in ids]
        if missing:
            raise DataError(f"the vocabulary has no {missing[0]}; expected {', '.join(SPECIAL)} and pieces")
        self.source, self.ids = source, ids
        self.pieces = {i: piece for piece, i in ids.items()}
        self.vocabulary_size = 1 + max(self.pieces)

    @property
    def fingerprint(self) -> str:
        """Hash of the pieces and their ids."""
        return hashlib.sha256(json.dumps([self.source.to_str(), self.ids]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Without </s>. Raises DataError: no Unicode text."""
        code, text = _divided(text)
        try:
            pieces = self.source.encode(text, add_special_tokens=False).tokens
        except TypeError:
            raise DataError("it has a lone surrogate, which is no Unicode text") from None
        return [self.ids.get(piece, self.ids[UNKNOWN]) for piece in (*code, *pieces)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Without `SPECIAL`. Raises DataError naming an id outside the vocabulary."""
        pieces = [piece for piece in self.tokens(ids) if piece not in SPECIAL]
        return "".join(pieces).replace(SPACE, " ").strip()

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The piece of each id. Raises as `decode`."""
        for i in ids:
            if i not in self.pieces:
                raise DataError(f"token id {i} is outside the vocabulary of {self.vocabulary_size}")
        return [self.pieces[i] for i in ids]


def _divided(text: str) -> tuple[list[str], str]:
    """(the code of a language, if the text begins with one, the rest of the text)."""
    end = text.find("<<")
    if text.startswith(">>") and end >= 0:
        return [text[: end + 2]], text[end + 2 :]
    return [], text


def load(source: str | os.PathLike, vocabulary: str | os.PathLike) -> MarianTokenizer:
    """The tokenizer of a source.spm and a vocab.json.

    Raises DataError: one of them is another file. ValueError: the second is no JSON.
    """
    ids = read_json(vocabulary)
    if not isinstance(ids, dict) or not ids or not all(type(i) is int and i >= 0 for i in ids.values()):
        raise DataError(f"{vocabulary} is not a vocabulary: expected pieces with their ids")
    return MarianTokenizer(sentencepiece.load(source), ids)
