"""Rows of the experiments from pictures to pictures."""

from pathlib import Path

from PIL import Image

from tests.registry.experiments.experiment import Experiment
from train.run.ranks import BY_ROWS


def pictures(folder: Path) -> None:
    """high/ with three pictures to learn from, low/ with two to test on and to enlarge."""
    for i, (name, size) in enumerate({"high": (60, 52), "low": (40, 44)}.items()):
        (folder / name).mkdir(exist_ok=True)
        for number in range(3 - i):
            Image.effect_noise(size, 60).convert("RGB").save(folder / name / f"{number}.png")


ROWS = [
    Experiment(
        "superres",
        ("--data", "high", "--test", "low", "--net", "fsrcnn-s", "--scale", "2", "--patch", "24", "--batch", "4")
        + ("--steps", "4", "--save-every", "2", "--eval-every", "2"),
        4,
        pictures=("crops_x2.png", "bars_x2.png", "psnr.png"),
        inputs=pictures,
        baseline="psnr_bicubic_x2",
        shards=BY_ROWS,
        refusals=(
            (("--data", "nowhere"), "'nowhere' does not exist; expected a folder of pictures, or one of photographs"),
            (("--test", "nowhere"), "'nowhere' does not exist"),
            (("--net", "esrgan"), "invalid choice 'esrgan' for argument '--net'"),
            (("--scale", "2", "3"), "fsrcnn has one scale, not 2, 3; for several there are srcnn"),
            (("--net", "edsr", "--scale", "5"), "edsr: no scale 5; expected 3 or a power of 2"),
            (("--patch", "25"), "--patch is 25; expected a multiple of the scale 3"),
            (("--patch", "12"), "--patch is 12; expected more than 12 for the scale 3"),
            (("--data", "high", "--patch", "120"), "none of the 3 pictures of 'high' can be used"),
            (("--clipping", "adjustable"), "--clipping adjustable is for --optimizer sgd; expected norm"),
            (
                ("--weights", "nowhere"),
                "--weights 'nowhere' does not exist; expected a run, or a file of the public fsrcnn",
            ),
            (("--net", "vdsr", "--weights", "runs/superres/a"), "runs/superres/a' is a fsrcnn-s, expected a vdsr"),
            (("--net", "srgan", "--patch", "90"), "images of 90 pixels; expected a multiple of 16"),
            (
                ("--net", "srgan-small", "--scale", "2", "--classifier", "nowhere"),
                "--classifier 'nowhere' does not exist",
            ),
            (("--resume", "--name", "a", "--scale", "3"), "with --scale (3,): it was started with (2,)"),
            (("--resume", "--name", "a", "--net", "srcnn"), "with --net srcnn: it was started with fsrcnn-s"),
        ),
        commands=(
            (("evaluate", "--self-ensemble"), ("evaluations/low/result.json", "evaluations/low/crops_x2.png")),
            (("upscale", "low/0.png", "high"), ("upscaled/0.png", "upscaled/0_2.png", "upscaled/1.png")),
        ),
    ),
]
