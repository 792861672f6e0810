"""Image classifiers: any net of `nets.classifiers` on any folder of images, trained, fine-tuned, evaluated and used.

Without a flag a small residual network (He et al. 2016, arXiv:1512.03385) learns scikit-learn's 8x8 digits, offline:

    python experiments/classify.py                                              under a minute on 2 CPU cores
    python experiments/classify.py --data FOLDER --net resnet18 --size 128      class folders of images; MNIST; CIFAR-10
    python experiments/classify.py finetune --net resnet50 --weights published --data FOLDER --freeze "stem*"
    python experiments/classify.py evaluate --run runs/classify/NAME --data OTHER_FOLDER
    python experiments/classify.py predict --run runs/classify/NAME a.png b.jpg FOLDER
    python experiments/classify.py predict --weights published --net resnet50 photo.jpg

It ends with the confusion matrix, the worst mistakes, the calibration and the first layer's filters as pictures.
Expected: 99.3 % of the test digits right.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from core import random, spec, tree
from experiments.parts import classifier
from experiments.parts.classifier import PredictArgs, is_run, losses, net_of, predictions, study
from nets.classifiers import by_name
from train import optimizers, plots
from train.data.fingerprint import fingerprint
from train.data.images import augment
from train.data.images import sets as image_sets
from train.data.images.files import Decoder
from train.data.understood import understood
from train.files import shown, write_json
from train.metrics import classification
from train.optimizers import recipes
from train.run import Common, Count, FromRun, Natural, NonNegative, Positive, Rate, Share, Shared, begin, command_line
from train.run.flags import Portion
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS
from train.run.run import unused
from train.step import make_step, start

RUNS = Path("runs/classify")
FIRST = ("stem*", "patches*", "convs.0.*", "stages.0.0.conv.*", "layers.0.*")
"""The layer of a net that meets the pixels; none has leaves by two of these."""


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits"; "mnist", "fashion-mnist" or "cifar10", downloaded once; or a folder: MNIST's files, CIFAR-10's batches,
    or pictures with one sub-folder per class, best inside `train` and `val`. The defaults of what follows fit its kind
    (this help shows those of the --data on its command line)."""
    net: str = "cifar-resnet8"
    """Any preset of nets.classifiers (a wrong name lists them)."""
    size: Count = 8
    """Pixels per side that the net sees."""
    epochs: Positive = 30.0
    """Passes over the training images; the learning rate falls over all of them."""
    batch: Count = 64
    """Images per step."""
    micro_batches: Count = 1
    """Parts that a batch is cut into to save memory (gradient accumulation)."""
    optimizer: Literal["sgd", "adamw", "muon"] = "adamw"
    """sgd (momentum 0.9, Nesterov), adamw, or muon with adamw for all but hidden matrices."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    head_learning_rate: NonNegative | None = None
    """Peak learning rate of the head; the other layers' if None."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """After the warm-up: cosine (to 0), step (a tenth after a half and after three quarters), constant."""
    warmup_ratio: Rate = 0.05
    """Fraction of all steps in which the learning rate rises."""
    weight_decay: NonNegative = 0.01
    """Weight decay of weights with two axes or more; not of biases and norms."""
    no_decay: tuple[str, ...] = ()
    """Patterns of other leaves without weight decay, such as "head*"."""
    label_smoothing: Rate = 0.0
    """Probability that is spread over all classes."""
    ema: Rate = 0.0
    """Decay of a moving average of the parameters, which is then evaluated; 0 for none."""
    crop: Natural = 1
    """Largest random shift of images in memory, in pixels. Files are always cropped and scaled at random."""
    least_area: Portion = 0.08
    """Least part of a file's area that a random crop has; more suits small pictures and short runs."""
    flip: bool = False
    """Random horizontal flips."""
    colour_jitter: NonNegative = 0.0
    """Largest random change of brightness, contrast and saturation, as a factor; of hue a quarter of it."""
    rand_augment: Annotated[Natural, tyro.conf.arg(metavar="0..30")] = 0
    """Strength of two random changes (RandAugment), 1 to 30 (9 is usual); 0 for none."""
    erase: Share = 0.0
    """Probability of random erasing."""
    mixup: NonNegative = 0.0
    """Alpha of mixup; 0 for none. With --cutmix too, each batch is mixed one way or the other."""
    cutmix: NonNegative = 0.0
    """Alpha of cutmix; 0 for none."""
    weights: str | None = None
    """Start from "published" (the preset's weights, downloaded), a weights file, a hub repository or a run's folder."""
    freeze: tuple[str, ...] = ()
    """Patterns of leaves that stay as they are, such as "stem*" "stages.0*"; frozen norms keep their statistics."""
    workers: Natural = 2
    """Processes that decode files."""
    eval_every: Count | None = None
    """Steps between evaluations on the test images; those of an epoch if None."""
    channels_last: bool = False
    """Keep the channels of an image next to each other in memory: faster on a GPU."""
    common: Shared = Common()


