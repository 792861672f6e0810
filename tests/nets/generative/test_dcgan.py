"""DCGAN against the same nets written with torch.nn, as the paper's authors later published them for torch."""

import pytest
import torch
from torch import nn

from core import random, spec, stats, tree
from nets.generative import dcgan
from tests.nets.generative.critics import check_penalty
from tests.nets.parity import assert_same, randomise


def torch_generator(cfg):
    """The projection is a transposed convolution of a 1 x 1 image; only the last layer has a bias."""
    widths, k = cfg.widths[::-1], cfg.kernel
    layers = [nn.ConvTranspose2d(cfg.latent, widths[0], cfg.base, bias=False)]
    for i, width in enumerate(widths):
        last = i == cfg.stages - 1
        d_out = cfg.channels if last else widths[i + 1]
        up = nn.ConvTranspose2d(width, d_out, k, 2, (k - 1) // 2, output_padding=k % 2, bias=last)
        layers += [nn.BatchNorm2d(width), nn.ReLU(), up]
    return nn.Sequential(*layers, nn.Tanh())


def torch_critic(cfg):
    """The score is a convolution of the last feature maps to 1 x 1."""
    norms = {"batch": nn.BatchNorm2d, "layer": lambda n: nn.GroupNorm(1, n), "none": lambda n: nn.Identity()}
    norms["instance"] = lambda n: nn.InstanceNorm2d(n, affine=True)
    layers, d_in = [], cfg.channels
    for i, width in enumerate(cfg.widths):
        bias = i == 0 or cfg.norm in ("layer", "none")
        layers += [nn.Conv2d(d_in, width, cfg.kernel, 2, (cfg.kernel - 1) // 2, bias=bias)]
        layers += [norms[cfg.norm](width)] if i else []
        layers += [nn.LeakyReLU(0.2)]
        d_in = width
    return nn.Sequential(*layers, nn.Conv2d(d_in, 1, cfg.base), nn.Flatten(0))


def norm_values(m):
    values = {"bias": m.bias.detach(), "weight": m.weight.detach()} if hasattr(m, "weight") else {}
    if isinstance(m, nn.BatchNorm2d):
        # Clones: torch writes into its own.
        count = m.num_batches_tracked.float().clone()
        values |= {"mean": m.running_mean.clone(), "var": m.running_var.clone(), "count": count}
    return tree.sort(values)


def conv_values(m):
    return {name: p.detach() for name, p in sorted(m.named_parameters())}


def of_generator(module):
    project, *convs = [m for m in module if isinstance(m, nn.ConvTranspose2d)]
    return {
        "convs": [conv_values(m) for m in convs],
        "norms": [norm_values(m) for m in module if isinstance(m, nn.BatchNorm2d)],
        "project": {"weight": project.weight.detach().flatten(1).T},
    }


def of_critic(module):
    *convs, out = [m for m in module if isinstance(m, nn.Conv2d)]
    others = (nn.Conv2d, nn.LeakyReLU, nn.Flatten)
    return {
        "convs": [conv_values(m) for m in convs],
        "heads": {},
        "norms": [{}, *(norm_values(m) for m in module if not isinstance(m, others))],
        "out": {"bias": out.bias.detach(), "weight": out.weight.detach().flatten(1)},
    }


def check_player(model, apply, fill, module, x):
    """Outputs in eval and in training mode, and the running statistics after it."""
    values = fill(randomise(module))
    spec.check(model, values)
    params, running = spec.split(model, values)
    assert_same(apply(values, x, train=False), module.eval()(x_of(module, x)).detach(), "eval")

    def loss(running):
        out = apply(tree.merge(params, running), x, train=True)
        return out.sum(), out

    increments, out = torch.func.grad(loss, has_aux=True)(running) if tree.leaves(running) else ({}, loss({})[1])
    assert_same(out, module.train()(x_of(module, x)).detach(), "training")
    _, after = spec.split(model, fill(module))
    assert_same(stats.update(running, increments), after, "statistics ", 1e-5)


def x_of(module, x):
    return x[..., None, None] if isinstance(module[0], nn.ConvTranspose2d) else x


CONFIGS = {
    "mnist": dcgan.Config(28, latent=10, width=8),
    "64 pixels": dcgan.Config(64, 3, latent=10, width=4, stages=4),
    "kernel 5": dcgan.Config(16, 3, latent=10, width=8, kernel=5, norm="layer"),
    "kernel 3": dcgan.Config(16, 3, latent=10, width=8, kernel=3, norm="instance"),
    "no norm": dcgan.Config(32, 3, latent=10, width=4, stages=3, norm="none"),
}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_generator_parity(cfg):
    torch.manual_seed(0)

    def apply(values, z, train):
        return dcgan.generator(values, z, cfg, train=train)

    z = random.normal(random.key(0), (4, cfg.latent))
    check_player(dcgan.generator_spec(cfg), apply, of_generator, torch_generator(cfg), z)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_critic_parity(cfg):
    torch.manual_seed(0)

    def apply(values, x, train):
        return dcgan.critic(values, x, cfg, train=train)

    x = random.normal(random.key(0), (4, cfg.channels, cfg.size, cfg.size))
    check_player(dcgan.critic_spec(cfg), apply, of_critic, torch_critic(cfg), x)


def test_initial_values():
    cfg = dcgan.PRESETS["mnist"]
    for model in (dcgan.generator_spec(cfg), dcgan.critic_spec(cfg)):
        for name, leaf in tree.items(spec.init(random.key(0), model)):
            if leaf.ndim > 1:
                assert abs(leaf.std() / 0.02 - 1) < 0.1 and abs(leaf.mean()) < 0.002, name
            elif "norms" in name and name.endswith("weight"):
                assert abs(leaf.mean() - 1) < 0.01 and 0.01 < leaf.std() < 0.03, name


@pytest.mark.parametrize("preset", dcgan.PRESETS)
def test_presets(preset):
    cfg = dcgan.PRESETS[preset]
    z = torch.empty(3, cfg.latent, device="meta")
    x = dcgan.generator(spec.abstract(dcgan.generator_spec(cfg)), z, cfg)
    assert tuple(x.shape) == (3, cfg.channels, cfg.size, cfg.size)
    out = dcgan.critic_outputs(spec.abstract(dcgan.critic_spec(cfg)), x, cfg)
    assert tuple(out["scores"].shape) == (3,) and tuple(out["features"].shape) == (3, cfg.widths[-1] * cfg.base**2)


def test_the_paper_has_1024_channels_at_4_pixels():
    cfg = dcgan.PRESETS["paper"]
    assert cfg.base == 4 and cfg.widths[::-1] == (1024, 512, 256, 128)


def test_heads():
    cfg = dcgan.Config(classes=10, heads=(("codes", 4), ("classes", 10)))
    assert dcgan.critic_spec(cfg)["convs"][0]["weight"].shape[1] == 1
    params = spec.init(random.key(0), dcgan.critic_spec(cfg))
    x = random.normal(random.key(1), (3, 1, 8, 8))
    out = dcgan.critic_outputs(params, x, cfg)
    assert {name: tuple(leaf.shape) for name, leaf in out.items()} == {
        "classes": (3, 10),
        "codes": (3, 4),
        "features": (3, 256),
        "scores": (3,),
    }


def test_labels_change_images_and_scores():
    cfg = dcgan.Config(classes=3)
    g, c = (spec.init(random.key(0), make(cfg)) for make in (dcgan.generator_spec, dcgan.critic_spec))
    z, ones, twos = random.normal(random.key(1), (2, 64)), torch.tensor([1, 1]), torch.tensor([2, 1])
    first, second = (dcgan.generator(g, z, cfg, labels=labels) for labels in (ones, twos))
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    first, second = (dcgan.critic(c, first, cfg, labels=labels) for labels in (ones, twos))
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("norm", dcgan.NORMS)
def test_penalty(norm):
    cfg = dcgan.Config(width=3, norm=norm)
    params = spec.init(random.key(0), dcgan.critic_spec(cfg), torch.float64)
    # Weights of 0.02 would make every gradient nearly 0.
    params = tree.map(lambda p: 10 * p if p.ndim > 1 else p, params)
    x = random.normal(random.key(1), (3, 1, 8, 8), torch.float64)
    check_penalty(lambda params, x: dcgan.critic(params, x, cfg), params, x)


def test_penalty_through_the_statistics_of_the_batch():
    """Batch norm in training mixes the examples; the gradient of a gradient still equals torch.autograd's."""
    cfg = dcgan.Config(width=3)
    values = spec.init(random.key(0), dcgan.critic_spec(cfg), torch.float64)
    params, running = spec.split(dcgan.critic_spec(cfg), values)
    x = random.normal(random.key(1), (3, 1, 8, 8), torch.float64)

    def score(params, x):
        return dcgan.critic(tree.merge(params, running), x, cfg, train=True).sum()

    step = torch.func.grad(lambda p: torch.func.grad(score, argnums=1)(p, x).square().sum())
    leaves, inputs = [p.clone().requires_grad_() for p in tree.leaves(params)], x.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(score(tree.unflatten(params, leaves), inputs), inputs, create_graph=True)
    expected = torch.autograd.grad(slopes.square().sum(), leaves, allow_unused=True)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    for gradient in (step(params), compiled(params)):
        for a, b in zip(tree.leaves(gradient), expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "group"}, "norm 'group'; expected one of batch, instance, layer, none"),
        ({"size": 10}, "images of 10 pixels per side cannot be halved 2 times"),
        ({"kernel": 7}, "kernel 7; expected 3, 4 or 5"),
        ({"heads": (("scores", 2),)}, "need names of their own"),
    ],
    ids=["norm", "size", "kernel", "heads"],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        dcgan.Config(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 8, 8), r"dcgan critic: expected images \(batch, 1, height, width\)"),
        ((2, 1, 16, 8), "16 x 8; expected 8 x 8"),
        ((2, 1, 8, 8), "conditional on classes; pass labels="),
    ],
    ids=["channels", "size", "labels"],
)
def test_wrong_images(shape, message):
    cfg = dcgan.Config(classes=3)
    with pytest.raises(ValueError, match=message):
        dcgan.critic(spec.abstract(dcgan.critic_spec(cfg)), torch.empty(shape, device="meta"), cfg)
