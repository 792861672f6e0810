"""A GPT on characters or byte pairs: train it, then let it write.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Without a flag it trains a small
character-level GPT on the language reference that every Python installation carries:

    python experiments/gpt.py                                                  about 2 minutes on 2 CPU cores
    python experiments/gpt.py --preset nanogpt-cpu --text input.txt            nanoGPT's CPU setting (tiny Shakespeare)
    python experiments/gpt.py sample --run runs/gpt/NAME --prompt "The "       write on from a prompt
    python experiments/gpt.py sample --weights openai-community/gpt2 --prompt "The "     the same with published weights
"""

import dataclasses
import functools
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core import random, tree
from nets import weights as pretrained
from nets.language import gpt2
from train import optimizers, plots
from train.data.text import text, token_files, tokenizers
from train.gradients import watch as watching
from train.losses import cross_entropy
from train.optimizers import schedules
from train.run import checkpoints, command_line
from train.run import run as runs
from train.run.logs import read_curves
from train.step import Policy, create, make_step, start

RUNS = Path("runs/gpt")


@dataclass(frozen=True)
class Recipe:
    """How a preset of `nets.language.gpt2` is trained: AdamW, linear warm-up, cosine to a tenth of the peak."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    beta2: float = 0.95
    weight_decay: float = 0.1
    micro_batches: int = 1


RECIPES = {
    "tiny": Recipe(steps=1500, batch=16, learning_rate=3e-3, warmup=100, beta2=0.99),
    "nanogpt-cpu": Recipe(steps=2000, batch=12, learning_rate=3e-3, warmup=100, beta2=0.99),
    "nanogpt-gpu": Recipe(steps=5000, batch=64, learning_rate=1e-3, warmup=100, beta2=0.99),
    **{
        name: Recipe(steps=600_000, batch=480, learning_rate=6e-4, warmup=2000, micro_batches=40)
        for name in ("gpt", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    },
}
DTYPES = {"float32": Policy(), "bfloat16": Policy(torch.bfloat16)}


@dataclass(frozen=True)
class Args:
    preset: str = "tiny"
    """Sizes and recipe: tiny, nanogpt-cpu, nanogpt-gpu, gpt, gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    text: Path | None = None
    """A UTF-8 file to learn from, its last tenth for validation; without it, the language reference inside Python."""
    tokenizer: str = "characters"
    """"characters", or a file or folder with a byte-pair tokenizer (tokenizer.json, or vocab.json and merges.txt)."""
    weights: str | None = None
    """Start from published GPT weights (folder or Hugging Face repository), with their tokenizer."""
    steps: int | None = None
    """Training steps; the preset's if not given. The learning rate falls over all of them."""
    batch: int | None = None
    """Examples a step; the preset's if not given."""
    micro_batches: int | None = None
    """Into how many parts a batch is cut to save memory; the preset's if not given."""
    learning_rate: float | None = None
    """Peak learning rate; the preset's if not given."""
    dropout: float | None = None
    """Dropout rate; the preset's if not given."""
    watch_gradients: bool = False
    """Log the gradient noise scale and the norms of the examples' gradients, drawn at the end."""
    eval_every: int = 250
    """Steps between two looks at the validation text."""
    save_every: int = 500
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random: initial values, order of the data, dropout, samples."""
    name: str | None = None
    """Folder of the run under runs/gpt; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    dtype: str = "float32"
    """float32, or bfloat16 for mixed precision (parameters stay float32)."""
    compile: bool = True
    """Compile the train step with torch.compile; the first time takes a minute, later starts a few seconds."""


