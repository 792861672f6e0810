"""GPT and GPT-2: decoder-only transformers that predict the next token.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training" (GPT: the norm after each residual
sum) and Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2: the norm before each branch,
one more at the end). In both the output layer is the token embedding again:

    h = tokens[ids] + positions[0..T);   h = block_i(h);   logits = norm(h) tokensᵀ
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core import initializers, random
from core.attention import Cache, empty_cache
from core.layers import dropout_sites, embedding, embedding_spec, layer_norm, layer_norm_spec
from nets.blocks.transformer_block import block, block_spec, cached_block
from nets.language.decoding import choose
from nets.weights import Rename, WeightsError, fill, read, read_config


@dataclass(frozen=True)
class Config:
    vocabulary: int = 50257
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.1
    bias: bool = True
    norm_first: bool = True  # False is GPT of 2018
    attention: str = "auto"  # as in core.attention.attention

    def __post_init__(self):
        for name in ("vocabulary", "context", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"gpt2: {name} is {getattr(self, name)}; expected at least 1")
        if self.width % self.heads:
            raise ValueError(f"gpt2: width {self.width} is not divisible by {self.heads} heads")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"gpt2: dropout {self.dropout} is outside [0, 1)")


PRESETS = {
    "tiny": Config(vocabulary=256, context=64, layers=4, heads=4, width=128, dropout=0.0, bias=False),
    "nanogpt-cpu": Config(vocabulary=65, context=64, layers=4, heads=4, width=128, dropout=0.0, bias=False),
    "nanogpt-gpu": Config(vocabulary=65, context=256, layers=6, heads=6, width=384, dropout=0.2, bias=False),
    "gpt": Config(vocabulary=40478, context=512, norm_first=False),
    "gpt2": Config(),
    "gpt2-medium": Config(layers=24, heads=16, width=1024),
    "gpt2-large": Config(layers=36, heads=20, width=1280),
    "gpt2-xl": Config(layers=48, heads=25, width=1600),
}


def spec(cfg: Config) -> dict:
    """Normal(0, 0.02) everywhere; matrices that write into the residual stream get 0.02 / sqrt(2 layers) (GPT-2)."""
    init = initializers.normal(0.02)
    residual = initializers.normal(0.02 / math.sqrt(2 * cfg.layers)) if cfg.norm_first else init
    one_block = block_spec(cfg.width, cfg.heads, 4 * cfg.width, bias=cfg.bias, init=init, residual_init=residual)
    parts = {
        "blocks": [one_block] * cfg.layers,
        "positions": embedding_spec(cfg.context, cfg.width, init=init, axes=("time", "embed")),
        "tokens": embedding_spec(cfg.vocabulary, cfg.width, init=init, axes=("vocabulary", "embed")),
    }
    if cfg.norm_first:
        parts["norm"] = layer_norm_spec(cfg.width, bias=cfg.bias)
    return {name: parts[name] for name in sorted(parts)}


def _check_tokens(tokens: Tensor) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"gpt2: expected tokens of shape (batch, time), found {tuple(tokens.shape)}")


def _check_length(cfg: Config, time: int) -> None:
    if time > cfg.context:
        raise ValueError(f"gpt2: {time} tokens are more than the context of {cfg.context}")


def features(params: dict, tokens: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """The last hidden layer. tokens: (batch, time) integers -> (batch, time, width)."""
    _check_tokens(tokens)
    _check_length(cfg, tokens.shape[1])
    dropping = train and cfg.dropout > 0.0
    if dropping and key is None:
        raise ValueError(f"gpt2: training with dropout {cfg.dropout} draws random numbers; pass key=")
    x = embedding(params["tokens"], tokens) + params["positions"]["weight"][: tokens.shape[1]]
    drops = [None] * cfg.layers
    if dropping:
        weights_key, values_key = random.sites(key, 2).unbind(0)
        batch, time = tokens.shape
        on_weights = dropout_sites(weights_key, cfg.layers, (batch, cfg.heads, time, time), cfg.dropout)
        first, *on_values = dropout_sites(values_key, 1 + 2 * cfg.layers, tuple(x.shape), cfg.dropout)
        drops = list(zip(on_weights, on_values[0::2], on_values[1::2], strict=True))
        x = first(x)
    for p, drop in zip(params["blocks"], drops, strict=True):
        x = block(
            p,
            x,
            cfg.heads,
            norm_first=cfg.norm_first,
            causal=True,
            drops=drop,
            method=cfg.attention,
        )
    return layer_norm(params["norm"], x) if cfg.norm_first else x


def logits(params: dict, x: Tensor) -> Tensor:
    """Hidden states (..., width) -> scores of the next token (..., vocabulary)."""
    return x @ params["tokens"]["weight"].T


def apply(params: dict, tokens: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Scores of each next token.

    Args:
        tokens: (batch, time) integers below `cfg.vocabulary`; time at most `cfg.context`.
        key: (2,) or one an example (batch, 2); needed in training if there is dropout.

    Returns:
        logits, (batch, time, vocabulary).
    """
    return logits(params, features(params, tokens, cfg, key=key, train=train))


