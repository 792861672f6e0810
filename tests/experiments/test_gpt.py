import os
import re
import shutil

import pytest
import torch

from nets.language import gpt2
from tests.experiments.gpt_runs import QUICK, TEXT, call, completed, start, state_of
from tests.experiments.runs import ENVIRONMENT, config, finish, is_png, metrics, result, same_bits, wait_for_step
from train.data.text import tokenizers
from train.run import checkpoints

STEPS = ("--steps", "24", "--save-every", "6", "--eval-every", "4")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a finished run of 24 steps, runs/gpt/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("gpt")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "stdout").write_text(completed(folder, *QUICK, *STEPS, "--name", "whole"), encoding="utf-8")
    return folder


def continuation(cfg, params, tokenizer, prompt, count):
    """Greedy continuation without a cache, each token from a forward pass over the whole text."""
    ids = tokenizer.encode(prompt)
    for _ in range(count):
        ids.append(int(gpt2.apply(params, torch.tensor([ids]), cfg)[0, -1].argmax()))
    return tokenizer.decode(ids)


def test_folder_of_a_run(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = place / "runs" / "gpt" / "whole"
    figures = result(run)
    assert figures["steps"] == 24 and figures["seconds"] > 0 and 0 < figures["val_loss"] < 3.6  # log(37) = 3.6
    args = config(run)["args"]
    assert args["text"] == "text.txt" and args["batch"] == 2 and config(run)["net"]["width"] == 128
    assert checkpoints.steps(run / "checkpoints") == [12, 18, 24]  # 12 would stay: the best of the validated ones
    assert is_png(run / "loss.png")
    assert len((run / "sample.txt").read_text(encoding="utf-8")) > 400
    events = EventAccumulator(str(run)).Reload()
    assert [e.step for e in events.Scalars("validation/loss")] == [4, 8, 12, 16, 20, 24]
    assert events.Scalars("validation/loss")[-1].value == pytest.approx(figures["val_loss"])
    assert {"train/loss", "train/grad_norm", "train/update_norm"} <= set(events.Tags()["scalars"])
    out = (place / "stdout").read_text(encoding="utf-8")
    assert "step 24/24" in out and (run / "sample.txt").read_text(encoding="utf-8").strip() in out
    last = out.splitlines()[-1]
    assert f"{figures['val_loss']:.4f}" in last and "runs/gpt/whole/" in last


def test_validation_loss_is_the_mean_over_the_last_tenth(place):
    run = place / "runs" / "gpt" / "whole"
    characters = sorted(set(TEXT))
    ids = torch.tensor([characters.index(c) for c in TEXT])
    held_out = ids[int(len(ids) * 0.9) :]
    cfg = gpt2.Config(**checkpoints.read_config(run / "checkpoints")["net"])
    params, total = state_of(run).params, 0.0
    for at in range(0, len(held_out) - 1, cfg.context):
        window = held_out[at : at + cfg.context + 1]
        scores = gpt2.apply(params, window[None, :-1], cfg)[0]
        total += torch.nn.functional.cross_entropy(scores, window[1:], reduction="sum").item()
    assert result(run)["val_loss"] == pytest.approx(total / (len(held_out) - 1), rel=1e-5)


def test_embedded_text_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("--steps", "2", "--batch", "2", "--no-compile") == 0
    (run,) = (tmp_path / "runs" / "gpt").iterdir()
    assert config(run)["net"]["vocabulary"] > 80
    assert result(run)["steps"] == 2 and str(run.relative_to(tmp_path)) in capsys.readouterr().out


def test_progress_bar_on_a_terminal(here):
    master, terminal = os.openpty()
    with start(here, *QUICK, "--steps", "4", stdout=terminal, env={**ENVIRONMENT, "TERM": "xterm"}) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                shown += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
        assert process.wait() == 0 and process.stderr.read() == ""
    os.close(master)
    bar = shown.decode()
    assert "4/4" in bar and "━" in bar and "loss" in bar and "tokens/s" in bar


# --- sample


def test_greedy_sample_equals_the_model_without_cache(here, capsys):
    run = here / "runs" / "gpt" / "whole"
    cfg = gpt2.Config(**checkpoints.read_config(run / "checkpoints")["net"])
    characters = tokenizers.load(run / "tokenizer.json")
    expected = continuation(cfg, state_of(run).params, characters, "The 7 quick", 30)
    for options in (("--temperature", "0"), ("--top-k", "1"), ("--top-p", "1e-9")):
        assert call("sample", "--run", run, "--prompt", "The 7 quick", "--max-new-tokens", "30", *options) == 0
        assert capsys.readouterr() == (expected + "\n", "")


def test_sample_repeats_by_its_seed_and_has_a_default_prompt(here, capsys):
    texts = []
    for seed in ("0", "0", "1"):
        assert call("sample", "--run", "runs/gpt/whole", "--max-new-tokens", "100", "--seed", seed, "--top-k", "9") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 102  # with the line ends at both ends


def test_samples_end_after_a_text(here, capsys):
    flags = ("--max-new-tokens", "400", "--count", "3", "--stop", "e", "--repetition-penalty", "1.1")
    assert call("sample", "--run", "runs/gpt/whole", "--prompt", "The", *flags) == 0
    first, *others = re.split(r"\n\n--- sample \d\n", capsys.readouterr().out.removesuffix("\n"))
    assert len(others) == 2
    assert all(text.startswith("The") and text[3:].find("e") == len(text) - 4 for text in (first, *others))


def test_sample_into_a_closed_pipe_ends_quietly(here):
    with start(here, "sample", "--run", "runs/gpt/whole", "--max-new-tokens", "5000") as process:
        os.read(process.stdout.fileno(), 5)
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 1)


