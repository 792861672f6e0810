"""Questions answered by passages of a text: an encoder scores where an answer starts and where it ends.

Devlin et al. 2019, "BERT" (arXiv:1810.04805), section 4.2, on questions as in SQuAD (Rajpurkar et al. 2016,
arXiv:1606.05250). Without a flag a small BERT learns, from scratch and offline, stories such as "Mary took the apple.
Mary went to the garden at half past nine.": where is the apple, when did Mary go to the garden, who has the key?

    python experiments/qa.py                                                 266 CPU seconds
    python experiments/qa.py --data FILE.json --weights MODEL                SQuAD files; published weights or a run
    python experiments/qa.py predict --run runs/qa/NAME --text story.txt --question "Where is the apple?"
    python experiments/qa.py predict --run runs/qa/NAME --text story.txt --n-best 3 --json < questions.txt
    python experiments/qa.py evaluate --run runs/qa/NAME --data OTHER.json

Expected: 63 % of the answers exact, F1 65 %; 34 % by the sentence that shares most words with the question.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from core import random, tree
from experiments.parts import answerer
from experiments.parts import encoder as encoders
from experiments.parts.answerer import Answerer
from experiments.parts.encoder import Tuning
from train import plots
from train.data.fingerprint import fingerprint
from train.data.text import ragged, squad
from train.data.text.files import lines_of, read_text
from train.data.understood import understood
from train.files import shown, write_json
from train.metrics import answers as metrics
from train.run import Common, Count, FromBest, Natural, Shared, begin, command_line, open_run
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS
from train.run.run import unused
from train.step import make_step, start

RUNS = Path("runs/qa")


@dataclass(frozen=True)
class Args:
    data: str = "stories"
    """"stories", generated; else a JSON file of the SQuAD kind, or a folder with one training file."""
    validation: str | None = None
    """File for validation; a tenth of the articles held out if None."""
    test: str | None = None
    """File for testing; the dev file beside the training file, or another tenth held out, if None."""
    stride: Natural = 16
    """Tokens that two neighbouring windows of a long context share."""
    tuning: Annotated[Tuning, tyro.conf.OmitArgPrefixes] = Tuning()
    eval_every: Count | None = None
    """Steps between evaluations on the validation part; those of an epoch if None."""
    common: Shared = Common()


def presets(words: dict[str, str]) -> Args:
    if words.get("data", "stories") == "stories":
        sizes = {"longest": 128, "vocabulary": 400, "layers": 2, "dropout": 0.0}
        tuning = Tuning(**sizes, epochs=6.0, batch=16, shapes=6)
        # Steps of a net this small take less time than to compile them.
        return Args(tuning=tuning, common=Common(compile=False))
    return Args(stride=64, tuning=Tuning(longest=256, epochs=3.0, batch=16))


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(FromBest):
    data: str | None = None
    """File with questions and their answers; the run's own test part if None."""
    out: Path | None = None
    """New folder for the figures and pictures; RUN/evaluations/DATA, numbered if it exists, if None."""


@dataclass(frozen=True, kw_only=True)
class PredictArgs(FromBest):
    text: Path | None = None
    """Text file that the answers are in."""
    question: tuple[str, ...] = ()
    """Questions; without any, the lines of --file or of standard input."""
    file: Path | None = None
    """File with a question per line."""
    n_best: Count = 1
    """Answers to print for each question."""
    json: bool = False
    """Print a JSON object per question, {"question", "answers": [{"text", "start", "end", "score", "probability"}]}."""


