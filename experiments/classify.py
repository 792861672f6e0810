"""Image classifiers: any net of `nets.classifiers` on any folder of images, trained, fine-tuned, judged and used.

Without a flag a small residual network (He et al. 2016, arXiv:1512.03385) learns scikit-learn's 8x8 digits, offline:

    python experiments/classify.py                                              under a minute on 2 CPU cores
    python experiments/classify.py --data FOLDER --net resnet18 --size 128      class folders of images; MNIST; CIFAR-10
    python experiments/classify.py finetune --net resnet50 --weights published --data FOLDER --freeze "stem*"
    python experiments/classify.py predict --run runs/classify/NAME a.png b.jpg
    python experiments/classify.py evaluate --run runs/classify/NAME

It ends with the confusion matrix, the worst mistakes, the calibration and the first layer's filters as pictures.
Expected: 99.3 % of the test digits right.
"""

import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
import tyro
from torch import Tensor

from core import random, tree
from experiments.parts.classifier import Trained, is_run, load, net_of, normalised, predictions, study
from nets.classifiers import by_name, torchvision_weights
from train import optimizers, plots
from train.data.images import augment
from train.data.images import sets as image_sets
from train.data.images.arrays import Labelled
from train.data.images.files import Decoder
from train.losses import accuracy, cross_entropy
from train.metrics import classification
from train.optimizers import recipes
from train.run import command_line
from train.run import run as runs
from train.run.logs import read_curves
from train.step import Policy, create, make_step, start

RUNS = Path("runs/classify")


@dataclass(frozen=True)
class Recipe:
    """How a kind of images is learned, unless flags say otherwise."""

    net: str
    size: int
    epochs: float
    batch: int
    learning_rate: float
    weight_decay: float
    optimizer: str = "sgd"
    crop: int = 0
    flip: bool = False


RECIPES = {
    "digits": Recipe("cifar-resnet8", 8, 30, 64, 3e-3, 0.01, "adamw", crop=1),
    "mnist": Recipe("cifar-resnet8", 28, 3, 128, 5e-3, 0.01, "adamw", crop=2),
    # He et al. 2016, section 4.2, with a cosine in place of two drops.
    "cifar10": Recipe("cifar-resnet20", 32, 164, 128, 0.1, 1e-4, crop=4, flip=True),
    "folder": Recipe("resnet18", 224, 90, 64, 0.025, 1e-4, flip=True),
}
DTYPES = {"float32": Policy(), "bfloat16": Policy(torch.bfloat16)}
FIRST = ("stem*", "patches*", "convs.0.*", "stages.0.0.conv.*", "layers.0.*")
"""The layer of a net that meets the pixels; none has leaves by two of these."""


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits"; "mnist", "fashion-mnist" or "cifar10", downloaded once; or a folder: MNIST's files, CIFAR-10's batches,
    or pictures in a sub-folder a class, best inside `train` and `val`."""
    net: str | None = None
    """Any preset of nets.classifiers (a wrong name lists them); as all of these, the data's recipe if not given."""
    size: int | None = None
    """Pixels a side that the net sees."""
    epochs: float | None = None
    """How often each image is seen; the learning rate falls over all of them."""
    batch: int | None = None
    """Images a step."""
    optimizer: str | None = None
    """sgd (momentum 0.9, Nesterov), adamw or muon (with adamw for what is no hidden matrix)."""
    learning_rate: float | None = None
    """Peak learning rate."""
    head_learning_rate: float | None = None
    """Another peak for the head."""
    schedule: str = "cosine"
    """After the warm-up: cosine (to 0), step (a tenth after a half and after three quarters), constant."""
    warmup: float = 0.05
    """The share of all steps in which the learning rate rises."""
    weight_decay: float | None = None
    """Of weights with two axes or more; not of biases, nor of what norms scale by."""
    no_decay: tuple[str, ...] = ()
    """Patterns of other leaves without weight decay, such as "head*"."""
    label_smoothing: float = 0.0
    """The share of each label that is spread over all classes."""
    ema: float = 0.0
    """Decay of a moving average of the parameters, which is then what is evaluated; 0 for none."""
    crop: int | None = None
    """Images in memory: by up to this many pixels they are shifted. Files are always cropped at random, and scaled."""
    flip: bool | None = None
    """Left and right may change over (True or False)."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation change by up to this factor, hue by a quarter of it."""
    rand_augment: int = 0
    """Two random changes of this strength, 1 to 30 (9 is usual); 0 for none."""
    erase: float = 0.0
    """The chance that a random rectangle is painted over."""
    mixup: float = 0.0
    """Alpha of mixing two images; 0 for none. With --cutmix too, each batch is mixed one way or the other."""
    cutmix: float = 0.0
    """Alpha of pasting a rectangle of another image; 0 for none."""
    weights: str | None = None
    """Begin from: "published" (the preset's, downloaded), a weights file or hub repository, or the folder of a run."""
    freeze: tuple[str, ...] = ()
    """Patterns of leaves that stay as they are, such as "stem*" "stages.0*"."""
    micro_batches: int = 1
    """Into how many parts a batch is cut to save memory."""
    workers: int = 2
    """Processes that decode files."""
    eval_every: float = 1
    """Epochs between two looks at the test images."""
    save_every: int = 500
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random: initial values, order, changes of the images, dropout."""
    name: str | None = None
    """Folder under runs/classify; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    dtype: str = "float32"
    """float32, or bfloat16 for mixed precision (parameters stay float32)."""
    channels_last: bool = False
    """Keep an image's channels next to each other in memory: faster on a GPU."""
    compile: bool = True
    """Compile the train step with torch.compile; the first time takes half a minute or more, later a few seconds."""


