"""The four forms of per-example gradients after a backward pass, and the quantities computed from them.

For one use of a parameter by example n, the gradient g_n is one of

    Outer    g_n[b, i, j]    = sum_t rows[n, b, t, i] columns[n, b, t, j]     linear layers (b: groups)
    Shifted  g_n[b, i, j, k] = sum_t rows[n, b, t, i] columns[n, b, t + offsets[k], j]     convolutions
    Rows     g_n[v, j]       = sum over the t with ids[n, t] = v of values[n, t, j]     embeddings
    Dense    g_n             = values[n]     everything else

each reshaped to the parameter's shape. Several uses of a parameter add up. `reduce` computes the wanted quantities
without keeping any g_n:

    norm     |g_n|^2             (N,)       dot      <g_n, v>       (N,)
    gram     <g_n, g_m>          (N, N)     square   sum_n g_n^2    the parameter's shape
    sum      sum_n g_n           the parameter's shape

by one of these ways (T rows, p times d entries per group, per example):

    closed   T = 1: |rows|^2 |columns|^2 and the like
    ghost    sum((rows rows^T) * (columns columns^T)), 2 T^2 (p + d) operations and T^2 memory (Goodfellow 2015,
             arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679). Its terms can cancel: it is summed in float64.
    formed   g_n itself, 2 T p d operations, a block of its rows at a time. Summed over n it is the gradient of the
             batch: where that is wanted too, only the memory traffic is extra. Of Shifted forms each entry k of the
             kernel is a matrix product of its own, of views: the windows of a convolution are never copied out.
    compressed   Rows: values with equal ids are added up at the id's first position; no table is formed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.per_example.blocked import bytes_at_once, formed, wide


class Outer(NamedTuple):
    """rows (N, groups, T, p) and columns (N, groups, T, d)."""

    rows: Tensor
    columns: Tensor


class Shifted(NamedTuple):
    """rows (N, groups, T, p), columns (N, groups, L, c), and by how much columns are shifted for entry k of the kernel.

    The largest offset is at most L - T. As Outer it has d = c * len(offsets) columns.
    """

    rows: Tensor
    columns: Tensor
    offsets: tuple[int, ...]


class Rows(NamedTuple):
    """ids (N, T) integers and values (N, T, D)."""

    ids: Tensor
    values: Tensor


class Dense(NamedTuple):
    """values (N, *shape of the parameter)."""

    values: Tensor


Form = Outer | Shifted | Rows | Dense


def unshifted(form: Form) -> Outer | Rows | Dense:
    """The same gradient, a Shifted form with its windows copied out, as Outer."""
    if not isinstance(form, Shifted):
        return form
    time = form.rows.shape[2]
    columns = form.columns.mT  # (N, groups, c, L), as they lie in memory
    windows = torch.stack([columns[..., k : k + time] for k in form.offsets], 3)  # (N, groups, c, kernel, T)
    return Outer(form.rows, windows.flatten(2, 3).mT)  # columns (N, groups, T, c * kernel)


def combine(forms: Sequence[Form], shape: tuple[int, ...]) -> list[Form]:
    """The same gradient in one form of each kind, but Shifted ones, which stay: uses are concatenated along T.

    Outer and Shifted forms of different numbers of groups (a weight used in several convolutions), and both kinds
    together, become Dense.
    """
    outers = [f for f in forms if isinstance(f, Outer)]
    shifted = [f for f in forms if isinstance(f, Shifted)]
    products: list[Outer | Shifted] = [*outers, *shifted]
    rows = [f for f in forms if isinstance(f, Rows)]
    denses = [f for f in forms if isinstance(f, Dense)]
    if len({(type(f), f.rows.shape[1]) for f in products}) > 1:
        denses += [Dense(materialise([f], shape)) for f in products]
        outers, shifted = [], []
    combined: list[Form] = [*shifted]
    if outers:
        pairs = [torch.cat([f[i] for f in outers], 2) if len(outers) > 1 else outers[0][i] for i in (0, 1)]
        combined.append(Outer(*pairs))
    if rows:
        pairs = [torch.cat([f[i] for f in rows], 1) if len(rows) > 1 else rows[0][i] for i in (0, 1)]
        combined.append(Rows(*pairs))
    if denses:
        combined.append(Dense(sum(f.values for f in denses)))  # type: ignore[arg-type]  # not 0
    return combined


def _one_hot(rows: Rows, vocabulary: int) -> Outer:
    """Rows as Outer, for a table with few rows."""
    vocabulary_ids = torch.arange(vocabulary, device=rows.ids.device)
    hot = (rows.ids[:, None, :, None] == vocabulary_ids).to(rows.values.dtype)  # (N, 1, T, vocabulary)
    return Outer(hot, rows.values[:, None])  # columns (N, 1, T, D)


def _products(forms: list[Form], shape: tuple[int, ...]) -> tuple[list[Shifted], Tensor | None]:
    """(the Outer, Shifted and Rows forms as Shifted ones of equal groups and kernels, the Dense values)."""
    outers = [_one_hot(f, shape[0]) if isinstance(f, Rows) else f for f in forms if not isinstance(f, Dense)]
    dense = [f.values for f in forms if isinstance(f, Dense)]
    products = [Shifted(*f, (0,)) if isinstance(f, Outer) else f for f in combine(outers, shape)]
    return products, (dense[0] if dense else None)  # type: ignore[return-value]  # of such forms, combine makes such


def materialise(forms: Sequence[Form], shape: tuple[int, ...]) -> Tensor:
    """g, (N, *shape): the gradient of every example."""
    parts = []
    for form in map(unshifted, forms):
        if isinstance(form, Outer):
            parts.append((form.rows.transpose(-2, -1) @ form.columns).reshape(-1, *shape))  # (N, *shape)
        elif isinstance(form, Rows):
            count, _, width = form.values.shape
            index = form.ids[:, :, None].expand(form.values.shape)  # (N, T, D)
            table = form.values.new_zeros(count, shape[0], width)  # (N, vocabulary, D)
            parts.append(table.scatter_add(1, index, form.values).reshape(-1, *shape))  # (N, *shape)
        else:
            parts.append(form.values)
    return sum(parts[1:], parts[0])


def _formed(
    forms: list[Form], shape: tuple[int, ...], want: tuple[str, ...], direction: Tensor | None, budget: int | None
) -> dict[str, Tensor]:
    """All wanted quantities in one pass over blocks of g."""
    products, dense = _products(forms, shape)
    if not products:
        assert dense is not None
        return {name: _of_dense(wide(dense), name, direction) for name in want}
    if not want:
        return {}
    rows, columns = [f.rows for f in products], [f.columns for f in products]
    offsets = [k for f in products for k in f.offsets]
    budget = bytes_at_once(rows[0].device) if budget is None else budget
    values = formed(rows, columns, offsets, dense, direction, want, budget)
    quantities = zip(want, values, strict=True)
    return {name: x.reshape(shape) if name in ("square", "sum") else x for name, x in quantities}


def _of_dense(g: Tensor, name: str, direction: Tensor | None) -> Tensor:
    """A quantity of gradients (N, *shape) that are formed."""
    if name == "norm":
        return g.reshape(len(g), -1).square().sum(1)  # (N,)
    if name == "dot":
        assert direction is not None
        return (g * wide(direction)).reshape(len(g), -1).sum(1)  # (N,)
    if name == "gram":
        return g.reshape(len(g), -1) @ g.reshape(len(g), -1).T  # (N, N)
    return (g.square() if name == "square" else g).sum(0)  # (*shape)


def _first_of_equal(ids: Tensor) -> Tensor:
    """(N, T, T): entry (s, t) is 1 where s is the first position with the id of position t. ids: (N, T)."""
    equal = ids[:, :, None] == ids[:, None, :]  # (N, T, T)
    return equal & (equal.to(torch.int8).cumsum(1) == 1)


def compress(rows: Rows) -> Rows:
    """The same gradient, the values of each id added up at its first position and zero at the others."""
    first = _first_of_equal(rows.ids).to(rows.values.dtype)
    return Rows(rows.ids, first @ rows.values)  # values (N, T, D)


def inner(a: Form, b: Form) -> Tensor:
    """<g_n of a, g_n of b>, (N,) in float64: the terms may cancel."""
    if isinstance(a, Rows) and isinstance(b, Outer):
        a, b = b, a
    if isinstance(a, Outer) and isinstance(b, Outer):
        left = a.rows.double() @ b.rows.double().transpose(-2, -1)  # (N, groups, T of a, T of b)
        right = a.columns.double() @ b.columns.double().transpose(-2, -1)  # (N, groups, T of a, T of b)
        return (left * right).sum((1, 2, 3))  # (N,)
    if isinstance(a, Outer) and isinstance(b, Rows):
        # sum_{t,s} rows[t, id_s] (columns_t . values_s)
        rows, columns = a.rows[:, 0], a.columns[:, 0]  # (N, T, vocabulary) and (N, T, D)
        index = b.ids[:, None, :].expand(-1, rows.shape[1], -1)  # (N, T, S)
        left = rows.gather(2, index).double()  # rows[t, id_s], (N, T, S)
        return (left * (columns.double() @ b.values.double().transpose(-2, -1))).sum((1, 2))
    if isinstance(a, Rows) and isinstance(b, Rows):
        equal = a.ids[:, :, None] == b.ids[:, None, :]  # (N, T, S)
        return (equal * (a.values.double() @ b.values.double().transpose(-2, -1))).sum((1, 2))
    raise TypeError(f"no inner product of {type(a).__name__} and {type(b).__name__}")


def _dot(form: Form, direction: Tensor) -> Tensor:
    """<g_n, direction>, (N,)."""
    form = unshifted(form)
    if isinstance(form, Outer):
        groups, d = form.rows.shape[1], form.columns.shape[-1]
        rows = wide(form.rows)
        v = direction.to(rows.dtype).reshape(groups, -1, d)  # (groups, p, d)
        return ((rows @ v) * wide(form.columns)).sum((1, 2, 3))  # (N, groups, T, d) -> (N,)
    if isinstance(form, Rows):
        table = wide(direction).reshape(direction.shape[0], -1)  # (vocabulary, D)
        return (table[form.ids] * wide(form.values)).sum((1, 2))  # (N, T, D) -> (N,)
    return _of_dense(wide(form.values), "dot", direction)


def _gram_of_rows(rows: Rows) -> Tensor:
    """(N, N): all pairs of positions of all pairs of examples; no table is formed."""
    count, time = rows.ids.shape
    ids, values = rows.ids.flatten(), rows.values.double().flatten(0, 1)  # (N * T,) and (N * T, D)
    inner_all = (ids[:, None] == ids[None, :]) * (values @ values.T)  # (N * T, N * T)
    return inner_all.reshape(count, time, count, time).sum((1, 3))  # (N, N)


def _closed(outer: Outer, name: str, shape: tuple[int, ...]) -> Tensor:
    """A quantity of an Outer form with T = 1."""
    rows, columns = wide(outer.rows[:, :, 0]), wide(outer.columns[:, :, 0])  # (N, groups, p or d)
    if name == "norm":
        return (rows.square().sum(2) * columns.square().sum(2)).sum(1)
    if name == "gram":
        rows, columns = rows.transpose(0, 1), columns.transpose(0, 1)  # (groups, N, p or d)
        return ((rows @ rows.mT) * (columns @ columns.mT)).sum(0)  # (N, N)
    return torch.einsum("nbi,nbj->bij", rows.square(), columns.square()).reshape(shape)


def reduce(
    forms: list[Form],
    shape: tuple[int, ...],
    want: tuple[str, ...],
    method: str,
    direction: Tensor | None = None,
    budget: int | None = None,
) -> dict[str, Tensor]:
    """The wanted quantities of a parameter's gradients, in float32 or wider.

    Args:
        forms: of all uses of the parameter.
        shape: of the parameter.
        want: of "norm" (squared), "dot", "gram", "square", "sum".
        method: "closed", "ghost", "compressed" or "formed", as `choose_method` says; "dense" for Dense forms.
        direction: of the parameter's shape, for "dot".
        budget: bytes that "formed" forms at once, by default `blocked.bytes_at_once`.
    """
    if method in ("formed", "dense"):
        return _formed(combine(forms, shape), shape, want, direction, budget)
    forms = combine([unshifted(form) for form in forms], shape)
    first: Any = forms[0]  # Outer or Rows, as the method needs it
    out: dict[str, Tensor] = {}
    for name in want:
        if name == "sum":
            out[name] = weighted_sum(forms, None, shape)
        elif name == "dot":
            assert direction is not None
            out[name] = sum([_dot(form, direction) for form in forms])  # type: ignore[assignment]  # not 0
        elif method == "closed":
            out[name] = _closed(first, name, shape)
        elif method == "compressed" and name == "norm":
            out[name] = wide(compress(first).values).square().sum((1, 2))
        elif method == "compressed" and name == "square":
            ids, values = compress(first)
            table = wide(values).new_zeros(shape[0], values.shape[2])
            out[name] = table.index_add(0, ids.flatten(), wide(values).square().flatten(0, 1)).reshape(shape)
        elif method == "compressed":
            out[name] = _gram_of_rows(first).to(wide(first.values).dtype)
        elif name == "norm":
            pairs = [(a, b, 1 if i == j else 2) for i, a in enumerate(forms) for j, b in enumerate(forms) if i <= j]
            total: Any = sum(factor * inner(a, b) for a, b, factor in pairs)
            out[name] = total.clamp(min=0).to(wide(first[1]).dtype)
        else:
            out |= _formed(forms, shape, (name,), direction, budget)
    return out


def weighted_sum(forms: list[Form], weights: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """sum_n weights[n] g_n, of the parameter's shape. weights: (N,), or None for ones.

    No g_n is formed, but of Shifted forms, a block at a time.
    """
    parts = []
    for form in forms:
        rows = form.values if isinstance(form, (Rows, Dense)) else form.rows
        if weights is not None:
            rows = rows * weights.to(rows.dtype).reshape(-1, *(1,) * (rows.ndim - 1))
        if isinstance(form, Shifted):
            total = _formed([form._replace(rows=rows)], shape, ("sum",), None, None)["sum"]
            parts.append(total.to(rows.dtype))
        elif isinstance(form, Outer):
            parts.append(torch.einsum("nbti,nbtj->bij", rows, form.columns).reshape(shape))
        elif isinstance(form, Rows):
            table = rows.new_zeros(shape[0], rows.shape[2])
            parts.append(table.index_add(0, form.ids.flatten(), rows.flatten(0, 1)).reshape(shape))
        else:
            parts.append(rows.sum(0))
    return sum(parts[1:], parts[0])
