import functools
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nets.language import transformer
from tests.experiments import runs
from tests.experiments.runs import config, flag_id, is_png, metrics, result, same_bits
from train.data.text import tokenizers
from train.data.translation import dates
from train.run import checkpoints
from train.step import make_step

call, refused, completed = (
    functools.partial(function, "translate") for function in (runs.call, runs.refused, runs.completed)
)
QUICK = ("--data", "pairs", "--vocabulary", "300", "--tokens", "300", "--no-compile")
STEPS = ("--steps", "12", "--save-every", "6", "--eval-every", "6")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a few pairs, pairs/, and a finished run, runs/translate/whole; not to be changed."""
    folder = tmp_path_factory.mktemp("translate")
    parts = dict(zip(("train", "val", "test"), dates.pairs(120, 12, 10), strict=True))
    (folder / "pairs").mkdir()
    for part, found in parts.items():
        for language, lines in zip(("de", "en"), zip(*found, strict=True), strict=True):
            (folder / "pairs" / f"{part}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, *STEPS, "--name", "whole") == 0
    return folder


def parameters(run, step=None):
    cfg = config(run)["net"]
    return checkpoints.restore(run / "checkpoints", transformer.spec(transformer.Config(**cfg)), step, part="params")


def test_folder_of_a_run(place):
    run = place / "runs" / "translate" / "whole"
    assert checkpoints.steps(run / "checkpoints") == [6, 12]
    assert is_png(run / "loss.png") and all(is_png(run / "attention" / f"{n}.png") for n in ("encoder", "cross"))
    figures = result(run)
    assert figures["test"] == "test" and 0 <= figures["bleu"] <= 100 and figures["steps"] == 12
    assert figures["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert tokenizers.load(run / "tokenizer.json").vocabulary_size == config(run)["net"]["source_vocabulary"] <= 300
    samples = (run / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("step 6\n") == samples.count("step 12\n") == 1 and samples.count("\n  > ") == 8
    losses = [record["validation/loss"] for record in metrics(run) if "validation/loss" in record]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_resumed_run_has_the_same_bits(here):
    run = here / "runs" / "translate" / "whole"
    whole, figures = parameters(run), result(run)
    shutil.rmtree(run / "checkpoints" / "12")
    assert call("--resume") == 0
    assert same_bits(parameters(run), whole) and result(run)["bleu"] == figures["bleu"]


def test_translation_and_evaluation(here, capsys):
    run = "runs/translate/whole"
    assert call("translate", "--run", run, "Der Bus", "Montag", "--beam", "3", "--n-best", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 4 and scores[0] >= scores[1] and scores[2] >= scores[3]
    (here / "lines").write_text("Der Bus\nMontag\n", encoding="utf-8")
    assert call("translate", "--run", run, "--file", "lines", "--beam", "3", "--attention", "maps") == 0
    assert capsys.readouterr().out.splitlines() == [line.split(None, 1)[1] for line in lines[::2]]
    assert is_png(here / "maps" / "cross.png")
    (here / "gaps").write_text("Der Bus\n\nMontag\n", encoding="utf-8")
    assert call("translate", "--run", run, "--file", "gaps", "--beam", "3") == 0
    first, empty, last = capsys.readouterr().out.splitlines()
    assert (first, empty, last) == (lines[0].split(None, 1)[1], "", lines[2].split(None, 1)[1])
    assert call("evaluate", "--run", run, "--beam", "1") == 0
    figures = result(here / run)
    assert f"test: BLEU {figures['bleu']:.2f}, chrF {figures['chrf']:.2f}" in capsys.readouterr().out


def test_draws(here, capsys):
    def drawn(*flags):
        assert call("translate", "--run", "runs/translate/whole", *flags, "--temperature", "1", "--n-best", "2") == 0
        return capsys.readouterr().out  # what was drawn may hold line ends

    alone = drawn("Der Bus")
    assert drawn("Der Bus") == alone != drawn("Der Bus", "--seed", "1")
    assert drawn("Der Bus", "Der Bus").startswith(alone)
    best = drawn("Der Bus", "--top-k", "1")
    assert best[: len(best) // 2] == best[len(best) // 2 :]


@pytest.mark.slow
def test_compiled_run_has_a_graph_a_shape(here, monkeypatch):
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr("train.step.make_step", functools.partial(make_step, backend=graphs))
    torch._dynamo.reset()
    assert call(*QUICK[:-1], *STEPS, "--tokens", "2000", "--name", "compiled") == 0
    assert call(*QUICK, *STEPS, "--tokens", "2000", "--name", "eager") == 0
    folder = here / "runs" / "translate"
    assert graphs.frame_count == result(folder / "compiled")["shapes"] > 0
    found, wanted = (
        [record["train/loss"] for record in metrics(folder / name) if "train/loss" in record]
        for name in ("compiled", "eager")
    )
    assert found == pytest.approx(wanted, rel=1e-4) and len(found) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "huge"], "--preset 'huge' is unknown; expected one of tiny, small, base, big"),
        (["--tokenizer", "letters"], "--tokenizer 'letters' is unknown; expected one of bpe, words"),
        (["--data", "nowhere"], "'nowhere' does not exist"),
        (["--data", "pairs", "--target", "fr"], "fr"),
        (["--source", "en", "--target", "en"], "source and target are both en"),
        (["--vocabulary", "100"], "a vocabulary of 100 is too small: expected at least 260"),
        (["--tokens", "0"], "--tokens is 0; expected at least 1"),
        (["--average", "0"], "--average is 0; expected at least 1"),
        (["--dropout", "1"], "dropout 1.0 is outside [0, 1)"),
        (["--device", "abacus"], "--device 'abacus' cannot be used"),
        (["--name", "whole"], "exists already"),
        (["--resume", "--name", "whole", "--preset", "base"], "it was started with tiny"),
        (["--shapes", "0"], "--shapes is 0; expected at least 1"),
        (["translate", "--run", "nowhere", "a"], "nowhere"),
        (["translate", "--run", "runs/translate/whole", "a", "--beam", "0"], "--beam is 0; expected at least 1"),
        (["translate", "--run", "runs/translate/whole", "a", "--top-k", "3"], "give --temperature too"),
        (["translate", "--run", "runs/translate/whole", "--file", "latin1"], "latin1 line 1 is not UTF-8 text"),
        (["--data", "a.de,b.en"], "a.de has 2 sentences and b.en has 1 sentences; expected as many"),
        (["translate", "--run", "runs/translate/whole", "a", "--beam", "1", "--n-best", "2"], "--n-best is 2"),
        (["translate", "--run", "runs/translate/whole", "a " * 300], "the network positions for 128"),
        (["evaluate", "--run", "runs/translate/whole", "--test", "x"], "--test 'x' is no test set of pairs"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    (here / "latin1").write_bytes("schön".encode("latin-1"))
    (here / "a.de").write_text("eins\nzwei\n", encoding="utf-8")
    (here / "b.en").write_text("one\n", encoding="utf-8")
    assert message in refused(capfd, *flags)


def test_a_run_without_its_tokenizer(here, capfd):
    (here / "runs" / "translate" / "whole" / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(capfd, "translate", "--run", "runs/translate/whole", "a")


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise, compiled."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "translate").iterdir()
    assert result(run)["exact_match"] >= 0.99
