import functools
import shutil

import pytest

from core import spec
from nets.generative import stylegan
from tests.experiments import runs
from tests.experiments.runs import config, flag_id, is_png, metrics, result, same_bits
from train.run import checkpoints

call, refused = (functools.partial(function, "stylegan") for function in (runs.call, runs.refused))
QUICK = ("--steps", "4", "--batch", "4", "--phase", "4", "--size", "16", "--first", "1", "--no-compile")
STEPS = ("--save-every", "2", "--sample-every", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run that grew from 8 to 16 pixels, runs/stylegan/whole; not to be changed."""
    folder = tmp_path_factory.mktemp("stylegan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, *STEPS, "--name", "whole") == 0
    return folder


def averages(run):
    model = spec.abstract(stylegan.generator_spec(stylegan.Config(**config(run)["net"])))
    return checkpoints.restore(run / "checkpoints", model, part="generator.opt_state.average")


def test_folder_of_a_run(place):
    run = place / "runs" / "stylegan" / "whole"
    assert checkpoints.steps(run / "checkpoints") == [2, 4]
    assert all(is_png(run / name) for name in ("samples.png", "mixed.png", "loss.png"))
    assert (run / "training.gif").read_bytes()[:3] == b"GIF"
    assert result(run)["frechet_distance"] > 0 and result(run)["level"] == 2
    # 4 images at 8 pixels, then 16 pixels are faded in over 4 and trained.
    assert metrics(run)[-1]["level"] == 2 and metrics(run)[-1]["alpha"] == 1


def test_resumed_run_has_the_same_bits(here):
    run = here / "runs" / "stylegan" / "whole"
    whole = averages(run)
    shutil.rmtree(run / "checkpoints" / "4")
    assert call("--resume") == 0
    assert same_bits(averages(run), whole)


def test_samples(here):
    run = here / "runs" / "stylegan" / "whole"
    assert call("sample", "--run", "runs/stylegan/whole", "--count", "4") == 0
    first = (run / "sampled.png").read_bytes()
    assert call("sample", "--run", "runs/stylegan/whole", "--count", "4", "--truncation", "0") == 0
    assert is_png(run / "sampled.png") and (run / "sampled.png").read_bytes() != first
    before = (run / "mixed.png").read_bytes()
    assert call("sample", "--run", "runs/stylegan/whole", "--mix", "--seed", "3") == 0
    assert (run / "mixed.png").read_bytes() != before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "large"], "--preset 'large' is unknown; expected one of paper, photographs-128"),
        (["--size", "12"], "size is 12; expected a power of 2 from 8 on"),
        (["--first", "5"], "--first is 5; expected 0 to 2, the level of 16 pixels"),
        (["--phase", "0"], "--phase is 0; expected at least 1"),
        (["--batch", "6"], "batch 6 is not divisible into groups of 4"),
        (["--data", "nowhere"], "'nowhere' does not exist"),
        (["--classifier", "nowhere"], "nowhere"),
        (["--resume", "--name", "whole", "--size", "32"], "it was started with 16"),
        (["sample", "--run", "nowhere"], "nowhere"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    quick = () if flags[0] in ("sample", "--resume") else QUICK
    assert message in refused(capfd, *quick, *flags)
