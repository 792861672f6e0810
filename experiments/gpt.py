"""GPT or Llama on characters or byte pairs: train it, then let it write.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Without a flag it trains a small
character-level GPT on the language reference that every Python installation carries:

    python experiments/gpt.py                                                  about 2 minutes on 2 CPU cores
    python experiments/gpt.py --preset nanogpt-cpu --text shakespeare          nanoGPT's CPU setting (tiny Shakespeare)
    python experiments/gpt.py --preset llama-tiny                              a Llama of the same size
    python experiments/gpt.py --weights openai-community/gpt2 --text my.txt    fine-tune published weights
    python experiments/gpt.py sample --run runs/gpt/NAME --prompt "The "       write on from a prompt
    python experiments/gpt.py sample --weights openai-community/gpt2 --prompt "The "     the same with published weights
    python experiments/gpt.py evaluate --run runs/gpt/NAME --text other.txt    loss and perplexity of any text
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from core import random, spec, tree
from core.layers.split import Split, vocabulary_cross_entropy
from experiments.parts import language_model, writer
from experiments.parts.language_model import Writer
from experiments.parts.writer import Sampling
from nets.language import gpt2, llama
from train import optimizers, plots
from train.data.fingerprint import fingerprint
from train.data.text import text, tokenizers
from train.data.understood import understood
from train.gradients import watch
from train.losses import cross_entropy
from train.optimizers import schedules
from train.run import Run, begin, command_line, open_run
from train.run.flags import Common, Count, FromRun, Natural, NonNegative, Positive, Rate, Shared, check_source
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS
from train.step import make_step, start

RUNS = Path("runs/gpt")
Config = gpt2.Config | llama.Config


@dataclass(frozen=True)
class Args:
    preset: Literal[tuple(language_model.PRESETS)] = "tiny"
    """Sizes of the net, and the defaults of what follows (this help shows those of the preset on its command line)."""
    text: Path | None = None
    """UTF-8 text to learn from: a file (.gz too), a folder of them, or shakespeare or wikitext-2 (downloaded
    once). None: the language reference inside Python."""
    blocks: Count = 10
    """Stretches of the text, the last tenth of each held out for validation; 1 holds out the end, as nanoGPT does."""
    tokenizer: str = "characters"
    """"characters", or a file or folder with a byte-pair tokenizer (tokenizer.json, or vocab.json and merges.txt)."""
    weights: str | None = None
    """Start from published weights of a GPT or Llama (folder or Hugging Face repository), with their tokenizer and
    sizes."""
    steps: Count = 1500
    """Training steps; the learning rate falls to a tenth of its peak over all of them."""
    batch: Count = 16
    """Examples per step."""
    micro_batches: Count = 1
    """Parts that a batch is cut into to save memory (gradient accumulation)."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    warmup: Natural = 100
    """Steps in which the learning rate rises, up to a tenth of all steps."""
    beta2: Rate = 0.99
    """AdamW's decay of the second moment."""
    weight_decay: NonNegative = 0.1
    """Weight decay of matrices."""
    dropout: Rate = 0.0
    """Dropout rate."""
    watch_gradients: bool = False
    """Log the gradient noise scale and the gradient norm of each example; both are drawn at the end."""
    eval_every: Count = 250
    """Steps between evaluations on the validation text."""
    common: Shared = Common()


