"""T5 on pairs of texts: from scratch, published weights or a run, all weights or LoRA's alone; figures of what it
writes."""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import lora, random, spec, tree
from core.tree import Tree
from experiments.parts.encoder import Trainable
from experiments.parts.translator import GREEDY, Decoder, Marks, Translation, Translator, translations
from nets import adapters as peft
from nets import weights
from nets.language import t5, t5_weights
from train import optimizers
from train.data.fingerprint import fingerprint
from train.data.text import tokenizers
from train.data.text.subwords import T5Tokenizer, train_character_pairs, train_unigram
from train.data.translation.files import Pair, Pairs, read
from train.files import replacing, shown
from train.metrics import retrieval, translation
from train.optimizers import Optimizer
from train.optimizers.schedules import Schedule
from train.run import SavedRun, checkpoints, open_run

RUNS = Path("runs/text2text")
TARGETS = ("q.weight", "kv.weight", "proj.weight", "up.weight", "down.weight")
"""Weights with an adapter: all matrices of the blocks."""
METRICS = {"exact": "exact_match", "bleu": "bleu", "chrf": "chrf", "rouge": "rouge_l"}
"""The figure that each `--metric` asks for."""


class Net(NamedTuple):
    params: Tree
    cfg: t5.Config
    tokenizer: T5Tokenizer


# Loading.


def of_weights(source: str) -> Net:
    """A T5 of a run, of a folder, or of a repository with config.json, the weights and tokenizer.json.

    Raises ValueError: no such run, a file that is missing or does not fit.
    """
    if (Path(source) / "checkpoints").is_dir():
        name = checkpoints.read_config(Path(source) / "checkpoints").get("experiment", RUNS.name)
        params, cfg, tokenizer, _ = of_run(open_run(Path(source), RUNS.with_name(name)))
        return Net(params, cfg, tokenizer)
    params, cfg = t5_weights.from_pretrained(source)
    path = weights.locate(weights.beside(source), ("tokenizer.json",))
    return Net(params, cfg, tokenizer_of(path, cfg))


def tokenizer_of(path: Path, cfg: t5.Config) -> T5Tokenizer:
    tokenizer = T5Tokenizer(tokenizers.load(path, lossy=True).tokenizer)
    if tokenizer.vocabulary_size > cfg.vocabulary or tokenizer.start != cfg.padding_id:
        size = f"{tokenizer.vocabulary_size} tokens and <pad> {tokenizer.start}"
        expected = f"up to {cfg.vocabulary} and {cfg.padding_id}, as the net has them"
        raise ValueError(f"the tokenizer of {path} has {size}; expected {expected}")
    return tokenizer


def scratch(cfg_of: Callable[[int], t5.Config], texts: Iterable[str], kind: str, vocabulary: int, key: Tensor) -> Net:
    """A T5 that knows nothing, whose pieces, "bpe" or "unigram", are learned from the texts; `cfg_of` has one of a
    vocabulary's size."""
    learn = {"bpe": train_character_pairs, "unigram": train_unigram}[kind]
    tokenizer = T5Tokenizer(learn(texts, vocabulary).tokenizer)
    cfg = cfg_of(tokenizer.vocabulary_size)
    return Net(spec.init(key, t5.spec(cfg)), cfg, tokenizer)


def of_run(run: SavedRun, device: torch.device | str = "cpu") -> Translator:
    """The net of a run at its checkpoint; adapters are merged into the weights that they were trained on.

    Raises ValueError: it has another net; the weights under its adapters are not there any more, or are others.
    """
    if run.config.get("kind") != "t5":
        raise ValueError(f"'{run.folder}' has no T5; expected a run of text2text.py or of pretrain.py with spans")
    cfg, args = run.read("net", t5.Config), run.config["args"]
    tokenizer = tokenizer_of(run.folder / "tokenizer.json", cfg)
    if args.get("lora"):
        net = of_weights(args["weights"])
        if fingerprint(net.params) != run.config["weights"]:
            raise ValueError(
                f"'{args['weights']}' has other weights than those that the adapters of '{run.folder}' fit"
            )
        parts = trainable(net._replace(cfg=cfg), args["lora"], args["alpha"], random.key(0))
        params = parts.merged(run.restore(parts.model, "params"))
    else:
        params = run.restore(t5.spec(cfg), "params")
    return translator(Net(tree.move(params, device), cfg, tokenizer), args["longest"])


def translator(net: Net, longest: int) -> Translator:
    """The net as a translator of texts of up to `longest` tokens into texts of as many."""
    # Published embeddings have more rows than there are pieces.
    forbidden = (net.tokenizer.start, *range(net.tokenizer.vocabulary_size, net.cfg.vocabulary))
    marks = Marks(net.tokenizer.start, net.tokenizer.end, forbidden, longest)
    return Translator(net.params, net.cfg, net.tokenizer, marks)


# Training.


