"""Recurrent nets on characters or words: train one, look at what its cells do, let it write.

Karpathy 2015, "The unreasonable effectiveness of recurrent neural networks"; Karpathy et al. 2015, "Visualizing and
understanding recurrent networks" (arXiv:1506.02078). Without a flag an LSTM learns the language reference that every
Python installation carries, by truncated back-propagation through time:

    python experiments/char_rnn.py                                              about 2 minutes on 2 CPU cores
    python experiments/char_rnn.py --net gru --text shakespeare                 rnn, gru, layer-norm-lstm; your own text
    python experiments/char_rnn.py --tokenizer words --text wikitext-2 --layers 2 --dropout 0.5 --tied
    python experiments/char_rnn.py sample --run runs/char_rnn/NAME --prompt "The "
    python experiments/char_rnn.py evaluate --run runs/char_rnn/NAME --text other.txt
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from core import random, spec, tree
from experiments.parts import cells, writer
from experiments.parts.language_model import Writer
from experiments.parts.writer import Sampling
from nets.language import rnn
from train import optimizers, plots
from train.carry import reset
from train.data.fingerprint import fingerprint
from train.data.text import text, tokenizers
from train.data.understood import understood
from train.optimizers import schedules
from train.run import Run, begin, command_line, open_run
from train.run.flags import Common, Count, FromRun, Natural, Positive, Rate, Shared
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS
from train.step import make_step, start

RUNS = Path("runs/char_rnn")
EVALUATED = 32
"""Windows, or lanes, that are evaluated at once."""


@dataclass(frozen=True)
class Args:
    net: Literal["rnn", "lstm", "gru", "layer-norm-lstm"] = "lstm"
    """Kind of the recurrent layers."""
    text: Path | None = None
    """UTF-8 text to learn from: a file (.gz too), a folder of them, or shakespeare or wikitext-2 (downloaded
    once). None: the language reference inside Python."""
    blocks: Count = 10
    """Stretches of the text, the last tenth of each held out for validation; 1 holds out the end."""
    tokenizer: str = "characters"
    """"characters", "words" (with other defaults below), or a file or folder with a tokenizer (tokenizer.json, or
    vocab.json and merges.txt)."""
    vocabulary: Count = 10_000
    """With --tokenizer words: number of the most frequent words, all others being <unk>."""
    width: Count = 256
    """Hidden units of a layer, and size of a token's vector."""
    layers: Count = 1
    """Recurrent layers."""
    dropout: Rate = 0.0
    """Dropout rate of the tokens' vectors and of each layer's output."""
    variational: bool = False
    """One dropout mask for all steps of a window, not one per step."""
    tied: bool = False
    """The matrix of the logits is that of the tokens' vectors."""
    cutoffs: tuple[Count, ...] = ()
    """Adaptive softmax for --tokenizer words, whose tokens are in order of frequency: the first token of each cluster
    of rarer ones, such as 2000 10000."""
    steps: Count = 1000
    """Training steps; the learning rate falls to nearly 0 over all of them."""
    batch: Count = 32
    """Lanes of the text that are read side by side."""
    window: Count = 64
    """Tokens of each lane per step; the state goes on to the next step, the gradient does not."""
    fresh: Rate = 0.1
    """Probability that a lane begins a window with an empty state."""
    learning_rate: Positive = 6e-3
    """Peak learning rate."""
    warmup: Natural = 50
    """Steps in which the learning rate rises, up to a tenth of all steps."""
    beta2: Rate = 0.99
    """Adam's decay of the second moment."""
    clip: Positive = 1.0
    """Largest norm of the gradient."""
    eval_every: Count = 250
    """Steps between evaluations on the validation text."""
    common: Shared = Common()


WORDS = Args(tokenizer="words", dropout=0.3, window=35, learning_rate=2e-3)


def presets(words: dict[str, str]) -> Args | None:
    return WORDS if words.get("tokenizer") == "words" else None


@dataclass(frozen=True)
class SampleArgs(Sampling, FromRun):
    """Flags of `sample`."""


@dataclass(frozen=True)
class EvaluateArgs(FromRun):
    text: Path | None = None
    """Text to evaluate, all of it, such as wikitext-2-test; the validation part of the run's own text if None."""


