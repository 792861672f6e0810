"""Embedding: a table of vectors, looked up by integer ids."""

from torch import Tensor
from torch.nn import functional as F

from core.initializers import Initializer, normal
from core.layers.checks import check_arguments
from core.layers.int8 import Int8
from core.layers.low_rank import LowRank, low_rank
from core.layers.split import Split
from core.spec import Table
from core.tree import Tree

NORMAL = normal()


def embedding_spec(
    vocabulary: int,
    width: int,
    *,
    init: Initializer = NORMAL,
    axes: tuple[str | None, str | None] = ("vocabulary", "width"),
) -> Tree:
    """weight (vocabulary, width), from N(0, 1) as in torch.nn.Embedding."""
    return {"weight": Table((vocabulary, width), init, axes)}


def embedding(p: Tree, ids: Tensor, *, padding_id: int | None = None) -> Tensor:
    """Rows of the table. ids: integers of any shape (...) -> (..., width).

    Args:
        padding_id: row without a gradient, which training does not change (torch's padding_idx). May be negative.

    Raises:
        TypeError: p is not a dict, or ids are not a tensor.
        ValueError: ids are not integers, or padding_id is not a row.
    """
    check_arguments("embedding", p, ids, "ids", ("weight",))
    weight = p["weight"]
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"embedding: expected integer ids, found {ids.dtype}")
    if padding_id is not None and not -weight.shape[0] <= padding_id < weight.shape[0]:
        raise ValueError(f"embedding: padding_id={padding_id} is not one of {weight.shape[0]} rows")

    def rows(table: Tensor | Int8) -> Tensor:  # (..., width of the table)
        return table.rows(ids, padding_id) if isinstance(table, Int8) else F.embedding(ids, table, padding_id)

    if isinstance(weight, Split):
        return weight.rows(ids)
    if isinstance(weight, LowRank):
        return low_rank(weight, rows, lambda a, b: rows(b) @ a, -1, rows_axis=1)  # (..., width)
    return rows(weight)  # (..., width)