def trainable(net: Net, rank: int, alpha: float, key: Tensor) -> Trainable:
    """All parameters; or with a rank adapters alone, the rest being constants."""
    model = t5.spec(net.cfg)
    if not rank:
        return Trainable(model, net.params, lambda params: params, lambda params: params)
    own, scale = lora.spec(model, TARGETS, rank), lora.scale(rank, alpha)
    forms = (functools.partial(form, net.params, scale=scale) for form in (lora.adapted, lora.merge))
    return Trainable(own, lora.init(key, own, net.params), *forms)


def adamw(rate: Schedule, weight_decay: float, cfg: t5.Config) -> Optimizer:
    """AdamW after clipping, whose steps are in proportion to the initial values of T5's three kinds of parameters.

    Queries are small, as the scores are not divided by sqrt(depth), and embeddings large. Adafactor, by which T5 was
    trained, scales each step by the parameter's size (Shazeer and Stern 2018, arXiv:1804.04235, section 8).
    """

    def rule(factor: float) -> Optimizer:
        scaled = functools.partial(_scaled, rate, factor)
        return optimizers.adamw(scaled, weight_decay=weight_decay, mask=lambda name, leaf: leaf.ndim >= 2)

    def kind(name: str, _: Any) -> str:
        return "queries" if name.endswith("q.weight") else "tokens" if name.startswith("tokens") else "others"

    rules = {"others": rule(1.0), "queries": rule(cfg.depth**-0.5), "tokens": rule(cfg.width**0.5)}
    return optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.by_path(rules, kind))


def _scaled(rate: Schedule, factor: float, count: Tensor) -> Tensor:
    return factor * rate(count)


def write_adapters(folder: Path, net: Net, args: Any, own: Tree) -> None:
    """`FOLDER/adapter` in peft's format."""
    scale, table = lora.scale(args.lora, args.alpha), t5_weights.rename_table(net.cfg)
    peft.write_peft(str(folder / "adapter"), own, scale, t5.spec(net.cfg), table, base=args.weights)


# Texts and figures.


def prefixed(pairs: Pairs, prefix: str) -> list[Pair]:
    """The pairs, in memory, each source after the prefix. Raises DataError as `files.read`."""
    return [(prefix + source, target) for source, target in read(pairs)]


def facts(net: Net, pairs: Sequence[Pair], metric: str) -> dict[str, Any]:
    """Names and values to print before the first step, by `train.data.understood`."""
    targets = [target for _, target in pairs]
    ids = net.tokenizer.encode_batch(targets)
    lost = [t for t, row in zip(targets, ids, strict=True) if net.tokenizer.decode(row) != t]
    note = f"{len(lost):,} of {len(targets):,}, such as {lost[0][:40]!r}" if lost else ""
    return {"metric": metric, "targets that the tokenizer cannot write": note, "net": net.cfg}


def check_metric(metric: str | None) -> None:
    """Raise ValueError unless what it needs is installed."""
    if metric == "rouge":
        translation.rouge([""], [""])


def scores(texts: Sequence[str], references: Sequence[str], metric: str, language: str) -> dict[str, float | str]:
    """exact_match, bleu and chrf (`translation.scores`), and if that is the metric those of ROUGE.

    Raises ValueError: the package for ROUGE is not installed.
    """
    figures = translation.scores(texts, references, language)
    return figures | (translation.rouge(texts, references) if metric == "rouge" else {})


def study(
    model: Translator,
    pairs: Sequence[Pair],
    decoder: Decoder = GREEDY,
    *,
    metric: str,
    language: str = "",
    train: Iterable[Pair] = (),
    folder: Path | None = None,
) -> tuple[dict[str, float | str], list[Translation]]:
    """(Figures of the texts that the net writes, the texts); mistakes.txt in the folder.

    Beside them the metric of two answers without a net: the source itself, and the target of the training pair whose
    source is nearest by TF-IDF of its letters.
    """
    sources, references = zip(*pairs, strict=True)
    best = [rows[0] for rows in translations(model, sources, decoder)]
    figures, name = scores([one.text for one in best], references, metric, language), METRICS[metric]
    figures[f"copy_{name}"] = scores(sources, references, metric, language)[name]
    train = list(train)
    if train:
        rows = retrieval.nearest_by_letters(sources, [source for source, _ in train])
        figures[f"nearest_{name}"] = scores([train[i][1] for i in rows], references, metric, language)[name]
    if folder:
        wrong = [(s, r, one.text) for (s, r), one in zip(pairs, best, strict=True) if one.text != r]
        lines = ["source\ttarget\twritten", *("\t".join(map(shown, row)) for row in wrong)]
        with replacing(folder / "mistakes.txt") as path:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return figures, best


def summary(metric: str, nearest: bool = True) -> str:
    """The line of figures, their names in braces."""
    name, form = METRICS[metric], ":.2%" if metric == "exact" else ":.2f"
    beside = f"copied: {{copy_{name}{form}}}"
    if nearest:
        beside += f", nearest training pair: {{nearest_{name}{form}}}"
    others = {"exact": "{exact_match:.2%} exact", "bleu": "BLEU {bleu:.2f}", "chrf": "chrF {chrf:.2f}"}
    others = [line for other, line in others.items() if other != metric]
    return f"{{test}}: {name} {{{name}{form}}} ({beside}); {', '.join(others)}"
