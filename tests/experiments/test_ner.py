"""ner.py: words and their tokens, windows of long sentences, predictions, bad records; the default's figures."""

import functools
import io
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from core import random
from experiments.parts import encoder as encoders
from experiments.parts import tagger
from experiments.parts.encoder import Tuning
from tests.experiments import runs
from tests.experiments.test_encoder import minilm
from tests.registry.experiments import spans as rows
from train.data.text.conll import Sentence, Tagged

SETS = Path(os.environ.get("FUNCTREE_DATA", ""))
call = functools.partial(runs.call, "ner")
RUN = Path("runs/ner/a")
WORDS = ["Anna", "visited", "\ufe0f", "New", "York-on-Sea", "naïve", "你好", "\u200b"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run called `a`."""
    folder = tmp_path_factory.mktemp("ner")
    rows.sentences(folder)
    flags = ("--data", "names.conll", *rows.TINY, "--batch", "16", "--no-compile", "--dropout", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*flags, "--epochs", "12", "--head-rate", "1e-2", "--name", "a") == 0
    return folder


@pytest.fixture(scope="module")
def encoder():
    args = Tuning(layers=1, width=32, vocabulary=60, dropout=0.0)
    return encoders.load(args, [" ".join(WORDS[:4])], "tokens", 3, key=random.key(0))


def test_words_of_tokens_are_those_of_the_library(encoder):
    (encoding,) = encoders.encodings(encoder, [" ".join(WORDS)], 100)
    split = encoder.tokenizer.tokenizer.encode(WORDS, is_pretokenized=True)
    assert encoding.ids == split.ids
    assert tagger.words_of_tokens(WORDS, encoding) == [-1 if word is None else word for word in split.word_ids]


def test_labels_are_at_first_tokens_and_words_without_any_survive(encoder):
    tags = ("B-a", "O", "O", "B-a", "I-a", "O", "O", "O")
    data = tagger.encoded(encoder, ("a",), Tagged((Sentence(tuple(WORDS), tags),)), 100)
    (encoding,) = encoders.encodings(encoder, [" ".join(WORDS)], 100)
    owners = tagger.words_of_tokens(WORDS, encoding)
    firsts = {word: owners.index(word) for word in set(owners) - {-1}}
    expected = [tagger.IGNORED] * len(owners)
    for word, spot in firsts.items():
        expected[spot] = ("O", "B-a", "I-a").index(tags[word])
    assert data.labels[0].tolist() == expected and len(firsts) < len(WORDS)
    out = tagger.tag(tagger.Tagger(encoder, ("a",), 100), [WORDS, [], ["\ufe0f"]])
    assert [len(row) for row in out] == [8, 0, 1]
    assert tagger.tag(tagger.Tagger(encoder, ("a",), 100), []) == []
    lost = [word for word in range(len(WORDS)) if word not in firsts]
    assert lost and all(out[0][word] == ("O", 1.0) for word in lost) and out[2] == [("O", 1.0)]


def test_long_sentences_go_into_windows_without_loss(encoder):
    words = ["Anna", "visited"] * 40 + ["n" * 50]
    ids, windows = tagger.windows(encoder, [words, ["New"]], 12)
    assert max(map(len, ids)) <= 12 and [window.sentence for window in windows][-1] == 1
    mine = [window for window in windows if window.sentence == 0]
    assert sum(len(window.places) for window in mine) == len(words)
    assert [window.first for window in mine][1:] == [w.first + len(w.places) for w in mine][:-1]
    assert all(spot > 0 for window in mine for spot in window.places)


def test_tags_do_not_depend_on_the_batch(encoder):
    model = tagger.Tagger(encoder, ("a",), 64)
    together = tagger.tag(model, [["Anna"], ["visited", "New", "York"] * 5, ["visited"]])
    for alone, row in zip((["Anna"], ["visited", "New", "York"] * 5, ["visited"]), together, strict=True):
        (expected,) = tagger.tag(model, [alone])
        assert [name for name, _ in row] == [name for name, _ in expected]
        torch.testing.assert_close(torch.tensor([p for _, p in row]), torch.tensor([p for _, p in expected]))


def test_learns_and_stands_beside_the_commonest_tag(here):
    result = runs.result(RUN)
    assert result["f1"] > 0.9 and result["commonest_tag_f1"] > 0.9 and "seqeval, default mode" in result["f1_by"]
    assert result["skipped"] == 1  # the sentence with a line without a tag


def test_predict_gives_characters_of_the_text(here, monkeypatch, capsys):
    text = "  Anna went to New York."
    capsys.readouterr()
    assert call("predict", "--run", RUN, "--json", text, "") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert second == {"text": "", "entities": []}
    assert [(e["type"], e["text"]) for e in first["entities"]] == [("person", "Anna"), ("place", "New York")]
    assert all(text[e["start"] : e["end"]] == e["text"] and 0 < e["probability"] <= 1 for e in first["entities"])
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(f"\n{text}\r\n\xff\n".encode("latin-1"))))
    assert call("predict", "--run", RUN) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[:4] + line[5:] for line in lines[:2]] == [
        ["2", "2", "6", "person", "Anna"],
        ["2", "15", "23", "place", "New York"],
    ]


def test_evaluate_other_data(here, capsys):
    assert call("evaluate", "--run", RUN, "--data", "other.conll") == 2
    assert "other.conll has animal; expected entities such as person, place" in capsys.readouterr().err
    assert call("evaluate", "--run", RUN, "--out", "new") == 0
    figures = json.loads(Path("new/result.json").read_text(encoding="utf-8"))
    assert figures["f1"] == runs.result(RUN)["f1"]
    predictions = Path("new/predictions.tsv").read_text(encoding="utf-8").splitlines()
    assert predictions[0].split("\t")[0] in rows.NAMES and len(predictions[0].split("\t")) == 3


@pytest.mark.slow
def test_published_weights_with_adapters(here):
    flags = ("--data", "names.conll", "--weights", minilm(), "--lora", "4", "--epochs", "1", "--no-compile")
    assert call(*flags, "--batch", "16", "--name", "m") == 0
    assert Path("runs/ner/m/adapter/adapter_config.json").exists()
    assert call("evaluate", "--run", "runs/ner/m", "--out", "new") == 0
    figures = json.loads(Path("new/result.json").read_text(encoding="utf-8"))
    assert figures["f1"] == pytest.approx(runs.result(Path("runs/ner/m"))["f1"])


@pytest.mark.long
def test_default_knows_names_that_it_has_not_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--name", "a") == 0
    result = runs.result(RUN)
    assert result["f1"] >= 0.95 and result["commonest_tag_f1"] < 0.5
