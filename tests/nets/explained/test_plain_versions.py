"""The short versions against the full ones, from the same parameters."""

from pathlib import Path

import pytest
import torch

from core import random, spec
from nets.explained import gpt2 as plain_gpt2
from nets.explained import transformer as plain_transformer
from nets.language import gpt2, transformer

FOLDER = Path(plain_gpt2.__file__).parent


def tokens(shape: tuple[int, ...], most: int, seed: int = 1):
    return random.randint(random.key(seed), shape, 2, most).long()


@pytest.mark.parametrize("bias", [True, False])
def test_gpt2(bias):
    cfg = gpt2.Config(vocabulary=50, context=16, layers=3, heads=4, width=32, bias=bias)
    params, ids = spec.init(random.key(0), gpt2.spec(cfg), torch.float64), tokens((2, 9), 50)
    torch.testing.assert_close(plain_gpt2.gpt2(params, ids, 4), gpt2.apply(params, ids, cfg), rtol=0, atol=1e-12)
    written = gpt2.generate(params, ids, cfg, 5, temperature=0.0)
    assert torch.equal(plain_gpt2.generate(params, ids, 4, 5)[:, 9:], written)


def test_transformer():
    cfg = transformer.Config(40, 40, layers=2, heads=4, width=32, hidden=64, context=16)
    params = spec.init(random.key(0), transformer.spec(cfg), torch.float64)
    source, target = tokens((3, 8), 40), tokens((3, 6), 40, seed=2)
    source[1, 5:], target[2, 3:] = 0, 0
    expected = transformer.apply(params, (source, target), cfg)
    torch.testing.assert_close(plain_transformer.transformer(params, source, target, 4), expected, rtol=0, atol=1e-12)
    first = plain_transformer.translate(params, source, 4, 3)
    for i in range(1, 4):
        logits = transformer.apply(params, (source, first[:, :i]), cfg)
        assert torch.equal(logits[:, -1].argmax(-1), first[:, i])


@pytest.mark.parametrize(("name", "most"), [("gpt2", 60), ("transformer", 100)])
def test_lines_are_as_few_as_the_page_says(name, most):
    assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= most
