import json

import numpy as np
import pytest
import torch

from core import random
from train.data import DataError
from train.data.text import text as text_module
from train.data.text import token_files, tokenizers
from train.data.text.text import (
    commonest_share,
    embedded_text,
    open_text,
    read_text,
    split,
    token_batch,
    token_batches,
    unigram_entropy,
    windows,
)

KEY = random.key(1)


def test_embedded_text_is_long_english():
    text = embedded_text()
    assert len(text) > 300_000 and text == embedded_text()
    assert text.count(" the ") > 3000 and len(set(text)) < 200


def test_read_text_keeps_the_text_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo \xc3\xbc\n")
    assert read_text(tmp_path / "a.txt", minimum=11) == "one\r\ntwo ü\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist, expected a text file"),
        ("folder", "is a folder, expected a text file"),
        (b"", "is empty, expected at least 1"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"abc", "has 3 characters, expected at least 10"),
        (b"abc\xffdef", "is not UTF-8 text: byte 0xff at offset 3"),
        (b"\xef\xbb\xbfab\xc3", "is not UTF-8 text: byte 0xc3 at offset 5"),
    ],
)
def test_bad_text_is_one_line(content, message, tmp_path):
    path = tmp_path / "input.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_text(path, minimum=10 if content == b"abc" else 1)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_split_as_nanogpt_does():
    train, validation = split(torch.arange(1_115_394), blocks=1)
    assert (len(train), len(validation)) == (1_003_854, 111_540)  # nanoGPT's numbers for tiny Shakespeare
    assert train[-1] + 1 == validation[0]
    with pytest.raises(DataError, match="validation part is 1"):
        split(torch.arange(9), 1)
    with pytest.raises(DataError, match="in 0 blocks"):
        split(torch.arange(9), blocks=0)


def as_file(ids: torch.Tensor, path) -> token_files.TokenFile:
    vocabulary = tokenizers.CharTokenizer(tuple(map(chr, range(50_000))))
    return token_files.write_tokens(path, [ids.tolist()], vocabulary)


@pytest.mark.parametrize("count", [26_000, 26_009, 30_000])
@pytest.mark.parametrize("kind", ["tensor", "file"])
def test_the_validation_part_is_spread_over_the_text(kind, count, tmp_path):
    tokens = torch.arange(count) if kind == "tensor" else as_file(torch.arange(count), tmp_path / "t")
    train, validation = (part[torch.arange(len(part))] for part in split(tokens))
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(count))  # each token in one part
    starts = (validation.diff() != 1).nonzero()[:, 0] + 1
    blocks = validation.tensor_split(starts)
    stretch = count // 10
    assert len(blocks) == 10 and {len(block) for block in blocks} == {stretch - int(stretch * 0.9)}
    assert [int(block[-1]) + 1 for block in blocks] == [stretch * (i + 1) for i in range(10)]
    assert (train.diff() > 0).all() and int(train[-1]) == count - 1 - (count % 10 == 0) * len(blocks[0])


def test_short_texts_have_fewer_blocks(tmp_path):
    def blocks(count, **options):
        _, validation = split(torch.arange(count), **options)
        return 1 + int((validation.diff() != 1).sum())

    assert [blocks(n) for n in (100, 2560, 5120, 12_800, 10**6)] == [1, 1, 2, 5, 10]
    assert blocks(12_800, least=1280) == 1 and blocks(100, least=1) == 10 and blocks(10**6, blocks=50) == 50
    for count in range(1, 120):
        for share in (0.1, 0.5, 0.9):
            parts = split(torch.arange(count), share, least=1)
            assert torch.equal(torch.cat(parts).sort().values, torch.arange(count))


def test_a_file_in_blocks_gives_the_batches_of_the_tensor(tmp_path):
    tokens = torch.arange(30_000) % 97
    for a, b in zip(split(tokens), split(as_file(tokens, tmp_path / "t")), strict=True):
        assert len(a) == len(b) and torch.equal(b[10:20], a[10:20])
        for x, y in ((token_batch(a, KEY, 3, 5, 40), token_batch(b, KEY, 3, 5, 40)),):
            assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
        for x, y in zip(windows(a, 100, 8), windows(b, 100, 8), strict=True):
            assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])


