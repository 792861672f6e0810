"""Attention: the function, its masks, the layers around it and their key-value cache.

    attention(Q, K, V) = softmax(Q Kᵀ / sqrt(d)) V        Vaswani et al. 2017, "Attention Is All You Need", eq. 1

Queries, keys and values are (batch, heads, time, depth). Masks are boolean, True where a query may look at a key, and
broadcast to (batch, heads, queries, keys). With fewer key-value heads than query heads, each is shared by a group of
consecutive query heads (Ainslie et al. 2023, "GQA").
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from core import initializers
from core.compiling import assume_constant_result
from core.layers import linear, linear_spec
from core.layers.checks import check_arguments, check_tensor
from core.layers.split import own_heads, ways_of


def causal_mask(queries: int, keys: int | None = None, device: torch.device | str | None = None) -> Tensor:
    """(queries, keys): query i sees keys up to its own position; with more keys than queries, the last ones align."""
    keys = queries if keys is None else keys
    positions = torch.arange(queries, device=device)[:, None] + (keys - queries)  # (queries, 1)
    return torch.arange(keys, device=device)[None, :] <= positions  # (queries, keys)


def padding_mask(lengths: Tensor, keys: int) -> Tensor:
    """(batch, 1, 1, keys): every query sees the first `lengths[i]` keys of example i. Combine with `&`."""
    visible = torch.arange(keys, device=lengths.device)[None, :] < lengths[:, None]  # (batch, keys)
    return visible[:, None, None, :]  # (batch, 1, 1, keys)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
    scale: float | None = None,
    method: str = "auto",
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: (batch, heads, queries, depth).
        k, v: (batch, key-value heads, keys, depth); their heads divide those of q.
        mask: boolean, broadcastable to (batch, heads, queries, keys). A query that may see no key at all gets zeros.
        causal: query i sees the keys up to i (aligned at the end, as in `causal_mask`); combines with mask.
        bias: added to the scaled scores, broadcastable to (batch, heads, queries, keys), such as relative positions.
        drop: applied to the weights (batch, heads, queries, keys), such as one of `core.layers.dropout_sites`.
        scale: factor on the scores; by default 1 / sqrt(depth).
        method: "explicit" is matmul, softmax, matmul: differentiable to any order and in forward mode, vmaps.
            "fused" is torch's kernel: less memory at long times, and on the CPU no vmap. It has first derivatives in
            reverse mode only, so in forward mode, and where a gradient is taken inside another one, the explicit form
            takes its place. "auto" is explicit on the CPU, fused elsewhere. With `drop` it is always explicit.

    Returns:
        (batch, heads, queries, depth of v).

    Raises:
        TypeError: q, k or v is not a tensor.
        ValueError: shapes that do not fit, a mask that is not boolean, an unknown method.
    """
    _check(q, k, v, mask, bias)
    if method not in ("auto", "explicit", "fused"):
        raise ValueError(f"attention: method '{method}' is unknown; expected auto, explicit or fused")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    fused = method == "fused" or (method == "auto" and q.device.type not in ("cpu", "meta"))
    if fused and drop is None and not _beyond_first_derivatives():
        return _fused(q, k, v, mask, causal, bias, scale)
    return _explicit(q, k, v, mask, causal, bias, drop, scale)


def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """torch's F.scaled_dot_product_attention in the explicit form of `attention`, which vmaps.

    query, key, value: (batch, heads, time, depth), or without heads. The causal mask is aligned at the start, as it is
    there. drop: in place of dropout_p, as in `attention`.
    """
    if query.ndim == 3:
        mask = attn_mask if attn_mask is None or attn_mask.ndim < 3 else attn_mask.unsqueeze(1)
        q, k, v = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        return torch_attention(q, k, v, mask, is_causal, scale, drop=drop).squeeze(1)
    mask, bias = attn_mask, None
    if attn_mask is not None and attn_mask.dtype != torch.bool:  # added to the scores
        mask = attn_mask > -torch.inf
        bias = torch.where(mask, attn_mask, 0)
    if is_causal:
        triangle = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = triangle if mask is None else mask & triangle
    return attention(query, key, value, mask=mask, bias=bias, scale=scale, drop=drop, method="explicit")


