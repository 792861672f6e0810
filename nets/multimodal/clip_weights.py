"""Published weights of CLIP: files of OpenAI and OpenCLIP, and of transformers' CLIPModel."""

import re
from dataclasses import replace
from typing import Any

from torch import Tensor

from core.tree import Tree
from nets.blocks.conv_norm import affine_names, conv_norm_names, fill_published, fitting_table
from nets.multimodal import clip
from nets.multimodal.clip import Config
from nets.weights import Rename, WeightsError, read, read_config

WHAT = "CLIP weights"
CONSTANTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""Entries of a file that are no parameters; so are transformers' position_ids."""


def _openai_blocks(ours: str, theirs: str, layers: int) -> dict[str, Rename]:
    table = {}
    for i in range(layers):
        mine, their = f"{ours}.blocks.{i}", f"{theirs}transformer.resblocks.{i}"
        table |= {f"{mine}.attn.qkv.{x}": Rename(f"{their}.attn.in_proj_{x}") for x in ("bias", "weight")}
        table |= affine_names(f"{mine}.attn.proj", f"{their}.attn.out_proj")
        table |= affine_names(f"{mine}.mlp.up", f"{their}.mlp.c_fc")
        table |= affine_names(f"{mine}.mlp.down", f"{their}.mlp.c_proj")
        table |= affine_names(f"{mine}.norm1", f"{their}.ln_1") | affine_names(f"{mine}.norm2", f"{their}.ln_2")
    return table


def _transformers_blocks(ours: str, theirs: str, layers: int) -> dict[str, Rename]:
    table = {}
    for i in range(layers):
        mine, their = f"{ours}.blocks.{i}", f"{theirs}.encoder.layers.{i}"
        for x in ("bias", "weight"):
            names = tuple(f"{their}.self_attn.{part}_proj.{x}" for part in "qkv")
            table[f"{mine}.attn.qkv.{x}"] = Rename(names)
        table |= affine_names(f"{mine}.attn.proj", f"{their}.self_attn.out_proj")
        table |= affine_names(f"{mine}.mlp.up", f"{their}.mlp.fc1") | affine_names(
            f"{mine}.mlp.down", f"{their}.mlp.fc2"
        )
        table |= affine_names(f"{mine}.norm1", f"{their}.layer_norm1")
        table |= affine_names(f"{mine}.norm2", f"{their}.layer_norm2")
    return table


def _resnet_names(cfg: Config) -> dict[str, Rename]:
    table = {}
    for i in range(3):
        table |= conv_norm_names(f"image.stem.{i}", f"visual.conv{i + 1}", f"visual.bn{i + 1}")
    for s, depth in enumerate(cfg.depths):
        for b in range(depth):
            mine, their = f"image.stages.{s}.{b}", f"visual.layer{s + 1}.{b}"
            for i in range(3):
                table |= conv_norm_names(f"{mine}.convs.{i}", f"{their}.conv{i + 1}", f"{their}.bn{i + 1}")
            if not b:
                table |= conv_norm_names(f"{mine}.shortcut", f"{their}.downsample.0", f"{their}.downsample.1")
    pool = "visual.attnpool"
    table["image.pool.positions.weight"] = Rename(f"{pool}.positional_embedding")
    table |= affine_names("image.pool.q", f"{pool}.q_proj") | affine_names("image.pool.proj", f"{pool}.c_proj")
    names = {x: tuple(f"{pool}.{part}_proj.{x}" for part in "kv") for x in ("bias", "weight")}
    return table | {f"image.pool.kv.{x}": Rename(theirs) for x, theirs in names.items()}


def openai_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of OpenAI's and OpenCLIP's files."""
    table = _openai_blocks("text", "", cfg.text_layers) | affine_names("text.norm", "ln_final")
    table |= {
        "scale": Rename("logit_scale"),
        "text.positions.weight": Rename("positional_embedding"),
        "text.projection.weight": Rename("text_projection", transposed=True),
        "text.tokens.weight": Rename("token_embedding.weight"),
    }
    if cfg.depths:
        return table | _resnet_names(cfg)
    table |= _openai_blocks("image", "visual.", cfg.image_layers)
    table |= affine_names("image.norm", "visual.ln_post") | affine_names("image.norm_before", "visual.ln_pre")
    return table | {
        "image.class_token": Rename("visual.class_embedding"),
        "image.patches.weight": Rename("visual.conv1.weight"),
        "image.positions.weight": Rename("visual.positional_embedding"),
        "image.projection.weight": Rename("visual.proj", transposed=True),
    }


def transformers_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of transformers' CLIPModel."""
    table = _transformers_blocks("text", "text_model", cfg.text_layers)
    table |= _transformers_blocks("image", "vision_model", cfg.image_layers)
    table |= affine_names("text.norm", "text_model.final_layer_norm")
    table |= affine_names("image.norm", "vision_model.post_layernorm")
    table |= affine_names("image.norm_before", "vision_model.pre_layrnorm")  # spelt so
    return table | {
        "image.class_token": Rename("vision_model.embeddings.class_embedding"),
        "image.patches.weight": Rename("vision_model.embeddings.patch_embedding.weight"),
        "image.positions.weight": Rename("vision_model.embeddings.position_embedding.weight"),
        "image.projection.weight": Rename("visual_projection.weight"),
        "scale": Rename("logit_scale"),
        "text.positions.weight": Rename("text_model.embeddings.position_embedding.weight"),
        "text.projection.weight": Rename("text_projection.weight"),
        "text.tokens.weight": Rename("text_model.embeddings.token_embedding.weight"),
    }


