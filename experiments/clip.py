"""CLIP: pictures and texts in one space, learned from pictures with captions; zero-shot classes, search, probes.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020).
Without a flag a small one learns generated scenes of digits, "a red seven left of a blue three", offline:

    python experiments/clip.py                                         three to four minutes on 2 CPU cores
    python experiments/clip.py --net vit                               a ViT in place of a ResNet
    python experiments/clip.py --data FOLDER                           with captions.tsv; CSV, JSON Lines, COCO's JSON
    python experiments/clip.py --weights openai/clip-vit-base-patch32 --data DIR
    python experiments/clip.py --task true-false --data nlvr           is the sentence true of the picture?
    python experiments/clip.py search --run runs/clip/NAME "a red seven"
    python experiments/clip.py search --weights FOLDER --folder DIR "a dog"
    python experiments/clip.py predict --weights FOLDER --labels "cat,dog" 1.jpg
    python experiments/clip.py probe --weights FOLDER --data CLASSES    zero-shot, and a linear probe, of class folders
    python experiments/clip.py evaluate --run runs/clip/NAME --data OTHER

Expected: of 500 unseen scenes 86 % find their caption at once, 88 % of the captions their scene; ridge regression 1 %.
Pictures of pairs of a colour and a digit that were held out are named right among all 60 in 88 %.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from torch import Tensor

from core import random, tree
from core import spec as specs
from experiments.parts import picture_pairs, picture_search, picture_task, picture_text, true_false
from experiments.parts.picture_task import Task
from experiments.parts.picture_text import Clip
from nets.multimodal import clip
from train import plots
from train.data import batching
from train.data.fingerprint import fingerprint
from train.data.text.files import lines_of
from train.data.understood import understood
from train.files import write_json
from train.run import Common, Count, NonNegative, Positive, Shared, begin, command_line, open_run
from train.run.flags import check_source
from train.run.logs import read_curves
from train.run.run import unused
from train.step import make_step, start

RUNS = Path("runs/clip")
FREE = ("data", "steps", "batch", "learning_rate", "weight_decay", "eval_every")
Net = Literal["resnet", "vit", "vit-b-32", "vit-b-16", "vit-l-14", "rn50", "rn101", "rn50x4"]


@dataclass(frozen=True)
class Args:
    task: Literal["pairs", "true-false"] = "pairs"
    """Which caption belongs to which picture; or whether a sentence is true of its picture, as NLVR asks."""
    data: str = "scenes"
    """"scenes", generated; a folder with captions.tsv, a TSV, CSV, JSON Lines or COCO's JSON of captions, or two files
    TRAIN,TEST. Of true-false: the folder of NLVR."""
    net: Net = "resnet"
    """Net of pictures from scratch: a small ResNet or ViT, or one of the published sizes with its net of texts."""
    weights: str | None = None
    """Weights to begin with: a folder or Hugging Face id of a CLIP, with its tokenizer. None: from scratch, with byte
    pairs of the captions."""
    size: Count = 32
    """Pixels per side of a picture from scratch; published nets have their own."""
    fit: Literal["cut", "squeeze"] = "cut"
    """The middle of a picture, or all of it squeezed into the square; published nets expect the middle."""
    vocabulary: Count = 1000
    """Size of the vocabulary from scratch, at most."""
    longest: Count = 32
    """Tokens of a text from scratch, at most; longer ones are cut."""
    steps: Count = 850
    """Training steps; the learning rate rises over a twentieth of them, and then falls to 0 as a cosine."""
    batch: Count = 256
    """Pairs per step, each of which has the others as negatives."""
    learning_rate: Positive = 4e-3
    """Peak learning rate of AdamW."""
    weight_decay: NonNegative = 0.2
    """Weight decay of AdamW, not on biases, norms and the scale."""
    eval_every: Count = 100
    """Steps between evaluations on the first pictures to test on."""
    common: Shared = Common()


def presets(words: dict[str, str]) -> Args:
    statements = words.get("task") == "true-false"
    sizes = {"batch": 32 if statements else 128, "eval_every": 250}
    if "weights" in words:
        return Args(fit="squeeze" if statements else "cut", steps=1000, learning_rate=1e-5, **sizes)
    if statements:
        return Args(size=64, fit="squeeze", steps=1000, learning_rate=1e-3, **sizes)
    scenes = Args() if words.get("net", "resnet") == "resnet" else Args(learning_rate=1e-3)
    pictures = Args(size=64, vocabulary=4000, longest=64, steps=3000, learning_rate=1e-3, **sizes)
    return scenes if words.get("data", "scenes") == "scenes" else pictures


@dataclass(frozen=True, kw_only=True)
class Source:
    run: Path | None = None
    """Folder of a run: runs/clip/NAME."""
    checkpoint: str = "latest"
    """Checkpoint of the run: latest or a step."""
    weights: str | None = None
    """A folder or Hugging Face id of a CLIP instead."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(Source):
    data: str | None = None
    """Pictures with captions, whose part to test on is used, or NLVR's folder; the run's own if None."""
    out: Path | None = None
    """New folder for figures and pictures; evaluations/DATA in the run's, numbered if it exists, if None."""


