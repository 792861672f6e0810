"""Published weights of captioners: transformers' VisionEncoderDecoderModel of a ViT and a GPT-2."""

from torch import Tensor

from core.tree import Tree
from nets.blocks.conv_norm import affine_names
from nets.multimodal import captioner
from nets.multimodal.captioner import Config
from nets.weights import Rename, WeightsError, fill, read, read_config

WHAT = "captioner weights"
FIXED = {
    "encoder": {"model_type": "vit", "hidden_act": "gelu", "qkv_bias": True},
    "decoder": {
        "activation_function": "gelu_new",
        "add_cross_attention": True,
        "model_type": "gpt2",
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
}
"""Entries of a configuration whose other values would make another function."""
MASKS = (".attn.bias", ".attn.masked_bias", ".crossattention.bias", ".crossattention.masked_bias")
"""Causal masks, which old files hold; they are no parameters."""


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of transformers, whose GPT-2 stores matrices transposed."""
    table = affine_names("encoder.norm", "encoder.layernorm")
    table |= affine_names("encoder.patches", "encoder.embeddings.patch_embeddings.projection")
    table |= affine_names("decoder.norm", "decoder.transformer.ln_f")
    table |= {
        "decoder.positions.weight": Rename("decoder.transformer.wpe.weight"),
        "decoder.tokens.weight": Rename("decoder.transformer.wte.weight"),
        "encoder.class_token": Rename("encoder.embeddings.cls_token"),
        "encoder.positions": Rename("encoder.embeddings.position_embeddings"),
    }
    if cfg.image_width != cfg.text_width:
        table |= affine_names("bridge", "enc_to_dec_proj")
    image = {"attn.proj": "attention.output.dense", "mlp.down": "output.dense", "mlp.up": "intermediate.dense"}
    image |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    for i in range(cfg.image_layers):
        mine, their = f"encoder.blocks.{i}", f"encoder.encoder.layer.{i}"
        for x in ("bias", "weight"):
            names = (f"{their}.attention.attention.{part}.{x}" for part in ("query", "key", "value"))
            table[f"{mine}.attn.qkv.{x}"] = Rename(tuple(names))
        for ours, theirs in image.items():
            table |= affine_names(f"{mine}.{ours}", f"{their}.{theirs}")
    text = {"attn.proj": "attn.c_proj", "attn.qkv": "attn.c_attn", "cross.kv": "crossattention.c_attn"}
    text |= {"cross.proj": "crossattention.c_proj", "cross.q": "crossattention.q_attn", "mlp.down": "mlp.c_proj"}
    text |= {"mlp.up": "mlp.c_fc", "norm1": "ln_1", "norm2": "ln_2", "norm_cross": "ln_cross_attn"}
    for i in range(cfg.text_layers):
        for ours, theirs in text.items():
            mine, their = f"decoder.blocks.{i}.{ours}", f"decoder.transformer.h.{i}.{theirs}"
            table[f"{mine}.bias"] = Rename(f"{their}.bias")
            table[f"{mine}.weight"] = Rename(f"{their}.weight", transposed="." in ours)
    return table


def from_published(state: dict[str, Tensor], cfg: Config) -> Tree:
    """Parameters from the tensors of transformers.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen; an output layer that is not the
            embedding of the words.
    """
    state = {name: x for name, x in state.items() if ".pooler." not in name and not name.endswith(MASKS)}
    head = state.pop("decoder.lm_head.weight", None)
    params = fill(captioner.spec(cfg), state, rename_table(cfg), WHAT)
    if head is not None and not bool((head.float() == params["decoder"]["tokens"]["weight"]).all()):
        raise WeightsError(f"{WHAT}: 'decoder.lm_head.weight' differs from the token embedding; the two are one here")
    return params


def published_config(config: dict) -> Config:
    """Our configuration from the `config.json` of transformers.

    Raises:
        WeightsError: another kind of model, or an entry with a value that makes another function, by name.
    """
    if config.get("model_type") != "vision-encoder-decoder":
        kind = config.get("model_type")
        raise WeightsError(f"{WHAT}: the configuration is of model_type '{kind}', expected vision-encoder-decoder")
    image = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    image |= {"image_size": 224, "patch_size": 16, "num_channels": 3, "layer_norm_eps": 1e-12}
    text = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "n_positions": 1024, "vocab_size": 50257}
    text |= {"layer_norm_epsilon": 1e-5}
    for side, values in (("encoder", image), ("decoder", text)):
        values |= config.get(side) or {}
        for name, value in FIXED[side].items():
            if values.get(name, value) != value:
                raise WeightsError(f"{WHAT}: the {side} has {name}={values[name]!r}; only {value!r} is supported")
    try:
        return Config(
            image=image["image_size"],
            channels=image["num_channels"],
            patch=image["patch_size"],
            image_layers=image["num_hidden_layers"],
            image_heads=image["num_attention_heads"],
            image_width=image["hidden_size"],
            image_hidden=image["intermediate_size"],
            vocabulary=text["vocab_size"],
            context=text["n_positions"],
            text_layers=text["n_layer"],
            text_heads=text["n_head"],
            text_width=text["n_embd"],
            text_hidden=text["n_inner"] or 4 * text["n_embd"],
            image_eps=image["layer_norm_eps"],
            text_eps=text["layer_norm_epsilon"],
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{WHAT}: config.json: {error}") from None


def from_pretrained(source: str) -> tuple[Tree, Config]:
    """(params, config) of a published captioner: a directory, or a Hugging Face repository id."""
    cfg = published_config(read_config(source))
    return from_published(read(source), cfg), cfg
