import gzip
import logging
from pathlib import Path

import pytest

from tests.train.data.translation.text_files import write
from train.data import DataError
from train.data.fingerprint import fingerprint
from train.data.translation import files as pair_files
from train.data.translation.files import PairFiles, lines, read, sentences
from train.data.translation.sets import open_pairs

GERMAN, ENGLISH = ["eins", "zwei", "drei"], ["one", "two", "three"]


def two(folder: Path) -> PairFiles:
    return PairFiles((folder / "a.de",), (folder / "a.en",))


def files_of(german: list[str], english: list[str]) -> list[tuple[str, str]]:
    return list(zip(german, english, strict=True))


def test_only_a_line_feed_ends_a_line(tmp_path):
    german, english = "\ufeff eins\u2028noch \r\nzwei\x85\nö", "one\r\n two\nthree"
    write(tmp_path, a_de=german, a_en=english)
    assert read(two(tmp_path)) == [("eins\u2028noch", "one"), ("zwei", "two"), ("ö", "three")]


def test_gzipped_files_read_the_same(tmp_path):
    write(tmp_path, a_de=GERMAN, a_en=ENGLISH)
    (tmp_path / "a.de.gz").write_bytes(gzip.compress((tmp_path / "a.de").read_bytes()))
    files = PairFiles((tmp_path / "a.de.gz",), (tmp_path / "a.en",))
    assert list(files) == list(zip(GERMAN, ENGLISH, strict=True))
    assert list(files) == list(files)  # it can be read again
    (tmp_path / "a.de.gz").rename(tmp_path / "b.de")  # whatever its name
    assert list(PairFiles((tmp_path / "b.de",), (tmp_path / "a.en",))) == list(files_of(GERMAN, ENGLISH))
    (tmp_path / "a.de.gz").write_bytes((tmp_path / "b.de").read_bytes()[:-9])
    with pytest.raises(DataError, match="a.de.gz is truncated or garbled after line"):
        list(files)


def test_empty_lines_go_together_with_their_partner_and_are_reported(tmp_path, caplog):
    write(tmp_path, a_de=["eins", "", "drei", "vier"], a_en=["one", "two", " \t", "four"])
    with caplog.at_level(logging.WARNING):
        assert read(two(tmp_path)) == [("eins", "one"), ("vier", "four")]
    assert "a.de and" in caplog.text and "2 lines are empty" in caplog.text
    assert len(list(lines(two(tmp_path)))) == 4 and len(list(two(tmp_path))) == 2


@pytest.mark.parametrize(
    ("german", "english", "message"),
    [
        ([*GERMAN, "vier"], ENGLISH, "a.de has 4 sentences and .*a.en has 3 sentences; expected as many"),
        (GERMAN, ENGLISH[:1], "a.de has 3 sentences and .*a.en has 1 sentences"),
        (b"eins\nzw\xffei\n", ENGLISH, "a.de line 2 is not UTF-8 text: byte 0xff"),
        (None, ENGLISH, "a.de does not exist, expected a file with a sentence per line"),
        ([], [], "there is not one pair of sentences"),
        (["", "zwei"], ["one", ""], "there is not one pair of sentences$"),
        (GERMAN, ["", " ", "\t"], "there is not one pair of sentences, as all of .*a.en is empty"),
        (["", "", ""], ENGLISH, "there is not one pair of sentences, as all of .*a.de is empty"),
        (b"\xff\xfee\x00", ENGLISH, "a.de is UTF-16 text, expected UTF-8"),
    ],
)
def test_bad_files_are_one_line(german, english, message, tmp_path):
    files = {"a_de": german, "a_en": english}
    write(tmp_path, **{name: content for name, content in files.items() if content is not None})
    with pytest.raises(DataError, match=message) as caught:
        read(two(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_where_a_file_should_be(tmp_path):
    write(tmp_path, a_en=ENGLISH)
    (tmp_path / "a.de").mkdir()
    with pytest.raises(DataError, match="a.de is a folder, expected a file with a sentence per line"):
        read(two(tmp_path))


def test_every_so_many_are_held_back(tmp_path):
    write(tmp_path, a_de=[str(i) for i in range(10)], a_en=[str(i) for i in range(10)])
    files = two(tmp_path)
    train, held = (PairFiles(files.sources, files.targets, every=4, held=held) for held in (False, True))
    assert [s for s, _ in held] == ["3", "7"]
    assert [s for s, _ in train] == ["0", "1", "2", "4", "5", "6", "8", "9"]
    assert len({fingerprint(part) for part in (files, train, held)}) == 3


def test_fingerprint_is_of_the_content(tmp_path):
    write(tmp_path, a_de=GERMAN, a_en=ENGLISH)
    before = fingerprint(two(tmp_path))
    assert fingerprint(two(tmp_path)) == before
    write(tmp_path, a_en=[*ENGLISH[:2], "four"])
    assert fingerprint(two(tmp_path)) != before
    pairs = list(two(tmp_path))
    assert fingerprint(pairs) == fingerprint(tuple(pairs)) != fingerprint(pairs[:2])
    (tmp_path / "a.de").unlink()
    with pytest.raises(DataError, match="a.de does not exist"):
        fingerprint(two(tmp_path))


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ([], [("eins", "one"), ("zwei", "two")]),
        (["de\ten"], [("eins", "one"), ("zwei", "two")]),
        (["en\tde"], [("one", "eins"), ("two", "zwei")]),
    ],
)
def test_tsv(first, expected, tmp_path):
    write(tmp_path, a_tsv=[*first, "eins \tone\tnoch etwas", "zwei\ttwo"])
    assert list(pair_files.table(tmp_path / "a.tsv", "de", "en")) == expected
    if first:
        flipped = [(target, source) for source, target in expected]
        assert list(pair_files.table(tmp_path / "a.tsv", "en", "de")) == flipped


