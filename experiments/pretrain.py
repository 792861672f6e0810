"""Language models learn from plain text: masked tokens, causal, corrupted spans, or from a teacher.

Devlin et al. 2019 (BERT, arXiv:1810.04805); Raffel et al. 2020 (T5, arXiv:1910.10683); Sanh et al. 2019 (DistilBERT,
arXiv:1910.01108). Without a flag a BERT of 4 layers and 128 numbers per token learns to fill in masked tokens of the
docstrings of Python's standard library:

    python experiments/pretrain.py                                          under 3 minutes on 2 CPU cores
    python experiments/pretrain.py --objective span                         T5's corrupted spans; causal: GPT-2, Llama
    python experiments/pretrain.py --objective distil --teacher runs/pretrain/NAME        half the layers, three losses
    python experiments/pretrain.py --objective distil --teacher FOLDER --data FILE --lines     published weights, too
    python experiments/pretrain.py --weights google-bert/bert-base-uncased --data FILE.txt --lora 8          adapters
    python experiments/pretrain.py fill --run runs/pretrain/NAME "The [MASK] of the list is returned."
    python experiments/pretrain.py attention --weights FOLDER "The dog ran because it was late."     where heads look
    python experiments/pretrain.py evaluate --run runs/pretrain/NAME --data FILE.txt

The encoder of a run is `--weights runs/pretrain/NAME` of the scripts that fine-tune; a causal net writes with
generate.py.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from core import random, spec, tree
from experiments.parts import causal_and_spans, distillation, filling, language_model, pretraining, writer
from experiments.parts import encoder as encoders
from experiments.parts.encoder_attention import AttentionArgs, attention
from experiments.parts.pretraining import Objective
from nets.weights import read_config
from train import optimizers
from train.data.text.files import lines_of
from train.data.understood import understood
from train.files import write_json
from train.optimizers import schedules
from train.run import (
    Common,
    Count,
    FromRun,
    Natural,
    NonNegative,
    Positive,
    Rate,
    Shared,
    begin,
    command_line,
    open_run,
)
from train.run.flags import Fraction, check_source
from train.run.ranks import BY_ROWS
from train.run.run import unused
from train.step import make_step, start

RUNS = Path("runs/pretrain")
OBJECTIVES = {
    "masked": pretraining.masked,
    "causal": causal_and_spans.causal,
    "span": causal_and_spans.span,
    "distil": distillation.distil,
}


@dataclass(frozen=True)
class Args:
    objective: Literal[tuple(OBJECTIVES)] = "masked"
    """Task to learn. masked: tokens that are hidden (BERT). causal: each next token (GPT-2, Llama). span: spans that
    are hidden (T5). distil: the outputs of --teacher (DistilBERT)."""
    data: str = "docstrings"
    """Text to learn from: docstrings of Python's standard library, shakespeare or wikitext-2 (downloaded once), or a
    UTF-8 file (.gz too) or a folder of them."""
    lines: bool = False
    """An example is a line of the text, cut to --context tokens, and not a window of it; for masked and distil."""
    tokenizer: str | None = None
    """File or folder with a tokenizer.json; None learns one of the text: WordPiece, for span unigram pieces."""
    vocabulary: Count = 4000
    """Size of a vocabulary that is learned, at most."""
    cased: bool = False
    """Keep capitals and accents in a WordPiece vocabulary that is learned."""
    weights: str | None = None
    """Weights to go on from: a run of this script, or a folder or Hugging Face repository of the objective's kind of
    net."""
    lora: Natural = 0
    """Rank of LoRA's adapters, which are trained with the head alone; 0 trains all weights. For masked, with
    --weights."""
    alpha: Positive = 16.0
    """Scale of the adapters: alpha / rank."""
    teacher: str | None = None
    """Teacher of distil: a run of this script or of one that fine-tunes, or a folder or repository of an encoder."""
    net: Literal["gpt2", "llama"] = "gpt2"
    """Net of causal."""
    layers: Count | None = None
    """Layers from scratch, 4 if None, for span on either side; of a student, half of its teacher's if None."""
    width: Count = 128
    """Size of the hidden states from scratch, a multiple of 32."""
    context: Count = 48
    """Tokens of an example, with its special tokens; of span those of the input."""
    mask_rate: Fraction = 0.15
    """Share of the tokens that are predicted, of masked, span and distil."""
    span: Positive = 3.0
    """Mean length of the spans."""
    temperature: Positive = 2.0
    """Temperature of the teacher's and the student's probabilities."""
    soft_weight: NonNegative = 5.0
    """Weight of the divergence from the teacher's probabilities; of distil, as the following."""
    masked_weight: NonNegative = 2.0
    """Weight of the masked tokens."""
    hidden_weight: NonNegative = 1.0
    """Weight of 1 - cosine of the last hidden states."""
    embedding_weight: NonNegative = 1.0
    """Weight of 1 - cosine of the sentence embeddings, of a teacher that predicts no tokens."""
    dropout: Rate = 0.0
    """Dropout rate of hidden states and attention weights."""
    steps: Count = 2300
    """Training steps; the learning rate falls to 0 over all of them."""
    batch: Count = 20
    """Examples per step."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    warmup: Natural = 100
    """Steps in which the learning rate rises, up to a tenth of all steps."""
    weight_decay: NonNegative = 0.01
    """Weight decay of matrices."""
    eval_every: Count = 250
    """Steps between evaluations on held-out text."""
    common: Shared = Common(compile=False)


def presets(words: dict[str, str]) -> Args:
    if words.get("objective") == "distil":
        return Args("distil", steps=500, learning_rate=5e-4, eval_every=100)
    if "weights" in words:
        return Args(steps=300, learning_rate=1e-4, dropout=0.1, eval_every=100)
    return Args()


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(FromRun):
    data: str | None = None
    """Text, all of which is evaluated: a file, a folder or a name, as for training; the run's held-out part if None."""
    lines: bool = False
    """With --data: each line is an example of its own."""
    out: Path | None = None
    """New folder for the figures and pictures; RUN/evaluations/DATA, numbered if it exists, if None."""


