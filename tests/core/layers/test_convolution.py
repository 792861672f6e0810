"""conv and conv_transpose against torch.nn.ConvNd and ConvTransposeNd, and under the transforms."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from core import random, spec, tree
from core.initializers import ones
from core.layers import conv, conv_spec, conv_transpose

MODULES = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}
TRANSPOSED = {1: torch.nn.ConvTranspose1d, 2: torch.nn.ConvTranspose2d, 3: torch.nn.ConvTranspose3d}
SPACE = (7, 6, 5)


def values(layer, key=None):
    return spec.init(random.key(0) if key is None else key, layer, torch.float64)


def image(dims, channels=4, batch=2):
    return random.normal(random.key(1), (batch, channels, *SPACE[:dims]), torch.float64)


def check(f, module, p, x):
    def expected(p, x):
        return functional_call(module, p, (x,))

    torch.testing.assert_close(f(p, x), expected(p, x))
    actual, reference = (grad(lambda p, x, g=g: torch.sin(g(p, x)).sum(), argnums=(0, 1))(p, x) for g in (f, expected))
    torch.testing.assert_close(actual, reference)


OPTIONS = [
    {},
    {"padding": 1},
    {"padding": "valid", "stride": 2},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "stride": 2, "dilation": 2, "groups": 2},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular", "groups": 4},
    {"padding": 2, "padding_mode": "replicate", "stride": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "dilation": 2},
    {"padding": 0, "padding_mode": "circular"},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_equals_torch(dims, kernel, options):
    groups = options.get("groups", 1)
    p = values(conv_spec(4, 8, kernel, dims=dims, groups=groups, bias_init=ones))
    module = MODULES[dims](4, 8, kernel, dtype=torch.float64, **options)
    check(lambda p, x: conv(p, x, **options), module, p, image(dims))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "options",
    [
        {"padding": (1, 0, 2), "stride": (2, 1, 1), "dilation": (1, 2, 1)},
        {"padding": "same", "dilation": (1, 3, 2)},
        {"padding": (1, 0, 2), "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_conv_takes_one_integer_per_axis(options):
    layer = conv_spec(4, 2, (3, 2, 4), bias=False)
    assert layer["weight"].shape == (2, 4, 3, 2, 4) and "bias" not in layer
    module = torch.nn.Conv3d(4, 2, (3, 2, 4), bias=False, dtype=torch.float64, **options)
    check(lambda p, x: conv(p, x, **options), module, values(layer), image(3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": 2, "output_padding": 1, "groups": 2},
        {"stride": 3, "padding": 1, "dilation": 2, "groups": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_transpose_equals_torch(dims, kernel, options):
    layer = conv_spec(4, 8, kernel, dims=dims, groups=options.get("groups", 1), transposed=True, bias_init=ones)
    assert layer["weight"].axes[:2] == ("in", "out")
    module = TRANSPOSED[dims](4, 8, kernel, dtype=torch.float64, **options)
    check(lambda p, x: conv_transpose(p, x, **options), module, values(layer), image(dims))


def test_conv_transpose_takes_one_integer_per_axis():
    options = {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "dilation": (1, 2)}
    module = torch.nn.ConvTranspose2d(4, 2, (3, 2), bias=False, dtype=torch.float64, **options)
    p = values(conv_spec(4, 2, (3, 2), transposed=True, bias=False))
    check(lambda p, x: conv_transpose(p, x, **options), module, p, image(2))


def both(p, x):
    y = conv(p["down"], x, padding="same", padding_mode="circular", groups=2)
    return torch.sin(conv_transpose(p["up"], y, stride=2, groups=2)).sum()


def ensemble():
    layers = {"down": conv_spec(4, 6, 3, groups=2), "up": conv_spec(6, 2, 2, groups=2, transposed=True)}
    return vmap(lambda key: values(layers, key))(random.split(random.key(0), 3))


def test_ensemble_equals_the_members():
    p, x = ensemble(), image(2)
    stacked = vmap(grad(both), in_dims=(0, None))(p, x)
    torch.testing.assert_close(stacked, tree.stack([grad(both)(q, x) for q in tree.unstack(p)]))


def test_gradients_of_examples_add_up():
    p, x = tree.unstack(ensemble())[0], image(2, batch=3)
    each = vmap(grad(lambda p, x: both(p, x[None])), in_dims=(None, 0))(p, x)
    torch.testing.assert_close(tree.map(lambda g: g.sum(0), each), grad(both)(p, x))


def test_compiled_equals_eager():
    torch._dynamo.reset()
    p, x, f = ensemble(), image(2), vmap(grad(both), in_dims=(0, None))
    torch.testing.assert_close(torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")(p, x), f(p, x))


def test_dims_follow_the_kernel():
    assert conv_spec(4, 2, 3)["weight"].shape == (2, 4, 3, 3)
    assert conv_spec(4, 2, (3,))["weight"].shape == (2, 4, 3)
    assert conv_spec(4, 2, 3, dims=3, axes=("o", None))["weight"].axes == ("o", None, None, None, None)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 6, 3), {"groups": 4}, r"groups=4 must divide d_in=4 and d_out=6"),
        ((4, 6, (3, 3, 3, 3)), {}, r"expected 1 to 3 spatial axes, found 4"),
        ((4, 6, (3, 3)), {"dims": 1}, r"expected 1 integers for kernel, found \(3, 3\)"),
    ],
)
def test_a_wrong_spec_is_an_error(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        conv_spec(*arguments, **options)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ((2, 3, 7, 6), {}, r"conv: expected x of shape \(batch, 4, space, space\), found \(2, 3, 7, 6\)"),
        ((4, 7, 6), {}, r"conv: expected x of shape \(batch, 4, space, space\), found \(4, 7, 6\)"),
        ((2, 4, 7, 6), {"padding": "full"}, r"padding is 'same', 'valid' or integers, not 'full'"),
        ((2, 4, 7, 6), {"padding": "same", "stride": (1, 2)}, r"padding 'same' needs stride 1, found \(1, 2\)"),
        ((2, 4, 7, 6), {"padding_mode": "mirror"}, r"padding_mode is one of zeros, .*, not 'mirror'"),
        ((2, 4, 7, 6), {"padding": (1, 1, 1)}, r"expected 2 integers for padding, found \(1, 1, 1\)"),
    ],
)
def test_a_wrong_call_is_an_error(x, options, message):
    with pytest.raises(ValueError, match=message):
        conv(values(conv_spec(4, 2, 3)), torch.zeros(x, dtype=torch.float64), **options)


def test_a_wrong_transposed_call_is_an_error():
    with pytest.raises(ValueError, match=r"conv_transpose: expected x of shape \(batch, 4, space\), found \(2, 3, 7\)"):
        conv_transpose(values(conv_spec(4, 2, (3,), transposed=True)), torch.zeros(2, 3, 7, dtype=torch.float64))
