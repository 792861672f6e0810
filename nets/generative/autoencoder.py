"""Autoencoders: an encoder from examples to low-dimensional codes, and a decoder back.

The encoder gives a code (a plain or denoising autoencoder), or a Gaussian q(z | x) over codes: the variational
autoencoder of Kingma & Welling 2014, "Auto-Encoding Variational Bayes", arXiv:1312.6114. The decoder gives the logit of
a Bernoulli per pixel, or the mean of a Gaussian. Conditional on a class (Sohn et al. 2015, "Learning Structured Output
Representation using Deep Conditional Generative Models"): both get the label (`nets.blocks.conditioning`). The losses
are in `train.losses.variational`. In 100 lines of plain torch, training included: `nets/explained/vae.py`.
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
    """Sizes and kind of an autoencoder."""

    shape: tuple[int, ...] = (1, 8, 8)
    """Shape of an example, without the batch."""
    latent: int = 2
    """Dimension of the code."""
    kind: str = "mlp"
    """mlp, or convolutional for images (channels, height, width)."""
    widths: tuple[int, ...] = (128,)
    """Hidden units per layer of the encoder's MLP; the decoder has them in reverse."""
    width: int = 32
    """Channels at half the size (convolutional); they double with each further stage."""
    stages: int = 2
    """Number of halvings of the size (convolutional)."""
    gaussian: bool = True
    """The encoder gives the mean and log variance of q(z | x) (True) or a code."""
    output: str = "logits"
    """Output of the decoder: logits of Bernoullis, or mean of Gaussians."""
    learned_variance: bool = False
    """Learn one variance shared by all Gaussians of the output; otherwise it is up to the loss."""
    classes: int = 0
    """Number of classes that encoder and decoder are conditional on; 0 for none."""
    activation: str = "relu"
    """Activation of the hidden layers, a name of `core.layers.ACTIVATIONS`."""

    def __post_init__(self):
        if self.kind not in ("convolutional", "mlp"):
            raise ValueError(f"autoencoder: kind '{self.kind}'; expected convolutional or mlp")
        if self.output not in ("logits", "mean"):
            raise ValueError(f"autoencoder: output '{self.output}'; expected logits or mean")
        if self.learned_variance and self.output != "mean":
            raise ValueError("autoencoder: logits have no variance to learn; learned_variance needs output 'mean'")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"autoencoder: activation '{self.activation}' is not one of core.layers.ACTIVATIONS")
        if self.latent < 1:
            raise ValueError(f"autoencoder: latent is {self.latent}; expected at least 1")
        if not self.shape:
            raise ValueError("autoencoder: shape is (); expected the axes of an example")
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
        """Shape of the smallest feature maps: channels, height, width."""
        return self.channels[-1], *(side // 2**self.stages for side in self.shape[1:])


CONVOLUTIONAL = {"kind": "convolutional", "stages": 2}

PRESETS = {
    "digits": Config(latent=8, widths=(256, 128)),
    # Codes in the plane.
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
    """`layers.i` and `code`, whose outputs are the code, or first the means, then the log variances."""
    outputs = cfg.latent * (2 if cfg.gaussian else 1)
    if cfg.kind == "mlp":
        widths = (prod(cfg.shape) + cfg.classes, *cfg.widths)
        return {"code": _linear_spec(widths[-1], outputs), "layers": _linear_layers(widths)}
    channels = (cfg.shape[0] + cfg.classes, *cfg.channels)
    layers = [conv_spec(d_in, d_out, 4, init=HE) for d_in, d_out in zip(channels[:-1], channels[1:], strict=True)]
    return {"code": linear_spec(prod(cfg.smallest), outputs), "layers": layers}


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
        expected = ", ".join(["batch", *map(str, cfg.shape)])
        raise ValueError(f"autoencoder encoder: expected x of shape ({expected}), found {tuple(x.shape)}")
    p, act = params["encoder"], activation(cfg.activation)
    x = with_labels("autoencoder encoder", x.flatten(1) if cfg.kind == "mlp" else x, labels, cfg.classes)
    for layer in p["layers"]:
        x = act(linear(layer, x) if cfg.kind == "mlp" else conv(layer, x, stride=2, padding=1))  # half the size
    code = linear(p["code"], x.flatten(1))  # (batch, latent or 2 latent)
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
    """Logits or means of p(x | z), as `cfg.output` says: (batch, latent) -> (batch, *shape).

    A learned variance is `params["decoder"]["log_variance"]`. Arguments as in `encode`.

    Raises:
        ValueError: z of another width, labels missing or misshapen.
    """
    check_latent("autoencoder decoder", z, cfg.latent)
    p, act = params["decoder"], activation(cfg.activation)
    x = with_labels("autoencoder decoder", z, labels, cfg.classes)  # (batch, latent + classes)
    if cfg.kind == "mlp":
        for layer in p["layers"]:
            x = act(linear(layer, x))
        return linear(p["output"], x).reshape(x.shape[0], *cfg.shape)  # (batch, *shape)
    x = act(linear(p["project"], x)).reshape(x.shape[0], *cfg.smallest)  # (batch, channels, height', width')
    for layer in p["layers"]:
        x = act(_up(layer, x))  # twice the size
    return _up(p["output"], x)  # (batch, *shape)


def draw(q: Gaussian, key: Tensor) -> Tensor:
    """Sample of q, (batch, latent), differentiable by its mean and variance. Kingma & Welling 2014, section 2.4:

        z = mean + std epsilon,   epsilon ~ N(0, 1)

    key: (2,), or one per example (batch, 2).
    """
    shape = q.mean.shape if key.ndim == 1 else q.mean.shape[1:]
    return q.mean + torch.exp(0.5 * q.log_variance) * random.normal(key, shape, q.mean.dtype)


def images(output: Tensor, cfg: Config) -> Tensor:
    """Expected pixels, of the shape of the decoder's output: probabilities of logits, or the means themselves."""
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
    """Encode and decode: `output` (batch, *shape), and `mean` and `log_variance` of q or `code` (batch, latent).

    In training a Gaussian code is sampled, otherwise it is the mean. With a learned variance also `output_log_variance`
    (batch,), the same for all examples.

    Args:
        x: (batch, *shape).
        labels: integers (batch,), needed if there are classes.
        key: (2,) or one per example (batch, 2); needed in training if the code is Gaussian.

    Raises:
        ValueError: x of another shape, labels missing or misshapen, no key.
    """
    code = encode(params, x, cfg, labels=labels)
    out = code._asdict() if cfg.gaussian else {"code": code}
    if cfg.gaussian and train and key is None:
        raise ValueError("autoencoder: training draws codes; pass key=")
    if cfg.gaussian:
        code = draw(code, key) if train else code.mean  # (batch, latent)
    if cfg.learned_variance:
        out["output_log_variance"] = params["decoder"]["log_variance"].expand(x.shape[0])  # (batch,)
    return {**out, "output": decode(params, code, cfg, labels=labels)}


def _linear_layers(widths: tuple[int, ...]) -> list[dict]:
    return [_linear_spec(d_in, d_out) for d_in, d_out in zip(widths[:-1], widths[1:], strict=True)]


def _linear_spec(d_in: int, d_out: int) -> dict:
    # As torch.nn.Linear starts. The biases bend the units' lines at different codes from the beginning: on MNIST a VAE
    # was half a nat better for it after 10 epochs, with two seeds, than with He's weights and biases of 0.
    start = initializers.uniform(-(d_in**-0.5), d_in**-0.5)
    return linear_spec(d_in, d_out, init=start, bias_init=start)


def _up_spec(d_in: int, d_out: int, gain: float) -> dict:
    # With stride 2 a pixel gets 2 x 2 of the 4 x 4 weights: variance gain / inputs, as He et al. 2015.
    return conv_spec(d_in, d_out, 4, transposed=True, init=initializers.normal((gain / (4 * d_in)) ** 0.5))


def _up(p: dict, x: Tensor) -> Tensor:
    """Feature maps of twice the size: (batch, d_in, height, width) -> (batch, d_out, 2 height, 2 width)."""
    return conv_transpose(p, x, stride=2, padding=1)
