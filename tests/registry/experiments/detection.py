"""The row of the experiment with boxes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.registry.experiments.experiment import Experiment
from train.run.ranks import BY_ROWS

OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def files(folder: Path) -> None:
    """cells/ in Pascal VOC's form, with a box of no area and a picture without objects; empty/ without annotations;
    bare.json without categories."""
    rng = np.random.default_rng(0)
    for i in range(15):
        pixels = rng.integers(0, 60, (24, 32, 3), np.uint8)
        objects = []
        for name, colour in (("red", 0), ("blue", 2)) if i else ():
            left, top = rng.integers(0, 14, 2)
            pixels[top : top + 8, left : left + 9, colour] = 220
            objects.append(OBJECT.format(name, left + 1, top + 1, left + 9, top + 8))
        if i == 1:
            objects.append(OBJECT.format("red", 4, 4, 4, 9))
        text = f"<annotation><size><width>32</width><height>24</height></size>{''.join(objects)}</annotation>"
        for part in ("JPEGImages", "Annotations"):
            (folder / "cells" / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "cells" / "JPEGImages" / f"{i}.png")
        (folder / "cells" / "Annotations" / f"{i}.xml").write_text(text)
    (folder / "empty").mkdir()
    (folder / "bare.json").write_text(json.dumps({"images": [], "annotations": []}))


SMALL = ("--data", "cells", "--preset", "small", "--size", "32", "--batch", "4", "--steps", "8", "--eval-every", "4")

ROWS = [
    Experiment(
        "detect",
        (*SMALL, "--save-every", "4", "--flip", "--zoom", "1.2", "--mosaic"),
        8,
        pictures=("detections.png", "precision_recall.png", "loss.png"),
        inputs=files,
        baseline="regions_ap50",
        shards=BY_ROWS,
        together=("--learning-rate", "1e-4"),
        refusals=(
            (("--data", "nowhere"), "nowhere does not exist; expected a folder of pictures with VOC's XML files"),
            (("--data", "empty"), "empty has no XML file; expected Pascal VOC's annotations"),
            (("--data", "bare.json"), "bare.json has no 'categories'; expected images, annotations and categories"),
            ((*SMALL, "--batch", "40"), "--batch is 40, but there are 12 pictures to learn from"),
            ((*SMALL[:2], "--preset", "huge"), "--preset huge is none of fcos: resnet50, resnet18, medium, small"),
            (("--resume", "--name", "a", "--preset", "medium"), "with --preset medium: it was started with small"),
        ),
        commands=(
            (("predict", "cells/JPEGImages", "--confidence", "0.01"), ()),
            (("evaluate",), ("evaluations/test/detections.png", "evaluations/test/result.json")),
            (("evaluate", "--data", "cells"), ("evaluations/cells/precision_recall.png",)),
        ),
    ),
]
