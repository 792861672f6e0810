"""Detection: boxes and classes of objects, by FCOS or DETR.

Tian et al. 2019 (arXiv:1904.01355); Carion et al. 2020 (arXiv:2005.12872). Without a flag FCOS learns generated scenes
of scikit-learn's digits, offline:

    python experiments/detect.py                                        under three minutes on 2 CPU cores
    python experiments/detect.py --net detr                             fifteen minutes
    python experiments/detect.py --data BCCD                            Pascal VOC's XML; or COCO's TRAIN.json,TEST.json
    python experiments/detect.py predict --run runs/detect/NAME photo.jpg FOLDER
    python experiments/detect.py evaluate --run runs/detect/NAME --data OTHER

AP is COCO's, by pycocotools. Expected: AP50 0.99 on scenes of digits that it has not seen; connected bright regions,
without a net, reach 0.01.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from core import random, tree
from experiments.parts import detector
from experiments.parts.detector import NETS
from train import optimizers, plots
from train.data import batching
from train.data.fingerprint import fingerprint
from train.data.images import folders
from train.data.understood import understood
from train.files import write_json
from train.optimizers import schedules
from train.run import Common, Count, FromRun, NonNegative, Positive, Shared, begin, command_line, open_run
from train.run.flags import Fraction
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS, alone
from train.run.run import unused
from train.step import create, make_step

RUNS = Path("runs/detect")
FREE = ("data", "steps", "batch", "learning_rate", "weight_decay", "eval_every", "zoom", "flip", "mosaic")


@dataclass(frozen=True)
class Args:
    data: str = "scenes"
    """"scenes", generated; a folder with Pascal VOC's XML files; or COCO's JSON: FILE, or TRAIN,TEST. The defaults of
    what follows fit it and the net."""
    net: Literal["fcos", "detr"] = "fcos"
    """FCOS or DETR."""
    preset: str = "small"
    """Preset of the net: small, medium, resnet18, resnet50."""
    size: Count = 64
    """Pixels of the longer side of a picture, as the net sees it."""
    zoom: Positive = 1.0
    """Pictures are enlarged or made smaller at random, by up to this factor; 1 for none."""
    flip: bool = False
    """Random horizontal flips."""
    mosaic: bool = False
    """Four pictures at half their size in one."""
    confidence: Fraction = 0.5
    """Boxes with a higher score are drawn."""
    steps: Count = 500
    """Training steps; the learning rate rises over a twentieth of them, and then falls to 0."""
    batch: Count = 16
    """Pictures per step."""
    learning_rate: Positive = 2e-3
    """Peak learning rate of AdamW."""
    weight_decay: NonNegative = 1e-2
    """Weight decay of AdamW, not on biases and norms."""
    clip: Positive = 1.0
    """Norm that gradients are clipped to."""
    eval_every: Count = 250
    """Steps between evaluations on the first pictures to test on."""
    common: Shared = Common()


PICTURES = {"preset": "medium", "size": 256, "zoom": 1.5, "flip": True, "steps": 3000, "batch": 8, "eval_every": 500}
DETR = {"net": "detr", "steps": 3000, "batch": 32, "learning_rate": 1e-3, "clip": 0.1, "eval_every": 500}


def presets(words: dict[str, str]) -> Args:
    data, net = words.get("data", "scenes"), words.get("net", "fcos")
    changes = PICTURES if data != "scenes" else {}
    changes = changes | (DETR if net == "detr" else {})
    if net == "detr" and data != "scenes":
        changes = changes | {"preset": "resnet18", "batch": 8}
    return Args(**changes | {"data": data})


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(FromRun):
    data: str | None = None
    """Pictures with boxes, all of whose test part is used; the run's own if None."""
    confidence: Fraction = 0.5
    """Boxes with a higher score are drawn."""
    out: Path | None = None
    """New folder for figures and pictures; RUN/evaluations/DATA, numbered if it exists, if None."""


