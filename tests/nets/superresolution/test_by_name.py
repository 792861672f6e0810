"""Super-resolution nets by name; how far each sees; wrong configurations."""

import pytest
import torch

from core import random, spec, tree
from nets.superresolution import by_name, drcn, drrn, edsr, espcn, fsrcnn, srcnn, srgan, vdsr
from tests.registry import NETS

SMALL = {
    "srcnn": (srcnn, srcnn.Config(widths=(16, 12))),
    "fsrcnn x2": (fsrcnn, fsrcnn.Config(scale=2, width=4, shrunk=3, mappings=2)),
    "fsrcnn x4": (fsrcnn, fsrcnn.Config(scale=4, width=4, shrunk=3, mappings=1)),
    "espcn": (espcn, espcn.Config(widths=(3, 4))),
    "vdsr": (vdsr, vdsr.Config(depth=4, width=3)),
    "drcn": (drcn, drcn.Config(recursions=3, width=3)),
    "drrn": (drrn, drrn.Config(blocks=2, units=2, width=3)),
    "edsr x2": (edsr, edsr.Config((2,), blocks=2, width=3)),
    "edsr x4": (edsr, edsr.Config((4,), blocks=1, width=3)),
    "mdsr x3": (edsr, edsr.Config((2, 3), blocks=1, width=3)),
    "srresnet x2": (srgan, srgan.Config(2, blocks=1, width=3)),
}


def values_of(net, cfg):
    """Initial values plus noise, so that nothing is as good as 0."""
    values = spec.init(random.key(0), net.spec(cfg), torch.float64)
    names = {name: spec.name_hash(name) for name in tree.names(values)}

    def moved(name, x):
        key = random.fold_in(random.key(1), names[name])
        return x + 0.1 * random.normal(key, tuple(x.shape), x.dtype).abs().to(x.dtype)

    return tree.map_with_names(moved, values)


@pytest.mark.parametrize("name", SMALL)
def test_reach(name):
    """The gradient of a pixel of the output goes as far as the net's `reach`, and no further."""
    net, cfg = SMALL[name]
    values, reach = values_of(net, cfg), net.reach(cfg)
    options = {"scale": 3} if name == "mdsr x3" else {}
    side, channels = 2 * reach + 7, cfg.channels
    x = random.uniform(random.key(2), (1, channels, side, side), torch.float64)
    out = net.apply(values, x, cfg, **options)
    scale, middle = out.shape[-1] // side, side // 2
    far = 0
    for offset in range(scale):
        pixel = scale * middle + offset
        gradient = torch.func.grad(lambda x, i=pixel: net.apply(values, x, cfg, **options)[0, 0, i, i])(x)[0, 0]
        far = max(far, int((gradient.nonzero() - middle).abs().max()))
    assert far == reach, f"{name} sees {far} pixels, and its reach is {reach}"


def test_every_preset_has_a_name_and_a_family():
    assert len(by_name.PRESETS) == sum(len(net.PRESETS) for net in by_name.FAMILIES)
    for name, net in by_name.PRESETS.items():
        scales = (3,)
        assert by_name.configured(name, scales)[0] is net
        assert name in NETS or any(name.startswith(n) for n in NETS) or name.startswith(("srgan", "mdsr"))


def test_scales():
    assert by_name.configured("fsrcnn", (4,))[1] == fsrcnn.Config(scale=4)
    assert by_name.configured("edsr-baseline", (4,))[1].scales == (4,)
    assert by_name.configured("mdsr-baseline", (2, 4))[1].scales == (2, 4)
    net, cfg = by_name.configured("vdsr", (2, 3, 4))
    assert cfg == vdsr.Config() and by_name.scales_of(net, cfg) is None
    assert by_name.scales_of(*by_name.configured("espcn", (3,))) == (3,)
    for name, scales, message in (
        ("fsrcn", (3,), "no net is named 'fsrcn'; expected one of srcnn"),
        ("fsrcnn", (2, 3), "fsrcnn has one scale, not 2, 3; for several there are srcnn, srcnn-9-5-5, vdsr"),
        ("edsr-baseline", (2, 3), "edsr-baseline has one scale, not 2, 3; .* mdsr"),
        ("edsr", (5,), "edsr: no scale 5; expected 3 or a power of 2"),
        ("srresnet", (6,), "edsr: no scale 6; expected 3 or a power of 2"),
        ("vdsr", (3, 3), "scales 3, 3; expected different ones from 2 on"),
        ("vdsr", (1,), "scales 1; expected different ones from 2 on"),
    ):
        with pytest.raises(ValueError, match=message):
            by_name.configured(name, scales)