@dataclass(frozen=True)
class FinetuneArgs(Args):
    epochs: float | None = 10
    """How often each image is seen; the learning rate falls over all of them."""
    optimizer: str | None = "adamw"
    """sgd (momentum 0.9, Nesterov), adamw or muon."""
    learning_rate: float | None = 1e-4
    """Peak learning rate."""
    head_learning_rate: float | None = 1e-3
    """Another peak for the head."""


@dataclass(frozen=True)
class EvaluateArgs:
    run: Path
    """Folder of a run, such as runs/classify/NAME."""
    data: str | None = None
    """Other images with the same classes; those of the run if not given."""
    workers: int = 2
    """Processes that decode files."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


@dataclass(frozen=True)
class PredictArgs:
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures to classify."""
    run: Path
    """Folder of a run, such as runs/classify/NAME."""
    out: Path = Path("predictions.png")
    """Where to draw them."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


def loss(params, batch, keys, net: ModuleType, cfg, trained: Trained, smoothing: float, dtype: torch.dtype):
    """Cross-entropy; nets with auxiliary heads add theirs, weighted. Labels are numbers, or probabilities if mixed."""
    pixels, labels = batch
    output = net.apply(params, normalised(pixels, trained).to(dtype), cfg, key=keys, train=True)
    heads = by_name.weighted_logits(net, output)
    value = sum(weight * cross_entropy(logits, labels, label_smoothing=smoothing) for weight, logits in heads)
    numbers = labels.argmax(-1) if labels.is_floating_point() else labels
    return value, {"accuracy": accuracy(heads[0][1].detach(), numbers)}


def settings(args: Args, recipe: Recipe) -> Recipe:
    """The recipe with the flags applied."""
    said = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in said.items() if value is not None})
    command_line.choice("--optimizer", recipe.optimizer, recipes.OPTIMIZERS)
    command_line.choice("--schedule", args.schedule, recipes.SCHEDULES)
    command_line.choice("--dtype", args.dtype, DTYPES)
    command_line.at_least_one(size=recipe.size, batch=recipe.batch, micro_batches=args.micro_batches)
    command_line.at_least_one(save_every=args.save_every)
    command_line.positive(epochs=recipe.epochs, learning_rate=recipe.learning_rate, eval_every=args.eval_every)
    if not 0 <= args.warmup < 1 or not 0 <= args.ema < 1 or not 0 <= args.erase <= 1:
        raise ValueError(f"--warmup {args.warmup}, --ema {args.ema}, --erase {args.erase}; expected shares of 1")
    if recipe.batch % args.micro_batches:
        raise ValueError(f"--batch {recipe.batch} does not divide into --micro-batches {args.micro_batches}")
    return recipe


def optimizer_of(args: Args, recipe: Recipe, steps: int, heads: set[str]) -> optimizers.Optimizer:
    """heads: the names of the head's leaves."""
    half = torch.float32 if args.device == "cpu" else torch.bfloat16

    def decayed(name: str, leaf: Tensor) -> bool:
        return leaf.ndim >= 2 and not recipes.matches(name, args.no_decay)

    def hidden(name: str, leaf: Tensor) -> bool:  # neither the first layer, which meets the pixels, nor the head
        return leaf.ndim in (2, 4) and name not in heads and not recipes.matches(name, FIRST)

    def part(name: str, leaf: Tensor) -> str:
        return "frozen" if recipes.matches(name, args.freeze) else "head" if name in heads else "body"

    peaks = {"body": recipe.learning_rate, "head": args.head_learning_rate or recipe.learning_rate}
    rates = {name: recipes.rate(args.schedule, peak, steps, round(args.warmup * steps)) for name, peak in peaks.items()}
    rules = {
        name: recipes.optimizer(recipe.optimizer, rate, recipe.weight_decay, decayed, hidden, half)
        for name, rate in rates.items()
    }
    if args.freeze or args.head_learning_rate:
        rule = optimizers.by_path({**rules, "frozen": optimizers.set_to_zero()}, part)
    else:
        rule = rules["body"]
    return optimizers.ema(rule, args.ema, debias=True) if args.ema else rule


