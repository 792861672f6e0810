import functools

import pytest
from PIL import Image

from tests.experiments import runs
from tests.experiments.runs import config, is_png, metrics, result

DRAWN = True
call, refused = (functools.partial(function, "stylegan") for function in (runs.call, runs.refused))
QUICK = ("--steps", "4", "--batch", "4", "--phase", "4", "--size", "16", "--first", "1", "--no-compile")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run that grew from 8 to 16 pixels, runs/stylegan/whole; not to be changed."""
    folder = tmp_path_factory.mktemp("stylegan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, "--save-every", "2", "--name", "whole") == 0
    return folder


def faces(folder, count):
    folder.mkdir()
    for i in range(count):
        Image.effect_noise((20, 24), 60).convert("RGB").save(folder / f"{i}.png")


def test_images_grow(place):
    run = place / "runs" / "stylegan" / "whole"
    # 4 images at 8 pixels, then 16 pixels are faded in over 4 and trained.
    assert metrics(run)[-1]["level"] == 2 and metrics(run)[-1]["alpha"] == 1 and result(run)["level"] == 2


def test_samples_overwrite_nothing(here):
    run, flags = here / "runs" / "stylegan" / "whole", ("sample", "--run", "runs/stylegan/whole")
    mixed = (run / "mixed.png").read_bytes()
    assert call(*flags, "--count", "4") == 0
    assert call(*flags, "--count", "4", "--truncation", "0") == 0
    assert call(*flags, "--mix", "--seed", "3") == 0
    assert is_png(run / "sampled_2.png") and (run / "sampled.png").read_bytes() != (run / "sampled_2.png").read_bytes()
    assert (run / "mixed.png").read_bytes() == mixed != (run / "mixed_2.png").read_bytes()
    assert call(*flags, "--count", "4", "--checkpoint", "2", "--out", "first.png") == 0 and is_png(here / "first.png")


def test_sample_refuses_an_existing_file(here, capfd):
    (here / "own.png").write_bytes(b"mine")
    line = refused(capfd, "sample", "--run", "runs/stylegan/whole", "--out", "own.png")
    assert "'own.png' exists already; choose another --out" in line


def test_sizes_of_a_preset(monkeypatch, capsys):
    """Its own sizes are the defaults; 0 is none of them."""
    monkeypatch.setenv("COLUMNS", "200")
    assert call("--preset", "photographs-128", "--help") == 0
    assert "a power of 2. (default: 128)" in " ".join(capsys.readouterr().out.replace("│", "").split())
    assert call("--preset", "photographs-128", "--size", "0") == 2
    assert "--size is 0; expected at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_mixed_precision(here):
    assert call(*QUICK, "--steps", "1", "--name", "float") == 0
    assert call(*QUICK, "--steps", "1", "--dtype", "bfloat16", "--name", "half") == 0
    half, whole = (metrics(here / "runs" / "stylegan" / name)[0] for name in ("half", "float"))
    for name in ("critic/loss", "generator/loss"):
        # Eight bits: each operation is off by up to 0.4 %, the mean over the scores by less than 5 %.
        assert half[name] != whole[name] and half[name] == pytest.approx(whole[name], rel=0.05)


def test_flat_folder_of_pictures(tmp_path, monkeypatch, capfd):
    """One that cannot be read is skipped and named; a resumed run knows the others, wherever they lie."""
    monkeypatch.chdir(tmp_path)
    faces(tmp_path / "faces", 20)
    (tmp_path / "faces" / "broken.png").write_bytes(b"no picture")
    assert call(*QUICK, "--data", "faces", "--name", "one") == 0
    lines = capfd.readouterr().out.splitlines()
    assert any(line.startswith("skipped") and "broken.png" in line for line in lines)
    assert config(tmp_path / "runs" / "stylegan" / "one")["net"]["channels"] == 3
    (tmp_path / "faces").rename(tmp_path / "moved")
    assert call("--resume", "--data", "moved") == 0
    assert "resumed with --data moved (it was started with faces)" in capfd.readouterr().out
    (tmp_path / "moved" / "3.png").write_bytes((tmp_path / "moved" / "4.png").read_bytes())
    line = refused(capfd, "--resume", "--data", "moved")
    assert "cannot resume 'runs/stylegan/one': its checkpoint has data" in line


def test_what_the_end_needs_is_checked_at_the_start(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    faces(tmp_path / "few", 12)
    line = refused(capfd, *QUICK, "--data", "few")
    assert "there are 10 images to train on; expected at least 12, to compare with samples" in line
