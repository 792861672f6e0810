"""Random numbers as pure functions of a key: the bits that `jax.random` gives for the same key.

The generator is Threefry-2x32 (`core.threefry`), a keyed hash of a counter in plain tensor operations. So it works
under vmap, grad and compile and on every device, and element i of a draw depends on the key and on i alone. torch's own
generator is neither read nor advanced.

The integers, and uniform numbers in [0, 1), are JAX's to the bit. Where arithmetic follows (another range, a logarithm)
they agree to its rounding, which JAX itself leaves to the compiler.

A key is an int32 tensor (2,): the two's complement view of JAX's two uint32 words. `bits`, `uniform`, `normal`,
`truncated_normal`, `gumbel`, `bernoulli` and `randint` also take keys (..., 2); they return `key.shape[:-1] + shape`,
each slice as drawn from its own key. The other draws take one key: `torch.vmap` them for more.

Never use one key for two draws: `split` or `fold_in` it first.
"""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from core import threefry
from core.erfinv import erfinv

_INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}

# Bits after the binary point of a float in [1, 2): a uniform draw is one of 2**mantissa equally spaced numbers.
_MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """Key (2,) of a seed.

    As in JAX without 64-bit mode, the low 32 bits of the seed count: seeds that are equal modulo 2**32 give one key.

    Raises:
        TypeError: the seed is not an integer.
        ValueError: the seed does not fit into 64 bits.
    """
    seed = _integer("key: seed", seed)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"key: seed must fit into 64 bits, got {seed}")
    return torch.tensor([0, _signed(seed)], dtype=torch.int32, device=device)


def split(key: Tensor, n: int = 2) -> Tensor:
    """n new keys from one: (..., 2) -> (..., n, 2)."""
    return torch.stack(threefry.draw(key, (n,)), -1)  # (..., n, 2)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key from a key and an integer (a step, an example's index, a site's number).

    Args:
        key: (..., 2).
        data: an int in [0, 2**32) or an integer tensor, of which the low 32 bits count.

    Returns:
        broadcast(key.shape[:-1], data.shape) + (2,)
    """
    threefry.check_key(key)
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
            raise TypeError(f"fold_in: data must be integers, got {data.dtype}")
        low: int | Tensor = data.to(torch.int32)
    else:
        number = _integer("fold_in: data", data)
        if not 0 <= number < 2**32:
            raise ValueError(f"fold_in: data must be in [0, 2**32), got {number}")
        low = _signed(number)
    first, second = key.unbind(-1)
    return torch.stack(torch.broadcast_tensors(*threefry.threefry2x32(first, second, 0, low)), -1)  # (..., 2)


def sites(key: Tensor, n: int) -> Tensor:
    """One key per random site of a net: (n, *key.shape), entry i is `fold_in(key, i)`.

    One vectorised call: a compiled graph with one fold per layer would consist of little else.
    """
    threefry.check_key(key)
    indices = torch.arange(n, dtype=torch.int32, device=key.device)
    return fold_in(key, indices.reshape((n,) + (1,) * (key.dim() - 1)))


def bits(key: Tensor, shape: Sequence[int], width: int = 32) -> Tensor:
    """Random bits as integers of 8, 16, 32 or 64 bits, signed (the two's complement view of JAX's unsigned ones).

    Returns:
        key.shape[:-1] + shape
    """
    if width not in _INTEGERS:
        raise ValueError(f"bits: width must be 8, 16, 32 or 64, got {width}")
    high, low = threefry.draw(key, shape)
    if width == 64:
        return torch.bitwise_left_shift(high.to(torch.int64), 32) | (low.to(torch.int64) & 0xFFFFFFFF)
    return (high ^ low).to(_INTEGERS[width])


def uniform(
    key: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    minval: float | Tensor = 0.0,
    maxval: float | Tensor = 1.0,
) -> Tensor:
    """Uniform in [minval, maxval); differentiable with respect to both.

    Args:
        minval, maxval: numbers, or tensors that broadcast to key.shape[:-1] + shape.

    Returns:
        key.shape[:-1] + shape
    """
    unit = _unit(key, shape, dtype)
    if not isinstance(minval, Tensor) and not isinstance(maxval, Tensor) and minval == 0 and maxval == 1:
        return unit
    minval, maxval = _as(minval, unit), _as(maxval, unit)
    _check_broadcast("uniform", unit.shape, minval.shape, maxval.shape)
    # Rounding can take the sum below minval.
    return torch.maximum(unit * (maxval - minval) + minval, minval)


def normal(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal: sqrt(2) erfinv(u) with u uniform in (-1, 1).

    Single precision is within 3 units in the last place of JAX's; double precision uses `torch.erfinv`.

    Returns:
        key.shape[:-1] + shape
    """
    # The least u is -1 + eps/2, the number next to -1: the sum is exact for every u.
    u = _unit(key, shape, dtype) * 2 - (1 - torch.finfo(dtype).eps / 2)
    return erfinv(u) * math.sqrt(2)


