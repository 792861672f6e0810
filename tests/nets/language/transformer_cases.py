"""Small transformers in all variants, sentences for them, and the paper's positions written out."""

import math

import pytest
import torch

from core import random, spec, tree
from nets.language import transformer

F64 = torch.float64
SIZES = {"source_vocabulary": 31, "target_vocabulary": 31, "layers": 2, "heads": 2, "width": 16, "hidden": 24}
SIZES |= {"context": 16, "dropout": 0.0}
VARIANTS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "separate": {"shared": False, "target_vocabulary": 29, "output_bias": True},
    "learned": {"positions": "learned", "final_norms": True},
    "halves": {"positions": "halves", "scale": False, "activation": "gelu"},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def tiny(dtype=torch.float32, **options):
    """(params, cfg) of a net far from its start, whose logits are not small."""
    cfg = transformer.Config(**SIZES | options)
    params = spec.init(random.key(0), transformer.spec(cfg), dtype)
    keys = random.split(random.key(5), len(tree.leaves(params))).unbind(0)
    noise = tree.unflatten(params, list(keys))
    return tree.map(lambda p, key: 1.5 * p + 0.1 * random.normal(key, p.shape, dtype), params, noise), cfg


def sentences(time, lengths, seed=1, vocabulary=29):
    """(batch, time) tokens from 1 up, 0 after the lengths."""
    ids = random.randint(random.key(seed), (len(lengths), time), 1, vocabulary).long()
    return torch.where(torch.arange(time) < torch.tensor(lengths)[:, None], ids, 0)


def pairs(source_time=9, target_time=7):
    return sentences(source_time, [9, 3, 6, 1]), sentences(target_time, [4, 7, 1, 5], 2)


def distance(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def paper_positions(time, width):
    """Section 3.5, position by position."""
    table = torch.zeros(time, width, dtype=F64)
    for position in range(time):
        for i in range(width // 2):
            angle = position / 10000 ** (2 * i / width)
            table[position, 2 * i], table[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table
