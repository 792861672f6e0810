"""segment.py: predictions as files, tiles, objects, weights of other libraries; the default's figures."""

import csv
import functools
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core import random, spec, tree
from experiments.parts import segmentation_figures, segmenter
from experiments.parts.segmentation_weights import initial
from nets.blocks.residual_stages import stages_spec
from nets.dense import fcn
from tests.benchmarks.module_unet import UNet
from tests.experiments import runs
from tests.registry.experiments import segmentation as rows
from train.data.images.mask_sets import open_masks
from train.run import open_run

SETS = Path(os.environ.get("FUNCTREE_DATA", ""))
call = functools.partial(runs.call, "segment")
SMALL = ("--steps", "6", "--save-every", "3", "--eval-every", "9", "--batch", "4", "--no-compile")
RUN = Path("runs/segment/a")
SIZES = ("--data", "shapes", "--size", "16", "--width", "4", "--depth", "2", "--tile", "24", "--overlap", "8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run `a` of one member."""
    folder = tmp_path_factory.mktemp("segment")
    rows.files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs.coarse(patch)
        assert call(*SIZES, *SMALL, "--name", "a") == 0
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    runs.coarse(monkeypatch)
    return tmp_path


def opened() -> segmenter.Segmenter:
    return segmenter.load(open_run(RUN, Path("runs/segment")), torch.device("cpu"))._replace(tile=24, overlap=8)


def test_default_scenes_train(here):
    assert call("--width", "2", "--depth", "2", "--size", "32", *SMALL, "--name", "scenes") == 0
    result = runs.result(Path("runs/segment/scenes"))
    assert list(result["iou"]) == ["background", *map(str, range(10))] and result["colour_mean_iou"] < 0.2


def test_predicted_masks_can_be_read_as_masks(here, capsys):
    assert call("predict", "--run", RUN, "shapes/images", "tiny.png", "--out", "out/masks", "--objects") == 0
    out = capsys.readouterr().out
    assert "skipped: shapes/images/bad.png cannot be read as a picture: it is empty" in out
    assert "skipped: tiny.png unet: the images are 3 x 3; expected at least 4 a side" in out
    assert "2 of 12 pictures skipped" in out
    with Image.open("out/masks/0.png") as mask, Image.open("shapes/images/0.png") as image:
        assert mask.mode == "P" and mask.size == image.size
    shutil.copytree("shapes/images", "out/images")
    Path("out/images/bad.png").unlink()
    for path in Path("out/masks").glob("*_o*.png"):
        path.unlink()
    data, model = open_masks("out", part="all"), opened()
    assert data.table.classes == model.trained.classes and len(data.test.paths) == 10
    for image, mask, probs in zip(
        data.test.images, data.test.masks, segmenter.probabilities(model, data.test.images), strict=True
    ):
        assert torch.equal(mask, probs.mean(0).argmax(0).byte()), image.shape


def test_regions_are_numbered_and_listed(here):
    labels = torch.zeros(6, 9, dtype=torch.uint8)
    labels[0:2, 0:2], labels[4, 1:5], labels[0:3, 7:9] = 1, 1, 2
    numbers = segmenter.regions(labels, background=True)
    assert numbers.unique().tolist() == [0, 1, 2, 3] and ((numbers > 0) == (labels > 0)).all()
    assert int(segmenter.regions(labels, background=False).min()) == 1
    assert call("predict", "--run", RUN, "shapes/images/0.png", "--objects") == 0
    with open(RUN / "predicted" / "objects.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    numbers, mask = (np.asarray(Image.open(RUN / "predicted" / f"0{end}.png")) for end in ("_objects", ""))
    classes = opened().trained.classes
    assert sum(int(row["pixels"]) for row in table) == int((numbers > 0).sum())
    for row in table:
        box = numbers[int(row["top"]) : int(row["bottom"]), int(row["left"]) : int(row["right"])]
        assert (box == int(row["object"])).sum() == int(row["pixels"]) == (numbers == int(row["object"])).sum()
        assert {classes[i] for i in mask[numbers == int(row["object"])]} == {row["class"]}


def test_a_large_picture_goes_through_tiles_of_bounded_size(here, monkeypatch):
    sizes, together = [], segmenter._together

    def seen(model, pixels):
        sizes.append(tuple(pixels.shape[2:]))
        return together(model, pixels)

    monkeypatch.setattr(segmenter, "_together", seen)
    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    Image.fromarray(noise).save("large.png")
    assert call("predict", "--run", RUN, "large.png") == 0
    assert set(sizes) == {(24, 24)} and len(sizes) > 30
    with Image.open(RUN / "predicted" / "large.png") as mask:
        assert mask.size == (130, 90)
    sizes.clear()
    assert call("predict", "--run", RUN, "large.png", "--tile", "200") == 0
    assert sizes == [(90, 130)]


def test_scaled_pictures_are_judged_in_the_size_of_their_masks(here):
    argv = ("--data", "shapes", "--longest", "16", "--size", "12", "--width", "2", "--depth", "2")
    assert call(*argv, *SMALL, "--tile", "24", "--overlap", "4", "--name", "scaled") == 0
    data = open_masks("shapes", longest=16)
    pixels = sum(mask.numel() for mask in data.test.masks)
    model = segmenter.load(open_run(Path("runs/segment/scaled"), Path("runs/segment")), torch.device("cpu"))
    out = segmentation_figures.measure(model, data.test)
    assert int(out.counts.sum()) == pixels
    assert call("predict", "--run", "runs/segment/scaled", "shapes/images/0.png") == 0
    with Image.open("runs/segment/scaled/predicted/0.png") as mask:
        assert mask.size == (33, 20)


def test_maps_of_objects_are_counted(here):
    Path("shapes/masks").rename("shapes/instances")
    assert call(*SIZES, *SMALL, "--name", "objects") == 0
    result = runs.result(Path("runs/segment/objects"))
    assert list(result["iou"]) == ["background", "object"] and 0 <= result["object_f1"] <= 1
    assert "threshold_dice_per_image" in result
    assert call("evaluate", "--run", "runs/segment/objects", "--data", "shapes") == 0


def test_milesials_file_predicts_and_is_fine_tuned(here, capsys):
    module = UNet(4, 2, False, 2)
    torch.save({**module.state_dict(), "mask_values": [0, 1]}, "milesial.pth")
    assert call("predict", "--weights", "milesial.pth", "--net", "unet", "shapes/images/0.png", "--out", "m") == 0
    model_input = torch.from_numpy(np.asarray(Image.open("shapes/images/0.png")).copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = module.eval()(model_input).argmax(1)[0]
    assert torch.equal(torch.from_numpy(np.asarray(Image.open("m/0.png")).copy()).long(), expected)
    assert call(*SIZES, *SMALL, "--weights", "milesial.pth", "--name", "tuned") == 0  # a head for three classes
    trained = runs.config(Path("runs/segment/tuned"))["trained"]
    assert trained["mean"] == [0, 0, 0] and trained["std"] == [1, 1, 1]
    assert call("--resume", "--name", "tuned", "--steps", "8") == 0
    assert call(*SIZES, *SMALL, "--weights", RUN, "--members", "2", "--name", "again") == 0
    capsys.readouterr()
    assert call("predict", "shapes/images/0.png") == 2
    assert "expected either --run DIR or --weights SOURCE" in capsys.readouterr().err
    assert call(*SIZES[:-6], *SMALL, "--width", "6", "--depth", "2", "--weights", "milesial.pth", "--name", "w") == 2
    assert "only the head may differ" in capsys.readouterr().err


def test_a_classifiers_weights_start_a_backbone(tmp_path, monkeypatch):
    cfg = fcn.Config(fcn.Stages((1, 1), width=4), aux=False, classes=3)
    monkeypatch.setitem(fcn.PRESETS, "small", cfg)
    names = fcn.stage_names(cfg.backbone)
    values = spec.init(random.key(5), stages_spec(cfg.backbone))
    state = {names[name].theirs: x for name, x in tree.items(values)}
    torch.save(state | {"fc.weight": torch.zeros(2, 8), "fc.bias": torch.zeros(2)}, tmp_path / "resnet.pth")
    start, (mean, _) = initial(str(tmp_path / "resnet.pth"), "small", fcn, cfg, tmp_path)
    one, other = start(random.key(1)), start(random.key(2))
    assert runs.same_bits(one["backbone"], values) and mean == (0.485, 0.456, 0.406)
    assert not torch.equal(one["head"]["out"]["weight"], other["head"]["out"]["weight"])


def test_uncertainty_of_members():
    """Members that agree give their own entropy; two that are sure and contradict each other log 2."""
    agree = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1).expand(3, 2, 1, 1)
    out = segmenter._summed_up(agree)
    assert out.disagreement.abs().max() < 1e-6 and out.labels.item() == 1
    contradict = torch.eye(2).view(2, 2, 1, 1)
    out = segmenter._summed_up(contradict)
    torch.testing.assert_close(out.disagreement, out.entropy)
    torch.testing.assert_close(float(out.entropy), float(np.log(2)))


def test_share_of_errors_among_the_least_certain():
    counts = torch.zeros(2, 64)
    counts[0, :32], counts[1, 60:] = 100, 20  # errors are the least certain pixels, 80 of 3280
    assert segmentation_figures._share_of_errors(counts, 0.1) == 1.0
    assert segmentation_figures._share_of_errors(counts, 40 / 3280) == pytest.approx(0.5)
    assert segmentation_figures._share_of_errors(torch.zeros(2, 64), 0.1) == 0.0


@pytest.mark.slow
def test_other_nets_train(here):
    for name, flags in (("fcn_resnet18", ()), ("transunet-small", ("--members", "2"))):
        argv = ("--data", "shapes", "--net", name, "--size", "32", "--steps", "2", "--batch", "2", *flags)
        assert call(*argv, "--no-compile", "--name", name) == 0


@pytest.mark.long
@pytest.mark.skipif(not (SETS / "nuclei_dsb2018").is_dir(), reason="FUNCTREE_DATA has no nuclei_dsb2018")
def test_nuclei(tmp_path, monkeypatch):
    """A few minutes on two cores."""
    monkeypatch.chdir(tmp_path)
    zipfile.ZipFile(next((SETS / "nuclei_dsb2018").glob("*.zip"))).extractall(tmp_path / "nuclei")
    assert call("--data", "nuclei", "--name", "a") == 0
    result = runs.result(RUN)
    assert result["dice_per_image"] > max(0.86, result["threshold_dice_per_image"])


@pytest.mark.long
def test_default(tmp_path, monkeypatch):
    """A few minutes on two cores."""
    monkeypatch.chdir(tmp_path)
    assert call("--name", "a") == 0
    result = runs.result(RUN)
    assert result["mean_iou"] > 3 * result["colour_mean_iou"]
