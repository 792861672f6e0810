"""embed.py: embeddings alone and in a batch, search, adapters, other runs and published weights, bad records."""

import functools
import io
import json
import logging
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from core import random
from experiments.parts import embedder as parts
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Tuning
from tests.experiments import runs
from tests.experiments.test_encoder import minilm
from tests.registry.experiments.language import QUESTIONS, questions
from train.run import open_run

call = functools.partial(runs.call, "embed")
SMALL = ("--layers", "1", "--width", "32", "--vocabulary", "80", "--longest", "16", "--batch", "8", "--no-compile")
RUN = Path("runs/embed/a")
TEXTS = ["a cat", "what is a river?", "a dog and a train " * 20, "?", "", "x"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run called `a`."""
    folder = tmp_path_factory.mktemp("embed")
    questions(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUESTIONS, *SMALL, "--epochs", "2", "--name", "a") == 0
    return folder


def trained(run=RUN):
    return parts.load(open_run(run, run.parent))


def test_an_embedding_does_not_depend_on_its_batch_or_padding(here, monkeypatch):
    model = trained()
    together = parts.embed(model, TEXTS)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(TEXTS)))
    alone = torch.cat([parts.embed(model, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts.embed(model, TEXTS[::-1]), together.flip(0), rtol=0, atol=1e-6)
    monkeypatch.setattr(parts, "TOKENS", 1)  # batches of one
    torch.testing.assert_close(parts.embed(model, TEXTS), together, rtol=0, atol=1e-6)
    assert parts.embed(model, []).shape == (0, 32)


def test_figures_stand_beside_tfidf_and_chance(here):
    result = runs.result(RUN)
    assert {"recall_at_5", "mean_reciprocal_rank", "tfidf_recall_at_5", "unshared_recall_at_1"} <= result.keys()
    assert result["chance_recall_at_1"] == pytest.approx(1 / result["pairs"])
    assert runs.config(RUN)["kind"] == "bert" and (RUN / "tokenizer.json").exists()
    losses = [line["train/loss"] for line in runs.metrics(RUN) if "train/loss" in line]
    assert losses[-1] < losses[0]


def test_search_finds_the_line_itself(here, capsys, monkeypatch):
    capsys.readouterr()
    assert call("search", "--run", RUN, "--file", "lines.txt", "the river", "--count", "2") == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and rows[0][1:] == ["3", "the river"] and float(rows[0][0]) == pytest.approx(1, abs=1e-4)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"the river\n\na train\n")))
    assert call("search", "--run", RUN, "--file", "lines.txt") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith("> ")] == ["> the river", "> a train"] and len(out) == 2 + 2 * 3


def test_encode_keeps_a_row_per_line(here, capsys):
    assert call("encode", "--run", RUN, "--file", "lines.txt", "--out", "vectors.npy") == 0
    vectors = np.load("vectors.npy")
    assert vectors.shape == (4, 32) and vectors.dtype == np.float32 and not vectors[1].any()
    expected = parts.embed(trained(), ["the river"])[0]
    np.testing.assert_allclose(vectors[2], expected, atol=1e-6)
    assert not capsys.readouterr().err
    assert call("encode", "--run", RUN, "the river " * 20) == 0
    assert capsys.readouterr().err == "1 of 1 texts have more than 16 tokens; the rest does not count\n"
    assert call("encode", "--run", RUN, "the river") == 0
    printed = [float(x) for x in capsys.readouterr().out.splitlines()[-1].split()]
    np.testing.assert_allclose(printed, expected, atol=1e-5)
    assert call("encode", "--run", RUN, "a", "--out", "vectors.npy") == 2
    assert "'vectors.npy' exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("search", "--file", "lines.txt", "a"), "expected either --run DIR or --weights SOURCE"),
        (("search", "--run", RUN, "a"), "name the file to search in with --file"),
        (("search", "--run", RUN, "--file", "nowhere.txt", "a"), "nowhere.txt does not exist"),
        (("search", "--run", RUN, "--file", "empty.csv", "a"), "empty.csv has no text to search in"),
        (("similarity", "--run", RUN, "one"), "there are 1 texts; expected 2 to 60 to compare"),
        (("map", "--run", RUN, "--data", "nowhere.tsv"), "nowhere.tsv does not exist"),
        (
            ("evaluate", "--run", RUN, "--data", "lines.txt"),
            "lines.txt: no columns 'question' and 'answer'; there are a cat in a house",
        ),
        (("encode", "--run", RUN, "--file", "empty.csv"), "empty.csv"),
    ],
)
def test_refusals(argv, error, here, capfd):
    assert error in runs.refused("embed", capfd, *argv)


def test_a_run_is_the_weights_of_another_and_has_adapters(here, capsys):
    flags = (*QUESTIONS, "--longest", "16", "--batch", "8", "--epochs", "1", "--shapes", "1", "--no-compile")
    assert call(*flags, "--weights", RUN, "--lora", "2", "--learning-rate", "0.01", "--name", "b") == 0
    assert (RUN.with_name("b") / "adapter" / "adapter_model.safetensors").exists()
    assert runs.result(RUN.with_name("b"))["parameters"] < runs.result(RUN)["parameters"] / 4
    merged, before = parts.embed(trained(RUN.with_name("b")), TEXTS), parts.embed(trained(), TEXTS)
    assert 1e-4 < float((merged - before).abs().max())
    capsys.readouterr()
    for flag, run in (("--run", "a"), ("--weights", "a"), ("--weights", "b")):
        assert call("similarity", flag, RUN.with_name(run), "a cat", "a dog", "--longest", "16") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("a cat")]
    assert rows[0] == rows[1] != rows[2]
    RUN.rename(RUN.with_name("moved"))  # the adapters' weights
    assert call("similarity", "--run", RUN.with_name("b"), "a cat", "a dog") == 2


def test_cloze_makes_pairs_of_a_text():
    pair = ("title", "the first has four words. short one. and the last has five.")
    pairs = parts.cloze([pair, ("lonely", "one sentence of four words")], 1)
    assert pairs[0] == pair and len(pairs) == 3
    assert pairs[1] == ("the first has four words.", "title short one. and the last has five.")
    assert len(parts.cloze([pair], 6)) == 3 and parts.cloze([pair], 0) == [pair]


def test_words_that_pairs_share_are_blanked():
    assert parts.unshared(("Return the Tree.", "a tree, of the kind")) == ("Return _ _.", "a tree, of the kind")


def test_every_pair_of_equal_texts_has_one_number():
    args = Tuning(layers=1, width=32, vocabulary=60, longest=8)
    pairs = [("a", "b c"), ("a", "d"), ("b c", "e")]
    encoder = encoders.scratch(args, [text for pair in pairs for text in pair], "features", key=random.key(0))
    data = parts.encoded(encoder, pairs, 8)
    assert data.numbers.tolist() == [[0, 1], [0, 2], [1, 3]]
    bucket = parts.make_buckets(data, 1, 2)
    first, second = (parts.batch_at(data, bucket, random.key(1), step, 2) for step in (0, 0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_records_are_skipped_and_named(here, caplog):
    lines = [json.dumps({"source": f"say {i}", "target": f"{i} {i + 1}"}) for i in range(60)]
    lines[5] = '{"source": "say 5"}'
    Path("bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    columns = ("--source", "source", "--target", "target")
    assert call("evaluate", "--run", RUN, "--data", "bad.jsonl", *columns) == 0
    assert "line 6 has no 'source' and 'target'; there are source" in caplog.text
    assert runs.result(RUN / "evaluations" / "bad.jsonl")["pairs"] == 59


@pytest.mark.slow
def test_published_weights(here, capsys):
    """Cosines of all-MiniLM-L6-v2, as sentence-transformers has them."""
    logging.getLogger().setLevel(logging.ERROR)
    texts = ("A man is eating food.", "Someone is having a meal.", "The stock market crashed today.")
    assert call("similarity", "--weights", minilm(), *texts) == 0
    row = capsys.readouterr().out.splitlines()[0].split("\t")
    assert [float(x) for x in row[:3]] == pytest.approx([1, 0.6888, 0.0088], abs=1e-4)


@pytest.mark.long
def test_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--name", "a", "--no-compile") == 0
    result = runs.result(RUN)
    assert result["recall_at_1"] >= 0.2 and result["recall_at_1"] > 50 * result["chance_recall_at_1"]
