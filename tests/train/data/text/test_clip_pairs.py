"""CLIP's tokenizer against that of transformers, on files of all three kinds."""

import gzip
import json

import pytest
import transformers

from train.data import DataError
from train.data.text import clip_pairs
from train.data.text.tokenizers import BYTES

TEXTS = (
    "a photo of a cat",
    "A  red SEVEN\tleft of\n3 blue threes!",
    "it's 1999: naïve Ünïcode, isn't it?",
    "你好，世界 🙂",
    "x < y... (z)",
    "",
)


@pytest.fixture(scope="module")
def trained():
    return clip_pairs.train_clip_pairs(TEXTS * 3, 560)


def merges_of(tokenizer):
    return [tuple(pair) for pair in json.loads(tokenizer.tokenizer.to_str())["model"]["merges"]]


def published(folder, tokenizer):
    """transformers' tokenizer with the same vocabulary; its files in the folder."""
    vocabulary = tokenizer.tokenizer.get_vocab()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges_of(tokenizer))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return transformers.CLIPTokenizer(vocabulary, merges_of(tokenizer))


def rows(tokenizer, texts, context=77):
    tokens, cut = clip_pairs.encode(tokenizer, texts, context)
    ends = (tokens == tokenizer.token_id(clip_pairs.END)).long().argmax(1)
    return [row[: end + 1].tolist() for row, end in zip(tokens, ends, strict=True)], cut


def test_equals_transformers(trained, tmp_path):
    theirs = published(tmp_path, trained)
    expected = theirs(list(TEXTS))["input_ids"]
    assert rows(trained, TEXTS)[0] == expected
    assert rows(clip_pairs.load(tmp_path), TEXTS)[0] == expected  # vocab.json and merges.txt
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert rows(clip_pairs.load(tmp_path), TEXTS)[0] == expected
    cut, flags = rows(trained, TEXTS, 6)
    assert cut == theirs(list(TEXTS), truncation=True, max_length=6)["input_ids"]
    assert flags == [len(row) > 6 for row in expected]


def test_openai_file(trained, tmp_path):
    content = "\n".join(["#version: 0.2", *map(" ".join, merges_of(trained))])
    with gzip.open(tmp_path / clip_pairs.OPENAI[0], "wb") as file:
        file.write(content.encode())
    loaded = clip_pairs.load(tmp_path)
    assert loaded.fingerprint == trained.fingerprint and loaded.vocabulary_size == trained.vocabulary_size
    (tmp_path / clip_pairs.OPENAI[0]).write_bytes(b"garbled")
    with pytest.raises(DataError, match="bpe_simple_vocab_16e6.txt.gz is truncated or garbled"):
        clip_pairs.load(tmp_path)


def test_learned_pieces(trained):
    size, letters = trained.vocabulary_size, [*BYTES, *(letter + "</w>" for letter in BYTES)]
    assert 514 < size <= 560
    names = [trained.tokenizer.id_to_token(i) for i in range(size)]
    assert names[:512] == letters and names[-2:] == [clip_pairs.START, clip_pairs.END]
    assert clip_pairs.train_clip_pairs(TEXTS[::-1] * 3, 560).fingerprint == trained.fingerprint
    with pytest.raises(DataError, match="a vocabulary of 100 is too small: expected at least 514"):
        clip_pairs.train_clip_pairs(TEXTS, 100)


def test_a_text_is_all_text(trained, tmp_path):
    """The name of a special token ends no text, and half a surrogate pair is no error."""
    (row, broken), _ = rows(trained, ["a <|endoftext|> b", "a \ud83d b"])
    assert len(row) > 8 and broken == rows(trained, ["a \ufffd b"])[0][0]
    published(tmp_path, trained).save_pretrained(tmp_path)
    assert rows(clip_pairs.load(tmp_path), ["a <|endoftext|> b"])[0][0] == row


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="no tokenizer in .*: expected tokenizer.json, vocab.json and merges.txt, or"):
        clip_pairs.load(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(DataError, match="has no <|startoftext|>; expected CLIP's byte pairs"):
        clip_pairs.load(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(DataError, match="cannot read the tokenizer in"):
        clip_pairs.load(tmp_path)
