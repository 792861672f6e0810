"""experiments/char_rnn.py beside what the laws hold it to: its figures, its states, words, the cells it shows."""

import functools
import re

import pytest
import torch

from core import random, spec, tree
from experiments import char_rnn
from experiments.parts import cells
from nets.language import rnn
from tests.experiments import runs
from tests.experiments.gpt_runs import TEXT
from tests.experiments.runs import config, result
from train.data.text import text, tokenizers
from train.run import open_run

call, refused = (functools.partial(function, "char_rnn") for function in (runs.call, runs.refused))
QUICK = ("--text", "text.txt", "--batch", "2", "--window", "16", "--width", "16", "--no-compile")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a finished run of 12 steps, runs/char_rnn/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("char_rnn")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs.undrawn(patch)
        assert call(*QUICK, "--steps", "12", "--name", "whole") == 0
    return folder


@pytest.fixture
def here(place, monkeypatch):
    """That folder, in which the test stands."""
    monkeypatch.chdir(place)
    runs.undrawn(monkeypatch)
    return place


def trained(place, name="whole"):
    run = open_run(place / "runs/char_rnn" / name, char_rnn.RUNS)
    cfg = run.read("net", rnn.Config)
    return run.restore(rnn.spec(cfg), "state.params"), cfg


def test_figures_are_those_of_the_held_out_text(here):
    params, cfg = trained(here)
    characters = sorted(set(TEXT))
    _, held_out = text.split(torch.tensor([characters.index(c) for c in TEXT]), least=64)
    total = 0.0
    for at in range(0, len(held_out) - 1, 16):
        window = held_out[at : at + 17]
        scores, _ = rnn.apply(params, window[None, :-1], cfg)
        total += torch.nn.functional.cross_entropy(scores[0], window[1:], reduction="sum").item()
    figures = result(here / "runs/char_rnn/whole")
    assert figures["val_loss"] == pytest.approx(total / (len(held_out) - 1), rel=1e-5)
    lanes = len(held_out) // (8 * 16)  # so few that each has eight windows
    assert lanes > 1
    tokens = held_out[: len(held_out) // lanes * lanes].view(lanes, -1)
    tokens = tokens[:, : (tokens.shape[1] - 1) // 16 * 16 + 1]
    scores, _ = rnn.apply(params, tokens[:, :-1], cfg)
    expected = torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert figures["carried_val_loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["carried_val_loss"] != figures["val_loss"]


def test_evaluation_repeats_the_figures(here, capsys):
    figures = result(here / "runs/char_rnn/whole")
    assert call("evaluate", "--run", "runs/char_rnn/whole") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    loss, carried = figures["val_loss"], figures["carried_val_loss"]
    assert last.startswith(f"loss {loss:.4f} nats per token (unigram entropy: {figures['unigram_entropy']:.4f})")
    assert f"state carried {carried:.4f}" in last and last.endswith("checkpoint of step 12")


@pytest.mark.parametrize("fresh", [0.0, 0.5])
def test_lanes_go_on_from_their_states_or_begin_anew(fresh):
    cfg = rnn.Config(vocabulary=11, embedding=5, width=5, dropout=0.0)
    params = spec.init(random.key(0), rnn.spec(cfg))
    carry = tree.map(lambda x: x + 0.5, rnn.empty_state(cfg, 64))
    keys = random.split(random.key(1), 64)
    ids = random.randint(random.key(2), (1, 8), 0, 11).long().expand(64, -1)
    begins = torch.arange(64) < 8  # the lanes are alike but for where they begin
    values, _, after = char_rnn.losses(params, ((ids[:, :-1], ids[:, 1:], begins), carry), keys, cfg, fresh)
    assert values.shape == (64,) and tree.names(after) == tree.names(carry)
    anew, going_on = (
        torch.nn.functional.cross_entropy(rnn.apply(params, ids[:1, :-1], cfg, state=state)[0][0], ids[0, 1:])
        for state in (None, tree.map(lambda x: x[:1], carry))
    )
    is_anew, is_going_on = (torch.isclose(values, value, rtol=1e-5) for value in (anew, going_on))
    assert (is_anew ^ is_going_on).all() and is_anew[:8].all()
    share = float(is_anew[8:].float().mean())
    assert share == 0.0 if fresh == 0.0 else 0.3 < share < 0.7


def test_words(here, capsys):
    flags = (
        "--tokenizer",
        "words",
        "--vocabulary",
        "19",
        "--net",
        "gru",
        "--cutoffs",
        "8",
        "14",
        "--window",
        "4",
        "--width",
        "8",
    )
    assert call(*QUICK, *flags, "--steps", "3", "--name", "words") == 0
    out = capsys.readouterr().out
    assert "tokenizer          words\nvocabulary         19\n" in out and "% of the validation tokens\n" in out
    run = here / "runs/char_rnn/words"
    net = config(run)["net"]
    assert (net["vocabulary"], net["kind"], net["cutoffs"]) == (19, "gru", [8, 14])
    assert call("sample", "--run", run, "--prompt", "quick zebra brown", "--max-new-tokens", "20") == 0
    out = capsys.readouterr().out
    assert out.startswith("quick <unk> brown")
    assert call("evaluate", "--run", run) == 0
    assert f"loss {result(run)['val_loss']:.4f}" in capsys.readouterr().out
    assert call("--resume", "--name", "words", "--steps", "5") == 0


def test_greedy_sample_goes_on_as_the_net(here, capsys):
    params, cfg = trained(here)
    characters = tokenizers.load("runs/char_rnn/whole/tokenizer.json")
    ids = characters.encode("The 7 quick")
    for _ in range(30):
        ids.append(int(rnn.apply(params, torch.tensor([ids]), cfg)[0][0, -1].argmax()))
    assert call("sample", "--run", "runs/char_rnn/whole", "--prompt", "The 7 quick", "--max-new-tokens", "30",
                "--temperature", "0") == 0  # fmt: skip
    assert capsys.readouterr().out == characters.decode(ids) + "\n"


# --- cells


def test_features_of_a_text():
    source = '  a "b (c)" \nde,\n"f\n\ng'
    values = cells.features(source)
    shown = {name: "".join("x" if v else "." for v in column.tolist()) for name, column in values.items()}
    assert shown["inside quotes"] == "....xxxxxx.......xx..."
    assert shown["inside brackets"] == ".......xx............."
    assert values["position in the line"].tolist() == [*range(1, 13), 0, 1, 2, 3, 0, 1, 2, 0, 0, 1]
    assert values["indentation of the line"].tolist() == [1] + 11 * [2] + 10 * [0]
    assert values["position in the word"].tolist()[12:16] == [0, 1, 2, 0]
    assert shown["last letter of a word"] == "..x..x..x.....x...x..x"


def test_the_cell_that_counts_is_found(tmp_path, monkeypatch):
    """One of 40 cells of noise follows the line, upside down."""
    source = "".join(f"{'x' * (n % 37)} (the end of it)\n" for n in range(60))
    characters = tokenizers.CharTokenizer.from_text(source)
    ids = torch.tensor(characters.encode(source))
    noise = random.normal(random.key(0), (len(ids), 40)) * 0.1
    line = cells.features(source)["position in the line"]
    noise[:, 7] -= line / line.max()
    monkeypatch.setattr(cells, "cells_along", lambda params, cfg, ids: noise)
    runs.undrawn(monkeypatch)
    params = {"head": {"bias": torch.zeros(1)}}
    lines = cells.draw(tmp_path, params, rnn.Config(width=20, layers=2), characters, ids)
    (shown,) = (line for line in lines if line.startswith("position in the line"))
    assert re.fullmatch(r"position in the line: cell 7 of layer 1 turned over, correlation 0\.9\d", shown)
    assert not any(line.startswith("inside quotes") for line in lines)  # there are none
    page = (tmp_path / "cells.html").read_text(encoding="utf-8")
    assert shown in page and (tmp_path / "cells.png").exists()


@pytest.mark.parametrize("kind", rnn.SPECS)
def test_cells_are_those_of_all_layers(kind):
    cfg = rnn.Config(vocabulary=11, embedding=5, width=5, dropout=0.0, kind=kind)
    params, ids = spec.init(random.key(0), rnn.spec(cfg)), torch.arange(9)
    along = cells.cells_along(params, cfg, ids)
    _, state = rnn.apply(params, ids[None], cfg)
    part, f = ("c", torch.tanh) if "lstm" in kind else ("h", lambda x: x)
    expected = torch.cat([f(layer[part][0]) for layer in state])
    assert along.shape == (9, 10)
    torch.testing.assert_close(along[-1], expected)


def test_pieces_of_words_make_the_text():
    tokenizer = tokenizers.train_sentences([TEXT], 500, words=True)
    lines = "".join(TEXT.splitlines(keepends=True)[:9])
    assert "".join(cells.pieces_of(tokenizer, tokenizer.encode(lines))).strip() == lines.strip()


# --- slow: the whole thing


@pytest.mark.long
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise: a few minutes, compiled, on the embedded text."""
    runs.completed("char_rnn", tmp_path)
    (run,) = (tmp_path / "runs" / "char_rnn").iterdir()
    figures = result(run)
    assert figures["val_loss"] < 1.5 and figures["carried_val_loss"] < figures["val_loss"]
