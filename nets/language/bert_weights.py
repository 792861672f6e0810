"""Published weights of BERT and its relatives: which head a file has, which one is wanted, and what is tied."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core import spec as specs
from core import tree
from core.tree import Tree
from nets.weights import Rename, WeightsError, config_of, fill, listing, read, read_config

log = logging.getLogger(__name__)

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python": "gelu"}
ACTIVATIONS |= {"relu": "relu", "silu": "silu", "swish": "silu"}
ENCODER = ("blocks", "norm", "positions", "tokens", "types")
"""The parts of the parameters that belong to no head."""


@dataclass(frozen=True)
class Family:
    """The choices of one architecture in transformers' files."""

    name: str
    """In messages."""
    classes: str
    """Beginning of transformers' class names; in lower case the model_type and the prefix of the encoder's tensors."""
    heads: dict[str, str]
    """Our head -> the end of the class name."""
    decoder: str
    """Name of the output layer of masked_tokens, whose weight and bias a file may hold a second time."""
    spec: Callable[[Any], Tree]
    table: Callable[[Any], dict[str, Rename]]
    config: Callable[..., Any]

    @property
    def kind(self) -> str:
        """The `model_type` of transformers' config.json."""
        return self.classes.lower()


def entries(
    spec: Tree, table: dict[str, Rename], parts: dict[str, str], prefix: str, layer: dict[str, tuple[str, ...]]
) -> dict[str, Rename]:
    """The rename table of a spec: single leaves, parts of a weight and a bias, and the parts of the layers."""
    out = {}
    for name in tree.names(spec):
        part, _, leaf = name.rpartition(".")
        if part.startswith("blocks."):
            _, i, ours = part.split(".", 2)
            out[name] = Rename(tuple(f"{prefix}.{i}.{theirs}.{leaf}" for theirs in layer[ours]))
        else:
            out[name] = table[name] if name in table else Rename(f"{parts[part]}.{leaf}")
    return out


# Configurations.


def check_kind(config: dict, kind: str, fixed: dict[str, Any]) -> None:
    """Raise WeightsError for another model_type, or an entry with another value than the fixed one."""
    if config.get("model_type") != kind:
        raise WeightsError(f"the configuration is of model_type '{config.get('model_type')}', expected '{kind}'")
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise WeightsError(f"the configuration has {name}={config[name]!r}; only {value!r} is supported")


def numbers(config: dict, ours: dict[str, str], kinds: type | tuple[type, ...], expected: str) -> dict[str, Any]:
    """The entries of `ours` (their name -> ours) that the configuration has, by our names, checked to be numbers."""
    out = {}
    for theirs, mine in ours.items():
        if theirs not in config:
            continue
        if not isinstance(config[theirs], kinds) or isinstance(config[theirs], bool):
            raise WeightsError(f"the configuration has {theirs}={config[theirs]!r}; expected {expected}")
        out[mine] = config[theirs]
    return out