def test_parts_of_the_embedded_text_are_alike():
    """Why the end of a text flatters: under the frequencies of the rest it is 0.06 nats per character easier."""
    tokens = open_text(None, None, "nowhere").tokens
    spread, tail = (unigram_entropy(*split(tokens, blocks=blocks)) for blocks in (10, 1))
    whole = unigram_entropy(tokens, tokens)
    assert abs(spread - whole) < 0.02 < abs(tail - whole)


@pytest.mark.parametrize("kind", ["tensor", "file"])
def test_unigram_entropy(kind, tmp_path):
    train, validation = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 3])
    if kind == "file":
        train, validation = (as_file(x, tmp_path / str(len(x))) for x in (train, validation))
    expected = -np.log(np.array([4, 3, 1]) / (6 + 4)).mean()
    assert unigram_entropy(train, validation) == pytest.approx(expected, rel=1e-12)
    expected = -np.log(np.array([4, 3, 1]) / (6 + 100)).mean()
    assert unigram_entropy(train, validation, 100) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(DataError, match="no entropy of 0 tokens"):
        unigram_entropy(train, validation[:0])
    assert commonest_share(train, validation) == pytest.approx(1 / 3)
    assert commonest_share(validation, train) == pytest.approx(1 / 2)  # the first of those that are as common


def test_unigram_entropy_of_many_tokens_is_of_a_sample(monkeypatch):
    tokens = torch.arange(10**6) % 10
    full = text_module.token_counts(tokens, 12, chunk=1000, most=10**6)
    assert full.tolist() == [100_000] * 10 + [0, 0]
    sampled = text_module.token_counts(tokens, 12, chunk=1000, most=50)
    assert sampled.tolist() == [5000] * 10 + [0, 0]


@pytest.fixture(params=["tensor", "file"])
def numbers(request, tmp_path):
    """0, 1, 2 ... 99, in memory or in a file."""
    if request.param == "tensor":
        return torch.arange(100, dtype=torch.int32)
    vocabulary = tokenizers.CharTokenizer(tuple(map(chr, range(200))))
    return token_files.write_tokens(tmp_path / "t.bin", iter([list(range(60)), list(range(60, 100))]), vocabulary)


def test_token_batch_is_a_function_of_key_and_step(numbers):
    inputs, targets = token_batch(numbers, KEY, 3, batch=64, length=8)
    assert inputs.shape == targets.shape == (64, 8) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)
    starts = random.randint(random.fold_in(KEY, 3), (64,), 0, 92, dtype=torch.int64)
    assert torch.equal(inputs[:, 0], starts)
    assert torch.equal(inputs, token_batch(numbers, KEY, torch.tensor(3), 64, 8)[0])
    assert not torch.equal(inputs, token_batch(numbers, KEY, 4, 64, 8)[0])


def test_token_batch_reaches_both_ends(numbers):
    inputs, targets = token_batch(numbers, KEY, 0, batch=2000, length=97)
    assert inputs.min() == 0 and targets.max() == 99


@pytest.mark.parametrize(("length", "batch"), [(7, 4), (9, 3), (99, 2), (33, 1)])
def test_windows_make_each_token_a_target_once(numbers, length, batch):
    pairs = list(windows(numbers, length, batch))
    assert all(torch.equal(x + 1, y) for x, y in pairs)
    assert torch.equal(torch.cat([y.flatten() for _, y in pairs]), torch.arange(1, 100))
    full = [x.shape for x, _ in windows(numbers, length, batch, whole=False)] if 99 // length >= batch else []
    assert set(full) <= {(batch, length)} and len(full) == 99 // length // batch


def test_too_few_tokens():
    for read in (lambda t: token_batch(t, KEY, 0, 2, 8), lambda t: list(windows(t, 8, 2))):
        with pytest.raises(DataError, match="8 tokens are too few for windows of 8: expected at least 9"):
            read(torch.arange(8))
    with pytest.raises(DataError, match="make 1 windows of 8, expected at least 2"):
        list(windows(torch.arange(10), 8, 2, whole=False))


TEXT = "Two words,  more\n\nspaces \t here.\n It's naïve — 你好\u3000世界 \n\n" * 40 + "end"


def make_tokenizer(kind: str) -> tokenizers.Tokenizer:
    if kind == "characters":
        return tokenizers.CharTokenizer.from_text(TEXT)
    return tokenizers.train_byte_pairs([TEXT], 320)