def test_lines_that_cannot_be_read_are_left_empty_and_named(tmp_path, caplog):
    lines_of = [f"satz {i}".encode() for i in range(30)]
    lines_of[3] = b"sch\xf6n"
    write(tmp_path, a_de=b"\n".join(lines_of) + b"\n", a_en=[f"sentence {i}" for i in range(30)])
    pairs = list(two(tmp_path))
    assert len(pairs) == 29 and pairs[3] == ("satz 4", "sentence 4")
    assert sentences(tmp_path / "a.de")[2:5] == ["satz 2", "", "satz 4"]
    assert caplog.text.count("a.de: 1 lines are left empty; line 4 is not UTF-8 text: byte 0xf6") == 1
    table = [f"{i}\t{i}!" for i in range(30)]
    table[7] = "no tab"
    write(tmp_path, a_tsv=table)
    assert len(list(pair_files.table(tmp_path / "a.tsv", "de", "en"))) == 29
    assert "a.tsv: 1 lines are left empty; line 8 has 1 columns, expected at least 2" in caplog.text


def test_a_segment_that_cannot_be_read_keeps_its_number(tmp_path):
    segments = [f'<seg id="{i}"> satz {i} </seg>\n'.encode() for i in range(30)]
    segments[3] = b'<seg id="3"> sch\xf6n </seg>\n'
    (tmp_path / "a.sgm").write_bytes(b"<doc>\n" + b"".join(segments))
    write(tmp_path, a_en=[f"sentence {i}" for i in range(30)])
    pairs = list(PairFiles((tmp_path / "a.sgm",), (tmp_path / "a.en",)))
    assert pairs[2:4] == [("satz 2", "sentence 2"), ("satz 4", "sentence 4")] and len(pairs) == 29


def test_a_long_file_of_another_encoding_is_refused_early(tmp_path):
    (tmp_path / "a.de").write_bytes(b"sch\xf6n\n" * 100_000)
    reader = iter(pair_files._decoded(tmp_path / "a.de"))
    with pytest.raises(DataError, match=r"a.de line 1 is not UTF-8 text: byte 0xf6 \(and 999 more lines\)"):
        for _ in range(1001):
            next(reader)


def test_a_header_is_no_pair(tmp_path):
    for header in ("German\tEnglish", "source\ttarget"):
        write(tmp_path, a_tsv=[header, "eins\tone", "zwei\ttwo"])
        files = pair_files.table(tmp_path / "a.tsv", "de", "en")
        assert list(files) == [("eins", "one"), ("zwei", "two")] and files.header


def test_a_table_with_one_empty_column(tmp_path):
    write(tmp_path, a_tsv=[f"{i}\t" for i in range(200)])
    with pytest.raises(DataError, match="there is not one pair of sentences, as all of column 2 of .*a.tsv is empty"):
        open_pairs(str(tmp_path / "a.tsv"))


