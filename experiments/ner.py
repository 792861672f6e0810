"""Named entities: an encoder tags the words of sentences with the people, places and dates that they name.

Devlin et al. 2019, "BERT" (arXiv:1810.04805), section 5.3: the tag of a word is read from its first token. Without a
flag a small BERT learns, from scratch and offline, generated sentences whose ambiguous and made-up names (is Jordan a
person, a place or a company?) only the words around them explain:

    python experiments/ner.py                                                107 CPU seconds
    python experiments/ner.py --data FOLDER --weights MODEL                  CoNLL files; published weights or a run
    python experiments/ner.py predict --run runs/ner/NAME "Anna met Jordan in Paris."
    python experiments/ner.py predict --run runs/ner/NAME --json < lines.txt
    python experiments/ner.py evaluate --run runs/ner/NAME --data OTHER_FILE

Expected: entity F1 97 % of unseen sentences, half of whose names are new; 35 % by the commonest tag of each word.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from core import random, tree
from experiments.parts import encoder as encoders
from experiments.parts import tagger
from experiments.parts.encoder import Tuning
from experiments.parts.tagger import Tagger
from train import plots
from train.data.fingerprint import fingerprint
from train.data.text import conll, ragged
from train.data.text.files import lines_of
from train.data.understood import understood
from train.files import write_json
from train.metrics import entities as metrics
from train.run import Common, Count, FromBest, Shared, begin, command_line, open_run
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS
from train.run.run import unused
from train.step import make_step, start

RUNS = Path("runs/ner")


@dataclass(frozen=True)
class Args:
    data: str = "entities"
    """"entities", generated; else a file of the CoNLL kind, a word and its tag per line, or a folder with one training
    file."""
    validation: str | None = None
    """File for validation; the one beside the training file, or a tenth held out, if None."""
    test: str | None = None
    """File for testing, in the same way."""
    tuning: Annotated[Tuning, tyro.conf.OmitArgPrefixes] = Tuning()
    eval_every: Count | None = None
    """Steps between evaluations on the validation part; those of an epoch if None."""
    common: Shared = Common()


def presets(words: dict[str, str]) -> Args:
    if words.get("weights"):
        return Args(tuning=Tuning(longest=128))
    if words.get("data", "entities") == "entities":
        # Steps of a net this small take less time than to compile them.
        return Args(tuning=Tuning(vocabulary=600, dropout=0.0, shapes=6), common=Common(compile=False))
    return Args(tuning=Tuning(longest=128, epochs=10.0))


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(FromBest):
    data: str | None = None
    """File with sentences and their tags; the run's own test part if None."""
    out: Path | None = None
    """New folder for the figures and pictures; RUN/evaluations/DATA, numbered if it exists, if None."""