def empty_caches(params: dict, cfg: Config, batch: int, places: int) -> list[Cache]:
    """One cache a layer with room for `places` tokens, of the parameters' dtype and device."""
    _check_length(cfg, places)
    like = params["tokens"]["weight"]
    depth = cfg.width // cfg.heads
    return [empty_cache(batch, cfg.heads, places, depth, like.dtype, like.device) for _ in range(cfg.layers)]


def decode(
    params: dict, tokens: Tensor, caches: list[Cache], position: Tensor, cfg: Config, *, donate: bool = False
) -> tuple[Tensor, list[Cache]]:
    """Scores after the next tokens, given all tokens before them in the caches.

    Args:
        tokens: (batch, time); a whole prompt at position 0, later one token at a time.
        position: (batch,) the place of each example's first new token.
        donate: the buffers of the caches may be overwritten; they must not be used again. Otherwise they are copied.

    Returns:
        logits (batch, time, vocabulary) and the new caches.

    With `cfg.attention` "auto" and uncompiled, attention is torch's fused kernel; "explicit" vmaps on the CPU too.
    """
    # Few kernels count most in eager mode; compiled, the explicit form is faster for a single query on a CPU.
    method = "fused" if cfg.attention == "auto" and not torch.compiler.is_compiling() else cfg.attention
    options = {"norm_first": cfg.norm_first, "method": method, "donate": donate}
    places = position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    x = embedding(params["tokens"], tokens) + embedding(params["positions"], places)
    updated = []
    for p, cache in zip(params["blocks"], caches, strict=True):
        x, cache = cached_block(p, x, cache, position, cfg.heads, **options)
        updated.append(cache)
    x = layer_norm(params["norm"], x) if cfg.norm_first else x
    return logits(params, x), updated


