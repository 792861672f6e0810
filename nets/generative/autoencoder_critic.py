"""Critics that are auto-encoders: the score of an image is the error of its reconstruction, an energy.

    E(x) = mean |x - Dec(Enc(x))|^eta over the pixels      low for what the critic takes for real

EBGAN, Zhao et al. 2017, arXiv:1609.03126: DCGAN's critic and generator, back to back, and squares (eta 2). Its code
Enc(x) is what the pulling-away term pushes apart. BEGAN, Berthelot et al. 2017, arXiv:1703.10717: 3 x 3 convolutions
with ELU and no norm, and absolute values (eta 1). The generator has the form of the decoder. A linear layer makes the
code of both, so that it can be narrow; a tanh ends both decoders.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from core.layers import conv, conv_spec, linear, linear_spec
from nets.blocks.conditioning import check_latent
from nets.blocks.conv_norm import check_images
from nets.generative import dcgan
from nets.generative.dcgan import WEIGHT


@dataclass(frozen=True)
class Config:
    """Images of size x size pixels.

    style: the layers of "ebgan" or "began", as above.
    latent: numbers of z. BEGAN takes as many as the code has.
    code: numbers of Enc(x).
    width: channels at the full size (BEGAN's n; they grow by n a stage) or at half of it (EBGAN; they double).
    stages: how often the size is halved.
    eta: power of the error, 1 or 2.
    """

    style: str = "ebgan"
    size: int = 8
    channels: int = 1
    latent: int = 64
    code: int = 32
    width: int = 32
    stages: int = 2
    eta: int = 2

    def __post_init__(self):
        if self.style not in ("ebgan", "began"):
            raise ValueError(f"autoencoder_critic: style '{self.style}'; expected ebgan or began")
        if self.eta not in (1, 2):
            raise ValueError(f"autoencoder_critic: eta {self.eta}; expected 1 or 2")
        if self.stages < 1 or self.size % 2**self.stages:
            size = f"images of {self.size} pixels a side"
            raise ValueError(f"autoencoder_critic: {size} cannot be halved {self.stages} times")

    @property
    def base(self) -> int:
        """Pixels a side of the smallest maps."""
        return self.size // 2**self.stages

    def dcgan(self, latent: int) -> dcgan.Config:
        """EBGAN's encoder, and its decoder from `latent` numbers."""
        return dcgan.Config(self.size, self.channels, latent, self.width, self.stages)


PRESETS = {
    # On small images all that EBGAN generates soon looks alike if its critic has batch norm.
    "ebgan-digits": Config("began", code=10, width=16, stages=1),
    "ebgan-mnist": Config("began", 28, latent=100, width=32),
    "ebgan-small": Config(size=32, channels=3, latent=100, code=64, width=64, stages=3),
    "began-digits": Config("began", latent=32, code=16, width=16, stages=1, eta=1),
    "began-mnist": Config("began", 28, latent=64, code=64, eta=1),
    "began-small": Config("began", 32, 3, latent=64, code=64, width=64, eta=1),
    # Section 4.1: 128 filters and a code of 64 numbers for 128 x 128 pixels, 8 x 8 at the least.
    "began": Config("began", 128, 3, latent=64, code=64, width=128, stages=4, eta=1),
}


def generator_spec(cfg: Config) -> dict:
    """As the decoder's, from `latent` numbers."""
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
    """Images in (-1, 1) from noise. z: (batch, latent) -> (batch, channels, size, size).

    labels and key are without effect here. Raises ValueError if z has another width.
    """
    check_latent("autoencoder_critic generator", z, cfg.latent)
    return _decoded(params, z, cfg, train)


def critic_spec(cfg: Config) -> dict:
    """`encoder`, with `code` its linear layer, and `decoder`."""
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
        found = f"the images are {x.shape[2]} x {x.shape[3]}"
        raise ValueError(f"autoencoder_critic: {found}; expected {cfg.size} x {cfg.size}")
    p = params["encoder"]
    if cfg.style == "ebgan":
        return linear(p["code"], dcgan.features(p, x, cfg.dcgan(cfg.code), train=train))
    x = F.elu(_conv3(p["input"], x))
    for i, scale in enumerate(p["scales"]):
        for layer in scale:
            x = F.elu(_conv3(layer, x))
        if i < cfg.stages:
            x = F.elu(_conv3(p["smaller"][i], x, stride=2))
    return linear(p["code"], x.flatten(1))


def decode(params: dict, code: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """Dec(code): (batch, code) -> images (batch, channels, size, size) in (-1, 1)."""
    check_latent("autoencoder_critic decoder", code, cfg.code)
    return _decoded(params["decoder"], code, cfg, train)


def critic_outputs(
    params: dict,
    x: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> dict[str, Tensor]:
    """`scores` (batch,), the energies; `features` (batch, code), Enc(x); `reconstructions`, of the shape of x.

    Args:
        x: (batch, channels, size, size).
        labels, key: without effect here.

    Raises:
        ValueError: images of other channels or another size.
    """
    code = encode(params, x, cfg, train=train)
    again = decode(params, code, cfg, train=train)
    error = (x - again).flatten(1)
    # |e| is e sign(e). Not abs: torch 2.13 cannot compile the gradient of its gradient.
    scores = (error * error.sign().detach() if cfg.eta == 1 else error.square()).mean(1)
    return {"features": code, "reconstructions": again, "scores": scores}


def critic(params: dict, x: Tensor, cfg: Config, **options) -> Tensor:
    """The scores (batch,) of `critic_outputs`, which takes the same arguments."""
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


def _decoded(p: dict, code: Tensor, cfg: Config, train: bool) -> Tensor:
    if cfg.style == "ebgan":
        return dcgan.generator(p, code, cfg.dcgan(code.shape[1]), train=train)
    x = linear(p["project"], code).reshape(code.shape[0], cfg.width, cfg.base, cfg.base)
    for i, scale in enumerate(p["scales"]):
        x = F.interpolate(x, scale_factor=2) if i > 0 else x  # the nearest neighbour
        for layer in scale:
            x = F.elu(_conv3(layer, x))
    return _conv3(p["output"], x).tanh()
