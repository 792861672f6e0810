"""The U-Net of diffusion models: from a noisy image and the time to the noise in it (or another prediction target).

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), appendix B: residual blocks with group
norm at every level, all conditional on the time; attention between the positions of the coarser feature maps; the
output of each block on the way down is also an input of one on the way up (skip connections). From later papers:

- `learned_variance`: Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (arXiv:2102.09672);
- `scale_shift`, `head_width`, and the class's embedding, a summand of the time's: Dhariwal & Nichol 2021, "Diffusion
  Models Beat GANs on Image Synthesis" (arXiv:2105.05233);
- a label for "no class": Ho & Salimans 2022, "Classifier-Free Diffusion Guidance" (arXiv:2207.12598).

It equals `UNet2DModel` of diffusers, whose files `from_pretrained` reads. In 100 lines of plain torch:
`nets/explained/unet.py`, trained by `nets/explained/ddpm.py`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers, tree
from core.layers import conv, conv_spec, embedding, embedding_spec, group_norm, group_norm_spec
from nets.blocks.conditioning import check_labels
from nets.blocks.conv_norm import check_images
from nets.blocks.unet_blocks import (
    XAVIER,
    attention,
    attention_spec,
    downsample,
    level_drops,
    residual,
    residual_spec,
    time_embedding,
    time_spec,
    time_vector,
    upsample,
)
from nets.weights import Rename, WeightsError, fill, locate, read, read_config


@dataclass(frozen=True)
class Config:
    """Sizes and conventions of a denoising U-Net."""

    channels: int = 3
    """Channels of the images."""
    widths: tuple[int, ...] = (128, 256, 256, 256)
    """Channels of each level, from fine to coarse; every level has half the height and width of the one before."""
    blocks: int = 2
    """Residual blocks per level on the way down; on the way up there is one more."""
    attention: tuple[int, ...] = (1,)
    """Levels (0 is the finest) whose residual blocks are each followed by attention; the middle always has it."""
    head_width: int = 0
    """Channels per attention head; 0 for one head of all channels."""
    classes: int = 0
    """Number of classes, with labels 0 to classes - 1, and label `classes` for no class; 0 for an unconditional net."""
    learned_variance: bool = False
    """Output twice the channels, the second half for the variance."""
    scale_shift: bool = False
    """Scale and shift by the time embedding after the second norm of a residual block, not add it before."""
    dropout: float = 0.0
    """Dropout rate before the last convolution of each residual block."""
    groups: int = 32
    """Groups of the norms."""
    eps: float = 1e-6
    """Epsilon of the norms."""
    padding: str = "symmetric"
    """Padding of the convolutions with stride 2: symmetric, or tensorflow, on the right and at the bottom only, as in
    the code of Ho et al."""
    frequency_shift: int = 1
    """`shift` of `nets.blocks.unet_blocks.time_embedding`: 1 in Ho et al., 0 in Dhariwal & Nichol."""
    cosine_first: bool = False
    """Order of the time embedding: cosines before sines, as in Dhariwal & Nichol."""
    zero: bool = True
    """Start the last convolution of the net, of every residual block and of every attention at 0, as Ho et al. do: the
    blocks start as the identity (or the shortcut), the net's output at 0."""
    method: str = "auto"
    """Method of `core.attention.attention`: auto, explicit or fused."""

    def __post_init__(self):
        for name in ("channels", "blocks", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"unet: {name} is {getattr(self, name)}; expected at least 1")
        if not self.widths or any(width < 1 or width % self.groups for width in self.widths):
            raise ValueError(
                f"unet: widths {self.widths}; expected multiples of the {self.groups} groups, at least one"
            )
        least = 2 * self.frequency_shift + 2
        if self.widths[0] % 2 or self.widths[0] < least:
            raise ValueError(f"unet: the time embedding needs an even first width >= {least}, found {self.widths[0]}")
        levels = len(self.widths)
        if not set(self.attention) <= set(range(levels)):
            raise ValueError(f"unet: attention at levels {self.attention}; expected some of 0 to {levels - 1}")
        for level in (*self.attention, levels - 1):
            if self.head_width < 0 or self.head_width and self.widths[level] % self.head_width:
                raise ValueError(f"unet: heads of {self.head_width} channels do not divide {self.widths[level]}")
        if self.classes < 0:
            raise ValueError(f"unet: classes is {self.classes}; expected at least 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"unet: dropout {self.dropout} is outside [0, 1)")
        if self.padding not in ("symmetric", "tensorflow"):
            raise ValueError(f"unet: padding '{self.padding}' is unknown; expected symmetric or tensorflow")

    @property
    def outputs(self) -> int:
        """Channels of the output."""
        return 2 * self.channels if self.learned_variance else self.channels

    def heads(self, level: int) -> int:
        """Attention heads at a level."""
        return self.widths[level] // self.head_width if self.head_width else 1


PRESETS = {
    "digits": Config(1, (32, 48), blocks=1, attention=(), groups=8),
    "mnist": Config(1, (16, 48, 96), blocks=1, attention=(2,), groups=8),
    "small": Config(3, (64, 128, 128)),
    "cifar": Config(dropout=0.1, padding="tensorflow"),
}
"""Sizes for images: digits for 8 x 8 pixels, mnist for 28 x 28, small and cifar (the paper's) for 32 x 32."""


def spec(cfg: Config) -> dict:
    """`input`, `down.i` from fine to coarse, `middle`, `up.i` from coarse to fine, `norm`, `output`; `time`, `classes`.

    A level has `residuals`, `attentions` if any, and `sample`, the convolution before the next level.
    """
    widths, d_time, last = cfg.widths, 4 * cfg.widths[0], len(cfg.widths) - 1

    def one(d_in: int, d_out: int) -> dict:
        return residual_spec(d_in, d_out, d_time, scale_shift=cfg.scale_shift, zero=cfg.zero)

    def attend(i: int) -> dict:
        return attention_spec(widths[i], cfg.heads(i), zero=cfg.zero)

    def level(i: int, inputs: list[int], further: bool) -> dict:
        parts = {"attentions": [attend(i)] * len(inputs)} if i in cfg.attention else {}
        parts["residuals"] = [one(d_in, widths[i]) for d_in in inputs]
        return parts | ({"sample": conv_spec(widths[i], widths[i], 3, init=XAVIER)} if further else {})

    # Input channels of each residual block on the way up: those of the level below and of the skip connection.
    x, skips, down, up = widths[0], [widths[0]], [], []
    for i, width in enumerate(widths):
        down.append(level(i, [x] + [width] * (cfg.blocks - 1), i < last))
        skips += [width] * (cfg.blocks + (i < last))
        x = width
    for i in reversed(range(len(widths))):
        inputs = [below + skips.pop() for below in [x] + [widths[i]] * cfg.blocks]
        up.append(level(i, inputs, i > 0))
        x = widths[i]
    inner = one(widths[last], widths[last])
    parts = {
        "down": down,
        "input": conv_spec(cfg.channels, widths[0], 3, init=XAVIER),
        "middle": {"attention": attend(last), "first": inner, "second": inner},
        "norm": group_norm_spec(widths[0]),
        "output": conv_spec(widths[0], cfg.outputs, 3, init=initializers.zeros if cfg.zero else XAVIER),
        "time": time_spec(widths[0], d_time),
        "up": up,
    }
    return ({"classes": embedding_spec(cfg.classes + 1, d_time)} if cfg.classes else {}) | parts


def apply(
    params: dict,
    x: Tensor,
    time: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor:
    """Prediction for each image: (batch, cfg.outputs, height, width).

    Args:
        x: (batch, channels, height, width), sides divisible by 2**(levels - 1).
        time: (batch,), integers or floats, in steps of the schedule. bfloat16 holds integers up to 256 only: leave
            integers integers.
        labels: integers (batch,) in [0, classes], the last for no class; needed if there are classes. Their range is
            not checked, as that would wait for the device.
        key: (2,), or one per example (batch, 2); needed in training with dropout.

    Raises:
        ValueError: images of other channels or sizes that do not divide, not one time per image, labels missing,
            misshapen, or passed to a net without classes, no key where one is needed.
    """
    times = 2 ** (len(cfg.widths) - 1)
    check_images("unet", x, cfg.channels, 1)
    if any(side % times for side in x.shape[2:]):
        raise ValueError(f"unet: the images are {x.shape[2]} x {x.shape[3]}; expected sides divisible by {times}")
    if tuple(time.shape) != (x.shape[0],):
        raise ValueError(f"unet: expected one time per image, ({x.shape[0]},), found {tuple(time.shape)}")
    if labels is not None and not cfg.classes:
        raise ValueError("unet: labels for a net without classes; expected None")
    if cfg.classes:
        check_labels("unet", labels, x.shape[0])
    if train and cfg.dropout and key is None:
        raise ValueError(f"unet: training with dropout {cfg.dropout} draws random numbers; pass key=")
    drops = level_drops(key, x, cfg.widths, 2 * cfg.blocks + 1, cfg.dropout if train else 0.0)
    options = {"groups": cfg.groups, "eps": cfg.eps}

    waves = time_embedding(time, cfg.widths[0], shift=cfg.frequency_shift, cosine_first=cfg.cosine_first)
    e = time_vector(params["time"], waves.to(x.dtype))  # (batch, d_time)
    e = F.silu(e + embedding(params["classes"], labels) if cfg.classes else e)

    def one(p: dict, x: Tensor, drop: Callable | None) -> Tensor:
        return residual(p, x, e, drop=drop, scale_shift=cfg.scale_shift, **options)

    def attend(p: dict, x: Tensor, level: int) -> Tensor:
        return attention(p, x, cfg.heads(level), method=cfg.method, **options)

    y = conv(params["input"], x, padding=1)  # (batch, widths[0], height, width)
    skips = [y]
    for i, p in enumerate(params["down"]):
        for j, block in enumerate(p["residuals"]):
            y = one(block, y, drops[i][j])
            y = attend(p["attentions"][j], y, i) if "attentions" in p else y
            skips.append(y)
        if "sample" in p:
            y = downsample(p["sample"], y, cfg.padding)  # half the height and width
            skips.append(y)

    y = one(params["middle"]["first"], y, drops[-1][-2])
    y = attend(params["middle"]["attention"], y, -1)
    y = one(params["middle"]["second"], y, drops[-1][-1])

    for i, p in zip(reversed(range(len(cfg.widths))), params["up"], strict=True):
        for j, block in enumerate(p["residuals"]):
            y = torch.cat([y, skips.pop()], 1)  # the channels of both
            y = one(block, y, drops[i][cfg.blocks + j])  # widths[i] channels
            y = attend(p["attentions"][j], y, i) if "attentions" in p else y
        y = upsample(p["sample"], y) if "sample" in p else y  # twice the height and width

    y = F.silu(group_norm(params["norm"], y, **options))
    return conv(params["output"], y, padding=1)  # (batch, outputs, height, width)


# Files of diffusers.

NAMES = (
    (r"attentions?\.(\d+)\.norm", r"attentions.\1.group_norm"),
    (r"attentions?\.(\d+)\.proj", r"attentions.\1.to_out.0"),
    (r"^(down|up)\.(\d+)\.residuals", r"\1_blocks.\2.resnets"),
    (r"^(down|up)\.(\d+)\.attentions", r"\1_blocks.\2.attentions"),
    (r"^(down|up)\.(\d+)\.sample", r"\1_blocks.\2.\1samplers.0.conv"),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"(resnets\.\d+)\.time\.", r"\1.time_emb_proj."),
    (r"^time\.first", "time_embedding.linear_1"),
    (r"^time\.second", "time_embedding.linear_2"),
    (r"^classes", "class_embedding"),
    (r"^input", "conv_in"),
    (r"^norm", "conv_norm_out"),
    (r"^output", "conv_out"),
)
"""Replacements in our names, one after the other, that give those of diffusers."""

MIDDLE = {"attention": "attentions.0", "first": "resnets.0", "second": "resnets.1"}


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of a diffusers UNet2DModel."""
    table = {}
    for ours in tree.names(spec(cfg)):
        theirs = re.sub(r"^middle\.(\w+)", lambda match: f"mid_block.{MIDDLE[match[1]]}", ours)
        for pattern, replacement in NAMES:
            theirs = re.sub(pattern, replacement, theirs)
        several = tuple(theirs.replace(".qkv.", f".to_{x}.") for x in "qkv")
        table[ours] = Rename(several if ".qkv." in theirs else theirs)
    return table


EXPECTED = {
    "act_fn": "silu",
    "add_attention": True,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_type": "conv",
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
"""Entries of diffusers' configurations that have one supported value, which is also their default there."""

CHOICES = {"downsample_padding": (1, 0), "resnet_time_scale_shift": ("default", "scale_shift")}
"""Entries with two supported values, the default first."""


def config_of(config: dict[str, Any], source: str = "U-Net") -> Config:
    """The Config of a diffusers UNet2DModel's config.json.

    Its number of classes is taken to count "no class".

    Raises:
        WeightsError: naming the first entry that this net has no form of.
    """

    def refuse(name: str, expected: object) -> None:
        raise WeightsError(f"{source}: {name} is {config.get(name)!r}; expected {expected!r}")

    for name, expected in EXPECTED.items():
        if config.get(name, expected) != expected:
            refuse(name, expected)
    for name, values in CHOICES.items():
        if config.get(name, values[0]) not in values:
            refuse(name, values)
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        if not isinstance(config.get(name), (list, tuple)):
            refuse(name, [])
    scale_shift = config.get("resnet_time_scale_shift") == "scale_shift"
    groups, kinds = config.get("norm_num_groups", 32), tuple(config["down_block_types"])
    if config.get("attn_norm_num_groups") not in (groups, None if not scale_shift else groups):
        refuse("attn_norm_num_groups", groups)
    if not set(kinds) <= {"DownBlock2D", "AttnDownBlock2D"}:
        refuse("down_block_types", ("DownBlock2D", "AttnDownBlock2D"))
    mirrored = tuple(kind.replace("Down", "Up") for kind in reversed(kinds))
    if tuple(config["up_block_types"]) != mirrored:
        refuse("up_block_types", mirrored)
    channels, outputs = config.get("in_channels", 3), config.get("out_channels", 3)
    if outputs not in (channels, 2 * channels):
        refuse("out_channels", channels)
    return Config(
        channels=channels,
        widths=tuple(config["block_out_channels"]),
        blocks=config.get("layers_per_block", 2),
        attention=tuple(i for i, kind in enumerate(kinds) if kind.startswith("Attn")),
        head_width=config.get("attention_head_dim", 8) or 0,
        classes=max((config.get("num_class_embeds") or 0) - 1, 0),
        learned_variance=outputs != channels,
        scale_shift=scale_shift,
        dropout=config.get("dropout", 0.0),
        groups=groups,
        eps=config.get("norm_eps", 1e-5),
        padding="symmetric" if config.get("downsample_padding", 1) else "tensorflow",
        frequency_shift=config.get("freq_shift", 0),
        cosine_first=config.get("flip_sin_to_cos", True),
    )


OLDER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of the attention matrices in the first files of diffusers, such as google/ddpm-cifar10-32."""


FOLDERS = ("unet/", "")
"""The net of a pipeline of diffusers has a folder of its own; the first pipelines were one folder."""


def published_config(source: str) -> dict[str, Any]:
    """The config.json of a diffusers UNet2DModel, of a pipeline that has one, or of a repository of either."""
    return read_config(str(locate(source, tuple(f"{folder}config.json" for folder in FOLDERS))))


def from_pretrained(source: str) -> tuple[dict, Config]:
    """Parameters and Config of a diffusers UNet2DModel: a local folder (of the net or a pipeline) or a repository.

    Raises:
        WeightsError: nothing there, a net of another form, or tensors that do not fit, by name.
    """
    cfg = config_of(published_config(source), source)
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    state = read(str(locate(source, tuple(folder + name for folder in FOLDERS for name in names))))
    # Prefixes of DistributedDataParallel and of torch.compile.
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state.items()}
    for old, new in OLDER.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    return fill(spec(cfg), state, rename_table(cfg), source), cfg
