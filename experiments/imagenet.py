"""ImageNet training: an image classifier on class folders or tars, by the recipe of Goyal et al. 2017.

"Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour" (arXiv:1706.02677): a learning rate in proportion to the
batch, a gradual warm-up, no weight decay of norms and biases, residual blocks that begin as identities.

    python experiments/imagenet.py                                              two minutes on 2 CPU cores
    python experiments/imagenet.py --data FOLDER --net resnet50 --batch 1024 --label-smoothing 0.1
    torchrun --nproc-per-node 8 experiments/imagenet.py --data FOLDER --batch 2048 --device cuda --dtype bfloat16
    python experiments/imagenet.py index FOLDER                                 FOLDER/train/*.tar, FOLDER/val/*.tar
    python experiments/imagenet.py evaluate --run runs/imagenet/NAME --checkpoint best
    python experiments/imagenet.py evaluate --weights published --net resnet50 --data FOLDER
    python experiments/imagenet.py predict --run runs/imagenet/NAME a.jpg b.jpg

Without a flag it learns generated pictures of coloured digits, written into tars and read as ImageNet is.
Expected: 89 to 93 % of the test pictures right, by rounding (threads, compiled or not).
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from core import collectives, random, spec, tree
from experiments.parts import classifier, imagenet_data
from experiments.parts.classifier import FromRunOrWeights, PredictArgs, Trained, losses, net_of, predictions, study
from nets.classifiers.torchvision_weights import IMAGENET
from train import optimizers, plots
from train.data.fingerprint import fingerprint
from train.data.images import augment, shards
from train.data.images import sets as image_sets
from train.data.images.files import Decoder, Files
from train.data.understood import understood
from train.files import shown, write_json
from train.metrics import classification
from train.optimizers import Schedule, schedules
from train.run import Common, Count, Natural, NonNegative, Positive, Rate, Run, Shared, begin, checkpoints, command_line
from train.run.flags import Portion
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS
from train.run.run import unused
from train.step import make_step, start

RUNS = Path("runs/imagenet")
REFERENCE = 256
"""The batch that `--learning-rate` is for."""
DROPS = (30, 60, 80)
"""Epochs of 90 after which the learning rate of the step schedule is divided by ten."""


@dataclass(frozen=True)
class Args:
    data: str = "scenes"
    """"scenes", generated; or a folder with a sub-folder per class, best inside `train` and `val`; or one of indexed
    tars (see index). The defaults of what follows are the paper's for a folder, which this help shows with --data on
    its command line."""
    net: str = "cifar-resnet8"
    """Any preset of nets.classifiers (a wrong name lists them)."""
    size: Count = 32
    """Pixels per side that the net sees."""
    epochs: Positive = 15.0
    """Passes over the training pictures; the schedule is stretched over them."""
    batch: Count = 64
    """Pictures per step, of all processes together."""
    micro_batches: Count = 1
    """Parts that a batch is cut into to save memory (gradient accumulation)."""
    learning_rate: Positive = 1.6
    """Peak learning rate of SGD for batches of 256; for others it is in proportion to their size."""
    schedule: Literal["step", "cosine"] = "cosine"
    """After the warm-up: step (a tenth after 30, 60 and 80 ninetieths of the run), cosine (to 0)."""
    warmup_epochs: NonNegative = 1.0
    """Epochs in which the learning rate rises, for batches above 256 from that of 256."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of weights with two axes or more; not of biases and norms."""
    zero_init: bool = True
    """Start the last norm of each residual block at 0, for nets that have such blocks."""
    label_smoothing: Rate = 0.0
    """Probability that is spread over all classes."""
    ema: Rate = 0.0
    """Decay of a moving average of the parameters, which is then evaluated; 0 for none."""
    least_area: Portion = 0.4
    """Least part of a picture's area that a random crop has."""
    flip: bool = False
    """Random horizontal flips."""
    snapshot_epochs: Count = 5
    """Epochs between checkpoints that stay, beside the best and the last three."""
    workers: Natural = 2
    """Processes that decode files."""
    channels_last: bool = False
    """Keep the channels of a picture next to each other in memory: faster on a GPU."""
    common: Shared = Common()


FOLDER = Args("", "resnet50", 224, 90.0, 256, 1, 0.1, "step", 5.0, least_area=0.08, flip=True, snapshot_epochs=10)


def presets(words: dict[str, str]) -> Args:
    return Args() if words.get("data", "scenes") == "scenes" else FOLDER


@dataclass(frozen=True)
class IndexArgs:
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with tars, or with tars in its folders train and val."""
    labels_from: Path | None = None
    """File with the name of a picture and its class on each line, for tars that do not tell: LOC_val_solution.csv."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(FromRunOrWeights):
    data: str | None = None
    """Pictures, all of them or those to test on; the run's own if None."""
    classes_from: Path | None = None
    """File with the names of the folders in the order of the net's labels, where neither names nor numbers tell it:
    LOC_synset_mapping.txt."""
    out: Path | None = None
    """New folder for report and pictures; RUN/evaluations/DATA or evaluation, numbered if it exists, if None."""
    workers: Natural = 2
    """Processes that decode files."""


