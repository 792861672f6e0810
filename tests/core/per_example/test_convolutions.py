"""Per-example gradients of convolutions of random settings, by every quantity, beside vmap(grad)."""

import random

import pytest
import torch
from torch.nn import functional as F

from core import per_example

SIZES = {"kernel": (1, 4), "stride": (1, 3), "dilation": (1, 3), "padding": (0, 2)}


def convolution(seed: int):
    """(a random convolution as a function of weight and input, weight, input of three examples), all float64."""
    draw = random.Random(seed)
    dims, groups, transposed = draw.choice((1, 2, 2, 3)), draw.choice((1, 1, 2, 4)), draw.random() < 0.4
    kernel, stride, dilation, padding = ([draw.randint(*SIZES[name]) for _ in range(dims)] for name in SIZES)
    reach = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [max(1, n) + draw.randint(1, 5) for n in reach]
    c, p = groups * draw.choice((1, 2, 3, 17)), groups * draw.randint(1, 2)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, c, *size, generator=generator, dtype=torch.float64)
    shape = (c, p // groups) if transposed else (p, c // groups)
    weight = torch.randn(*shape, *kernel, generator=generator, dtype=torch.float64)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        options["padding"] = [min(q, d * (k - 1) // 2) for q, k, d in zip(padding, kernel, dilation, strict=True)]
        options["output_padding"] = [draw.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
    function = getattr(F, f"conv{'_transpose' if transposed else ''}{dims}d")
    return (lambda w, x: function(x, w, **options)), weight, x


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("seed", range(24))
def test_every_quantity(seed, uses):
    """`uses` 2: the weight is used twice, in pictures of two sizes."""
    f, weight, x = convolution(seed)

    def loss(params, batch):
        inputs = (batch, F.pad(batch, (2, 1)))[:uses]
        return sum(
            (y.flatten(1) * torch.arange(1.0, y[0].numel() + 1).sin()).cos().sum(1)
            for y in map(lambda x: f(params["w"], x), inputs)
        )

    params = {"w": weight}
    each = torch.vmap(torch.func.grad(lambda p, x: loss(p, x[None])[0]), (None, 0))(params, x)["w"]  # (N, *shape)
    flat, norms = each.flatten(1), each.flatten(1).norm(dim=1)
    direction = {"w": weight.sin()}
    out = per_example.reports(loss, params, x, ("norm", "dot", "gram", "square"), direction=direction)
    expected = {
        "sum": each.sum(0),
        "norm": norms,
        "dot": flat @ direction["w"].flatten(),
        "gram": flat @ flat.T,
        "square": each.square().sum(0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name)["w"], value, msg=lambda m, name=name: f"{name}: {m}")
    limit = norms.mean() + 1e-6  # some windows lie in the padding alone
    factor = limit / norms.clamp(min=limit)
    for method in ("kept", "twice"):
        total = per_example.clipped(loss, params, x, limit, method=method).sum["w"]
        torch.testing.assert_close(total, torch.einsum("n,n...->...", factor, each))
