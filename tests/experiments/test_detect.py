"""experiments/detect.py: DETR, crowds, predictions in pixels of the files."""

import functools
import json

import pytest
import torch

from core import random, spec
from experiments.parts import detector
from nets.dense import detr, fcos
from tests.experiments import runs
from tests.registry.experiments.detection import SMALL, files
from train.data.images import boxed

call = functools.partial(runs.call, "detect")
FLAGS = (*SMALL, "--no-compile", "--name", "a")


@pytest.fixture
def here(tmp_path, monkeypatch):
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(net, classes=3):
    stages = {"backbone": detr.Stages((1, 1), width=4, stem="cifar")}
    if net == "detr":
        cfg = detr.Config(classes, **stages, queries=4, layers=1, heads=2, width=8, hidden=8, dropout=0.0)
    else:
        cfg = fcos.Config(classes, **stages, first=0, extra=1, width=8, convolutions=1, groups=2, prior=0.4)
    names = tuple("abc"[:classes])
    return detector.Detector(net, spec.init(random.key(0), detector.NETS[net].spec(cfg)), cfg, names, 16)


@pytest.mark.parametrize("net", ["fcos", "detr"])
def test_detections_do_not_depend_on_their_batch(net):
    model = tiny(net)
    images = random.randint(random.key(1), (40, 3, 16, 16), 0, 256).to(torch.uint8)
    together, alone = detector.detect(model, images, 0.2), detector.detect(model, images[35:36], 0.2)
    assert len(together) == 40 and len(together[35].labels) == len(alone[0].labels) > 0
    torch.testing.assert_close(together[35].boxes, alone[0].boxes)


@pytest.mark.parametrize("net", ["fcos", "detr"])
def test_losses_are_finite_without_objects(net):
    model = tiny(net)
    images, boxes = torch.rand(2, 3, 16, 16), torch.zeros(2, 5, 4)
    labels = torch.full((2, 5), boxed.BACKGROUND)
    grads = torch.func.grad(lambda params: _value(params, (images, boxes, labels), net, model.cfg))(model.params)
    assert all(leaf.isfinite().all() for leaf in torch.utils._pytree.tree_leaves(grads))


def _value(params, batch, net, cfg):
    value, _ = detector.losses(params, batch, random.split(random.key(0), len(batch[0])), net, cfg)
    return value.mean if net == "fcos" else value


def test_regions_find_bright_squares():
    image = torch.full((1, 3, 40, 40), 30, dtype=torch.uint8)
    image[0, 0, 5:15, 20:32] = 240
    image[0, 2, 30:32, 2:4] = 240  # too small
    (out,) = detector.regions(image, 2)
    assert out.boxes.tolist() == [[20, 5, 32, 15]] and out.labels.tolist() == [2]


def test_scenes_have_the_classes_of_digits():
    data = detector._of_scenes(random.key(0), 8, detector.digits()[0])
    assert data.images.dtype == torch.uint8 and data.images.shape == (8, 3, 64, 64) and int(data.labels.max()) <= 9


@pytest.mark.slow
def test_detr_trains_predicts_and_shows_its_attention(here, capsys):
    assert call("--net", "detr", *FLAGS) == 0
    assert (here / "runs/detect/a/attention.png").is_file()
    assert "AP50" in capsys.readouterr().out
    predict = ("predict", "--run", "runs/detect/a", "cells/JPEGImages", "bare.json", "--confidence", "0.001")
    assert call(*predict) == 0
    out = capsys.readouterr().out
    assert "bare.json" in out and "files in boxes/" in out
    records = json.loads((here / "boxes/boxes.json").read_text())
    assert len(records) == 15
    for record in records:
        for entry in record["objects"]:
            left, top, right, bottom = entry["box"]
            assert entry["class"] in ("red", "blue") and 0 <= left <= right <= 33 and 0 <= top <= bottom <= 33
