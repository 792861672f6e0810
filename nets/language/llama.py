"""Llama and its kin (Mistral, Qwen2, SmolLM2): decoder-only transformers with rotary positions.

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models" (arXiv:2302.13971); Touvron et al. 2023,
"Llama 2" (arXiv:2307.09288); Jiang et al. 2023, "Mistral 7B" (arXiv:2310.06825), whose tokens see a window of the past;
Yang et al. 2024, "Qwen2 Technical Report" (arXiv:2407.10671), with biases of queries, keys and values:

    h = tokens[ids];   h = h + attention_i(norm(h));   h = h + mlp_i(norm(h));   logits = norm(h) Wᵀ
    norm(x) = x / sqrt(mean(x²) + eps) * weight        mlp(x) = down(silu(gate(x)) * up(x))

W is the token embedding where it is tied. In attention, queries and keys are turned by their positions
(`core.rotary`), and several query heads share a head of keys and values.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core import initializers, random, rotary
from core.attention import (
    Cache,
    attention,
    empty_cache,
    extend_cache,
    merge_heads,
    queries_keys_values,
    self_attention_spec,
)
from core.layers import dropout_sites, embedding, embedding_spec, linear, linear_spec, rms_norm, rms_norm_spec, swiglu
from core.layers.checks import check_tensor
from core.layers.split import own_heads
from nets.blocks.transformer_block import identity
from nets.language import generation
from nets.weights import Rename, WeightsError, config_of, fill, read, read_config

WHAT = "Llama weights"


@dataclass(frozen=True)
class Config:
    """Sizes of a Llama and its kin."""

    vocabulary: int = 32000
    """Tokens that the embedding and the output layer know."""
    context: int = 4096
    """Maximal number of tokens in a sequence."""
    layers: int = 32
    """Transformer blocks."""
    heads: int = 32
    """Query heads per block."""
    kv_heads: int = 32
    """Heads of keys and values, each shared by heads / kv_heads consecutive query heads."""
    width: int = 4096
    """Size of the hidden states."""
    hidden: int = 11008
    """Hidden units of the MLPs."""
    depth: int | None = None
    """Size of a head. None: width / heads."""
    qkv_bias: bool = False
    """Biases of queries, keys and values, as in Qwen2."""
    tied: bool = False
    """Use the token embedding as the output layer."""
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it, as in Mistral. None: all tokens before it."""
    theta: float = 10000.0
    """Base of the rotary positions: pair i of a head turns by theta^(-2i / depth) per position."""
    rope_factor: float = 1.0
    """Llama 3.1's stretching of slow rotations (`core.rotary.stretched`); 1 for none."""
    rope_low: float = 1.0
    """Turns over `rope_context` below which a rotation is stretched in full."""
    rope_high: float = 4.0
    """Turns over `rope_context` above which a rotation is not stretched."""
    rope_context: int = 8192
    """Positions that the net was trained on before the stretching."""
    eps: float = 1e-5
    """Epsilon of the norms."""
    dropout: float = 0.0
    """Dropout rate of the embeddings, the attention weights and both residual branches."""
    attention: str = "auto"
    """Method of `core.attention.attention`: auto, explicit or fused."""

    def __post_init__(self):
        for name in ("vocabulary", "context", "layers", "heads", "kv_heads", "width", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"llama: {name} is {getattr(self, name)}; expected at least 1")
        if self.depth is None and self.width % self.heads:
            raise ValueError(f"llama: width {self.width} is not divisible by {self.heads} heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"llama: {self.heads} heads do not divide into {self.kv_heads} of keys and values")
        if self.window is not None and self.window < 1:
            raise ValueError(f"llama: window is {self.window}; expected at least 1, or None")
        if not self.rope_factor >= 1.0 or not self.rope_high > self.rope_low:
            raise ValueError("llama: expected rope_factor >= 1 and rope_high > rope_low")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"llama: dropout {self.dropout} is outside [0, 1)")
        self.rates  # noqa: B018 # a head that does not divide into pairs raises

    @property
    def head_depth(self) -> int:
        """Size of a head's queries, keys and values."""
        return self.width // self.heads if self.depth is None else self.depth

    @property
    def rates(self) -> list[float]:
        """Angle per position of each pair of a head's dimensions."""
        rates = rotary.frequencies(self.head_depth, self.theta)
        if self.rope_factor == 1.0:
            return rates
        return rotary.stretched(rates, self.rope_factor, self.rope_low, self.rope_high, self.rope_context)


