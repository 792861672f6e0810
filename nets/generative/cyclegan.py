"""CycleGAN: image-to-image translation learned from two sets without pairs.

Zhu et al. 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks" (arXiv:1703.10593).
Two generators, G: X -> Y and F: Y -> X, and a critic of each set:

    L = L_GAN(G, D_Y) + L_GAN(F, D_X) + 10 (E|F(G(x)) - x|_1 + E|G(F(y)) - y|_1) + 5 (E|G(y) - y|_1 + E|F(x) - x|_1)

with least-squares L_GAN; the last pair, the identity loss, keeps colours (section 5.2). The generator is that of
Johnson et al. 2016 (arXiv:1603.08155): two halvings, residual blocks, two doublings, all with instance norm.

This module is one generator and one critic; a CycleGAN has two trees of parameters of each. The authors' code also has
biases before the norms, which cancel them. The public PyTorch-GAN collection doubles by nearest neighbours
(`upsample="nearest"`, Odena et al. 2016) and its critic halves a fourth time.
"""

from dataclasses import dataclass

from torch import Tensor

from core.layers import conv, conv_spec, conv_transpose, instance_norm, upsample_nearest
from nets.blocks.conv_norm import check_images
from nets.generative.dcgan import WEIGHT
from nets.generative.patch_critic import patch_critic, patch_critic_spec


@dataclass(frozen=True)
class Config:
    """Sizes of CycleGAN's generators."""

    channels: int = 3
    """Channels of the images."""
    width: int = 64
    """Channels at full size; they double with each halving."""
    blocks: int = 9
    """Residual blocks: 9 for 256 x 256 pixels and more, 6 for 128 x 128 (section 4)."""
    upsample: str = "transposed"
    """Doubling: transposed convolutions as in the paper, or nearest neighbours and a convolution."""
    critic_width: int = 64
    """Channels after the critic's first halving."""
    critic_layers: int = 3
    """Halvings of the critic; 3 gives the paper's patches of 70 x 70 pixels."""

    def __post_init__(self):
        if self.upsample not in ("transposed", "nearest"):
            raise ValueError(f"cyclegan: upsample '{self.upsample}' is unknown; expected transposed or nearest")
        for name in ("channels", "width", "critic_width", "critic_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"cyclegan: {name} is {getattr(self, name)}; expected at least 1")
        if self.blocks < 0:
            raise ValueError(f"cyclegan: {self.blocks} blocks; expected at least 0")


PRESETS = {
    "paper": Config(),
    "paper-128": Config(blocks=6),
    "small": Config(width=24, blocks=3, upsample="nearest", critic_width=32, critic_layers=2),
}
"""small for 64 x 64 pixels."""

HALVINGS = 2
"""Number of halvings of the generator."""


def generator_spec(cfg: Config) -> dict:
    """`stem`, `down.i`, `blocks.i` of two convolutions, `up.i` and `head`; only the head has a bias."""

    def conv3(d_in: int, d_out: int, transposed: bool = False) -> dict:
        return conv_spec(d_in, d_out, 3, bias=False, transposed=transposed, init=WEIGHT)

    widths = [cfg.width * 2**i for i in range(HALVINGS + 1)]
    pairs = list(zip(widths, widths[1:], strict=False))
    return {
        "blocks": [[conv3(widths[-1], widths[-1]) for _ in range(2)] for _ in range(cfg.blocks)],
        "down": [conv3(d_in, d_out) for d_in, d_out in pairs],
        "head": conv_spec(cfg.width, cfg.channels, 7, init=WEIGHT),
        "stem": conv_spec(cfg.channels, cfg.width, 7, bias=False, init=WEIGHT),
        "up": [conv3(d_in, d_out, cfg.upsample == "transposed") for d_out, d_in in reversed(pairs)],
    }


def generator(
    params: dict, z: Tensor, cfg: Config, *, labels: None = None, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """Translated images: z, the source (batch, channels, height, width) in [-1, 1] -> the same shape and range.

    labels, key and train are without effect here.

    Raises:
        ValueError: images with other channels, smaller than 8 pixels, or with sides that are no multiples of 4.
    """
    check_images("cyclegan", z, cfg.channels, 2 ** (HALVINGS + 1))
    if z.shape[2] % 2**HALVINGS or z.shape[3] % 2**HALVINGS:
        raise ValueError(f"cyclegan: the images are {z.shape[2]} x {z.shape[3]}; expected multiples of {2**HALVINGS}")
    x = _normed(conv(params["stem"], z, padding=3, padding_mode="reflect")).relu()  # cfg.width channels
    for p in params["down"]:
        x = _normed(conv(p, x, stride=2, padding=1)).relu()  # twice the channels, half the height and width
    for first, second in params["blocks"]:
        y = _normed(conv(first, x, padding=1, padding_mode="reflect")).relu()
        x = x + _normed(conv(second, y, padding=1, padding_mode="reflect"))
    for p in params["up"]:
        if cfg.upsample == "transposed":
            x = conv_transpose(p, x, stride=2, padding=1, output_padding=1)  # half the channels, twice the size
        else:
            x = conv(p, upsample_nearest(x), padding=1)
        x = _normed(x).relu()
    return conv(params["head"], x, padding=3, padding_mode="reflect").tanh()


def _normed(x: Tensor) -> Tensor:
    return instance_norm({}, x)


def critic_spec(cfg: Config) -> dict:
    """Parameters of `nets.generative.patch_critic`."""
    return patch_critic_spec(cfg.channels, cfg.critic_width, cfg.critic_layers, "instance")


def critic_outputs(
    params: dict, x: Tensor, cfg: Config, *, labels: None = None, key: Tensor | None = None, train: bool = False
) -> dict:
    """`scores` (batch, 1, h, w), one per patch, and penultimate `features`. Arguments as in `critic`."""
    return patch_critic(params, x, "instance", name="cyclegan critic", train=train)


def critic(
    params: dict, x: Tensor, cfg: Config, *, labels: None = None, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """Scores of the patches of images, high for real ones: (batch, channels, height, width) -> (batch, 1, h, w).

    labels and key are without effect here.

    Raises:
        ValueError: images with other channels, or too small.
    """
    return critic_outputs(params, x, cfg, train=train)["scores"]
