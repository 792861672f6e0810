"""Fully connected players against the same nets written with torch.nn."""

import pytest
import torch
from torch import nn

from core import random, spec, stats, tree
from nets.generative import mlp_gan
from tests.nets.generative.critics import check_penalty
from tests.nets.parity import assert_same, randomise


class Generator(nn.Module):
    """The generator of PyTorch-GAN's gan.py and cgan.py, but for the eps of 0.8 that was meant as a momentum."""

    def __init__(self, classes=0):
        super().__init__()
        if classes:
            self.embedding = nn.Embedding(classes, classes)
        layers, d_in = [], 100 + classes
        for width in (128, 256, 512, 1024):
            layers += [nn.Linear(d_in, width)]
            layers += [nn.BatchNorm1d(width)] if width > 128 else []
            layers += [nn.LeakyReLU(0.2)]
            d_in = width
        self.model = nn.Sequential(*layers, nn.Linear(d_in, 784), nn.Tanh())

    def forward(self, z, labels=None):
        z = z if labels is None else torch.cat([self.embedding(labels), z], 1)
        return self.model(z).view(-1, 1, 28, 28)


class Critic(nn.Module):
    """Their discriminator, without the sigmoid at its end."""

    def __init__(self, classes=0, widths=(512, 256)):
        super().__init__()
        if classes:
            self.embedding = nn.Embedding(classes, classes)
        layers, d_in = [], 784 + classes
        for width in widths:
            layers += [nn.Linear(d_in, width), nn.LeakyReLU(0.2)]
            d_in = width
        self.model = nn.Sequential(*layers, nn.Linear(d_in, 1))

    def forward(self, x, labels=None):
        x = x.flatten(1)
        return self.model(x if labels is None else torch.cat([x, self.embedding(labels)], 1))[:, 0]


def first_weight(module, linear, labels_first):
    """Their embedding before the first layer is one matrix on our one-hot labels, which come last."""
    weight = linear.weight.detach()
    if not hasattr(module, "embedding"):
        return weight
    classes = module.embedding.num_embeddings
    labels, others = (
        (weight[:, :classes], weight[:, classes:]) if labels_first else (weight[:, -classes:], weight[:, :-classes])
    )
    return torch.cat([others, labels @ module.embedding.weight.detach().T], 1)


def of_generator(module, cfg):
    """Our parameters from a `Generator`: a bias before batch norm moves its running mean."""
    values = spec.init(random.key(0), mlp_gan.generator_spec(cfg))
    modules = [m for m in module.model if isinstance(m, (nn.Linear, nn.BatchNorm1d))]
    norms = dict(zip(modules[:-1], modules[1:], strict=True))
    linears = [m for m in modules if isinstance(m, nn.Linear)]
    for i, (p, layer) in enumerate(zip([*values["layers"], {"linear": values["out"]}], linears, strict=True)):
        p["linear"]["weight"] = first_weight(module, layer, labels_first=True) if i == 0 else layer.weight.detach()
        if "norm" in p:
            m = norms[layer]
            p["norm"] |= {"weight": m.weight.detach(), "bias": m.bias.detach()}
            p["norm"] |= {"mean": m.running_mean - layer.bias.detach(), "var": m.running_var.clone()}
        else:
            p["linear"]["bias"] = layer.bias.detach()
    values["out"] = {"weight": linears[-1].weight.detach(), "bias": linears[-1].bias.detach()}
    return values


def of_critic(module):
    layers = [{"bias": m.bias.detach(), "weight": m.weight.detach()} for m in module.model if isinstance(m, nn.Linear)]
    layers[0]["weight"] = first_weight(module, module.model[0], labels_first=False)
    return {"layers": layers[:-1], "out": layers[-1]}


