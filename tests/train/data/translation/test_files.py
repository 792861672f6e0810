import contextlib
import functools
import gzip
import hashlib
import http.server
import logging
import os
import tarfile
import threading
from pathlib import Path

import pytest

from train.data import DataError
from train.data.translation import files as pair_files
from train.data.translation import sets as pair_sets
from train.data.translation.files import PairFiles, fingerprint, lines, read
from train.data.translation.sets import Download, open_pairs

DATA = os.environ.get("FUNCTREE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="FUNCTREE_DATA does not name a folder with real data sets")

GERMAN, ENGLISH = ["eins", "zwei", "drei"], ["one", "two", "three"]


def write(folder: Path, **files: list[str] | str | bytes) -> Path:
    """Files whose names have _ for the last dot; a list is its lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, end = name.rpartition("_")
        if isinstance(content, list):
            content = "".join(line + "\n" for line in content)
        (folder / f"{stem}.{end}").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def two(folder: Path) -> PairFiles:
    return PairFiles((folder / "a.de",), (folder / "a.en",))


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
    (tmp_path / "a.de.gz").write_bytes((tmp_path / "a.de.gz").read_bytes()[:-9])
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
        (None, ENGLISH, "a.de does not exist, expected a file with a sentence a line"),
        ([], [], "there is not one pair of sentences"),
        (["", "zwei"], ["one", ""], "there is not one pair of sentences"),
    ],
)
def test_bad_files_are_one_line(german, english, message, tmp_path):
    given = {"a_de": german, "a_en": english}
    write(tmp_path, **{name: content for name, content in given.items() if content is not None})
    with pytest.raises(DataError, match=message) as caught:
        read(two(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_where_a_file_should_be(tmp_path):
    write(tmp_path, a_en=ENGLISH)
    (tmp_path / "a.de").mkdir()
    with pytest.raises(DataError, match="cannot read .*a.de: Is a directory"):
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
    assert list(pair_files.tsv(tmp_path / "a.tsv", "de", "en")) == expected
    if first:
        flipped = [(target, source) for source, target in expected]
        assert list(pair_files.tsv(tmp_path / "a.tsv", "en", "de")) == flipped


def test_bad_tsv(tmp_path):
    write(tmp_path, a_tsv=["eins\tone", "", "zwei"], b_tsv=["de\tfr\ten-US", "a\tb\tc"])
    with pytest.raises(DataError, match="a.tsv line 3 has 1 columns, expected at least 2"):
        list(pair_files.tsv(tmp_path / "a.tsv", "de", "en"))
    with pytest.raises(DataError, match="b.tsv: no pair of languages de-en; there are de, fr, en-US"):
        pair_files.tsv(tmp_path / "b.tsv", "de", "en")


NUMBERS = [str(i) for i in range(250)]


def test_a_folder(tmp_path, caplog):
    folder = write(
        tmp_path / "set",
        train_de=GERMAN,
        train_en=ENGLISH,
        train_fr=["un", "deux", "trois"],
        dev_de=GERMAN[:1],
        dev_en=ENGLISH[:1],
        test_2016_de=GERMAN[:2],
        test_2016_en=ENGLISH[:2],
        test_2017_de=GERMAN,
        README_md=["about"],
    )
    found = open_pairs(str(folder))
    assert found.name == "set" and found.languages == ("de", "en")
    assert list(found.train) == list(zip(GERMAN, ENGLISH, strict=True)) and found.validation == [("eins", "one")]
    assert found.tests == {"test_2016": [("eins", "one"), ("zwei", "two")]}
    assert "test_2017: there is only de; this test set is left out" in caplog.text
    assert list(open_pairs(str(folder), "en", "de").train)[1] == ("two", "zwei")
    with pytest.raises(DataError, match="no pair of languages de-it; there are de, en, fr"):
        open_pairs(str(folder), "de", "it")
    write(folder, test_2016_de=[], test_2016_en=[])
    with pytest.raises(DataError, match="test_2016.de and .*test_2016.en: there is not one pair"):
        open_pairs(str(folder))


def test_a_folder_of_tables(tmp_path):
    table = ["de\ten", *(f"{n}\t{n}!" for n in NUMBERS)]
    found = open_pairs(str(write(tmp_path, train_tsv=table, valid_tsv=table[:3], test_tsv=table[:2])))
    assert len(list(found.train)) == 250 and len(found.validation) == 2 and found.tests == {"test": [("0", "0!")]}


@pytest.mark.parametrize("how", ["two", "prefix", "table", "folder"])
def test_own_files_without_validation(how, tmp_path):
    write(tmp_path, train_de=NUMBERS, train_en=NUMBERS, all_tsv=[f"{n}\t{n}" for n in NUMBERS])
    data = {
        "two": f"{tmp_path / 'train.de'},{tmp_path / 'train.en'}",
        "prefix": str(tmp_path / "train"),
        "table": str(tmp_path / "all.tsv"),
        "folder": str(tmp_path),
    }
    found = open_pairs(data[how])
    assert found.validation == [("99", "99"), ("199", "199")] and found.tests == {}
    assert [s for s, _ in found.train] == [n for n in NUMBERS if n not in ("99", "199")]


@pytest.mark.parametrize(
    ("data", "languages", "message"),
    [
        ("nothing", ("de", "en"), "'nothing' does not exist; expected a folder, .* or one of dates, multi30k, iwslt17"),
        ("dates", ("de", "fr"), "dates: no pair of languages de-fr; there are de, en"),
        ("dates", ("de", "de"), "source and target are both de"),
        (
            "iwslt14",
            ("de", "en"),
            "iwslt14 has no published checksum .*unpack https://.*/de-en.tgz and name the folder",
        ),
        ("empty", ("de", "en"), "no train.de and train.en, nor train.tsv, in .*empty"),
        ("few.de,few.en", ("de", "en"), "too few sentences to hold one in 100 back for validation"),
        ("few.de,gone.en", ("de", "en"), "gone.en does not exist"),
    ],
)
def test_what_is_not_there(data, languages, message, tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, few_de=GERMAN, few_en=ENGLISH))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        open_pairs(data, *languages)


def test_the_embedded_pairs():
    found, back = open_pairs("dates"), open_pairs("dates", "en", "de")
    assert (len(found.train), len(found.validation), len(found.tests["test"])) == (10_000, 500, 500)
    assert back.languages == ("en", "de")
    assert [pair[::-1] for pair in back.tests["test"]] == found.tests["test"]


def write_iwslt(folder: Path, year: int) -> Path:
    """The layout of the archives: de-en/train.tags.de-en.de and so on."""
    folder = folder / "de-en"
    folder.mkdir(parents=True)
    for language in ("de", "en"):
        head = f"<url>http://x</url>\n<keywords>a, b</keywords>\n<title>Titel {language}</title>\n"
        extra = "<translator>Anna</translator>\n" if language == "de" else ""
        text = "".join(f" {language} {i} & more \n" for i in range(50))
        (folder / f"train.tags.de-en.{language}").write_text(head + extra + text)
        for part in ("TED.dev2010", "TED.tst2010", "TED.tst2011"):
            segments = "".join(f'<seg id="{i}"> {part} {language} &amp; {i} </seg>\n' for i in (1, 2))
            text = f'<?xml version="1.0"?>\n<mteval>\n<doc>\n{segments}</doc>\n</mteval>\n'
            (folder / f"IWSLT{year}.{part}.de-en.{language}.xml").write_text(text)
    return folder


def test_iwslt17_in_its_own_layout(tmp_path):
    found = open_pairs(str(write_iwslt(tmp_path, 17).parent))
    train = list(found.train)
    assert len(train) == 50 and train[0] == ("de 0 & more", "en 0 & more")
    assert found.validation[0] == ("TED.dev2010 de & 1", "TED.dev2010 en & 1") and len(found.validation) == 2
    assert [s for s, _ in found.tests["test"]] == [f"TED.tst20{y} de & {i}" for y in (10, 11) for i in (1, 2)]
    assert open_pairs(str(tmp_path / "de-en"), "en", "de").tests["test"][0][0] == "TED.tst2010 en & 1"
    with pytest.raises(DataError, match="no pair of languages de-fr; there are de, en"):
        open_pairs(str(tmp_path), "de", "fr")


def test_iwslt14_in_its_own_layout(tmp_path):
    found = open_pairs(str(write_iwslt(tmp_path, 14)))
    assert [s for s, _ in found.validation] == ["de 22 & more", "de 45 & more"] and len(list(found.train)) == 48
    assert len(found.tests["test"]) == 6


def write_wmt14(folder: Path) -> None:
    for name in ("training/europarl-v7.de-en", "commoncrawl.de-en", "training/news-commentary-v9.de-en"):
        for language in ("de", "en"):
            path = folder / f"{name}.{language}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name} {language}\n")
    for prefix in ("dev/newstest2013", "test-full/newstest2014-deen"):
        for language in ("de", "en"):
            for kind in ("src", "ref"):
                path = folder / f"{prefix}-{kind}.{language}.sgm"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f'<srcset>\n<doc>\n<seg id="1">{prefix} {language}</seg>\n</doc>\n</srcset>\n')


def test_wmt14_in_its_own_layout(tmp_path):
    write_wmt14(tmp_path)
    found = open_pairs(str(tmp_path), "en", "de")
    assert [s.split("/")[-1] for s, _ in found.train] == [
        "europarl-v7.de-en en",
        "commoncrawl.de-en en",
        "news-commentary-v9.de-en en",
    ]
    assert found.validation == [("dev/newstest2013 en", "dev/newstest2013 de")]
    assert list(found.tests) == ["newstest2014"]


@contextlib.contextmanager
def serve(folder: Path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def archive(path: Path, folder: Path, names: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as made:
        for name in names:
            made.add(folder / name, name)


def checksum(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """A folder that is served, and whose files are what "multi30k" and "wmt14" should be."""
    served = write(tmp_path / "served", train_de=GERMAN, train_en=ENGLISH, val_de=GERMAN, val_en=ENGLISH)
    files = [Download(f"http://127.0.0.1:9/{p.name}", checksum(p)) for p in sorted(served.iterdir())]
    monkeypatch.setitem(pair_sets.DOWNLOADS, "multi30k", files)
    write_wmt14(tmp_path / "wmt14")
    inside = [str(p.relative_to(tmp_path / "wmt14")) for p in sorted((tmp_path / "wmt14").rglob("*.*")) if p.is_file()]
    parts = []
    for kind in ("training/europarl", "commoncrawl", "training/news", "dev", "test-full"):
        path, names = served / f"{kind.replace('/', '-')}.tgz", [name for name in inside if name.startswith(kind)]
        archive(path, tmp_path / "wmt14", names)
        wanted = tuple(names) if "newstest" not in names[0] else None
        parts.append(Download(f"http://127.0.0.1:9/{path.name}", checksum(path), wanted))
    monkeypatch.setitem(pair_sets.DOWNLOADS, "wmt14", parts)
    return served


def test_download_once(published, tmp_path):
    for name in ("multi30k", "wmt14"):
        with serve(published) as url:
            folder = pair_sets.download(name, tmp_path / name / "cache", base_url=url)
        assert pair_sets.download(name, folder) == folder  # nothing to fetch
        found = open_pairs(str(folder))
        assert len(list(found.train)) == 3


def test_download_failures_are_one_line(published, tmp_path):
    with pytest.raises(DataError, match="cannot fetch http://127.0.0.1:9/train.de"):
        pair_sets.download("multi30k", tmp_path / "cache")
    (published / "train.de").write_bytes(b"an error page")
    with serve(published) as url:
        with pytest.raises(DataError, match="is not the published file: its SHA-256 sum differs"):
            pair_sets.download("multi30k", tmp_path / "cache", base_url=url)
        (published / "train.de").unlink()
        with pytest.raises(DataError, match="cannot fetch .*404"):
            pair_sets.download("multi30k", tmp_path / "cache", base_url=url)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_known_names_are_downloaded(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "served")
    wanted = []

    def download(name):
        wanted.append(name)
        return published

    monkeypatch.setattr(pair_sets, "download", download)
    assert open_pairs("multi30k").name == "multi30k" and wanted == ["multi30k"]


@needs_data
def test_multi30k():
    found = open_pairs(str(Path(DATA) / "multi30k_de_en"))
    assert sum(1 for _ in found.train) == 29_000 and len(found.validation) == 1014
    assert {name: len(pairs) for name, pairs in found.tests.items()} == {
        "test_2016_flickr": 1000,
        "test_2017_flickr": 1000,
    }
    for address, expected, _ in pair_sets.DOWNLOADS["multi30k"]:
        assert checksum(Path(DATA) / "multi30k_de_en" / address.rpartition("/")[2]) == expected


@needs_data
def test_ted_has_a_test_set_without_references(caplog):
    found = open_pairs(str(Path(DATA) / "mt_ted_toy_de_en"))
    assert sum(1 for _ in found.train) == 1000 and len(found.validation) == 20 and found.tests == {}
    assert "test: there is only de" in caplog.text