STRETCHED = {"theta": 500000.0, "rope_factor": 32.0}  # Llama 3.2
PRESETS = {
    "tiny": Config(256, 64, layers=4, heads=4, kv_heads=2, width=128, hidden=352, tied=True),
    "llama-2-7b": Config(),
    "llama-3.2-1b": Config(
        128256, 131072, layers=16, heads=32, kv_heads=8, width=2048, hidden=8192, tied=True, **STRETCHED
    ),
    "mistral-7b": Config(32000, 32768, heads=32, kv_heads=8, width=4096, hidden=14336, window=4096),
    "qwen2-0.5b": Config(
        151936, 131072, 24, 14, 2, width=896, hidden=4864, qkv_bias=True, tied=True, theta=1e6, eps=1e-6
    ),
    "smollm2-135m": Config(49152, 8192, 30, heads=9, kv_heads=3, width=576, hidden=1536, tied=True, theta=100000.0),
    "tinyllama-1.1b": Config(32000, 2048, layers=22, heads=32, kv_heads=4, width=2048, hidden=5632),
}


def spec(cfg: Config) -> dict:
    """N(0, 0.02^2) everywhere; matrices that write into the residual stream get 0.02 / sqrt(2 layers), as in GPT-2.

    `mlp.up` holds the rows of the gate, then those of `up`; `attn.qkv` those of queries, keys and values.
    """
    init, residual = initializers.normal(0.02), initializers.normal(0.02 / math.sqrt(2 * cfg.layers))
    up = {"bias": False, "init": init, "axes": ("mlp", "embed"), "parts": (cfg.hidden, cfg.hidden)}  # gate and up
    sizes = {"kv_heads": cfg.kv_heads, "depth": cfg.head_depth, "bias": cfg.qkv_bias, "proj_bias": False}
    block = {
        "attn": self_attention_spec(cfg.width, cfg.heads, **sizes, init=init, proj_init=residual),
        "mlp": {
            "down": linear_spec(cfg.hidden, cfg.width, bias=False, init=residual, axes=("embed", "mlp")),
            "up": linear_spec(cfg.width, 2 * cfg.hidden, **up),
        },
        "norm1": rms_norm_spec(cfg.width),
        "norm2": rms_norm_spec(cfg.width),
    }
    table = embedding_spec(cfg.vocabulary, cfg.width, init=init, axes=("vocabulary", "embed"))
    parts = {"blocks": [block] * cfg.layers, "norm": rms_norm_spec(cfg.width)}
    output = linear_spec(cfg.width, cfg.vocabulary, bias=False, init=init, axes=("vocabulary", "embed"))
    return parts | ({} if cfg.tied else {"output": output}) | {"tokens": table}


def _norm(p: dict, x: Tensor, cfg: Config) -> Tensor:
    """x / sqrt(mean(x²) + eps), computed in float32 and rounded to x's dtype before it is multiplied by the weight."""
    return p["weight"] * rms_norm({}, x, eps=cfg.eps)


def _block(p: dict, x: Tensor, cfg: Config, attend: Callable, drops: tuple[Callable, Callable]) -> Tensor:
    """x (batch, time, width) -> the same shape; `attend` is of queries, keys and values, split into heads."""
    drop_attention, drop_mlp = drops
    q, k, v = queries_keys_values(p["attn"], _norm(p["norm1"], x, cfg), cfg.heads, cfg.kv_heads)
    x = x + drop_attention(linear(p["attn"]["proj"], merge_heads(attend(q, k, v))))
    hidden = swiglu(linear(p["mlp"]["up"], _norm(p["norm2"], x, cfg)))  # silu(gate x) * (up x), (batch, time, hidden)
    return x + drop_mlp(linear(p["mlp"]["down"], hidden))


def _check_length(cfg: Config, time: int) -> None:
    if time > cfg.context:
        raise ValueError(f"llama: {time} tokens exceed the context of {cfg.context}")


