"""Spectral normalisation against torch.nn.utils.parametrizations.spectral_norm."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from core import random, spec, tree
from core.layers import conv, conv_spec, linear, linear_spec
from core.spectral import spectral_norm, spectral_vectors

SPEC = {"conv": conv_spec(2, 5, 3), "layers": [linear_spec(20, 4), {}, linear_spec(4, 1)]}


def values(seed=0, dtype=torch.float64):
    return spec.init(random.key(seed), SPEC, dtype)


def net(params, x):
    x = conv(params["conv"], x).tanh().flatten(1)
    return linear(params["layers"][2], linear(params["layers"][0], x).tanh())


def images(n=3):
    return random.normal(random.key(9), (n, 2, 4, 4), torch.float64)


def torch_module(params, vectors):
    """The same net and the same vectors with torch's parametrisation."""
    module = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 1))
    module = module.double()
    for i, name in ((0, "conv"), (3, "layers.0"), (5, "layers.2")):
        module[i].load_state_dict(tree.get(params, name))
        nn.utils.parametrizations.spectral_norm(module[i])
        norm, pair = module[i].parametrizations.weight[0], tree.get(vectors, f"{name}.weight")
        norm._u.copy_(pair["u"])
        norm._v.copy_(pair["v"])
    return module


def test_equals_torch_over_several_steps():
    params = values()
    vectors = spectral_vectors(random.key(1), params, steps=1)
    module, x = torch_module(params, vectors).train(), images()

    def loss(params, vectors):
        normed, vectors = spectral_norm(params, vectors)
        return net(normed, x).square().sum(), (normed, vectors)

    for _ in range(3):
        gradient, (normed, vectors) = grad(loss, has_aux=True)(params, vectors)
        module.zero_grad()
        module(x).square().sum().backward()
        for i, name in ((0, "conv"), (3, "layers.0"), (5, "layers.2")):
            ours = tree.get(gradient, name)
            norm, pair = module[i].parametrizations.weight[0], tree.get(vectors, f"{name}.weight")
            torch.testing.assert_close(pair["u"], norm._u)
            torch.testing.assert_close(pair["v"], norm._v)
            torch.testing.assert_close(ours["weight"], module[i].parametrizations.weight.original.grad)
            torch.testing.assert_close(ours["bias"], module[i].bias.grad)
        # The weights move, the vectors follow.
        params = tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        with torch.no_grad():
            for p in module.parameters():
                p -= 0.1 * p.grad

    module.eval()
    still, same = spectral_norm(params, vectors, steps=0)
    torch.testing.assert_close(net(still, x), module(x).detach())
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(same), tree.leaves(vectors), strict=True))


def test_converges_to_the_largest_singular_value():
    params = values()
    normed, _ = spectral_norm(params, spectral_vectors(random.key(1), params, steps=300))
    for name in ("conv.weight", "layers.0.weight", "layers.2.weight"):
        largest = torch.linalg.matrix_norm(tree.get(normed, name).flatten(1), 2)
        assert abs(float(largest) - 1) < 1e-9, name
    assert torch.equal(normed["conv"]["bias"], params["conv"]["bias"])


def test_select_and_purity():
    params = values()
    before = tree.map(torch.clone, params)
    vectors = spectral_vectors(random.key(1), params, lambda name, leaf: name.startswith("layers") and leaf.ndim > 1)
    assert tree.names(vectors) == ["layers.0.weight.u", "layers.0.weight.v", "layers.2.weight.u", "layers.2.weight.v"]
    copy = tree.map(torch.clone, vectors)
    normed, after = spectral_norm(params, vectors)
    assert torch.equal(normed["conv"]["weight"], params["conv"]["weight"])
    assert not torch.equal(normed["layers"][0]["weight"], params["layers"][0]["weight"])
    assert tree.structure(after) == tree.structure(vectors) and tree.structure(normed) == tree.structure(params)
    for actual, expected in ((params, before), (vectors, copy)):
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(actual), tree.leaves(expected), strict=True))
    # Vectors depend on the leaf's name and the key alone.
    alone = spectral_vectors(random.key(1), params, lambda name, leaf: name == "layers.2.weight")
    assert torch.equal(tree.get(alone, "layers.2.weight.v"), tree.get(vectors, "layers.2.weight.v"))


