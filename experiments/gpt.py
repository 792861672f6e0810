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
import math
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core import random, tree
from nets import gpt2, pretrained
from train import checkpoints, command_line, optimizers, plots, schedules
from train.data import text, token_files, tokenizers
from train.files import plain
from train.logs import RunLog, read_metrics
from train.losses import cross_entropy
from train.step import Policy, create, make_step, start

RUNS = Path("runs/gpt")


@dataclass(frozen=True)
class Recipe:
    """How a preset of `nets.gpt2` is trained: AdamW, linear warm-up, cosine to a tenth of the peak."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    beta2: float = 0.95
    weight_decay: float = 0.1
    micro_batches: int = 1


RECIPES = {
    "tiny": Recipe(steps=3000, batch=16, learning_rate=3e-3, warmup=100, beta2=0.99),
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
    """A UTF-8 file to learn from; without it, the language reference inside Python. The last tenth is for validation."""
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


def read_tokens(args: Args, tokenizer: Any | None) -> tuple[Any, Any]:
    """(tokens, tokenizer); a run that is resumed brings its tokenizer, a large text is kept tokenized on disk."""
    content = text.read_text(args.text, minimum=100) if args.text else text.embedded_text()
    if tokenizer is None and args.weights:
        tokenizer = published_tokenizer(args.weights)
    elif tokenizer is None:
        by_characters = args.tokenizer == "characters"
        tokenizer = tokenizers.CharTokenizer.from_text(content) if by_characters else tokenizers.load(args.tokenizer)
    if args.text is None or isinstance(tokenizer, tokenizers.CharTokenizer):
        return torch.tensor(tokenizer.encode(content), dtype=torch.int64), tokenizer
    cached = RUNS / "tokens" / f"{args.text.stem}-{zlib.crc32(content.encode()):08x}-{tokenizer.fingerprint[:8]}"
    if cached.exists():
        return token_files.open_tokens(cached, tokenizer), tokenizer
    cached.parent.mkdir(parents=True, exist_ok=True)
    return token_files.tokenize_to_file(args.text, tokenizer, cached), tokenizer


def published_tokenizer(source: str) -> Any:
    path = pretrained.locate(source, ("tokenizer.json", "vocab.json"))
    return tokenizers.load(path if path.name == "tokenizer.json" else path.parent)


def loss(params, batch, keys, cfg: gpt2.Config):
    tokens, targets = batch
    return cross_entropy(gpt2.apply(params, tokens, cfg, key=keys, train=True), targets)


@torch.no_grad()
def validate(params, cfg: gpt2.Config, tokens, limit: int | None = None) -> float:
    """Mean cross-entropy in nats a token, over the first `limit` batches of 32 windows or over all tokens."""
    total, count, device = 0.0, 0, params["tokens"]["weight"].device
    for inputs, targets in itertools.islice(text.windows(tokens, cfg.context, 32), limit):
        logits = gpt2.apply(params, inputs.to(device), cfg)
        total += float(cross_entropy(logits, targets.to(device), reduction="sum"))
        count += targets.numel()
    return total / count


@torch.no_grad()
def write(params, cfg: gpt2.Config, tokenizer, prompt: str, tokens: int, show=None, **options) -> str:
    """The prompt and what the model writes after it; `show` gets each piece as it comes."""
    ids = tokenizer.encode(prompt) or tokenizer.encode("\n")
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
    for name in ("steps", "batch", "micro_batches"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(recipe, name)}; expected at least 1")
    if recipe.batch % recipe.micro_batches:
        raise ValueError(f"--batch {recipe.batch} does not divide into --micro-batches {recipe.micro_batches}")
    return cfg if args.dropout is None else dataclasses.replace(cfg, dropout=args.dropout), recipe


def train(args: Args) -> None:
    started = time.perf_counter()
    folder, record, tokenizer = None, None, None
    if args.resume:
        folder, args = command_line.resume(RUNS, args, free=("steps", "eval_every", "save_every", "device", "compile"))
        tokenizer = tokenizers.load(folder / "tokenizer.json")
        record = checkpoints.read_record(folder / "checkpoints")
    command_line.choice("--preset", args.preset, gpt2.PRESETS)
    policy = DTYPES[command_line.choice("--dtype", args.dtype, DTYPES)]
    device = command_line.device(args.device)
    cfg, recipe = settings(args)
    params = None
    if args.weights:
        params, cfg = gpt2.from_pretrained(args.weights)
    tokens, tokenizer = read_tokens(args, tokenizer)
    if args.weights is None:
        cfg = dataclasses.replace(cfg, vocabulary=tokenizer.vocabulary_size)
    train_tokens, validation_tokens = text.split(tokens)
    if len(validation_tokens) <= cfg.context:
        raise ValueError(f"the text has {len(tokens)} tokens; a context of {cfg.context} needs over {10 * cfg.context}")
    config = {"args": args, "net": cfg, "recipe": recipe, "tokens": len(tokens), "torch": torch.__version__}
    if record and (record.config["tokens"], record.config["net"]) != (len(tokens), plain(cfg)):
        raise ValueError(f"cannot resume '{folder}': its text or its net has changed since it was started")

    warmup = min(recipe.warmup, recipe.steps // 10)
    rate = schedules.warmup_cosine(recipe.learning_rate, warmup, recipe.steps, final=0.1)
    adamw = optimizers.adamw(
        rate, 0.9, recipe.beta2, weight_decay=recipe.weight_decay, mask=lambda name, leaf: leaf.ndim >= 2
    )
    optimizer = optimizers.chain(optimizers.clip_by_global_norm(1.0), adamw)
    model, key = gpt2.spec(cfg), random.key(args.seed, device)
    state = start(key, tree.move(params, device), model, optimizer) if params else create(key, model, optimizer)
    first, seconds = 0, 0.0
    if record:
        state = checkpoints.restore(folder / "checkpoints", state, record.step)
        first, seconds = record.step, record.metrics["seconds"]
    if folder is None:
        folder = command_line.new_folder(RUNS, args.name)
        tokenizer.save(folder / "tokenizer.json")
    step = make_step(
        functools.partial(loss, cfg=cfg),
        optimizer,
        policy=policy,
        micro_batches=recipe.micro_batches,
        donate=True,
        compile=args.compile,
    )
    data_key = random.fold_in(key, 1)
    saved = checkpoints.Checkpoints(
        folder / "checkpoints", config, resume=first if record else None, best="val_loss"
    )
    log = RunLog(folder, config, total=recipe.steps, unit="tokens", resume=first if record else None)
    with command_line.Stop() as stop, log, saved:
        log.print(f"{tree.count(model):,} parameters, {len(train_tokens):,} tokens to learn from; run in {folder}")
        if args.compile and first < recipe.steps:
            log.print("compiling the train step ...")
        clock, at = time.perf_counter(), first
        batches = text.token_batches(train_tokens, data_key, range(first, recipe.steps), recipe.batch, cfg.context)
        for at, batch in enumerate(batches, first + 1):
            state, metrics = step(state, tree.move(batch, device))
            if not math.isfinite(float(metrics["loss"])):
                kept = checkpoints.latest(folder / "checkpoints")
                where = f"the last good checkpoint is that of step {kept}" if kept else "there is no checkpoint yet"
                raise ValueError(f"the loss of step {at} is {float(metrics['loss'])}; stopped, {where}")
            if at == first + 1:
                log.print(f"first step done {time.perf_counter() - started:.1f} s after the start")
            last = at == recipe.steps or stop.requested
            val_loss = None
            if at % args.eval_every == 0 and not last:
                val_loss = validate(state.params, cfg, validation_tokens, limit=10)
                log.metrics(at, {"validation/loss": val_loss})
            log.progress(at, recipe.batch * cfg.context, loss=metrics["loss"])
            if at % 10 == 0 or last:
                log.metrics(at, {f"train/{name}": value for name, value in metrics.items()})
            if at % args.save_every == 0 or last:
                spent = seconds + time.perf_counter() - clock
                saved.save(at, state, {"seconds": spent} | ({"val_loss": val_loss} if val_loss else {}))
            if last:
                break
        seconds += time.perf_counter() - clock
        if stop.requested:
            saved.wait()
            log.print(f"stopped at step {at}; continue with: python experiments/gpt.py --resume --name {folder.name}")
            return
        val_loss = validate(state.params, cfg, validation_tokens)
        log.metrics(at, {"validation/loss": val_loss})
        train_loss = [r["train/loss"] for r in read_metrics(folder) if "train/loss" in r][-10:]
        result = {
            "val_loss": val_loss,
            "train_loss": sum(train_loss) / len(train_loss),
            "steps": at,
            "seconds": seconds,
            "parameters": tree.count(model),
            "tokens_per_second": at * recipe.batch * cfg.context / seconds,
        }
        log.result(result)
    draw_curves(folder)
    sample = write(state.params, cfg, tokenizer, "\n", 400, key=random.fold_in(key, 2), temperature=0.8)
    (folder / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"{sample.strip()}\n\nvalidation loss {val_loss:.4f} after {at} steps in {seconds:.0f} s; files in {folder}/")


def draw_curves(folder: Path) -> None:
    records = read_metrics(folder)
    lines = {}
    for name in ("train/loss", "validation/loss"):
        points = [(r["step"], float(r[name])) for r in records if name in r]
        lines[name.replace("/", " ")] = tuple(zip(*points, strict=True))
    plots.curves(folder / "loss.png", lines, ylabel="nats per token", title="Cross-entropy")


def sample(args: SampleArgs) -> None:
    if (args.run is None) == (args.weights is None):
        raise ValueError("expected either --run DIR or --weights SOURCE")
    device = command_line.device(args.device)
    if args.run:
        cfg = gpt2.Config(**checkpoints.read_config(args.run / "checkpoints")["net"])
        tokenizer = tokenizers.load(args.run / "tokenizer.json")
        params = checkpoints.restore(args.run / "checkpoints", gpt2.spec(cfg), part="params")
    else:
        params, cfg = gpt2.from_pretrained(args.weights)
        tokenizer = published_tokenizer(args.weights)
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    key = random.key(args.seed, device)
    write(tree.move(params, device), cfg, tokenizer, args.prompt, args.tokens, show, key=key, **options)
    print()


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), sample=(SampleArgs, sample))
