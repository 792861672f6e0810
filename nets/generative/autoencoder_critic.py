"""Autoencoders as critics: the score of an image is its reconstruction error, an energy.

    E(x) = mean |x - Dec(Enc(x))|^eta over the pixels      low for images that the critic takes for real

EBGAN, Zhao et al. 2017, arXiv:1609.03126: DCGAN's critic and generator, one after the other, and squares (eta 2); the
pulling-away term is a function of its code Enc(x). BEGAN, Berthelot et al. 2017, arXiv:1703.10717: 3 x 3 convolutions
with ELU and no norm, and absolute values (eta 1). The generator has the form of the decoder. In both a linear layer
ends the encoder, so that the code can be narrow, and a tanh the decoder.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from core.layers import conv, conv_spec, linear, linear_spec, upsample_nearest
from nets.blocks.conditioning import check_latent
from nets.blocks.conv_norm import check_images
from nets.generative import dcgan
from nets.generative.dcgan import WEIGHT


@dataclass(frozen=True)
class Config:
    """Sizes of an auto-encoder as critic, and of its generator."""

    style: str = "ebgan"
    """Layers of both players: ebgan or began."""
    size: int = 8
    """Height and width of the images, in pixels."""
    channels: int = 1
    """Channels of the images."""
    latent: int = 64
    """Dimension of z. BEGAN's equals that of the code."""
    code: int = 32
    """Dimension of the code Enc(x)."""
    width: int = 32
    """Channels at the full size (BEGAN's n; each stage adds n) or at half of it (EBGAN; each stage doubles them)."""
    stages: int = 2
    """Number of halvings of the size."""
    eta: int = 2
    """Power of the reconstruction error, 1 or 2."""

    def __post_init__(self):
        if self.style not in ("ebgan", "began"):
            raise ValueError(f"autoencoder_critic: style '{self.style}'; expected ebgan or began")
        if self.eta not in (1, 2):
            raise ValueError(f"autoencoder_critic: eta {self.eta}; expected 1 or 2")
        if self.stages < 1 or self.size % 2**self.stages:
            size = f"images of {self.size} pixels per side"
            raise ValueError(f"autoencoder_critic: {size} cannot be halved {self.stages} times")

    @property
    def base(self) -> int:
        """Size of the smallest feature maps, in pixels."""
        return self.size // 2**self.stages

    def dcgan(self, latent: int) -> dcgan.Config:
        """Configuration of EBGAN's encoder, and of its decoder from codes of `latent` dimensions."""
        return dcgan.Config(self.size, self.channels, latent, self.width, self.stages)


PRESETS = {
    # On small images EBGAN's generator soon collapses if its critic has batch norm.
    "ebgan-digits": Config("began", code=10, width=16, stages=1),
    "ebgan-mnist": Config("began", 28, latent=100, width=32),
    "ebgan-small": Config(size=32, channels=3, latent=100, code=64, width=64, stages=3),
    "began-digits": Config("began", latent=32, code=16, width=16, stages=1, eta=1),
    "began-mnist": Config("began", 28, latent=64, code=64, eta=1),
    "began-small": Config("began", 32, 3, latent=64, code=64, width=64, eta=1),
    # Section 4.1: 128 filters and codes of 64 dimensions for 128 x 128 pixels, 8 x 8 at the smallest.
    "began": Config("began", 128, 3, latent=64, code=64, width=128, stages=4, eta=1),
}


def generator_spec(cfg: Config) -> dict:
    """Parameters of `generator`: those of a decoder from `latent` dimensions."""
    return _decoder_spec(cfg, cfg.latent)


