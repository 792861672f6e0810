"""VQ-VAE: an autoencoder of images whose code is an image of integers, indices into a codebook.

van den Oord, Vinyals and Kavukcuoglu 2017, "Neural Discrete Representation Learning", arXiv:1711.00937. Each vector of
the encoder's feature maps is replaced by the nearest of K (eq. 1 and 2), which is the decoder's input; the gradient is
passed straight through to the encoder:

    k = argmin_j |z - e_j|^2,        decoder's input = z + stop(e_k - z)

The codebook is learned by gradient descent (its loss and the commitment are in `train.losses.variational`) or as moving
averages of the vectors nearest to each row (appendix A.1). The averages are Stats, as batch norm's statistics are: in
training `apply` reports their increments by taps, and `core.stats.update` or the train step applies them. The images of
integers can be learned in turn by `nets.generative.pixelcnn`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers, random
from core.layers import conv, conv_spec, conv_transpose, embedding
from core.spec import Param, Stat
from core.tap import tap
from nets.blocks.conv_norm import check_images

HE = initializers.kaiming_normal()


@dataclass(frozen=True)
class Config:
    """Sizes of a VQ-VAE and its codebook."""

    channels: int = 1
    """Channels of the images, of any size that can be halved `stages` times."""
    width: int = 32
    """Channels of the feature maps."""
    stages: int = 1
    """Number of halvings: one code per 2**stages x 2**stages pixels."""
    blocks: int = 2
    """Residual blocks of the encoder, and of the decoder."""
    hidden: int = 32
    """Hidden channels of a residual block."""
    codes: int = 64
    """Rows of the codebook (the paper's K)."""
    code: int = 16
    """Dimension of a row (the paper's D)."""
    codebook: str = "ema"
    """ema, moving averages, or loss, a parameter."""
    decay: float = 0.99
    """Decay of the moving averages."""
    smoothing: float = 1e-5
    """Laplace smoothing of the sizes, as if each code had been used that many times more."""

    def __post_init__(self):
        if self.codebook not in ("ema", "loss"):
            raise ValueError(f"vqvae: codebook '{self.codebook}'; expected ema or loss")
        if self.stages < 1 or self.codes < 2:
            raise ValueError(f"vqvae: {self.stages} stages and {self.codes} codes; expected at least 1 and 2")
        if not 0 <= self.decay < 1:
            raise ValueError(f"vqvae: decay {self.decay} is outside [0, 1)")


PRESETS = {
    "digits": Config(),
    "mnist": Config(width=64, stages=2, codes=128, code=32),
    "small": Config(3, 128, 2, codes=512, code=64),
    # Section 4.1: 256 hidden units throughout, 512 codes.
    "paper": Config(3, 256, 2, hidden=256, codes=512, code=64),
}


class Quantised(NamedTuple):
    """Quantised vectors.

    codes: (...) integers, indices of the nearest rows.
    nearest: (..., code), these rows of the codebook.
    vectors: (..., code), the same values, whose gradient is passed to z instead of the codebook.
    """

    codes: Tensor
    nearest: Tensor
    vectors: Tensor


def spec(cfg: Config) -> dict:
    """`codebook`, `decoder` and `encoder`."""
    rows = initializers.uniform(-1 / cfg.codes, 1 / cfg.codes)
    if cfg.codebook == "loss":
        codebook = {"weight": Param((cfg.codes, cfg.code), rows, ("vocabulary", "width"))}
    else:
        # As if each row had been used once.
        codebook = {
            "count": Stat((), initializers.zeros),
            "size": Stat((cfg.codes,), initializers.ones),
            "sum": Stat((cfg.codes, cfg.code), rows),
        }
    channels = (cfg.channels, *(cfg.width,) * cfg.stages)
    pairs = list(zip(channels[:-1], channels[1:], strict=True))
    return {
        "codebook": codebook,
        "decoder": {
            "blocks": [_block_spec(cfg) for _ in range(cfg.blocks)],
            "input": conv_spec(cfg.code, cfg.width, 3),
            "layers": [_up_spec(d_in, d_out) for d_out, d_in in reversed(pairs)],
        },
        "encoder": {
            "blocks": [_block_spec(cfg) for _ in range(cfg.blocks)],
            "layers": [conv_spec(d_in, d_out, 4, init=HE) for d_in, d_out in pairs],
            "output": conv_spec(cfg.width, cfg.code, 1),
        },
    }


def encode(params: dict, x: Tensor, cfg: Config) -> Tensor:
    """Vectors before quantisation: (batch, channels, height, width) -> (batch, height', width', code).

    Raises ValueError if the images have other channels or cannot be halved `stages` times.
    """
    check_images("vqvae encoder", x, cfg.channels, 1)
    if any(side % 2**cfg.stages for side in x.shape[2:]):
        size = f"images of {x.shape[2]} x {x.shape[3]} pixels"
        raise ValueError(f"vqvae encoder: {size} cannot be halved {cfg.stages} times")
    p = params["encoder"]
    for layer in p["layers"]:
        x = F.relu(conv(layer, x, stride=2, padding=1))  # half the height and width
    for block in p["blocks"]:
        x = _block(block, x)
    return conv(p["output"], F.relu(x)).movedim(1, -1)  # (batch, height', width', code)


def decode(params: dict, codes: Tensor, cfg: Config) -> Tensor:
    """Images from codes: (batch, height', width') -> (batch, channels, height, width), not bounded.

    Raises ValueError unless the codes are integers of three axes.
    """
    if codes.ndim != 3 or codes.is_floating_point():
        kind = f"{codes.dtype} {tuple(codes.shape)}"
        raise ValueError(f"vqvae decoder: expected codes (batch, height, width), integers, found {kind}")
    p = params["decoder"]
    rows = embedding({"weight": codebook(params["codebook"], cfg.smoothing)}, codes)  # (batch, height', width', code)
    return _decode_vectors(p, rows.to(p["input"]["weight"].dtype))


def apply(
    params: dict,
    x: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
    ways: int = 1,
) -> dict[str, Tensor]:
    """Encode, quantise and decode.

    Args:
        x: (batch, channels, height, width).
        labels, key: without effect here.
        train: report to the moving averages, if there are any, by taps on the output.
        ways: number of equal parts of a batch, of which x is one; the increments that the parts report must be
            averaged, as those of several processes are.

    Returns:
        `codes` (batch, height', width'); `encodings` (batch, height', width', code), the encoder's output; `nearest`,
        of the same shape, rows of the codebook; `output` (batch, channels, height, width). The loss of a codebook that
        is a parameter is a function of `nearest`, the commitment one of `encodings`.

    Raises:
        ValueError: images of other channels or a size that cannot be halved.
    """
    p, z = params["codebook"], encode(params, x, cfg)  # z: (batch, height', width', code)
    quantised = quantise(codebook(p, cfg.smoothing), z)
    output = _decode_vectors(params["decoder"], quantised.vectors)
    if train and "sum" in p:
        new = update(p, z, quantised.codes, cfg.decay, ways)
        output = tap(output, p["sum"], new["sum"] - p["sum"])
        output = tap(output, p["size"], new["size"] - p["size"])
        # From a batched value, so that each of a vmapped batch counts.
        output = tap(output, p["count"], torch.ones_like(new["size"].sum()))
    return {"codes": quantised.codes, "encodings": z, "nearest": quantised.nearest, "output": output}


def codebook(p: dict, smoothing: float = 1e-5) -> Tensor:
    """Rows e_i (codes, code): a parameter, or the averages m_i / N_i (appendix A.1), as constants.

    N_i are the smoothed sizes (N_i + s) / (N + s K) N, with N the sum of all: a code that is never used does not divide
    by 0.

    p: `params["codebook"]`.
    """
    if "weight" in p:
        return p["weight"]
    size, total = p["size"].detach(), p["size"].detach().sum()
    smoothed = (size + smoothing) / (total + smoothing * len(size)) * total  # (codes,)
    return p["sum"].detach() / smoothed[:, None]


def distances(codebook: Tensor, z: Tensor) -> Tensor:
    """Squared distances |z - e_j|^2 to each row: (codes, code) and (..., code) -> (..., codes)."""
    return z.square().sum(-1, keepdim=True) + _relative_distances(codebook, z)


def quantise(codebook: Tensor, z: Tensor) -> Quantised:
    """Nearest row of the codebook for each vector. van den Oord et al. 2017, eq. 1 and 2.

    The gradient of `vectors` is passed to z unchanged (section 3.2), that of `nearest` to the rows.

    Args:
        codebook: (codes, code).
        z: (..., code).

    Raises:
        ValueError: the vectors have another dimension than the rows.
    """
    if z.ndim < 1 or z.shape[-1] != codebook.shape[-1]:
        shapes = f"vectors {tuple(z.shape)} and rows {tuple(codebook.shape)}"
        raise ValueError(f"quantise: expected vectors (..., {codebook.shape[-1]}), found {shapes}")
    codes = _relative_distances(codebook.detach(), z.detach()).argmin(-1)  # (...)
    nearest = embedding({"weight": codebook}, codes).to(z.dtype)  # (..., code)
    return Quantised(codes, nearest, z + (nearest - z).detach())


def update(p: dict, z: Tensor, codes: Tensor, decay: float = 0.99, ways: int = 1) -> dict:
    """Moving averages after a batch. Appendix A.1, with n_i vectors z whose nearest row is i:

        N_i <- decay N_i + (1 - decay) n_i,        m_i <- decay m_i + (1 - decay) sum of these z

    A pure function of the state {"count", "size", "sum"}; the result carries no derivative.

    Args:
        p: `params["codebook"]` of an "ema" codebook.
        z: (..., code).
        codes: (...) integers.
        ways: factor on both sums; see `apply`.
    """
    z, codes = z.detach().flatten(0, -2), codes.flatten()  # (vectors, code), (vectors,)
    # As a matrix: sums in no fixed order (index_add) would make a GPU's run differ from itself.
    one_hot = (torch.arange(len(p["size"]), device=z.device)[:, None] == codes).to(p["sum"].dtype)  # (codes, vectors)
    size, total = p["size"].detach(), p["sum"].detach()
    return {
        "count": p["count"].detach() + 1,
        "size": decay * size + (1 - decay) * ways * one_hot.sum(1),  # (codes,)
        "sum": decay * total + (1 - decay) * ways * (one_hot @ z.to(total.dtype)),  # (codes, code)
    }


def revive(p: dict, z: Tensor, key: Tensor, threshold: float = 1.0, size: Tensor | None = None) -> dict:
    """Random restarts: the codebook with rarely used rows replaced by random ones of the vectors z.

    Dhariwal et al. 2020, "Jukebox", arXiv:2005.00341, section 3.1. A new row starts as if used once. With an infinite
    threshold all rows are replaced: an initialisation from data.

    Args:
        p: `params["codebook"]`.
        z: (..., code), the encoder's vectors of a batch.
        key: (2,).
        threshold: rows of a smaller size are replaced. Sizes count vectors per batch; even use is vectors / codes.
        size: (codes,), uses of each row; needed where the codebook is a parameter, which has no averages.

    Raises:
        ValueError: a codebook without averages and no sizes.
    """
    if size is None and "size" not in p:
        raise ValueError("revive: this codebook keeps no averages of its use; pass size=, (codes,)")
    dead = (p["size"] if size is None else size) < threshold
    z = z.detach().flatten(0, -2)  # (vectors, code)
    rows = z[random.randint(key, dead.shape, 0, len(z)).long()]  # (codes, code)
    if "weight" in p:
        return {"weight": torch.where(dead[:, None], rows.to(p["weight"].dtype), p["weight"])}
    return {
        "count": p["count"],
        "size": torch.where(dead, torch.ones_like(p["size"]), p["size"]),
        "sum": torch.where(dead[:, None], rows.to(p["sum"].dtype), p["sum"]),
    }


def usage(codes: Tensor, cfg: Config) -> Tensor:
    """Uses of each row of the codebook: integers of any shape -> (codes,), counts as float32."""
    codes = codes.flatten().long()
    return codes.new_zeros(cfg.codes).index_add(0, codes, torch.ones_like(codes)).to(torch.float32)


def perplexity(counts: Tensor) -> Tensor:
    """Perplexity of the codebook's use, exp(-sum_i p_i log p_i): from 1 to the number of codes. counts: (codes,)."""
    p = counts / counts.sum()
    return torch.exp(torch.special.entr(p).sum())


def _relative_distances(codebook: Tensor, z: Tensor) -> Tensor:
    """|e_j|^2 - 2 z . e_j: without |z|^2, the same for all rows, in whose rounding their differences would be lost."""
    wide = torch.promote_types(torch.promote_types(codebook.dtype, z.dtype), torch.float32)
    codebook, z = codebook.to(wide), z.to(wide)
    return codebook.square().sum(-1) - 2 * (z @ codebook.mT)  # (..., codes)


def _decode_vectors(p: dict, vectors: Tensor) -> Tensor:
    """(batch, height', width', code) -> (batch, channels, height, width)."""
    x = conv(p["input"], vectors.movedim(-1, 1), padding=1)  # (batch, width, height', width')
    for block in p["blocks"]:
        x = _block(block, x)
    for layer in p["layers"]:
        x = conv_transpose(layer, F.relu(x), stride=2, padding=1)  # twice the height and width
    return x


def _block_spec(cfg: Config) -> dict:
    return {"conv1": conv_spec(cfg.width, cfg.hidden, 3, init=HE), "conv2": conv_spec(cfg.hidden, cfg.width, 1)}


def _block(p: dict, x: Tensor) -> Tensor:
    """x + conv 1x1 (relu (conv 3x3 (relu x))), section 4.1. x: (batch, width, height', width')."""
    y = conv(p["conv1"], F.relu(x), padding=1)  # (batch, hidden, height', width')
    return x + conv(p["conv2"], F.relu(y))


def _up_spec(d_in: int, d_out: int) -> dict:
    # With stride 2 a pixel gets 2 x 2 of the 4 x 4 weights: He's variance of 2 / inputs.
    return conv_spec(d_in, d_out, 4, transposed=True, init=initializers.normal((2 / (4 * d_in)) ** 0.5))
