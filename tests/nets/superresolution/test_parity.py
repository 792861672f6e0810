"""Each net against the same net in torch.nn: outputs, statistics, names of tensors, parameter counts."""

import dataclasses

import pytest
import torch

from core import random, spec, stats, tree
from nets.superresolution import by_name, drcn, drrn, edsr, espcn, fsrcnn, srcnn, srgan, vdsr
from nets.weights import WeightsError, fill
from tests.nets.parity import assert_same, check_names, check_parity, randomise
from tests.nets.superresolution import modules

GREY, COLOUR = (2, 1, 11, 9), (2, 3, 7, 9)
SMALL_EDSR = {"blocks": 2, "width": 8, "residual_scale": 0.5}
PARITY = {
    "srcnn": (srcnn, srcnn.Config(), lambda: modules.Srcnn(), GREY),
    "srcnn 9-5-5": (srcnn, srcnn.PRESETS["srcnn-9-5-5"], lambda: modules.Srcnn((9, 5, 5)), GREY),
    "fsrcnn x2": (fsrcnn, fsrcnn.Config(scale=2), lambda: modules.Fsrcnn(2), GREY),
    "fsrcnn x3": (fsrcnn, fsrcnn.Config(scale=3), lambda: modules.Fsrcnn(3), GREY),
    "fsrcnn-s x4": (
        fsrcnn,
        dataclasses.replace(fsrcnn.PRESETS["fsrcnn-s"], scale=4),
        lambda: modules.Fsrcnn(4, 32, 5, 1),
        GREY,
    ),
    "espcn x3": (espcn, espcn.Config(), lambda: modules.Espcn(3), GREY),
    "espcn-relu x2": (
        espcn,
        dataclasses.replace(espcn.PRESETS["espcn-relu"], scale=2),
        lambda: modules.Espcn(2, torch.nn.ReLU),
        GREY,
    ),
    "vdsr": (vdsr, vdsr.Config(depth=6, width=16), lambda: modules.Vdsr(6, 16), GREY),
    "drrn": (drrn, drrn.Config(2, 3, 16), lambda: modules.Drrn(2, 3, 16), GREY),
    "edsr x2": (edsr, edsr.Config((2,), **SMALL_EDSR), lambda: modules.Edsr((2,), 2, 8, 0.5), COLOUR),
    "edsr x3": (edsr, edsr.Config((3,), **SMALL_EDSR), lambda: modules.Edsr((3,), 2, 8, 0.5), COLOUR),
    "edsr x8": (edsr, edsr.Config((8,), **SMALL_EDSR), lambda: modules.Edsr((8,), 2, 8, 0.5), COLOUR),
    "srresnet x4": (srgan, srgan.Config(blocks=2, width=8), lambda: modules.SrResNet(4, 2, 8), COLOUR),
    "srresnet x3": (srgan, srgan.Config(scale=3, blocks=2, width=8), lambda: modules.SrResNet(3, 2, 8), COLOUR),
}


@pytest.mark.parametrize("name", PARITY)
def test_parity(name):
    torch.manual_seed(0)
    net, cfg, module, shape = PARITY[name]
    check_parity(net, cfg, randomise(module()), random.uniform(random.key(0), shape))


@pytest.mark.parametrize(
    ("net", "cfg", "module"),
    [
        (srcnn, srcnn.Config(), lambda: modules.Srcnn()),
        (fsrcnn, fsrcnn.Config(), lambda: modules.Fsrcnn(3)),
        (espcn, espcn.Config(), lambda: modules.Espcn(3)),
        (vdsr, vdsr.Config(), lambda: modules.Vdsr()),
        (drrn, drrn.PRESETS["drrn-b1u25"], lambda: modules.Drrn(1, 25)),
        (edsr, edsr.PRESETS["edsr"], lambda: modules.Edsr((2,), 32, 256, 0.1)),
        (edsr, edsr.PRESETS["mdsr"], lambda: modules.Edsr((2, 3, 4), 80, 64)),
        (srgan, srgan.PRESETS["srresnet"], lambda: modules.SrResNet(4)),
    ],
)
def test_names_and_shapes_of_the_presets(net, cfg, module):
    with torch.device("meta"):
        check_names(net, cfg, module())


def doubled(net, cfg, module):
    """Values of a module for the net, in double precision."""
    table, state = net.rename_table(cfg), module.double().state_dict()
    return tree.sort(tree.nest({ours: state[rename.theirs] for ours, rename in table.items()}, like=net.spec(cfg)))


def test_rectified_drrn_is_that_of_relus_in_place():
    torch.manual_seed(0)
    cfg, module = drrn.Config(2, 2, 8, rectified=True), modules.Drrn(2, 2, 8, inplace=True)
    values, x = doubled(drrn, cfg, module), random.uniform(random.key(0), GREY, torch.float64)
    with torch.no_grad():
        expected = module(x.clone())
    torch.testing.assert_close(drrn.apply(values, x, cfg), expected)
    plain = drrn.apply(values, x, dataclasses.replace(cfg, rectified=False))
    assert (plain - expected).abs().max() > 0.01


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_mdsr(scale):
    torch.manual_seed(0)
    cfg, module = edsr.Config((2, 3, 4), blocks=2, width=8), modules.Edsr((2, 3, 4), 2, 8)
    values = fill(edsr.spec(cfg), module.state_dict(), edsr.rename_table(cfg))
    assert tree.count(values) == sum(p.numel() for p in module.parameters())
    x = random.uniform(random.key(0), COLOUR)
    with torch.no_grad():
        assert_same(edsr.apply(values, x, cfg, scale=scale), module(x, scale), "mdsr")


