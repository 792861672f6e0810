"""VQ-VAE against diffusers' quantiser, the appendix written out, and the net in torch.nn."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import grad

from core import random, spec, stats, tree
from nets.generative import vqvae
from tests.nets.parity import assert_same
from train.losses import variational

CFG = vqvae.Config(2, width=6, stages=2, blocks=2, hidden=4, codes=7, code=3)
LEARNED = replace(CFG, codebook="loss")


def normal(seed, *shape):
    return random.normal(random.key(seed), shape, torch.float64)


def state(seed=0):
    """The averages in the middle of training."""
    size = random.uniform(random.key(seed), (7,), torch.float64, 0.0, 5.0)
    return {"count": torch.tensor(9.0), "size": size, "sum": size[:, None] * normal(seed + 1, 7, 3)}


def test_quantiser_equals_diffusers():
    """Codes, vectors and the loss, and the gradients of a function of them all, in double precision."""
    module = pytest.importorskip("diffusers.models.autoencoders.vae").VectorQuantizer
    theirs = module(7, 3, beta=0.25, legacy=False).double()
    rows, z = normal(0, 7, 3), normal(1, 4, 3, 5, 2)  # channels second, as in diffusers
    theirs.embedding.weight.data = rows.clone()
    weights, there = normal(2, *z.shape), z.clone().requires_grad_()
    vectors, loss, (_, _, codes) = theirs(there)
    ((vectors * weights).sin().sum() + loss).backward()

    def value(rows, z):
        actual = vqvae.quantise(rows, z.movedim(1, -1))
        losses = variational.codebook_loss(z.movedim(1, -1), actual.nearest)
        losses = losses + 0.25 * variational.commitment_loss(z.movedim(1, -1), actual.nearest)
        return (actual.vectors.movedim(-1, 1) * weights).sin().sum() + losses.mean(), (actual, losses.mean())

    (by_rows, by_z), (actual, losses) = grad(value, (0, 1), has_aux=True)(rows, z)
    assert torch.equal(actual.codes.flatten(), codes) and torch.equal(actual.nearest, rows[actual.codes])
    torch.testing.assert_close(actual.vectors.movedim(-1, 1), vectors.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(losses, loss.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(by_z, there.grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(by_rows, theirs.embedding.weight.grad, rtol=0, atol=1e-14)
    expected = torch.cdist(z.movedim(1, -1).reshape(-1, 3), rows).square()
    torch.testing.assert_close(vqvae.distances(rows, z.movedim(1, -1)).flatten(0, 2), expected)


def test_near_rows_are_told_apart_in_half_precision():
    """Rows that almost coincide, far from the vectors: in bfloat16 sums their differences would be lost."""
    rows = 10.0 + 0.01 * random.normal(random.key(0), (16, 8))
    z = rows.bfloat16() + random.normal(random.key(1), (16, 8)).bfloat16()
    expected = torch.cdist(z.double(), rows.double()).argmin(1)
    assert torch.equal(vqvae.quantise(rows, z).codes, expected)
    assert vqvae.quantise(rows, z).vectors.dtype == torch.bfloat16


def test_update_is_the_appendix():
    p, z = state(), normal(3, 4, 2, 2, 3)
    codes = vqvae.quantise(vqvae.codebook(p), z).codes
    n, total = [0.0] * 7, torch.zeros(7, 3, dtype=torch.float64)
    for vector, code in zip(z.reshape(-1, 3), codes.flatten().tolist(), strict=True):
        n[code] += 1
        total[code] += vector
    actual = vqvae.update(p, z, codes, decay=0.9)
    torch.testing.assert_close(actual["size"], 0.9 * p["size"] + 0.1 * torch.tensor(n, dtype=torch.float64))
    torch.testing.assert_close(actual["sum"], 0.9 * p["sum"] + 0.1 * total)
    assert actual["count"] == 10 and p["count"] == 9
    torch.testing.assert_close(vqvae.codebook(p, smoothing=0.0), p["sum"] / p["size"][:, None])
    assert vqvae.codebook({**p, "size": p["size"] * (torch.arange(7) > 0)}).isfinite().all()


@pytest.mark.parametrize("parts", [1, 2])
def test_training_reports_the_update(parts):
    """The gradient by the Stats is their increment; micro-batches make one update with their mean."""
    values = spec.init(random.key(0), vqvae.spec(CFG), torch.float64)
    values["codebook"] = tree.cast(state(), torch.float64)
    params, running = spec.split(vqvae.spec(CFG), values)
    x = normal(4, 4, 2, 8, 8)

    def loss(running, x):
        return vqvae.apply(tree.merge(params, running), x, CFG, train=True)["output"].sum()

    increments = [grad(loss)(running, part) for part in x.chunk(parts)]
    actual = stats.update(running, tree.map(lambda *leaves: sum(leaves), *increments))["codebook"]
    z = vqvae.encode(values, x, CFG)
    codes = vqvae.apply(values, x, CFG)["codes"]
    expected = [vqvae.update(values["codebook"], a, b) for a, b in zip(z.chunk(parts), codes.chunk(parts), strict=True)]
    expected = tree.map(lambda *leaves: sum(leaves) / parts, *expected)
    for name in ("count", "size", "sum"):
        torch.testing.assert_close(actual[name], expected[name])


def test_the_averages_of_parts_are_those_of_the_batch():
    p, z = state(), normal(3, 4, 2, 2, 3)
    codes = vqvae.quantise(vqvae.codebook(p), z).codes
    parts = [vqvae.update(p, a, b, ways=2) for a, b in zip(z.chunk(2), codes.chunk(2), strict=True)]
    mean, whole = tree.map(lambda a, b: (a + b) / 2, *parts), vqvae.update(p, z, codes)
    torch.testing.assert_close(mean, whole)
    assert not torch.allclose(vqvae.update(p, z[:2], codes[:2])["size"], whole["size"])


@pytest.mark.parametrize("revived", [True, False])
def test_revival_finds_every_cluster(revived):
    """All rows start close together, where one of them is nearest to whole clusters, which share it without revival."""
    z = (4 * normal(5, 5, 3).repeat(30, 1) + 0.1 * normal(6, 150, 3))[None]
    p = tree.cast(spec.init(random.key(0), vqvae.spec(CFG))["codebook"], torch.float64)
    for t in range(60):
        p = vqvae.update(p, z, vqvae.quantise(vqvae.codebook(p), z).codes, decay=0.7)
        if revived:
            p = vqvae.revive(p, z, random.fold_in(random.key(2), t), threshold=0.5)
    actual = vqvae.quantise(vqvae.codebook(p), z)
    error, used = (actual.nearest - z).square().mean(), len(actual.codes.unique())
    assert (error < 0.02 and used >= 5) if revived else (error > 1 and used < 5)


@pytest.mark.parametrize("learned", [False, True])
def test_revival(learned):
    p, z = state(), normal(7, 4, 2, 2, 3)
    size = p["size"]
    p = {"weight": vqvae.codebook(p)} if learned else p
    actual = vqvae.revive(p, z, random.key(0), 2.0, size if learned else None)
    dead = size < 2.0
    assert dead.any() and not dead.all()
    rows, before = vqvae.codebook(actual, 0.0), vqvae.codebook(p, 0.0)
    torch.testing.assert_close(rows[~dead], before[~dead])
    # Each new row is one of the vectors, and they are not all one.
    off, which = torch.cdist(rows[dead], z.reshape(-1, 3)).min(1)
    assert off.max() < 1e-12 and len(which.unique()) > 1
    other = vqvae.codebook(vqvae.revive(p, z, random.key(1), 2.0, size), 0.0)
    assert not torch.equal(other[dead], rows[dead])


def test_perplexity():
    counts = vqvae.usage(torch.tensor([[0, 1], [1, 6]]), CFG)
    assert counts.tolist() == [1, 2, 0, 0, 0, 0, 1]
    entropy = torch.distributions.Categorical(counts / 4).entropy()
    torch.testing.assert_close(vqvae.perplexity(counts), entropy.exp())
    assert vqvae.perplexity(torch.ones(7)) == pytest.approx(7)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 1)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.conv1(torch.relu(x))))


def test_net_equals_torch():
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(2, 6, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 4, 2, 1),
        nn.ReLU(),
        Block(),
        Block(),
        nn.ReLU(),
        nn.Conv2d(6, 3, 1),
    )
    decoder = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        Block(),
        Block(),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 6, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 2, 4, 2, 1),
    )

    def affine(m):
        return {"bias": m.bias.detach(), "weight": m.weight.detach()}

    def blocks(*modules):
        return [{"conv1": affine(m.conv1), "conv2": affine(m.conv2)} for m in modules]

    encoder, decoder = encoder.double(), decoder.double()
    down = [affine(encoder[0]), affine(encoder[2])]
    values = {
        "codebook": {"weight": normal(0, 7, 3)},
        "decoder": {
            "blocks": blocks(*decoder[1:3]),
            "input": affine(decoder[0]),
            "layers": [affine(decoder[4]), affine(decoder[6])],
        },
        "encoder": {"blocks": blocks(*encoder[4:6]), "layers": down, "output": affine(encoder[7])},
    }
    spec.check(vqvae.spec(LEARNED), values)
    x = normal(1, 3, 2, 8, 12)
    z = encoder(x).detach()
    codes = torch.cdist(z.movedim(1, -1).reshape(-1, 3), values["codebook"]["weight"]).argmin(1).view(3, 2, 3)
    expected = decoder(values["codebook"]["weight"][codes].movedim(-1, 1)).detach()
    actual = vqvae.apply(values, x, LEARNED)
    assert torch.equal(actual["codes"], codes)
    assert_same((actual["encodings"], actual["output"]), (z.movedim(1, -1), expected), "", 1e-12)
    assert_same(vqvae.decode(values, codes, LEARNED), expected, "decode", 1e-12)


@pytest.mark.parametrize("preset", vqvae.PRESETS)
def test_presets(preset):
    cfg = vqvae.PRESETS[preset]
    params = spec.abstract(vqvae.spec(cfg))
    x = torch.empty(2, cfg.channels, 32, 32, device="meta")
    out = vqvae.apply(params, x, cfg)
    side = 32 // 2**cfg.stages
    assert out["output"].shape == x.shape and tuple(out["codes"].shape) == (2, side, side)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: replace(CFG, codebook="mean"), "codebook 'mean'; expected ema or loss"),
        (lambda: replace(CFG, codes=1), "2 stages and 1 codes; expected at least 1 and 2"),
        (lambda: replace(CFG, decay=1.0), r"decay 1.0 is outside \[0, 1\)"),
        (lambda: vqvae.encode({}, torch.zeros(1, 3, 8, 8), CFG), r"expected images \(batch, 2, height, width\)"),
        (lambda: vqvae.encode({}, torch.zeros(1, 2, 8, 6), CFG), "8 x 6 pixels cannot be halved 2 times"),
        (lambda: vqvae.decode({}, torch.zeros(1, 2, 2), CFG), r"integers, found torch.float32 \(1, 2, 2\)"),
        (lambda: vqvae.quantise(torch.zeros(7, 3), torch.zeros(2, 4)), r"vectors \(..., 3\), found vectors \(2, 4\)"),
        (lambda: vqvae.revive({"weight": torch.zeros(7, 3)}, torch.zeros(2, 3), random.key(0)), "pass size="),
    ],
    ids=["codebook", "codes", "decay", "channels", "size", "integers", "vectors", "use"],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
