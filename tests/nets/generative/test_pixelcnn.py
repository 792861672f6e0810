"""PixelCNN: receptive fields, the net with masks written out, and samples against exact probabilities."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core import random, spec, tree
from nets.generative import pixelcnn
from tests.nets.parity import assert_same

CFG = pixelcnn.Config((4, 5), categories=6, width=4, layers=3, first_kernel=5, kernel=3, hidden=7, classes=3)
LABELS = torch.tensor([2, 0, 1])


def values(cfg, seed=0, scale=1.0):
    params = spec.init(random.key(seed), pixelcnn.spec(cfg), torch.float64)
    keys = random.sites(random.key(seed + 1), len(tree.leaves(params)))
    # Biases too.
    leaves = [
        scale * (leaf + 0.3 * random.normal(key, leaf.shape, leaf.dtype))
        for leaf, key in zip(tree.leaves(params), keys, strict=True)
    ]
    return tree.nest(dict(zip(tree.names(params), leaves, strict=True)), params)


def images(n, cfg=CFG, seed=3):
    return random.randint(random.key(seed), (n, *cfg.shape), 0, cfg.categories).long()


class Masked(nn.Conv2d):
    """Whole kernel with zeros outside the stack's receptive field. Mask A leaves the pixel itself out too."""

    def __init__(self, d_in, d_out, kernel, stack, mask):
        super().__init__(d_in, d_out, kernel, padding=kernel // 2)
        half, visible = kernel // 2, torch.zeros(kernel, kernel)
        if stack == "vertical":
            visible[: half + (mask == "B")] = 1
        else:
            visible[half, : half + (mask == "B")] = 1
        self.register_buffer("visible", visible)

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.visible, self.bias)

    def fill(self, p):
        """Weights from our smaller kernel, which holds those that the mask keeps."""
        rows, columns = self.visible.any(1).nonzero()[:, 0], self.visible.any(0).nonzero()[:, 0]
        weight = torch.ones_like(self.weight)
        weight[:, :, rows[:, None], columns] = p["weight"]
        self.weight.data, self.bias.data = weight, p["bias"]


def gated(x, y, classes):
    a, b = (x + F.embedding(y, classes)[:, :, None, None]).chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


def test_equals_masked_convolutions():
    params, codes = values(CFG), images(3)
    v = h = F.embedding(codes, params["embedding"]["weight"]).permute(0, 3, 1, 2)
    for i, p in enumerate(params["layers"]):
        kernel, mask = (5, "A") if i == 0 else (3, "B")
        vertical, horizontal = (Masked(4, 8, kernel, stack, mask).double() for stack in ("vertical", "horizontal"))
        vertical.fill(p["vertical"])
        horizontal.fill(p["horizontal"])
        above = vertical(v)
        left = horizontal(h) + F.conv2d(above, **p["vertical_to_horizontal"])
        new = F.conv2d(gated(left, LABELS, p["classes"]["weight"][:, 8:]), **p["out"])
        v, h = gated(above, LABELS, p["classes"]["weight"][:, :8]), new if i == 0 else new + h
    x = F.conv2d(F.conv2d(h.relu(), **params["hidden"]).relu(), **params["output"])
    assert_same(pixelcnn.apply(params, codes, CFG, labels=LABELS), x.detach().permute(0, 2, 3, 1), "logits", 1e-12)


@pytest.mark.parametrize("first_kernel", [3, 5])
def test_a_pixel_depends_on_all_before_it_and_nothing_else(first_kernel):
    """Each pixel in turn is changed: all logits after it change and no others. So there is no blind spot."""
    cfg = replace(CFG, layers=6, first_kernel=first_kernel, classes=0)
    params, codes = values(cfg), images(1)
    positions = codes.numel()
    changed = codes.flatten().repeat(positions, 1)
    changed = changed.diagonal_scatter((changed.diagonal() + 1) % 6).reshape(positions, *cfg.shape)
    moved = pixelcnn.apply(params, changed, cfg) - pixelcnn.apply(params, codes, cfg)
    actual = moved.abs().amax(-1).flatten(1) > 1e-13
    assert torch.equal(actual, torch.ones(positions, positions, dtype=torch.bool).triu(1))