def from_published(state: dict[str, Tensor], cfg: Config) -> Tree:
    """Parameters and Stats from the tensors of OpenAI, OpenCLIP or transformers, which their names tell apart.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen.
    """
    state = {
        name: x
        for name, x in state.items()
        if name not in CONSTANTS and not name.endswith(("position_ids", ".attn_mask"))
    }
    tables = [openai_table(cfg)] + ([] if cfg.depths else [transformers_table(cfg)])
    return fill_published(clip.spec(cfg), state, fitting_table(state, *tables), WHAT)


def _count(state: dict[str, Tensor], pattern: str) -> int:
    """Number of blocks: 1 + the largest number that the pattern finds in a name."""
    return 1 + max((int(block[1]) for name in state if (block := re.match(pattern, name))), default=-1)


def config_of(state: dict[str, Tensor], **changes: Any) -> Config:
    """The configuration that the shapes of OpenAI's tensors show; heads are of 64, as in all of theirs.

    Raises:
        WeightsError: tensors that are not those of a CLIP.
    """
    try:
        width = state["ln_final.weight"].shape[0]
        text = {"text_width": width, "text_heads": max(1, width // 64), "context": len(state["positional_embedding"])}
        text["text_layers"] = _count(state, r"transformer\.resblocks\.(\d+)\.")
        text |= {"vocabulary": len(state["token_embedding.weight"]), "embedding": state["text_projection"].shape[1]}
        first = state["visual.conv1.weight"]
        if "visual.layer1.0.conv1.weight" in state:
            depths = tuple(_count(state, rf"visual\.layer{s}\.(\d+)\.") for s in (1, 2, 3, 4))
            side = round((len(state["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
            image = {"depths": depths, "image": 32 * side, "image_width": 2 * len(first)}
            image["image_heads"] = image["image_width"] // 2
        else:
            wide, channels, patch, _ = first.shape
            side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
            image = {"image": patch * side, "patch": patch, "image_width": wide, "image_heads": max(1, wide // 64)}
            image |= {"image_layers": _count(state, r"visual\.transformer\.resblocks\.(\d+)\."), "channels": channels}
        return replace(Config(), **text, **image, **changes)
    except KeyError as error:
        raise WeightsError(
            f"{WHAT}: {error} is missing; expected the names of OpenAI's CLIP or transformers'"
        ) from None


def published_config(config: dict) -> Config:
    """Our configuration from the `config.json` of transformers.

    Raises:
        WeightsError: another kind of model, an activation that is not here, or entries that do not fit, by name.
    """
    if config.get("model_type") != "clip":
        raise WeightsError(f"{WHAT}: the configuration is of model_type '{config.get('model_type')}', expected clip")
    text = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
    text |= {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407, "hidden_act": "quick_gelu"}
    text |= {"layer_norm_eps": 1e-5} | (config.get("text_config") or {})
    image = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    image |= {"image_size": 224, "patch_size": 32, "num_channels": 3, "hidden_act": "quick_gelu"}
    image |= {"layer_norm_eps": 1e-5} | (config.get("vision_config") or {})
    for name, part in (("text_config", text), ("vision_config", image)):
        if part["intermediate_size"] != 4 * part["hidden_size"]:
            raise WeightsError(
                f"{WHAT}: {name} has intermediate_size {part['intermediate_size']}; expected 4 hidden_size"
            )
    for name in ("hidden_act", "layer_norm_eps"):
        if text[name] != image[name]:
            raise WeightsError(f"{WHAT}: the towers have {name} {text[name]} and {image[name]}; expected the same")
    # Old files have a wrong end id of 2; their texts are read at the largest id (transformers' own rule).
    end = text["eos_token_id"]
    try:
        return Config(
            embedding=config.get("projection_dim", 512),
            image=image["image_size"],
            channels=image["num_channels"],
            patch=image["patch_size"],
            image_layers=image["num_hidden_layers"],
            image_heads=image["num_attention_heads"],
            image_width=image["hidden_size"],
            vocabulary=text["vocab_size"],
            context=text["max_position_embeddings"],
            text_layers=text["num_hidden_layers"],
            text_heads=text["num_attention_heads"],
            text_width=text["hidden_size"],
            end_id=None if end == 2 else end,
            activation={"gelu_pytorch_tanh": "gelu_tanh"}.get(text["hidden_act"], text["hidden_act"]),
            eps=text["layer_norm_eps"],
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{WHAT}: config.json: {error}") from None


def from_pretrained(source: str, **changes: Any) -> tuple[Tree, Config]:
    """(params, config) of a published CLIP: a file, a directory, or a Hugging Face repository id.

    With a `config.json` of transformers beside it, the configuration is that one's; else the shapes say it, for names
    of OpenAI's, and the activation is quick_gelu, or as OpenCLIP's `open_clip_config.json` has it.

    Args:
        changes: fields of the configuration that no file holds: activation="gelu" for most of OpenCLIP's.
    """
    state = read(source)
    if "logit_scale" not in state:
        raise WeightsError(f"{WHAT}: 'logit_scale' is missing; expected a CLIP of OpenAI, OpenCLIP or transformers")
    if "ln_final.weight" in state:
        model = read_config(source, "open_clip_config.json", optional=True).get("model_cfg")
        activation = "quick_gelu" if model is None or model.get("quick_gelu") else "gelu"
        cfg = config_of(state, **({"activation": activation} | changes))
    else:
        cfg = replace(published_config(read_config(source)), **changes)
    return from_published(state, cfg), cfg
