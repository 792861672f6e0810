"""Two-dimensional convolution explained: written out four ways, with its transpose and its gradients.

As everywhere in deep learning, "convolution" means cross-correlation: the kernel is not flipped. With stride s,
padding p and dilation d, along each axis, and one group of channels

    y[n, o, i, j] = sum_{c, a, b} w[o, c, a, b] x[n, c, i s + a d - p, j s + b d - p],    x = 0 outside of the image.

Along each axis y has floor((size + 2 p - d (k - 1) - 1) / s) + 1 elements for a kernel of k (Dumoulin and Visin 2016,
"A guide to convolution arithmetic for deep learning", arXiv:1603.07285). With groups, the channels of x and of y are
cut into as many parts, and each part of y sees its own part of x. A bias would be added afterwards.

- `by_definition`: the sum above, one product of matrices per position (a, b) of the kernel;
- `by_im2col`: every patch of the image a column, and one product of matrices for all of them;
- `by_matrix`: a linear map of the flattened image, so a matrix: sparse, with the same few values in every row;
- `by_fft`: a product in the frequency domain.

All take x (batch, d_in, height, width), weight (d_out, d_in / groups, kernel height, kernel width), and give
(batch, d_out, height', width'). Stride, padding and dilation are a number, or one per axis. All raise ValueError where
these do not fit together. They are there to be read; nets use `core.layers.conv`.
"""

from collections.abc import Callable
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]
Sizes = int | Pair


class Geometry(NamedTuple):
    """Sizes of a convolution, each (along the height, along the width); `size` and `output` are those of the images."""

    size: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    output: Pair


def by_definition(
    x: Tensor, weight: Tensor, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1, groups: int = 1
) -> Tensor:
    """y = sum_{a, b} w[:, :, a, b] x_{a, b}: per position of the kernel, the image shifted and strided,
    x_{a, b}[i, j] = x[i s + a d - p, j s + b d - p]."""
    g = _fitting(x, weight, stride, padding, dilation, groups)
    padded = _pad(x, g).unflatten(1, (groups, -1))  # (batch, groups, d_in / groups, height + 2 p, width + 2 p)
    weight = weight.unflatten(0, (groups, -1))  # (groups, d_out / groups, d_in / groups, kh, kw)
    y = 0
    for a, b in product(*map(range, g.kernel)):
        rows, columns = (
            slice(at * d, at * d + s * (n - 1) + 1, s)
            for at, d, s, n in zip((a, b), g.dilation, g.stride, g.output, strict=True)
        )
        shifted = padded[..., rows, columns]  # x_{a, b}: (batch, groups, d_in / groups, height', width')
        y = y + torch.einsum("goc,ngcij->ngoij", weight[..., a, b], shifted)
    return y.flatten(1, 2)  # (batch, d_out, height', width')


def im2col(x: Tensor, kernel: Sizes, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1) -> Tensor:
    """Patches as columns, as `torch.nn.functional.unfold`: (batch, d_in * kh * kw, height' * width').

    columns[n, (c, a, b), (i, j)] = x[n, c, i s + a d - p, j s + b d - p]. A pixel is copied into the column of each
    patch that it lies in, with stride 1 up to kh * kw times: the price of a single product.
    """
    _check_axes(x=x)
    g = _geometry(x.shape[2:], kernel, stride, padding, dilation)
    (kh, kw), (sh, sw), (dh, dw) = g.kernel, g.stride, g.dilation
    patches = _pad(x, g).unfold(2, dh * (kh - 1) + 1, sh)[..., ::dh]  # a view: (batch, d_in, height', width + 2 p, kh)
    patches = patches.unfold(3, dw * (kw - 1) + 1, sw)[..., ::dw]  # (batch, d_in, height', width', kh, kw)
    patches = patches.permute(0, 1, 4, 5, 2, 3)  # (batch, d_in, kh, kw, height', width')
    return patches.flatten(4).flatten(1, 3)