def beginning(args: Args, recipe: Recipe, data: image_sets.ImageSet) -> tuple[Trained, tree.Tree | None]:
    """The net with the constants that pixels are normalised with, and the values of `--weights` if there are any."""
    resize = recipe.size if data.in_memory else round(recipe.size * 256 / 224)  # as usual with ImageNet
    trained = Trained(
        recipe.net,
        data.channels,
        recipe.size,
        resize,
        data.classes,
        torchvision_weights.IMAGENET["mean"],
        torchvision_weights.IMAGENET["std"],
        averaged=args.ema > 0,
    )
    own = load(Path(args.weights)) if args.weights and is_run(args.weights) else None
    wanted = own[0].channels if own else 3
    if args.weights and wanted != data.channels:
        raise ValueError(f"--weights '{args.weights}' want images of {wanted} channels, found {data.channels}")
    if own:
        own, values = own
        return dataclasses.replace(trained, mean=own.mean, std=own.std, choices=own.choices), values
    if args.weights:
        source = None if args.weights == "published" else args.weights
        values, cfg, facts = torchvision_weights.from_pretrained(recipe.net, source, size=recipe.size)
        net, wanted = net_of(trained)
        cfg = vars(by_name.fitted(net, cfg, channels=data.channels, classes=len(data.classes), size=recipe.size))
        choices = {name: value for name, value in vars(wanted).items() if cfg[name] != value}
        return dataclasses.replace(trained, mean=facts.mean, std=facts.std, choices=choices), values
    if data.in_memory:
        std, mean = torch.std_mean(data.train.images, (0, 2, 3))
        trained = dataclasses.replace(trained, mean=tuple(mean.tolist()), std=tuple(std.clamp(min=1e-3).tolist()))
    return trained, None


def usual(args: Args, kind: str) -> Recipe:
    """The recipe of a kind of images; with the weights of a run, for its net."""
    recipe = RECIPES[kind]
    if args.weights and is_run(args.weights):
        own = runs.read_config(Path(args.weights), "trained", Trained)
        recipe = dataclasses.replace(recipe, net=own.net, size=own.size)
    return recipe


def train(args: Args) -> None:
    origin, args = runs.begin(RUNS, args, free=("epochs", "eval_every", "save_every", "workers", "device", "compile"))
    device, data = command_line.device(args.device), image_sets.open_images(args.data)
    if origin.record:
        recipe = runs.read_config(origin.folder, "recipe", Recipe)
    else:
        recipe = usual(args, data.kind)
    recipe, count = settings(args, recipe), len(data.train.labels)
    if recipe.batch > count:
        raise ValueError(f"--batch is {recipe.batch}, but '{args.data}' has {count} images to learn from")
    data = image_sets.resized(data, recipe.size)
    if origin.record:
        trained, values = runs.read_config(origin.folder, "trained", Trained), None
    else:
        trained, values = beginning(args, recipe, data)
    net, cfg = net_of(trained)
    model, key = net.spec(cfg), random.key(args.seed, device)
    recipes.check_patterns(model, (*args.freeze, *args.no_decay))
    per_epoch = count // recipe.batch
    steps = max(1, round(recipe.epochs * per_epoch))
    optimizer = optimizer_of(args, recipe, steps, by_name.head_names(model))
    fresh: list[str] = []
    if values is not None:
        values, fresh = by_name.adopt(model, values, random.fold_in(key, 0), f"--weights '{args.weights}'")
        state = start(random.fold_in(key, 1), tree.move(values, device), model, optimizer)
    else:
        state = create(key, model, optimizer)
    identity = {"net": recipe.net, "model": cfg, "examples": {"train": count, "test": len(data.test.labels)}}
    state = runs.restore(origin, state, identity, steps)
    policy = DTYPES[args.dtype]
    dtype = policy.compute or torch.float32
    step = make_step(
        functools.partial(
            loss,
            net=net,
            cfg=cfg,
            trained=trained,
            smoothing=args.label_smoothing,
            dtype=dtype,
        ),
        optimizer,
        policy=policy,
        micro_batches=args.micro_batches,
        donate=True,
        compile=args.compile,
    )
    order_key, change_key = random.fold_in(random.key(args.seed), 2), random.fold_in(key, 3)  # `create` has 0 and 1
    changes = augment.Changes(
        recipe.crop, recipe.flip, args.colour_jitter, args.rand_augment, args.erase, args.mixup, args.cutmix
    )
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    every = max(1, round(args.eval_every * per_epoch))

    config = {"args": args, **identity, "recipe": recipe, "trained": trained, "torch": torch.__version__}
    with Decoder(0 if data.in_memory else args.workers) as decoder, runs.opened(origin, config, total=steps) as run:
        run.log.print(f"{recipe.net}: {tree.count(state.params):,} parameters, {count:,} images; run in {run.folder}")
        if fresh:
            run.log.print(f"drawn anew, as the weights are for other classes: {', '.join(fresh)}")
        if args.compile and run.first < steps:
            run.log.print("compiling the train step ...")
        at, clock = run.first, time.perf_counter()
        batches = image_sets.train_batches(
            data.train, order_key, range(run.first, steps), recipe.batch, recipe.size, decoder
        )
        for at, batch in enumerate(batches, run.first + 1):
            pixels, labels = tree.move(batch, device)
            here = random.fold_in(change_key, at - 1)
            pixels, labels = augment.changed(here, pixels, labels, changes, len(trained.classes), trained.mean)
            state, metrics = step(state, (pixels.contiguous(memory_format=layout), labels))
            runs.check_finite(run, at, metrics)
            if at == run.first + 1:
                run.log.print(f"first step done after {time.perf_counter() - clock:.1f} s")
            last = at == steps or run.stop.requested
            run.log.progress(at, recipe.batch, loss=metrics["loss"], accuracy=metrics["accuracy"])
            if at % 10 == 0 or last:
                run.log.metrics(at, {f"train/{name}": value for name, value in metrics.items()})
            if at % every == 0 and not last:
                found = predictions(values_of(state, args), trained, data.test, decoder)
                tested = classification.figures(*found)
                run.log.metrics(at, {f"test/{name}": value for name, value in tested.items()})
            if at % args.save_every == 0 or last:
                runs.save(run, at, state)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        figures = study(run.folder, values_of(state, args), trained, data.test, decoder)
        run.log.metrics(at, {f"test/{name}": value for name, value in figures.items()})
        result = {**figures, "steps": at, "seconds": seconds, "parameters": tree.count(state.params)}
        run.log.result({**result, "images_per_second": at * recipe.batch / seconds, "skipped": len(decoder.skipped)})
        lines = read_curves(run.folder, "train/accuracy", "test/accuracy")
        plots.curves(run.folder / "accuracy.png", lines, ylabel="share right", title=f"{recipe.net} on {args.data}")
    summarise(figures, decoder, f"after {at} steps in {seconds:.0f} s; files in {run.folder}/")


