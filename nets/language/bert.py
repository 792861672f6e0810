"""BERT: a transformer encoder that sees a text from both sides.

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"
(arXiv:1810.04805). The norm follows each residual sum, and attention masks nothing but padding:

    h = norm(tokens[ids] + positions + types[type]);   h = block_i(h);   pooled = tanh(W h[first] + b)
    masked tokens:  logits = norm(gelu(W h + b)) tokensᵀ + bias

A net is the encoder with one head, which the configuration names. `nets/language/distilbert.py` and
`nets/language/roberta.py` are this net with other choices. Chinese BERTs, the ones called RoBERTa-wwm and RBT3
included, are BERTs and load here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core import initializers, random
from core.layers import (
    activation,
    dropout,
    dropout_sites,
    embedding,
    embedding_spec,
    layer_norm,
    layer_norm_spec,
    linear,
    linear_spec,
)
from core.layers.checks import check_tensor
from core.spec import Param
from nets.blocks.transformer_block import block, block_spec, identity
from nets.language import bert_weights
from nets.weights import Rename, config_of

HEADS = {
    "features": (),
    "masked_tokens": ("masked_tokens",),
    "next_sentence": ("next_sentence", "pooler"),
    "pooler": ("pooler",),
    "pretraining": ("masked_tokens", "next_sentence", "pooler"),
    "sequence": ("classifier", "pooler"),
    "spans": ("spans",),
    "tokens": ("classifier",),
}
"""The parts of each head, as they are named in the parameters."""
POSITIONS = ("all", "tokens")


@dataclass(frozen=True)
class Config:
    """Sizes and rates of a BERT."""

    vocabulary: int = 30522
    """Tokens that the embedding and the output layer know."""
    context: int = 512
    """Maximal number of tokens in a sequence."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads per block."""
    width: int = 768
    """Size of the hidden states."""
    hidden: int = 3072
    """Hidden units of the MLPs."""
    types: int = 2
    """Token types, which tell the first text of a pair from the second; 0 for none."""
    head: str = "pooler"
    """Output of `apply`. features: last hidden states. pooler: these and the pooled first one. masked_tokens: logits of
    the vocabulary at every position. next_sentence: logits of (follows, does not). pretraining: both of these.
    sequence: logits of the classes. tokens: the same at every position. spans: start and end of an answer."""
    classes: int = 2
    """Classes of the heads sequence and tokens."""
    tied: bool = True
    """The output layer of masked_tokens is the token embedding (True), or has a matrix of its own."""
    dropout: float = 0.1
    """Dropout rate of the embeddings and both residual branches."""
    attention_dropout: float = 0.1
    """Dropout rate of the attention weights."""
    head_dropout: float | None = None
    """Dropout rate before the last layer of sequence, tokens and spans. None: `dropout`, for spans 0."""
    pooler_dropout: float = 0.0
    """Dropout rate before the pooler of the head sequence, as RoBERTa has it."""
    pooler_activation: str = "tanh"
    """Activation of the pooler, a name of `core.layers.ACTIVATIONS`."""
    activation: str = "gelu"
    """Activation of the MLPs and of masked_tokens, a name of `core.layers.ACTIVATIONS`."""
    eps: float = 1e-12
    """Epsilon of the norms."""
    padding_id: int = 0
    """Token id of the padding."""
    positions: str = "all"
    """all: positions are 0, 1, 2 ... tokens: only tokens that are no padding count, from padding_id + 1 on, and padding
    is at position padding_id, as in RoBERTa."""
    attention: str = "auto"
    """Method of `core.attention.attention`: auto, explicit or fused."""

    def __post_init__(self):
        for name in ("vocabulary", "context", "layers", "heads", "width", "hidden", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"bert: {name} is {getattr(self, name)}; expected at least 1")
        if self.types < 0:
            raise ValueError(f"bert: types is {self.types}; expected at least 0")
        if self.width % self.heads:
            raise ValueError(f"bert: width {self.width} is not divisible by {self.heads} heads")
        if self.head not in HEADS:
            raise ValueError(f"bert: no head '{self.head}'; there are {', '.join(HEADS)}")
        if self.positions not in POSITIONS:
            raise ValueError(f"bert: positions '{self.positions}' is none of {', '.join(POSITIONS)}")
        for name in ("dropout", "attention_dropout", "head_dropout", "pooler_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0.0 <= rate < 1.0:
                raise ValueError(f"bert: {name} {rate} is outside [0, 1)")
        if not 0 <= self.padding_id < self.vocabulary:
            raise ValueError(f"bert: padding_id {self.padding_id} is not one of {self.vocabulary} tokens")
        activation(self.activation)
        activation(self.pooler_activation)


PRESETS = {
    "tiny": Config(layers=2, heads=2, width=128, hidden=512),
    "mini": Config(layers=4, heads=4, width=256, hidden=1024),
    "small": Config(layers=4, heads=8, width=512, hidden=2048),
    "medium": Config(layers=8, heads=8, width=512, hidden=2048),
    "base": Config(),
    "large": Config(layers=24, heads=16, width=1024, hidden=4096),
    "chinese-base": Config(vocabulary=21128),
    "rbt3": Config(vocabulary=21128, layers=3),
}
"""tiny to medium: Turc et al. 2019 (arXiv:1908.08962). rbt3: three layers of chinese-base, Cui et al. 2021
(arXiv:1906.08101)."""


def spec(cfg: Config) -> dict:
    """N(0, 0.02^2) for matrices and embeddings, 0 for biases."""
    init = initializers.normal(0.02)
    rows = cfg.context + (cfg.padding_id + 1 if cfg.positions == "tokens" else 0)

    def dense(rows: int, axis: str | None) -> dict:
        return linear_spec(cfg.width, rows, init=init, axes=(axis, "embed"))

    def masked_tokens() -> dict:
        parts = {"bias": Param((cfg.vocabulary,), axes=("vocabulary",))}
        parts |= {"dense": dense(cfg.width, None), "norm": layer_norm_spec(cfg.width)}
        if not cfg.tied:
            parts["weight"] = Param((cfg.vocabulary, cfg.width), init, ("vocabulary", "embed"))
        return parts

    head = {
        "classifier": lambda: dense(cfg.classes, None),
        "masked_tokens": masked_tokens,
        "next_sentence": lambda: dense(2, None),
        "pooler": lambda: dense(cfg.width, None),
        "spans": lambda: dense(2, None),
    }
    parts = {
        "blocks": [block_spec(cfg.width, cfg.heads, cfg.hidden, init=init)] * cfg.layers,
        "norm": layer_norm_spec(cfg.width),
        "positions": embedding_spec(rows, cfg.width, init=init, axes=("time", "embed")),
        "tokens": embedding_spec(cfg.vocabulary, cfg.width, init=init, axes=("vocabulary", "embed")),
    }
    if cfg.types:
        parts["types"] = embedding_spec(cfg.types, cfg.width, init=init, axes=(None, "embed"))
    parts |= {name: head[name]() for name in HEADS[cfg.head]}
    return {name: parts[name] for name in sorted(parts)}


def _check(x: Tensor | tuple[Tensor, Tensor], mask: Tensor | None, cfg: Config) -> tuple[Tensor, Tensor | None, Tensor]:
    """(tokens, types or None, mask)."""
    tokens, types = x if isinstance(x, tuple) else (x, None)
    check_tensor("bert", tokens, "tokens")
    if tokens.ndim != 2:
        raise ValueError(f"bert: expected tokens of shape (batch, time), found {tuple(tokens.shape)}")
    if tokens.shape[1] > cfg.context:
        raise ValueError(f"bert: {tokens.shape[1]} tokens exceed the context of {cfg.context}")
    if types is not None and not cfg.types:
        raise ValueError("bert: token types for a net without them (types=0)")
    if types is not None and types.shape != tokens.shape:
        raise ValueError(f"bert: expected types of shape {tuple(tokens.shape)}, found {tuple(types.shape)}")
    mask = tokens != cfg.padding_id if mask is None else mask  # (batch, time)
    if mask.dtype != torch.bool or mask.shape != tokens.shape:
        expected = f"expected a mask of shape {tuple(tokens.shape)} of torch.bool"
        raise ValueError(f"bert: {expected}, found {tuple(mask.shape)} of {mask.dtype}")
    return tokens, types, mask


def _embed(params: dict, tokens: Tensor, types: Tensor | None, cfg: Config) -> Tensor:
    """The sum of the embeddings, before its norm: (batch, time, width)."""
    x = embedding(params["tokens"], tokens)  # (batch, time, width)
    if cfg.positions == "all":
        x = x + params["positions"]["weight"][: tokens.shape[1]]
    else:
        counted = (tokens != cfg.padding_id).long()  # (batch, time)
        x = x + embedding(params["positions"], counted.cumsum(1) * counted + cfg.padding_id)
    if not cfg.types:
        return x
    return x + (params["types"]["weight"][0] if types is None else embedding(params["types"], types))


def _head_dropout(cfg: Config) -> tuple[float, float]:
    """Dropout rates before the pooler and before the last layer."""
    if cfg.head not in ("sequence", "spans", "tokens"):
        return 0.0, 0.0
    default = 0.0 if cfg.head == "spans" else cfg.dropout
    first = cfg.pooler_dropout if cfg.head == "sequence" else 0.0
    return first, default if cfg.head_dropout is None else cfg.head_dropout


def _keys(key: Tensor | None, drops: bool) -> list[Tensor | None]:
    """One key per kind of dropout: attention weights, values, before the pooler, before the last layer."""
    return [None] * 4 if key is None or not drops else list(random.sites(key, 4).unbind(0))


def hidden_states(
    params: dict,
    x: Tensor | tuple[Tensor, Tensor],
    cfg: Config,
    *,
    mask: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> list[Tensor]:
    """The embeddings and the output of each block: layers + 1 tensors (batch, time, width). Arguments as in `apply`."""
    tokens, types, mask = _check(x, mask, cfg)
    drops = train and (cfg.dropout > 0 or cfg.attention_dropout > 0)
    if drops and key is None:
        rates = f"dropout {cfg.dropout} and attention_dropout {cfg.attention_dropout}"
        raise ValueError(f"bert: training with {rates} draws random numbers; pass key=")
    (batch, time), n, (weights_key, values_key, *_) = tokens.shape, cfg.layers, _keys(key, drops)
    first, *on_values = [identity] * (1 + 2 * n)
    on_weights = [None] * n
    if values_key is not None and cfg.dropout:
        first, *on_values = dropout_sites(values_key, 1 + 2 * n, (batch, time, cfg.width), cfg.dropout)
    if weights_key is not None and cfg.attention_dropout:
        on_weights = dropout_sites(weights_key, n, (batch, cfg.heads, time, time), cfg.attention_dropout)
    each = zip(params["blocks"], on_weights, on_values[0::2], on_values[1::2], strict=True)

    states = [first(layer_norm(params["norm"], _embed(params, tokens, types, cfg), eps=cfg.eps))]
    options = {"norm_first": False, "activation": cfg.activation, "eps": cfg.eps, "method": cfg.attention}
    options["mask"] = mask[:, None, None, :]  # (batch, 1, 1, time): every query sees the same keys
    for p, *functions in each:
        states.append(block(p, states[-1], cfg.heads, drops=tuple(functions), **options))
    return states


def features(params: dict, x: Tensor | tuple[Tensor, Tensor], cfg: Config, **options) -> Tensor:
    """Last hidden states, (batch, time, width), whatever the head. Arguments as in `apply`."""
    return hidden_states(params, x, cfg, **options)[-1]


def token_logits(params: dict, x: Tensor, cfg: Config) -> Tensor:
    """Logits of masked tokens: hidden states (..., width), all or only those of chosen places -> (..., vocabulary)."""
    p = params["masked_tokens"]
    x = layer_norm(p["norm"], activation(cfg.activation)(linear(p["dense"], x)), eps=cfg.eps)  # (..., width)
    table = params["tokens"]["weight"] if cfg.tied else p["weight"]  # (vocabulary, width)
    return linear({"bias": p["bias"], "weight": table}, x)  # (..., vocabulary)


def sentence_embeddings(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states over the mask, of norm 1: x (batch, time, width), mask (batch, time) -> (batch, width).
    Products are cosine similarities. Reimers and Gurevych 2019, "Sentence-BERT" (arXiv:1908.10084)."""
    total = torch.where(mask[..., None], x, 0).sum(1)  # (batch, width); its norm is free, so it need not be divided
    return torch.nn.functional.normalize(total, dim=-1)


def apply(
    params: dict,
    x: Tensor | tuple[Tensor, Tensor],
    cfg: Config,
    *,
    mask: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Output of the encoder and its head, `cfg.head`.

    Args:
        x: tokens, (batch, time) integers below `cfg.vocabulary`, or (tokens, types), both (batch, time); time up to
            `cfg.context`. Without types, all tokens are of type 0.
        mask: (batch, time) boolean, True at tokens; by default at all that are not `cfg.padding_id`.
        key: (2,) or one per example (batch, 2); needed in training with dropout.

    Returns:
        features (batch, time, width); masked_tokens (batch, time, vocabulary); next_sentence (batch, 2); sequence
        (batch, classes); tokens (batch, time, classes); spans (batch, time, 2), logits of start and end. pooler:
        {"features", "pooled"}, the latter (batch, width). pretraining: {"masked_tokens", "next_sentence"}.

    Raises:
        ValueError: tokens, types or mask of another shape, more tokens than the context, no key where one is needed.
    """
    x = features(params, x, cfg, mask=mask, key=key, train=train)  # (batch, time, width)
    return outputs(params, x, cfg, key=key, train=train)


def outputs(
    params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor | dict[str, Tensor]:
    """Output of the head alone. All but `features`, `masked_tokens`, `tokens` and `spans` see the first state only.

    Args:
        x: last hidden states, (batch, time, width).
    """
    first_rate, rate = _head_dropout(cfg)
    *_, first_key, last_key = _keys(key, train and first_rate + rate > 0)
    if cfg.head == "features":
        return x
    if cfg.head == "masked_tokens":
        return token_logits(params, x, cfg)
    if cfg.head in ("spans", "tokens"):
        return linear(params["spans" if cfg.head == "spans" else "classifier"], dropout(x, rate, last_key, train))
    first = dropout(x[:, 0], first_rate, first_key, train)  # (batch, width)
    pooled = activation(cfg.pooler_activation)(linear(params["pooler"], first))  # tanh(W h + b), (batch, width)
    if cfg.head == "pooler":
        return {"features": x, "pooled": pooled}
    if cfg.head == "sequence":
        return linear(params["classifier"], dropout(pooled, rate, last_key, train))  # (batch, classes)
    follows = linear(params["next_sentence"], pooled)  # (batch, 2)
    if cfg.head == "next_sentence":
        return follows
    return {"masked_tokens": token_logits(params, x, cfg), "next_sentence": follows}


LAYER = {
    "attn.proj": ("attention.output.dense",),
    "attn.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "mlp.down": ("output.dense",),
    "mlp.up": ("intermediate.dense",),
    "norm1": ("attention.output.LayerNorm",),
    "norm2": ("output.LayerNorm",),
}
PARTS = {
    "classifier": "classifier",
    "masked_tokens.dense": "cls.predictions.transform.dense",
    "masked_tokens.norm": "cls.predictions.transform.LayerNorm",
    "next_sentence": "cls.seq_relationship",
    "norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
    "spans": "qa_outputs",
}


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of transformers' Bert models, without the prefix "bert." of the encoder."""
    tables = {"positions": "position", "tokens": "word", "types": "token_type"}
    table = {f"{ours}.weight": Rename(f"embeddings.{theirs}_embeddings.weight") for ours, theirs in tables.items()}
    table |= {"masked_tokens.bias": Rename("cls.predictions.bias")}
    table |= {"masked_tokens.weight": Rename("cls.predictions.decoder.weight")}
    return bert_weights.entries(spec(cfg), table, PARTS, "encoder.layer", LAYER)


def published_config(config: dict, head: str | None = None) -> Config:
    """Our configuration from the `config.json` of transformers; head: by default the architecture's.

    Raises:
        WeightsError: another kind of model, or an entry with a value that makes another function, by name.
    """
    return config_of(Config, **bert_weights.encoder_fields(config, head, FAMILY))


CLASSES = {
    "pooler": "Model",
    "features": "Model",
    "masked_tokens": "ForMaskedLM",
    "next_sentence": "ForNextSentencePrediction",
    "pretraining": "ForPreTraining",
    "sequence": "ForSequenceClassification",
    "spans": "ForQuestionAnswering",
    "tokens": "ForTokenClassification",
}
FAMILY = bert_weights.Family(
    "BERT", "Bert", CLASSES, "cls.predictions.decoder", spec=spec, table=rename_table, config=published_config
)


def from_published(state: dict[str, Tensor], cfg: Config, key: Tensor | None = None) -> dict:
    """Parameters from the tensors of a published BERT; the heads that `cfg.head` does not use are logged.

    Args:
        key: parts of the head that the file does not have are drawn by it; without a key, that is an error.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen.
    """
    return bert_weights.fit(state, cfg, FAMILY, key)


def from_pretrained(
    source: str, head: str | None = None, *, classes: int | None = None, key: Tensor | None = None
) -> tuple[dict, Config]:
    """(params, config) of a published BERT: a local directory or a Hugging Face repository id.

    What is not used, what is drawn anew and an output layer other than the configuration says are logged as warnings.

    Args:
        head: one of `HEADS`; by default that of the file.
        classes: of the heads sequence and tokens; by default those of the file.
        key: draws the parts of the head that the file does not have; without a key, that is an error.
    """
    return bert_weights.load(source, FAMILY, head, classes, key)
