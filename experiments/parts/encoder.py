"""Encoders to fine-tune: from a run of pretrain.py, published weights or scratch; all weights or LoRA's alone."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import lora, random, tree
from core import spec as specs
from core.tree import Tree
from nets import adapters as peft
from nets import weights
from nets.language import bert, distilbert, roberta
from nets.language.bert import HEADS
from train import optimizers
from train.data.fingerprint import fingerprint
from train.data.text import ragged, tokenizers
from train.data.text.subwords import train_word_piece
from train.data.text.tokenizers import BytePairTokenizer
from train.optimizers import Optimizer, schedules
from train.run import SavedRun, checkpoints, open_run
from train.run.flags import Count, Natural, NonNegative, Positive, Rate

SURROGATE = re.compile("[\ud800-\udfff]")
"""Halves of characters, as JSON and bytes of a command line that are no UTF-8 bring: the library takes no such text."""
KINDS = {"bert": bert, "distilbert": distilbert, "roberta": roberta}
RUNS = Path("runs/pretrain")
TARGETS = ("attn.qkv.weight", "attn.proj.weight", "mlp.up.weight", "mlp.down.weight")
"""Weights with an adapter: all matrices of the blocks."""


class Encoder(NamedTuple):
    """A net with its tokenizer; `kind` is one of `KINDS`, `cfg.head` is its head."""

    kind: str
    params: Tree
    cfg: bert.Config
    tokenizer: BytePairTokenizer

    @property
    def net(self) -> ModuleType:
        return KINDS[self.kind]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The net, and how it is trained; flags of the scripts that fine-tune an encoder."""

    weights: str | None = None
    """Weights to begin with: a run of pretrain.py, a folder or Hugging Face id of a BERT, DistilBERT or RoBERTa. None:
    from scratch, with a WordPiece vocabulary of the training texts."""
    vocabulary: Count = 4000
    """Size of the vocabulary from scratch, at most."""
    layers: Count = 4
    """Layers of a net from scratch."""
    width: Count = 128
    """Size of its hidden states, a multiple of 32."""
    longest: Count = 64
    """Tokens of a text that the net sees, at most."""
    lora: Natural = 0
    """Rank of LoRA's adapters, which are trained with the head alone; 0 trains all weights."""
    alpha: Positive = 16.0
    """Scale of the adapters: alpha / rank."""
    dropout: Rate = 0.1
    """Dropout rate of hidden states, attention weights and the head."""
    epochs: Positive = 3.0
    """Passes over the training examples; the learning rate rises over a tenth of them, then falls to 0."""
    batch: Count = 32
    """Examples per step."""
    shapes: Count = 3
    """Shapes of batches, by length, at most: more of them pad less, but the step is compiled for each."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of the pretrained weights or adapters."""
    head_rate: Positive = 1e-3
    """Peak learning rate of the new head; from scratch, of everything."""
    weight_decay: NonNegative = 0.01
    """Weight decay of AdamW, not on biases and norms."""


# Loading.


def of_weights(source: str, head: str, classes: int | None = None, *, key: Tensor) -> Encoder:
    """Published weights: a folder or repository with config.json, the weights and tokenizer.json.

    Raises WeightsError, DataError: another kind of net, a file that is missing or does not fit.
    """
    kind = weights.read_config(source).get("model_type")
    if kind not in KINDS:
        raise weights.WeightsError(f"the configuration is of model_type '{kind}', expected one of {', '.join(KINDS)}")
    params, cfg = KINDS[kind].from_pretrained(source, head, classes=classes, key=key)
    path = weights.locate(weights.beside(source), ("tokenizer.json",))
    return _checked(Encoder(kind, params, cfg, tokenizers.load(path, lossy=True)))


def of_run(folder: Path, head: str, classes: int | None = None, *, key: Tensor) -> Encoder:
    """The encoder of a run of pretrain.py or of a fine-tuning script, its head drawn anew.

    Raises ValueError: no such run, or of a script without encoders.
    """
    name = checkpoints.read_config(folder / "checkpoints").get("experiment", "pretrain")
    before = of_finetuned(open_run(folder, RUNS.with_name(name)))
    sizes = {} if classes is None else {"classes": classes}
    cfg = dataclasses.replace(before.cfg, head=head, **sizes)
    params, heads = specs.init(key, before.net.spec(cfg)), HEADS[head]
    old = {name: leaf for name, leaf in tree.items(before.params) if name.partition(".")[0] not in heads}
    return before._replace(params=tree.map_with_names(lambda name, leaf: old.get(name, leaf), params), cfg=cfg)


