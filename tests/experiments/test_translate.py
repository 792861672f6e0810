import dataclasses
import functools
import io
import shutil
import types

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from core import random, spec
from experiments.parts import translator
from nets.language import transformer
from tests.experiments import runs
from tests.experiments.runs import config, flag_id, is_png, metrics, result
from tests.registry.experiments.language import pairs
from train.data.text import tokenizers
from train.data.translation import dates
from train.run import checkpoints
from train.step import make_step

call, refused, completed = (
    functools.partial(function, "translate") for function in (runs.call, runs.refused, runs.completed)
)
QUICK = ("--data", "pairs", "--vocabulary", "300", "--tokens", "300", "--no-compile")
STEPS = ("--steps", "12", "--save-every", "6", "--eval-every", "6")
RUN = "runs/translate/whole"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a few pairs, pairs/, and a finished run, runs/translate/whole; not to be changed."""
    folder = tmp_path_factory.mktemp("translate")
    pairs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, *STEPS, "--name", "whole") == 0
    return folder


def train_metrics(run):
    """The train metrics of a run, step by step."""
    records = [record for record in metrics(run) if "train/loss" in record]
    return [{name: value for name, value in record.items() if name.startswith("train/")} for record in records]


def append(file, *lines):
    with open(file, "a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def stdin(monkeypatch, content: bytes):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))


def test_folder_of_a_run(place):
    run = place / RUN
    assert checkpoints.steps(run / "checkpoints") == [6, 12]
    figures = result(run)
    assert figures["test"] == "test" and figures["sentences"] == 10 and 0 <= figures["bleu"] <= 100
    assert figures["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert 0 < figures["copy_bleu"] < 5 < figures["copy_chrf"] < 50  # names and digits are the same in both languages
    assert tokenizers.load(run / "tokenizer.json").vocabulary_size == config(run)["net"]["source_vocabulary"] <= 300
    samples = (run / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("step 6\n") == samples.count("step 12\n") == 1 and samples.count("\n  > ") == 8
    losses = [record["validation/loss"] for record in metrics(run) if "validation/loss" in record]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_attention_is_that_of_the_tokens_that_were_decoded():
    """A net that has learned nothing writes tokens whose text is cut into others."""
    tokenizer = tokenizers.train_sentences([text for pair in dates.pairs(120, 12, 10)[0] for text in pair], 300)
    size = tokenizer.vocabulary_size
    cfg = dataclasses.replace(transformer.PRESETS["tiny"], source_vocabulary=size, target_vocabulary=size)
    model = translator.Translator(spec.init(random.key(1), transformer.spec(cfg)), cfg, tokenizer)
    decoder = translator.Decoder(temperature=3.0)
    (best,) = translator.translations(model, ["Der Bus fährt am Montag."], decoder)[0]
    again = tokenizer.encode(best.text)
    assert best.ids and again != best.ids and tokenizer.decode(best.ids) == best.text
    weights, read, written = translator.maps(model, "Der Bus fährt am Montag.", best.ids)
    assert written[:-1] == tokenizer.tokens(best.ids) and weights["cross"].shape[-2:] == (len(written), len(read))


def test_presets_are_whole_arguments(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert call("--preset", "big", "--help") == 0
    words = capsys.readouterr().out.split()
    assert {"25000)", "300000)", "37000)", "12)", "4000)", "0.3)"} <= set(words)


def test_translation_and_evaluation(here, capsys):
    assert call("translate", "--run", RUN, "Der Bus", "Montag", "--beam", "3", "--n-best", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 4 and scores[0] >= scores[1] and scores[2] >= scores[3]
    append("lines", "Der Bus", "Montag")
    assert call("translate", "--run", RUN, "--file", "lines", "--beam", "3", "--attention", "maps") == 0
    best = [line[10:] for line in lines[::2]]
    assert capsys.readouterr().out.splitlines() == best
    assert is_png(here / "maps" / "cross.png")
    append("gaps", "Der Bus", "", "Montag")
    assert call("translate", "--run", RUN, "--file", "gaps", "--beam", "3") == 0
    assert capsys.readouterr().out.splitlines() == [best[0], "", best[1]]
    assert call("translate", "--run", RUN, "--file", "gaps", "--beam", "3", "-o", "english.txt") == 0
    assert capsys.readouterr().out == ""
    assert (here / "english.txt").read_text(encoding="utf-8").splitlines() == [best[0], "", best[1]]
    assert call("evaluate", "--run", RUN, "--beam", "1") == 0
    figures = result(here / RUN)
    assert f"test: BLEU {figures['bleu']:.2f}, chrF {figures['chrf']:.2f}" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_of_other_data(here, capsys):
    """All pairs that are named count, without any to train on."""
    for name in ("de", "en"):
        shutil.copy(f"pairs/train.{name}", f"news.{name}")
    (here / "other").mkdir()
    for name in ("test_2016.de", "test_2016.en"):
        shutil.copy(f"pairs/test.{name[-2:]}", here / "other" / name)
    for data, name, count in (("news", "news", 120), ("news.de,news.en", "news.de", 120), ("other", "test_2016", 10)):
        assert call("evaluate", "--run", RUN, "--beam", "1", "--data", data) == 0
        out = capsys.readouterr().out
        assert f"{name}: BLEU" in out and f"1: {name} ({count})" in out


def test_checkpoints_differ(here, capsys):
    def scored(checkpoint):
        flags = ("--beam", "2", "--n-best", "2", "--checkpoint", checkpoint)
        assert call("translate", "--run", RUN, "Der Bus", *flags) == 0
        return capsys.readouterr().out

    assert scored("6") != scored("12") == scored("latest")


def test_samples(here, capsys):
    def sampled(*flags):
        assert call("translate", "--run", RUN, *flags, "--temperature", "1", "--n-best", "2") == 0
        return capsys.readouterr().out.splitlines()

    alone = sampled("Der Bus")
    assert sampled("Der Bus") == alone != sampled("Der Bus", "--seed", "1") and len(alone) == 2
    assert sampled("Der Bus", "Der Bus")[:2] == alone
    best = sampled("Der Bus", "--top-k", "1")
    assert best[0] == best[1]


@pytest.mark.slow
def test_micro_batches_have_the_gradient_of_the_whole_batch(here):
    """Sentences differ in length and the rows do not divide by 5: a mean of means would be another loss."""
    assert call(*QUICK, *STEPS, "--dropout", "0.2", "--name", "one") == 0
    assert call(*QUICK, *STEPS, "--dropout", "0.2", "--micro-batches", "5", "--name", "five") == 0
    one, five = (train_metrics(here / "runs" / "translate" / name) for name in ("one", "five"))
    # Sums in another order, 12 steps of Adam long.
    assert len(one) == 2 and all(a == pytest.approx(b, rel=1e-3) for a, b in zip(one, five, strict=True))


@pytest.mark.slow
def test_bfloat16(here):
    assert call(*QUICK, *STEPS, "--dtype", "bfloat16", "--name", "half") == 0
    half, whole = (train_metrics(here / "runs" / "translate" / name) for name in ("half", "whole"))
    for a, b in zip(half, whole, strict=True):
        assert a["train/loss"] != b["train/loss"] and a["train/loss"] == pytest.approx(b["train/loss"], rel=0.02)


def test_data_may_move_but_not_change(here, capfd):
    shutil.move("pairs", "moved")
    assert call("--resume", "--name", "whole", "--data", "moved", "--steps", "13") == 0
    assert "resumed with --data moved (it was started with pairs)" in capfd.readouterr().out
    file = here / "moved" / "train.en"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines[1:], lines[0]]), encoding="utf-8")  # as many, and as long
    assert call("--resume", "--name", "whole", "--data", "moved", "--steps", "14") == 2
    line = runs.one_error(capfd.readouterr().err)
    assert "cannot resume 'runs/translate/whole': its checkpoint has data" in line


@pytest.mark.slow
def test_sentences_longer_than_the_context_are_left_out_everywhere(here, capsys):
    for part in ("train", "val", "test"):
        for language in ("de", "en"):
            append(f"pairs/{part}.{language}", "ja " * 300)
    assert call(*QUICK, *STEPS, "--name", "long") == 0
    out = capsys.readouterr().out
    for part in ("training", "validation", "test"):
        assert f"{part}: 1 pairs with over 128 tokens" in out
    assert result(here / "runs" / "translate" / "long")["sentences"] == 10
    assert call("evaluate", "--run", "runs/translate/long", "--beam", "1") == 0
    assert "test: 1 pairs with over 128 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("entrance", ["file", "stdin"])
def test_bad_records_are_empty_lines(entrance, here, capsys, caplog, monkeypatch):
    lines = [b"Der Bus", b"ja " * 300, *[b"Montag"] * 18, b"sch\xf6n", b"Montag"]
    content = b"\n".join(lines) + b"\n"
    (here / "lines").write_bytes(content)
    stdin(monkeypatch, content)
    assert call("translate", "--run", RUN, "--beam", "2", *(["--file", "lines"] if entrance == "file" else [])) == 0
    out = capsys.readouterr().out.split("\n")
    assert [bool(line) for line in out] == [True, False, *[True] * 18, False, True, False]
    assert len({*out[2:20], out[21]}) == 1
    assert "sentence 2 has 901 tokens, the network positions for 128; it is left empty: 'ja ja" in caplog.text
    if entrance == "file":
        assert "lines are left empty; line 21 is not UTF-8 text: byte 0xf6" in caplog.text
        assert "1 of 22 sentences are left empty" in caplog.text
    else:
        assert "sentence 21 cannot be encoded" in caplog.text and "2 of 22 sentences are left empty" in caplog.text


@pytest.mark.slow
def test_compiled_run_has_a_graph_per_shape(here, monkeypatch):
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr("train.step.make_step", functools.partial(make_step, backend=graphs))
    torch._dynamo.reset()
    assert call(*QUICK[:-1], *STEPS, "--tokens", "2000", "--name", "compiled") == 0
    assert call(*QUICK, *STEPS, "--tokens", "2000", "--name", "eager") == 0
    folder = here / "runs" / "translate"
    assert graphs.frame_count == result(folder / "compiled")["shapes"] > 0
    compiled, eager = ([record["train/loss"] for record in train_metrics(folder / n)] for n in ("compiled", "eager"))
    assert compiled == pytest.approx(eager, rel=1e-4) and len(compiled) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["translate", "--run", RUN, "a", "--beam", "0"], "--beam is 0; expected at least 1"),
        (["translate", "--run", RUN, "a", "--top-k", "3"], "give --temperature too"),
        (["translate", "--run", RUN, "a", "--temperature", "0"], "--temperature is 0.0; expected a number above 0"),
        (["translate", "--run", RUN, "--file", "latin1"], "latin1 line 1 is not UTF-8 text"),
        (["translate", "--run", RUN, "--file", "none", "-o", "new"], "none does not exist"),
        (["translate", "--run", RUN, "a", "--beam", "1", "--n-best", "2"], "--n-best is 2"),
        (["translate", "--run", RUN, "a " * 300, "-o", "new"], "the network positions for 128"),
        (["translate", "--run", RUN, "a", "-o", "latin1"], "--out 'latin1' exists already"),
        (["translate", "--run", RUN, "a", "--attention", "pairs"], "--attention 'pairs' exists already"),
        (["translate", "--run", RUN, "a", "--checkpoint", "7"], "7"),
        (["evaluate", "--run", RUN, "--test", "x"], "--test 'x' is no test set of pairs; there are test"),
        (["evaluate", "--run", RUN, "--data", "nowhere"], "'nowhere' does not exist"),
        (["evaluate", "--run", RUN, "--data", "pairs/test.de,a.de"], "expected as many"),
        (["translat", "--run", RUN, "a"], "'translat' is unknown; expected flags, or one of the sub-commands"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    (here / "latin1").write_bytes("schön".encode("latin-1"))
    assert message in refused(capfd, *flags)


def test_nothing_short_enough_is_refused_at_the_start(here, capfd):
    for language in ("de", "en"):
        (here / "pairs" / f"test.{language}").write_text("ja " * 300 + "\n", encoding="utf-8")
    line = refused(capfd, *QUICK, "--steps", "1000000")
    assert "test: not one of 1 pairs has up to 128 tokens on both sides" in line


def test_run_without_its_tokenizer(here, capfd):
    (here / RUN / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(capfd, "translate", "--run", RUN, "a")


@pytest.mark.long
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise, compiled."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "translate").iterdir()
    assert result(run)["exact_match"] >= 0.99