@dataclass(frozen=True, kw_only=True)
class FillArgs:
    run: Path | None = None
    """Folder of a run of masked, span or distil, such as runs/pretrain/NAME."""
    checkpoint: str = "latest"
    """Checkpoint of the run: latest or a step."""
    weights: str | None = None
    """Published weights instead: a folder or repository of a BERT, DistilBERT or RoBERTa with a head for masked
    tokens."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts with [MASK] where a word is missing, of span some words; without any, the lines of --file or of standard
    input."""
    file: Path | None = None
    """File with a text per line."""
    top: Count = 5
    """Words to show for each mask."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


def optimizer_of(args: Args) -> optimizers.Optimizer:
    rate = schedules.warmup_cosine(args.learning_rate, min(args.warmup, args.steps // 10), args.steps)
    adamw = optimizers.adamw(rate, 0.9, 0.98, weight_decay=args.weight_decay, mask=lambda name, leaf: leaf.ndim >= 2)
    return optimizers.chain(optimizers.clip_by_global_norm(1.0), adamw)


def train(args: Args) -> None:
    free = ("data", "steps", "batch", "learning_rate", "warmup", "weight_decay", "eval_every")
    run = begin(RUNS, args, free=free, shards=BY_ROWS)
    if args.lora and not args.weights:
        raise ValueError("--lora needs --weights, the weights that its adapters are for")
    if args.teacher and args.objective != "distil":
        raise ValueError(f"--teacher is for --objective distil; the objective is {args.objective}")
    net_key, run_key, data_key = random.split(random.key(args.common.seed), 3).unbind(0)
    task: Objective = OBJECTIVES[args.objective](args, run.resumed_from, net_key)
    understood(print, {"objective": args.objective, **task.facts})
    optimizer = optimizer_of(args)
    # Clones, as steps overwrite their state.
    values = tree.map(torch.clone, task.values) if task.values else spec.init(net_key, task.model)
    state = start(run_key.to(run.device), tree.move(values, run.device), task.model, optimizer)
    state = run.restore(state, task.identity, args.steps, task.model)
    options = {"policy": run.policy, "distributed": run.distributed, "compile": args.common.compile}
    step = make_step(task.loss, optimizer, donate=True, **options)

    with run.open(task.stored, files={"tokenizer.json": task.tokenizer.save}):
        run.log.print(f"{tree.count(task.model):,} parameters to train; run in {run.folder}")
        batches = task.batches(data_key, run.remaining, args.batch)
        for at, batch in run.steps(batches):
            state, metrics = step(state, tree.move(batch, run.device))
            run.record(at, metrics, args.batch)
            if run.due(at, args.eval_every):
                figures, _ = pretraining.measure(task, run.whole(state.params), most=10)
                run.log.metrics(at, {f"validation/{name}": value for name, value in figures.items()})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        params = run.whole(state.params)
        figures = pretraining.study(run.folder, task, params, args.objective) | task.baselines(task)
        net = task.net(params)
        if args.lora:
            encoders.write_adapters(run.folder, net, args, params)
        run.result({**figures, "parameters": tree.count(net.params)})
    pretraining.draw_curves(run.folder, args.objective, figures)
    print(f"held-out text: {pretraining.summary(args.objective, figures)}")
    print(f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def evaluate(args: EvaluateArgs) -> None:
    """Figures of a run's net on its held-out text, or on all of another one."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    trained = run.read("args", Args)
    common = dataclasses.replace(trained.common, device=args.device)
    changed = dataclasses.replace(trained, common=common)
    if args.data:
        changed = dataclasses.replace(changed, data=args.data, lines=args.lines)
    task = OBJECTIVES[trained.objective](changed, args.run, random.key(0), split=args.data is None)
    for name in ("encoder", "teacher"):
        if task.identity.get(name) != run.config.get(name):
            raise ValueError(f"the {name} of '{args.run}' has other weights now than it was trained with")
    understood(print, {"objective": trained.objective, **task.facts})
    params = tree.move(run.restore(task.model, "params"), device)
    folder = unused(args.out, args.run / "evaluations" / (Path(args.data or "held_out").resolve().name))
    folder.mkdir(parents=True)
    figures = pretraining.study(folder, task, params, trained.objective) | task.baselines(task)
    write_json(folder / "result.json", {**figures, "checkpoint": run.step})
    print(f"{pretraining.summary(trained.objective, figures)}\nfiles in {folder}/")


