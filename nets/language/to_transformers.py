"""GPT-2 and Llama in transformers' form: config.json and model.safetensors, which transformers, vLLM, llama.cpp's
converter and text-generation servers read.

    write_transformers("folder", params, cfg)
    AutoModelForCausalLM.from_pretrained("folder")

`nets.language.gpt2.from_pretrained` and `nets.language.llama.from_pretrained` read them back, bit for bit.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from core import tree
from core.tree import Tree
from nets.language import gpt2, llama
from nets.weights import WeightsError, published_state


def _gpt2_config(cfg: gpt2.Config) -> dict[str, Any]:
    sizes = {"n_embd": cfg.width, "n_head": cfg.heads, "n_layer": cfg.layers, "n_positions": cfg.context}
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), cfg.dropout)
    kind = "gpt2" if cfg.norm_first else "openai-gpt"
    name = "GPT2LMHeadModel" if cfg.norm_first else "OpenAIGPTLMHeadModel"
    activation = {"activation_function": "gelu_new"} if cfg.norm_first else {"afn": "gelu"}
    own = {"architectures": [name], "layer_norm_epsilon": 1e-5, "model_type": kind, "vocab_size": cfg.vocabulary}
    return own | activation | rates | sizes


def _llama_config(cfg: llama.Config) -> dict[str, Any]:
    if cfg.qkv_bias and cfg.window is not None:
        raise WeightsError("Llama weights: biases of queries and a window in one net; transformers has no such model")
    kind = "mistral" if cfg.window is not None else "qwen2" if cfg.qkv_bias else "llama"
    name = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]
    rope = {"rope_theta": cfg.theta, "rope_type": "default"}
    if cfg.rope_factor != 1.0:
        rope = {theirs: getattr(cfg, ours) for theirs, ours in llama.LLAMA3.items()}
        rope |= {"rope_theta": cfg.theta, "rope_type": "llama3"}
    config = {theirs: getattr(cfg, ours) for theirs, ours in llama.SIZES.items()}
    config |= {"architectures": [name], "hidden_act": "silu", "model_type": kind, "rms_norm_eps": cfg.eps}
    config |= {"num_key_value_heads": cfg.kv_heads, "rope_parameters": rope, "tie_word_embeddings": cfg.tied}
    config |= {} if cfg.depth is None else {"head_dim": cfg.depth}
    if kind == "qwen2":
        return config | {"use_sliding_window": False}
    config |= {"attention_bias": False} | ({"mlp_bias": False} if kind == "llama" else {"sliding_window": cfg.window})
    # Readers before transformers 5 look for the base beside the sizes.
    return config | {"rope_theta": cfg.theta}


def published(params: Tree, cfg: gpt2.Config | llama.Config) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors in transformers' names, entries of config.json).

    Raises:
        WeightsError: a net that transformers has not, or parameters of another configuration.
    """
    if isinstance(cfg, gpt2.Config):
        table, leaves = gpt2.rename_table(cfg), dict(tree.items(params))
        for name in table.keys() - leaves.keys():  # a net without biases is one with biases of 0
            weight = leaves[f"{name.removesuffix('.bias')}.weight"]
            leaves[name] = weight.new_zeros(weight.shape[0])
        state = published_state(leaves, table)
        return {f"transformer.{name}": value for name, value in state.items()}, _gpt2_config(cfg)
    config, depth = _llama_config(cfg), cfg.head_depth
    rows = (cfg.heads * depth, cfg.kv_heads * depth, cfg.kv_heads * depth)
    sizes = {"attn.qkv.weight": rows, "attn.qkv.bias": rows}
    return published_state(params, llama.rename_table(cfg), sizes), config


def write_transformers(folder: str | Path, params: Tree, cfg: gpt2.Config | llama.Config) -> None:
    """Write config.json and model.safetensors into a new folder, whole or not at all. A tokenizer is not theirs to say:
    copy tokenizer.json beside them.

    Raises:
        WeightsError: as `published`, or the folder exists.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists():
        raise WeightsError(f"'{folder}' exists already; expected a new folder for the weights")
    state, config = published(tree.move(params, "cpu"), cfg)
    config["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}.", dir=folder.parent))
    try:
        save_file(state, place / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (place / "config.json").write_text(text, encoding="utf-8")
        place.chmod(0o755)
        os.replace(place, folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
