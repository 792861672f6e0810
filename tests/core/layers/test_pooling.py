"""Pooling against torch.nn, and under the transforms."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from core import random, tree
from core.layers import adaptive_average_pool, adaptive_max_pool, average_pool, global_average_pool, max_pool

MAX = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGE = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE_MAX = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}
ADAPTIVE_AVERAGE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def image(dims):
    return random.normal(random.key(dims), (2, 3, *(8, 7, 6)[:dims]), torch.float64)


def check(f, module, x):
    torch.testing.assert_close(f(x), module(x), rtol=0, atol=0)
    torch.testing.assert_close(*(grad(lambda x, g=g: torch.sin(g(x)).sum())(x) for g in (f, module)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 1, "padding": 1},
        {"stride": 2, "ceil_mode": True},
        {"stride": 2, "dilation": 2, "padding": 1, "ceil_mode": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_max_pool_equals_torch(dims, options):
    check(lambda x: max_pool(x, 3, **options), MAX[dims](3, **options), image(dims))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 1, "padding": 1},
        {"stride": 2, "padding": 1, "count_include_pad": False},
        {"stride": 2, "padding": 1, "ceil_mode": True},
        {"stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_average_pool_equals_torch(dims, options):
    check(lambda x: average_pool(x, 3, **options), AVERAGE[dims](3, **options), image(dims))


def test_one_integer_per_axis():
    options = {"stride": (1, 2), "padding": (0, 1)}
    check(lambda x: max_pool(x, (2, 3), **options), nn.MaxPool2d((2, 3), **options), image(2))
    check(lambda x: average_pool(x, (2, 3), **options), nn.AvgPool2d((2, 3), **options), image(2))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, (5, None, 2)])
def test_adaptive_pools_equal_torch(dims, size):
    size = size[:dims] if isinstance(size, tuple) else size
    check(lambda x: adaptive_max_pool(x, size), ADAPTIVE_MAX[dims](size), image(dims))
    check(lambda x: adaptive_average_pool(x, size), ADAPTIVE_AVERAGE[dims](size), image(dims))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_global_average_pool_is_the_adaptive_one_of_size_one(dims):
    module = nn.Sequential(ADAPTIVE_AVERAGE[dims](1), nn.Flatten())
    torch.testing.assert_close(global_average_pool(image(dims)), module(image(dims)))


POOLS = {
    "max": lambda x: max_pool(x, 3, stride=2, padding=1),
    "average": lambda x: average_pool(x, 3, stride=2, padding=1, count_include_pad=False),
    "adaptive max": lambda x: adaptive_max_pool(x, 3),
    "adaptive average": lambda x: adaptive_average_pool(x, 3),
    "global average": global_average_pool,
}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", POOLS)
def test_examples_alone_equal_the_batch(name, dims):
    gradient = grad(lambda x: torch.sin(POOLS[name](x)).sum())
    x = image(dims)
    torch.testing.assert_close(vmap(lambda x: gradient(x[None])[0])(x), gradient(x))


def test_compiled_equals_eager():
    torch._dynamo.reset()
    gradient = grad(lambda x: sum(torch.sin(f(x)).sum() for f in POOLS.values()))
    f = vmap(lambda x: gradient(x[None])[0])
    x = {dims: image(dims) for dims in (1, 2)}
    for value in tree.leaves(x):
        torch.testing.assert_close(
            torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")(value), f(value)
        )


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("shape", [(2, 3), (1, 1, 4, 4, 4, 4)])
def test_a_wrong_rank_is_an_error(name, shape):
    with pytest.raises(
        ValueError, match=r"_pool: expected \(batch, channels, \*space\) with 1 to 3 spatial axes, found"
    ):
        POOLS[name](torch.zeros(shape))
