"""Files of text: packed, in folders, from streams, in other encodings, and cut into pieces."""

import gzip
import io
import os
import threading
import time
import types

import pytest
import torch

from train.data import DataError
from train.data.text import files as text_files
from train.data.text.files import decoded, lines_of, read_text, survey, whole_words
from train.data.text.text import embedded_text, facts, open_text, split
from train.data.text.token_files import separator
from train.data.text.tokenizers import CharTokenizer, train_byte_pairs

TEXT = "Ein Satz über Bäume.\nA second line, 你好。\n" * 50


@pytest.fixture(scope="module")
def byte_pairs():
    return train_byte_pairs([TEXT], 300)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a"])
@pytest.mark.parametrize("kind", ["characters", "byte pairs"])
def test_a_gzipped_file_is_read_whatever_its_name(name, kind, byte_pairs, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(b"\xef\xbb\xbf" + TEXT.encode()))
    assert read_text(tmp_path / name) == TEXT and "".join(decoded(tmp_path / name, 7)) == TEXT
    text = open_text(tmp_path / name, byte_pairs if kind == "byte pairs" else None, tmp_path / "cache", progress=False)
    assert text.tokenizer.decode(text.tokens[torch.arange(len(text.tokens))]) == TEXT
    assert text.characters == len(TEXT) and text.files == (tmp_path / name,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(TEXT.encode(), mtime=0)[:-9], "is truncated or garbled"),
        (gzip.compress(b"abc\xff", mtime=0), "is not UTF-8 text: byte 0xff at offset 3"),
        (gzip.compress(b"", mtime=0), "is empty, expected at least 1"),
        (b"PK\x03\x04 more", "is a zip archive, expected plain or gzipped text: unpack it first"),
        (b"BZh91AY&SY", "is packed by bzip2"),
        (b"\xfd7zXZ\0", "is packed by xz"),
        (b"\x28\xb5\x2f\xfd", "is packed by zstd"),
        ("text".encode("utf-16"), "is UTF-16 text, expected UTF-8"),
        (b"x", "has 1 characters, expected at least 2"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["characters", "byte pairs"])
def test_files_that_are_no_text(content, message, tokenizer, byte_pairs, tmp_path):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=f"a.bin {message}") as caught:
        open_text(tmp_path / "a.bin", byte_pairs if tokenizer == "byte pairs" else None, tmp_path, progress=False)
    assert "\n" not in str(caught.value)


def test_plain_text_that_begins_as_an_archive_does(tmp_path):
    (tmp_path / "a.txt").write_text("BZh is how it begins")
    assert read_text(tmp_path / "a.txt") == "BZh is how it begins"


def write_folder(folder):
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("second\n")
    (folder / "a.md").write_text("first")
    (folder / "deep" / "c.gz").write_bytes(gzip.compress(b"third"))
    (folder / "latin1.txt").write_bytes("schön".encode("latin-1"))
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "zeros.bin").write_bytes(b"a\0b")
    (folder / "empty.txt").write_text("")
    (folder / ".hidden.txt").write_text("no")
    return folder


@pytest.mark.parametrize("kind", ["characters", "byte pairs"])
def test_a_folder_is_all_its_text_files_in_order(kind, byte_pairs, tmp_path, caplog):
    folder = write_folder(tmp_path / "texts")
    text = open_text(folder, byte_pairs if kind == "byte pairs" else None, tmp_path / "cache", progress=False)
    between = "\n\n" if kind == "characters" else "<|endoftext|>"
    whole = f"first{between}second\n{between}third"
    assert text.tokenizer.decode(text.tokens[torch.arange(len(text.tokens))]) == whole
    if kind == "byte pairs":
        assert (text.tokens[torch.arange(len(text.tokens))] == byte_pairs.token_id("<|endoftext|>")).sum() == 2
    assert [path.name for path in text.files] == ["a.md", "b.txt", "c.gz"] and text.characters == 17
    assert {path.name: reason for path, reason in text.skipped} == {
        "latin1.txt": "is not UTF-8 text: byte 0xf6 at offset 3",
        "picture.png": "is not UTF-8 text: byte 0x89 at offset 0",
        "zeros.bin": "has NUL bytes, expected text",
        "empty.txt": "is empty, expected at least 1 character",
    }
    assert not caplog.records  # the facts say it
    known = facts(text, *split(torch.arange(100), 0.2))
    assert known["files"] == list(text.files) and known["skipped"] == list(text.skipped)
    assert (known["training tokens"], known["validation tokens"], known["tokenizer"]) == (80, 20, kind)


