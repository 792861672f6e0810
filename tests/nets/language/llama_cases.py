"""Small Llamas: transformers' models with random weights, in exact double precision too, and ours."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from core import random, spec, tree
from nets.language import llama

SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24}
SMALL |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
STRETCH = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0}
STRETCH |= {"high_freq_factor": 3.0, "original_max_position_embeddings": 12}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "llama, stretched": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "rope_parameters": STRETCH}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 5, "head_dim": 6}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
}


def model_of(family, **options):
    """transformers' model with weights far from their start, so that its texts do not repeat a token."""
    config, kind, own = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config(**SMALL | own | options)).eval()
    keys = random.split(random.key(7), 100).unbind(0)
    with torch.no_grad():
        for key, (name, p) in zip(keys, model.named_parameters(), strict=False):
            scale = 2.0 if "tokens" in name or "lm_head" in name else 0.4 if p.ndim > 1 else 0.1
            p += scale * random.normal(key, p.shape)
    return model


def exact(model):
    """The model in double precision, with its norms and rotations, which it computes in single precision, too."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: torch.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
    rates = torch.tensor(llama.published_config(model.config.to_dict()).rates, dtype=torch.float64)

    def rotations(x, position_ids):
        angles = torch.cat([position_ids[..., None] * rates] * 2, -1)
        return angles.cos(), angles.sin()

    rotary = model.model.rotary_emb
    torch.testing.assert_close(rates.float(), rotary.inv_freq.float(), rtol=1e-6, atol=0)
    rotary.forward = rotations
    return model


def ids(batch=3, time=24, seed=1, vocabulary=31):
    return random.randint(random.key(seed), (batch, time), 0, vocabulary).long()


def distance(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def tiny(**options):
    """(params, cfg) of a net with random weights."""
    sizes = {"vocabulary": 31, "context": 16, "layers": 2, "heads": 4, "kv_heads": 2, "width": 16, "hidden": 24}
    cfg = llama.Config(**sizes | options)
    params = spec.init(random.key(0), llama.spec(cfg))
    return tree.map(lambda p: 12 * p if p.ndim > 1 else p, params), cfg
