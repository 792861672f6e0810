"""Marian: published translation models, those of transformers' MarianMTModel, as `nets.language.transformer`.

Junczys-Dowmunt et al. 2018, "Marian: Fast Neural Machine Translation in C++" (arXiv:1804.00344). They are the
transformer of Vaswani et al. 2017 with all sines before all cosines, and a bias of the logits; their targets begin with
the padding token.
"""

import re
from itertools import product

import torch
from torch import Tensor

from nets.language.transformer import Config, sinusoids, spec
from nets.weights import Rename, WeightsError, config_of, fill, read, read_config

WHAT = "Marian weights"
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}

LAYER = {
    "attn.proj": ("self_attn.out_proj",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.down": ("fc2",),
    "mlp.up": ("fc1",),
    "norm1": ("self_attn_layer_norm",),
    "norm2": ("final_layer_norm",),
}
CROSS = {
    "cross.kv": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "cross.proj": ("encoder_attn.out_proj",),
    "cross.q": ("encoder_attn.q_proj",),
    "norm_cross": ("encoder_attn_layer_norm",),
}


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of transformers' MarianMTModel."""
    table = {"output.bias": Rename("final_logits_bias")}
    if cfg.shared:
        table["tokens.weight"] = Rename("model.shared.weight")
    else:
        table["output.weight"] = Rename("lm_head.weight")
        table |= {
            f"{side}.tokens.weight": Rename(f"model.{side}.embed_tokens.weight") for side in ("encoder", "decoder")
        }
    for side, layer in (("encoder", LAYER), ("decoder", LAYER | CROSS)):
        for i, (ours, theirs), leaf in product(range(cfg.layers), layer.items(), ("bias", "weight")):
            names = tuple(f"model.{side}.layers.{i}.{name}.{leaf}" for name in theirs)
            table[f"{side}.blocks.{i}.{ours}.{leaf}"] = Rename(names)
    return table


def published_config(config: dict) -> Config:
    """Our configuration from the `config.json` of transformers.

    Raises:
        WeightsError: another kind of model, or an entry with a value that makes another function, by name.
    """
    if config.get("model_type") != "marian":
        raise WeightsError(f"the configuration is of model_type '{config.get('model_type')}', expected 'marian'")
    fixed = {"activation_dropout": 0.0, "decoder_layerdrop": 0.0, "encoder_layerdrop": 0.0}
    fixed |= {"add_final_layer_norm": False, "normalize_before": False, "normalize_embedding": False}
    fixed |= {"static_position_embeddings": True, "tie_word_embeddings": True}
    ours = {"encoder_attention_heads": "heads", "encoder_ffn_dim": "hidden", "encoder_layers": "layers"}
    fixed |= {name.replace("encoder", "decoder"): config.get(name) for name in ours}
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise WeightsError(f"the configuration has {name}={config[name]!r}; only {value!r} is supported")
    ours |= {"d_model": "width", "max_position_embeddings": "context"}
    ours |= {"pad_token_id": "padding_id", "vocab_size": "source_vocabulary"}
    for name in ours:
        if type(config.get(name)) is not int:
            raise WeightsError(f"the configuration has {name}={config.get(name)!r}; expected an integer")
    activation = config.get("activation_function", "gelu")
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise WeightsError(f"the configuration has activation_function={activation!r}; expected one of {known}")
    return config_of(
        Config,
        **{mine: config[theirs] for theirs, mine in ours.items()},
        target_vocabulary=config.get("decoder_vocab_size") or config["vocab_size"],
        dropout=config.get("dropout", 0.1),
        attention_dropout=config.get("attention_dropout", 0.0),
        positions="halves",
        activation=ACTIVATIONS[activation],
        shared=config.get("share_encoder_decoder_embeddings", True),
        scale=config.get("scale_embedding", False),
        output_bias=True,
    )


def _untie(state: dict[str, Tensor], cfg: Config) -> None:
    """Reduce tied tables to one, under its name in the rename table."""
    head, shared = "lm_head.weight", "model.shared.weight"
    inputs = [f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    if not cfg.shared:
        if head not in state and inputs[1] in state:
            state[head] = state[inputs[1]]
        return
    for name in (head, *inputs):
        copy = state.pop(name, None)
        if copy is not None and not torch.equal(state.setdefault(shared, copy), copy):
            raise WeightsError(f"{WHAT}: '{name}' differs from '{shared}'; they are one here")


def from_published(state: dict[str, Tensor], cfg: Config) -> dict:
    """Parameters from the tensors of a published Marian.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen.
    """
    # Prefixes of DistributedDataParallel and of torch.compile.
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", name): x for name, x in state.items()}
    _untie(state, cfg)
    if "final_logits_bias" in state:
        state["final_logits_bias"] = state["final_logits_bias"].flatten()
    # Old files also hold the positions; they are no parameters.
    for name in (f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")):
        table = state.pop(name, None)
        if table is None:
            continue
        expected = sinusoids(torch.arange(cfg.context), cfg.width, halves=True)  # (context, width)
        if table.shape != expected.shape or (table - expected).abs().max() > 1e-2:
            raise WeightsError(
                f"{WHAT}: '{name}' of shape {tuple(table.shape)} are not the sines and cosines of Marian"
            )
    return fill(spec(cfg), state, rename_table(cfg), WHAT)


def from_pretrained(source: str) -> tuple[dict, Config]:
    """(params, config) of a published Marian: a directory, or a repository such as "Helsinki-NLP/opus-mt-de-en"."""
    cfg = published_config(read_config(source))
    return from_published(read(source), cfg), cfg
