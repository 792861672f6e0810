"""The pairs that `--data` names: folders, tables, original layouts, downloads, and the facts about them."""

import hashlib
import os
import tarfile
from pathlib import Path

import pytest

from tests.local_server import serve
from tests.train.data.translation.text_files import write
from train.data import DataError
from train.data.text.tokenizers import train_sentences
from train.data.translation import sets as pair_sets
from train.data.translation.corpus import open_corpus
from train.data.translation.sets import Download, open_pairs, open_tests

DATA = os.environ.get("FUNCTREE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="FUNCTREE_DATA does not name a folder with real data sets")

GERMAN, ENGLISH = ["eins", "zwei", "drei"], ["one", "two", "three"]
NUMBERS = [str(i) for i in range(250)]


def test_facts_of_pairs(tmp_path):
    write(
        tmp_path,
        train_tsv=["de\ten", *(f"{n}\t{n}!" for n in NUMBERS), "a\t", "lang " * 20 + "\tlong " * 20],
        val_tsv=["1\t1!"],
        dev_tsv=["1\t1!"],
        test_de=["eins"],
    )
    data = open_pairs(str(tmp_path))
    tokenizer = train_sentences((text for pair in data.train for text in pair), 300)
    train = open_corpus(data.train, tokenizer, progress=False, longest=12)
    facts = pair_sets.facts(data, train, left_out=["a note"])
    assert facts["languages"] == "de to en" and facts["columns"] == "1 and 2 (named by the first line)"
    assert facts["first pair"] == "0 = 0!" and facts["training pairs"] == 250
    assert facts["validation pairs"] == "1 (val)" and facts["test pairs"] == {}
    assert facts["left out"][0] == "training: 1 pairs with an empty side" and facts["left out"][2] == "a note"
    assert facts["left out"][1].startswith("training: 1 pairs with over 12 tokens, such as 'l")
    assert [path.name for path, _ in facts["skipped"]] == ["test", "dev"]
    dates = pair_sets.facts(open_pairs("dates"))
    assert dates["test pairs"] == {"test": 500} and "columns" not in dates and dates["skipped"] == []


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
    actual = open_pairs(str(folder))
    assert actual.name == "set" and actual.languages == ("de", "en")
    assert list(actual.train) == list(zip(GERMAN, ENGLISH, strict=True)) and actual.validation == [("eins", "one")]
    assert actual.tests == {"test_2016": [("eins", "one"), ("zwei", "two")]}
    assert "test_2017: there is only de; this test set is left out" in caplog.text
    assert list(open_pairs(str(folder), "en", "de").train)[1] == ("two", "zwei")
    with pytest.raises(DataError, match="no pair of languages de-it; there are de, en, fr"):
        open_pairs(str(folder), "de", "it")
    write(folder, test_2016_de=[], test_2016_en=[])
    with pytest.raises(DataError, match="test_2016.de and .*test_2016.en: there is not one pair"):
        open_pairs(str(folder))


def test_a_folder_of_tables(tmp_path):
    table = ["de\ten", *(f"{n}\t{n}!" for n in NUMBERS)]
    actual = open_pairs(str(write(tmp_path, train_tsv=table, valid_tsv=table[:3], test_tsv=table[:2])))
    assert len(list(actual.train)) == 250 and len(actual.validation) == 2 and actual.tests == {"test": [("0", "0!")]}


@pytest.mark.parametrize("how", ["two", "prefix", "table", "folder"])
def test_own_files_without_validation(how, tmp_path):
    write(tmp_path, train_de=NUMBERS, train_en=NUMBERS, all_tsv=[f"{n}\t{n}" for n in NUMBERS])
    data = {
        "two": f"{tmp_path / 'train.de'},{tmp_path / 'train.en'}",
        "prefix": str(tmp_path / "train"),
        "table": str(tmp_path / "all.tsv"),
        "folder": str(tmp_path),
    }
    actual = open_pairs(data[how])
    assert actual.validation == [("99", "99"), ("199", "199")] and actual.tests == {}
    assert [s for s, _ in actual.train] == [n for n in NUMBERS if n not in ("99", "199")]


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        ("table.tsv", {"table.tsv": 250}),
        ("news.de,news.en", {"news.de": 3}),
        ("news", {"news": 3}),
        ("whole", {"test_a": 1, "test_b": 2}),
        ("tests", {"test": 2}),
        ("parts", {"validation": 1}),
        ("dates", {"test": 500}),
    ],
)
def test_pairs_to_evaluate_on(data, sizes, tmp_path, monkeypatch):
    """All that is named, and no training part."""
    monkeypatch.chdir(
        write(tmp_path, news_de=GERMAN, news_en=ENGLISH, table_tsv=["de\ten"] + [f"{n}\t1" for n in NUMBERS])
    )
    train = {"train_de": GERMAN, "train_en": ENGLISH}
    first = {"test_a_de": GERMAN[:1], "test_a_en": ENGLISH[:1]}
    write(tmp_path / "whole", **train, **first, test_b_tsv=["eins\tone", "zwei\ttwo"])
    write(tmp_path / "tests", test_tsv=["eins\tone", "zwei\ttwo"])
    write(tmp_path / "parts", **train, val_tsv=["eins\tone"])
    tests = open_tests(data)
    assert {name: len(pairs) for name, pairs in tests.items()} == sizes
    assert open_tests(data, "en", "de").keys() == sizes.keys()


