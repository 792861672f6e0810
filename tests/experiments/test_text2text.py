"""text2text.py: prefixes, answers, other runs and published weights, adapters, metrics, bad records."""

import functools
import io
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from core import random, spec
from experiments.parts import text_to_text as parts
from nets.language import t5
from tests.experiments import runs
from tests.registry.experiments.language import questions
from train.data.text.subwords import train_character_pairs
from train.run import open_run

call = functools.partial(runs.call, "text2text")
DATA = ("--data", "pairs.jsonl", "--longest", "32", "--tokens", "200", "--no-compile")
STEPS = ("--steps", "12", "--save-every", "6", "--eval-every", "6")
RUN = Path("runs/text2text/a")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run called `a`."""
    folder = tmp_path_factory.mktemp("text2text")
    questions(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*DATA, *STEPS, "--prefix", "count: ", "--vocabulary", "40", "--name", "a") == 0
    return folder


def answers(capsys, *argv) -> list[str]:
    capsys.readouterr()
    assert call("predict", *argv) == 0
    return capsys.readouterr().out.splitlines()


def test_the_prefix_of_a_run_is_before_each_text(here, capsys):
    own = answers(capsys, "--run", RUN, "say 3", "--n-best", "2")
    assert answers(capsys, "--run", RUN, "count: say 3", "--prefix", "", "--n-best", "2") == own
    assert answers(capsys, "--run", RUN, "say 3", "--prefix", "other: ", "--n-best", "2") != own


def test_an_answer_does_not_depend_on_the_other_texts(here, capsys, monkeypatch):
    texts = ["say 3", "say 100", "say 12 say 12 say 12"]
    together = answers(capsys, "--run", RUN, *texts, "--n-best", "2")
    alone = [line for text in texts for line in answers(capsys, "--run", RUN, text, "--n-best", "2")]
    assert [line[10:] for line in together] == [line[10:] for line in alone]
    scores = [[float(line[:8]) for line in lines] for lines in (together, alone)]
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)
    Path("lines.txt").write_text("say 3\n\nsay 100\n", encoding="utf-8")
    from_file = answers(capsys, "--run", RUN, "--file", "lines.txt")
    assert from_file == [together[0][10:], "", together[2][10:]]
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"say 3\n\nsay 100\n")))
    assert answers(capsys, "--run", RUN) == from_file


def test_figures_stand_beside_answers_without_a_net(here):
    result = runs.result(RUN)
    assert {"bleu", "chrf", "exact_match", "copy_exact_match", "nearest_exact_match", "test_loss"} <= result.keys()
    losses = [line["train/loss"] for line in runs.metrics(RUN) if "train/loss" in line]
    assert losses[-1] < losses[0]
    mistakes = (RUN / "mistakes.txt").read_text(encoding="utf-8").splitlines()
    assert mistakes[0] == "source\ttarget\twritten" and mistakes[1].startswith("count: say ")


def test_neighbours_are_held_out_together(here):
    """Blocks of eight, one of ten; the bad line is one of them."""
    assert runs.result(RUN)["sentences"] == 8


def test_a_run_is_the_weights_of_another_and_has_adapters(here, capsys):
    flags = (*DATA, *STEPS, "--weights", RUN, "--prefix", "count: ", "--learning-rate", "0.02")
    assert call(*flags, "--lora", "2", "--name", "b") == 0
    other = RUN.with_name("b")
    assert (other / "adapter" / "adapter_model.safetensors").exists()
    assert "targets that the tokenizer cannot write" not in capsys.readouterr().out
    merged, before = (parts.of_run(open_run(run, run.parent)).params for run in (other, RUN))
    a, b = (p["encoder"]["blocks"][0]["attn"]["q"]["weight"] for p in (merged, before))
    assert torch.equal(merged["tokens"]["weight"], before["tokens"]["weight"]) and not torch.equal(a, b)
    own = answers(capsys, "--run", other, "say 3")
    assert answers(capsys, "--weights", other, "--prefix", "count: ", "--longest", "32", "say 3") == own
    RUN.rename(RUN.with_name("moved"))  # the adapters' weights
    assert call("predict", "--run", other, "say 3") == 2


def test_targets_that_no_token_writes_are_counted(here, capsys):
    lines = [json.dumps({"source": f"say {i}", "target": f"{i} é"}) for i in range(120)]
    Path("accents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    flags = ("--data", "accents.jsonl", "--weights", RUN, *DATA[2:], *STEPS, "--name", "c")
    assert call(*flags) == 0
    assert "targets that the tokenizer cannot write  8 of 8, such as" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("evaluate", "--weights", RUN), "published weights have no data of their own; name pairs with --data"),
        (("evaluate", "--run", RUN, "--weights", RUN), "expected either --run DIR or --weights SOURCE"),
        (("predict", "--run", RUN, "--n-best", "5", "say 1"), "--n-best is 5; expected 1 to 4"),
        (("predict", "--run", RUN, "say 1 " * 40), "sentence 1 has"),
        (("predict", "--weights", "runs", "say 1"), "config.json"),
        (("evaluate", "--run", RUN, "--data", "few.tsv", "--test", "x"), "--test 'x' is no test set of few.tsv"),
    ],
)
def test_refusals(argv, error, here, capfd):
    assert error in runs.refused("text2text", capfd, *argv)


def test_rouge_is_asked_for_before_the_run(here, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    line = runs.refused("text2text", capfd, *DATA, "--metric", "rouge")
    assert "ROUGE needs the package rouge-score: pip install rouge-score" in line


def test_steps_are_in_proportion_to_the_initial_values():
    """After one step of Adam, every entry has moved by its rate."""
    cfg = t5.Config(31, 1, 1, heads=2, depth=4, width=16, hidden=8)
    params = spec.init(random.key(0), t5.spec(cfg))
    optimizer = parts.adamw(lambda count: torch.tensor(0.01), 0.0, cfg)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    block = updates["decoder"]["blocks"][0]["cross"]
    for leaf, factor in ((block["kv"], 1), (block["q"], 1 / 2), (updates["tokens"], 4)):
        torch.testing.assert_close(leaf["weight"].abs().max(), torch.tensor(0.01 * factor), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_published_weights(here, capsys):
    """A folder as the hub has it: greedy answers are those of transformers."""
    from tests.nets.language.t5_cases import model_in, write

    Path("t5").mkdir()
    folder = write(Path("t5"), "1.1")
    tokenizer = train_character_pairs(["say 1234567890"], 30)
    tokenizer.save(folder / "tokenizer.json")
    ids = torch.tensor([tokenizer.tokenizer.encode("say 42").ids])
    never = [[0], *([i] for i in range(tokenizer.vocabulary_size, 31))]
    options = {"num_beams": 1, "do_sample": False, "bad_words_ids": never, "use_cache": False}
    out = model_in(folder).generate(ids, max_new_tokens=16, **options)
    expected = tokenizer.decode([i for i in out[0].tolist() if i > 1])
    assert answers(capsys, "--weights", folder, "say 42", "--beam", "1", "--longest", "16") == [expected]


@pytest.mark.long
def test_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--name", "a", "--no-compile") == 0
    result = runs.result(RUN)
    assert result["exact_match"] >= 0.95 and result["nearest_exact_match"] < 0.05