def test_bad_tsv(tmp_path):
    write(tmp_path, a_tsv=["eins\tone", "", "zwei"], b_tsv=["de\tfr\ten-US", "a\tb\tc"])
    with pytest.raises(DataError, match="a.tsv line 3 has 1 columns, expected at least 2"):
        list(pair_files.table(tmp_path / "a.tsv", "de", "en"))
    with pytest.raises(DataError, match="b.tsv: no pair of languages de-en; there are de, fr, en-US"):
        pair_files.table(tmp_path / "b.tsv", "de", "en")


TABLES = {
    "a.csv": 'question,"the answer",note\n"a ""b"", c","d\ne",x\nf,g,\n',
    "a.jsonl": '{"question": "a \\"b\\", c", "the answer": "d\\ne"}\n\n{"id": 3, "the answer": "g", "question": "f"}\n',
    "a.json": '[{"question": "a \\"b\\", c", "the answer": "d\\ne"},\n {"question": "f", "the answer": "g"}]',
}


@pytest.mark.parametrize("name", TABLES)
def test_named_columns_of_tables(name, tmp_path):
    (tmp_path / name).write_text(TABLES[name], encoding="utf-8")
    files = pair_files.table(tmp_path / name, "Question", "the answer")
    assert list(files) == [('a "b", c', "d\ne"), ("f", "g")]
    with pytest.raises(DataError, match=r"no columns 'article' and 'summary'; there are question, the answer"):
        pair_files.table(tmp_path / name, "article", "summary")


def test_json_without_known_keys(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": "eins", "y": 1}\n{"x": "zwei", "y": 2.5}\n', encoding="utf-8")
    assert list(pair_files.table(tmp_path / "a.jsonl", "source", "target")) == [("eins", "1"), ("zwei", "2.5")]
    (tmp_path / "b.jsonl").write_text('["eins", "one"]\n["zwei", "two"]\n', encoding="utf-8")
    assert list(pair_files.table(tmp_path / "b.jsonl", "source", "target")) == [("eins", "one"), ("zwei", "two")]
    (tmp_path / "c.jsonl").write_text('{"x": "eins", "y": "1", "z": "2"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="c.jsonl: no keys 'source' and 'target'; there are x, y, z"):
        pair_files.table(tmp_path / "c.jsonl", "source", "target")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"de": "eins", "en": "one"', "is no JSON: Expecting ',' delimiter at character 28"),
        ('{"de": "eins"}', "has no 'de' and 'en'; there are de"),
        ('{"de": null, "en": "one"}', "has null instead of a text"),
        ('["eins", "one"]', "has no 'de' and 'en'"),
        ('"eins"', "is no JSON object"),
        ('{"de": "\\ud83d", "en": "one"}', "is no Unicode text"),
    ],
)
def test_json_lines_that_cannot_be_used_are_named(line, fault, tmp_path, caplog):
    whole = [f'{{"de": "satz {i}", "en": "sentence {i}"}}' for i in range(29)]
    write(tmp_path, a_jsonl=[*whole[:7], line, *whole[7:]])
    assert len(list(pair_files.table(tmp_path / "a.jsonl", "de", "en"))) == 29
    assert f"a.jsonl: 1 lines are left empty; line 8 {fault}" in caplog.text
    write(tmp_path, b_jsonl=[line, *whole[:3]])
    with pytest.raises(DataError, match="b.jsonl"):
        list(pair_files.table(tmp_path / "b.jsonl", "de", "en"))


def test_blocks_are_held_out_together(tmp_path):
    write(tmp_path, a_tsv=[f"{i}\t{i}!" for i in range(100)])
    data = open_pairs(str(tmp_path / "a.tsv"), every=5, block=4)
    assert [int(source) for source, _ in data.validation] == [i for i in range(100) if i // 4 % 5 == 4]
    assert not set(data.train) & set(data.validation) and len(list(data.train)) == 80
    write(tmp_path, b_tsv=[f"{i}\t{i}!" for i in range(12)])  # too few for blocks of four
    assert open_pairs(str(tmp_path / "b.tsv"), every=5, block=4).validation == [("8", "8!"), ("9", "9!")]