def test_logits_do_not_depend_on_the_rows_below():
    params, codes = values(CFG), images(3)
    whole = pixelcnn.apply(params, codes, CFG, labels=LABELS)
    torch.testing.assert_close(pixelcnn.apply(params, codes[:, :2], CFG, labels=LABELS), whole[:, :2])


TINY = pixelcnn.Config((2, 2), 3, width=3, layers=2, first_kernel=3, hidden=4, classes=2)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_exact_probabilities(temperature):
    """All 81 images of 2 x 2 pixels of 3 values: probabilities sum to 1, and samples have these frequencies."""
    params, count = values(TINY, scale=1.5), 4000
    every = torch.tensor(list(product(range(3), repeat=4))).reshape(81, 2, 2)
    logits = pixelcnn.apply(params, every, TINY, labels=torch.ones(81, dtype=torch.int64))
    log_p = (logits / temperature).log_softmax(-1).gather(-1, every[..., None]).sum((1, 2, 3))
    p = log_p.exp()
    torch.testing.assert_close(p.sum(), torch.ones_like(p.sum()))

    labels = torch.ones(count, dtype=torch.int64)
    samples = pixelcnn.sample(params, random.key(5), TINY, count, labels, temperature)
    which = (samples.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    counts = torch.bincount(which, minlength=81)
    often = p * count > 5
    chi_square = ((counts - p * count).square() / (p * count))[often].sum()
    # Its mean is the number of cells, its variance twice that.
    cells = int(often.sum())
    assert cells > 10 and abs(chi_square - cells) < 4 * (2 * cells) ** 0.5


def test_sample_is_the_same_for_any_count_and_greedy_at_temperature_0():
    params, labels = values(CFG), torch.tensor([2, 0, 1, 1])
    samples = pixelcnn.sample(params, random.key(0), CFG, 4, labels)
    assert torch.equal(pixelcnn.sample(params, random.key(0), CFG, 2, labels[:2]), samples[:2])
    assert not torch.equal(samples[2], samples[3]) and tuple(samples.shape) == (4, 4, 5)
    best = pixelcnn.sample(params, random.key(0), CFG, 4, labels, temperature=0.0)
    assert torch.equal(pixelcnn.apply(params, best, CFG, labels=labels).argmax(-1), best)


@pytest.mark.parametrize("preset", pixelcnn.PRESETS)
def test_presets(preset):
    cfg = replace(pixelcnn.PRESETS[preset], classes=10)
    codes = torch.empty(2, *cfg.shape, device="meta", dtype=torch.int64)
    logits = pixelcnn.apply(spec.abstract(pixelcnn.spec(cfg)), codes, cfg, labels=codes[:, 0, 0])
    assert tuple(logits.shape) == (2, *cfg.shape, cfg.categories)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: replace(CFG, kernel=4), "kernel 4; expected an odd number, at least 3"),
        (lambda: replace(CFG, first_kernel=1), "first_kernel 1; expected an odd number"),
        (lambda: replace(CFG, categories=1), "3 layers and 1 categories; expected at least 1 and 2"),
        (lambda: pixelcnn.apply({}, torch.zeros(2, 4, 5), CFG), r"integers, found torch.float32 \(2, 4, 5\)"),
        (lambda: pixelcnn.apply({}, images(3), CFG), "pixelcnn: .* pass labels="),
        (lambda: pixelcnn.sample(values(TINY), random.key(0), TINY, 2, LABELS[1:], -1.0), "temperature -1.0"),
    ],
    ids=["kernel", "first", "categories", "codes", "labels", "temperature"],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