@pytest.mark.parametrize("name", ["srcnn", "fsrcnn x2", "vdsr", "edsr x2", "mdsr x3", "srresnet x2"])
def test_enlarge(name):
    net, cfg = SMALL[name]
    scale = 3 if name in ("srcnn", "mdsr x3") else 2
    values = values_of(net, cfg)
    small = random.uniform(random.key(2), (2, cfg.channels, 5, 6), torch.float64)
    bicubic = random.uniform(random.key(3), (2, cfg.channels, 5 * scale, 6 * scale), torch.float64)
    options = {"scale": scale} if net is edsr else {}
    own = net.apply(values, bicubic if net.ENLARGED else small, cfg, **options)
    torch.testing.assert_close(by_name.enlarge(net, values, cfg, small, bicubic, scale), own)
    added = by_name.enlarge(net, values, cfg, small, bicubic, scale, residual=True)
    mean = torch.tensor(edsr.MEAN, dtype=torch.float64)[:, None, None] if net is edsr else 0.0
    torch.testing.assert_close(added, own if net is vdsr else own - mean + bicubic)
    if not net.ENLARGED:
        with pytest.raises(ValueError, match="the net enlarges by .*, not by 5"):
            by_name.enlarge(net, values, cfg, small, bicubic, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: srcnn.Config(kernels=(9, 2, 5)), "expected odd numbers"),
        (lambda: srcnn.Config(widths=(64,)), "expected three and two"),
        (lambda: fsrcnn.Config(width=0), "width is 0; expected at least 1"),
        (lambda: fsrcnn.Config(mappings=-1), "-1 mappings"),
        (lambda: espcn.Config(scale=0), "scale 0"),
        (lambda: espcn.Config(activation="relu7"), "no activation 'relu7'"),
        (lambda: vdsr.Config(depth=1), "depth 1"),
        (lambda: drcn.Config(recursions=0), "0 recursions"),
        (lambda: drrn.Config(units=0), "0 units"),
        (lambda: edsr.Config(scales=()), r"scales \(\); expected different ones"),
        (lambda: edsr.Config(scales=(2, 2)), "expected different ones"),
        (lambda: edsr.Config(width=0), "width 0"),
        (lambda: srgan.Config(size=40), "images of 40 pixels; expected a multiple of 16"),
        (lambda: srgan.Config(blocks=0), "0 blocks"),
    ],
)
def test_wrong_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_images():
    for name, (net, cfg) in SMALL.items():
        x = torch.empty(1, 2, 8, 8, device="meta")
        with pytest.raises(ValueError, match=rf"expected images \(batch, {cfg.channels}, height, width\)"):
            net.apply(spec.abstract(net.spec(cfg)), x, cfg, **({"scale": 2} if name.startswith("mdsr") else {}))
    several = edsr.Config((2, 3), blocks=1, width=3)
    x = torch.empty(1, 3, 8, 8, device="meta")
    for scale in (None, 4):
        with pytest.raises(ValueError, match=f"edsr: the scale is {scale}; the net has 2, 3"):
            edsr.apply(spec.abstract(edsr.spec(several)), x, several, scale=scale)
    cfg = srgan.Config(size=32)
    with pytest.raises(ValueError, match="48 x 48; expected 32 a side"):
        srgan.critic(spec.abstract(srgan.critic_spec(cfg)), torch.empty(1, 3, 48, 48, device="meta"), cfg)