@assume_constant_result
def _beyond_first_derivatives() -> bool:
    """True in forward mode, and in a gradient inside a gradient (of torch.func)."""
    transforms = [level.key() for level in torch._C._functorch.get_interpreter_stack() or []]
    return forward_ad._current_level >= 0 or transforms.count(TransformType.Grad) > 1


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    for what, x in (("q", q), ("k", k), ("v", v)):
        check_tensor("attention", x, what)
    shapes = tuple(tuple(x.shape) for x in (q, k, v))
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention: q, k and v must be (batch, heads, time, depth), found {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"attention: q, k and v of shapes {shapes} do not fit each other")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads do not divide into {k.shape[1]} key-value heads")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"attention: the mask must be boolean, True where a query may look, found {mask.dtype}")
    scores = (*q.shape[:3], k.shape[2])
    for what, added in (("mask", mask), ("bias", bias)):
        shape = () if added is None else tuple(added.shape)
        if len(shape) > 4 or any(m not in (1, n) for m, n in zip(shape[::-1], scores[::-1], strict=False)):
            raise ValueError(f"attention: a {what} of shape {shape} does not broadcast to {scores}")


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, bias: Tensor | None, scale: float
) -> Tensor:
    # torch aligns its causal mask at the start, so where lengths differ the mask is explicit.
    if causal and (mask is not None or bias is not None or q.shape[2] != k.shape[2]):
        triangle = causal_mask(q.shape[2], k.shape[2], q.device)
        mask, causal = (triangle if mask is None else mask & triangle), False
    if bias is not None:  # torch adds a mask of numbers to the scores; a row of -inf gives zeros
        mask = bias.to(q.dtype) if mask is None else torch.where(mask, bias.to(q.dtype), -torch.inf)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    bias: Tensor | None,
    drop: Callable[[Tensor], Tensor] | None,
    scale: float,
) -> Tensor:
    batch, heads, queries, depth = q.shape
    shared, keys = k.shape[1], k.shape[2]
    # The query heads of a group are consecutive in time, so that no key or value is copied.
    grouped = q.reshape(batch, shared, heads // shared * queries, depth)  # (batch, shared, group * queries, depth)
    scores = (grouped * scale) @ k.transpose(-2, -1)  # Q Kᵀ / sqrt(d), (batch, shared, group * queries, keys)
    scores = scores.reshape(batch, heads, queries, keys)  # (batch, heads, queries, keys)
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    all_see = mask is None and queries <= keys  # at least one key each
    if causal:
        triangle = causal_mask(queries, keys, q.device)  # (queries, keys)
        mask = triangle if mask is None else mask & triangle
    if mask is not None:
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    half = scores.dtype in (torch.float16, torch.bfloat16)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32 if half else None).to(v.dtype)
    weights = weights if drop is None else drop(weights)
    weights = weights.reshape(batch, shared, heads // shared * queries, keys)  # (batch, shared, group * queries, keys)
    out = (weights @ v).reshape(batch, heads, queries, v.shape[-1])  # (batch, heads, queries, depth of v)
    # A row of equal scores would give the mean of all values, masked ones included.
    return out if mask is None or all_see else torch.where(mask.any(-1, keepdim=True), out, 0)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, time, heads * depth) -> (batch, heads, time, depth)."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)  # (batch, heads, time, depth)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, time, depth) -> (batch, time, heads * depth)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)  # (batch, time, heads * depth)


def self_attention_spec(
    width: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    depth: int | None = None,
    bias: bool = True,
    proj_bias: bool | None = None,
    init: initializers.Initializer | None = None,
    proj_init: initializers.Initializer | None = None,
) -> dict:
    """Spec of self-attention: `qkv` (queries, keys and values in one matrix) and `proj`.

    Args:
        depth: size of a head. Default: width / heads.
        bias, proj_bias: biases of `qkv`, and of `proj` where it differs.
    """
    if depth is None and width % heads:
        raise ValueError(f"attention: width {width} is not divisible by {heads} heads")
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise ValueError(f"attention: {heads} query heads do not divide into {kv_heads} key-value heads")
    depth, proj_bias = width // heads if depth is None else depth, bias if proj_bias is None else proj_bias
    init = initializers.xavier_uniform() if init is None else init
    shared = heads if kv_heads is None else kv_heads
    parts = (depth * heads, depth * shared, depth * shared)
    return {
        "proj": linear_spec(depth * heads, width, bias=proj_bias, init=proj_init or init, axes=("embed", "heads")),
        "qkv": linear_spec(width, sum(parts), bias=bias, init=init, axes=("heads", "embed"), parts=parts),
    }


