"""GoogLeNet: its auxiliary heads, with files and in training."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from core import random, spec
from nets.classifiers import googlenet
from tests.nets.parity import assert_same, randomise
from tests.registry.classifier_modules import GOOGLENET, small_googlenet


def test_from_pretrained_can_leave_the_auxiliary_heads_out(tmp_path):
    """And the pixels that the published weights want are those of torchvision's transform_input."""
    module = randomise(small_googlenet(transform_input=True)).eval()
    save_file({name: x.contiguous() for name, x in module.state_dict().items()}, tmp_path / "model.safetensors")
    cfg = dataclasses.replace(GOOGLENET, aux=False)
    params = googlenet.from_pretrained(str(tmp_path), cfg)
    assert "aux" not in params and "aux" in googlenet.from_pretrained(str(tmp_path), GOOGLENET)
    pixels = random.uniform(random.key(0), (2, 3, 32, 32))
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    actual = googlenet.apply(params, (pixels - 0.5) / 0.5, cfg)
    assert_same(actual, module((pixels - mean) / std).detach(), "eval")


@pytest.mark.parametrize(
    ("rates", "changed"),
    [((0.5, 0.0), ["logits"]), ((0.0, 0.5), ["aux1", "aux2"])],
    ids=["head", "auxiliary"],
)
def test_each_head_has_its_dropout(rates, changed):
    cfg = dataclasses.replace(GOOGLENET, dropout=rates[0], aux_dropout=rates[1])
    params, x = spec.init(random.key(0), googlenet.spec(cfg)), random.normal(random.key(1), (4, 3, 32, 32))
    first, again, other = (googlenet.apply(params, x, cfg, key=random.key(i), train=True) for i in (2, 2, 3))
    assert [name for name in first._fields if not torch.equal(getattr(first, name), getattr(other, name))] == changed
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_without_auxiliary_heads_their_dropout_needs_no_key():
    cfg = dataclasses.replace(GOOGLENET, aux=False, aux_dropout=0.5)
    params = spec.init(random.key(0), googlenet.spec(cfg))
    out = googlenet.apply(params, random.normal(random.key(1), (2, 3, 32, 32)), cfg, train=True)
    assert out.shape == (2, 7)
