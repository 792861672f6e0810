"""GPT and GPT-2: decoder-only transformers that predict the next token.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training" (GPT: the norm after each residual
sum) and Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2: the norm before each branch,
one more at the end). In both the output layer is the token embedding again:

    h = tokens[ids] + positions[0..T);   h = block_i(h);   logits = norm(h) tokensᵀ

In 60 lines of plain torch: `nets/explained/gpt2.py`.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core import initializers, random
from core.attention import Cache, empty_cache
from core.layers import dropout_sites, embedding, embedding_spec, layer_norm, layer_norm_spec, linear
from core.layers.checks import check_tensor
from nets.blocks.transformer_block import block, block_spec, cached_block
from nets.language import generation
from nets.weights import Rename, WeightsError, config_of, fill, read, read_config


@dataclass(frozen=True)
class Config:
    """Sizes and rates of a GPT."""

    vocabulary: int = 50257
    """Tokens that the embedding and the output layer know."""
    context: int = 1024
    """Maximal number of tokens in a sequence."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads per block."""
    width: int = 768
    """Size of the hidden states; the MLPs have four times as many hidden units."""
    dropout: float = 0.1
    """Dropout rate of the embeddings, the attention weights and both residual branches."""
    bias: bool = True
    """Biases in the linear layers and the norms."""
    norm_first: bool = True
    """Norm before each branch (GPT-2) or after each residual sum (GPT of 2018)."""
    attention: str = "auto"
    """Method of `core.attention.attention`: auto, explicit or fused."""

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
    """N(0, 0.02^2) everywhere; GPT-2's matrices that write into the residual stream get 0.02 / sqrt(2 layers)."""
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
    check_tensor("gpt2", tokens, "tokens")
    if tokens.ndim != 2:
        raise ValueError(f"gpt2: expected tokens of shape (batch, time), found {tuple(tokens.shape)}")


def _check_length(cfg: Config, time: int) -> None:
    if time > cfg.context:
        raise ValueError(f"gpt2: {time} tokens exceed the context of {cfg.context}")


def features(params: dict, tokens: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Last hidden states: tokens (batch, time) integers -> (batch, time, width). Arguments as in `apply`."""
    _check_tokens(tokens)
    _check_length(cfg, tokens.shape[1])
    dropping = train and cfg.dropout > 0.0
    if dropping and key is None:
        raise ValueError(f"gpt2: training with dropout {cfg.dropout} draws random numbers; pass key=")
    batch, time = tokens.shape
    x = embedding(params["tokens"], tokens) + params["positions"]["weight"][:time]  # (batch, time, width)
    drops = [None] * cfg.layers
    if dropping:
        weights_key, values_key = random.sites(key, 2).unbind(0)
        on_weights = dropout_sites(weights_key, cfg.layers, (batch, cfg.heads, time, time), cfg.dropout)
        first, *on_values = dropout_sites(values_key, 1 + 2 * cfg.layers, tuple(x.shape), cfg.dropout)
        drops = list(zip(on_weights, on_values[0::2], on_values[1::2], strict=True))
        x = first(x)
    options = {"norm_first": cfg.norm_first, "causal": True, "method": cfg.attention}
    for p, drop in zip(params["blocks"], drops, strict=True):
        x = block(p, x, cfg.heads, drops=drop, **options)
    return layer_norm(params["norm"], x) if cfg.norm_first else x


def logits(params: dict, x: Tensor) -> Tensor:
    """Logits of the next token: hidden states (..., width) -> (..., vocabulary)."""
    return linear(params["tokens"], x)  # (..., vocabulary)


def apply(params: dict, tokens: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of the next token at every position.

    Args:
        tokens: (batch, time) integers below `cfg.vocabulary`; time up to `cfg.context`.
        key: (2,) or one per example (batch, 2); needed in training with dropout.

    Returns:
        logits, (batch, time, vocabulary).

    Raises:
        ValueError: tokens of another shape or longer than the context, no key where one is needed.
    """
    return logits(params, features(params, tokens, cfg, key=key, train=train))


def empty_caches(params: dict, cfg: Config, batch: int, positions: int) -> list[Cache]:
    """One cache per layer with room for `positions` tokens, of the parameters' dtype and device."""
    _check_length(cfg, positions)
    like = params["tokens"]["weight"]
    depth = cfg.width // cfg.heads
    return [empty_cache(batch, cfg.heads, positions, depth, like.dtype, like.device) for _ in range(cfg.layers)]


def decode(
    params: dict, tokens: Tensor, caches: list[Cache], position: Tensor, cfg: Config, *, donate: bool = False
) -> tuple[Tensor, list[Cache]]:
    """Logits after the next tokens, given all tokens before them in the caches.

    Args:
        tokens: (batch, time); a whole prompt at position 0, later one token at a time.
        position: (batch,) position of each example's first new token.
        donate: overwrite the buffers of the caches, which must not be used again; otherwise they are copied.

    Returns:
        logits (batch, time, vocabulary) and the new caches.

    With `cfg.attention` "auto" and uncompiled, attention is torch's fused kernel; "explicit" vmaps on the CPU too.
    """
    # Few kernels count most in eager mode; compiled, the explicit form is faster for a single query on a CPU.
    method = "fused" if cfg.attention == "auto" and not torch.compiler.is_compiling() else cfg.attention
    options = {"norm_first": cfg.norm_first, "method": method, "donate": donate}
    positions = position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)  # (batch, time)
    x = embedding(params["tokens"], tokens) + embedding(params["positions"], positions)  # (batch, time, width)
    updated = []
    for p, cache in zip(params["blocks"], caches, strict=True):
        x, cache = cached_block(p, x, cache, position, cfg.heads, **options)
        updated.append(cache)
    x = layer_norm(params["norm"], x) if cfg.norm_first else x
    return logits(params, x), updated


