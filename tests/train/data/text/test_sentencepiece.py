"""Unigram models of SentencePiece against the library itself; and the files that are refused."""

import pytest

from tests.train.data.text.sentencepiece_files import write_model
from train.data import DataError
from train.data.text import sentencepiece

PIECES = {"<unk>": (0.0, 2), "</s>": (0.0, 3), "▁": -4.0, "▁ab": -1.0, "abc": -1.5, "a": -5.0, "b": -5.5, "c": -6.0}
TEXTS = ["ab", " ab  abc ", "", " ", "cab▁ab", "</s> <unk>", "xy ab東京c", "abcabcc", "ab\nab\tc"]


def test_pieces_equal_the_library(tmp_path):
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    for prefix in (True, False):
        path = write_model(tmp_path / f"{prefix}.spm", PIECES, add_dummy_prefix=prefix)
        ours, theirs = sentencepiece.load(path), library.SentencePieceProcessor(model_file=str(path))
        for text in TEXTS:
            assert ours.encode(text).tokens == theirs.encode(text, out_type=str), (prefix, text)


def test_best_pieces(tmp_path):
    """The greatest sum of scores: ▁ + abc has -5.5, ▁ab + c -7."""
    tokenizer = sentencepiece.load(write_model(tmp_path / "a.spm", PIECES))
    assert tokenizer.encode("abc ab").tokens == ["▁", "abc", "▁ab"]
    assert tokenizer.encode("xy</s>").tokens == ["▁", "xy</s>"]  # unknown text, not the end


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": 2}, "is a bpe model of SentencePiece; expected unigram"),
        ({"escape_whitespaces": False}, "has escape_whitespaces=False; only True is supported"),
        ({"remove_extra_whitespaces": False}, "has remove_extra_whitespaces=False; only True is supported"),
        ({"pieces": PIECES | {"<0x00>": (0.0, 6)}}, "has user-defined or byte pieces"),
        ({"pieces": {}}, "is not a SentencePiece model: it has no pieces"),
    ],
    ids=["bpe", "escape", "white-space", "bytes", "empty"],
)
def test_other_models_are_refused_by_name(options, message, tmp_path):
    path = write_model(tmp_path / "a.spm", **{"pieces": PIECES} | options)
    with pytest.raises(DataError, match=message):
        sentencepiece.load(path)