def test_nothing_to_evaluate_on(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, few_de=GERMAN, few_en=[""] * 3))
    with pytest.raises(DataError, match="not one pair of sentences, as all of few.en is empty"):
        open_tests("few.de,few.en")
    with pytest.raises(DataError, match="'nothing' does not exist"):
        open_tests("nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no train.de and train.en"):
        open_tests("empty")


def test_parts_that_fit():
    tokenizer = train_sentences([*GERMAN, *ENGLISH], 300)
    long = ("ja " * 20, "yes")
    parts, notes = pair_sets.fit(
        {"validation": [("eins", "one")], "test": [long, ("drei", "three"), long]}, tokenizer, 12
    )
    assert parts == {"validation": [("eins", "one")], "test": [("drei", "three")]}
    assert notes == ["test: 2 pairs with over 12 tokens"]
    with pytest.raises(DataError, match="test: not one of 1 pairs has up to 12 tokens on both sides"):
        pair_sets.fit({"test": [long]}, tokenizer, 12)


@pytest.mark.parametrize(
    ("data", "languages", "message"),
    [
        (
            "nothing",
            ("de", "en"),
            "'nothing' does not exist; expected a folder, .* or one of dates, .*multi30k, iwslt17",
        ),
        ("dates", ("de", "fr"), "dates: no pair of languages de-fr; there are de, en"),
        ("dates", ("de", "de"), "source and target are both de"),
        (
            "iwslt14",
            ("de", "en"),
            "iwslt14 has no published checksum .*unpack https://.*/de-en.tgz and name the folder",
        ),
        ("empty", ("de", "en"), "no train.de and train.en, nor train.tsv, train.csv or train.jsonl, in .*empty"),
        ("few.de,few.en", ("de", "en"), "too few sentences to hold out one in 100 for validation"),
        ("few.de,gone.en", ("de", "en"), "gone.en does not exist"),
    ],
)
def test_what_is_not_there(data, languages, message, tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, few_de=GERMAN, few_en=ENGLISH))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        open_pairs(data, *languages)


def test_the_embedded_pairs():
    actual, back = open_pairs("dates"), open_pairs("dates", "en", "de")
    assert (len(actual.train), len(actual.validation), len(actual.tests["test"])) == (10_000, 500, 500)
    assert back.languages == ("en", "de")
    assert [pair[::-1] for pair in back.tests["test"]] == actual.tests["test"]


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
    actual = open_pairs(str(write_iwslt(tmp_path, 17).parent))
    train = list(actual.train)
    assert len(train) == 50 and train[0] == ("de 0 & more", "en 0 & more")
    assert actual.validation[0] == ("TED.dev2010 de & 1", "TED.dev2010 en & 1") and len(actual.validation) == 2
    assert [s for s, _ in actual.tests["test"]] == [f"TED.tst20{y} de & {i}" for y in (10, 11) for i in (1, 2)]
    assert open_pairs(str(tmp_path / "de-en"), "en", "de").tests["test"][0][0] == "TED.tst2010 en & 1"
    with pytest.raises(DataError, match="no pair of languages de-fr; there are de, en"):
        open_pairs(str(tmp_path), "de", "fr")


def test_iwslt14_in_its_own_layout(tmp_path):
    actual = open_pairs(str(write_iwslt(tmp_path, 14)))
    assert [s for s, _ in actual.validation] == ["de 22 & more", "de 45 & more"] and len(list(actual.train)) == 48
    assert len(actual.tests["test"]) == 6


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
    actual = open_pairs(str(tmp_path), "en", "de")
    assert [s.split("/")[-1] for s, _ in actual.train] == [
        "europarl-v7.de-en en",
        "commoncrawl.de-en en",
        "news-commentary-v9.de-en en",
    ]
    assert actual.validation == [("dev/newstest2013 en", "dev/newstest2013 de")]
    assert list(actual.tests) == ["newstest2014"]


def archive(path: Path, folder: Path, names: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as file:
        for name in names:
            file.add(folder / name, name)


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
        members = tuple(names) if "newstest" not in names[0] else None
        parts.append(Download(f"http://127.0.0.1:9/{path.name}", checksum(path), members))
    monkeypatch.setitem(pair_sets.DOWNLOADS, "wmt14", parts)
    return served


def test_download_once(published, tmp_path):
    for name in ("multi30k", "wmt14"):
        with serve(published) as url:
            folder = pair_sets.download(name, tmp_path / name / "cache", base_url=url)
        assert pair_sets.download(name, folder) == folder  # nothing to fetch
        actual = open_pairs(str(folder))
        assert len(list(actual.train)) == 3


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
    requests = []

    def download(name):
        requests.append(name)
        return published

    monkeypatch.setattr(pair_sets, "download", download)
    assert open_pairs("multi30k").name == "multi30k" and requests == ["multi30k"]


@needs_data
def test_multi30k():
    actual = open_pairs(str(Path(DATA) / "multi30k_de_en"))
    assert sum(1 for _ in actual.train) == 29_000 and len(actual.validation) == 1014
    assert {name: len(pairs) for name, pairs in actual.tests.items()} == {
        "test_2016_flickr": 1000,
        "test_2017_flickr": 1000,
    }
    for address, expected, _ in pair_sets.DOWNLOADS["multi30k"]:
        assert checksum(Path(DATA) / "multi30k_de_en" / address.rpartition("/")[2]) == expected


@needs_data
def test_ted_has_a_test_set_without_references(caplog):
    actual = open_pairs(str(Path(DATA) / "mt_ted_toy_de_en"))
    assert sum(1 for _ in actual.train) == 1000 and len(actual.validation) == 20 and actual.tests == {}
    assert "test: there is only de" in caplog.text