def fill(args: FillArgs) -> None:
    """Words for each [MASK] of a text, with their probabilities, or T5's spans."""
    check_source(args)
    device, net = command_line.device(args.device), net_of(args)
    net = net._replace(params=tree.move(net.params, device))
    good, bad = 0, []
    for text in filter(None, map(str.strip, lines_of(args.texts, args.file))):
        try:
            filled = filling.fill(net, text, args.top)
        except ValueError as error:
            bad.append(error)
            print(f"left out: {error}", file=sys.stderr)
            continue
        good += 1
        print(filled.text)
        for choices in filled.choices:
            words = (word.strip() + ("" if p is None else f" {p:.1%}") for word, p in choices)
            print("    " + ", ".join(words), flush=True)
    if bad and not good:
        raise ValueError(f"no text could be filled in: {bad[0]}")


def net_of(args: FillArgs) -> encoders.Encoder | writer.Writer:
    """The net of a run or of published weights. Raises ValueError: it fills in nothing."""
    source = args.weights or str(args.run)
    if args.weights:
        if read_config(source).get("model_type") == "t5":
            return language_model.of_weights(source)
        net, has_head = pretraining.open_encoder(source)
    else:
        run = open_run(args.run, RUNS, args.checkpoint)
        if run.config.get("kind") in causal_and_spans.DECODERS:
            other = f'python experiments/generate.py sample --run {source} --prompt "..."'
            raise ValueError(f"'{source}' is causal, and writes on from a text; use: {other}")
        if run.config.get("kind") == "t5":
            return language_model.of_run(args.run, args.checkpoint)
        net = encoders.of_finetuned(run)
        has_head = net.cfg.head == "masked_tokens"
    if not has_head:
        raise ValueError(f"'{source}' has no head for masked tokens")
    return net


COMMANDS: dict[str, tuple] = {
    "fill": (FillArgs, fill),
    "attention": (AttentionArgs, attention),
    "evaluate": (EvaluateArgs, evaluate),
}

if __name__ == "__main__":
    command_line.run(__doc__, (Args, train, presets), root=RUNS, **COMMANDS)