def schedule_of(args: Args, per_epoch: int, steps: int) -> Schedule:
    """Linear scaling and gradual warm-up: for a batch of k 256, from η to k η, then `--schedule`.

    Goyal et al. 2017, sections 2.1 and 2.2. Up to k = 1 the rise begins at 0.
    """
    peak = args.learning_rate * args.batch / REFERENCE  # k η
    rise = min(steps, round(args.warmup_epochs * per_epoch))
    if args.schedule == "cosine":
        after = schedules.cosine(peak, steps - rise)
    else:
        after = schedules.milestones(peak, [max(0, steps * epoch // 90 - rise) for epoch in DROPS])
    return schedules.warmup(after, rise, args.learning_rate if peak > args.learning_rate else 0.0, peak)


def optimizer_of(args: Args, schedule: Schedule) -> optimizers.Optimizer:
    options = {"weight_decay": args.weight_decay, "mask": lambda name, leaf: leaf.ndim >= 2}
    rule = optimizers.sgd(schedule, momentum=0.9, nesterov=True, **options)
    return optimizers.ema(rule, args.ema, debias=True) if args.ema else rule


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("data", "micro_batches", "snapshot_epochs", "workers"), shards=BY_ROWS)
    with imagenet_data.opened(args.data) as data:
        learn(args, run, data)


def learn(args: Args, run: Run, data: image_sets.ImageSet) -> None:
    count, resize = len(data.train.labels), round(args.size * 256 / 224)
    if args.batch > count:
        raise ValueError(f"--batch is {args.batch}, but '{args.data}' has {count} images to learn from")
    trained = Trained(args.net, 3, args.size, resize, data.classes, **IMAGENET, averaged=args.ema > 0)
    net, cfg = net_of(trained)
    zero = {"zero_init": True} if args.zero_init and hasattr(cfg, "zero_init") else {}
    model, per_epoch = net.spec(replace(cfg, **zero)), count // args.batch
    steps = max(1, round(args.epochs * per_epoch))
    schedule = schedule_of(args, per_epoch, steps)
    peak = f"{args.learning_rate * args.batch / REFERENCE:.4g}, for a batch of {args.batch}"
    facts = {"net": args.net, "peak learning rate": peak, "residual blocks": "begin as identities" if zero else None}
    understood(print, image_sets.facts(data) | facts)

    init_key, run_key, order_key, flip_key = random.split(random.key(args.common.seed), 4).unbind(0)
    optimizer = optimizer_of(args, schedule)
    values = spec.init(init_key.to(run.device), model)
    state = start(run_key.to(run.device), values, model, optimizer)
    identity = {"net": args.net, "model": cfg, "data": fingerprint(data.train, data.test)}
    state, parameters = run.restore(state, identity, steps, model), tree.count(state.params)
    settings = {"trained": trained, "smoothing": args.label_smoothing, "frozen": (), "net": net, "cfg": cfg}
    objective = functools.partial(losses, dtype=run.policy.compute or torch.float32, **settings)
    options = {"policy": run.policy, "micro_batches": args.micro_batches, "compile": args.common.compile}
    step = make_step(objective, optimizer, donate=True, distributed=run.distributed, own_rows=True, **options)
    rows = rows_of(run, args.batch)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format

    keep = args.snapshot_epochs * per_epoch
    with Decoder(args.workers) as decoder, run.open({"trained": trained}, best="error", keep_every=keep):
        run.log.print(f"{args.net}: {parameters:,} parameters; run in {run.folder}")
        crops = {"scale": (args.least_area, 1.0), "rows": rows}
        batches = decoder.train_batches(data.train, order_key, run.remaining, args.batch, args.size, **crops)
        for at, batch in run.steps(batches):
            pixels, labels = tree.move(batch, run.device)
            if args.flip:
                keys = random.sites(random.fold_in(flip_key, at - 1), args.batch)[rows]
                pixels = augment.flip(keys.to(run.device), pixels)
            state, metrics = step(state, (pixels.contiguous(memory_format=layout), labels))
            metrics["learning_rate"] = schedule(state.step - 1)
            shares = {name: metrics[name] for name in ("loss", "accuracy")}
            run.record(at, metrics, args.batch, **shares)
            if at % per_epoch == 0 or at == steps:
                figures = measured(run, values_of(run, state), trained, data.test, decoder)
                run.log.metrics(at, {f"test/{name}": value for name, value in figures.items()})
                run.save(at, state, error=1 - figures["accuracy"])
            elif run.due(at, args.common.save_every):
                run.save(at, state)
        speed = {"parameters": parameters, "images_per_second": run.at * args.batch / run.seconds}
        figures = study(run.folder, values_of(run, state), trained, data.test, decoder) | image_sets.baselines(data)
        run.result({**figures, **best_of(run.folder, per_epoch), **speed, "skipped": len(decoder.skipped)})
    curves = read_curves(run.folder, "train/accuracy", "test/accuracy", "test/top5_accuracy")
    plots.curves(run.folder / "accuracy.png", curves, ylabel="accuracy", title=f"{args.net} on {shown(args.data)}")
    classifier.report_skipped(decoder)
    print(f"{classifier.summary(figures)} after {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def best_of(folder: Path, per_epoch: int) -> dict[str, float]:
    """The least error at the end of an epoch, and after which."""
    step = checkpoints.best(folder / "checkpoints", "error")
    if step is None:  # the first of several processes has them
        return {}
    error = checkpoints.read_record(folder / "checkpoints", step).metrics["error"]
    return {"best_accuracy": 1 - error, "best_epoch": step / per_epoch}


def values_of(run: Run, state) -> tree.Tree:
    """Parameters and Stats as they are evaluated: the averaged ones with `--ema`."""
    params = optimizers.averaged(state.opt_state) if run.args.ema else state.params
    return tree.merge(run.whole(params), state.stats)


def rows_of(run: Run, count: int) -> slice:
    """The rows, of `count`, that are this process's."""
    if run.distributed is None:
        return slice(None)
    mesh = run.distributed.mesh
    return slice(count * mesh.row // mesh.rows, count * (mesh.row + 1) // mesh.rows)


def measured(run: Run, values: tree.Tree, trained: Trained, test: Files, decoder: Decoder) -> dict[str, float]:
    """accuracy, top5_accuracy (with more than five classes) and nll of the test pictures, of which each of several
    processes evaluates a part, unless there are fewer than processes."""
    mesh = run.distributed.mesh if run.distributed else None
    divided = mesh is not None and 1 < mesh.rows <= len(test.labels)
    if divided:
        rows = rows_of(run, len(test.labels))
        test = test._replace(paths=test.paths[rows], labels=test.labels[rows])
    log_probs, labels = predictions(values, trained, test, decoder)
    figures = classification.figures(log_probs, labels)
    del figures["calibration_error"]  # no mean over pictures
    sums = torch.tensor([len(labels), *(value * len(labels) for value in figures.values())], dtype=torch.float64)
    if divided:
        (sums,) = collectives.sum_all([sums.to(run.device)], mesh.groups["rows"])
    return dict(zip(figures, (sums[1:] / sums[0]).tolist(), strict=True))


def index(args: IndexArgs) -> None:
    """Write index.jsonl of a folder of tars, by which training and evaluation find the pictures in them."""
    head = shards.write_index(args.folder, shards.read_labels(args.labels_from) if args.labels_from else None)
    parts = [shard["part"] or "undivided" for shard in head["shards"]]
    tars = {part: parts.count(part) for part in sorted(set(parts))}
    facts = {"tars": tars, "pictures": head["pictures"], "classes": head["classes"]}
    understood(print, facts | {"skipped": [tuple(pair) for pair in head["skipped"]]})
    print(f"wrote {args.folder / shards.INDEX}")


def evaluate(args: EvaluateArgs) -> None:
    """Top-1 and top-5 accuracy, report and pictures of a run's net or of published weights."""
    args.check()
    if args.run is None and args.data is None:
        raise ValueError(f"--weights '{args.weights}' needs --data, the pictures to evaluate them on")
    if args.run:
        run, trained, values = classifier.opened(args, RUNS)
        base = args.run / "evaluations" / (Path(args.data).resolve().name if args.data else "own")
    else:
        (trained, values), run, base = classifier.from_flags(args, RUNS), None, Path("evaluation")
    source, part = (args.data, "all") if args.data else (run.read("args", Args).data, "split")
    with imagenet_data.opened(source, part) as data:
        data, how = imagenet_data.with_labels_of(trained.classes, data, args.classes_from, args.run is None)
        understood(print, image_sets.facts(data) | {"labels": how})
        folder = unused(args.out, base)
        with Decoder(args.workers) as decoder:
            folder.mkdir(parents=True)
            figures = study(folder, values, trained, data.test, decoder) | image_sets.baselines(data)
    classifier.report_skipped(decoder)
    checkpoint = {"checkpoint": run.step} if run else {"weights": args.weights}
    write_json(folder / "result.json", figures | {"skipped": len(decoder.skipped), **checkpoint})
    print(f"{classifier.summary(figures)} of {len(data.test.labels)} images; files in {folder}/")


COMMANDS = {
    "evaluate": (EvaluateArgs, evaluate),
    "predict": (PredictArgs, functools.partial(classifier.predict, root=RUNS)),
    "index": (IndexArgs, index),
}

if __name__ == "__main__":
    command_line.run(__doc__, (Args, train, presets), root=RUNS, **COMMANDS)