def test_text_without_a_line_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("abcde" * 300)
    assert call(*QUICK, "--steps", "1", "--name", "a") == 0
    assert len((tmp_path / "runs" / "gpt" / "a" / "sample.txt").read_text()) == 401


# --- evaluate


def test_evaluation_repeats_the_figures_beside_the_baseline(here, capsys):
    figures = result(here / "runs" / "gpt" / "whole")
    assert call("evaluate", "--run", "runs/gpt/whole") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    loss, baseline = figures["val_loss"], figures["unigram_entropy"]
    assert last.startswith(f"loss {loss:.4f} nats per token (unigram entropy: {baseline:.4f}), perplexity ")
    assert last.endswith("checkpoint of step 24")


# --- resume


def test_resume_from_an_older_checkpoint_gives_the_same_bits(here, place):
    run = here / "runs" / "gpt" / "whole"
    for step in (18, 24):
        shutil.rmtree(run / "checkpoints" / str(step))
    assert call("--resume") == 0  # the newest, and only, run
    whole = place / "runs" / "gpt" / "whole"
    assert same_bits(state_of(run), state_of(whole))
    assert result(run)["val_loss"] == result(whole)["val_loss"]
    records = metrics(run)
    pairs = [(r["step"], name) for r in records for name in r if name not in ("step", "time")]
    assert len(pairs) == len(set(pairs)) and [r["step"] for r in records] == sorted(r["step"] for r in records)


def test_resume_takes_free_flags_and_flags_that_agree(here):
    agreeing = ("--text", "text.txt", "--batch=2", "--seed", "0", "--no-compile", "--dtype", "float32")
    assert call("--resume", "--name", "whole", *agreeing, "--steps", "30", "--save-every", "3") == 0
    run = here / "runs" / "gpt" / "whole"
    assert result(run)["steps"] == 30 and checkpoints.steps(run / "checkpoints") == [24, 27, 30]
    args = config(run)["args"]
    assert args["steps"] == 30 and args["batch"] == 2 and args["common"]["compile"] is False


