"""pix2pix.py and cyclegan.py: pictures from pictures."""

import shutil

import numpy as np
import pytest
from PIL import Image

from core import spec
from nets.generative import cyclegan, pix2pix
from tests.experiments import runs
from tests.experiments.runs import config, flag_id, is_png, result, same_bits
from train.run import checkpoints

QUICK = ("--steps", "2", "--batch", "2", "--save-every", "1", "--sample-every", "1", "--no-compile")
NETS = {"cyclegan": cyclegan, "pix2pix": pix2pix}


def picture(path, seed, size=(40, 40), grey=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels[..., 0] if grey else pixels).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of pictures, and a finished run of each script, runs/.../whole; not to be changed."""
    folder = tmp_path_factory.mktemp("translating")
    for i in range(6):
        picture(folder / "first" / f"{i}.png", i)
        picture(folder / "second" / f"{i}.png", 10 + i)
        picture(folder / "halves" / "train" / f"{i}.png", i, (80, 40))
        picture(folder / "halves" / "val" / f"{i}.png", 20 + i, (80, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for experiment in NETS:
            assert runs.call(experiment, *QUICK, "--name", "whole") == 0
    return folder


def averages(experiment, run):
    module = NETS[experiment]
    model = module.generator_spec(module.Config(**config(run)["net"]))
    params, _ = spec.split(model, spec.abstract(model))
    if experiment == "cyclegan":
        params = {"back": params, "there": params}
    return checkpoints.restore(run / "checkpoints", params, part="generator.opt_state.average")


@pytest.mark.parametrize("experiment", NETS)
def test_folder_of_a_run(experiment, place):
    run = place / "runs" / experiment / "whole"
    assert checkpoints.steps(run / "checkpoints") == [1, 2] and is_png(run / "translations.png")
    assert len(list((run / "frames").glob("*.png"))) == 2 and (run / "training.gif").read_bytes()[:3] == b"GIF"
    names = {"pix2pix": ("l1", "l1_source"), "cyclegan": ("cycle_x", "cycle_y", "error")}[experiment]
    assert all(0 < result(run)[name] < 2 for name in names)


@pytest.mark.parametrize("experiment", NETS)
def test_resumed_run_has_the_same_bits(experiment, here):
    run = here / "runs" / experiment / "whole"
    whole = averages(experiment, run)
    shutil.rmtree(run / "checkpoints" / "2")
    assert runs.call(experiment, "--resume") == 0
    assert same_bits(averages(experiment, run), whole)


@pytest.mark.parametrize("experiment", NETS)
def test_own_pictures(experiment, here, capsys):
    run = f"runs/{experiment}/whole"
    back = ("--back",) if experiment == "cyclegan" else ()
    assert runs.call(experiment, "translate", "--run", run, "first/0.png", "first/1.png", *back) == 0
    paths = [here / line for line in capsys.readouterr().out.split()]
    assert [path.name for path in paths] == ["0.png", "1.png"] and all(map(is_png, paths))


@pytest.mark.parametrize("flags", [("--data", "halves", "--source", "right"), ("--data", "first,second")], ids=flag_id)
def test_pix2pix_of_own_pairs(flags, here):
    assert runs.call("pix2pix", *QUICK, *flags, "--name", "one") == 0
    assert result(here / "runs" / "pix2pix" / "one")["l1"] > 0


def test_cyclegan_of_own_folders(here):
    assert runs.call("cyclegan", *QUICK, "--data", "first,second", "--objective", "hinge", "--name", "one") == 0
    assert "error" not in result(here / "runs" / "cyclegan" / "one")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["pix2pix", "--data", "nowhere"], "nowhere/train does not exist, expected a folder of pictures"),
        (["pix2pix", "--data", "halves,first"], "no picture in halves"),
        (["pix2pix", "--data", "first,lone"], "has no pair"),
        (["pix2pix", "--preset", "large"], "--preset 'large' is unknown; expected one of paper, instance, small"),
        (["pix2pix", "--size", "60"], "--size is 60; expected a multiple of 64"),
        (["pix2pix", "--batch", "9999"], "--batch is 9999, but there are"),
        (["pix2pix", "--objective", "l3"], "--objective 'l3' is unknown"),
        (["pix2pix", "--resume", "--name", "whole", "--l1", "3"], "it was started with 100.0"),
        (["pix2pix", "translate", "--run", "runs/pix2pix/whole", "none.png"], "none.png"),
        (["cyclegan", "--data", "first"], "--data 'first' is neither digits nor two folders"),
        (["cyclegan", "--data", "first,grey"], "grey has one picture; expected at least 2"),
        (["cyclegan", "--data", "first,nowhere"], "nowhere does not exist"),
        (["cyclegan", "--size", "30"], "--size is 30; expected a multiple of 4"),
        (["cyclegan", "--preset", "large"], "--preset 'large' is unknown; expected one of paper, paper-128, small"),
        (["cyclegan", "--capacity", "0"], "--capacity is 0; expected at least 1"),
        (["cyclegan", "translate", "--run", "runs/pix2pix/whole", "first/0.png"], "does not fit"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    picture(here / "grey" / "0.png", 0, grey=True)
    picture(here / "lone" / "9.png", 0)
    experiment, *others = flags
    quick = () if {"translate", "--resume"} & set(others) else QUICK
    assert message in runs.refused(experiment, capfd, *quick, *others)
