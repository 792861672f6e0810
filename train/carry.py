"""A state carried from batch to batch, such as that of a recurrent net: any tree of tensors, examples leading."""

import torch
from torch import Tensor

from core import tree
from core.tree import Tree


def reset(carry: Tree, fresh: Tensor) -> Tree:
    """The carry with zeros for the examples that begin anew.

    Args:
        carry: leaves (examples, ...).
        fresh: (examples,) bool; True where the example begins anew, as `train.data.text.text.lane_batch` says.
    """
    return tree.map(lambda x: x.masked_fill(fresh.reshape(-1, *[1] * (x.ndim - 1)), 0), carry)


def detached(before: Tree, after: Tree) -> Tree:
    """The carry `after` a step, if it has the structure, shapes and dtypes of that `before`.

    Its leaves have no gradient and are contiguous copies: they are not overwritten with donated parameters, keep no
    larger tensor alive, and look the same to a compiled step whether they were computed or read from a checkpoint.

    Raises ValueError: it has another structure, or a leaf another shape or dtype, which is named.
    """
    try:
        rows = list(zip(tree.names(before), *tree.aligned(before, after), strict=True))
    except ValueError as error:
        raise ValueError(f"the loss returned another carry than it got: {error}") from None
    for name, old, new in rows:
        if not isinstance(new, Tensor) or (old.dtype, old.shape) != (new.dtype, new.shape):
            what = f"a carry whose '{name}' is" if name else "a carry that is"
            raise ValueError(f"the loss returned {what} {_form(new)}; expected {_form(old)} as before")
    copies = [new.detach().clone(memory_format=torch.contiguous_format) for _, _, new in rows]
    return tree.unflatten(before, copies)


def _form(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