def truncated_normal(
    key: Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal truncated to (lower, upper), by inversion.

    Args:
        lower, upper: numbers, or tensors that broadcast to key.shape[:-1] + shape.

    Returns:
        key.shape[:-1] + shape
    """
    threefry.check_key(key)
    _check_float("truncated_normal", dtype)
    lower, upper = _as(lower, key, dtype), _as(upper, key, dtype)
    u = uniform(key, shape, dtype, torch.erf(lower / math.sqrt(2)), torch.erf(upper / math.sqrt(2)))
    # Far in a tail u rounds to 1, where erfinv is infinite.
    edge = 1 - torch.finfo(dtype).eps / 2
    u = u.clamp(-edge, edge)
    # Rounding must not put a value on a bound or beyond it.
    x = torch.maximum(erfinv(u) * math.sqrt(2), _next(lower.detach(), math.inf))
    return torch.minimum(x, _next(upper.detach(), -math.inf))


def gumbel(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel: -log(-log(u)) with u uniform in (0, 1).

    Returns:
        key.shape[:-1] + shape
    """
    u = _unit(key, shape, dtype).clamp(min=torch.finfo(dtype).tiny)
    return -torch.log(-torch.log(u))


def bernoulli(key: Tensor, p: float | Tensor = 0.5, shape: Sequence[int] | None = None) -> Tensor:
    """Bernoulli: True with probability p.

    Args:
        p: a number, or a floating-point tensor that broadcasts to key.shape[:-1] + shape. The uniform samples are
            drawn in its dtype (single precision for a number).
        shape: by default the shape of p.

    Returns:
        key.shape[:-1] + shape, bool
    """
    threefry.check_key(key)
    dtype = p.dtype if isinstance(p, Tensor) else torch.float32
    _check_float("bernoulli", dtype)
    unit = _unit(key, tuple(p.shape if isinstance(p, Tensor) else ()) if shape is None else shape, dtype)
    p = _as(p, unit)
    _check_broadcast("bernoulli", unit.shape, p.shape)
    return unit < p


def categorical(key: Tensor, logits: Tensor, axis: int = -1, shape: Sequence[int] | None = None) -> Tensor:
    """Categorical samples: indices with probability softmax(logits) along `axis`, by the Gumbel-max trick.

    Args:
        key: (2,).
        logits: unnormalised log probabilities.
        shape: that of the result; it must end in the shape of `logits` without `axis` (1 broadcasts), the default.

    Returns:
        int64
    """
    _check_one_key("categorical", key)
    if not isinstance(logits, Tensor):
        raise TypeError(f"categorical: logits are {type(logits).__name__}; expected a tensor")
    _check_float("categorical", logits.dtype)
    if not -logits.dim() <= axis < logits.dim():
        raise ValueError(f"categorical: logits of shape {tuple(logits.shape)} have no axis {axis}")
    axis = axis - logits.dim() if axis >= 0 else axis
    batch = list(logits.shape)
    classes = batch.pop(axis)
    shape = tuple(batch if shape is None else shape)
    _check_broadcast("categorical", shape, batch)
    # The axis of the classes is that of the logits, counted from the end.
    at = len(shape) + axis + 1
    noise = gumbel(key, (*shape[:at], classes, *shape[at:]), logits.dtype)
    return torch.argmax(noise + logits, axis)  # shape


def randint(
    key: Tensor,
    shape: Sequence[int],
    minval: int | Tensor,
    maxval: int | Tensor,
    dtype: torch.dtype = torch.int32,
) -> Tensor:
    """Integers in [minval, maxval).

    64 random bits modulo the span, so the bias is at most span / 2**64. int64 takes 128 bits, so its values differ from
    those of the narrower types.

    Args:
        minval, maxval: ints, or integer tensors that broadcast to key.shape[:-1] + shape; where a tensor's maxval is
            not above its minval, the result is minval.

    Returns:
        key.shape[:-1] + shape

    Raises:
        ValueError: an empty range, or one that does not fit the dtype (ints only: tensors are clipped).
    """
    threefry.check_key(key)
    threefry.check_shape(shape)
    if dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"randint: dtype must be int8, uint8, int16, int32 or int64, got {dtype}")
    limits = torch.iinfo(dtype)
    for name, value, last in (("minval", minval, limits.max), ("maxval", maxval, limits.max + 1)):
        if not isinstance(value, Tensor) and not limits.min <= value <= last:
            raise ValueError(f"randint: {name} {value} does not fit {dtype}")
    if not isinstance(minval, Tensor) and not isinstance(maxval, Tensor) and minval >= maxval:
        raise ValueError(f"randint: no integers in [{minval}, {maxval})")

    # A maxval of 2**63 does not fit into int64.
    beyond = 0 if isinstance(maxval, Tensor) else int(maxval == 2**63)
    low, high = _as(minval, key, torch.int64), _as(maxval - beyond, key, torch.int64)
    width = 64 if dtype == torch.int64 else 32
    if width == 32:
        low, high = low.clamp(limits.min, limits.max), high.clamp(limits.min, limits.max + 1)
    span = torch.where(high > low, high - low + beyond, 1)

    draws = bits(split(key).movedim(-2, 0), shape, width)  # (2, *key.shape[:-1], *shape)
    first, second = (_remainder(_unsigned(x, width), span, width) for x in draws.unbind(0))
    # 2**width modulo the span, from its square root, which fits.
    carry = _remainder(torch.full_like(span, 2 ** (width // 2)), span, width)
    carry = _remainder(_unsigned(carry * carry, width), span, width)
    total = _remainder(_unsigned(_unsigned(first * carry, width) + second, width), span, width)
    _check_broadcast("randint", draws.shape[1:], low.shape, high.shape)
    return (low + total).to(dtype)


def permutation(key: Tensor, x: int | Tensor) -> Tensor:
    """Random permutation of `x` along its first axis; for an int, of arange(x) (int64).

    Sorts by random bits, often enough to make equal sort keys harmless (3 ln n / ln 2**32 rounds).

    Args:
        key: (2,).
    """
    _check_one_key("permutation", key)
    if isinstance(x, Tensor):
        if x.dim() == 0:
            raise ValueError("permutation: x must be an int or have an axis to permute, got a 0-D tensor")
        return x[permutation(key, x.shape[0])]
    x = _integer("permutation: x", x)
    if x < 0:
        raise ValueError(f"permutation: x must not be negative, got {x}")
    order = torch.arange(x, device=key.device)
    for _ in range(math.ceil(3 * math.log(max(1, x)) / math.log(2**32 - 1))):
        key, subkey = split(key).unbind(-2)
        # Flipping the sign bit gives signed integers the order of unsigned ones.
        order = order[torch.sort(bits(subkey, (x,)) ^ -(2**31), stable=True).indices]
    return order


def _integer(name: str, value: int) -> int:
    try:
        return value if isinstance(value, int) else operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def _signed(word: int) -> int:
    """The low 32 bits of an int as a signed 32-bit number."""
    return (word + 2**31) % 2**32 - 2**31


def _check_one_key(name: str, key: Tensor) -> None:
    threefry.check_key(key)
    if key.dim() != 1:
        raise ValueError(f"{name}: takes one key of shape (2,), got {tuple(key.shape)}; torch.vmap it over keys")


def _check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in _MANTISSA:
        raise ValueError(f"{name}: dtype must be float16, bfloat16, float32 or float64, got {dtype}")


def _check_broadcast(name: str, shape: Sequence[int], *others: Sequence[int]) -> None:
    for other in others:
        tail = tuple(shape)[len(shape) - len(other) :]
        if len(other) > len(shape) or any(a not in (b, 1) for a, b in zip(other, tail, strict=True)):
            raise ValueError(f"{name}: an argument of shape {tuple(other)} does not broadcast to {tuple(shape)}")


def _as(value: float | Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A number as a 0-D tensor, or a tensor, in the dtype of `like`."""
    dtype = like.dtype if dtype is None else dtype
    if isinstance(value, (tuple, list)):
        raise TypeError(f"expected a number or a tensor, got {value}; a shape is another argument")
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=like.device)


def _unit(key: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uniform in [0, 1): m / 2**mantissa, m the leading bits of a draw as wide as the dtype (8 bits for bfloat16)."""
    _check_float("a draw", dtype)
    mantissa = _MANTISSA[dtype]
    if dtype == torch.float64:
        m = torch.bitwise_right_shift(bits(key, shape, 64), 64 - mantissa)
    else:
        high, low = threefry.draw(key, shape)
        width = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 8}[dtype]
        m = torch.bitwise_right_shift(high ^ low, width - mantissa)
    return (m & (2**mantissa - 1)).to(dtype) * 2.0**-mantissa


def _next(x: Tensor, towards: float) -> Tensor:
    """The next floating-point number in that direction."""
    return torch.nextafter(x, torch.full_like(x, towards))


def _unsigned(x: Tensor, width: int) -> Tensor:
    """`width` bits read as an unsigned number, in int64 (which wraps: 64 bits stay as they are)."""
    return x if width == 64 else x.to(torch.int64) & (2**width - 1)


def _remainder(x: Tensor, span: Tensor, width: int) -> Tensor:
    """x modulo span for unsigned numbers held in int64; x itself where span is 0, which stands for 2**width."""
    divisor = torch.where(span == 0, 1, span)
    if width == 32:
        return torch.where(span == 0, x, x % divisor)
    # Unsigned from signed: x = 2 h + b with h >= 0. A span with its top bit set goes into x at most once.
    small = divisor.clamp(min=1)
    half = torch.bitwise_right_shift(x, 1) & (2**63 - 1)
    rest = x - torch.bitwise_left_shift(torch.div(half, small, rounding_mode="floor"), 1) * small
    rest = torch.where((rest < 0) | (rest >= small), rest - small, rest)
    flip = -(2**63)
    once = torch.where((x ^ flip) >= (span ^ flip), x - span, x)
    return torch.where(span == 0, x, torch.where(span < 0, once, rest))
