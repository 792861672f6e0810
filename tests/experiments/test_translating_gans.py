"""pix2pix.py and cyclegan.py: pictures from pictures."""

import dataclasses
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import cyclegan, pix2pix
from tests.experiments import runs
from tests.experiments.runs import flag_id, is_png, metrics, result
from tests.local_server import serve
from train.data.images import pair_sets

QUICK = ("--steps", "1", "--batch", "1", "--no-compile")
FOLDERS = ("--data", "first,second")
SCRIPTS = {"cyclegan": ("--size", "16"), "pix2pix": ()}
both_scripts = pytest.mark.parametrize("script", SCRIPTS)


def picture(path, seed, size=(40, 40), grey=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels[..., 0] if grey else pixels).save(path)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, int)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of pictures, and a finished run of each script on two of them, runs/.../whole; not to be changed."""
    folder = tmp_path_factory.mktemp("translating")
    for i in range(6):
        picture(folder / "first" / f"{i}.png", i)
        picture(folder / "second" / f"{i}.png", 10 + i)
        picture(folder / "halves" / "train" / f"{i}.png", i, (80, 40))
        picture(folder / "halves" / "val" / f"{i}.png", 20 + i, (80, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for script, flags in SCRIPTS.items():
            assert runs.call(script, *QUICK, *FOLDERS, *flags, "--name", "whole") == 0
    return folder


@both_scripts
def test_own_folders_have_a_test_part_and_no_truth(script, place):
    figures = result(place / "runs" / script / "whole")
    names = {"pix2pix": ("l1", "l1_mean", "l1_source"), "cyclegan": ("cycle_x", "cycle_y")}[script]
    assert all(0 < figures[name] < 2 for name in names) and "error" not in figures


@both_scripts
def test_resumes_with_the_same_pictures_elsewhere_and_refuses_others(script, here, capfd):
    (here / "moved").mkdir()
    for side in ("first", "second"):
        (here / side).rename(here / "moved" / side)
    assert runs.call(script, "--resume", "--data", "moved/first,moved/second") == 0
    assert "resumed with --data moved/first,moved/second" in capfd.readouterr().out
    picture(here / "moved" / "first" / "3.png", 99)
    line = runs.refused(script, capfd, "--resume", "--data", "moved/first,moved/second")
    assert f"cannot resume 'runs/{script}/whole': its checkpoint has data" in line


@both_scripts
def test_translations_overwrite_nothing(script, here, capsys):
    """Three pictures of one name are three files; each call has a folder of its own; what cannot be read is counted."""
    for i, name in enumerate(("a/x.png", "b/x.png", "b/c/x.jpg")):
        picture(here / "inputs" / name, i)
    (here / "inputs" / "broken.png").write_bytes(b"no picture")
    run = here / "runs" / script / "whole"
    flags = ("translate", "--run", str(run.relative_to(here)))
    assert runs.call(script, *flags, "inputs") == 0
    first = sorted((run / "translated").iterdir())
    assert [path.name for path in first] == ["x.png", "x_2.png", "x_3.png"] and all(map(is_png, first))
    assert len({path.read_bytes() for path in first}) == 3
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("pictures to translate  3") for line in lines)
    assert any(line.startswith("skipped") and "1: inputs/broken.png" in line for line in lines)
    assert all(str(path.relative_to(here)) in lines for path in first)
    assert runs.call(script, *flags, "inputs/a/x.png") == 0
    # A batch of one and one of three are sums in another order, which may round to the next of 255 levels.
    alone, together = (pixels(path) for path in (run / "translated_2" / "x.png", first[0]))
    assert np.abs(alone - together).max() <= 1
    assert runs.call(script, *flags, "inputs/a/x.png", "--out", "own/folder") == 0 and is_png(here / "own/folder/x.png")


@both_scripts
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["none.png"], "none.png does not exist"),
        (["first/0.png", "--out", "first"], "'first' exists already; choose another --out"),
        (["first/0.png", "--checkpoint", "7"], "7"),
    ],
    ids=flag_id,
)
def test_translate_refuses_in_one_line(script, flags, message, here, capfd):
    assert message in runs.refused(script, capfd, "translate", "--run", f"runs/{script}/whole", *flags)


def test_run_of_the_other_script_is_refused(here, capfd):
    line = runs.refused("cyclegan", capfd, "translate", "--run", "runs/pix2pix/whole", "first/0.png")
    assert "'runs/pix2pix/whole' is a run of pix2pix.py, expected one of cyclegan.py" in line


def test_both_ways_of_cyclegan(here):
    run = here / "runs" / "cyclegan" / "whole"
    for flags in ((), ("--back",)):
        assert runs.call("cyclegan", "translate", "--run", "runs/cyclegan/whole", "first/0.png", *flags) == 0
    there, back = (run / name / "0.png" for name in ("translated", "translated_2"))
    assert there.read_bytes() != back.read_bytes()


@both_scripts
def test_mixed_precision(script, here):
    flags = (*QUICK, *FOLDERS, *SCRIPTS[script], "--dtype", "bfloat16", "--name", "half")
    assert runs.call(script, *flags) == 0
    half, whole = (metrics(here / "runs" / script / name)[0] for name in ("half", "whole"))
    for name in ("critic/loss", "generator/loss"):
        # Eight bits: each operation is off by up to 0.4 %, the mean over all patches and pixels by less than 5 %.
        assert half[name] != whole[name] and half[name] == pytest.approx(whole[name], rel=0.05)


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        (("--data", "halves", "--source", "right"), (6, 6)),
        pytest.param(("--data", "halves/train"), (5, 1), marks=pytest.mark.slow),
        pytest.param(("--data", "halves/train", "--objective", "hinge"), (5, 1), marks=pytest.mark.slow),
    ],
    ids=flag_id,
)
def test_pix2pix_of_files_with_two_pictures(flags, counts, here, capsys):
    """Inside train and val, or in one folder, of which a tenth is for testing."""
    assert runs.call("pix2pix", *QUICK, *flags, "--name", "one") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"pairs to train on {counts[0]} " in out and f"pairs to test on {counts[1]} " in out
    assert result(here / "runs" / "pix2pix" / "one")["l1"] > 0


def test_test_comes_before_val(here, capsys):
    shutil.copytree(here / "halves" / "val", here / "halves" / "test")
    (here / "halves" / "test" / "0.png").unlink()
    assert runs.call("pix2pix", *QUICK, "--data", "halves", "--name", "one") == 0
    assert "pairs to test on 5 " in " ".join(capsys.readouterr().out.split())


def test_one_odd_picture_does_not_end_cyclegan(here, capsys):
    """A grey one among coloured ones is coloured, one that cannot be read is skipped, and both are named."""
    picture(here / "first" / "grey.png", 7, grey=True)
    (here / "second" / "broken.png").write_bytes(b"no picture")
    assert runs.call("cyclegan", *QUICK, *FOLDERS, "--size", "16", "--objective", "hinge", "--name", "one") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "first kind: made grey or coloured 1: first/grey.png" in lines
    assert any(line.startswith("second kind: skipped 1: second/broken.png") for line in lines)
    assert "first kind: pictures to train on 6" in lines and "second kind: pictures to train on 5" in lines
    assert result(here / "runs" / "cyclegan" / "one")["cycle_x"] > 0


def test_one_unreadable_pair_does_not_end_pix2pix(here, capsys):
    (here / "first" / "5.png").write_bytes(b"no picture")
    assert runs.call("pix2pix", *QUICK, *FOLDERS, "--name", "one") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "pairs to train on 4" in lines and any(line.startswith("skipped 1: first/5.png") for line in lines)


def test_sets_by_name(tmp_path, monkeypatch):
    """Archives as the authors': facades/train/1.jpg ..., of which the labels are right; horse2zebra/trainA/1.jpg ..."""
    for i in range(3):
        for part in ("train", "val", "test"):
            picture(tmp_path / "facades" / part / f"{i}.jpg", i, (80, 40))
        for part in ("trainA", "trainB", "testA", "testB"):
            picture(tmp_path / "horse2zebra" / part / f"{i}.jpg", i)
    (tmp_path / "facades" / "val" / "0.jpg").unlink()
    (tmp_path / "horse2zebra" / "testB" / "0.jpg").unlink()
    (tmp_path / "served").mkdir()
    with tarfile.open(tmp_path / "served" / "facades.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "facades", "facades")
    with zipfile.ZipFile(tmp_path / "served" / "horse2zebra.zip", "w") as archive:
        for path in sorted((tmp_path / "horse2zebra").rglob("*.jpg")):
            archive.write(path, path.relative_to(tmp_path))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serve(tmp_path / "served") as url:
        for name, download in pair_sets.DOWNLOADS.items():
            address = f"{url}/{download.address.rpartition('/')[2]}"
            monkeypatch.setitem(pair_sets.DOWNLOADS, name, download._replace(address=address, checksum=None))
        args = dataclasses.replace(pix2pix.presets({"data": "facades"}), data="facades", size=16)
        train, test = pix2pix.read(args)
        kinds = cyclegan.read(cyclegan.Args(data="horse2zebra", size=16))
    assert args.source == "right" and (len(train.paths), len(test.paths)) == (3, 3)
    assert "facades/test/" in str(test.paths[0])
    assert [len(images) for images in kinds.train + kinds.test] == [3, 3, 3, 2]
    assert [images.shape[-1] for images in kinds.train + kinds.test] == [18, 18, 16, 16]
    own = cyclegan.read(cyclegan.Args(data=str(tmp_path / "horse2zebra"), size=16))
    assert all(torch.equal(a, b) for a, b in zip(own.train + own.test, kinds.train + kinds.test, strict=True))
    (tmp_path / "empty" / "facades").mkdir()
    assert pix2pix.presets({"data": "facades"}) is None  # a folder of this name, with its own source


@both_scripts
def test_a_set_that_cannot_be_fetched_is_one_line(script, tmp_path, capfd, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = {"pix2pix": "facades", "cyclegan": "horse2zebra"}[script]
    file = pair_sets.DOWNLOADS[name].address.rpartition("/")[2]
    download = pair_sets.DOWNLOADS[name]._replace(address=f"http://127.0.0.1:9/{file}")
    monkeypatch.setitem(pair_sets.DOWNLOADS, name, download)
    line = runs.refused(script, capfd, *QUICK, "--data", name)
    assert f"cannot fetch http://127.0.0.1:9/{file}: " in line and f"put {file} into {tmp_path / 'cache'}" in line
