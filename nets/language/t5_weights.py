"""Published weights of `nets.language.t5`: files of transformers' T5ForConditionalGeneration, versions 1.0 and 1.1."""

import re
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from nets.language.t5 import Config, spec
from nets.weights import Rename, WeightsError, config_of, fill, read, read_config

WHAT = "T5 weights"
HEAD, SHARED = "lm_head.weight", "shared.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
"""In the first files: positions of cross-attention, which T5 does not have."""
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of transformers' T5ForConditionalGeneration."""
    table = {"tokens.weight": Rename(SHARED)} | ({} if cfg.tied else {"output.weight": Rename(HEAD)})
    up = ("wi_0", "wi_1") if cfg.gated else ("wi",)
    for side, layers, last in (("encoder", cfg.layers, 1), ("decoder", cfg.decoder_layers, 2)):
        positions = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table |= {f"{side}.positions.weight": Rename(positions)}
        table |= {f"{side}.norm.weight": Rename(f"{side}.final_layer_norm.weight")}
        parts = {"norm1": (0, "", ("layer_norm",)), "norm2": (last, "", ("layer_norm",))}
        parts |= {"mlp.down": (last, "DenseReluDense.", ("wo",)), "mlp.up": (last, "DenseReluDense.", up)}
        attentions = {"attn": (0, "SelfAttention.")}
        if side == "decoder":
            attentions |= {"cross": (1, "EncDecAttention.")}
            parts |= {"norm_cross": (1, "", ("layer_norm",))}
        for (ours, (layer, theirs)), (leaf, names) in product(
            attentions.items(), {"kv": ("k", "v"), "proj": ("o",), "q": ("q",)}.items()
        ):
            parts[f"{ours}.{leaf}"] = (layer, theirs, names)
        for i, (ours, (layer, theirs, names)) in product(range(layers), parts.items()):
            files = tuple(f"{side}.block.{i}.layer.{layer}.{theirs}{name}.weight" for name in names)
            table[f"{side}.blocks.{i}.{ours}.weight"] = Rename(files)
    return table


def published_config(config: dict) -> Config:
    """Our configuration from the `config.json` of transformers.

    A file that transformers 5 wrote of version 1.1 says `tie_word_embeddings` true and `scale_decoder_outputs` false,
    whether its output layer is one of its own or not; `from_pretrained` sees that in the weights.

    Raises:
        WeightsError: another kind of model, or an entry with a value that makes another function, by name.
    """
    if config.get("model_type") != "t5":
        raise WeightsError(f"the configuration is of model_type '{config.get('model_type')}', expected 't5'")
    for name, value in {"is_encoder_decoder": True, "quantization_config": None}.items():
        if config.get(name, value) != value:
            raise WeightsError(f"the configuration has {name}={config[name]!r}; only {value!r} is supported")
    ours = {"d_ff": "hidden", "d_kv": "depth", "d_model": "width", "num_heads": "heads", "num_layers": "layers"}
    ours |= {"vocab_size": "vocabulary"}
    for name in ours:
        if type(config.get(name)) is not int:
            raise WeightsError(f"the configuration has {name}={config.get(name)!r}; expected an integer")
    feedforward = config.get("feed_forward_proj", "relu")
    gated, name = feedforward.startswith("gated-"), feedforward.removeprefix("gated-")
    name = "gelu_new" if feedforward == "gated-gelu" else name  # as transformers has it
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise WeightsError(
            f"the configuration has feed_forward_proj={feedforward!r}; expected one of {known}, perhaps after 'gated-'"
        )
    tied = config.get("tie_word_embeddings", True)
    decoder_layers = config.get("num_decoder_layers")
    return config_of(
        Config,
        **{mine: config[theirs] for theirs, mine in ours.items()},
        decoder_layers=config["num_layers"] if decoder_layers is None else decoder_layers,
        activation=ACTIVATIONS[name],
        gated=gated,
        tied=tied,
        scale=config.get("scale_decoder_outputs", tied),
        buckets=config.get("relative_attention_num_buckets", 32),
        farthest=config.get("relative_attention_max_distance", 128),
        dropout=config.get("dropout_rate", 0.1),
        eps=config.get("layer_norm_epsilon", 1e-6),
        padding_id=config.get("pad_token_id", 0),
    )


def from_published(state: dict[str, Tensor], cfg: Config) -> dict:
    """Parameters from the tensors of a published T5.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen, or a copy of the embedding that
            differs from it.
    """
    # Prefixes of DistributedDataParallel and of torch.compile.
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", name): x for name, x in state.items()}
    state.pop(UNUSED, None)
    for name in (*COPIES, HEAD) if cfg.tied else COPIES:
        copy = state.pop(name, None)
        if copy is not None and not torch.equal(state.setdefault(SHARED, copy), copy):
            raise WeightsError(f"{WHAT}: '{name}' differs from '{SHARED}'; they are one here")
    return fill(spec(cfg), state, rename_table(cfg), WHAT)


def from_pretrained(source: str) -> tuple[dict, Config]:
    """(params, config) of a published T5: a directory, or a repository such as "google-t5/t5-small"."""
    cfg, state = published_config(read_config(source)), read(source)
    if cfg.tied and not cfg.scale and HEAD in state:  # version 1.1, as transformers 5 writes it
        cfg = replace(cfg, tied=SHARED in state and torch.equal(state[HEAD], state[SHARED]))
    return from_published(state, cfg), cfg