def by_im2col(
    x: Tensor, weight: Tensor, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1, groups: int = 1
) -> Tensor:
    """y[n] = W columns[n], where W (d_out, d_in * kh * kw) has a row per output channel.

    Chellapilla, Puri and Simard 2006, "High Performance Convolutional Neural Networks for Document Processing": the
    copies pay, because processors and libraries are best at large products of matrices.
    """
    g = _fitting(x, weight, stride, padding, dilation, groups)
    columns = im2col(x, g.kernel, g.stride, g.padding, g.dilation)  # (batch, d_in * kh * kw, height' * width')
    columns = columns.unflatten(1, (groups, -1))  # (batch, groups, d_in / groups * kh * kw, height' * width')
    rows = weight.flatten(1).unflatten(0, (groups, -1))  # (groups, d_out / groups, d_in / groups * kh * kw)
    y = rows @ columns  # (batch, groups, d_out / groups, height' * width')
    return y.flatten(1, 2).unflatten(2, g.output)  # (batch, d_out, height', width')


def matrix(
    weight: Tensor, size: Pair, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1, groups: int = 1
) -> Tensor:
    """The matrix of a convolution of images of `size`: sparse COO, (d_out * height' * width', d_in * height * width).

        M[(o, i, j), (c, u, v)] = w[o, c, a, b]    where u = i s + a d - p and v = j s + b d - p

    With stride 1, w depends on u - i and v - j alone: each block (o, c) is a Toeplitz matrix of Toeplitz matrices.
    """
    _check_axes(weight=weight)
    _check_groups(groups, d_out=weight.shape[0])
    g = _geometry(size, weight.shape[2:], stride, padding, dilation)
    (d_out, d_in), (height, width) = weight.shape[:2], g.size
    entries = (d_out, *g.output, d_in, *g.kernel)  # axes o, i, j, c, a, b: in the order of rows, then columns
    o, i, j, c, a, b = (torch.arange(n, device=weight.device).view(-1, *[1] * (5 - at)) for at, n in enumerate(entries))
    c = c + o // (d_out // groups) * d_in  # the channel of x, counted over all groups
    u = i * g.stride[0] + a * g.dilation[0] - g.padding[0]
    v = j * g.stride[1] + b * g.dilation[1] - g.padding[1]
    in_image = (0 <= u) & (u < height) & (0 <= v) & (v < width)  # the rest meets the zeros of the padding
    in_image = in_image.expand(entries)
    rows, columns = (o * g.output[0] + i) * g.output[1] + j, (c * height + u) * width + v
    indices = torch.stack([rows.masked_select(in_image), columns.masked_select(in_image)])  # (2, non-zero entries)
    values = weight[:, None, None].masked_select(in_image)  # (non-zero entries,)
    shape = (d_out * prod(g.output), groups * d_in * height * width)
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=True, check_invariants=False)


def by_matrix(
    x: Tensor, weight: Tensor, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1, groups: int = 1
) -> Tensor:
    """vec(y) = M vec(x), with the M of `matrix`. Not under vmap or torch.compile, which know no sparse tensors."""
    g = _fitting(x, weight, stride, padding, dilation, groups)
    m = matrix(weight, g.size, g.stride, g.padding, g.dilation, groups)
    y = m @ x.flatten(1).T  # (d_out * height' * width', batch)
    return y.T.unflatten(1, (-1, *g.output))  # (batch, d_out, height', width')


def by_fft(
    x: Tensor, weight: Tensor, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1, groups: int = 1
) -> Tensor:
    """F[y] = conj(F[w]) F[x] with stride 1; a larger stride keeps every s-th element, a dilated kernel has zeros.

    This is the convolution theorem, with conj as the kernel is not flipped. It holds for periodic functions: with the
    kernel zero-padded to the padded image's size, the first size + 2 p - d (k - 1) sums do not wrap around, and they
    are the result. Mathieu, Henaff and LeCun 2014, "Fast Training of Convolutional Networks through FFTs"
    (arXiv:1312.5851).
    """
    g = _fitting(x, weight, stride, padding, dilation, groups)
    if not len(x):  # not every library has a Fourier transform of nothing
        return by_definition(x, weight, stride, padding, dilation, groups)
    padded = _pad(x, g)
    size = padded.shape[2:]
    # Of real numbers, half of the frequencies along the last axis suffice.
    image = torch.fft.rfft2(padded)  # F[x]: (batch, d_in, height + 2 p, (width + 2 p) // 2 + 1)
    image = image.unflatten(1, (groups, -1))  # (batch, groups, d_in / groups, ...)
    kernel = torch.fft.rfft2(stretch(weight, g.dilation), size)  # F[w]: (d_out, d_in / groups, ...)
    kernel = kernel.unflatten(0, (groups, -1))  # (groups, d_out / groups, d_in / groups, ...)
    y = torch.einsum("gocuv,ngcuv->ngouv", kernel.conj(), image)  # F[y]: (batch, groups, d_out / groups, ...)
    y = torch.fft.irfft2(y, size).flatten(1, 2)  # (batch, d_out, height + 2 p, width + 2 p)
    rows, columns = (slice(0, s * (n - 1) + 1, s) for s, n in zip(g.stride, g.output, strict=True))
    return y[..., rows, columns]  # (batch, d_out, height', width')


