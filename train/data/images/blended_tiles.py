"""Large pictures in overlapping tiles whose borders are blended, in bands of rows, so that memory stays bounded.

    for rows, values in blended(predict, picture, tile=512, overlap=128):  # values (classes, rows, width)
        ...

Each pixel is the mean of the tiles over it, weighted by a ramp that falls towards the borders of each: a net knows
least there, and no seam shows. Where `predict` gives a pixel that depends on its tile alone, such as one of a net whose
receptive field is larger than the overlap, the mean is still another one than that of the whole picture.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from train.data import DataError


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """First positions of the tiles along an axis: as few as overlap by at least `overlap`, at equal distances."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def ramp(tile: int, overlap: int) -> Tensor:
    """(tile,): weights that rise linearly over the overlap, from 1 / (overlap + 1) to 1, and fall again."""
    position = torch.arange(1, tile + 1, dtype=torch.float32)
    return torch.minimum(position, tile + 1 - position).clamp(max=overlap + 1) / (overlap + 1)


def blended(
    predict: Callable[[Tensor], Tensor], picture: Tensor, tile: int, overlap: int, *, square: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """The predictions of a picture, band by band from above.

    Args:
        predict: (1, channels, height, width) -> (1, values, height, width), means of which are meaningful, such as
            probabilities.
        picture: (channels, height, width).
        tile: pixels per side of a tile. A smaller picture is one tile of its own size.
        overlap: pixels that neighbouring tiles share, at least.
        square: all tiles have the full size; a smaller picture is padded with its last row and column.

    Yields:
        (rows, values (values, rows, width) on the CPU).

    Raises DataError: tiles of no size, or smaller than twice the overlap.
    """
    if overlap < 0 or tile < 1 or tile < 2 * overlap:
        raise DataError(f"tiles of {tile} pixels with an overlap of {overlap}; expected at least twice the overlap")
    height, width = picture.shape[1:]
    if square:
        rest = max(0, tile - width), max(0, tile - height)
        picture = F.pad(picture[None].float(), (0, rest[0], 0, rest[1]), mode="replicate")[0].to(picture.dtype)
    tall, wide = (min(tile, side) for side in picture.shape[1:])
    weight = ramp(tall, overlap)[:, None] * ramp(wide, overlap)  # (tall, wide)
    tops, lefts = starts(picture.shape[1], tall, overlap), starts(picture.shape[2], wide, overlap)
    total = shares = None  # weighted values and weights of the rows from `top` on
    for top, following in zip(tops, [*tops[1:], picture.shape[1]], strict=True):
        for left in lefts:
            values = predict(picture[None, :, top : top + tall, left : left + wide])[0].cpu()  # (values, tall, wide)
            if total is None:
                total = values.new_zeros(len(values), tall, picture.shape[2])
                shares = values.new_zeros(tall, picture.shape[2])
            total[..., left : left + wide] += weight * values
            shares[:, left : left + wide] += weight
        done = following - top
        band = (total[:, :done] / shares[:done])[..., :width]
        if top < height:
            yield slice(top, min(following, height)), band[:, : height - top]
        total, shares = (F.pad(x[..., done:, :], (0, 0, 0, done)) for x in (total, shares))