@dataclass(frozen=True, kw_only=True)
class PredictArgs(FromBest):
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts; without any, the lines of --file or of standard input."""
    file: Path | None = None
    """File with a text per line."""
    json: bool = False
    """Print a JSON object per text, {"text", "entities": [{"start", "end", "type", "text", "probability"}]}."""


def train(args: Args) -> None:
    tuning = args.tuning
    if tuning.longest < 8:
        raise ValueError(f"--longest is {tuning.longest}; expected at least 8, for some words")
    free = ("data", "validation", "test", "tuning.epochs", "tuning.batch", "tuning.shapes", "eval_every")
    run = begin(
        RUNS, args, free=(*free, "tuning.learning_rate", "tuning.head_rate", "tuning.weight_decay"), shards=BY_ROWS
    )
    data = conll.open_tagged(args.data, args.validation, args.test)
    net_key, adapter_key, order_key, run_key = random.split(random.key(args.common.seed), 4).unbind(0)
    texts = [" ".join(sentence.words) for sentence in data.train.sentences]
    encoder = encoders.load(tuning, texts, "tokens", 1 + 2 * len(data.types), key=net_key)
    parts = {name: tagger.encoded(encoder, data.types, part, tuning.longest) for name, part in data.parts.items()}
    buckets = ragged.make_buckets(parts["train"].lengths, tuning.shapes, tuning.batch)
    long = {name: len(parts[name].tokens) - len(part.sentences) for name, part in data.parts.items()}
    facts = {"widths of batches": [bucket.width for bucket in buckets], "net": encoder.cfg}
    facts |= {"windows of longer sentences": f"{sum(long.values()):,} more"} if any(long.values()) else {}
    understood(print, {**conll.facts(data), "vocabulary": encoder.tokenizer.vocabulary_size, **facts})
    gold = {name: [sentence.tags for sentence in part.sentences] for name, part in data.parts.items()}
    baseline = metrics.figures(gold["test"], tagger.memorised(data.train, data.test))

    encoder = encoder._replace(params=tree.move(encoder.params, run.device))
    per_epoch = ragged.steps_per_epoch(buckets, tuning.batch)
    steps = max(1, round(tuning.epochs * per_epoch))
    own, optimizer = (
        encoders.trainable(encoder, tuning, adapter_key.to(run.device)),
        encoders.adamw(tuning, encoder, steps),
    )
    state = start(run_key.to(run.device), own.values, own.model, optimizer)
    loss = functools.partial(tagger.losses, encoder=encoder, own=own)
    identity = {"data": fingerprint(*parts.values()), "types": data.types, **encoders.identity(encoder, tuning)}
    state = run.restore(state, {"net": encoder.cfg, **identity}, steps, own.model)
    options = {"policy": run.policy, "distributed": run.distributed, "compile": args.common.compile}
    step = make_step(loss, optimizer, donate=True, **options)
    every, parameters = args.eval_every or per_epoch, tree.count(own.model)

    def model_of(params: tree.Tree) -> Tagger:
        return Tagger(encoder._replace(params=own.merged(params)), data.types, tuning.longest)

    config = {**encoders.stored(encoder), "types": data.types}
    with run.open(config, best="error", files={"tokenizer.json": encoder.tokenizer.save}):
        run.log.print(f"{parameters:,} parameters to train; run in {run.folder}")
        batches = (tagger.batch_at(parts["train"], buckets, order_key, t, tuning.batch) for t in run.remaining)
        for at, batch in run.steps(batches):
            state, out = step(state, tree.move(batch, run.device))
            run.record(at, out, tuning.batch)
            figures = {}
            if at % every == 0 or at == steps:  # not where a signal stops it: that checkpoint cannot be the best one
                f1 = metrics.figures(
                    gold["validation"], tagger.predicted_tags(model_of(run.whole(state.params)), data.validation)
                )["f1"]
                figures = {"f1": f1, "error": 1.0 - f1}
                run.log.metrics(at, {f"validation/{name}": value for name, value in figures.items()})
            if run.due(at, args.common.save_every) or figures:
                run.save(at, state, **figures)
        best = open_run(run.folder, RUNS, "best")
        figures = tagger.study(run.folder, tagger.load(best, run.device), data.test, baseline)
        figures |= {"f1_by": metrics.MODE, "commonest_tag_f1": baseline["f1"], "skipped": len(data.skipped)}
        run.result({**figures, "parameters": parameters, "best_step": best.step})
        if tuning.lora:
            encoders.write_adapters(run.folder, encoder, tuning, best.restore(own.model, "params"))
    plots.curves(run.folder / "loss.png", read_curves(run.folder, "train/loss"), ylabel="nats per word", title="Loss")
    plots.curves(run.folder / "f1.png", read_curves(run.folder, "validation/f1"), ylabel="F1", title="Validation F1")
    print(
        f"test F1 {figures['f1']:.2%} (precision {figures['precision']:.2%}, recall {figures['recall']:.2%});", end=" "
    )
    print(f"commonest tag of each word: {baseline['f1']:.2%}; {metrics.MODE}")
    print(f"{run.at} steps in {run.seconds:.0f} s, the best was {best.step}; files in {run.folder}/")


def evaluate(args: EvaluateArgs) -> None:
    """Figures of a run's tagger on its test part, or on other sentences."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    model, trained = tagger.load(run, device), run.read("args", Args)
    if args.data:
        part = conll.open_test(args.data, model.types)
        facts = {"data": args.data, "form": part.form, "sentences": len(part.sentences), "skipped": list(part.skipped)}
        understood(print, facts)
    else:
        part = conll.open_tagged(trained.data, trained.validation, trained.test).test
    folder = unused(args.out, args.run / "evaluations" / (Path(args.data or "test").resolve().name))
    folder.mkdir(parents=True)
    figures = tagger.study(folder, model, part)
    write_json(folder / "result.json", {**figures, "f1_by": metrics.MODE, "checkpoint": run.step})
    table = {name: figures[name] for name in ("precision", "recall", "f1")} | figures["f1_by_type"]
    print(
        "\n".join(f"{name:26}{value:.4f}" for name, value in table.items()),
        metrics.MODE,
        f"files in {folder}/",
        sep="\n",
    )


def predict(args: PredictArgs) -> None:
    """Entities of texts: number of the text, first character, last + 1, type, probability and words."""
    model = tagger.load(open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device))
    tagger.print_entities(model, lines_of(args.texts, args.file), args.json)


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, presets),
        root=RUNS,
        predict=(PredictArgs, predict),
        evaluate=(EvaluateArgs, evaluate),
    )
