"""Recurrent language models: an embedding, a stack of recurrent layers, and the logits of the next token.

Mikolov et al. 2010, "Recurrent neural network based language model"; with LSTMs Zaremba et al. 2014 (arXiv:1409.2329),
in the form of pytorch/examples' word_language_model, or of char-rnn (Karpathy 2015), which embeds nothing:

    x_t = tokens[id_t];   h_t, state_t = layers(x_t, state_{t-1});   logits_t = W h_t + b

`tied`: W is the embedding (Press & Wolf 2017, arXiv:1608.05859; Inan et al. 2017, arXiv:1611.01462). `cutoffs`: an
adaptive softmax in place of W. A text of any length is read and written in pieces, each from the state after the one
before.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core import initializers, random, tree
from core.layers import (
    adaptive_cross_entropy,
    adaptive_log_softmax,
    adaptive_softmax_spec,
    dropout_sites,
    embedding,
    embedding_spec,
    linear,
    linear_spec,
    recurrent,
    recurrent_spec,
)
from core.layers import empty_state as empty_layers
from core.layers.checks import check_tensor
from core.layers.recurrent import SPECS
from nets.language.generation import open_texts
from nets.language.sampling import Options, all_done, next_token, noises, options_of
from nets.weights import Rename, WeightsError, fill

UNIFORM = initializers.uniform(-0.1, 0.1)


@dataclass(frozen=True)
class Config:
    """Sizes and rates of a recurrent language model."""

    vocabulary: int = 33278
    """Tokens that the net knows."""
    embedding: int | None = 200
    """Size of a token's vector. None: a vector with a 1 at the token's place (one-hot), as char-rnn has it."""
    width: int = 200
    """Hidden units of a layer."""
    layers: int = 2
    """Recurrent layers."""
    kind: str = "lstm"
    """rnn, gru, lstm or layer_norm_lstm."""
    dropout: float = 0.2
    """Dropout rate of the embedded tokens and of each layer's output."""
    variational: bool = False
    """One dropout mask for all steps of a sequence (Gal & Ghahramani 2016, arXiv:1512.05287), not one per step. What a
    layer hands to itself is not dropped."""
    tied: bool = False
    """The matrix of the logits is the embedding."""
    cutoffs: tuple[int, ...] = ()
    """Adaptive softmax, for tokens in order of frequency: first token of each cluster of rarer ones."""

    def __post_init__(self):
        for name in ("vocabulary", "embedding", "width", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"rnn: {name} is {value}; expected at least 1")
        if self.kind not in SPECS:
            raise ValueError(f"rnn: kind '{self.kind}' is unknown; expected one of {', '.join(SPECS)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"rnn: dropout {self.dropout} is outside [0, 1)")
        if self.tied and self.embedding != self.width:
            raise ValueError(f"rnn: tied needs embedding = width, found {self.embedding} and {self.width}")
        if self.tied and self.cutoffs:
            raise ValueError(
                "rnn: tied and cutoffs exclude each other; an adaptive softmax has no matrix of all tokens"
            )


MEDIUM, LARGE = {"embedding": 650, "width": 650, "dropout": 0.5}, {"embedding": 1500, "width": 1500, "dropout": 0.65}
PRESETS = {
    "char-rnn": Config(vocabulary=65, embedding=None, width=128, dropout=0.0),
    "tiny": Config(vocabulary=256, embedding=256, width=256, layers=1, dropout=0.0),
    "wlm-200": Config(),
    "wlm-200-tied": Config(tied=True),
    "wlm-650": Config(**MEDIUM),
    "wlm-650-tied": Config(**MEDIUM, tied=True),
    "wlm-1500": Config(**LARGE),
    "wlm-1500-tied": Config(**LARGE, tied=True),
}


def spec(cfg: Config) -> dict:
    """U(-0.1, 0.1) for the embedding and the matrix of the logits, whose bias is 0; layers as in `core.layers`."""
    head = linear_spec(cfg.width, cfg.vocabulary, init=UNIFORM, axes=("vocabulary", "in"))
    if cfg.cutoffs:
        head = adaptive_softmax_spec(cfg.width, cfg.vocabulary, cfg.cutoffs)
    d_in = cfg.vocabulary if cfg.embedding is None else cfg.embedding
    parts = {
        "head": {"bias": head["bias"]} if cfg.tied else head,
        "layers": recurrent_spec(cfg.kind, d_in, cfg.width, layers=cfg.layers),
    }
    if cfg.embedding is not None:
        parts["tokens"] = embedding_spec(cfg.vocabulary, cfg.embedding, init=UNIFORM)
    return parts


def embed(params: dict, tokens: Tensor, cfg: Config) -> Tensor:
    """Vectors of the tokens: integers (...) -> (..., embedding), or one-hot (..., vocabulary)."""
    if cfg.embedding is not None:
        return embedding(params["tokens"], tokens)
    one_hot = tokens[..., None] == torch.arange(cfg.vocabulary, device=tokens.device)  # (..., vocabulary)
    return one_hot.to(params["layers"][0]["hh"]["weight"].dtype)


def features(
    params: dict,
    tokens: Tensor,
    cfg: Config,
    *,
    state: list | None = None,
    lengths: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
    every_step: bool = False,
) -> tuple[Tensor, list]:
    """The last layer's hidden states, (batch, time, width), and the state. Arguments as in `apply`.

    every_step: the states after every step, (batch, time, width), in place of the last one.
    """
    check_tensor("rnn", tokens, "tokens")
    if tokens.ndim != 2:
        raise ValueError(f"rnn: expected tokens of shape (batch, time), found {tuple(tokens.shape)}")
    x = embed(params, tokens, cfg)  # (batch, time, embedding)
    drop = None
    if train and cfg.dropout > 0.0:
        if key is None:
            raise ValueError(f"rnn: training with dropout {cfg.dropout} draws random numbers; pass key=")
        of_tokens, of_layers = random.sites(key, 2).unbind(0)
        batch, steps = tokens.shape[0], 1 if cfg.variational else tokens.shape[1]
        if cfg.embedding is not None:
            x = dropout_sites(of_tokens, 1, (batch, steps, x.shape[-1]), cfg.dropout)[0](x)
        drops = dropout_sites(of_layers, cfg.layers, (batch, steps, cfg.width), cfg.dropout)

        def drop(i: int, x: Tensor) -> Tensor:
            return drops[i](x)

    start = None if state is None else tree.cast(state, x.dtype)
    h, after = recurrent(cfg.kind, params["layers"], x, start, lengths=lengths, drop=drop, every_step=every_step)
    if state is not None:
        after = tree.map(lambda new, old: new.to(old.dtype), after, state)
    return (h if drop is None else drop(cfg.layers - 1, h)), after


def logits(params: dict, x: Tensor) -> Tensor:
    """Logits of the next token: hidden states (..., width) -> (..., vocabulary); log-probabilities with cutoffs."""
    head = params["head"]
    if "tails" in head:
        return adaptive_log_softmax(head, x)
    return linear(head if "weight" in head else {**head, "weight": params["tokens"]["weight"]}, x)


def cross_entropy(params: dict, x: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of hidden states, in nats: (..., width), integers (...) -> (...).

    That of the logits; with cutoffs faster, as only the targets' log-probabilities are computed.
    """
    if "tails" in params["head"]:
        return adaptive_cross_entropy(params["head"], x, targets)
    log_p = torch.log_softmax(logits(params, x), -1)  # (..., vocabulary)
    return -log_p.gather(-1, targets[..., None]).squeeze(-1)


def apply(
    params: dict,
    tokens: Tensor,
    cfg: Config,
    *,
    state: list | None = None,
    lengths: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> tuple[Tensor, list]:
    """Logits of the next token at every position, and the state after the last one.

    Args:
        tokens: (batch, time) integers below `cfg.vocabulary`; time > 0.
        state: of the text so far, from a call before; None at the beginning of a text. It is computed with in the
            parameters' precision, and returned in its own.
        lengths: (batch,) tokens of each row; those after them are not read. All of the row if None.
        key: (2,) or one per example (batch, 2); needed in training with dropout.

    Returns:
        logits (batch, time, vocabulary), and a state per layer: `{"h": (batch, width)}`, with "c" in an LSTM.

    Raises:
        ValueError: tokens or a state of another shape, lengths out of range, no key where one is needed.
    """
    x, state = features(params, tokens, cfg, state=state, lengths=lengths, key=key, train=train)
    return logits(params, x), state


def empty_state(cfg: Config, batch: int, dtype: torch.dtype = torch.float32, device=None) -> list:
    """The state at the beginning of a text: zeros."""
    return empty_layers(cfg.kind, spec(cfg)["layers"], batch, dtype, device)


def step(params: dict, state: list, tokens: Tensor, position: Tensor | None, cfg: Config) -> tuple[Tensor, list]:
    """Logits of the next token (batch, vocabulary) after `tokens` (batch,), and the state; the position has no part.

    `lambda state, tokens, position: step(params, state, tokens, position, cfg)` is what `nets.language.decoding` and
    `nets.language.beam_search` call, with a state as their cache.
    """
    x, state = features(params, tokens[:, None], cfg, state=state)  # (batch, 1, width)
    return logits(params, x[:, 0]), state


def stream(
    params: dict,
    prompt: Tensor,
    cfg: Config,
    steps: int,
    *,
    state: list | None = None,
    lengths: Tensor | None = None,
    key: Tensor | None = None,
    step: Callable = step,
    options: Options = Options(),  # noqa: B008 # immutable
    **overrides,
) -> Iterator[Tensor]:
    """Yield the next token of each example, up to `steps` times; a text may be of any length.

    Args:
        prompt: (batch, time) integers, at least one per row. One row (1, time) with several keys (n, 2) is sampled n
            times.
        state: before the prompt. Default: the beginning of a text.
        lengths, key, options, overrides: as in `nets.language.generation.stream`.
        step: this module's `step`, or a compiled form of it.

    Yields:
        (batch,) int64.

    Raises:
        ValueError: at the first token: an empty prompt, lengths that do not fit it, or an option outside its range.
    """
    options = options_of(options, overrides)
    prompt, ends, progress = open_texts(prompt, lengths, key, options, cfg.vocabulary)
    state = tree.map(lambda x: x.expand(len(prompt), -1) if len(x) == 1 else x, state)
    of_rows = None if lengths is None else ends
    x, state = features(params, prompt, cfg, state=state, lengths=of_rows)  # (batch, time, width)
    scores = logits(params, x[torch.arange(len(prompt), device=prompt.device), ends - 1])  # (batch, vocabulary)
    token = None
    for _, noise in zip(range(steps), noises(key, options, len(prompt), cfg.vocabulary), strict=False):
        if token is not None:
            scores, state = step(params, state, token, None, cfg)
        token, progress = next_token(scores, progress, options, noise)  # (batch,)
        yield token
        if all_done(progress, options):
            return


def generate(params: dict, prompt: Tensor, cfg: Config, steps: int, **options) -> Tensor:
    """New tokens, (batch, steps), or as many as the longest text has. The options are those of `stream`."""
    if steps < 1:
        raise ValueError(f"rnn: steps is {steps}; expected at least 1")
    return torch.stack(list(stream(params, prompt, cfg, steps, **options)), dim=1)  # (batch, steps)


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of the RNNModel of pytorch/examples, whose layers are torch.nn's.

    Raises WeightsError: a part that this model does not have.
    """
    if cfg.kind == "layer_norm_lstm" or cfg.cutoffs:
        part = "an adaptive softmax" if cfg.cutoffs else cfg.kind
        raise WeightsError(f"rnn weights: that model has no {part}; expected rnn, gru or lstm, without cutoffs")
    table = {"head.bias": Rename("decoder.bias")}
    table |= {} if cfg.tied else {"head.weight": Rename("decoder.weight")}
    table |= {} if cfg.embedding is None else {"tokens.weight": Rename("encoder.weight")}
    for i in range(cfg.layers):
        for part in ("hh", "ih"):
            for leaf in ("bias", "weight"):
                table[f"layers.{i}.{part}.{leaf}"] = Rename(f"rnn.{leaf}_{part}_l{i}")
    return table


def from_published(state: dict[str, Tensor], cfg: Config) -> dict:
    """Parameters from the state dict of an RNNModel of pytorch/examples.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen.
    """
    state = dict(state)
    head = state.pop("decoder.weight", None) if cfg.tied else None
    params = fill(spec(cfg), state, rename_table(cfg), "rnn weights")
    if head is not None and not torch.equal(head.to(torch.float32), params["tokens"]["weight"]):
        raise WeightsError("rnn weights: 'decoder.weight' differs from 'encoder.weight'; the two are one if tied")
    return params


def published_config(state: dict[str, Tensor], **options) -> Config:
    """The configuration of such a state dict, by its names and shapes.

    options: what no shape tells, such as `dropout`.

    Raises WeightsError: it is not one of an RNNModel.
    """
    names = ("encoder.weight", "decoder.weight", "rnn.weight_hh_l0")
    if missing := [name for name in names if name not in state]:
        raise WeightsError(f"rnn weights: '{missing[0]}' is missing; expected the state dict of an RNNModel")
    tokens, head, hh = (state[name] for name in names)
    kinds = {1: "rnn", 3: "gru", 4: "lstm"}
    gates = hh.shape[0] // max(hh.shape[1], 1)
    if gates not in kinds:
        raise WeightsError(f"rnn weights: 'rnn.weight_hh_l0' has shape {tuple(hh.shape)}; expected 1, 3 or 4 gates")
    layers = sum(name.startswith("rnn.weight_hh_l") for name in state)
    sizes = {"vocabulary": len(tokens), "embedding": tokens.shape[1], "width": hh.shape[1], "layers": layers}
    tied = tokens.shape == head.shape and torch.equal(tokens, head)
    return replace(Config(kind=kinds[gates], tied=tied, **sizes), **options)