def features(params: dict, tokens: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Last hidden states: tokens (batch, time) integers -> (batch, time, width). Arguments as in `apply`."""
    check_tensor("llama", tokens, "tokens")
    generation.check_tokens(tokens)
    _check_length(cfg, tokens.shape[1])
    dropping = train and cfg.dropout > 0.0
    if dropping and key is None:
        raise ValueError(f"llama: training with dropout {cfg.dropout} draws random numbers; pass key=")
    batch, time = tokens.shape
    x = embedding(params["tokens"], tokens)  # (batch, time, width)
    drops = [(None, identity, identity)] * cfg.layers
    if dropping:
        weights_key, values_key = random.sites(key, 2).unbind(0)
        on_weights = dropout_sites(weights_key, cfg.layers, (batch, cfg.heads, time, time), cfg.dropout)
        on_weights = [own_heads(f, p["attn"]) for f, p in zip(on_weights, params["blocks"], strict=True)]
        first, *on_values = dropout_sites(values_key, 1 + 2 * cfg.layers, tuple(x.shape), cfg.dropout)
        drops = list(zip(on_weights, on_values[0::2], on_values[1::2], strict=True))
        x = first(x)
    positions = torch.arange(time, device=x.device)
    cos, sin = rotary.rotation(positions, cfg.rates, x.dtype)  # each (time, depth / 2)
    mask = None
    if cfg.window is not None and cfg.window < time:
        mask = positions > positions[:, None] - cfg.window  # (time, time)

    for p, (drop, *on_branches) in zip(params["blocks"], drops, strict=True):

        def attend(q: Tensor, k: Tensor, v: Tensor, drop: Callable | None = drop) -> Tensor:
            q, k = rotary.rotate(q, cos, sin), rotary.rotate(k, cos, sin)
            return attention(q, k, v, mask=mask, causal=True, drop=drop, method=cfg.attention)

        x = _block(p, x, cfg, attend, on_branches)
    return _norm(params["norm"], x, cfg)


def logits(params: dict, x: Tensor) -> Tensor:
    """Logits of the next token: hidden states (..., width) -> (..., vocabulary)."""
    return linear(params.get("output", params["tokens"]), x)  # (..., vocabulary)


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
    like, sizes = params["tokens"]["weight"], (batch, cfg.kv_heads, positions, cfg.head_depth)
    return [empty_cache(*sizes, like.dtype, like.device) for _ in range(cfg.layers)]


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
    # As in gpt2.decode: few kernels count most in eager mode.
    method = "fused" if cfg.attention == "auto" and not torch.compiler.is_compiling() else cfg.attention
    x, updated = embedding(params["tokens"], tokens), []  # (batch, time, width)
    positions = position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)  # (batch, time)
    cos, sin = rotary.rotation(positions[:, None], cfg.rates, x.dtype)  # each (batch, 1, time, depth / 2)

    for p, cache in zip(params["blocks"], caches, strict=True):

        def attend(q: Tensor, k: Tensor, v: Tensor, cache: Cache = cache) -> Tensor:
            q, k = rotary.rotate(q, cos, sin), rotary.rotate(k, cos, sin)
            cache, visible = extend_cache(cache, k, v, position, donate=donate)
            updated.append(cache)
            if cfg.window is not None and cfg.window < cache.keys.shape[2]:
                keys = torch.arange(cache.keys.shape[2], device=k.device)
                visible = visible & (keys > positions[:, None, :, None] - cfg.window)  # (batch, 1, time, room)
            return attention(q, cache.keys, cache.values, mask=visible, method=method)

        x = _block(p, x, cfg, attend, (identity, identity))
    return logits(params, _norm(params["norm"], x, cfg)), updated


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
    """Our names -> those of transformers' LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM."""
    table = {"norm.weight": Rename("model.norm.weight"), "tokens.weight": Rename("model.embed_tokens.weight")}
    table |= {} if cfg.tied else {"output.weight": Rename("lm_head.weight")}
    layer = {
        "attn.proj": ("self_attn.o_proj",),
        "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.down": ("mlp.down_proj",),
        "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
        "norm1": ("input_layernorm",),
        "norm2": ("post_attention_layernorm",),
    }
    for i in range(cfg.layers):
        for ours, theirs in layer.items():
            for leaf in ("bias", "weight") if cfg.qkv_bias and ours == "attn.qkv" else ("weight",):
                names = tuple(f"model.layers.{i}.{name}.{leaf}" for name in theirs)
                table[f"blocks.{i}.{ours}.{leaf}"] = Rename(names)
    return table


KINDS = ("llama", "mistral", "qwen2")
FIXED = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False}
FIXED |= {"partial_rotary_factor": 1.0, "quantization_config": None, "use_sliding_window": False}
SIZES = {"vocab_size": "vocabulary", "max_position_embeddings": "context", "num_hidden_layers": "layers"}
SIZES |= {"num_attention_heads": "heads", "hidden_size": "width", "intermediate_size": "hidden"}
LLAMA3 = {"factor": "rope_factor", "low_freq_factor": "rope_low", "high_freq_factor": "rope_high"}
LLAMA3 |= {"original_max_position_embeddings": "rope_context"}