def _restart(history: Tensor, lengths: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The last `keep` tokens of each example (fewer where there are fewer), moved to the front, and how many."""
    kept = lengths.clamp(max=keep)
    index = (lengths - kept)[:, None] + torch.arange(keep, device=history.device)
    return history.gather(1, index.clamp(max=history.shape[1] - 1)), kept


def stream(
    params: dict,
    prompt: Tensor,
    cfg: Config,
    steps: int,
    *,
    lengths: Tensor | None = None,
    key: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    decode: Callable = decode,
) -> Iterator[Tensor]:
    """Yield the next token of each example, `steps` times, through a key-value cache.

    When the longest example has filled the context, the last half of each (more, if few tokens are to come) is read
    again as a new prompt, so a text may go on for longer than the context. Up to there an example gets the same tokens
    in a batch of any size; past it, this depends on the longest one.

    Args:
        prompt: (batch, time) integers, at least one a row; of one longer than the context, the end is read.
        lengths: (batch,) how many tokens of each row are its prompt, if not all; what lies behind is ignored.
        key: (2,); token t of example i is drawn from `fold_in(fold_in(key, t), i)`. Or one key an example, (batch, 2).
        temperature, top_k, top_p: as in `nets.language.decoding.choose`; temperature 0 is greedy.
        decode: this module's `decode`, or a compiled form of it.

    Yields:
        (batch,) int64.

    Raises:
        ValueError: at the first token: an empty prompt, lengths that do not fit it, or an option outside its range.
    """
    _check_tokens(prompt)
    batch, time = prompt.shape
    lengths = torch.full((batch,), time, device=prompt.device) if lengths is None else lengths.to(torch.int64)
    if lengths.shape != (batch,) or int(lengths.max()) > time:
        raise ValueError(f"gpt2: expected {batch} lengths of at most {time}, found {lengths.tolist()}")
    if int(lengths.min()) < 1:
        raise ValueError("gpt2: generation needs a prompt of at least one token")
    prompt = prompt.to(torch.int64)
    history = torch.cat([prompt, prompt.new_zeros(batch, steps)], dim=1)
    rows = torch.arange(batch, device=prompt.device)
    # The last token that is drawn is never read, so it needs no place.
    places = min(cfg.context, time + steps - 1)
    room = places - min(steps - 1, places // 2)  # how much of the past fits beside the tokens to come
    restarts = time + steps - 1 > places
    token, longest = prompt[:, 0], places  # as if the cache were full, so that the prompt is read first
    for t in range(steps):
        if longest == places:
            window, position = (prompt, lengths) if t == 0 and time <= places else _restart(history, lengths, room)
            start = torch.zeros_like(position)
            caches = empty_caches(params, cfg, batch, places)
            scores, caches = decode(params, window, caches, start, cfg, donate=True)
            scores, longest = scores[rows, position - 1], int(position.max())
        else:
            scores, caches = decode(params, token[:, None], caches, position, cfg, donate=True)
            scores, position, longest = scores[:, -1], position + 1, longest + 1
        step_key = None if key is None else random.fold_in(key, t)
        token = choose(scores, step_key, temperature=temperature, top_k=top_k, top_p=top_p)
        if restarts:
            history[rows, lengths] = token
            lengths = lengths + 1
        yield token


def generate(params: dict, prompt: Tensor, cfg: Config, steps: int, **options) -> Tensor:
    """The new tokens, (batch, steps); the options are those of `stream`."""
    if steps < 1:
        raise ValueError(f"gpt2: steps is {steps}; expected at least 1")
    return torch.stack(list(stream(params, prompt, cfg, steps, **options)), dim=1)


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of transformers' GPT2Model and OpenAIGPTModel, whose matrices are stored transposed."""
    tokens, positions = ("wte", "wpe") if cfg.norm_first else ("tokens_embed", "positions_embed")
    table = {"tokens.weight": Rename(f"{tokens}.weight"), "positions.weight": Rename(f"{positions}.weight")}
    layers = {
        "attn.proj": "attn.c_proj",
        "attn.qkv": "attn.c_attn",
        "mlp.down": "mlp.c_proj",
        "mlp.up": "mlp.c_fc",
        "norm1": "ln_1",
        "norm2": "ln_2",
    }
    for i in range(cfg.layers):
        for ours, theirs in layers.items():
            table[f"blocks.{i}.{ours}.weight"] = Rename(f"h.{i}.{theirs}.weight", transposed="." in ours)
            table[f"blocks.{i}.{ours}.bias"] = Rename(f"h.{i}.{theirs}.bias")
    if cfg.norm_first:
        table |= {"norm.weight": Rename("ln_f.weight"), "norm.bias": Rename("ln_f.bias")}
    return table


def published_config(config: dict) -> Config:
    """Our configuration from the `config.json` of transformers.

    Raises:
        WeightsError: another kind of model, or a variant that computes something else.
    """
    kind = config.get("model_type")
    if kind not in ("gpt2", "openai-gpt"):
        raise WeightsError(f"the configuration is of model_type '{kind}', expected 'gpt2' or 'openai-gpt'")
    fixed = {
        "activation_function": "gelu_new",
        "afn": "gelu",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise WeightsError(f"the configuration has {name}={config[name]!r}; only {value!r} is supported")
    if config.get("n_inner") not in (None, 4 * config.get("n_embd", 768)):
        raise WeightsError(f"the configuration has n_inner={config['n_inner']}; expected 4 * n_embd")
    base = PRESETS["gpt2" if kind == "gpt2" else "gpt"]
    ours = {"vocab_size": "vocabulary", "n_positions": "context", "n_layer": "layers", "n_head": "heads"}
    ours |= {"n_embd": "width", "resid_pdrop": "dropout"}
    for name in ours:
        if not isinstance(config.get(name, 1), (int, float) if name == "resid_pdrop" else int):
            raise WeightsError(f"the configuration has {name}={config[name]!r}; expected a number")
    try:
        return replace(base, **{mine: config[theirs] for theirs, mine in ours.items() if theirs in config})
    except ValueError as error:
        raise WeightsError(f"the configuration makes no model: {error}") from error


def from_published(state: dict[str, Tensor], cfg: Config) -> dict:
    """Parameters from the tensors of a published GPT or GPT-2.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen.
    """
    state = {name.removeprefix("transformer."): value for name, value in state.items()}
    # Old files also hold the causal mask; it is no parameter.
    state = {n: x for n, x in state.items() if not n.endswith((".attn.bias", ".attn.masked_bias"))}
    head = state.pop("lm_head.weight", None)
    params = fill(spec(cfg), state, rename_table(cfg), "GPT-2 weights" if cfg.norm_first else "GPT weights")
    if head is not None and not torch.equal(head.to(torch.float32), params["tokens"]["weight"]):
        raise WeightsError("GPT weights: 'lm_head.weight' differs from the token embedding; the two are one here")
    return params


def from_pretrained(source: str) -> tuple[dict, Config]:
    """(params, config) of a published GPT or GPT-2: a local directory or a Hugging Face repository id."""
    cfg = published_config(read_config(source))
    return from_published(read(source), cfg), cfg
