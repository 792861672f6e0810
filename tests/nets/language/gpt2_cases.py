"""Small GPTs: transformers' models with random weights, and ours."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from core import random, spec, tree
from nets.language import gpt2

FAMILIES = {"gpt2": (GPT2Config, GPT2LMHeadModel), "openai-gpt": (OpenAIGPTConfig, OpenAIGPTLMHeadModel)}
SMALL = {"vocab_size": 31, "n_positions": 24, "n_layer": 2, "n_head": 2, "n_embd": 16}
SMALL |= {"bos_token_id": None, "eos_token_id": None}


def model_of(family, **options):
    """transformers' model with weights far from their start; large positions keep its texts from repeating a token."""
    config, kind = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config(**SMALL | options)).eval()
    keys = random.split(random.key(7), 100).unbind(0)
    with torch.no_grad():
        for key, (name, p) in zip(keys, model.named_parameters(), strict=False):
            scale = 3.0 if name.endswith(("wpe.weight", "positions_embed.weight")) else 0.3 if p.ndim > 1 else 0.1
            p += scale * random.normal(key, p.shape)
    return model


def ids(batch=3, time=24, seed=1, vocabulary=31):
    return random.randint(random.key(seed), (batch, time), 0, vocabulary).long()


def distance(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def tiny(**options):
    """(params, cfg) of a net with random weights."""
    sizes = {"vocabulary": 31, "context": 16, "layers": 2, "heads": 2, "width": 16}
    cfg = gpt2.Config(**sizes | options)
    return tree.map(lambda p: 8 * p, spec.init(random.key(0), gpt2.spec(cfg))), cfg