@pytest.mark.parametrize("kind", ["characters", "byte pairs"])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 20])
def test_a_file_tokenized_in_pieces_equals_the_whole(kind, chunk_bytes, tmp_path):
    tokenizer = make_tokenizer(kind)
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    written = token_files.tokenize_to_file(
        tmp_path / "text.txt", tokenizer, tmp_path / "text.bin", chunk_bytes=chunk_bytes, progress=False
    )
    assert written[torch.arange(len(written))].tolist() == tokenizer.encode(TEXT)
    assert len(token_files.open_tokens(tmp_path / "text.bin", tokenizer)) == len(written)
    assert written.ids.dtype == np.uint16 and len(split(written)[1]) > 0


def test_non_utf8_in_a_later_piece_gives_its_offset(tmp_path):
    (tmp_path / "text.txt").write_bytes("ä".encode() * 50 + b" \xfe")
    with pytest.raises(DataError, match="byte 0xfe at offset 101"):
        token_files.tokenize_to_file(
            tmp_path / "text.txt", make_tokenizer("byte pairs"), tmp_path / "out", chunk_bytes=3, progress=False
        )
    assert not (tmp_path / "out").exists() and [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_large_vocabularies_take_four_bytes(tmp_path):
    big = tokenizers.CharTokenizer(tuple(map(chr, range(0x20000, 0x20000 + 2**16 + 1))))
    written = token_files.write_tokens(tmp_path / "t", iter([[2**16, 0]]), big)
    assert written.ids.dtype == np.uint32 and written[torch.tensor([[0], [1]])].tolist() == [[2**16], [0]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "cannot read .*: No such file"),
        (lambda p: p.write_bytes(b"\0" * 700), "does not begin with our header"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "has 711 bytes, expected 712 for 100 tokens"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"tokens 1", b"tokens 9")), "says 'functree tokens 9'"),
        (lambda p: p.write_text(json.dumps([1]).ljust(600)), "does not begin with our header"),
    ],
)
def test_damaged_token_file(damage, message, tmp_path):
    tokenizer = make_tokenizer("characters")
    token_files.write_tokens(tmp_path / "t.bin", iter([[0] * 100]), tokenizer)
    damage(tmp_path / "t.bin")
    with pytest.raises(DataError, match=message):
        token_files.open_tokens(tmp_path / "t.bin")


def test_token_file_of_another_tokenizer(tmp_path):
    token_files.write_tokens(tmp_path / "t.bin", iter([[0]]), make_tokenizer("characters"))
    with pytest.raises(DataError, match="was made with another tokenizer"):
        token_files.open_tokens(tmp_path / "t.bin", make_tokenizer("byte pairs"))


def test_token_batches_are_those_of_each_step():
    tokens = torch.arange(200)
    several = list(token_batches(tokens, KEY, range(3, 12), 4, 6, block=4))
    assert len(several) == 9
    for step, (inputs, targets) in enumerate(several, 3):
        expected = token_batch(tokens, KEY, step, 4, 6)
        assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])


def test_tokens_of_keeps_byte_pairs_on_disk(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("one two three two one " * 40, encoding="utf-8")
    pairs = tokenizers.train_byte_pairs([path.read_text()], 270)
    first, used = token_files.tokens_of(path, pairs, tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    written = stored.stat().st_mtime_ns
    again, _ = token_files.tokens_of(path, pairs, tmp_path / "cache")
    assert used is pairs and stored.stat().st_mtime_ns == written
    everything = torch.arange(len(first))
    assert first[everything].tolist() == again[everything].tolist() == pairs.encode(path.read_text())
    characters, by_characters = token_files.tokens_of(path, None, tmp_path / "cache")
    assert by_characters.decode(characters) == path.read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_tokenizer_learned_from_the_texts(kind, tmp_path):
    """Words with an <unk>, which a tokenizer given from outside may have with `lossy` alone."""
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"some words and some words, {name}\n" * 9, encoding="utf-8")
    path = tmp_path / "texts" / ("a.txt" if kind == "file" else "")

    def learn(texts):
        return tokenizers.train_sentences(texts, 9, words=True)

    def ids(data):
        return data.tokens[torch.arange(len(data.tokens))].long()

    data = open_text(path, learn, cache=tmp_path)
    assert data.tokenizer.vocabulary_size == 9 and data.tokenizer.decode(ids(data)[:2]) == "some words"
    assert (ids(data) == tokenizers.UNK).any()
    with pytest.raises(DataError, match="does not reproduce text: .*<unk>"):
        open_text(path, data.tokenizer, cache=tmp_path)
    assert torch.equal(ids(open_text(path, data.tokenizer, cache=tmp_path, lossy=True)), ids(data))
