"""Small T5s: files of transformers' models with random weights, the models in exact double precision, and ours."""

import json
import logging

import torch
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

from core import random, spec, tree
from nets.language import t5

SIZES = {"vocab_size": 31, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3}
SIZES |= {"num_heads": 4, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VERSIONS = {"1.0": {}, "1.1": V1_1, "few buckets": {"relative_attention_num_buckets": 8} | V1_1}


def distinct(model):
    """The model with weights far from their start; small embeddings keep its texts from repeating a token."""
    keys = random.split(random.key(7), 200).unbind(0)
    with torch.no_grad():
        for key, (name, p) in zip(keys, model.named_parameters(), strict=False):
            scale = 1.5 if "relative" in name else 0.2 if p.shape[0] == 31 else 0.3 if p.ndim > 1 else 0.1
            p.copy_((p if p.shape[0] != 31 else 0.1 * p) + scale * random.normal(key, p.shape))
    return model


def write(folder, version):
    """A folder as the authors' conversion wrote it: version 1.1 with an output layer of its own."""
    options = SIZES | VERSIONS[version]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = distinct(T5ForConditionalGeneration(T5Config(**options)))
    state = dict(model.named_parameters())
    if version != "1.0":
        state["lm_head.weight"] = random.normal(random.key(3), (31, 16))
    save_file({name: x.detach().clone() for name, x in state.items()}, folder / "model.safetensors")
    config = model.config.to_dict() | options | {"model_type": "t5"}
    config = {n: x for n, x in config.items() if n not in ("scale_decoder_outputs", "dtype")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model_in(folder):
    """transformers' model of a folder; it warns that the output layer is not tied."""
    logging.disable(logging.WARNING)
    try:
        return T5ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    finally:
        logging.disable(logging.NOTSET)


def exact(model):
    """The model in double precision, with its norms, which it computes in single precision, too."""
    for module in model.double().modules():
        if type(module).__name__ == "T5LayerNorm":
            module.forward = lambda x, m=module: torch.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
    return model


def pairs(batch=3, source_time=150, target_time=48):
    """Sources with distances beyond the last bucket's, and targets beyond the decoder's exact ones."""
    source = random.randint(random.key(1), (batch, source_time), 2, 31).long()
    target = random.randint(random.key(2), (batch, target_time), 2, 31).long()
    lengths = torch.tensor([source_time, source_time // 3, 1, 5, 20])[:batch]
    source = torch.where(torch.arange(source_time) < lengths[:, None], source, 0)
    return source, torch.cat([target.new_zeros(batch, 1), target[:, 1:]], 1)


def distance(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def tiny(**options):
    """(params, cfg) of a net with random weights."""
    sizes = {"vocabulary": 31, "layers": 2, "decoder_layers": 2, "heads": 2, "depth": 6, "width": 16, "hidden": 24}
    cfg = t5.Config(**sizes | options)
    return tree.map(lambda p: 1.5 * p, spec.init(random.key(0), t5.spec(cfg))), cfg