PRESETS = {
    "digits": Args(),
    "mnist": Args(size=28, epochs=3.0, batch=128, learning_rate=5e-3, crop=2),
    # He et al. 2016, section 4.2, with a cosine in place of two drops.
    "cifar10": Args("cifar10", "cifar-resnet20", 32, 164.0, 128, 1, "sgd", 0.1, weight_decay=1e-4, crop=4, flip=True),
    "folder": Args("", "resnet18", 224, 90.0, 64, 1, "sgd", 0.025, weight_decay=1e-4, crop=0, flip=True),
}


def presets(words: dict[str, str]) -> Args:
    """The recipe of the kind of images; with the weights of a run, for its net."""
    args, weights = PRESETS[image_sets.kind_of(words.get("data", "digits"))], words.get("weights")
    if weights and is_run(weights):
        trained, _ = classifier.load(Path(weights))
        args = dataclasses.replace(args, net=trained.net, size=trained.size)
    return args


def finetuning(words: dict[str, str]) -> Args:
    rates = {"learning_rate": 1e-4, "head_learning_rate": 1e-3}
    return dataclasses.replace(presets(words), epochs=10.0, optimizer="adamw", **rates)


@dataclass(frozen=True)
class EvaluateArgs(FromRun):
    data: str | None = None
    """Other images, all of them, of some of the run's classes; the run's own test images if None."""
    out: Path | None = None
    """New folder for report and pictures; RUN/evaluations/DATA, numbered if it exists, if None."""
    workers: Natural = 2
    """Processes that decode files."""


def optimizer_of(args: Args, steps: int, heads: set[str]) -> optimizers.Optimizer:
    """heads: names of the head's leaves."""
    half = torch.float32 if args.common.device == "cpu" else torch.bfloat16

    def decayed(name: str, leaf: Tensor) -> bool:
        return leaf.ndim >= 2 and not recipes.matches(name, args.no_decay)

    def hidden(name: str, leaf: Tensor) -> bool:  # neither the first layer, which meets the pixels, nor the head
        return leaf.ndim in (2, 4) and name not in heads and not recipes.matches(name, FIRST)

    def part(name: str, leaf: Tensor) -> str:
        return "frozen" if recipes.matches(name, args.freeze) else "head" if name in heads else "body"

    head = args.learning_rate if args.head_learning_rate is None else args.head_learning_rate
    rules = {"frozen": optimizers.set_to_zero()}
    for name, peak in {"body": args.learning_rate, "head": head}.items():
        rate = recipes.rate(args.schedule, peak, steps, round(args.warmup_ratio * steps))
        rules[name] = recipes.optimizer(args.optimizer, rate, args.weight_decay, decayed, hidden, half)
    together = args.head_learning_rate is None and not args.freeze
    rule = rules["body"] if together else optimizers.by_path(rules, part)
    return optimizers.ema(rule, args.ema, debias=True) if args.ema else rule