def queries_keys_values(p: dict, x: Tensor, heads: int, kv_heads: int | None = None) -> list[Tensor]:
    """q (batch, heads, time, depth); k and v (batch, key-value heads, time, depth) of self-attention. x: (batch, time,
    width).

    Raises:
        ValueError: numbers of heads that do not fit the matrices of `self_attention_spec`.
    """
    check_arguments("self_attention", p, x)
    shared, ways = heads if kv_heads is None else kv_heads, ways_of(p["qkv"]["weight"])
    if heads % ways or shared % ways:
        raise ValueError(f"attention: {heads} heads and {shared} key-value heads do not divide over {ways} processes")
    heads, shared = heads // ways, shared // ways
    (rows, width), columns = p["qkv"]["weight"].shape, p["proj"]["weight"].shape[1]  # heads * depth columns
    depth = columns // heads
    if x.ndim != 3 or x.shape[-1] != width or columns % heads or rows != (heads + 2 * shared) * depth:
        raise ValueError(
            f"attention: x of shape {tuple(x.shape)}, {heads} heads and {shared} key-value heads do not fit a qkv "
            f"matrix of {rows} rows"
        )
    qkv = linear(p["qkv"], x)  # (batch, time, (heads + 2 shared) * depth)
    parts = qkv.split([heads * depth, shared * depth, shared * depth], dim=-1)
    return [split_heads(part, n) for part, n in zip(parts, (heads, shared, shared), strict=True)]


def self_attention(
    p: dict,
    x: Tensor,
    heads: int,
    *,
    kv_heads: int | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    drop: Callable[[Tensor], Tensor] | None = None,
    method: str = "auto",
) -> Tensor:
    """Multi-head self-attention. x: (batch, time, width) -> (batch, time, width)."""
    q, k, v = queries_keys_values(p, x, heads, kv_heads)
    drop = own_heads(drop, p)
    y = attention(q, k, v, mask=mask, causal=causal, drop=drop, method=method)  # (batch, heads, time, depth)
    return linear(p["proj"], merge_heads(y))  # (batch, time, width)


def cross_attention_spec(
    width: int, heads: int, *, bias: bool = True, init: initializers.Initializer | None = None
) -> dict:
    """Spec of attention from one sequence to another: `q`, `kv` and `proj`.

    By default q, k and v are initialised as the rows of one matrix, as in `self_attention_spec` and
    torch.nn.MultiheadAttention: Xavier's bound of sqrt(6 / (width + 3 width)).
    """
    if width % heads:
        raise ValueError(f"attention: width {width} is not divisible by {heads} heads")
    of_q = initializers.xavier_uniform(math.sqrt(2 / 4)) if init is None else init
    of_kv = initializers.xavier_uniform(math.sqrt(3 / 4)) if init is None else init
    init = initializers.xavier_uniform() if init is None else init
    return {
        "kv": linear_spec(width, 2 * width, bias=bias, init=of_kv, axes=("heads", "embed")),
        "proj": linear_spec(width, width, bias=bias, init=init, axes=("embed", "heads")),
        "q": linear_spec(width, width, bias=bias, init=of_q, axes=("heads", "embed")),
    }


class Cache(NamedTuple):
    """Keys and values of the positions so far, (batch, key-value heads, positions, depth); later ones hold zeros."""

    keys: Tensor
    values: Tensor


def cross_keys_values(p: dict, memory: Tensor, heads: int) -> Cache:
    """The keys and values of memory (batch, memory time, width), to compute them once for many calls."""
    kv = linear(p["kv"], memory)  # (batch, memory time, 2 width)
    return Cache(*(split_heads(part, heads) for part in kv.chunk(2, dim=-1)))  # (batch, heads, memory time, depth)


