"""LeNet without hidden layers."""

from core import random, spec, tree
from nets.classifiers import lenet


def test_without_hidden_layers():
    cfg = lenet.Config((3,), (), size=6, kernel=3, padding=(0,), classes=4)
    params = spec.init(random.key(0), lenet.spec(cfg))
    assert "hidden.0.weight" not in tree.names(params) and params["head"]["weight"].shape == (4, 12)
    assert lenet.apply(params, random.normal(random.key(1), (2, 1, 6, 6)), cfg).shape == (2, 4)
