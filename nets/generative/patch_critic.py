"""PatchGAN critic, a score per patch: that of pix2pix and CycleGAN.

Isola et al. 2017 (arXiv:1611.07004), section 3.2.2: a few 4x4 convolutions, each of whose outputs depends on one patch
of the image only, so that the objective is about texture and the same at every position. With 1 to 5 halvings
(`layers`) the patches are 16, 34, 70, 142 or 286 pixels wide.
"""

from torch import Tensor
from torch.nn import functional as F

from core.layers import batch_norm, batch_norm_spec, conv, conv_spec, instance_norm
from nets.blocks.conv_norm import check_images
from nets.generative.dcgan import SCALE, WEIGHT

NORMS = ("batch", "instance", "none")


def norm_spec(kind: str, channels: int) -> dict:
    """Parameters of `norm`; only batch norm has any."""
    return {"norm": batch_norm_spec(channels, init=SCALE)} if kind == "batch" else {}


def norm(p: dict, x: Tensor, kind: str, train: bool) -> Tensor:
    """Batch norm by `p["norm"]`, instance norm without scale and shift, or x itself."""
    if kind == "batch":
        return batch_norm(p["norm"], x, train=train)
    return instance_norm({}, x) if kind == "instance" else x


def check_norm(name: str, kind: str) -> None:
    """Raise ValueError unless the kind is known."""
    if kind not in NORMS:
        raise ValueError(f"{name}: norm '{kind}' is unknown; expected one of {', '.join(NORMS)}")


def patch_critic_spec(channels: int, width: int = 64, layers: int = 3, kind: str = "batch") -> dict:
    """`layers` convolutions that halve the image, one that does not, and `head`. The first has no norm."""
    # A norm would cancel a bias before it.
    widths = [width * min(2**i, 8) for i in range(layers + 1)]
    first = {"conv": conv_spec(channels, width, 4, init=WEIGHT)}
    later = [
        {"conv": conv_spec(d_in, d_out, 4, bias=kind == "none", init=WEIGHT), **norm_spec(kind, d_out)}
        for d_in, d_out in zip(widths, widths[1:], strict=False)
    ]
    return {"head": conv_spec(widths[-1], 1, 4, init=WEIGHT), "layers": [first, *later]}


def patch_critic(params: dict, x: Tensor, kind: str = "batch", *, name: str = "patch critic", train: bool) -> dict:
    """Scores of patches, and the penultimate feature maps.

    Args:
        x: (batch, channels, height, width), sides of at least 3 * 2**layers pixels.
        kind: norm of the layers, one of NORMS.
        name: name of the net in error messages.

    Returns:
        "scores" (batch, 1, h, w) and "features" (batch, 8 * width, h + 1, w + 1), where h is height / 2**layers - 2.

    Raises:
        ValueError: images with other channels, or too small.
    """
    layers = params["layers"]
    check_images(name, x, layers[0]["conv"]["weight"].shape[1], 3 * 2 ** (len(layers) - 1))
    for i, p in enumerate(layers):
        x = conv(p["conv"], x, stride=2 if i < len(layers) - 1 else 1, padding=1)  # half the height and width
        x = F.leaky_relu(norm(p, x, kind if i else "none", train), 0.2)
    return {"features": x, "scores": conv(params["head"], x, padding=1)}  # scores (batch, 1, h, w)