def penalty(params, vectors, x):
    """A gradient inside a gradient, as a critic's step has it."""
    normed, vectors = spectral_norm(params, vectors)
    slopes = grad(lambda x: net(normed, x).sum())(x)
    return slopes.square().sum() + net(normed, x).sum(), vectors


def test_vmap_equals_its_members():
    params = vmap(lambda key: spec.init(key, SPEC, torch.float64))(random.split(random.key(0), 3))
    vectors = vmap(spectral_vectors)(random.split(random.key(1), 3), params)
    step = grad(penalty, has_aux=True)
    together = vmap(step, (0, 0, None))(params, vectors, images())
    for i, member in enumerate(tree.unstack(params)):
        own = spectral_vectors(random.split(random.key(1), 3)[i], member)
        alone = step(member, own, images())
        for a, b in zip(tree.leaves(together), tree.leaves(alone), strict=True):
            torch.testing.assert_close(a[i], b)


def test_compiles():
    torch._dynamo.reset()
    params = values()
    vectors = spectral_vectors(random.key(1), params)
    step = grad(penalty, has_aux=True)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    for seed in (0, 1):
        actual, expected = (f(values(seed), vectors, images()) for f in (compiled, step))
        for a, b in zip(tree.leaves(actual), tree.leaves(expected), strict=True):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e-12, 1e20, 1e35])
def test_scale_does_not_matter(scale):
    """In float32, squares of these weights vanish or overflow."""
    params = spec.init(random.key(0), SPEC)
    expected, _ = spectral_norm(params, spectral_vectors(random.key(1), params))
    large = tree.map(lambda p: p * scale, params)
    actual, _ = spectral_norm(large, spectral_vectors(random.key(1), large))
    for name in ("conv.weight", "layers.0.weight", "layers.2.weight"):
        torch.testing.assert_close(tree.get(actual, name), tree.get(expected, name))


def test_a_zero_weight_stays_zero_until_it_is_not():
    zero = {"w": torch.zeros(3, 4)}
    normed, vectors = spectral_norm(zero, spectral_vectors(random.key(1), zero))
    assert not normed["w"].any()
    gradient = grad(lambda p: spectral_norm(p, vectors)[0]["w"].sum())(zero)["w"]
    assert gradient.isfinite().all()
    weight = {"w": random.normal(random.key(2), (3, 4))}
    normed, vectors = spectral_norm(weight, vectors, steps=50)
    torch.testing.assert_close(torch.linalg.matrix_norm(normed["w"], 2), torch.tensor(1.0))


def test_half_precision_weights_keep_float32_vectors():
    params = spec.init(random.key(0), SPEC)
    vectors = spectral_vectors(random.key(1), params)
    half, after = spectral_norm(tree.cast(params, torch.bfloat16), vectors)
    assert {x.dtype for x in tree.leaves(after)} == {torch.float32}
    assert {x.dtype for x in tree.leaves(half)} == {torch.bfloat16}
    expected, _ = spectral_norm(params, vectors)
    torch.testing.assert_close(tree.cast(half, torch.float32), expected, rtol=0.02, atol=0.01)


def test_errors():
    params = values()
    with pytest.raises(ValueError, match="no leaf is selected"):
        spectral_vectors(random.key(0), params, lambda name, leaf: False)
    with pytest.raises(ValueError, match=r"'conv.bias' has shape \(5,\); expected two axes"):
        spectral_vectors(random.key(0), params, lambda name, leaf: name == "conv.bias")
    vectors = spectral_vectors(random.key(0), params)
    with pytest.raises(ValueError, match="vectors for 'conv.weight', which the parameters lack"):
        spectral_norm({"layers": params["layers"]}, vectors)
    with pytest.raises(ValueError, match=r"'conv.weight' has shape \(2, 18\), its vectors are for \(5, 18\)"):
        spectral_norm({**params, "conv": {"weight": torch.ones(2, 18)}}, vectors)
