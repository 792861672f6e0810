"""Autoencoders: an encoder from examples to a few numbers, and a decoder back.

The encoder gives a code (a plain or denoising autoencoder), or a Gaussian q(z | x) over codes: the variational
autoencoder of Kingma & Welling 2014, "Auto-Encoding Variational Bayes", arXiv:1312.6114. The decoder gives a number a
pixel: the logit of a Bernoulli, or the mean of a Gaussian. Conditional on a class (Sohn et al. 2015, "Learning
Structured Output Representation using Deep Conditional Generative Models"): both get the label
(`nets.blocks.conditioning`). What is trained with them is in `train.losses.variational`.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from core import initializers, random
from core.layers import ACTIVATIONS, activation, conv, conv_spec, conv_transpose, linear, linear_spec
from core.spec import Param
from nets.blocks.conditioning import check_latent, with_labels

HE = initializers.kaiming_normal()


@dataclass(frozen=True)
class Config:
    """The shape of an example without the batch, and the numbers of its code.

    kind: "mlp", or "convolutional" for images (channels, height, width).
    widths: mlp: the hidden layers of the encoder; the decoder has them in reverse.
    width, stages: convolutional: channels at half the size, and how often the size is halved; the channels double with
        each further stage.
    gaussian: whether the encoder gives the mean and log variance of q(z | x) instead of a code.
    output: what the decoder's numbers are: "logits" of Bernoullis, or "mean" of Gaussians.
    learned_variance: the Gaussians of the output share one variance, which is a parameter; else it is up to the loss.
    classes: encoder and decoder are conditional on a class, unless 0.
    activation: of the hidden layers, a name of `core.layers.ACTIVATIONS`.
    """

    shape: tuple[int, ...] = (1, 8, 8)
    latent: int = 2
    kind: str = "mlp"
    widths: tuple[int, ...] = (128,)
    width: int = 32
    stages: int = 2
    gaussian: bool = True
    output: str = "logits"
    learned_variance: bool = False
    classes: int = 0
    activation: str = "relu"

    def __post_init__(self):
        if self.kind not in ("convolutional", "mlp"):
            raise ValueError(f"autoencoder: kind '{self.kind}'; expected convolutional or mlp")
        if self.output not in ("logits", "mean"):
            raise ValueError(f"autoencoder: output '{self.output}'; expected logits or mean")
        if self.learned_variance and self.output != "mean":
            raise ValueError("autoencoder: logits have no variance to learn; learned_variance needs output 'mean'")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"autoencoder: activation '{self.activation}' is not one of core.layers.ACTIVATIONS")
        if self.latent < 1 or not self.shape:
            raise ValueError("autoencoder: a code needs a number at least, and examples a shape")
        if self.kind == "convolutional":
            if len(self.shape) != 3:
                raise ValueError(f"autoencoder: expected images (channels, height, width), found shape {self.shape}")
            if self.stages < 1 or any(side % 2**self.stages for side in self.shape[1:]):
                size = f"images of {self.shape[1]} x {self.shape[2]} pixels"
                raise ValueError(f"autoencoder: {size} cannot be halved {self.stages} times")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage of convolutions, from the image inwards."""
        return tuple(self.width * 2**i for i in range(self.stages))

    @property
    def smallest(self) -> tuple[int, int, int]:
        """Shape of the smallest maps: channels, height, width."""
        return self.channels[-1], *(side // 2**self.stages for side in self.shape[1:])


CONVOLUTIONAL = {"kind": "convolutional", "stages": 2}

PRESETS = {
    "digits": Config(latent=8, widths=(256, 128)),
    # A code for the plane.
    "digits-2": Config(latent=2, widths=(256, 128)),
    "digits-conv": Config(latent=8, **CONVOLUTIONAL),
    # The sizes of PyTorch's own example.
    "mnist": Config((1, 28, 28), 20, widths=(400,)),
    "mnist-2": Config((1, 28, 28), 2, widths=(400,)),
    "mnist-conv": Config((1, 28, 28), 20, **CONVOLUTIONAL),
    "small-conv": Config((3, 32, 32), 128, kind="convolutional", width=64, stages=3, output="mean"),
}


class Gaussian(NamedTuple):
    """Independent Gaussians: mean and log_variance, (batch, latent) both."""

    mean: Tensor
    log_variance: Tensor


def spec(cfg: Config) -> dict:
    """`encoder` and `decoder`."""
    return {"decoder": decoder_spec(cfg), "encoder": encoder_spec(cfg)}


def encoder_spec(cfg: Config) -> dict:
    """`layers.i` and `code`, whose outputs are the code, or the means and behind them the log variances."""
    numbers = cfg.latent * (2 if cfg.gaussian else 1)
    if cfg.kind == "mlp":
        widths = (prod(cfg.shape) + cfg.classes, *cfg.widths)
        return {"code": _linear_spec(widths[-1], numbers), "layers": _linear_layers(widths)}
    channels = (cfg.shape[0] + cfg.classes, *cfg.channels)
    layers = [conv_spec(d_in, d_out, 4, init=HE) for d_in, d_out in zip(channels[:-1], channels[1:], strict=True)]
    return {"code": linear_spec(prod(cfg.smallest), numbers), "layers": layers}


def decoder_spec(cfg: Config) -> dict:
    """`layers.i` and `output`; convolutional: `project` to the smallest maps; `log_variance` () if it is learned."""
    latent = cfg.latent + cfg.classes
    variance = {"log_variance": Param((), initializers.zeros)} if cfg.learned_variance else {}
    if cfg.kind == "mlp":
        widths = (latent, *reversed(cfg.widths))
        return {"layers": _linear_layers(widths), **variance, "output": _linear_spec(widths[-1], prod(cfg.shape))}
    inner = cfg.channels[::-1]
    return {
        "layers": [_up_spec(d_in, d_out, 2.0) for d_in, d_out in zip(inner[:-1], inner[1:], strict=True)],
        **variance,
        "output": _up_spec(inner[-1], cfg.shape[0], 1.0),
        "project": linear_spec(latent, prod(cfg.smallest), init=HE),
    }


def encode(
    params: dict,
    x: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Gaussian | Tensor:
    """q(z | x) as a `Gaussian` of (batch, latent), or the code (batch, latent) unless `cfg.gaussian`.

    Args:
        x: (batch, *shape).
        labels: integers (batch,), needed if there are classes.
        key, train: without effect here.

    Raises:
        ValueError: x of another shape, labels missing or misshapen.
    """
    if tuple(x.shape[1:]) != cfg.shape:
        wanted = ", ".join(["batch", *map(str, cfg.shape)])
        raise ValueError(f"autoencoder encoder: expected x of shape ({wanted}), found {tuple(x.shape)}")
    p, act = params["encoder"], activation(cfg.activation)
    x = with_labels("autoencoder encoder", x.flatten(1) if cfg.kind == "mlp" else x, labels, cfg.classes)
    for layer in p["layers"]:
        x = act(linear(layer, x) if cfg.kind == "mlp" else conv(layer, x, stride=2, padding=1))
    code = linear(p["code"], x.flatten(1))
    return Gaussian(*code.chunk(2, -1)) if cfg.gaussian else code


def decode(
    params: dict,
    z: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor:
    """The logits or means of p(x | z), as `cfg.output` says: (batch, latent) -> (batch, *shape).

    A learned variance is `params["decoder"]["log_variance"]`. Arguments as in `encode`.

    Raises:
        ValueError: z of another width, labels missing or misshapen.
    """
    check_latent("autoencoder decoder", z, cfg.latent)
    p, act = params["decoder"], activation(cfg.activation)
    x = with_labels("autoencoder decoder", z, labels, cfg.classes)
    if cfg.kind == "mlp":
        for layer in p["layers"]:
            x = act(linear(layer, x))
        return linear(p["output"], x).reshape(x.shape[0], *cfg.shape)
    x = act(linear(p["project"], x)).reshape(x.shape[0], *cfg.smallest)
    for layer in p["layers"]:
        x = act(_up(layer, x))
    return _up(p["output"], x)


def draw(q: Gaussian, key: Tensor) -> Tensor:
    """z ~ q, differentiable by it: mean + deviation * noise (Kingma & Welling 2014, section 2.4). (batch, latent).

    key: (2,), or one an example (batch, 2).
    """
    shape = q.mean.shape if key.ndim == 1 else q.mean.shape[1:]
    return q.mean + torch.exp(0.5 * q.log_variance) * random.normal(key, shape, q.mean.dtype)


def images(output: Tensor, cfg: Config) -> Tensor:
    """The expected pixels, of the shape of the decoder's output: probabilities of logits, or the means themselves."""
    return output.sigmoid() if cfg.output == "logits" else output


def apply(
    params: dict,
    x: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> dict[str, Tensor]:
    """There and back: `output` (batch, *shape), and either `mean` and `log_variance` of q or `code` (batch, latent).

    In training a Gaussian code is drawn, else it is the mean. With a learned variance also `output_log_variance`
    (batch,), the same for all.

    Args:
        x: (batch, *shape).
        labels: integers (batch,), needed if there are classes.
        key: (2,) or one an example (batch, 2); needed in training if the code is Gaussian.

    Raises:
        ValueError: x of another shape, labels missing or misshapen, no key.
    """
    code = encode(params, x, cfg, labels=labels)
    found = code._asdict() if cfg.gaussian else {"code": code}
    if cfg.gaussian and train and key is None:
        raise ValueError("autoencoder: training draws codes; pass key=")
    if cfg.gaussian:
        code = draw(code, key) if train else code.mean
    if cfg.learned_variance:
        found["output_log_variance"] = params["decoder"]["log_variance"].expand(x.shape[0])
    return {**found, "output": decode(params, code, cfg, labels=labels)}


def _linear_layers(widths: tuple[int, ...]) -> list[dict]:
    return [_linear_spec(d_in, d_out) for d_in, d_out in zip(widths[:-1], widths[1:], strict=True)]


def _linear_spec(d_in: int, d_out: int) -> dict:
    # As torch.nn.Linear starts. The biases bend the units' lines at different codes from the beginning: on MNIST a VAE
    # was half a nat better for it after 10 epochs, with two seeds, than with He's weights and biases of 0.
    start = initializers.uniform(-(d_in**-0.5), d_in**-0.5)
    return linear_spec(d_in, d_out, init=start, bias_init=start)


def _up_spec(d_in: int, d_out: int, gain: float) -> dict:
    # With stride 2 a pixel is reached by 2 x 2 of the 4 x 4 weights: variance gain / inputs, as He et al. 2015.
    return conv_spec(d_in, d_out, 4, transposed=True, init=initializers.normal((gain / (4 * d_in)) ** 0.5))


def _up(p: dict, x: Tensor) -> Tensor:
    """Maps of twice the size."""
    return conv_transpose(p, x, stride=2, padding=1)