@dataclass(frozen=True)
class SampleArgs:
    run: Path | None = None
    """Folder of a run, such as runs/gpt/NAME."""
    weights: str | None = None
    """Or published GPT weights: a folder with model.safetensors, config.json and the tokenizer, or a repository id."""
    prompt: str = ""
    """The text to continue; without it, the start of a text."""
    tokens: int = 300
    """How many tokens to write."""
    temperature: float = 0.8
    """Below 1 more likely, above 1 more varied; 0 always takes the most likely token."""
    top_k: int | None = None
    """Draw only from this many most likely tokens."""
    top_p: float | None = None
    """Draw only from the most likely tokens that together have this probability."""
    seed: int = 0
    """Seed of the draws."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


def published_tokenizer(source: str) -> Any:
    path = pretrained.locate(source, ("tokenizer.json", "vocab.json"))
    return tokenizers.load(path if path.name == "tokenizer.json" else path.parent)


def check_vocabulary(tokenizer, cfg: gpt2.Config) -> None:
    if tokenizer.vocabulary_size > cfg.vocabulary:
        found = f"the tokenizer has {tokenizer.vocabulary_size} tokens"
        raise ValueError(f"{found}, expected at most the {cfg.vocabulary} of the net")


def loss(params, batch, keys, cfg: gpt2.Config):
    tokens, targets = batch
    return cross_entropy(gpt2.apply(params, tokens, cfg, key=keys, train=True), targets)


def losses(params, batch, keys, cfg: gpt2.Config):
    """(examples,), for `--watch-gradients`."""
    tokens, targets = batch
    return cross_entropy(gpt2.apply(params, tokens, cfg, key=keys, train=True), targets, reduction="none").mean(1)


@torch.no_grad()
def validate(params, cfg: gpt2.Config, tokens, limit: int | None = None) -> float:
    """Mean cross-entropy in nats a token, over the first `limit` batches of 32 windows or over all tokens."""
    total, count, device = 0.0, 0, params["tokens"]["weight"].device
    for inputs, targets in itertools.islice(text.windows(tokens, cfg.context, 32), limit):
        logits = gpt2.apply(params, inputs.to(device), cfg)
        total += float(cross_entropy(logits, targets.to(device), reduction="sum"))
        count += targets.numel()
    return total / count


def opening(tokenizer) -> list[int]:
    """What an empty prompt begins with: a line end, or any token where the vocabulary has none."""
    try:
        return tokenizer.encode("\n") or [0]
    except ValueError:
        return [0]


@torch.no_grad()
def write(params, cfg: gpt2.Config, tokenizer, prompt: str, tokens: int, show=None, **options) -> str:
    """The prompt and what the model writes after it; `show` gets each piece as it comes."""
    ids = tokenizer.encode(prompt) if prompt else opening(tokenizer)
    start = torch.tensor([ids], device=params["tokens"]["weight"].device)
    shown = 0
    for token in gpt2.stream(params, start, cfg, tokens, **options):
        ids.append(int(token[0]))
        written = tokenizer.decode(ids)
        if show and not written.endswith("\ufffd"):  # the first bytes of a character are not shown before the last
            show(written[shown:])
            shown = len(written)
    return tokenizer.decode(ids)


def settings(args: Args) -> tuple[gpt2.Config, Recipe]:
    """The preset's sizes and recipe with the flags applied."""
    cfg, recipe = gpt2.PRESETS[args.preset], RECIPES[args.preset]
    said = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in said.items() if value is not None})
    counts = {name: getattr(recipe, name) for name in ("steps", "batch", "micro_batches")}
    command_line.at_least_one(**counts, eval_every=args.eval_every, save_every=args.save_every)
    command_line.positive(learning_rate=recipe.learning_rate)
    if recipe.batch % recipe.micro_batches:
        raise ValueError(f"--batch {recipe.batch} does not divide into --micro-batches {recipe.micro_batches}")
    return cfg if args.dropout is None else dataclasses.replace(cfg, dropout=args.dropout), recipe