def train(args: Args) -> None:
    free = ("data", "epochs", "batch", "micro_batches", "learning_rate", "eval_every", "workers")
    run = begin(RUNS, args, free=free, shards=BY_ROWS)
    if args.rand_augment > 30:
        raise ValueError(f"--rand-augment is {args.rand_augment}; expected 0 to 30")
    data = image_sets.open_images(args.data)
    understood(print, image_sets.facts(data) | {"net": args.net, "weights": args.weights})
    if data.in_memory and args.least_area != Args.least_area:
        raise ValueError(f"--least-area is for files; '{args.data}' is held in memory, where --crop shifts the images")
    count = len(data.train.labels)
    if args.batch > count:
        raise ValueError(f"--batch is {args.batch}, but '{args.data}' has {count} images to learn from")
    identity = {"data": fingerprint(data.train, data.test)}
    data, per_epoch = image_sets.resized(data, args.size), count // args.batch
    trained, values = classifier.beginning(args, data, run.resumed_from)
    net, cfg = net_of(trained)
    model, steps = net.spec(cfg), max(1, round(args.epochs * per_epoch))
    recipes.check_patterns(model, (*args.freeze, *args.no_decay))

    init_key, run_key, order_key, change_key, head_key = random.split(random.key(args.common.seed), 5).unbind(0)
    optimizer, fresh = optimizer_of(args, steps, by_name.head_names(model)), []
    if values is None:
        values = spec.init(init_key.to(run.device), model)
    else:
        values, fresh = by_name.adopt(model, values, head_key, f"--weights '{args.weights}'")
    state = start(run_key.to(run.device), tree.move(values, run.device), model, optimizer)
    parameters = tree.count(state.params)
    state = run.restore(state, {"net": args.net, "model": cfg, **identity}, steps, model)
    settings = {"trained": trained, "smoothing": args.label_smoothing, "frozen": args.freeze}
    objective = functools.partial(losses, net=net, cfg=cfg, dtype=run.policy.compute or torch.float32, **settings)
    options = {"policy": run.policy, "micro_batches": args.micro_batches, "compile": args.common.compile}
    step = make_step(objective, optimizer, donate=True, distributed=run.distributed, **options)
    names = ("crop", "flip", "colour_jitter", "rand_augment", "erase", "mixup", "cutmix")
    changes = augment.Changes(*(getattr(args, name) for name in names))
    layout = torch.channels_last if args.channels_last else torch.contiguous_format

    with Decoder(0 if data.in_memory else args.workers) as decoder, run.open({"trained": trained}):
        run.log.print(f"{args.net}: {parameters:,} parameters; run in {run.folder}")
        if fresh:
            run.log.print(f"initialised anew, as the weights are for other classes: {', '.join(fresh)}")
        shape = args.batch, args.size, decoder, args.least_area
        batches = image_sets.train_batches(data.train, order_key, run.remaining, *shape)
        for at, batch in run.steps(batches):
            here = random.fold_in(change_key, at - 1).to(run.device)
            pixels, labels = tree.move(batch, run.device)
            pixels, labels = augment.changed(here, pixels, labels, changes, len(trained.classes), trained.mean)
            state, metrics = step(state, (pixels.contiguous(memory_format=layout), labels))
            run.record(at, metrics, args.batch, loss=metrics["loss"], accuracy=metrics["accuracy"])
            if at < steps and run.due(at, args.eval_every or max(1, per_epoch)):
                figures = classification.figures(*predictions(values_of(run, state), trained, data.test, decoder))
                run.log.metrics(at, {f"test/{name}": value for name, value in figures.items()})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        speed = {"parameters": parameters, "images_per_second": run.at * args.batch / run.seconds}
        figures = study(run.folder, values_of(run, state), trained, data.test, decoder)
        run.log.metrics(run.at, {f"test/{name}": value for name, value in figures.items()})
        figures |= image_sets.baselines(data)
        run.result({**figures, **speed, "skipped": len(decoder.skipped)})
    curves = read_curves(run.folder, "train/accuracy", "test/accuracy")
    plots.curves(run.folder / "accuracy.png", curves, ylabel="accuracy", title=f"{args.net} on {shown(args.data)}")
    classifier.report_skipped(decoder)
    print(f"{classifier.summary(figures)} after {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def finetune(args: Args) -> None:
    """Train from published weights or from a run's, with a new head where the classes differ."""
    if args.weights is None:
        raise ValueError('finetune needs --weights: "published", a weights file, a hub repository or a run\'s folder')
    train(args)


def values_of(run, state) -> tree.Tree:
    """Parameters and Stats as they are evaluated: the averaged ones with `--ema`."""
    return tree.merge(run.whole(optimizers.averaged(state.opt_state) if run.args.ema else state.params), state.stats)


def evaluate(args: EvaluateArgs) -> None:
    """Figures, report and pictures of a run's net on its test images, or on other images."""
    run, trained, values = classifier.opened(args)
    source, part = (run.read("args", Args).data, "split") if args.data is None else (args.data, "all")
    data = image_sets.open_images(source, part, classes=trained.classes)
    understood(print, image_sets.facts(data))
    data = image_sets.resized(data, trained.size)
    folder = unused(args.out, args.run / "evaluations" / (Path(data.name).resolve().name or "data"))
    with Decoder(0 if data.in_memory else args.workers) as decoder:
        folder.mkdir(parents=True)
        figures = study(folder, values, trained, data.test, decoder)
    classifier.report_skipped(decoder)
    write_json(folder / "result.json", figures | {"skipped": len(decoder.skipped), "checkpoint": run.step})
    print((folder / "report.txt").read_text(encoding="utf-8"))
    print(f"{classifier.summary(figures)} of {len(data.test.labels)} images; files in {folder}/")


COMMANDS = {"finetune": (Args, finetune, finetuning), "evaluate": (EvaluateArgs, evaluate)}

if __name__ == "__main__":
    command_line.run(__doc__, (Args, train, presets), root=RUNS, predict=(PredictArgs, classifier.predict), **COMMANDS)
