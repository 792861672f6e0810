"""The row of the experiment with a class per pixel."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.registry.experiments.experiment import Experiment
from train.run.ranks import BY_ROWS


def files(folder: Path) -> None:
    """shapes/ with pictures of two sizes, masks of three values, and one bad pair; alone/ without masks of their names;
    sizes/ whose masks are smaller; noise/ with masks of 256 values."""
    rng = np.random.default_rng(0)
    for name in ("shapes", "sizes", "noise", "alone"):
        for i in range(10):
            height, width = (24, 28) if i % 2 else (20, 33)
            pixels = rng.integers(0, 60, (height, width, 3), np.uint8)
            mask = np.zeros((height, width), np.uint8)
            for value, (top, left) in enumerate(rng.integers(0, 12, (2, 2)), 1):
                mask[top : top + 6, left : left + 7] = value
            pixels[mask == 1, 0] += 150
            pixels[mask == 2, 1] += 150
            if name == "sizes":
                mask = mask[1:]
            if name == "noise":
                mask = rng.integers(0, 256, (height, width), np.uint8)
            for part, values in (("images", pixels), ("masks", mask)):
                (folder / name / part).mkdir(parents=True, exist_ok=True)
                if name != "alone" or part == "images":
                    Image.fromarray(values).save(folder / name / part / f"{i}.png")
    (folder / "alone" / "masks" / "other.png").write_bytes((folder / "shapes" / "masks" / "0.png").read_bytes())
    (folder / "shapes" / "images" / "bad.png").write_bytes(b"")
    Image.new("L", (8, 8)).save(folder / "shapes" / "masks" / "bad.png")
    Image.new("RGB", (3, 3)).save(folder / "tiny.png")


SMALL = ("--width", "4", "--depth", "2", "--batch", "4", "--steps", "8", "--save-every", "4", "--eval-every", "4")

ROWS = [
    Experiment(
        "segment",
        (*SMALL, "--data", "shapes", "--size", "16", "--members", "2", "--zoom", "0.2", "--flip", "--turn")
        + ("--colour-jitter", "0.1", "--balance", "--tile", "24", "--overlap", "4"),
        8,
        pictures=("examples.png", "iou.png", "confusion.png", "loss.png"),
        inputs=files,
        baseline="colour_mean_iou",
        shards=BY_ROWS,
        together=("--members", "1", "--loss", "cross-entropy"),
        refusals=(
            (
                ("--data", "nowhere"),
                "--data 'nowhere' does not exist; expected scenes, a folder of pictures with masks",
            ),
            (("--data", "alone"), "0.png has no mask of its name in alone/masks, nor has any other picture"),
            (("--data", "sizes"), "none of the 8 pictures can be used; sizes/images/"),
            (("--data", "noise"), "which are too many to be classes: expected a file of classes"),
            (("--net", "unett"), "no segmentation net is named 'unett'; expected one such as unet"),
            (("--net", "fcn_resnet18", "--width", "8"), "'fcn_resnet18' has no width to choose"),
            (("--net", "transunet-small", "--size", "40"), "transunet: image is 40; expected a multiple of 16"),
            (("--size", "20"), "--size is 20; expected at least 24, the largest digit of the scenes"),
            (
                ("--data", "shapes", "--size", "8"),
                "--size is 8: unet: the images are 8 x 8; expected at least 16 a side",
            ),
            (("--tile", "4", "--overlap", "2"), "--tile is 4: unet: the images are 4 x 4; expected at least 8 a side"),
            (("--tile", "64", "--overlap", "40"), "--tile is 64 and --overlap 40; expected tiles of at least twice"),
            (("--loss", "hinge"), "invalid choice 'hinge' for argument '--loss'"),
            (("--weights", "/nowhere/net.pth"), "'/nowhere/net.pth' is no local file or directory"),
            (("--weights", "published"), "no weights of 'unet-small' are published that are known here; give a file"),
            (("--resume", "--name", "a", "--size", "32"), "with --size 32: it was started with 16"),
            (("--resume", "--name", "a", "--steps", "3"), "--steps is 3, but 'runs/segment/a' has done 8"),
        ),
        commands=(
            (("evaluate",), ("evaluations/test/iou.png", "evaluations/test/result.json")),
            (("evaluate", "--data", "shapes"), ("evaluations/shapes/examples.png",)),
            (
                ("predict", "shapes/images", "tiny.png", "--objects"),
                ("predicted/0.png", "predicted/0_overlay.png", "predicted/0_uncertainty.png", "predicted/objects.csv"),
            ),
        ),
    ),
]