def stream(
    params: dict, prompt: Tensor, cfg: Config, steps: int, *, decode: Callable = decode, **options
) -> Iterator[Tensor]:
    """Yield the next token of each example, (batch,), up to `steps` times: `nets.language.generation.stream`.

    decode: this module's `decode`, or a compiled form of it.
    """
    return generation.stream(decode, empty_caches, params, prompt, cfg, steps, **options)


def generate(params: dict, prompt: Tensor, cfg: Config, steps: int, *, decode: Callable = decode, **options) -> Tensor:
    """New tokens, (batch, steps), or as many as the longest text has. The options are those of `stream`."""
    return generation.generate(decode, empty_caches, params, prompt, cfg, steps, **options)


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of transformers' GPT2Model and OpenAIGPTModel, which store matrices transposed."""
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
        WeightsError: another kind of model, or an entry with a value that makes another function, by name.
    """
    kind = config.get("model_type")
    if kind not in ("gpt2", "openai-gpt"):
        raise WeightsError(f"the configuration is of model_type '{kind}', expected 'gpt2' or 'openai-gpt'")
    fixed = {
        "activation_function": "gelu_new",
        "add_cross_attention": False,
        "afn": "gelu",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    }
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise WeightsError(f"the configuration has {name}={config[name]!r}; only {value!r} is supported")
    rates = {name: config.get(name, 0.1) for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
    if len(set(rates.values())) > 1:
        different = ", ".join(f"{name}={rate!r}" for name, rate in rates.items())
        raise WeightsError(f"the configuration has {different}; only one dropout rate for all three is supported")
    if config.get("n_inner") not in (None, 4 * config.get("n_embd", 768)):
        raise WeightsError(f"the configuration has n_inner={config['n_inner']}; expected 4 * n_embd")
    base = PRESETS["gpt2" if kind == "gpt2" else "gpt"]
    ours = {"vocab_size": "vocabulary", "n_positions": "context", "n_layer": "layers", "n_head": "heads"}
    ours |= {"n_embd": "width", "resid_pdrop": "dropout"}
    for name in ours:
        if not isinstance(config.get(name, 1), (int, float) if name == "resid_pdrop" else int):
            raise WeightsError(f"the configuration has {name}={config[name]!r}; expected a number")
    return config_of(base, **{mine: config[theirs] for theirs, mine in ours.items() if theirs in config})


def _without_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Old files also hold each layer's causal mask, which is no parameter: left out, once it is known to be one."""
    for name, x in state.items():
        if name.endswith(".attn.bias") and not (x.ndim > 1 and torch.equal(x.bool(), torch.ones_like(x).tril().bool())):
            raise WeightsError(f"GPT weights: '{name}' of shape {tuple(x.shape)} is not a causal mask")
        if name.endswith(".attn.masked_bias") and not (x.numel() == 1 and float(x) < -9e3):
            raise WeightsError(f"GPT weights: '{name}' of shape {tuple(x.shape)} is not the -1e4 of a masked score")
    return {name: x for name, x in state.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}


def from_published(state: dict[str, Tensor], cfg: Config) -> dict:
    """Parameters from the tensors of a published GPT or GPT-2.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen.
    """
    # Prefixes of the model with its head, of DistributedDataParallel and of torch.compile.
    state = {re.sub(r"^((module|_orig_mod|transformer)\.)+", "", name): x for name, x in state.items()}
    state = _without_masks(state)
    head = state.pop("lm_head.weight", None)
    params = fill(spec(cfg), state, rename_table(cfg), "GPT-2 weights" if cfg.norm_first else "GPT weights")
    if head is not None and not torch.equal(head.to(torch.float32), params["tokens"]["weight"]):
        raise WeightsError("GPT weights: 'lm_head.weight' differs from the token embedding; the two are one here")
    return params


def from_pretrained(source: str) -> tuple[dict, Config]:
    """(params, config) of a published GPT or GPT-2: a local directory or a Hugging Face repository id."""
    cfg = published_config(read_config(source))
    return from_published(read(source), cfg), cfg