@dataclass(frozen=True, kw_only=True)
class PredictArgs(FromRun):
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, folders of them, a .txt file of names, or - for names on standard input."""
    confidence: Fraction = 0.5
    """Boxes with a higher score are written and drawn."""
    out: Path | None = None
    """New folder for boxes.json, boxes.csv and pictures; "boxes", numbered if it exists, if None."""


def train(args: Args) -> None:
    run = begin(RUNS, args, free=FREE, shards=alone("--net detr") if args.net == "detr" else BY_ROWS)
    data = detector.open_data(args.data, args.size)
    cfg = detector.configuration(args, len(data.classes))
    understood(print, {"data": args.data, "classes": list(data.classes), **data.facts, "net": cfg})
    if args.batch > len(data.train.images):
        raise ValueError(f"--batch is {args.batch}, but there are {len(data.train.images)} pictures to learn from")
    model = NETS[args.net].spec(cfg)
    create_key, order_key, change_key = random.split(random.key(args.common.seed), 3).unbind(0)
    rate = schedules.warmup_cosine(args.learning_rate, args.steps // 20, args.steps)
    adamw = optimizers.adamw(rate, weight_decay=args.weight_decay, mask=lambda name, leaf: leaf.ndim >= 2)
    optimizer = optimizers.chain(optimizers.clip_by_global_norm(args.clip), adamw)
    state = create(create_key.to(run.device), model, optimizer)
    pictures = fingerprint(data.train.images, data.train.boxes, data.train.labels)
    parameters = tree.count(state.params)
    state = run.restore(state, {"net": cfg, "data": pictures}, args.steps, model)
    loss = functools.partial(detector.losses, net=args.net, cfg=cfg)
    options = {"policy": run.policy, "distributed": run.distributed, "compile": args.common.compile}
    step = make_step(loss, optimizer, donate=True, **options)

    def batch_at(t: int) -> tuple:
        rows = batching.epoch_batch(order_key, t, len(data.train.images), args.batch)
        keys = random.fold_in(random.fold_in(change_key, t), torch.arange(args.batch, dtype=torch.int32))
        part = data.train.some(rows)
        labels = torch.where(part.crowd, detector.boxed.BACKGROUND, part.labels)
        return detector.augmented(args, keys, part.images, part.boxes, labels)

    def trained_by(state) -> detector.Detector:
        params = tree.merge(run.whole(state.params), state.stats)
        return detector.Detector(args.net, params, cfg, data.classes, args.size)

    def figures_of(state, count: int | None = None) -> dict:
        trained = trained_by(state)
        part = data.test.some(torch.arange(len(data.test.images))[:count])
        return detector.precision(detector.detect(trained, part.images), part, len(data.classes))._asdict()

    with run.open({"classes": data.classes}):
        run.log.print(f"{parameters:,} parameters; run in {run.folder}")
        for at, batch in run.steps(batch_at(t) for t in run.remaining):
            state, metrics = step(state, tree.move(batch, run.device))
            run.record(at, metrics, args.batch)
            if at % args.eval_every == 0 and at < args.steps:
                run.log.metrics(at, {"test/ap50": figures_of(state, 100)["ap50"]})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        figures = detector.study(run.folder, trained_by(state), data.test, args.confidence)
        figures["regions_ap50"] = detector.baseline(data.test, data.train, len(data.classes))
        run.result({**figures, "parameters": parameters, "skipped": data.skipped})
    names = [name for name in ("loss", "classes", "boxes", "l1", "giou", "centreness")]
    curves = {
        name: line
        for name, line in read_curves(run.folder, *(f"train/{name}" for name in names)).items()
        if len(line[0])
    }
    plots.curves(run.folder / "loss.png", curves, ylabel="loss", title=f"Losses of {args.net}", log=True)
    print(
        "AP50 {ap50:.3f}, AP {ap:.3f} (AP50 of bright regions without a net: {regions_ap50:.3f})".format(**figures),
        end=" ",
    )
    print(f"after {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def evaluate(args: EvaluateArgs) -> None:
    """Average precision of a run's detector on its test part, or on other pictures with boxes."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    trained = run.read("args", Args)
    model = detector.load(run, device)
    data = detector.open_data(args.data or trained.data, trained.size, model.classes)
    understood(print, {"data": args.data or trained.data, **data.facts})
    folder = unused(args.out, args.run / "evaluations" / (Path(args.data or "test").resolve().name))
    folder.mkdir(parents=True)
    figures = detector.study(folder, model, data.test, args.confidence)
    figures["regions_ap50"] = detector.baseline(data.test, data.train, len(model.classes))
    write_json(folder / "result.json", {**figures, "checkpoint": run.step, "skipped": data.skipped})
    print("AP50 {ap50:.3f}, AP {ap:.3f}, AP75 {ap75:.3f} (AP50 without a net: {regions_ap50:.3f})".format(**figures))
    print(f"files in {folder}/")


def predict(args: PredictArgs) -> None:
    """Boxes in pictures, as JSON, CSV and drawn."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    paths, skipped = folders.picture_paths(args.images)
    model, folder = detector.load(run, device), unused(args.out, Path("boxes"))
    folder.mkdir(parents=True)
    count, bad = detector.write_predictions(folder, model, paths, args.confidence)
    understood(print, {"pictures": count, "skipped": [*skipped, *bad]})
    print(f"files in {folder}/")


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, presets),
        root=RUNS,
        predict=(PredictArgs, predict),
        evaluate=(EvaluateArgs, evaluate),
    )