def test_run_stopped_before_its_first_checkpoint_begins_again(here, place):
    run = here / "runs" / "gpt" / "whole"
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir(parents=True)
    assert call("--resume", "--name", "whole") == 0
    assert same_bits(state_of(run), state_of(place / "runs" / "gpt" / "whole"))
    steps = [record["step"] for record in metrics(run)]
    assert steps == sorted(steps) and steps.count(24) == 2  # training and validation


# --- what the flags reach


def test_seed(here):
    assert call(*QUICK, "--steps", "1", "--name", "seed", "--seed", "1") == 0
    assert call(*QUICK, "--steps", "1", "--name", "other") == 0
    runs = here / "runs" / "gpt"
    assert not same_bits(state_of(runs / "seed").params, state_of(runs / "other").params)


@pytest.mark.slow
def test_precision(here):
    assert call(*QUICK, *STEPS, "--name", "bfloat16", "--dtype", "bfloat16") == 0
    runs = here / "runs" / "gpt"
    half = state_of(runs / "bfloat16").params
    assert half["tokens"]["weight"].dtype == torch.float32
    assert not same_bits(half, state_of(runs / "whole").params)
    assert result(runs / "bfloat16")["val_loss"] == pytest.approx(result(runs / "whole")["val_loss"], rel=0.02)


@pytest.mark.slow
def test_micro_batches_give_the_same_training(here):
    assert call(*QUICK, *STEPS, "--name", "parts", "--micro-batches", "2") == 0
    runs = here / "runs" / "gpt"
    assert result(runs / "parts")["val_loss"] == pytest.approx(result(runs / "whole")["val_loss"], rel=1e-3)


def test_byte_pairs_and_their_cache(here, capsys):
    pairs = tokenizers.train_byte_pairs([TEXT], 300)
    pairs.save("pairs.json")
    flags = (*QUICK, "--steps", "3", "--tokenizer", "pairs.json")
    assert call(*flags, "--name", "a") == 0
    (cache,) = (here / "runs" / "gpt" / "tokens").iterdir()
    stamp = cache.stat().st_mtime_ns
    assert call(*flags, "--name", "b") == 0
    assert cache.stat().st_mtime_ns == stamp
    runs = here / "runs" / "gpt"
    assert same_bits(state_of(runs / "a"), state_of(runs / "b"))
    params = state_of(runs / "a").params
    assert params["tokens"]["weight"].shape[0] == pairs.vocabulary_size
    capsys.readouterr()
    flags = ("--prompt", "naïve 🦊", "--max-new-tokens", "20", "--temperature", "0")
    assert call("sample", "--run", "runs/gpt/a", *flags) == 0
    cfg = gpt2.Config(**checkpoints.read_config(runs / "a" / "checkpoints")["net"])
    assert capsys.readouterr().out.rstrip("\n") in continuation(cfg, params, pairs, "naïve 🦊", 20)
    assert call("--resume", "--name", "a", "--steps", "4") == 0


# --- slow: the whole thing


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise: a few minutes, compiled, on the embedded text."""
    out = completed(tmp_path)
    (run,) = (tmp_path / "runs" / "gpt").iterdir()
    figures = result(run)
    assert figures["val_loss"] < 2.0 and figures["seconds"] < 600
    assert f"{figures['val_loss']:.4f}" in out.splitlines()[-1] and run.name in out.splitlines()[-1]


@pytest.mark.slow
def test_compiled_run_killed_and_resumed_gives_the_same_bits(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = ("--text", "text.txt", "--batch", "2", "--steps", "60", "--save-every", "5", "--dropout", "0.1")
    assert "compiling" in completed(tmp_path, *flags, "--name", "whole")
    process = start(tmp_path, *flags, "--name", "killed")
    wait_for_step(process, tmp_path / "runs" / "gpt" / "killed", 10)
    process.kill()
    finish(process)
    assert finish(start(tmp_path, "--resume", "--name", "killed"))[0] == 0
    assert same_bits(state_of(tmp_path / "runs/gpt/killed"), state_of(tmp_path / "runs/gpt/whole"))
