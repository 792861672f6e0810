import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core import per_example, random, spec, tree
from core.sketches import gradient_sketches, hashes, sketch
from nets.classifiers import mlp

CFG = mlp.Config((6, 5, 3))
PARAMS = tree.cast(spec.init(random.key(0), mlp.spec(CFG)), torch.float64)
BATCH = (random.normal(random.key(1), (7, 6), torch.float64), torch.arange(7) % 3)


def loss(params: tree.Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(mlp.apply(params, batch[0], CFG), batch[1], reduction="none")


def flat(gradients: tree.Tree) -> Tensor:
    return torch.cat([x.flatten(1) for x in tree.leaves(gradients)], 1)


def test_is_the_linear_map_of_its_hashes():
    table = hashes(random.key(2), PARAMS, 8)
    gradients = per_example.each(loss, PARAMS, BATCH)
    pairs = [tree.get(table, name) for name in tree.names(PARAMS)]
    bucket, sign = torch.cat([p.bucket for p in pairs]), torch.cat([p.sign for p in pairs])
    matrix = F.one_hot(bucket, 8) * sign[:, None].double()
    out = gradient_sketches(loss, PARAMS, BATCH, table, 8)
    torch.testing.assert_close(out, flat(gradients) @ matrix)
    mean = tree.map(lambda g: g.mean(0), gradients)
    torch.testing.assert_close(sketch(table, mean, 8), out.mean(0))


def test_inner_products_are_unbiased_with_the_variance_of_the_paper():
    size, draws = 16, 2000
    gradients = flat(per_example.each(loss, PARAMS, BATCH))
    exact = gradients @ gradients.T

    def products(key: Tensor) -> Tensor:
        out = gradient_sketches(loss, PARAMS, BATCH, hashes(key, PARAMS, size), size)
        return out @ out.T

    estimates = torch.vmap(products, chunk_size=500)(random.split(random.key(3), draws))
    norms = exact.diagonal()
    bound = (norms[:, None] * norms + exact.square()) / size
    error = (estimates.mean(0) - exact).abs()
    assert (error <= 4.5 * (bound / draws).sqrt()).all()
    # The sample variance of this many samples is within some 15 % of the variance.
    assert (estimates.var(0) <= 1.2 * bound).all() and (estimates.var(0) >= 0.1 * bound).any()


@pytest.mark.parametrize("chunk", [3, None])
def test_chunks_and_compiled(chunk):
    torch._dynamo.reset()
    table = hashes(random.key(2), PARAMS, 8)
    whole = gradient_sketches(loss, PARAMS, BATCH, table, 8)
    f = functools.partial(gradient_sketches, loss, size=8, chunk=chunk)
    torch.testing.assert_close(f(params=PARAMS, batch=BATCH, hashes=table), whole)
    if chunk is None:
        return
    compiled = torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(params=PARAMS, batch=BATCH, hashes=table), whole)


def test_hashes_depend_on_the_name_alone():
    more = hashes(random.key(2), {**PARAMS, "another": torch.zeros(4)}, 8)
    for name, leaf in tree.items(hashes(random.key(2), PARAMS, 8)):
        assert torch.equal(tree.get(more, name), leaf)
    assert int(more["another"].bucket.max()) < 8 and set(more["another"].sign.tolist()) <= {-1.0, 1.0}


def test_refusals():
    with pytest.raises(ValueError, match="hashes: size must be at least 1, got 0"):
        hashes(random.key(0), PARAMS, 0)
    with pytest.raises(ValueError, match="layers.1"):
        sketch(hashes(random.key(0), {"layers": PARAMS["layers"][:1]}, 8), PARAMS, 8)
