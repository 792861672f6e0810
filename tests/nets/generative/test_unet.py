"""The denoising U-Net against UNet2DModel of diffusers, in double precision."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from core import random, spec, tree
from nets.blocks.unet_blocks import level_drops, time_embedding
from nets.generative import unet
from nets.weights import WeightsError, fill
from tests.nets.parity import assert_same, randomise

diffusers = pytest.importorskip("diffusers")

TINY = unet.Config(2, (8, 12), blocks=1, groups=4, zero=False)
TIME = torch.tensor([0, 7, 999])
LABELS = torch.tensor([2, 3, 0])  # of three classes, so that 3 is none

SIZES = {"in_channels": 2, "out_channels": 2, "block_out_channels": (8, 12, 16), "norm_num_groups": 4}
# As google/ddpm-cifar10-32, the net of Ho et al., is described.
HO = {
    "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
DHARIWAL = {
    "attention_head_dim": 4,
    "attn_norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "layers_per_block": 1,
    "num_class_embeds": 4,
    "out_channels": 4,
    "resnet_time_scale_shift": "scale_shift",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}


def images(dtype=torch.float64):
    return random.normal(random.key(0), (3, 2, 8, 12), dtype)


def module_of(options):
    torch.manual_seed(0)
    return randomise(diffusers.UNet2DModel(**SIZES | options)).eval()


class As(nn.Module):
    """A function in place of a module."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


def filled(cfg, state):
    doubles = tree.map(lambda leaf: dataclasses.replace(leaf, dtype=torch.float64), unet.spec(cfg))
    return fill(doubles, state, unet.rename_table(cfg))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "dropout"])
@pytest.mark.parametrize("options", [HO, DHARIWAL], ids=["ho", "dhariwal"])
def test_parity(options, train):
    """Outputs and gradients; in training with our dropout masks in their modules."""
    module, x, key = module_of(options).double(), images(), random.split(random.key(1), 3)
    cfg = dataclasses.replace(unet.config_of(module.config), dropout=0.3)
    convention = {"shift": cfg.frequency_shift, "cosine_first": cfg.cosine_first}
    # Theirs is always in single precision; it has a test of its own.
    module.time_proj = As(lambda t: time_embedding(t.double(), 8, **convention))
    if train:
        n = cfg.blocks
        drops = level_drops(key, x, cfg.widths, 2 * n + 1, cfg.dropout)
        for i, (down, up) in enumerate(zip(module.down_blocks, reversed(module.up_blocks), strict=True)):
            blocks = [*down.resnets, *up.resnets, *(module.mid_block.resnets if i == 2 else [])]
            for block, drop in zip(blocks, drops[i], strict=True):
                block.dropout = As(drop)
    labels = LABELS if cfg.classes else None
    expected = module(x, TIME, labels).sample
    expected.sin().sum().backward()

    def loss(params):
        y = unet.apply(params, x, TIME.double(), cfg, labels=labels, key=key, train=train)
        return y.sin().sum(), y

    gradient, actual = torch.func.grad(loss, has_aux=True)(filled(cfg, module.state_dict()))
    assert_same(actual, expected.detach(), "output", 1e-12)
    expected = filled(cfg, {name: p.grad for name, p in module.named_parameters()})
    largest = max(float(g.abs().max()) for g in tree.leaves(expected))
    for (name, a), b in zip(tree.items(gradient), tree.leaves(expected), strict=True):
        assert (a - b).abs().max() <= 1e-12 * largest, name


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cosine_first", [False, True])
def test_time_embedding_parity(shift, cosine_first):
    time = torch.cat([torch.arange(1000), torch.tensor([0.5, 998.7])])
    expected = diffusers.models.embeddings.get_timestep_embedding(time, 32, cosine_first, shift)
    actual = time_embedding(time, 32, shift=shift, cosine_first=cosine_first)
    assert actual.dtype == torch.float32
    # A unit in the last place of the largest angles is 6e-5.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1.3e-4)
    precise = time_embedding(time.double(), 32, shift=shift, cosine_first=cosine_first)
    torch.testing.assert_close(precise, expected.double(), rtol=0, atol=1.3e-4)
    torch.testing.assert_close(
        time_embedding(time[:1000].long(), 32, shift=shift, cosine_first=cosine_first)[7], actual[7]
    )