def scratch(args: Tuning, texts: Sequence[str], head: str, classes: int = 2, *, key: Tensor) -> Encoder:
    """A BERT of the flags' size, whose vocabulary is learned from the texts."""
    if args.width % 32:
        raise ValueError(f"--width is {args.width}; expected a multiple of 32")
    tokenizer = train_word_piece(texts, args.vocabulary, lower_case=True)
    sizes = {"layers": args.layers, "width": args.width, "heads": args.width // 32, "hidden": 4 * args.width}
    cfg = bert.Config(tokenizer.vocabulary_size, head=head, classes=classes, context=max(args.longest, 128), **sizes)
    return Encoder("bert", specs.init(key, bert.spec(cfg)), cfg, tokenizer)


def load(args: Tuning, texts: Sequence[str], head: str, classes: int = 2, *, key: Tensor) -> Encoder:
    """The encoder of the flags, with their dropout.

    Raises ValueError: no such weights, a text length that its context does not hold.
    """
    if args.weights is None:
        out = scratch(args, texts, head, classes, key=key)
    elif (Path(args.weights) / "checkpoints").is_dir():
        out = of_run(Path(args.weights), head, classes, key=key)
    else:
        out = of_weights(args.weights, head, classes, key=key)
    if args.longest > out.cfg.context:
        raise ValueError(f"--longest is {args.longest}; expected up to the {out.cfg.context} of the net's context")
    rates = {"dropout": args.dropout, "attention_dropout": args.dropout, "head_dropout": None}
    return out._replace(cfg=dataclasses.replace(out.cfg, **rates))


def _checked(encoder: Encoder) -> Encoder:
    size = encoder.tokenizer.vocabulary_size
    if size > encoder.cfg.vocabulary:
        raise ValueError(f"the tokenizer has {size} tokens, expected up to the {encoder.cfg.vocabulary} of the net")
    return encoder


# Texts.


def encodings(
    encoder: Encoder, texts: Sequence[str] | Sequence[tuple[str, str]], longest: int, **cutting: Any
) -> list[Any]:
    """An `Encoding` of the library for each text or pair, special tokens included, cut to `longest` tokens.

    It has ids, type_ids, offsets into the text, word_ids and sequence_ids, and `overflowing`, the rest in as many more.

    Args:
        cutting: stride, strategy and direction of the library's `enable_truncation`.

    Halves of characters (surrogates alone), which some files hold, become U+FFFD.
    """
    import tokenizers as library

    tokenizer = library.Tokenizer.from_str(encoder.tokenizer.tokenizer.to_str())
    tokenizer.enable_truncation(longest, **cutting)

    def whole(text: str) -> str:
        return SURROGATE.sub("\ufffd", text)

    pairs = [whole(text) if isinstance(text, str) else tuple(map(whole, text)) for text in texts]
    return tokenizer.encode_batch(pairs)


def tokens_of(encoder: Encoder, texts: Sequence[str], longest: int) -> tuple[Tensor, Tensor]:
    """tokens (texts, longest of them), filled up with padding, and lengths (texts,), both int64."""
    return ragged.padded([encoding.ids for encoding in encodings(encoder, texts, longest)], encoder.cfg.padding_id)


def mask_of(tokens: Tensor, lengths: Tensor) -> Tensor:
    """(batch, time), True at tokens and False at padding."""
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


# Training.


class Trainable(NamedTuple):
    """The trained part of a net.

    Attributes:
        model: its spec.
        values: its initial values.
        whole: these -> parameters for `apply` in a loss, adapters unformed.
        merged: these -> plain parameters, adapters inside.
    """

    model: Tree
    values: Tree
    whole: Callable[[Tree], Tree]
    merged: Callable[[Tree], Tree]


def trainable(encoder: Encoder, args: Tuning, key: Tensor) -> Trainable:
    """All parameters; or with --lora adapters and the head, the rest being constants."""
    model, heads = encoder.net.spec(encoder.cfg), HEADS[encoder.cfg.head]
    if not args.lora:
        return Trainable(model, encoder.params, lambda params: params, lambda params: params)

    def in_head(name: str, _: Any) -> bool:
        return name.partition(".")[0] in heads

    scale = lora.scale(args.lora, args.alpha)
    spec = {"adapters": lora.spec(model, TARGETS, args.lora), "head": tree.partition(model, in_head)[0]}
    head, body = tree.partition(encoder.params, in_head)
    values = {"adapters": lora.init(key, spec["adapters"], encoder.params), "head": head}

    def put(form: Callable[..., Tree], own: Tree) -> Tree:
        dtype = tree.leaves(own)[0].dtype  # that of the step's policy
        return tree.merge(form(tree.cast(body, dtype), own["adapters"], scale), own["head"])

    return Trainable(spec, values, functools.partial(put, lora.adapted), functools.partial(put, lora.merge))


def adamw(args: Tuning, encoder: Encoder, steps: int) -> Optimizer:
    """AdamW after clipping, with the head at a learning rate of its own; linear warm-up and decay."""
    heads = HEADS[encoder.cfg.head]

    def rule(peak: float) -> Optimizer:
        warm = max(1, steps // 10)
        rate = schedules.join([schedules.linear(0.0, peak, warm), schedules.linear(peak, 0.0, steps - warm)], [warm])
        return optimizers.adamw(rate, weight_decay=args.weight_decay, mask=lambda name, leaf: leaf.ndim >= 2)

    def label(name: str, _: Any) -> str:
        new = args.weights is None or name.removeprefix("head.").partition(".")[0] in heads
        return "new" if new else "pretrained"

    rules = {"new": rule(args.head_rate), "pretrained": rule(args.learning_rate)}
    return optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.by_path(rules, label))


def stored(encoder: Encoder) -> dict[str, Any]:
    """Entries of a run's configuration, from which `of_finetuned` makes the encoder again."""
    return {"kind": encoder.kind, "net": encoder.cfg}


def identity(encoder: Encoder, args: Tuning) -> dict[str, Any]:
    """Weights that a resumed run, and a net with adapters, must share with the beginning."""
    body = [leaf for name, leaf in tree.items(encoder.params) if name.partition(".")[0] not in HEADS[encoder.cfg.head]]
    return {"encoder": fingerprint(*body, encoder.tokenizer) if args.weights else None}


class Finetuned(NamedTuple):
    """The encoder that a run began with, what it trained of it, and the values of that at a checkpoint."""

    base: Encoder
    parts: Trainable
    values: Tree


def finetuned_parts(run: SavedRun, device: torch.device | str = "cpu") -> Finetuned:
    """A run with an encoder, its adapters apart from the weights that they were trained on.

    Raises ValueError: it has none; the weights under its adapters are not there any more, or are others.
    """
    config = run.config if isinstance(run.config, dict) else {}
    kind, args = config.get("kind"), config.get("args", {})
    flags = args.get("tuning") or args  # pretrain.py has flags of its own
    if kind not in KINDS:
        raise ValueError(
            f"'{run.folder}' is no run with an encoder; expected one of pretrain.py or a fine-tuning script"
        )
    cfg, tokenizer = run.read("net", bert.Config), tokenizers.load(run.folder / "tokenizer.json", lossy=True)
    args, key = Tuning(), random.key(0)
    if not flags.get("lora"):
        params = tree.move(run.restore(KINDS[kind].spec(cfg), "params"), device)
        base = Encoder(kind, params, cfg, tokenizer)
        return Finetuned(base, trainable(base, args, key), params)
    args = Tuning(**{name: flags[name] for name in ("weights", "lora", "alpha")}, longest=1)
    base = load(args, (), cfg.head, cfg.classes, key=key)
    if identity(base, args)["encoder"] != config.get("encoder"):
        raise ValueError(f"'{args.weights}' has other weights than those that the adapters of '{run.folder}' fit")
    base = base._replace(params=tree.move(base.params, device))
    parts = trainable(base, args, key.to(device))
    return Finetuned(base, parts, tree.move(run.restore(parts.model, "params"), device))


def of_finetuned(run: SavedRun, device: torch.device | str = "cpu") -> Encoder:
    """The encoder of a run at its checkpoint; adapters are merged into the weights that they were trained on.

    Raises ValueError: as `finetuned_parts`.
    """
    base, parts, values = finetuned_parts(run, device)
    return base._replace(params=parts.merged(values))


def write_adapters(folder: Path, encoder: Encoder, args: Tuning, own: Tree) -> None:
    """`FOLDER/adapter` in peft's format, with the head among its `modules_to_save`."""
    model, scale = encoder.net.spec(encoder.cfg), lora.scale(args.lora, args.alpha)

    def inside(name: str) -> str:
        return encoder.kind + "." + name if name.partition(".")[0] in INSIDE else name

    table = {
        ours: dataclasses.replace(rename, theirs=tuple(map(inside, rename.names)))
        for ours, rename in encoder.net.rename_table(encoder.cfg).items()
    }
    peft.write_peft(
        str(folder / "adapter"), own["adapters"], scale, model, table, modules=own["head"], base=args.weights
    )


INSIDE = ("embeddings", "encoder", "pooler", "transformer")
"""Modules that transformers' nets with a head keep under the name of the encoder, such as "bert."; the rest is beside
it."""