@pytest.mark.parametrize("classes", [0, 10])
def test_generator_parity(classes):
    torch.manual_seed(0)
    cfg = mlp_gan.Config((1, 28, 28), 100, (128, 256, 512, 1024), (512, 256), classes=classes)
    module, z = randomise(Generator(classes)), random.normal(random.key(0), (5, 100))
    labels = torch.tensor([3, 1, 4, 1, 9]) if classes else None
    values = of_generator(module, cfg)
    spec.check(mlp_gan.generator_spec(cfg), values)
    assert_same(mlp_gan.generator(values, z, cfg, labels=labels), module.eval()(z, labels).detach(), "eval")

    params, running = spec.split(mlp_gan.generator_spec(cfg), values)

    def loss(running):
        x = mlp_gan.generator(tree.merge(params, running), z, cfg, labels=labels, train=True)
        return x.sum(), x

    increments, x = torch.func.grad(loss, has_aux=True)(running)
    assert_same(x, module.train()(z, labels).detach(), "training")
    _, after = spec.split(mlp_gan.generator_spec(cfg), of_generator(module, cfg))
    # Their bias is a constant shift of the mean.
    running_after = stats.update(running, increments)
    for ours, theirs in zip(running_after["layers"][1:], after["layers"][1:], strict=True):
        assert_same(ours["norm"]["mean"], theirs["norm"]["mean"], "mean", 1e-4)
        assert_same(ours["norm"]["var"], theirs["norm"]["var"], "var", 1e-5)
        assert ours["norm"]["count"] == 1


@pytest.mark.parametrize(("classes", "widths"), [(0, (512, 256)), (10, (512, 512, 512))])
def test_critic_parity(classes, widths):
    torch.manual_seed(0)
    cfg = mlp_gan.Config((1, 28, 28), critic_widths=widths, classes=classes)
    module, x = Critic(classes, widths), random.normal(random.key(0), (5, 1, 28, 28))
    labels = torch.tensor([3, 1, 4, 1, 9]) if classes else None
    params = of_critic(module)
    spec.check(mlp_gan.critic_spec(cfg), params)
    assert_same(mlp_gan.critic(params, x, cfg, labels=labels), module(x, labels).detach(), "scores")


@pytest.mark.parametrize("preset", mlp_gan.PRESETS)
def test_presets(preset):
    cfg = mlp_gan.PRESETS[preset]
    z = torch.empty(3, cfg.latent, device="meta")
    x = mlp_gan.generator(spec.abstract(mlp_gan.generator_spec(cfg)), z, cfg)
    assert tuple(x.shape) == (3, *cfg.shape)
    out = mlp_gan.critic_outputs(spec.abstract(mlp_gan.critic_spec(cfg)), x, cfg)
    assert tuple(out["scores"].shape) == (3,) and tuple(out["features"].shape) == (3, cfg.critic_widths[-1])


def test_penalty():
    cfg = mlp_gan.Config((2,), critic_widths=(7, 6), classes=3)
    params = spec.init(random.key(0), mlp_gan.critic_spec(cfg), torch.float64)
    x = random.normal(random.key(1), (4, 2), torch.float64)

    def critic(params, x):
        return mlp_gan.critic(params, x, cfg, labels=torch.ones(len(x), dtype=torch.int64))

    check_penalty(critic, params, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "norm 'layer'; expected batch or none"),
        ({"critic_widths": ()}, "each player needs a hidden layer"),
    ],
    ids=["norm", "widths"],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        mlp_gan.Config(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, c, cfg: mlp_gan.generator(g, torch.ones(2, 3), cfg), r"expected z of shape \(batch, 64\)"),
        (lambda g, c, cfg: mlp_gan.generator(g, torch.ones(2, 64), cfg), "conditional on classes; pass labels="),
        (
            lambda g, c, cfg: mlp_gan.generator(g, torch.ones(2, 64), cfg, labels=torch.ones(3, dtype=torch.int64)),
            r"expected labels of shape \(2,\), integers, found torch.int64 \(3,\)",
        ),
        (
            lambda g, c, cfg: mlp_gan.critic(c, torch.ones(2, 64), cfg),
            r"x of shape \(batch, 1, 8, 8\), found \(2, 64\)",
        ),
    ],
    ids=["latent", "no labels", "labels", "shape"],
)
def test_wrong_inputs(call, message):
    cfg = mlp_gan.Config(classes=3)
    players = (spec.init(random.key(0), make(cfg)) for make in (mlp_gan.generator_spec, mlp_gan.critic_spec))
    with pytest.raises(ValueError, match=message):
        call(*players, cfg)