def losses(params, inputs, keys, cfg: rnn.Config, fresh: float):
    """(examples,): the mean cross-entropy of each lane's tokens, in nats; and the states after them."""
    (tokens, targets, begins), carry = inputs
    reset_keys, keys = random.split(keys).unbind(-2)  # each (lanes, 2)
    begins = begins | random.bernoulli(reset_keys, fresh)
    h, carry = rnn.features(params, tokens, cfg, state=reset(carry, begins), key=keys, train=True)
    return rnn.cross_entropy(params, h, targets).mean(1), {}, carry


@torch.no_grad()
def validate(params, cfg: rnn.Config, tokens, window: int, limit: int | None = None) -> float:
    """Mean cross-entropy in nats per token, each window read from an empty state, as a GPT reads it.

    limit: evaluate this many batches of windows from all of the text, not all.
    """
    total, count, device = 0.0, 0, tree.leaves(params)[0].device
    every = max(1, len(tokens) // (EVALUATED * window * limit)) if limit else 1
    for inputs, targets in itertools.islice(text.windows(tokens, window, EVALUATED), 0, None, every):
        h, _ = rnn.features(params, inputs.to(device), cfg)
        total += float(rnn.cross_entropy(params, h, targets.to(device)).sum())
        count += targets.numel()
    return total / count


@torch.no_grad()
def validate_carried(params, cfg: rnn.Config, tokens, window: int) -> float:
    """The same of the text read in lanes, whose states go on from window to window."""
    total, count, state, device = 0.0, 0, None, tree.leaves(params)[0].device
    lanes = max(1, min(EVALUATED, len(tokens) // (8 * window)))
    for i in range(text.lane_steps(tokens, lanes, window)):
        inputs, targets, _ = tree.move(text.lane_batch(tokens, i, lanes, window), device)
        h, state = rnn.features(params, inputs, cfg, state=state)
        total += float(rnn.cross_entropy(params, h, targets).sum())
        count += targets.numel()
    return total / count


def model_and_data(args: Args, folder: Path | None) -> tuple[rnn.Config, text.Text]:
    """(net, text) of the flags; a resumed run keeps its tokenizer."""
    tokenizer = None
    if folder:
        tokenizer = tokenizers.load(folder / "tokenizer.json")
    elif args.tokenizer == "words":
        tokenizer = functools.partial(tokenizers.train_sentences, vocabulary_size=args.vocabulary, words=True)
    elif args.tokenizer != "characters":
        tokenizer = tokenizers.load(args.tokenizer)
    data = text.open_text(args.text, tokenizer, cache=RUNS / "tokens", lossy=args.tokenizer == "words")
    kind, vocabulary = args.net.replace("-", "_"), data.tokenizer.vocabulary_size
    options = {name: getattr(args, name) for name in ("dropout", "variational", "tied", "cutoffs")}
    return rnn.Config(vocabulary, args.width, args.width, args.layers, kind, **options), data


def train(args: Args) -> None:
    free = ("text", "steps", "learning_rate", "warmup", "clip", "eval_every")
    run = begin(RUNS, args, free=free, shards=BY_ROWS)
    cfg, data = model_and_data(args, run.resumed_from)
    train_tokens, validation_tokens = parts = text.split(data.tokens, blocks=args.blocks, least=4 * args.window)
    understood(print, text.facts(data, *parts) | {"net": cfg})
    pass_steps = text.lane_steps(train_tokens, args.batch, args.window)
    text.lane_steps(validation_tokens, 1, args.window)

    init_key, run_key, sample_key = random.split(random.key(args.common.seed), 3).unbind(0)
    model = rnn.spec(cfg)
    rate = schedules.warmup_cosine(args.learning_rate, min(args.warmup, args.steps // 10), args.steps, final=0.01)
    optimizer = optimizers.chain(optimizers.clip_by_global_norm(args.clip), optimizers.adam(rate, 0.9, args.beta2))
    state = start(run_key.to(run.device), spec.init(init_key.to(run.device), model), model, optimizer)
    state = {"carry": rnn.empty_state(cfg, args.batch, device=run.device), "state": state}
    state = run.restore(state, {"net": cfg, "data": fingerprint(data.tokens)}, args.steps, model)
    state, carry = state["state"], state["carry"]
    objective = functools.partial(losses, cfg=cfg, fresh=args.fresh)
    options = {"policy": run.policy, "distributed": run.distributed, "compile": args.common.compile}
    step = make_step(objective, optimizer, carry=True, donate=True, **options)

    with run.open({}, unit="tokens", best="val_loss", files={"tokenizer.json": data.tokenizer.save}):
        run.log.print(f"{tree.count(model):,} parameters, {pass_steps} steps per pass; run in {run.folder}")
        batches = (text.lane_batch(train_tokens, t, args.batch, args.window) for t in run.remaining)
        for at, batch in run.steps(batches):
            state, metrics, carry = step(state, (tree.move(batch, run.device), carry))
            run.record(at, metrics, args.batch * args.window)
            validation = {}
            if run.due(at, args.eval_every):
                validation["val_loss"] = validate(
                    run.whole(state.params), cfg, validation_tokens, args.window, limit=10
                )
                run.log.metrics(at, {"validation/loss": validation["val_loss"]})
            if run.due(at, args.common.save_every):
                run.save(at, {"carry": carry, "state": state}, **validation)
        report(run, run.whole(state.params), cfg, data.tokenizer, parts, sample_key)


def report(run: Run, params, cfg: rnn.Config, tokenizer, parts: tuple, key) -> None:
    """The final figures, the curves, what cells do, and a text by the model."""
    window = run.args.window
    speed = {"tokens_per_second": run.at * run.args.batch * window / run.seconds}
    val_loss, carried = (f(params, cfg, parts[1], window) for f in (validate, validate_carried))
    lines, baseline = read_curves(run.folder, "train/loss", "validation/loss"), text.unigram_entropy(*parts)
    figures = {"val_loss": val_loss, "carried_val_loss": carried, "train_loss": lines["train/loss"][1][-1]}
    run.result({**figures, "unigram_entropy": baseline, "parameters": tree.count(params), **speed})
    plots.curves(run.folder / "loss.png", lines, ylabel="nats per token", title="Cross-entropy")
    for line in cells.draw(run.folder, params, cfg, tokenizer, parts[1]):
        print(line)
    sample = writer.one_text(Writer(rnn, params, cfg, tokenizer), 400, key)
    (run.folder / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"{sample.strip()}\n\nvalidation loss {val_loss:.4f} nats per token, {carried:.4f} with the state carried")
    print(f"(unigram entropy: {baseline:.4f}) after {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def trained(args: FromRun):
    """(run, net, parameters, tokenizer) of a sub-command."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    cfg = run.read("net", rnn.Config)
    params = tree.move(run.restore(rnn.spec(cfg), "state.params"), device)
    return run, cfg, params, tokenizers.load(args.run / "tokenizer.json")


def sample(args: SampleArgs) -> None:
    """Continue a prompt with a run's net."""
    _, cfg, params, tokenizer = trained(args)
    writer.print_texts(Writer(rnn, params, cfg, tokenizer), args)


def evaluate(args: EvaluateArgs) -> None:
    """Loss and perplexity of a run's net on the validation part of its text, or on another text."""
    run, cfg, params, tokenizer = trained(args)
    of_run = run.read("args", Args)
    data = text.open_text(args.text or of_run.text, tokenizer, RUNS / "tokens", lossy=of_run.tokenizer == "words")
    understood(print, text.facts(data))
    parts = [data.tokens] * 2
    if not args.text:
        parts = text.split(data.tokens, blocks=of_run.blocks, least=4 * of_run.window)
    loss, carried = (f(params, cfg, parts[1], of_run.window) for f in (validate, validate_carried))
    baseline = text.unigram_entropy(*parts)
    print(
        f"loss {loss:.4f} nats per token (unigram entropy: {baseline:.4f}), perplexity {math.exp(loss):.4g};", end=" "
    )
    print(f"with the state carried {carried:.4f} and {math.exp(carried):.4g}, on {len(parts[1]):,} tokens;", end=" ")
    print(f"checkpoint of step {run.step}")


if __name__ == "__main__":
    command_line.run(
        __doc__, (Args, train, presets), root=RUNS, sample=(SampleArgs, sample), evaluate=(EvaluateArgs, evaluate)
    )