LARGE = {"steps": 600_000, "batch": 480, "learning_rate": 6e-4, "warmup": 2000, "beta2": 0.95, "micro_batches": 40}
PRESETS = {
    "nanogpt-cpu": Args("nanogpt-cpu", steps=2000, batch=12),
    "nanogpt-gpu": Args("nanogpt-gpu", steps=5000, batch=64, learning_rate=1e-3, dropout=0.2, beta2=0.95),
    **{name: Args(name, **LARGE, dropout=0.1) for name in ("gpt", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    **{name: Args(name, **LARGE) for name in llama.PRESETS if name != "tiny"},
}
FINETUNE = Args(steps=200, batch=8, learning_rate=3e-5, warmup=20, beta2=0.95, dropout=0.1)


def presets(words: dict[str, str]) -> Args | None:
    return FINETUNE if "weights" in words else PRESETS.get(words.get("preset", ""))


@dataclass(frozen=True)
class SampleArgs(Sampling):
    run: Path | None = None
    """Folder of a run, such as runs/gpt/NAME."""
    checkpoint: str = "latest"
    """Which checkpoint of the run: latest, best (the lowest validation loss) or a step."""
    weights: str | None = None
    """Published weights instead: a folder (model.safetensors, config.json, the tokenizer) or a repository."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


@dataclass(frozen=True)
class EvaluateArgs(FromRun):
    text: Path | None = None
    """Text to evaluate, all of it, such as wikitext-2-test; the validation part of the run's own text if None."""


def losses(params, batch, keys, cfg: Config):
    """(examples,): the mean cross-entropy of each example's tokens, in nats."""
    tokens, targets = batch
    net, head = language_model.net_of(cfg), params.get("output", params["tokens"])["weight"]
    if isinstance(head, Split):
        return vocabulary_cross_entropy(head, net.features(params, tokens, cfg, key=keys, train=True), targets).mean(1)
    logits = net.apply(params, tokens, cfg, key=keys, train=True)  # (examples, time, vocabulary)
    return cross_entropy(logits, targets, reduction="none").mean(1)


@torch.no_grad()
def validate(params, cfg: Config, tokens, limit: int | None = None) -> float:
    """Mean cross-entropy in nats per token, over all windows or `limit` batches of 32 of them from all of the text."""
    total, count, device = 0.0, 0, params["tokens"]["weight"].device
    every = max(1, len(tokens) // (32 * cfg.context * limit)) if limit else 1
    for inputs, targets in itertools.islice(text.windows(tokens, cfg.context, 32), 0, None, every):
        logits = language_model.net_of(cfg).apply(params, inputs.to(device), cfg)
        total += float(cross_entropy(logits, targets.to(device), reduction="sum"))
        count += targets.numel()
    return total / count


def model_and_data(args: Args, folder: Path | None) -> tuple[Config, text.Text, tree.Tree | None]:
    """(net, text, published weights or None) of the flags; a resumed run keeps its tokenizer."""
    cfg, params, tokenizer = language_model.PRESETS[args.preset], None, None
    if args.weights:
        params, cfg = language_model.from_pretrained(args.weights)
        tokenizer = language_model.published_tokenizer(args.weights)
    if args.tokenizer != "characters":
        tokenizer = tokenizers.load(args.tokenizer)
    if folder:
        tokenizer = tokenizers.load(folder / "tokenizer.json")
    if args.weights:
        language_model.check_vocabulary(tokenizer, cfg)
    data = text.open_text(args.text, tokenizer, cache=RUNS / "tokens")
    if not args.weights:
        cfg = dataclasses.replace(cfg, vocabulary=data.tokenizer.vocabulary_size)
    return dataclasses.replace(cfg, dropout=args.dropout), data, params


def optimizer_of(args: Args) -> optimizers.Optimizer:
    warmup = min(args.warmup, args.steps // 10)
    rate = schedules.warmup_cosine(args.learning_rate, warmup, args.steps, final=0.1)
    matrices = {"weight_decay": args.weight_decay, "mask": lambda name, leaf: leaf.ndim >= 2}
    return optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.adamw(rate, 0.9, args.beta2, **matrices))


def train(args: Args) -> None:
    free = ("text", "steps", "batch", "micro_batches", "learning_rate", "warmup", "weight_decay", "eval_every")
    run = begin(RUNS, args, free=free, shards=(*BY_ROWS, "tensor"))
    cfg, data, published = model_and_data(args, run.resumed_from)
    train_tokens, validation_tokens = parts = text.split(data.tokens, blocks=args.blocks, least=4 * cfg.context)
    understood(print, text.facts(data, *parts) | {"weights": args.weights, "net": cfg})
    if min(map(len, parts)) <= cfg.context:
        size = f"'{data.name}' has {len(data.tokens):,} tokens"
        raise ValueError(f"{size}; a context of {cfg.context} needs over {10 * cfg.context:,}")

    init_key, run_key, data_key, sample_key = random.split(random.key(args.common.seed), 4).unbind(0)
    model, optimizer = language_model.net_of(cfg).spec(cfg), optimizer_of(args)
    params = tree.move(published, run.device) if published else spec.init(init_key.to(run.device), model)
    state = start(run_key.to(run.device), params, model, optimizer)
    state = run.restore(state, {"net": cfg, "data": fingerprint(data.tokens)}, args.steps, model)
    objective = functools.partial(losses, cfg=cfg)
    options = {"policy": run.policy, "micro_batches": args.micro_batches, "compile": args.common.compile}
    watched = {"watch": watch.watch} if args.watch_gradients else {}
    step = make_step(objective, optimizer, donate=True, distributed=run.distributed, **options, **watched)

    with run.open({}, unit="tokens", best="val_loss", files={"tokenizer.json": data.tokenizer.save}):
        run.log.print(f"{tree.count(model):,} parameters; run in {run.folder}")
        average, per_step = watch.begin(run.folder), args.batch * cfg.context
        batches = text.token_batches(train_tokens, data_key, run.remaining, args.batch, cfg.context)
        for at, batch in run.steps(batches):
            state, metrics = step(state, tree.move(batch, run.device))
            if args.watch_gradients:
                average, metrics = watch.record(run.log, at, metrics, average)
            run.record(at, metrics, per_step)
            validation = {}
            if run.due(at, args.eval_every):
                validation["val_loss"] = validate(run.whole(state.params), cfg, validation_tokens, limit=10)
                run.log.metrics(at, {"validation/loss": validation["val_loss"]})
            if run.due(at, args.common.save_every):
                run.save(at, state, **validation)
        report(
            run,
            run.whole(state.params),
            cfg,
            data.tokenizer,
            text.unigram_entropy(*parts),
            validation_tokens,
            sample_key,
        )


def report(run: Run, params, cfg: Config, tokenizer, baseline: float, validation_tokens, key) -> None:
    """The final figures, the curves, and a text by the model."""
    tokens = run.at * run.args.batch * cfg.context
    speed = {"parameters": tree.count(params), "tokens_per_second": tokens / run.seconds}
    val_loss = validate(params, cfg, validation_tokens)
    lines = read_curves(run.folder, "train/loss", "validation/loss")
    figures = {"val_loss": val_loss, "train_loss": lines["train/loss"][1][-1], "unigram_entropy": baseline}
    run.result({**figures, **speed})
    watch.draw(run.folder)
    plots.curves(run.folder / "loss.png", lines, ylabel="nats per token", title="Cross-entropy")
    sample = writer.one_text(Writer(language_model.net_of(cfg), params, cfg, tokenizer), 400, key)
    (run.folder / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"{sample.strip()}\n\nvalidation loss {val_loss:.4f} nats per token", end=" ")
    print(f"(unigram entropy: {baseline:.4f}) after {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def sample(args: SampleArgs) -> None:
    """Continue a prompt with a run's net or with published weights."""
    check_source(args)
    device = command_line.device(args.device)
    if args.run:
        run = open_run(args.run, RUNS, args.checkpoint)
        (net, cfg), tokenizer = language_model.net_of_run(run), tokenizers.load(args.run / "tokenizer.json")
        language_model.check_vocabulary(tokenizer, cfg)
        model = Writer(net, run.restore(net.spec(cfg), "params"), cfg, tokenizer)
    else:
        model = language_model.of_weights(args.weights)
    writer.print_texts(model._replace(params=tree.move(model.params, device)), args)


def evaluate(args: EvaluateArgs) -> None:
    """Loss and perplexity of a run's net on the validation part of its text, or on another text."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    trained, (net, cfg) = run.read("args", Args), language_model.net_of_run(run)
    params = tree.move(run.restore(net.spec(cfg), "params"), device)
    data = text.open_text(args.text or trained.text, tokenizers.load(args.run / "tokenizer.json"), RUNS / "tokens")
    understood(print, text.facts(data))
    parts = [data.tokens] * 2 if args.text else text.split(data.tokens, blocks=trained.blocks, least=4 * cfg.context)
    loss, baseline = validate(params, cfg, parts[1]), text.unigram_entropy(*parts)
    figures = f"loss {loss:.4f} nats per token (unigram entropy: {baseline:.4f}), perplexity {math.exp(loss):.4g}"
    print(f"{figures}, on {len(parts[1]):,} tokens; checkpoint of step {run.step}")


if __name__ == "__main__":
    command_line.run(
        __doc__, (Args, train, presets), root=RUNS, sample=(SampleArgs, sample), evaluate=(EvaluateArgs, evaluate)
    )