def _rope(config: dict) -> dict[str, Any]:
    """The rotary positions: `rope_parameters`, or `rope_theta` and `rope_scaling` of transformers before 5."""
    rope = {"rope_theta": config.get("rope_theta")}
    for entry in ("rope_scaling", "rope_parameters"):
        if not isinstance(own := config.get(entry) or {}, dict):
            raise WeightsError(f"the configuration has {entry}={own!r}; expected an object")
        rope |= own
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise WeightsError(f"the configuration has rope_type={kind!r}; expected 'default' or 'llama3'")
    known = ("rope_theta", "rope_type", "type", *LLAMA3)
    if others := [n for n in rope if n not in known and (n, rope[n]) != ("partial_rotary_factor", 1.0)]:
        raise WeightsError(f"the configuration has {others[0]}={rope[others[0]]!r} of rotary positions, unknown here")
    if rope["rope_theta"] is None and config.get("model_type") == "llama":
        rope["rope_theta"] = 10000.0  # the files of Llama 1 and 2 may not name it
    ours = {"rope_theta": "theta"} | (LLAMA3 if kind == "llama3" else {})
    for name in ours:
        if not isinstance(rope.get(name), (int, float)) or isinstance(rope[name], bool):
            raise WeightsError(f"the configuration has {name}={rope.get(name)!r}; expected a number")
    return {mine: rope[theirs] for theirs, mine in ours.items()}


def published_config(config: dict) -> Config:
    """Our configuration from the `config.json` of transformers.

    Raises:
        WeightsError: another kind of model, or an entry with a value that makes another function, by name.
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise WeightsError(f"the configuration is of model_type '{kind}', expected one of {', '.join(KINDS)}")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise WeightsError(f"the configuration has {name}={config[name]!r}; only {value!r} is supported")
    others = sorted(set(config.get("layer_types") or []) - {"full_attention"})
    if kind == "qwen2" and others:
        raise WeightsError(f"the configuration has layers of {', '.join(others)}; only full_attention is supported")
    for name in SIZES:
        if type(config.get(name)) is not int:
            raise WeightsError(f"the configuration has {name}={config.get(name)!r}; expected an integer")
    depth, usual = config.get("head_dim"), config["hidden_size"] / max(config["num_attention_heads"], 1)
    return config_of(
        Config,
        **{mine: config[theirs] for theirs, mine in SIZES.items()},
        **_rope(config),
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        depth=None if depth == usual else depth,
        qkv_bias=kind == "qwen2",
        tied=config.get("tie_word_embeddings", False),
        window=config.get("sliding_window") if kind == "mistral" else None,
        eps=config.get("rms_norm_eps", 1e-6),
    )


def _without_frequencies(state: dict[str, Tensor], cfg: Config) -> dict[str, Tensor]:
    """Old files also hold each layer's rotary frequencies, which are no parameters: left out, once they are ours."""
    rates, buffers = torch.tensor(cfg.rates), [name for name in state if name.endswith("rotary_emb.inv_freq")]
    for name in buffers:
        x = state[name].float()  # perhaps rounded to bfloat16
        if x.shape != rates.shape or not torch.allclose(x, rates, rtol=1e-2, atol=0):
            raise WeightsError(f"{WHAT}: '{name}' of shape {tuple(x.shape)} are not the rotations of theta {cfg.theta}")
    return {name: x for name, x in state.items() if name not in buffers}


def from_published(state: dict[str, Tensor], cfg: Config) -> dict:
    """Parameters from the tensors of a published Llama, Mistral or Qwen2.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen.
    """
    # Without the prefixes of DistributedDataParallel and of torch.compile; a net without its head has no "model.".
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", name): x for name, x in state.items()}
    state = {name if name.startswith(("lm_head.", "model.")) else f"model.{name}": x for name, x in state.items()}
    state = _without_frequencies(state, cfg)
    head = state.pop("lm_head.weight") if cfg.tied and "lm_head.weight" in state else None
    params = fill(spec(cfg), state, rename_table(cfg), WHAT)
    if head is not None and not torch.equal(head.to(torch.float32), params["tokens"]["weight"]):
        raise WeightsError(f"{WHAT}: 'lm_head.weight' differs from the token embedding; the two are one here")
    return params


def from_pretrained(source: str) -> tuple[dict, Config]:
    """(params, config) of a published Llama, Mistral or Qwen2: a local directory or a Hugging Face repository id."""
    cfg = published_config(read_config(source))
    return from_published(read(source), cfg), cfg