WAYS: dict[str, Callable] = {"definition": by_definition, "im2col": by_im2col, "matrix": by_matrix, "FFT": by_fft}


def transposed(
    x: Tensor,
    weight: Tensor,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Tensor:
    """The transpose of a convolution as a matrix, vec(y) = M^T vec(x): each element of x adds a scaled kernel to y.

        y[n, c, u, v] = sum of w[o, c, a, b] x[n, o, i, j] over o and all i s + a d - p = u, j s + b d - p = v

    As a convolution: put s - 1 zeros between the elements of x, z[i s] = x[i]. Then y[u] = sum_a w[a] z[u + p - a d],
    or with a counted from the other end sum_a w[k - 1 - a] z[u + a d - (d (k - 1) - p)]. So the kernel is flipped, the
    stride 1 and the padding d (k - 1) - p; a negative padding crops.

    Args:
        x: (batch, d_in, height, width).
        weight: (d_in, d_out / groups, kernel height, kernel width), the weight of the convolution from y to x.
        output_padding: additional rows and columns at the end; with a stride, images of several sizes have the same
            output size.

    Returns:
        (batch, d_out, height', width'), height' = (height - 1) s - 2 p + d (k - 1) + output_padding + 1.
    """
    _check_axes(x=x, weight=weight)
    _check_groups(groups, d_in=x.shape[1])
    if x.shape[1] != weight.shape[0]:
        raise ValueError(f"x has {x.shape[1]} channels; expected {weight.shape[0]}, as the transposed weight")
    _, kernel, stride, padding, dilation = _pairs(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    extra = _pair("output_padding", output_padding, 0)
    pads = []
    for n, k, s, p, d, e in zip(x.shape[2:], kernel, stride, padding, dilation, extra, strict=True):
        if e >= max(s, d):
            raise ValueError(f"output_padding is {extra}; expected less than stride {stride} or dilation {dilation}")
        if (n - 1) * s - 2 * p + d * (k - 1) + e < 0:
            raise ValueError(f"padding {padding} crops the whole output of kernel {kernel} and x {tuple(x.shape)}")
        pads = [d * (k - 1) - p, d * (k - 1) - p + e, *pads]  # F.pad counts from the last axis
    z = F.pad(stretch(x, stride), pads)  # (batch, d_in, height' + d (k - 1), width' + d (k - 1))
    swapped = weight.unflatten(0, (groups, -1)).transpose(1, 2)  # (groups, d_out / groups, d_in / groups, kh, kw)
    return by_definition(z, swapped.flatten(0, 1).flip(2, 3), 1, 0, dilation, groups)


def input_gradient(
    size: Pair, weight: Tensor, dy: Tensor, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1, groups: int = 1
) -> Tensor:
    """Gradient with respect to the image: vec(dx) = M^T vec(dy), the transposed convolution of the output's gradient.

    Args:
        size: (height, width) of the image.
        dy: the loss's gradient with respect to y, (batch, d_out, height', width').

    Returns:
        (batch, d_in, height, width).
    """
    _check_axes(weight=weight, dy=dy)
    g = _geometry(size, weight.shape[2:], stride, padding, dilation)
    _check_dy(dy, (len(dy), len(weight), *g.output))
    # Rows and columns at the end that no step of the stride reaches.
    rest = tuple((n + 2 * p - d * (k - 1) - 1) % s for n, k, s, p, d in zip(*g[:5], strict=True))
    return transposed(dy, weight, g.stride, g.padding, rest, groups, g.dilation)


def weight_gradient(
    x: Tensor, kernel: Sizes, dy: Tensor, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1, groups: int = 1
) -> Tensor:
    """Gradient with respect to the kernel: a convolution of the image with the output's gradient as its kernel.

        dw[o, c, a, b] = sum_{n, i, j} dy[n, o, i, j] x[n, c, a d + i s - p, b d + j s - p]

    Stride and dilation swap roles, and so do the batch and the channels of x.

    Args:
        dy: the loss's gradient with respect to y, (batch, d_out, height', width').

    Returns:
        (d_out, d_in / groups, kernel height, kernel width).
    """
    _check_axes(x=x, dy=dy)
    _check_groups(groups, d_in=x.shape[1], d_out=dy.shape[1])
    g = _geometry(x.shape[2:], kernel, stride, padding, dilation)
    _check_dy(dy, (len(x), dy.shape[1], *g.output))
    images = x.unflatten(1, (groups, -1)).permute(2, 1, 0, 3, 4)  # (d_in / groups, groups, batch, height, width)
    images = images.flatten(1, 2)  # (d_in / groups, groups * batch, height, width)
    dw = by_im2col(images, dy.transpose(0, 1), g.dilation, g.padding, g.stride, groups)  # (d_in / groups, d_out, ...)
    # Where the stride leaves a rest, there are rows and columns beyond the kernel.
    return dw.transpose(0, 1)[..., : g.kernel[0], : g.kernel[1]]  # (d_out, d_in / groups, kh, kw)


def stretch(x: Tensor, step: Pair) -> Tensor:
    """Put zeros between the elements: (..., height, width) -> (..., (height - 1) step + 1, (width - 1) step + 1)."""
    (height, width), (rows, columns) = x.shape[-2:], step
    # Each element becomes the corner of a cell of zeros: (..., height, rows, width, columns).
    cells = F.pad(x[..., None, :, None], (0, columns - 1, 0, 0, 0, rows - 1))
    cells = cells.flatten(-2).flatten(-3, -2)  # (..., height * rows, width * columns)
    return cells[..., : (height - 1) * rows + 1, : (width - 1) * columns + 1]


def _fitting(x: Tensor, weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int) -> Geometry:
    """The geometry, once image and weight are known to fit together."""
    _check_axes(x=x, weight=weight)
    _check_groups(groups, d_in=x.shape[1], d_out=weight.shape[0])
    if x.shape[1] != groups * weight.shape[1]:
        raise ValueError(f"x has {x.shape[1]} channels; expected {groups} groups of {weight.shape[1]}, the weight's")
    if x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype} and the weight {weight.dtype}; expected the same")
    return _geometry(x.shape[2:], weight.shape[2:], stride, padding, dilation)


def _geometry(size: Pair, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Geometry:
    size, kernel, stride, padding, dilation = pairs = _pairs(size, kernel, stride, padding, dilation)
    rest = [n + 2 * p - d * (k - 1) - 1 for n, k, s, p, d in zip(*pairs, strict=True)]
    if min(rest) < 0:
        sizes = f"image {size}, kernel {kernel}, dilation {dilation}, padding {padding}"
        raise ValueError(f"the kernel does not fit into the padded image: {sizes}")
    return Geometry(*pairs, output=tuple(r // s + 1 for r, s in zip(rest, stride, strict=True)))


def _pairs(size: Pair, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> tuple[Pair, ...]:
    sizes = {"size": size, "kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return tuple(_pair(name, value, int(name != "padding")) for name, value in sizes.items())


def _pair(name: str, value: Sizes, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name} is {value}; expected a number of at least {least}, or two of them")
    return pair


def _check_axes(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected four axes, the last two of space")


def _check_groups(groups: int, **channels: int) -> None:
    for name, count in channels.items():
        if groups < 1 or count < 1 or count % groups:
            raise ValueError(f"groups is {groups}; expected a divisor of {name}, {count}")


def _check_dy(dy: Tensor, shape: tuple[int, ...]) -> None:
    if dy.shape != shape:
        raise ValueError(f"dy has shape {tuple(dy.shape)}; expected {shape}")


def _pad(x: Tensor, g: Geometry) -> Tensor:
    return F.pad(x, (g.padding[1], g.padding[1], g.padding[0], g.padding[0]))