def test_drcn():
    torch.manual_seed(0)
    cfg, module = drcn.Config(recursions=4, width=8), modules.Drcn(4, 8).double()
    values = tree.sort(tree.nest(module.state_dict(), like=drcn.spec(cfg)))
    x = random.uniform(random.key(0), GREY, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(drcn.apply(values, x, cfg), module(x))
    each = drcn.predictions(values, x, cfg)
    assert each.shape == (2, 4, 1, 11, 9)
    torch.testing.assert_close(drcn.averaged(values, each), module(x).detach())


def test_initial_nets_are_the_bicubic_enlargement():
    """Last layers near 0; DRCN's recursion starts as the identity."""
    for name, net in by_name.PRESETS.items():
        if name in ("edsr", "mdsr", "drcn", "drrn-b1u25"):  # large, or deep, forms of others
            continue
        net, cfg = by_name.configured(name, (3,))
        small, bicubic = (random.uniform(random.key(0), (2, cfg.channels, n, n)) for n in (6, 18))
        values = spec.init(random.key(0), net.spec(cfg))
        out = by_name.enlarge(net, values, cfg, small, bicubic, 3, residual=True, train=True)
        assert (out - bicubic).abs().max() < 0.15, name
    p = spec.init(random.key(0), drcn.spec(drcn.PRESETS["drcn-small"]))["recursion"]
    h = random.normal(random.key(1), (1, 64, 5, 5))
    assert torch.equal(torch.nn.functional.conv2d(h, p["weight"], padding=1), h) and not p["bias"].any()


@pytest.mark.parametrize("train", [False, True])
def test_critic_of_srgan(train):
    torch.manual_seed(0)
    cfg = srgan.Config(critic_width=4, hidden=7, size=32)
    module = randomise(modules.SrganCritic(4, 7, 32)).double().train(train)
    names = {"mean": "running_mean", "var": "running_var", "count": "num_batches_tracked"}
    state, values = module.state_dict(), {}
    for name, _ in tree.items(srgan.critic_spec(cfg)):
        *path, leaf = name.split(".")
        if path[0] == "layers":
            path = ["layers" if path[2] == "conv" else "norms", path[1]]
        values[name] = state[".".join([*path, names.get(leaf, leaf)])].double().clone()
    values = tree.sort(tree.nest(values, like=srgan.critic_spec(cfg)))
    x = random.uniform(random.key(0), (3, 3, 32, 32), torch.float64)
    actual = srgan.critic(values, x, cfg, train=train)
    torch.testing.assert_close(actual, module(x).detach())
    if train:
        params, running = spec.split(srgan.critic_spec(cfg), values)
        increments = torch.func.grad(lambda s: srgan.critic(tree.merge(params, s), x, cfg, train=True).sum())(running)
        after = stats.update(running, increments)["layers"][3]["norm"]
        torch.testing.assert_close(after["mean"], module.norms[3].running_mean)


def test_files_of_edsr(tmp_path):
    cfg = edsr.Config((2,), blocks=1, width=4)
    module = modules.Edsr((2,), 1, 4)
    shift = 255 * module.mean[:, 0, 0]
    constants = {"sub_mean.weight": torch.eye(3)[..., None, None], "sub_mean.bias": -shift}
    constants |= {"add_mean.weight": torch.eye(3)[..., None, None], "add_mean.bias": shift}
    path = tmp_path / "edsr.pt"
    torch.save(module.state_dict() | constants, path)
    values = edsr.from_pretrained(str(path), cfg)
    x = random.uniform(random.key(0), COLOUR)
    torch.testing.assert_close(edsr.apply(values, x, cfg), module(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(WeightsError, match="'sub_mean.bias' is .*, expected"):
        edsr.from_pretrained(str(path), dataclasses.replace(cfg, white=1.0))
    with pytest.raises(WeightsError, match=r"'tail.0.0.bias' has shape \(16,\), expected \(36,\) for 'up.0.0.bias'"):
        edsr.from_pretrained(str(path), dataclasses.replace(cfg, scales=(3,)))
    torch.save(module.state_dict() | {"sub_mean.weight": 2 * torch.eye(3)[..., None, None]}, path)
    with pytest.raises(WeightsError, match="'sub_mean.weight' scales the colours"):
        edsr.from_pretrained(str(path), cfg)


def test_files_of_the_others(tmp_path):
    path, x = tmp_path / "net.pth", random.uniform(random.key(0), GREY)
    for net, cfg, module in (
        (srcnn, srcnn.Config(), modules.Srcnn()),
        (fsrcnn, fsrcnn.Config(), modules.Fsrcnn(3)),
        (espcn, espcn.Config(), modules.Espcn(3)),
        (vdsr, vdsr.Config(depth=3), modules.Vdsr(3)),
        (drrn, drrn.Config(1, 2, 8, rectified=True), modules.Drrn(1, 2, 8, inplace=True)),
        (srgan, srgan.Config(blocks=1, width=4), modules.SrResNet(4, 1, 4).eval()),
    ):
        images = x if net is not srgan else x.expand(-1, 3, -1, -1)
        torch.save({"state_dict": module.state_dict()}, path)
        actual = net.apply(net.from_pretrained(str(path), cfg), images, cfg)
        torch.testing.assert_close(actual, module(images.clone()).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(WeightsError, match="needs `rectified`, as in the preset drrn-public"):
        drrn.from_pretrained(str(path), drrn.Config())