def train(args: Args) -> None:
    tuning = args.tuning
    answerer.check_stride(tuning.longest, args.stride)
    free = ("data", "validation", "test", "tuning.epochs", "tuning.batch", "tuning.shapes", "eval_every")
    run = begin(
        RUNS, args, free=(*free, "tuning.learning_rate", "tuning.head_rate", "tuning.weight_decay"), shards=BY_ROWS
    )
    data = squad.open_answered(args.data, args.validation, args.test)
    net_key, adapter_key, order_key, run_key = random.split(random.key(args.common.seed), 4).unbind(0)
    texts = dict.fromkeys(text for q in data.train.questions for text in (q.context, q.question))
    encoder = encoders.load(tuning, list(texts), "spans", key=net_key)
    learn, windows = answerer.encoded(encoder, data.train.questions, tuning.longest, args.stride)
    unheld = set(answerer.unheld(learn, windows, data.train.questions))
    rows = [row for row, window in enumerate(windows) if window.question not in unheld]
    learn = answerer.narrow(learn, torch.tensor(rows, dtype=torch.int64), learn.tokens.shape[1])
    buckets = ragged.make_buckets(learn.lengths, tuning.shapes, tuning.batch)
    facts = {"windows": len(rows), "of them without the answer": int((learn.start == 0).sum())}
    facts |= {"left out": f"{len(unheld):,} answers that no window holds"} if unheld else {}
    facts |= {"widths of batches": [bucket.width for bucket in buckets], "net": encoder.cfg}
    understood(print, {**squad.facts(data), "vocabulary": encoder.tokenizer.vocabulary_size, **facts})
    simple = [squad.overlap_answer(question) for question in data.test.questions]
    baseline = metrics.figures(simple, [question.gold for question in data.test.questions])

    encoder, refuses = encoder._replace(params=tree.move(encoder.params, run.device)), data.train.impossible > 0
    per_epoch = ragged.steps_per_epoch(buckets, tuning.batch)
    steps = max(1, round(tuning.epochs * per_epoch))
    own, optimizer = (
        encoders.trainable(encoder, tuning, adapter_key.to(run.device)),
        encoders.adamw(tuning, encoder, steps),
    )
    state = start(run_key.to(run.device), own.values, own.model, optimizer)
    loss = functools.partial(answerer.losses, encoder=encoder, own=own)
    questions = [(q.question, q.context, q.answers) for part in (data.validation, data.test) for q in part.questions]
    identity = {"data": fingerprint(learn, questions), **encoders.identity(encoder, tuning)}
    state = run.restore(state, {"net": encoder.cfg, **identity}, steps, own.model)
    options = {"policy": run.policy, "distributed": run.distributed, "compile": args.common.compile}
    step = make_step(loss, optimizer, donate=True, **options)
    every, parameters = args.eval_every or per_epoch, tree.count(own.model)

    def model_of(params: tree.Tree) -> Answerer:
        return Answerer(encoder._replace(params=own.merged(params)), tuning.longest, args.stride, refuses)

    config = {**encoders.stored(encoder), "refuses": refuses}
    with run.open(config, best="error", files={"tokenizer.json": encoder.tokenizer.save}):
        run.log.print(f"{parameters:,} parameters to train; run in {run.folder}")
        batches = (answerer.batch_at(learn, buckets, order_key, t, tuning.batch) for t in run.remaining)
        for at, batch in run.steps(batches):
            state, out = step(state, tree.move(batch, run.device))
            run.record(at, out, tuning.batch)
            figures = {}
            if at % every == 0 or at == steps:  # not where a signal stops it: that checkpoint cannot be the best one
                candidates = answerer.answer(model_of(run.whole(state.params)), data.validation.questions)
                right = [question.gold for question in data.validation.questions]
                figures = metrics.figures([rows[0].text for rows in candidates], right)
                run.log.metrics(at, {f"validation/{name}": value for name, value in figures.items()})
                figures["error"] = 1.0 - figures["f1"]
            if run.due(at, args.common.save_every) or figures:
                run.save(at, state, **figures)
        best = open_run(run.folder, RUNS, "best")
        figures = answerer.study(run.folder, answerer.load(best, run.device), data.test, simple)
        figures |= {f"overlap_{name}": value for name, value in baseline.items()} | {
            "skipped": len(data.skipped) + len(unheld)
        }
        run.result({**figures, "parameters": parameters, "best_step": best.step})
        if tuning.lora:
            encoders.write_adapters(run.folder, encoder, tuning, best.restore(own.model, "params"))
    curves = read_curves(run.folder, "train/loss")
    plots.curves(run.folder / "loss.png", curves, ylabel="nats", title="Loss of start and end")
    curves = read_curves(run.folder, "validation/f1", "validation/exact_match")
    plots.curves(run.folder / "f1.png", curves, title="Validation")
    print(f"test questions: {figures['exact_match']:.2%} exact, F1 {figures['f1']:.2%}", end=" ")
    print(f"(most overlapping sentence: {baseline['exact_match']:.2%}, {baseline['f1']:.2%})")
    print(f"{run.at} steps in {run.seconds:.0f} s, the best was {best.step}; files in {run.folder}/")


def evaluate(args: EvaluateArgs) -> None:
    """Exact match and F1 of a run's net on its test part, or on other questions."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    model, trained = answerer.load(run, device), run.read("args", Args)
    if args.data:
        part = squad.read(Path(args.data))
        facts = {"data": args.data, "form": part.form, "questions": len(part.questions)}
        understood(print, {**facts, "without an answer": part.impossible, "skipped": list(part.skipped)})
    else:
        part = squad.open_answered(trained.data, trained.validation, trained.test).test
    folder = unused(args.out, args.run / "evaluations" / (Path(args.data or "test").resolve().name))
    folder.mkdir(parents=True)
    simple = [squad.overlap_answer(question) for question in part.questions]
    baseline = metrics.figures(simple, [question.gold for question in part.questions])
    figures = answerer.study(folder, model, part, simple)
    figures |= {f"overlap_{name}": value for name, value in baseline.items()}
    write_json(folder / "result.json", {**figures, "checkpoint": run.step})
    lines = [f"{name:26}{value:.4f}" for name, value in figures.items() if isinstance(value, float)]
    print("\n".join(lines), f"files in {folder}/", sep="\n")


def predict(args: PredictArgs) -> None:
    """Answers to questions about a text: question, answer, probability, first character, last + 1."""
    model = answerer.load(open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device))
    if args.text is None:
        raise ValueError("no text; expected --text FILE, in which the answers are")
    context = read_text(args.text)
    if not context.strip():
        raise ValueError(f"{args.text} is empty; expected a text")
    for text in lines_of(args.question, args.file):
        if not text.strip():
            continue
        (candidates,) = answerer.answer(model, [squad.Question("", "", "", text, context, ())])
        rows = candidates[: args.n_best]
        if args.json:
            print(
                json.dumps({"question": text, "answers": [row._asdict() for row in rows]}, ensure_ascii=False),
                flush=True,
            )
        for row in [] if args.json else rows:
            cells = shown(text), shown(row.text) or "no answer", f"{row.probability:.4f}", row.start, row.end
            print(*cells, sep="\t", flush=True)


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, presets),
        root=RUNS,
        predict=(PredictArgs, predict),
        evaluate=(EvaluateArgs, evaluate),
    )
