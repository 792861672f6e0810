"""Inception v3: its auxiliary head, with files and in training."""

import dataclasses

import torch
from safetensors.torch import save_file

from core import random, spec
from nets.classifiers import inception
from tests.nets.parity import assert_same, randomise
from tests.registry.classifier_modules import INCEPTION, small_inception


def test_from_pretrained_can_leave_the_auxiliary_head_out(tmp_path):
    """And the pixels that the published weights want are those of torchvision's transform_input."""
    module = randomise(small_inception(transform_input=True)).eval()
    save_file({name: x.contiguous() for name, x in module.state_dict().items()}, tmp_path / "model.safetensors")
    cfg = dataclasses.replace(INCEPTION, aux=False)
    params = inception.from_pretrained(str(tmp_path), cfg)
    assert "aux" not in params and "aux" in inception.from_pretrained(str(tmp_path), INCEPTION)
    pixels = random.uniform(random.key(0), (2, 3, 75, 80))
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    actual = inception.apply(params, (pixels - 0.5) / 0.5, cfg)
    assert_same(actual, module((pixels - mean) / std).detach(), "eval")


def test_dropout_is_before_the_head_alone():
    cfg = dataclasses.replace(INCEPTION, dropout=0.5, aux_kernel=1)
    params, x = spec.init(random.key(0), inception.spec(cfg)), random.normal(random.key(1), (4, 3, 107, 107))
    first, again, other = (inception.apply(params, x, cfg, key=random.key(i), train=True) for i in (2, 2, 3))
    assert torch.equal(first.logits, again.logits) and not torch.equal(first.logits, other.logits)
    assert torch.equal(first.aux, other.aux)
