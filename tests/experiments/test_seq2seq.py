import functools
import io
import sys
import types

import pytest
import torch

from core import random, spec
from experiments import seq2seq as script
from nets.language import seq2seq
from tests.experiments import runs
from tests.experiments.runs import config, is_png, metrics, result
from tests.registry.experiments.language import pairs
from train.run import checkpoints

call, refused, completed = (
    functools.partial(function, "seq2seq") for function in (runs.call, runs.refused, runs.completed)
)
QUICK = ("--data", "pairs", "--vocabulary", "300", "--tokens", "300")
STEPS = ("--steps", "12", "--save-every", "6", "--eval-every", "6")
RUN = "runs/seq2seq/whole"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a few pairs, pairs/, and a finished run, runs/seq2seq/whole; not to be changed."""
    folder = tmp_path_factory.mktemp("seq2seq")
    pairs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, *STEPS, "--name", "whole") == 0
    return folder


def losses(run):
    return [record["train/loss"] for record in metrics(run) if "train/loss" in record]


def test_folder_of_a_run(place):
    run = place / RUN
    assert checkpoints.steps(run / "checkpoints") == [6, 12]
    figures = result(run)
    assert figures["test"] == "test" and figures["sentences"] == 10 and 0 <= figures["bleu"] <= 100
    assert config(run)["net"]["attention"] == "bahdanau"
    validated = [record["validation/loss"] for record in metrics(run) if "validation/loss" in record]
    assert len(validated) == 2 and validated[1] < validated[0]
    # Words are fewer than byte pairs, so each costs more.
    assert figures["word_perplexity"] > torch.tensor(figures["test_loss"]).exp() > 1


def test_translation_with_beams_and_pictures(here, capsys):
    assert call("translate", "--run", RUN, "Der Bus", "", "--beam", "3", "--n-best", "2", "--attention", "maps") == 0
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 3 and scores[0] >= scores[1] and scores[2] == 0.0
    assert is_png(here / "maps" / "cross.png") and not (here / "maps" / "encoder.png").exists()
    assert call("evaluate", "--run", RUN, "--beam", "1") == 0
    assert f"test: BLEU {result(here / RUN)['bleu']:.2f}" in capsys.readouterr().out


def test_rate_of_teacher_forcing_falls():
    """In equal steps; at a rate of 0 the loss is that of a net that reads its own tokens alone."""
    args, (source, target) = script.Args(teacher_forcing=0.2, steps=100), torch.randint(3, 9, (2, 4, 7)).unbind(0)
    assert len(script.batch_of(source, target, 50, script.Args())) == 2
    rates = [script.batch_of(source, target, at, args)[2] for at in (0, 50, 100)]
    assert [rate.tolist() for rate in rates] == [pytest.approx([r] * 4) for r in (1.0, 0.6, 0.2)]
    cfg = seq2seq.Config(9, 9, embedding=4, width=8, encoder_width=4)
    params, keys = spec.init(random.key(0), seq2seq.spec(cfg)), random.split(random.key(1), 4)
    loss = functools.partial(script.loss, params, keys=keys, cfg=cfg, smoothing=0.0)
    forced, also, free = (loss((source, target, *rate))[0].values for rate in ((), (torch.ones(4),), (torch.zeros(4),)))
    own = seq2seq.apply(params, (source, target[:, :-1]), cfg, forced=torch.zeros(4, 6, dtype=torch.bool))
    expected = torch.nn.functional.cross_entropy(own.mT, target[:, 1:], reduction="none").sum(1)
    torch.testing.assert_close(free, expected)
    assert torch.equal(forced, also) and not torch.allclose(forced, free)


def test_standard_input_may_begin_with_a_byte_order_mark(here, capsys, monkeypatch):
    outputs = []
    for content in (b"Der Bus\n\n", b"\xef\xbb\xbfDer Bus\r\n\r\n"):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
        assert call("translate", "--run", RUN) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].count("\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--scores", "none", "--kind", "lstm"),
        ("--scores", "general", "--dtype", "bfloat16"),
        ("--scores", "dot", "--input-feeding", "--micro-batches", "2"),
    ],
    ids=str,
)
def test_other_nets(flags, here, capsys):
    assert call(*QUICK, *STEPS, *flags, "--name", "other") == 0
    first, *_, last = losses(here / "runs" / "seq2seq" / "other")
    assert last < first
    assert call("translate", "--run", "runs/seq2seq/other", "Der Bus", "--attention", "maps") == 0
    assert (here / "maps" / "cross.png").exists() == ("none" not in flags)


def test_run_of_another_script_is_refused(here, capfd):
    assert "is a run of seq2seq.py, expected one of translate.py" in runs.refused(
        "translate", capfd, "translate", "--run", RUN, "a"
    )
    assert "the network positions for 128" in refused(capfd, "translate", "--run", RUN, "a " * 300, "-o", "new")
    (here / "lines.txt").write_text("Der Bus\n", encoding="utf-8")
    both = refused(capfd, "translate", "--run", RUN, "a", "--file", "lines.txt")
    assert "there are sentences and a --file; expected one of them" in both
    assert "length_penalty is 1e+30" in refused(capfd, "translate", "--run", RUN, "a", "--length-penalty", "1e30")
    assert "--n-best is 5; expected 1 to 4" in refused(capfd, "translate", "--run", RUN, "a", "--n-best", "5")


@pytest.mark.long
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "seq2seq").iterdir()
    assert result(run)["exact_match"] >= 0.99