def values_of(state, args: Args) -> tree.Tree:
    """Parameters and Stats as they are judged: the averaged ones with `--ema`."""
    return tree.merge(optimizers.averaged(state.opt_state) if args.ema else state.params, state.stats)


def summarise(figures: dict[str, float], decoder: Decoder, rest: str) -> None:
    if decoder.skipped:
        print(f"{len(decoder.skipped)} of the files could not be read, and were skipped")
    top5 = f", {figures['top5_accuracy']:.2%} among the first five" if "top5_accuracy" in figures else ""
    print(f"{figures['accuracy']:.2%} of the test images right{top5}, NLL {figures['nll']:.4f},", end=" ")
    print(f"ECE {figures['calibration_error']:.2%} {rest}")


def evaluate(args: EvaluateArgs) -> None:
    trained, values = load(args.run)
    data = image_sets.open_images(args.data or runs.read_config(args.run, "args", Args).data)
    if data.classes != trained.classes:
        found, wanted = ", ".join(data.classes[:9]), ", ".join(trained.classes[:9])
        raise ValueError(
            f"the images have {len(data.classes)} classes ({found}), the run {len(trained.classes)} ({wanted})"
        )
    data, values = image_sets.resized(data, trained.size), tree.move(values, command_line.device(args.device))
    with Decoder(0 if data.in_memory else args.workers) as decoder:
        figures = study(args.run, values, trained, data.test, decoder)
    print((args.run / "report.txt").read_text(encoding="utf-8"))
    summarise(figures, decoder, f"of {len(data.test.labels)} images; pictures in {args.run}/")


def predict(args: PredictArgs) -> None:
    trained, values = load(args.run)
    device = command_line.device(args.device)
    pixels = torch.stack(
        [image_sets.image(path, trained.size, trained.resize, trained.channels) for path in args.images]
    )
    test = Labelled(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    log_probs, _ = predictions(tree.move(values, device), trained, test)
    for path, row in zip(args.images, log_probs, strict=True):
        best = row.topk(min(5, len(row)))
        print(path)
        for value, index in zip(best.values.exp().tolist(), best.indices.tolist(), strict=True):
            print(f"  {value:7.2%}  {trained.classes[index]}")
    classification.draw_predictions(args.out, pixels, log_probs, trained.classes, [str(path) for path in args.images])
    print(f"picture in {args.out}")


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train),
        finetune=(FinetuneArgs, train),
        evaluate=(EvaluateArgs, evaluate),
        predict=(PredictArgs, predict),
    )
