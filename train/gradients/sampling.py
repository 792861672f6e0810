"""Random batches of private training: Poisson samples, and samples of a fixed size without replacement.

Both are pure functions of key and step, and what the accounting of privacy assumes (`train.gradients.accounting`); an
order of epochs is not.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from core import random
from train.gradients.accounting import check_number


class Sample(NamedTuple):
    """indices (size,) int64 into the data, and mask (size,) bool: False where an entry only fills up."""

    indices: Tensor
    mask: Tensor


def poisson_sample(key: Tensor, step: int | Tensor, count: int, rate: float, multiple: int = 1) -> Sample:
    """The batch of one step: each of `count` examples is in it with probability `rate`, independently of the others.

    Args:
        key: (2,).
        rate: in (0, 1]; the probability is its next lower multiple of 2**-32.
        multiple: the sample is filled up to a multiple of it, and never empty, so that compiled code sees one shape.
    """
    check_number("poisson_sample: rate", rate, "a number in (0, 1]", lambda x: 0 < x <= 1)
    check_number("poisson_sample: count", count, "at least 1", lambda x: x >= 1)
    # A 32-bit integer is below -2**31 + k for k of its 2**32 values. In 64 bits: k = 0 would wrap around.
    bits = random.bits(random.fold_in(key, step), (count,)).to(torch.int64)
    indices = (bits < math.floor(rate * 2**32) - 2**31).nonzero().squeeze(1)
    return _filled(indices, multiple)


def fixed_sample(key: Tensor, step: int | Tensor, count: int, size: int, multiple: int = 1) -> Sample:
    """The batch of one step: `size` different ones of `count` examples, every set of them with the same probability.

    Arguments as in `poisson_sample`; Raises ValueError unless 1 <= size <= count.
    """
    check_number("fixed_sample: size", size, f"1 to {count}, the number of examples", lambda x: 1 <= x <= count)
    return _filled(random.permutation(random.fold_in(key, step), count)[:size].sort().values, multiple)


def _filled(indices: Tensor, multiple: int) -> Sample:
    check_number("multiple", multiple, "at least 1", lambda x: x >= 1)
    size = max(1, math.ceil(len(indices) / multiple)) * multiple
    mask = torch.arange(size, device=indices.device) < len(indices)
    return Sample(torch.nn.functional.pad(indices, (0, size - len(indices))), mask)
