"""VGG: published files without counts, and initial values."""

import pytest
import torch

from core import random, spec, tree
from nets.classifiers import vgg


def test_published_files_may_lack_the_counts_of_batch_norm(tmp_path):
    cfg = vgg.Config(((4,), (5,)), True, pooled=1, hidden=6, classes=3)
    table, params = vgg.rename_table(cfg), spec.init(random.key(0), vgg.spec(cfg))
    state = {table[name].theirs: x for name, x in tree.items(params) if not name.endswith("count")}
    torch.save(state, tmp_path / "vgg.pth")
    loaded = vgg.from_pretrained(str(tmp_path / "vgg.pth"), cfg)
    assert tree.names(loaded) == tree.names(params)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(loaded), tree.leaves(params), strict=True))


def test_initial_values():
    """As in torchvision, whose class has linear layers of one large size: He et al. 2015 by the fan-out, 0.01."""
    cfg = vgg.Config(((32,), (64,)), hidden=64, pooled=2, classes=40)
    params = spec.init(random.key(0), vgg.spec(cfg))
    assert float(params["stages"][1][0]["conv"]["weight"].std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    for p in (*params["hidden"], params["head"]):
        assert float(p["weight"].std()) == pytest.approx(0.01, rel=0.05) and not p["bias"].any()