def test_size_is_that_of_the_published_net():
    """google/ddpm-cifar10-32."""
    deeper = {
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": (*HO["down_block_types"], "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *HO["up_block_types"]),
    }
    with torch.device("meta"):
        module = diffusers.UNet2DModel(**HO | deeper)
    cfg = unet.PRESETS["cifar"]
    assert dataclasses.replace(unet.config_of(module.config), dropout=0.1) == cfg
    theirs = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    ours = {}
    for (_, rename), leaf in zip(unet.rename_table(cfg).items(), tree.leaves(unet.spec(cfg)), strict=True):
        names = [rename.theirs] if isinstance(rename.theirs, str) else rename.theirs
        ours |= {name: (leaf.shape[0] // len(names), *leaf.shape[1:]) for name in names}
    assert ours == theirs


def test_from_pretrained(tmp_path):
    """Single precision, without any of their modules replaced."""
    module = module_of(DHARIWAL)
    module.save_pretrained(tmp_path)
    params, cfg = unet.from_pretrained(str(tmp_path))
    with torch.no_grad():
        expected = module(images(torch.float32), TIME, LABELS).sample
    assert_same(unet.apply(params, images(torch.float32), TIME, cfg, labels=LABELS), expected, "output")
    # The first files of diffusers have other names for the attention matrices; a wrapped module's have a prefix.
    state = {f"module.{name}": x for name, x in module.state_dict().items()}
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in older.items():
        state = {name.replace(f".{new}.", f".{old}."): x for name, x in state.items()}
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    assert_same(unet.from_pretrained(str(tmp_path))[0], params, "", 0.0)
    (tmp_path / "config.json").write_text(json.dumps(dict(module.config) | {"act_fn": "gelu"}))
    with pytest.raises(WeightsError, match="act_fn is 'gelu'; expected 'silu'"):
        unet.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"down_block_types": ("ResnetDownsampleBlock2D",) * 3},
            "down_block_types is .*; expected .*'AttnDownBlock2D'",
        ),
        ({"up_block_types": ("UpBlock2D",) * 3}, r"up_block_types is .*; expected \('AttnUpBlock2D', "),
        ({"attn_norm_num_groups": None}, "attn_norm_num_groups is None; expected 4"),
        ({"resnet_time_scale_shift": "ada_group"}, r"is 'ada_group'; expected \('default', 'scale_shift'\)"),
        ({"downsample_padding": 2}, r"downsample_padding is 2; expected \(1, 0\)"),
        ({"block_out_channels": None}, r"block_out_channels is None; expected \[\]"),
        ({"out_channels": 3}, "out_channels is 3; expected 2"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_published_nets_of_another_form(change, message):
    with pytest.raises(WeightsError, match=message):
        unet.config_of(SIZES | DHARIWAL | change)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_starts_as_zero(scale_shift):
    """The output is 0; with a last convolution of ones it is no function of the time, which enters by the blocks."""
    cfg = dataclasses.replace(TINY, zero=True, scale_shift=scale_shift)
    params = spec.init(random.key(0), unet.spec(cfg), torch.float64)
    assert (unet.apply(params, images(), TIME, cfg) == 0).all()
    params["output"] = tree.map(torch.ones_like, params["output"])
    first, other = (unet.apply(params, images(), time, cfg) for time in (TIME, TIME + 5))
    assert torch.equal(first, other) and first.std() > 0


def test_derivatives_both_ways():
    """v . (J u) = (J^T v) . u, as the likelihood by the probability-flow equation needs."""
    params = spec.init(random.key(0), unet.spec(TINY), torch.float64)
    x, (u, v) = images(), random.normal(random.key(3), (2, 3, 2, 8, 12), torch.float64)

    def f(x):
        return unet.apply(params, x, TIME, TINY)

    forward = torch.func.jvp(f, (x,), (u,))[1]
    (backward,) = torch.func.vjp(f, x)[1](v)
    torch.testing.assert_close((v * forward).sum(), (backward * u).sum(), rtol=1e-10, atol=1e-10)


def test_half_precision_keeps_the_time():
    """999 is no bfloat16 number: an integer time is not rounded."""
    params = spec.init(random.key(0), unet.spec(TINY), torch.float64)
    expected = unet.apply(params, images(), TIME, TINY)
    actual = unet.apply(tree.cast(params, torch.bfloat16), images().bfloat16(), TIME, TINY)
    assert actual.dtype == torch.bfloat16
    assert_same(actual.double(), expected, "output", 0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "blocks is 0; expected at least 1"),
        ({"widths": (8, 10)}, r"widths \(8, 10\); expected multiples of the 4 groups"),
        ({"widths": (3,), "groups": 3}, "even first width >= 4, found 3"),
        ({"attention": (2,)}, r"attention at levels \(2,\); expected some of 0 to 1"),
        ({"head_width": 5}, "heads of 5 channels do not divide 12"),
        ({"classes": -1}, "classes is -1; expected at least 0"),
        ({"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
        ({"padding": "same"}, "padding 'same' is unknown; expected symmetric or tensorflow"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=f"unet: .*{message}"):
        dataclasses.replace(TINY, **options)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"x": torch.empty(3, 1, 8, 8)}, r"expected images \(batch, 2, height, width\)"),
        ({}, {"x": torch.empty(3, 2, 8, 9)}, "the images are 8 x 9; expected sides divisible by 2"),
        ({}, {"time": torch.tensor(5)}, r"expected one time per image, \(3,\), found \(\)"),
        ({}, {"labels": LABELS}, "labels for a net without classes; expected None"),
        ({"classes": 3}, {}, "conditional on classes; pass labels="),
        ({"dropout": 0.5}, {"train": True}, r"training with dropout 0.5 draws random numbers; pass key="),
    ],
    ids=["channels", "size", "time", "labels", "no labels", "no key"],
)
def test_wrong_input(change, options, message):
    cfg = dataclasses.replace(TINY, **change)
    arguments = {"x": images(torch.float32), "time": TIME} | options
    with pytest.raises(ValueError, match=f"unet: .*{message}"):
        unet.apply(spec.abstract(unet.spec(cfg)), arguments.pop("x"), arguments.pop("time"), cfg, **arguments)