def train(args: Args) -> None:
    origin, args = runs.begin(RUNS, args, free=("steps", "eval_every", "save_every", "device", "compile"))
    tokenizer = tokenizers.load(origin.folder / "tokenizer.json") if origin.folder else None
    command_line.choice("--preset", args.preset, gpt2.PRESETS)
    policy = DTYPES[command_line.choice("--dtype", args.dtype, DTYPES)]
    device = command_line.device(args.device)
    cfg, recipe = settings(args)
    params = None
    if args.weights:
        params, cfg = gpt2.from_pretrained(args.weights)
        cfg = cfg if args.dropout is None else dataclasses.replace(cfg, dropout=args.dropout)
    if tokenizer is None and args.tokenizer != "characters":
        tokenizer = tokenizers.load(args.tokenizer)
    elif tokenizer is None and args.weights:
        tokenizer = published_tokenizer(args.weights)
    if args.weights:
        check_vocabulary(tokenizer, cfg)
    tokens, tokenizer = token_files.tokens_of(args.text, tokenizer, cache=RUNS / "tokens")
    if args.weights is None:
        cfg = dataclasses.replace(cfg, vocabulary=tokenizer.vocabulary_size)
    train_tokens, validation_tokens = text.split(tokens)
    if len(validation_tokens) <= cfg.context:
        found, needed = f"'{args.text or 'the embedded text'}' has {len(tokens)} tokens", 10 * cfg.context
        raise ValueError(f"{found}; a context of {cfg.context} needs over {needed}")

    warmup = min(recipe.warmup, recipe.steps // 10)
    rate = schedules.warmup_cosine(recipe.learning_rate, warmup, recipe.steps, final=0.1)
    adamw = optimizers.adamw(
        rate, 0.9, recipe.beta2, weight_decay=recipe.weight_decay, mask=lambda name, leaf: leaf.ndim >= 2
    )
    optimizer = optimizers.chain(optimizers.clip_by_global_norm(1.0), adamw)
    model, key = gpt2.spec(cfg), random.key(args.seed, device)
    parameters = tree.count(model)
    if params:
        state = start(random.fold_in(key, 1), tree.move(params, device), model, optimizer)
    else:
        state = create(key, model, optimizer)
    identity = {"net": cfg, "tokens": len(tokens)}
    state = runs.restore(origin, state, identity, recipe.steps)
    step = make_step(
        functools.partial(losses if args.watch_gradients else loss, cfg=cfg),
        optimizer,
        policy=policy,
        watch=watching.watch if args.watch_gradients else None,
        micro_batches=recipe.micro_batches,
        donate=True,
        compile=args.compile,
    )

    config = {"args": args, **identity, "recipe": recipe, "torch": torch.__version__}
    files = {"tokenizer.json": tokenizer.save}
    with runs.opened(origin, config, total=recipe.steps, unit="tokens", best="val_loss", files=files) as run:
        run.log.print(f"{parameters:,} parameters, {len(train_tokens):,} tokens to learn from; run in {run.folder}")
        if args.compile and run.first < recipe.steps:
            run.log.print("compiling the train step ...")
        data_key = random.fold_in(key, 2)  # numbers 0 and 1 are those of `create`
        watched = watching.begin(run.folder)
        at, steps, clock = run.first, range(run.first, recipe.steps), time.perf_counter()
        batches = text.token_batches(train_tokens, data_key, steps, recipe.batch, cfg.context)
        for at, batch in enumerate(batches, run.first + 1):
            state, metrics = step(state, tree.move(batch, device))
            if args.watch_gradients:
                watched, metrics = watching.record(run.log, at, metrics, watched)
            runs.check_finite(run, at, metrics)  # an infinite update would spoil the next one
            if at == run.first + 1:
                run.log.print(f"first step done after {time.perf_counter() - clock:.1f} s")
            last = at == recipe.steps or run.stop.requested
            validated = {}
            if at % args.eval_every == 0 and not last:
                validated["val_loss"] = validate(state.params, cfg, validation_tokens, limit=10)
                run.log.metrics(at, {"validation/loss": validated["val_loss"]})
            run.log.progress(at, recipe.batch * cfg.context, loss=metrics["loss"])
            if at % 10 == 0 or last:
                run.log.metrics(at, {f"train/{name}": value for name, value in metrics.items()})
            if at % args.save_every == 0 or last:
                runs.save(run, at, state, **validated)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        val_loss = validate(state.params, cfg, validation_tokens)
        run.log.metrics(at, {"validation/loss": val_loss})
        lines = read_curves(run.folder, "train/loss", "validation/loss")
        result = {
            "val_loss": val_loss,
            "train_loss": lines["train/loss"][1][-1],
            "steps": at,
            "seconds": seconds,
            "parameters": parameters,
            "tokens_per_second": at * recipe.batch * cfg.context / seconds,
        }
        run.log.result(result)
    watching.draw(run.folder)
    plots.curves(run.folder / "loss.png", lines, ylabel="nats per token", title="Cross-entropy")
    written = write(state.params, cfg, tokenizer, "", 400, key=random.fold_in(key, 3), temperature=0.8)
    (run.folder / "sample.txt").write_text(written, encoding="utf-8")
    figure = f"validation loss {val_loss:.4f} after {at} steps in {seconds:.0f} s"
    print(f"{written.strip()}\n\n{figure}; files in {run.folder}/")


def sample(args: SampleArgs) -> None:
    if (args.run is None) == (args.weights is None):
        raise ValueError("expected either --run DIR or --weights SOURCE")
    if args.tokens < 1:
        raise ValueError(f"--tokens is {args.tokens}; expected at least 1")
    device = command_line.device(args.device)
    if args.run:
        cfg = runs.read_config(args.run, "net", gpt2.Config)
        tokenizer = tokenizers.load(args.run / "tokenizer.json")
        params = checkpoints.restore(args.run / "checkpoints", gpt2.spec(cfg), part="params")
    else:
        params, cfg = gpt2.from_pretrained(args.weights)
        tokenizer = published_tokenizer(args.weights)
    check_vocabulary(tokenizer, cfg)
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    key = random.key(args.seed, device)
    write(tree.move(params, device), cfg, tokenizer, args.prompt, args.tokens, show, key=key, **options)
    print()


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), sample=(SampleArgs, sample))