def generator(
    params: dict,
    z: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor:
    """Images in (-1, 1) from noise: z (batch, latent) -> (batch, channels, size, size).

    labels and key are without effect here. Raises ValueError if z has another width.
    """
    check_latent("autoencoder_critic generator", z, cfg.latent)
    return _decode(params, z, cfg, train)


def critic_spec(cfg: Config) -> dict:
    """`encoder`, whose `code` is its linear layer, and `decoder`."""
    if cfg.style == "ebgan":
        parts = dcgan.critic_spec(cfg.dcgan(cfg.code))
        encoder = {"convs": parts["convs"], "norms": parts["norms"]}
        features = parts["out"]["weight"].shape[1]
        encoder = {"code": linear_spec(features, cfg.code, init=WEIGHT), **encoder}
    else:
        scales = [cfg.width * (i + 1) for i in range(cfg.stages + 1)]
        encoder = {
            "code": linear_spec(scales[-1] * cfg.base**2, cfg.code),
            "input": conv_spec(cfg.channels, scales[0], 3),
            "scales": [[conv_spec(n, n, 3), conv_spec(n, n, 3)] for n in scales],
            # Half the size and n more channels.
            "smaller": [conv_spec(n, n + cfg.width, 3) for n in scales[:-1]],
        }
    return {"decoder": _decoder_spec(cfg, cfg.code), "encoder": encoder}


def encode(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """Enc(x): (batch, channels, size, size) -> (batch, code). Raises ValueError on images of another shape."""
    check_images("autoencoder_critic", x, cfg.channels, 1)
    if tuple(x.shape[2:]) != (cfg.size, cfg.size):
        sides = f"the images are {x.shape[2]} x {x.shape[3]}"
        raise ValueError(f"autoencoder_critic: {sides}; expected {cfg.size} x {cfg.size}")
    p = params["encoder"]
    if cfg.style == "ebgan":
        return linear(p["code"], dcgan.features(p, x, cfg.dcgan(cfg.code), train=train))
    x = F.elu(_conv3(p["input"], x))  # (batch, width, size, size)
    for i, scale in enumerate(p["scales"]):
        for layer in scale:
            x = F.elu(_conv3(layer, x))
        if i < cfg.stages:
            x = F.elu(_conv3(p["smaller"][i], x, stride=2))  # half the height and width
    return linear(p["code"], x.flatten(1))  # (batch, code)


def decode(params: dict, code: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """Dec(code): (batch, code) -> images (batch, channels, size, size) in (-1, 1)."""
    check_latent("autoencoder_critic decoder", code, cfg.code)
    return _decode(params["decoder"], code, cfg, train)


def critic_outputs(
    params: dict,
    x: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> dict[str, Tensor]:
    """`scores` (batch,), the energies E(x); `features` (batch, code), Enc(x); `reconstructions`, of the shape of x.

    Args:
        x: (batch, channels, size, size).
        labels, key: without effect here.

    Raises:
        ValueError: images of other channels or another size.
    """
    code = encode(params, x, cfg, train=train)
    reconstructions = decode(params, code, cfg, train=train)
    error = (x - reconstructions).flatten(1)  # (batch, values)
    # |e| = e sign(e). Not abs: torch 2.13 cannot compile the gradient of its gradient.
    scores = (error * error.sign().detach() if cfg.eta == 1 else error.square()).mean(1)  # (batch,)
    return {"features": code, "reconstructions": reconstructions, "scores": scores}


def critic(params: dict, x: Tensor, cfg: Config, **options) -> Tensor:
    """Scores (batch,) of `critic_outputs`; the arguments are the same."""
    return critic_outputs(params, x, cfg, **options)["scores"]


_conv3 = partial(conv, padding=1)


def _decoder_spec(cfg: Config, latent: int) -> dict:
    if cfg.style == "ebgan":
        return dcgan.generator_spec(cfg.dcgan(latent))
    n = cfg.width
    return {
        "output": conv_spec(n, cfg.channels, 3),
        "project": linear_spec(latent, n * cfg.base**2),
        "scales": [[conv_spec(n, n, 3), conv_spec(n, n, 3)] for _ in range(cfg.stages + 1)],
    }


def _decode(p: dict, code: Tensor, cfg: Config, train: bool) -> Tensor:
    if cfg.style == "ebgan":
        return dcgan.generator(p, code, cfg.dcgan(code.shape[1]), train=train)
    x = linear(p["project"], code).reshape(code.shape[0], cfg.width, cfg.base, cfg.base)  # (batch, width, base, base)
    for i, scale in enumerate(p["scales"]):
        x = upsample_nearest(x) if i > 0 else x  # twice the height and width
        for layer in scale:
            x = F.elu(_conv3(layer, x))
    return _conv3(p["output"], x).tanh()  # (batch, channels, size, size)
