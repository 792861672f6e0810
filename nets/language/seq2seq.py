"""Sequence to sequence with recurrent nets: an encoder, a decoder, and attention between them.

    h = encoder(E_x x);   s_0 = bridge(last h);   s_t = cell(E_y y_{t-1}, ..., s_{t-1});   p(y_t) = softmax(W r_t + b)

What else a step sees, and what r_t is made of, tells the papers apart; a and c are of `core.global_attention`:

- attention="none": Sutskever et al. 2014 (arXiv:1409.3215). The last state of the encoder is all that is known.
- "bahdanau": Bahdanau et al. 2015 (arXiv:1409.0473). c_t, by the state before, is an input of the first layer.
- "dot", "general": Luong et al. 2015 (arXiv:1508.04025). c_t, by the state after, is an input of the readout; with
  `input_feeding` (section 3.3) the readout is an input of the next step.

Where the recursion contains no attention it is one operator over the whole target; else a loop, without the products
that do not depend on the state: those of all y at once and, as W c_t = sum_j a_tj (W h_j), of the annotations.

A target begins with a start token; the logits at a position are of the token after it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from core import global_attention as attention
from core import initializers, random, tree
from core.layers import dropout_sites, embedding, embedding_spec, linear, linear_spec, recurrent, recurrent_spec
from core.recurrence import CELLS
from nets.language.scheduled_sampling import mixed_target

KINDS = ("gru", "lstm")
ATTENTIONS = ("none", "bahdanau", "dot", "general")
READOUTS = ("tanh", "linear")
SIZES = ("source_vocabulary", "target_vocabulary", "embedding", "width", "encoder_width", "layers", "context")


@dataclass(frozen=True)
class Config:
    """Sizes and rates of both recurrent nets."""

    source_vocabulary: int = 8000
    """Tokens that the encoder's embedding knows."""
    target_vocabulary: int = 8000
    """Tokens that the decoder's embedding and the output layer know."""
    embedding: int = 256
    """Size of the embedded tokens."""
    width: int = 512
    """Hidden units per layer of the decoder, and of the attention and the readout."""
    encoder_width: int = 512
    """Hidden units per layer and direction of the encoder."""
    layers: int = 1
    """Layers of the encoder, and of the decoder."""
    kind: str = "gru"
    """Cells: gru or lstm."""
    bidirectional: bool = True
    """Read the source in both directions."""
    attention: str = "bahdanau"
    """Attention to the source: none, bahdanau, dot or general (Luong's)."""
    input_feeding: bool = False
    """Feed each readout to the next step (Luong's attention, readout tanh)."""
    readout: str = "tanh"
    """Vector before the output layer. tanh: tanh(W [s; c]), Luong's, or s without attention. linear: [s; c; E_y y]."""
    dropout: float = 0.0
    """Dropout rate of the embedded tokens, between layers, and of the readout unless it is linear."""
    context: int = 128
    """Maximal number of tokens in a sentence."""
    padding_id: int = 0
    """Token id of the padding."""

    def __post_init__(self):
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"seq2seq: {name} is {getattr(self, name)}; expected at least 1")
        for name, known in (("kind", KINDS), ("attention", ATTENTIONS), ("readout", READOUTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"seq2seq: {name} '{getattr(self, name)}' is none of {', '.join(known)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"seq2seq: dropout {self.dropout} is outside [0, 1)")
        if not 0 <= self.padding_id < self.source_vocabulary:
            raise ValueError(f"seq2seq: padding_id {self.padding_id} is not one of {self.source_vocabulary} tokens")
        if self.attention == "dot" and self.width != self.annotation_width:
            widths = f"the decoder's width {self.width} and the annotations' {self.annotation_width}"
            raise ValueError(f"seq2seq: attention 'dot' needs equal widths, found {widths}")
        if self.input_feeding and not (self.attention in ("dot", "general") and self.readout == "tanh"):
            parts = f"attention '{self.attention}' and readout '{self.readout}'"
            raise ValueError(f"seq2seq: input_feeding needs attention dot or general and readout tanh, found {parts}")

    @property
    def annotation_width(self) -> int:
        """Width of the encoder's hidden states, both directions side by side."""
        return self.encoder_width * (2 if self.bidirectional else 1)


LUONG = {"embedding": 1000, "width": 1000, "encoder_width": 1000, "layers": 4, "kind": "lstm", "bidirectional": False}
PRESETS = {
    "tiny": Config(256, 256, embedding=64, width=128, encoder_width=64),
    "small": Config(embedding=256, width=512, encoder_width=256, dropout=0.3),
    # A well-known tutorial's for Multi30k (bentrevett, pytorch-seq2seq, 3), with its vocabularies.
    "multi30k": Config(7855, 5893, readout="linear", dropout=0.5),
    "luong": Config(50_000, 50_000, **LUONG, attention="general", input_feeding=True, dropout=0.2),  # section 4.1
}


def spec(cfg: Config) -> dict:
    """`encoder`, `decoder`, and `bridge` where the encoder's last state is not a state of the decoder.

    As in torch.nn: matrices and biases of n inputs are U(-1/sqrt(n), 1/sqrt(n)), of recurrent layers 1/sqrt(width), and
    embeddings N(0, 1). With a tenth of that, the attention takes several times as many steps to find its place.
    """

    def dense(d_in: int, d_out: int, bias: bool = True) -> dict:
        init = initializers.uniform(-(d_in**-0.5), d_in**-0.5)
        return linear_spec(d_in, d_out, bias=bias, init=init, bias_init=init)

    def table(rows: int) -> dict:
        return embedding_spec(rows, cfg.embedding)

    gates = (3 if cfg.kind == "gru" else 4) * cfg.width
    init = initializers.uniform(-(cfg.width**-0.5), cfg.width**-0.5)
    of_context = 0 if cfg.attention == "none" else cfg.annotation_width
    decoder = {"layers": recurrent_spec(cfg.kind, cfg.embedding, cfg.width, layers=cfg.layers)}
    decoder["tokens"] = table(cfg.target_vocabulary)
    if cfg.attention == "bahdanau":
        decoder["attention"] = attention.additive_spec(cfg.width, of_context, cfg.width)
        decoder["context"] = linear_spec(of_context, gates, bias=False, init=init)
    if cfg.attention == "general":
        decoder["attention"] = attention.general_spec(cfg.width, of_context)
    if cfg.input_feeding:
        decoder["feed"] = linear_spec(cfg.width, gates, bias=False, init=init)
    n = cfg.width + of_context
    if cfg.readout == "tanh" and of_context:
        decoder["readout"] = dense(n, cfg.width, bias=False)
    decoder["output"] = dense(n + cfg.embedding if cfg.readout == "linear" else cfg.width, cfg.target_vocabulary)
    sizes = (cfg.embedding, cfg.encoder_width)
    layers = recurrent_spec(cfg.kind, *sizes, layers=cfg.layers, bidirectional=cfg.bidirectional)
    parts = {"decoder": dict(sorted(decoder.items()))}
    parts["encoder"] = {"layers": layers, "tokens": table(cfg.source_vocabulary)}
    if cfg.bidirectional or cfg.encoder_width != cfg.width:
        names = ("h",) if cfg.kind == "gru" else ("c", "h")
        parts["bridge"] = [{part: dense(cfg.annotation_width, cfg.width) for part in names}] * cfg.layers
    return dict(sorted(parts.items()))


def _check(name: str, ids: Tensor, cfg: Config) -> None:
    if ids.ndim != 2 or not 0 < ids.shape[1] <= cfg.context:
        expected = f"expected {name} tokens of shape (batch, time), of time 1 to {cfg.context}, the context"
        raise ValueError(f"seq2seq: {expected}, found {tuple(ids.shape)}")


def _keys(key: Tensor | None, cfg: Config, train: bool) -> list[Tensor | None]:
    """One key per kind of dropout: two of the encoder, three of the decoder. None without dropout."""
    if not train or not cfg.dropout:
        return [None] * 5
    if key is None:
        raise ValueError(f"seq2seq: training with dropout {cfg.dropout} draws random numbers; pass key=")
    return list(random.sites(key, 5).unbind(0))


def _sites(key: Tensor | None, n: int, shape: tuple[int, ...], cfg: Config) -> list[Callable]:
    return [lambda x: x] * n if key is None or not n else dropout_sites(key, n, shape, cfg.dropout)


def encode(params: dict, source: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> dict:
    """Read a source, (batch, time) integers that end with `cfg.padding_id`.

    Args:
        key: (2,) or one per example (batch, 2); needed in training with dropout. `decode` draws other masks from it.

    Returns:
        `annotations` (batch, time, annotation width), the last layer's hidden states, 0 after the end; `mask`
        (batch, time), True up to the end; `states`, the decoder's first state, one per layer.

    Raises:
        ValueError: source of another shape or longer than `cfg.context`, no key where one is needed.
    """
    _check("source", source, cfg)
    p, (batch, time), (tokens_key, layers_key, *_) = params["encoder"], source.shape, _keys(key, cfg, train)
    (drop_tokens,) = _sites(tokens_key, 1, (batch, time, cfg.embedding), cfg)
    drops = _sites(layers_key, cfg.layers - 1, (batch, time, cfg.annotation_width), cfg)
    positions = torch.arange(time, device=source.device)  # (time,)
    lengths = torch.where(source != cfg.padding_id, positions + 1, 0).amax(1)  # (batch,)
    x = drop_tokens(embedding(p["tokens"], source))  # (batch, time, embedding)
    options = {"lengths": lengths, "drop": lambda i, x: drops[i](x)}
    annotations, ends = recurrent(cfg.kind, p["layers"], x, **options)  # (batch, time, annotation width)
    if cfg.bidirectional:  # (batch, 2 encoder width)
        ends = [tree.map(lambda h, back: torch.cat([h, back], -1), end["forward"], end["backward"]) for end in ends]
    if "bridge" in params:  # s_0 = tanh(W [h of both ends] + b); of an LSTM's cells without the tanh
        each = zip(params["bridge"], ends, strict=True)
        ends = [{part: linear(layer[part], x) for part, x in end.items()} for layer, end in each]  # (batch, width)
        ends = [end | {"h": torch.tanh(end["h"])} for end in ends]
    return {"annotations": annotations, "mask": positions < lengths[:, None], "states": ends}


def start(params: dict, memory: dict, cfg: Config) -> dict:
    """Initial state of `step`.

    Args:
        memory: from `encode`.

    Returns:
        tree of tensors, batch leading in each: `past`, the decoder's states and perhaps the readout; `shared`, what the
        attention needs of the source. To reorder or repeat examples, index every leaf.
    """
    p, past, shared = params["decoder"], {"states": memory["states"]}, {}
    if cfg.input_feeding:
        past = {"fed": torch.zeros_like(memory["states"][-1]["h"])} | past
    if cfg.attention != "none":
        h = memory["annotations"]  # (batch, source time, annotation width)
        shared = {"annotations": h, "keys": h, "mask": memory["mask"]}
    if cfg.attention == "general":
        shared["keys"] = attention.general_keys(p["attention"], h)  # (batch, source time, width)
    if cfg.attention == "bahdanau":
        shared["keys"] = attention.additive_keys(p["attention"], h)  # (batch, source time, width)
        shared["gates"] = linear(p["context"], h)  # W h_j, (batch, source time, gates)
    return {"past": past, "shared": {part: shared[part] for part in sorted(shared)}}


def _attend(p: dict, query: Tensor, shared: dict, cfg: Config, of: str) -> tuple[Tensor, Tensor]:
    """Contexts of `shared[of]`, (rows, n, its width), and weights (rows, n, source time) of queries (rows, n, width).

    Consecutive rows may share a source, as the beams of a sentence do: they become consecutive queries.
    """
    queries = query.reshape(shared["keys"].shape[0], -1, cfg.width)  # (sentences, queries, width)
    if cfg.attention == "bahdanau":
        scores = attention.additive_scores(p["attention"], queries, shared["keys"])  # (sentences, queries, source time)
    else:
        scores = attention.dot_scores(queries, shared["keys"])
    context, weights = attention.attend(scores, shared[of], shared["mask"])
    return context.reshape(*query.shape[:2], -1), weights.reshape(*query.shape[:2], -1)


def _advance(p: dict, gates: Tensor, past: dict, shared: dict, cfg: Config, drops: list) -> tuple[dict, Tensor | None]:
    """A step of the recursion: the new past, and the attention (rows, 1, source time) if the step needed it.

    Args:
        gates: (rows, gates), the token's part of the first layer's pre-activations, W_y y + b.
        drops: dropout of the output of each layer but the last.
    """
    weights, h, states = None, past["states"][-1]["h"], []
    if cfg.attention == "bahdanau":
        context, weights = _attend(p, h.unsqueeze(1), shared, cfg, "gates")  # sum_j a_j (W h_j), (rows, 1, gates)
        gates = gates + context.squeeze(1)
    if cfg.input_feeding:
        gates = gates + linear(p["feed"], past["fed"])
    for i, (layer, state) in enumerate(zip(p["layers"], past["states"], strict=True)):
        gates = linear(layer["ih"], drops[i - 1](h)) if i else gates
        h, *cells = CELLS[cfg.kind](layer, gates, (state["h"], *(state[part] for part in state if part == "c")))
        states.append({"c": cells[0], "h": h} if cells else {"h": h})
    if not cfg.input_feeding:
        return {"states": states}, weights
    fed, weights = _readout(p, h.unsqueeze(1), None, None, shared, cfg)  # (rows, 1, width)
    return {"fed": fed.squeeze(1), "states": states}, weights


def _readout(
    p: dict, s: Tensor, y: Tensor | None, weights: Tensor | None, shared: dict, cfg: Config
) -> tuple[Tensor, Tensor | None]:
    """Vectors before the output layer of hidden states s and embedded tokens y (rows, time, n), and the attention.

    weights: (rows, time, source time); found here if None.
    """
    context = None
    if weights is not None:
        grouped = weights.reshape(shared["keys"].shape[0], -1, weights.shape[-1])  # (sentences, queries, source time)
        context = (grouped @ shared["annotations"]).reshape(*s.shape[:2], -1)  # c = sum_j a_j h_j
    elif cfg.attention != "none":
        context, weights = _attend(p, s, shared, cfg, "annotations")  # (rows, time, annotation width)
    x = s if context is None else torch.cat([s, context], -1)  # [s; c]
    if cfg.readout == "linear":
        return torch.cat([x, y], -1), weights
    return torch.tanh(linear(p["readout"], x)) if "readout" in p else x, weights


def decode(
    params: dict, target: Tensor, memory: dict, cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """Logits of each next token, given the target so far (teacher forcing).

    Args:
        target: (batch, time) integers.
        memory: from `encode`.
        key: as in `encode`.

    Returns:
        logits, (batch, time, target vocabulary).

    Raises:
        ValueError: as `encode`, and for a memory of another batch.
    """
    return _decode(params, target, memory, cfg, key, train)[0]


def _decode(
    params: dict, target: Tensor, memory: dict, cfg: Config, key: Tensor | None, train: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits, and the attention (batch, time, source time)."""
    _check("target", target, cfg)
    if memory["mask"].shape[0] != target.shape[0]:
        raise ValueError(f"seq2seq: expected a memory of {target.shape[0]} rows, found {memory['mask'].shape[0]}")
    p, (batch, time), (*_, tokens_key, layers_key, readout_key) = (
        params["decoder"],
        target.shape,
        _keys(key, cfg, train),
    )
    (drop_tokens,) = _sites(tokens_key, 1, (batch, time, cfg.embedding), cfg)
    between = _sites(layers_key, cfg.layers - 1, (batch, time, cfg.width), cfg)
    (drop_readout,) = _sites(None if cfg.readout == "linear" else readout_key, 1, (batch, time, cfg.width), cfg)
    cache = start(params, memory, cfg)
    past, shared, weights = cache["past"], cache["shared"], None
    y = drop_tokens(embedding(p["tokens"], target))  # (batch, time, embedding)
    if cfg.attention != "bahdanau" and not cfg.input_feeding:
        s, _ = recurrent(cfg.kind, p["layers"], y, past["states"], drop=lambda i, x: between[i](x))
        x, weights = _readout(p, s, y, None, shared, cfg)  # (batch, time, n)
        return linear(p["output"], drop_readout(x)), weights
    outs, maps = [], []
    factors = [drop(y.new_ones(batch, time, cfg.width)).unbind(1) for drop in between]  # of each layer, by step
    for t, gates in enumerate(linear(p["layers"][0]["ih"], y).unbind(1)):  # W_y y + b, (batch, gates)
        past, weights = _advance(p, gates, past, shared, cfg, [lambda x, f=f[t]: x * f for f in factors])
        outs.append(past["fed"] if cfg.input_feeding else past["states"][-1]["h"])
        maps.append(weights)
    x, weights = torch.stack(outs, 1), torch.cat(maps, 1)  # (batch, time, width), (batch, time, source time)
    x = x if cfg.input_feeding else _readout(p, x, y, weights, shared, cfg)[0]
    return linear(p["output"], drop_readout(x)), weights


def apply(
    params: dict,
    x: tuple[Tensor, Tensor],
    cfg: Config,
    *,
    forced: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor:
    """Logits of each next target token, (batch, target time, target vocabulary).

    Args:
        x: source and target, (batch, source time) and (batch, target time) integers, filled with `cfg.padding_id`.
        forced: (batch, target time) boolean: where False, the net reads its own token in place of the target's, see
            `nets.language.scheduled_sampling`. It reads the whole target if None.
        key: (2,) or one per example (batch, 2); needed in training with dropout.

    Raises:
        ValueError: as `encode` and `decode`.
    """
    source, target = x
    memory = encode(params, source, cfg, key=key, train=train)
    if forced is not None:
        cache = start(params, memory, cfg)
        target = mixed_target(stepper(params, cfg), cache["past"], target, forced, cache["shared"])
    return decode(params, target, memory, cfg, key=key, train=train)


def attention_maps(params: dict, x: tuple[Tensor, Tensor], cfg: Config) -> dict[str, Tensor]:
    """Attention weights `cross`, (batch, 1, 1, target time, source time) as `nets.language.transformer` has them.

    x: as in `apply`. Each row sums to 1, over the tokens of the source; without attention there is no `cross`.
    """
    source, target = x
    _, weights = _decode(params, target, encode(params, source, cfg), cfg, None, False)
    return {} if weights is None else {"cross": weights[:, None, None]}


# Decoding, a token at a time.


def step(params: dict, cache: dict, tokens: Tensor, position: Tensor | None, cfg: Config) -> tuple[Tensor, dict]:
    """Logits of the next token of each example, given those before it.

    Args:
        cache: from `start`. `past` and tokens may have consecutive rows per example (beams) while `shared` has one.
        tokens: (batch,) the last tokens. Their position is not used.

    Returns:
        logits (batch, target vocabulary) and the new cache.
    """
    if tokens.ndim != 1:
        raise ValueError(f"seq2seq: expected tokens of shape (batch,), found {tuple(tokens.shape)}")
    p, shared = params["decoder"], cache["shared"]
    y = embedding(p["tokens"], tokens)  # (batch, embedding)
    gates, same = linear(p["layers"][0]["ih"], y), [lambda x: x] * (cfg.layers - 1)
    past, weights = _advance(p, gates, cache["past"], shared, cfg, same)
    if cfg.input_feeding:
        x = past["fed"]
    else:
        x = _readout(p, past["states"][-1]["h"].unsqueeze(1), y.unsqueeze(1), weights, shared, cfg)[0].squeeze(1)
    return linear(p["output"], x), {"past": past, "shared": shared}


def stepper(params: dict, cfg: Config, step: Callable = step) -> Callable:
    """`step`, or a compiled form of it, as `nets.language.decoding` and `nets.language.beam_search` call it.

    `cache = start(params, encode(params, source, cfg), cfg)`, then
    `beam_search(stepper(params, cfg), cache["past"], first, shared=cache["shared"], beams=5, ...)`.
    """

    def call(past: dict, tokens: Tensor, position: Tensor, shared: dict) -> tuple[Tensor, dict]:
        scores, cache = step(params, {"past": past, "shared": shared}, tokens, position, cfg)
        return scores, cache["past"]

    return call