def cross_attention(
    p: dict,
    x: Tensor,
    memory: Tensor | Cache,
    heads: int,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
    scale: float | None = None,
    method: str = "auto",
) -> Tensor:
    """Multi-head attention of x (batch, time, width) to memory -> shape of x.

    Args:
        memory: (batch, memory time, width), or its `cross_keys_values`. It may have fewer rows than x: then equal
            numbers of consecutive rows of x share each (the beams of a sentence), and mask and drop have its batch.
        mask, bias, drop, scale, method: as in `attention`.

    Raises:
        ValueError: the number of rows of x is not a multiple of that of memory.
    """
    check_arguments("cross_attention", p, x)
    k, v = memory if isinstance(memory, Cache) else cross_keys_values(p, memory, heads)
    q = linear(p["q"], x)  # (batch, time, width)
    if x.shape[0] != k.shape[0]:
        if not k.shape[0] or x.shape[0] % k.shape[0]:
            raise ValueError(f"attention: {x.shape[0]} rows do not divide by the {k.shape[0]} of memory")
        # The rows that share a memory become consecutive queries.
        q = q.reshape(k.shape[0], -1, q.shape[-1])  # (memory batch, beams * time, width)
    y = attention(split_heads(q, heads), k, v, mask=mask, bias=bias, drop=drop, scale=scale, method=method)
    return linear(p["proj"], merge_heads(y)).reshape(x.shape)  # (batch, time, width)


def empty_cache(
    batch: int, heads: int, positions: int, depth: int, dtype: torch.dtype = torch.float32, device=None
) -> Cache:
    """A cache with room for `positions` tokens per example."""
    shape = (batch, heads, positions, depth)
    return Cache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


def extend_cache(cache: Cache, k: Tensor, v: Tensor, position: Tensor, *, donate: bool = False) -> tuple[Cache, Tensor]:
    """The cache with new keys and values, and who sees whom in it: (batch, 1, time, positions), causal.

    Args:
        k, v: (batch, key-value heads, time, depth), those of the new tokens.
        position, donate: as in `cached_self_attention`.

    Raises:
        ValueError: a cache of another shape or dtype than the new keys, or one with less room than there are tokens.
    """
    room = cache.keys.shape
    if (*room[:2], *room[3:]) != (*k.shape[:2], *k.shape[3:]) or room[2] < k.shape[2] or cache.keys.dtype != k.dtype:
        kind = f"of shape {tuple(room)} and {cache.keys.dtype}"
        raise ValueError(f"attention: a cache {kind} does not take keys {tuple(k.shape)} and {k.dtype}")
    positions = position[:, None] + torch.arange(k.shape[2], device=k.device)  # (batch, time)
    rows = torch.arange(k.shape[0], device=k.device)[:, None]  # (batch, 1)
    updated = []
    for old, new in ((cache.keys, k), (cache.values, v)):
        by_position = old.transpose(1, 2)  # (batch, room, heads, depth)
        write = by_position.index_put_ if donate else by_position.index_put
        updated.append(write((rows, positions), new.transpose(1, 2)).transpose(1, 2))  # (batch, heads, room, depth)
    visible = torch.arange(room[2], device=k.device) <= positions[:, :, None]  # (batch, time, room)
    return Cache(*updated), visible[:, None]


def cached_self_attention(
    p: dict,
    x: Tensor,
    cache: Cache,
    position: Tensor,
    heads: int,
    *,
    kv_heads: int | None = None,
    method: str = "auto",
    donate: bool = False,
) -> tuple[Tensor, Cache]:
    """Causal self-attention of the next tokens to all tokens so far.

    Args:
        x: (batch, time, width), the new tokens.
        position: (batch,) integer, the position of each example's first new token. It may differ between examples:
            keys left after the end of a shorter prompt are overwritten before any query may look at them.
            `position + time` must stay within the cache; its values are not checked, as that would wait for the device.
        method: as in `attention`.
        donate: the cache's own buffers may be overwritten; it must not be used again. Otherwise they are copied.

    Returns:
        (batch, time, width) and the cache with the new keys and values in it.

    Raises:
        ValueError: a cache of another shape or dtype than the new keys, or one with less room than x has tokens.
    """
    q, k, v = queries_keys_values(p, x, heads, kv_heads)
    cache, visible = extend_cache(cache, k, v, position, donate=donate)
    y = attention(q, cache.keys, cache.values, mask=visible, method=method)  # (batch, heads, time, depth)
    return linear(p["proj"], merge_heads(y)), cache
