"""Segmentations without a net, that one must beat: by the colour of each pixel, or by a threshold per picture."""

import numpy as np
import torch
from torch import Tensor

from train.data.images.colours import GREY
from train.data.images.mask_sets import MaskSet, resized
from train.data.images.masks import VOID
from train.metrics import segmentation


def baseline(data: MaskSet) -> tuple[str, Tensor]:
    """(name, confusion matrices (pictures, classes, classes) of the test pictures): `by_threshold` where objects are
    told from a background, else `by_colour`."""
    binary = data.table.background and len(data.table.classes) == 2
    return ("threshold", by_threshold(data)) if binary else ("colour", by_colour(data))


def _counted(best: np.ndarray, mask: Tensor, classes: int) -> Tensor:
    best = resized(best.astype(np.uint8), (mask.shape[1], mask.shape[0]))
    return segmentation.confusion(best, mask, classes, VOID)


def by_threshold(data: MaskSet) -> Tensor:
    """Bright or dark pixels, whichever are fewer, as objects: Otsu's threshold t of the grey values of each picture.

    argmax_t w0 w1 (m0 - m1)^2,   w and m the shares and means of the pixels up to t, and above   (Otsu 1979)
    """
    weights = torch.tensor(GREY).double()
    matrices = []
    for image, mask in zip(data.test.images, data.test.masks, strict=True):
        grey = torch.einsum("chw,c->hw", image.double(), weights).round().long()
        counts = grey.flatten().bincount(minlength=256).double()
        below, total = counts.cumsum(0), counts.sum()
        first = (counts * torch.arange(256)).cumsum(0)
        gap = first / below.clamp(min=1) - (first[-1] - first) / (total - below).clamp(min=1)  # m0 - m1
        bright = grey > (below * (total - below) * gap.square()).argmax()
        objects = bright if bright.double().mean() < 0.5 else ~bright
        matrices.append(_counted(objects.numpy(), mask, 2))
    return torch.stack(matrices)


def by_colour(data: MaskSet) -> Tensor:
    """The confusion matrices (pictures, classes, classes) of test pictures by the colour of each pixel alone.

    A Gaussian of the colours of each class, fitted to the pictures to train on (quadratic discriminant analysis):

        argmax_c log pi_c - 1/2 log |S_c| - 1/2 (x - m_c)^T S_c^{-1} (x - m_c)
    """
    classes = len(data.table.classes)
    sums, outer, counts = torch.zeros(classes, 3).double(), torch.zeros(classes, 3, 3).double(), torch.zeros(classes)
    for image, mask in zip(data.train.images, data.train.masks, strict=True):
        x, y = image.flatten(1).T.double() / 255, mask.flatten().long()  # (pixels, 3), (pixels,)
        for c in y.unique().tolist():
            if c != VOID:
                own = x[y == c]
                sums[c] += own.sum(0)
                outer[c] += own.T @ own
                counts[c] += len(own)
    there = counts > 0
    share = counts.clamp(min=1)[:, None].double()
    mean = sums / share  # (classes, 3)
    spread = outer / share[..., None] - mean[:, :, None] * mean[:, None] + 1e-4 * torch.eye(3).double()
    inverse, volume = torch.linalg.inv(spread), torch.logdet(spread)
    prior = torch.where(there, (counts / counts.sum()).log(), -torch.inf).double()
    matrices = []
    for image, mask in zip(data.test.images, data.test.masks, strict=True):
        offset = image.flatten(1).T.double()[:, None] / 255 - mean  # (pixels, classes, 3)
        distance = torch.einsum("pci,cij,pcj->pc", offset, inverse, offset)
        best = (prior - volume / 2 - distance / 2).argmax(1).view(image.shape[1:])  # (height, width)
        matrices.append(_counted(best.numpy(), mask, classes))
    return torch.stack(matrices)