def activation(config: dict, name: str) -> str:
    """Our name of the activation that the configuration has as `name`."""
    theirs = config.get(name, "gelu")
    if theirs not in ACTIVATIONS:
        raise WeightsError(f"the configuration has {name}={theirs!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[theirs]


def shared_fields(config: dict, head: str | None, family: Family) -> dict[str, Any]:
    """The fields that all configurations have: head, classes and whether the output layer is tied."""
    labels, tied = config.get("id2label"), config.get("tie_word_embeddings", True)
    classes = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if not isinstance(classes, int) or isinstance(classes, bool):
        raise WeightsError(f"the configuration has num_labels={classes!r}; expected an integer")
    if not isinstance(tied, bool):
        raise WeightsError(f"the configuration has tie_word_embeddings={tied!r}; expected true or false")
    head = head or _architecture(config, family) or next(iter(family.heads))
    return {"classes": classes, "head": head, "tied": tied}


def _architecture(config: dict, family: Family) -> str | None:
    """The head that the configuration's architecture has; None where it names none that is known."""
    names = config.get("architectures") or []
    return next((head for head, end in family.heads.items() if f"{family.classes}{end}" in names), None)


def encoder_fields(config: dict, head: str | None, family: Family) -> dict:
    """The fields of a Config that the `config.json` of a BERT or RoBERTa has."""
    fixed = {"add_cross_attention": False, "is_decoder": False, "position_embedding_type": "absolute"}
    check_kind(config, family.kind, fixed | {"pruned_heads": {}})
    fields = shared_fields(config, head, family)
    sizes = {"hidden_size": "width", "intermediate_size": "hidden", "max_position_embeddings": "context"}
    sizes |= {"num_attention_heads": "heads", "num_hidden_layers": "layers", "pad_token_id": "padding_id"}
    sizes |= {"type_vocab_size": "types", "vocab_size": "vocabulary"}
    fields |= numbers(config, sizes, int, "an integer")
    rates = {"attention_probs_dropout_prob": "attention_dropout", "hidden_dropout_prob": "dropout"}
    fields |= numbers(config, rates | {"layer_norm_eps": "eps"}, (int, float), "a number")
    if fields["head"] in ("sequence", "tokens") and config.get("classifier_dropout") is not None:
        fields |= numbers(config, {"classifier_dropout": "head_dropout"}, (int, float), "a number")
    return fields | {"activation": activation(config, "hidden_act")}


# Tensors.


def _normalised(state: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The tensors without wrappers' prefixes, the encoder's prefix, old names of the norms, and position_ids."""
    out = {}
    for name, x in state.items():
        name = re.sub(rf"^((module|_orig_mod)\.)*({family.kind}\.)?", "", name)
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name != "embeddings.position_ids":
            out[name] = x
        elif not torch.equal(x.flatten().long(), torch.arange(x.numel())):  # no parameter
            raise WeightsError(f"{family.name} weights: 'embeddings.position_ids' are not 0, 1, 2 ...")
    return out


def _head_parts(cfg: Any, family: Family) -> dict[str, list[str]]:
    """The parts of a configuration's head -> names of their tensors in a file."""
    parts: dict[str, list[str]] = {}
    for name, rename in family.table(cfg).items():
        part = name.partition(".")[0]
        if part not in ENCODER:
            parts.setdefault(part, []).extend(rename.names)
    return parts


def _head_names(cfg: Any, family: Family) -> set[str]:
    return {name for names in _head_parts(cfg, family).values() for name in names}


def _head_of(state: dict[str, Tensor], cfg: Any, family: Family) -> str:
    """The head that has all its tensors in the file, and the most of them."""
    sizes = {head: _head_names(replace(cfg, head=head, tied=True), family) for head in family.heads}
    return max((head for head, names in sizes.items() if names <= state.keys()), key=lambda head: len(sizes[head]))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(torch.float32), b.to(torch.float32))


def _without_copies(state: dict[str, Tensor], cfg: Any, family: Family) -> dict[str, Tensor]:
    """The tensors with one bias of the output layer and, where it is tied, without its weight.

    In transformers an output layer of its own has a bias of its own too, and the other one is not used.
    """
    state, what, table = dict(state), f"{family.name} weights", family.table(cfg)
    if "masked_tokens.bias" not in table:
        return state
    tokens, bias = (table[name].names[0] for name in ("tokens.weight", "masked_tokens.bias"))
    weight, copy = f"{family.decoder}.weight", f"{family.decoder}.bias"
    if cfg.tied and weight in state and not _same(state.pop(weight), state.get(tokens, torch.zeros(0))):
        raise WeightsError(f"{what}: '{weight}' differs from the token embedding; the two are one with tied=True")
    if bias == copy or copy not in state:
        return state
    other = state.pop(copy)
    if not _same(state.setdefault(bias, other), other):
        if cfg.tied:
            raise WeightsError(f"{what}: '{copy}' differs from '{bias}'; the two are one with tied=True")
        log.warning("%s: '%s' differs from '%s', which is not used", what, copy, bias)
    return state | {bias: other}


def fit(
    state: dict[str, Tensor], cfg: Any, family: Family, key: Tensor | None = None, file_head: str | None = None
) -> Tree:
    """Parameters of a configuration from the tensors of a file.

    Args:
        key: parts of the head that the file does not have are drawn by it; without a key, that is an error.
        file_head: the head that the file has; a classifier of another one is not taken.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen.
    """
    what, table = f"{family.name} weights", family.table(cfg)
    state = _without_copies(_normalised(state, family), cfg, family)
    heads = [replace(cfg, head=head, tied=tied) for head in family.heads for tied in (False, True)]
    known = set().union(*(_head_names(head, family) for head in heads)) | {f"{family.decoder}.bias"}
    parts = _head_parts(cfg, family)
    wanted = _head_names(cfg, family)
    if file_head not in (None, cfg.head):
        wanted -= set(parts.get("classifier", []))
    others = sorted(name for name in state if name in known - wanted)
    for name in others:
        del state[name]
    absent = [part for part, names in parts.items() if not state.keys() & set(names)]
    if absent and key is None:
        names = f"head '{cfg.head}' ('{parts[absent[0]][0]}' is missing)"
        raise WeightsError(f"{what}: the file has no {' and '.join(absent)} for {names}; pass key= to draw new ones")
    if absent:
        new, _ = tree.partition(family.spec(cfg), lambda name, _: name.partition(".")[0] in absent)
        state |= {table[name].names[0]: x for name, x in tree.items(specs.init(key, new))}
        log.warning("%s: the file has no %s for the head '%s'; drawn anew", what, " and ".join(absent), cfg.head)
    params = fill(family.spec(cfg), state, table, what)
    if others:
        log.warning("%s: not used for the head '%s': %s", what, cfg.head, listing(others))
    return params


def load(
    source: str, family: Family, head: str | None = None, classes: int | None = None, key: Tensor | None = None
) -> tuple[Tree, Any]:
    """(params, config) of published weights; see `nets.language.bert.from_pretrained`."""
    what, config = f"{family.name} weights", read_config(source)
    if head is not None and head not in family.heads:
        raise WeightsError(f"{what}: no head '{head}'; there are {', '.join(family.heads)}")
    cfg = family.config(config, head)
    state = _normalised(read(source), family)
    file_head, fullest = _architecture(config, family), _head_of(state, cfg, family)
    if file_head is None or family.heads[file_head] == "Model":  # the tensors say more
        if head is None and file_head is None and config.get("architectures"):
            names, known = listing(map(str, config["architectures"])), ", ".join(family.heads)
            raise WeightsError(f"{what}: the architecture {names} has no known head; pass head=, one of {known}")
        file_head = fullest
    cfg = family.config(config, head or file_head)
    cfg = cfg if classes is None else config_of(cfg, classes=classes)
    decoder, tokens = state.get(f"{family.decoder}.weight"), state.get(family.table(cfg)["tokens.weight"].names[0])
    if "masked_tokens" in _head_parts(cfg, family) and decoder is not None and tokens is not None:
        name, same = f"'{family.decoder}.weight'", _same(decoder, tokens)
        if cfg.tied and not same:
            log.warning("%s: %s differs from the token embedding, which the configuration ties; untied", what, name)
            cfg = replace(cfg, tied=False)
        elif same and not cfg.tied:
            log.warning("%s: %s equals the token embedding, which the configuration does not tie", what, name)
    return fit(state, cfg, family, key, file_head), cfg