def test_a_folder_without_text(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"no text file in .* \(.*a.png is not UTF-8 text"):
        survey(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no text file in .*empty$"):
        survey(tmp_path / "empty")


def test_a_folder_that_moved_is_not_tokenized_again(byte_pairs, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "texts")
    first = open_text(folder, byte_pairs, tmp_path / "cache", progress=False).tokens
    folder.rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "texts2")
    (tmp_path / "far").mkdir()
    (tmp_path / "texts2").rename(tmp_path / "far" / "texts")
    monkeypatch.setattr("train.data.text.text.tokenize_to_file", None)
    assert open_text(tmp_path / "far" / "texts", byte_pairs, tmp_path / "cache").tokens.digest == first.digest


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["characters", "byte pairs"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_a_stream_is_read_once(packed, kind, byte_pairs, tmp_path):
    """A pipe, as /dev/stdin and <(command) are: it has no size, and nothing in it comes twice."""
    os.mkfifo(tmp_path / "pipe")
    content = gzip.compress(TEXT.encode()) if packed else TEXT.encode()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    text = open_text(tmp_path / "pipe", byte_pairs if kind == "byte pairs" else None, tmp_path / "cache")
    writer.join()
    assert text.tokenizer.decode(text.tokens) == TEXT and text.files == () and text.characters == len(TEXT)
    assert not (tmp_path / "cache").exists()


def test_a_damaged_token_file_is_made_anew(byte_pairs, tmp_path, caplog):
    (tmp_path / "a.txt").write_text(TEXT)
    first = open_text(tmp_path / "a.txt", byte_pairs, tmp_path / "cache", progress=False).tokens
    (stored,) = (tmp_path / "cache").iterdir()
    stored.write_bytes(stored.read_bytes()[:-3])
    again = open_text(tmp_path / "a.txt", byte_pairs, tmp_path / "cache", progress=False).tokens
    assert again.digest == first.digest and len(again) == len(first)
    assert "damaged" in caplog.text and str(stored) in caplog.text


def test_the_embedded_text_has_no_rules_of_tables(byte_pairs):
    text = open_text(None, None, "nowhere")
    assert text.files == () and text.characters == len(embedded_text()) > 400_000
    lines = embedded_text().split("\n")
    assert not [line for line in lines if len(line) > 3 and set(line) <= set("-=*~+| ") and line.strip()]
    assert sum(len(line) for line in lines if line.count("-") > len(line) / 2) < 200  # of 450,000 characters
    assert open_text(None, byte_pairs, "nowhere").tokenizer is byte_pairs


def test_a_character_tokenizer_of_another_text(tmp_path):
    (tmp_path / "a.txt").write_text("abx")
    with pytest.raises(DataError, match="'x' at position 2"):
        open_text(tmp_path / "a.txt", CharTokenizer(("a", "b")), tmp_path)
    assert separator(CharTokenizer(("a",))) == separator(None) == "\n\n"


# Pieces.


CHINESE = "请把这本书放在桌子上，然后告诉我你的名字。" * 20


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("text", [TEXT, CHINESE, "a" * 200, "a. " * 30, "x\n\ny   z", "", "…" * 50])
def test_pieces_are_the_text(text, size):
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    pieces = list(whole_words(chunks, longest=60))
    assert "".join(pieces) == text and all(pieces) and all(len(piece) <= 60 + size for piece in pieces)


def test_pieces_end_before_white_space_or_a_mark():
    pieces = list(whole_words([TEXT[i : i + 30] for i in range(0, len(TEXT), 30)]))
    assert len(pieces) > 20 and all(piece[0] in " \n" for piece in pieces[1:])
    assert all(piece[-1].isalnum() or piece[0] == " " for piece in pieces[:-1])
    pieces = list(whole_words([CHINESE[i : i + 30] for i in range(0, len(CHINESE), 30)]))
    assert len(pieces) > 10 and all(piece[0] in "，。" for piece in pieces[1:])
    assert list(whole_words(["one two.", "\n\nthree"])) == ["one", " two.\n\nthree"]  # ".\n\n" is one token of GPT-4's
    assert list(whole_words(["aaa", "bbb"])) == ["aaabbb"]


@pytest.mark.parametrize("text", [CHINESE, "请把这本书放在桌子上" * 50], ids=["marks", "neither"])
def test_text_without_white_space_takes_linear_time(text):
    """If it were quadratic, each of 4096 chunks would search and copy all before it: 10^10 characters."""
    chunk = (text * 20)[:1000]
    started = time.process_time()
    pieces = list(whole_words([chunk] * 4096))
    assert time.process_time() - started < 10 and sum(map(len, pieces)) == 4096 * 1000
    assert max(map(len, pieces)) <= text_files.LONGEST + 1000


def test_chinese_in_pieces_has_the_tokens_of_the_whole(tmp_path):
    tokenizer = train_byte_pairs([CHINESE], 400)
    whole = tokenizer.encode(CHINESE)
    pieces = whole_words([CHINESE[i : i + 40] for i in range(0, len(CHINESE), 40)])
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == whole


def test_lines_of_texts_files_and_standard_input(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ncaf\xe9\r\n")
    assert list(lines_of((), tmp_path / "a.txt")) == ["one", "", "caf\xe9"]
    assert list(lines_of(["two", "\udcff"], None)) == ["two", "\ufffd"]
    content = io.BytesIO(b"\xef\xbb\xbfone\r\n\xff\n")
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=content))
    lines = lines_of((), None)
    assert next(lines) == "one" and content.tell() == 8  # each as it comes
    assert list(lines) == ["\ufffd"]
    with pytest.raises(ValueError, match="there are texts and a --file"):
        list(lines_of(["two"], tmp_path / "a.txt"))
