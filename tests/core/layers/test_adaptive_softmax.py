"""Adaptive softmax against torch.nn.AdaptiveLogSoftmaxWithLoss."""

import pytest
import torch
from torch.func import grad, vmap

from core import per_example, random, spec, tree
from core.layers.adaptive_softmax import adaptive_cross_entropy, adaptive_log_softmax, adaptive_softmax_spec

CUTOFFS = [5, 9, 14]


def both(bias=True, d_in=64, classes=20):
    """(parameters, torch's module with them), in double precision."""
    module = torch.nn.AdaptiveLogSoftmaxWithLoss(d_in, classes, CUTOFFS, head_bias=bias, dtype=torch.float64)
    params = spec.init(random.key(0), adaptive_softmax_spec(d_in, classes, CUTOFFS, bias=bias), torch.float64)
    names = {"head.weight": "head.weight", "head.bias": "head.bias"}
    names |= {
        f"tails.{i}.{part}.weight": f"tail.{i}.{j}.weight" for i in range(3) for j, part in ((0, "down"), (1, "up"))
    }
    module.load_state_dict({names[name]: value.clone() for name, value in tree.items(params)})
    return params, module, names


@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch(bias):
    params, module, names = both(bias)
    x, targets = random.normal(random.key(1), (40, 64), torch.float64), torch.arange(40) % 20
    torch.testing.assert_close(adaptive_log_softmax(params, x), module.log_prob(x), rtol=1e-12, atol=1e-12)
    losses = adaptive_cross_entropy(params, x, targets)
    torch.testing.assert_close(losses, -module(x, targets).output, rtol=1e-12, atol=1e-12)
    module(x, targets).loss.backward()
    theirs = dict(module.named_parameters())
    for name, g in tree.items(grad(lambda p: adaptive_cross_entropy(p, x, targets).mean())(params)):
        torch.testing.assert_close(g, theirs[names[name]].grad, rtol=1e-12, atol=1e-12)


def test_initial_values_are_those_of_torch():
    params, module, names = both(d_in=256, classes=4000)
    values = spec.init(random.key(2), adaptive_softmax_spec(256, 4000, CUTOFFS, bias=True))
    fresh = torch.nn.AdaptiveLogSoftmaxWithLoss(256, 4000, CUTOFFS, head_bias=True).state_dict()
    for name, value in tree.items(values):
        bound = fresh[names[name]].shape[-1] ** -0.5 if value.ndim > 1 else 256**-0.5
        assert value.shape == fresh[names[name]].shape and value.abs().max() <= bound
        assert value.numel() < 500 or value.std() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_leading_axes_and_transforms():
    params, _, _ = both()
    x, targets = random.normal(random.key(1), (4, 5, 64), torch.float64), torch.arange(20).view(4, 5)
    logs = adaptive_log_softmax(params, x)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(4, 5, dtype=torch.float64))
    expected = -logs.gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(adaptive_cross_entropy(params, x, targets), expected)
    mapped = vmap(adaptive_cross_entropy, (None, 0, 0))(params, x, targets)
    torch.testing.assert_close(mapped, expected)

    def losses(params, batch):
        return adaptive_cross_entropy(params, *batch).sum(1)

    assert per_example.verify(losses, params, (x, targets)) <= 1e-12
    compiled = torch.compile(adaptive_cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(params, x, targets), expected)


@pytest.mark.parametrize("cutoffs", [[], [0], [5, 5], [9, 5], [5, 20]])
def test_cutoffs_out_of_order(cutoffs):
    with pytest.raises(ValueError, match="expected cutoffs that rise from 1 to 19"):
        adaptive_softmax_spec(32, 20, cutoffs)
