"""Encoders and decoders against the same nets written with torch.nn, down to the gradient of the bound."""

import pytest
import torch
from torch import nn
from torch.func import grad_and_value
from torch.nn import functional as F

from core import random, spec, tree
from nets.generative import autoencoder
from tests.nets.parity import assert_same
from train.losses import variational

LABELS = torch.tensor([2, 0, 1, 2])


class Dense(nn.Module):
    """The net of PyTorch's own example: one hidden layer, two heads."""

    def __init__(self, classes=0):
        super().__init__()
        self.hidden, self.mean, self.log_variance = nn.Linear(12 + classes, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.back, self.output = nn.Linear(3 + classes, 6), nn.Linear(6, 12)

    def encode(self, x, y):
        h = F.relu(self.hidden(torch.cat([x.view(len(x), -1), y], 1)))
        return self.mean(h), self.log_variance(h)

    def decode(self, z, y):
        return self.output(F.relu(self.back(torch.cat([z, y], 1)))).view(-1, 2, 2, 3)


class Convolutions(nn.Module):
    def __init__(self, classes=0):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(2 + classes, 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 4, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.mean, self.log_variance = nn.Linear(8 * 2 * 3, 3), nn.Linear(8 * 2 * 3, 3)
        self.project = nn.Linear(3 + classes, 8 * 2 * 3)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 4, 2, 1))

    def encode(self, x, y):
        h = self.down(torch.cat([x, y[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1))
        return self.mean(h), self.log_variance(h)

    def decode(self, z, y):
        return self.up(F.relu(self.project(torch.cat([z, y], 1))).view(-1, 8, 2, 3))


def affine(m):
    return {"bias": m.bias.detach(), "weight": m.weight.detach()}


def filled(module):
    heads = affine(module.mean), affine(module.log_variance)
    code = tree.map(lambda a, b: torch.cat([a, b]), *heads)
    if isinstance(module, Dense):
        encoder = {"code": code, "layers": [affine(module.hidden)]}
        return {"decoder": {"layers": [affine(module.back)], "output": affine(module.output)}, "encoder": encoder}
    encoder = {"code": code, "layers": [affine(module.down[0]), affine(module.down[2])]}
    up = {"layers": [affine(module.up[0])], "output": affine(module.up[2]), "project": affine(module.project)}
    return {"decoder": up, "encoder": encoder}


MLP = {"shape": (2, 2, 3), "latent": 3, "widths": (6,)}
CONVOLUTIONAL = {"shape": (2, 8, 12), "latent": 3, "kind": "convolutional", "width": 4}


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize(("kind", "sizes"), [(Dense, MLP), (Convolutions, CONVOLUTIONAL)], ids=["mlp", "conv"])
def test_parity(kind, sizes, classes):
    torch.manual_seed(0)
    module, cfg = kind(classes).double(), autoencoder.Config(**sizes, classes=classes)
    params = filled(module)
    spec.check(autoencoder.spec(cfg), params)
    x = random.uniform(random.key(0), (4, *cfg.shape), torch.float64)
    noise = random.normal(random.key(1), (4, 3), torch.float64)
    one_hot = F.one_hot(LABELS, 3)[:, :classes].double()

    mean, log_variance = module.encode(x, one_hot)
    logits = module.decode(mean + (0.5 * log_variance).exp() * noise, one_hot)
    # The loss of PyTorch's example.
    divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum()
    theirs = F.binary_cross_entropy(logits.sigmoid(), x, reduction="sum") + divergence
    theirs.backward()

    def loss(params):
        out = autoencoder.apply(params, x, cfg, labels=LABELS, key=random.key(1), train=True)
        likelihood = variational.bernoulli_log_likelihood(out["output"], x)
        kl = variational.kl_divergence(out["mean"], out["log_variance"])
        return -variational.elbo(likelihood, kl).sum(), out

    gradient, (ours, out) = grad_and_value(loss, has_aux=True)(params)
    actual = out["mean"], out["log_variance"], out["output"], ours
    assert_same(actual, tuple(t.detach() for t in (mean, log_variance, logits, theirs)), "output ", 1e-12)
    for parameter in module.parameters():
        parameter.data = parameter.grad
    assert_same(gradient, filled(module), "gradient ", 1e-12)


def test_without_training_the_code_is_the_mean():
    cfg = autoencoder.Config(**MLP)
    params, x = spec.init(random.key(0), autoencoder.spec(cfg)), random.uniform(random.key(1), (4, 2, 2, 3))
    out = autoencoder.apply(params, x, cfg)
    q = autoencoder.encode(params, x, cfg)
    torch.testing.assert_close(out["output"], autoencoder.decode(params, q.mean, cfg))
    torch.testing.assert_close(autoencoder.images(out["output"], cfg), out["output"].sigmoid())


def test_samples_are_of_q():
    """Standard errors of 10,000 samples: 0.013 of the mean, 0.014 of the log variance."""
    q = autoencoder.Gaussian(torch.tensor([1.0, -2.0]), torch.tensor([0.5, -3.0]))
    z = autoencoder.draw(autoencoder.Gaussian(*(t.expand(10_000, 2) for t in q)), random.key(0))
    torch.testing.assert_close(z.mean(0), q.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(z.var(0).log(), q.log_variance, rtol=0, atol=0.05)


@pytest.mark.parametrize("preset", autoencoder.PRESETS)
def test_presets(preset):
    cfg = autoencoder.PRESETS[preset]
    params, x = spec.abstract(autoencoder.spec(cfg)), torch.empty(3, *cfg.shape, device="meta")
    out = autoencoder.apply(params, x, cfg)
    assert out["output"].shape == x.shape and tuple(out["mean"].shape) == (3, cfg.latent)


def test_convolutions_first_outputs_are_of_the_size_of_the_input():
    """Standard deviations near 1, so the layers neither vanish nor saturate."""
    cfg = autoencoder.Config((1, 16, 16), 8, "convolutional", width=16, stages=3, output="mean")
    params = spec.init(random.key(0), autoencoder.spec(cfg))
    x, z = random.normal(random.key(1), (8, 1, 16, 16)), random.normal(random.key(2), (8, 8))
    q = autoencoder.encode(params, x, cfg)
    for values in (*q, autoencoder.decode(params, z, cfg)):
        assert 0.3 < values.std() < 2.5


def test_mlps_start_as_modules_of_torch():
    """Weights and biases alike are spread as those of torch.nn.Linear: as wide, and nowhere wider."""
    params = spec.init(random.key(0), autoencoder.spec(autoencoder.PRESETS["mnist"]))
    encoder, decoder = params["encoder"], params["decoder"]
    for ours in (*encoder["layers"], encoder["code"], *decoder["layers"], decoder["output"]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            theirs = nn.Linear(*ours["weight"].shape[::-1])
        for name, values in ours.items():
            assert values.std() == pytest.approx(float(getattr(theirs, name).detach().std()), rel=0.25)
            assert values.abs().max() <= ours["weight"].shape[1] ** -0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cnn"}, "kind 'cnn'; expected convolutional or mlp"),
        ({"output": "pixels"}, "output 'pixels'; expected logits or mean"),
        ({"learned_variance": True}, "logits have no variance to learn"),
        ({"activation": "rely"}, "activation 'rely' is not one of"),
        ({"latent": 0}, "latent is 0; expected at least 1"),
        ({"shape": ()}, r"shape is \(\); expected the axes"),
        ({"kind": "convolutional", "shape": (64,)}, r"expected images .* found shape \(64,\)"),
        ({"kind": "convolutional", "shape": (1, 8, 10)}, "images of 8 x 10 pixels cannot be halved 2 times"),
    ],
    ids=["kind", "output", "variance", "activation", "latent", "no shape", "shape", "size"],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        autoencoder.Config(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, c: autoencoder.encode(p, torch.zeros(4, 12), c), r"\(batch, 2, 2, 3\), found \(4, 12\)"),
        (lambda p, c: autoencoder.encode(p, torch.zeros(4, 2, 2, 3), c), "encoder: .* pass labels="),
        (lambda p, c: autoencoder.decode(p, torch.zeros(4, 2), c), r"z of shape \(batch, 3\), found \(4, 2\)"),
        (lambda p, c: autoencoder.decode(p, torch.zeros(4, 3), c), "decoder: .* pass labels="),
    ],
    ids=["shape", "labels", "latent", "decoder labels"],
)
def test_wrong_inputs(call, message):
    cfg = autoencoder.Config(**MLP, classes=3)
    with pytest.raises(ValueError, match=message):
        call(spec.init(random.key(0), autoencoder.spec(cfg)), cfg)