@dataclass(frozen=True, kw_only=True)
class SearchArgs(Source):
    folder: Path | None = None
    """Folder of pictures to search in; the run's pictures to test on, of scenes held-out pairs too, if None."""
    queries: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to look for; without any, the lines of standard input."""
    count: Count = 5
    """Pictures to show per query."""
    out: Path | None = None
    """New PNG file; search.png, numbered if it exists, in the run's folder or the current one, if None."""


@dataclass(frozen=True, kw_only=True)
class PredictArgs(Source):
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, folders of them, a .txt file of names, or - for names on standard input."""
    labels: str | None = None
    """Names of the classes, separated by commas, or a file with one per line; the digits and colours of a run on scenes
    if None."""
    prompt: str = "{}"
    """Text about a class, {} being its name."""
    out: Path | None = None
    """New folder for predictions.csv and predictions.png; "predictions", numbered if it exists, if None."""


@dataclass(frozen=True, kw_only=True)
class ProbeArgs(Source):
    data: str | None = None
    """Folder with one sub-folder of pictures per class, or with such folders to train and to test on."""
    prompt: str = "a photo of a {}"
    """Text about a class, {} being its name."""


def open_task(args: Args) -> Task:
    """Data and net of the flags."""
    weights = picture_text.of_weights(args.weights) if args.weights else None
    size, whole = weights.cfg.image if weights else args.size, args.fit == "squeeze"
    if weights:
        weights = weights._replace(pixels=weights.pixels._replace(whole=whole))
    if args.task == "true-false":
        if args.data == "scenes":
            raise ValueError("--task true-false needs sentences that are true or false; name NLVR's folder with --data")
        data = true_false.open_data(args.data, size, whole)
        model = weights or picture_text.scratch(args, data.train.about.sentences, data.train.images)
        return true_false.task(args, data, model)
    data = picture_pairs.open_data(args.data, size, whole)
    return picture_pairs.task(args, data, weights or picture_pairs.from_scratch(args, data))


def train(args: Args) -> None:
    run = begin(RUNS, args, free=FREE)
    task = open_task(args)
    cfg = task.model.cfg
    understood(print, {"data": args.data, **task.facts, "weights": args.weights, "net": cfg})
    if args.batch > task.count:
        raise ValueError(f"--batch is {args.batch}, but there are {task.count} pictures to learn from")
    net_key, run_key, order_key, text_key = random.split(random.key(args.common.seed), 4).unbind(0)
    model = {"clip": clip.spec(cfg)} | ({"head": task.head} if task.head else {})
    values = specs.init(net_key, model)
    if args.weights:
        values = values | {"clip": task.model.params}
    optimizer = picture_task.adamw(args)
    state = start(run_key.to(run.device), tree.move(values, run.device), model, optimizer)
    identity = {"net": cfg, "data": fingerprint(*task.data), "tokenizer": fingerprint(task.model.tokenizer)}
    state = run.restore(state, identity, args.steps)
    step = make_step(task.loss, optimizer, policy=run.policy, donate=True, compile=args.common.compile)

    def batch_at(t: int) -> tuple:
        return task.batch(batching.epoch_batch(order_key, t, task.count, args.batch), random.fold_in(text_key, t))

    def trained(state) -> tuple:
        params = tree.merge(state.params, state.stats)
        return task.model._replace(params=params["clip"]), params.get("head", {})

    with run.open(picture_text.stored(task.model), files={"tokenizer.json": task.model.tokenizer.save}):
        run.log.print(f"{tree.count(state.params):,} parameters; run in {run.folder}")
        run.log.print(f"a guess has a loss of {task.guess:.3f}")
        for at, batch in run.steps(batch_at(t) for t in run.remaining):
            state, metrics = step(state, tree.move(batch, run.device))
            state = state._replace(params=state.params | {"clip": clip.clipped(state.params["clip"])})
            run.record(at, metrics, args.batch)
            if run.due(at, args.eval_every):
                figures = task.validate(*trained(state))
                run.log.metrics(at, {f"validation/{name}": value for name, value in figures.items()})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        figures = task.study(run.folder, *trained(state))
        figures["scale"] = float(state.params["clip"]["scale"].exp())
        run.result({**figures, "parameters": tree.count(state.params)})
    for name, (metrics, label) in task.curves.items():
        points = read_curves(run.folder, *metrics.values())
        curves = {legend: points[metric] for legend, metric in metrics.items()}
        plots.curves(run.folder / f"{name}.png", curves, ylabel=label, title=name.capitalize())
    print(task.summary.format(**figures))
    print(f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def evaluate(args: EvaluateArgs) -> None:
    """Retrieval both ways, or true and false, on the pictures of a run or on others."""
    check_source(args)
    saved = open_run(args.run, RUNS, args.checkpoint) if args.run else None
    trained, head = saved.read("args", Args) if saved else Args(), {}
    data = args.data or (trained.data if saved else None)
    if data is None:
        raise ValueError("published weights have no data of their own; name pictures with captions with --data")
    if trained.task == "true-false":
        model, head = picture_text.with_head(saved, command_line.device(args.device))
        judged = true_false.open_data(data, *model.pictures)
        facts, summary = judged.facts, true_false.SUMMARY
    else:
        model = picture_text.opened(args, RUNS)
        pairs = picture_pairs.open_data(data, *model.pictures)
        facts, summary = pairs.facts, picture_pairs.SUMMARY + picture_pairs.SCENES * pairs.scenes
    understood(print, {"data": data, **facts, "net": model.cfg})
    folder = None
    if args.out or args.run:
        folder = unused(args.out, (args.run or Path()) / "evaluations" / Path(args.data or "test").resolve().name)
        folder.mkdir(parents=True)
    figures = true_false.study(folder, model, head, judged) if head else picture_pairs.study(folder, model, pairs)
    if folder:
        write_json(folder / "result.json", figures)
    print(summary.format(**figures))
    print(f"files in {folder}/" if folder else "no files: name a folder with --out")


def search(args: SearchArgs) -> None:
    """The pictures that are nearest to each query: cosine, name; and as a picture."""
    model, out = picture_text.opened(args, RUNS), unused(args.out, (args.run or Path()) / "search.png")
    images, names = searched(args, model)
    rows = picture_search.nearest(model, images, names, lines_of(args.queries, None), args.count)
    if rows:
        picture_search.draw(out, rows, images)
        print(out)


def searched(args: SearchArgs, model: Clip) -> tuple[Tensor, list[str]]:
    """(pictures, names) of --folder, or those that the run is tested on."""
    if args.folder is not None:
        return picture_search.read([args.folder], model)
    trained = open_run(args.run, RUNS, args.checkpoint).read("args", Args) if args.run else None
    if trained is None or trained.task != "pairs":
        raise ValueError("name the pictures to search in with --folder")
    return picture_pairs.to_search(picture_pairs.open_data(trained.data, *model.pictures, learn=False))


def predict(args: PredictArgs) -> None:
    """The class of each picture, by the text that is nearest to it."""
    model, folder = picture_text.opened(args, RUNS), unused(args.out, Path("predictions"))
    trained = open_run(args.run, RUNS, args.checkpoint).read("args", Args) if args.run else None
    if args.labels is None and (trained is None or trained.data != "scenes"):
        raise ValueError("name the classes with --labels")
    classes = picture_search.classes_of(args.labels)
    images, names = picture_search.read(args.images, model)
    understood(print, {"pictures": len(images), "classes": classes, "prompt": args.prompt})
    folder.mkdir(parents=True)
    picture_search.write_predictions(folder, model, images, names, classes, args.prompt)
    print(f"files in {folder}/")


def probe(args: ProbeArgs) -> None:
    """Zero-shot accuracy on pictures in class folders, and that of a linear probe, beside one on pixels."""
    model = picture_text.opened(args, RUNS)
    if args.data is None:
        raise ValueError("name a folder with one sub-folder of pictures per class with --data")
    facts, figures = picture_search.probe(model, args.data, args.prompt)
    understood(print, {"data": args.data, **facts, "prompt": args.prompt, "net": model.cfg})
    print(picture_search.SUMMARY.format(**figures))


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, presets),
        root=RUNS,
        evaluate=(EvaluateArgs, evaluate),
        search=(SearchArgs, search),
        predict=(PredictArgs, predict),
        probe=(ProbeArgs, probe),
    )
