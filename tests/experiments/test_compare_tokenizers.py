"""experiments/compare_tokenizers.py, which is no row of the registry.

The laws there are those of a run with steps and checkpoints, which is stopped and resumed to the same bits. A tokenizer
is learned in one call of seconds, and a stopped comparison is started again; what is left of the laws is tested here.
"""

import functools

import pytest

from tests.experiments import runs
from tests.experiments.runs import config, flag_id, is_png, metrics, result
from train.data.text import tokenizers
from train.data.text.text import embedded_text

call, refused, completed = (
    functools.partial(function, "compare_tokenizers") for function in (runs.call, runs.refused, runs.completed)
)
QUICK = ("--text", "text.txt", "--vocabulary", "400", "--sizes", "300")
KINDS = ("WordPiece", "byte pairs", "unigram")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a finished run, runs/compare_tokenizers/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("compare_tokenizers")
    (folder / "text.txt").write_text(embedded_text()[:40_000], encoding="utf-8")
    (folder / "short.txt").write_text("A short text.", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, "--words", "function", "naïve", "x", "--name", "whole") == 0
    return folder


def test_folder_of_a_run(place):
    run = place / "runs" / "compare_tokenizers" / "whole"
    assert all(is_png(run / f"{name}.png") for name in ("merges", "pieces", "sizes"))
    assert config(run)["args"]["vocabulary"] == 400
    figures = result(run)
    assert figures["sizes"].keys() == figures["figures"].keys() == set(KINDS)
    for kind in KINDS:
        small, large = (figures["sizes"][kind][size] for size in ("300", "400"))
        assert large == figures["figures"][kind]
        assert 1 < large["tokens_per_word"] < small["tokens_per_word"] < figures["characters_per_word"]
        assert 0 < large["vocabulary_used"] <= 1 and large["seconds"] > 0
        lengths = [len(token.lstrip("#␣")) for token in figures["longest"][kind]]
        assert lengths == sorted(lengths, reverse=True) and len(lengths) == 8
    assert figures["figures"]["byte pairs"]["unknown"] == 0
    assert len(metrics(run)) == 6


def test_figures_are_those_of_the_tokenizers_that_are_left(place):
    run = place / "runs" / "compare_tokenizers" / "whole"
    text = (place / "text.txt").read_text(encoding="utf-8")
    sentence = config(run)["args"]["sentence"]
    for kind in KINDS:
        tokenizer = tokenizers.load(run / f"{kind.replace(' ', '_').lower()}.json", lossy=True)
        ids = tokenizer.encode(sentence)
        assert tokenizer.vocabulary_size == 400 and len(ids) == len(result(run)["sentence"][kind])
        # Two blocks of about 2000 characters of 20 are held out.
        row = result(run)["figures"][kind]
        whole = len(tokenizer.encode(text)) / len(text.split())
        assert row["tokens_per_word"] == pytest.approx(whole, rel=0.3)
        assert row["tokens_per_word"] * row["characters_per_token"] == pytest.approx(
            result(run)["characters_per_word"], rel=1e-6
        )


def test_tokens_and_offsets_are_printed(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert call(*QUICK, "--sentence", "The value", "--name", "printed") == 0
    out = capsys.readouterr().out
    assert "The 0-3 0" in out and "␣v" in out and "per word" in out and "longest in held-out text" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt does not exist, expected a text file"),
        (["--text", "short.txt"], "--text has 13 characters; expected at least 20,000"),
        (["--vocabulary", "256"], "expect at least 257 tokens, room for the bytes; found 256"),
        (["--sizes", "0"], "--sizes is 0; expected at least 1"),
        (["--sentence", " "], "--sentence is empty"),
        (["--words", "two words"], "--words: 'two words' is no word of letters alone"),
        (["--name", "whole"], "whole' exists already"),
        (["--name", "a/b"], "--name 'a/b' is not the name of a folder"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert message in refused(capfd, *flags)
    assert sorted(place.rglob("*")) == before


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise."""
    out = completed(tmp_path)
    (run,) = (tmp_path / "runs" / "compare_tokenizers").iterdir()
    figures = result(run)
    expected = {"WordPiece": 1.66, "byte pairs": 1.84, "unigram": 1.54}
    for kind, value in expected.items():  # the embedded text differs a little from one version of Python to the next
        assert figures["figures"][kind]["tokens_per_word"] == pytest.approx(value, abs=0.05)
    assert f"files in {run.relative_to(tmp_path)}/" in out.splitlines()[-1]
