import functools
import shutil

import numpy as np
import pytest
import torch

from core import random, spec, tree
from core.per_example import each
from nets.language import gpt2
from tests.experiments import runs
from tests.experiments.runs import flag_id, is_png, metrics, result
from train.data.text import text, token_files
from train.losses import cross_entropy

call, refused, completed = (
    functools.partial(function, "noise_scale") for function in (runs.call, runs.refused, runs.completed)
)
QUICK = ("--batch", "8", "--steps", "12", "--save-every", "6", "--no-compile", "--text", "words")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run, runs/noise_scale/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("noise_scale")
    (folder / "words").write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, "--name", "whole") == 0
        assert call(*QUICK[:2], "--steps", "1", *QUICK[4:], "--name", "one") == 0
    return folder


def test_folder_of_a_run(place):
    run = place / "runs" / "noise_scale" / "whole"
    assert is_png(run / "noise_scale.png")
    figures = result(run)
    assert figures["trace"] > figures["trace_without_embedding"] > 0
    assert figures["noise_scale"] == pytest.approx(figures["trace"] / figures["square"])
    last = metrics(run)[-1]
    assert last["step"] == 12 and last["train/noise_trace"] == pytest.approx(figures["trace"], rel=1e-5)


def test_first_step_is_that_of_single_gradients(here):
    """The figures of one step against the gradients of its windows, one by one, at the initial values."""
    figures = result(here / "runs" / "noise_scale" / "one")
    tokens, tokenizer = token_files.tokens_of(here / "words", None, cache=here / "tokens")
    cfg = gpt2.Config(tokenizer.vocabulary_size, 64, 2, 4, 64, 0.0, bias=False)
    init_key, _ = random.split(random.key(0)).unbind(0)
    params = spec.init(init_key, gpt2.spec(cfg))
    (batch,) = text.token_batches(text.split(tokens)[0], random.fold_in(random.key(0), 2), range(1), 8, 64)

    def losses(p, b):
        return cross_entropy(gpt2.apply(p, b[0], cfg), b[1], reduction="none").mean(1)

    flat = {name: g.flatten(1).double() for name, g in tree.items(each(losses, params, batch))}
    for ending, chosen in (("", flat), ("_without_embedding", {n: g for n, g in flat.items() if n != "tokens.weight"})):
        rows = torch.cat(list(chosen.values()), 1).numpy()
        trace = rows.var(0, ddof=1).sum()
        assert figures[f"trace{ending}"] == pytest.approx(trace, rel=1e-4)
        assert figures[f"square{ending}"] == pytest.approx(np.square(rows.mean(0)).sum() - trace / 8, rel=1e-3)


def test_resumed_run_has_the_same_figures(here):
    run = here / "runs" / "noise_scale" / "whole"
    figures = result(run)
    shutil.rmtree(run / "checkpoints" / "12")
    assert call("--resume", "--name", "whole") == 0
    assert {**result(run), "seconds": 0} == {**figures, "seconds": 0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "12"], "--batch is 12; expected a power of two from 4 on"),
        (["--decay", "1"], "--decay is 1.0; expected a number in [0, 1)"),
        (["--setting", "huge"], "--setting 'huge' is unknown; expected one of small, nanogns"),
        (["--text", "nowhere"], "nowhere does not exist"),
        (["--resume", "--name", "whole", "--steps", "20"], "with --steps 20: it was started with 12"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, *flags)


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The noise scale grows past the batch, and one small batch is a far more uncertain estimate than all examples."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "noise_scale").iterdir()
    figures = result(run)
    assert 10 < figures["noise_scale"] < 100 and figures["steps_with_noise_scale_above_batch"] > 40
    assert figures["spread_every_example"] < 0.6 * figures["spread_one_small_batch"]
