"""Threefry-2x32 with 20 rounds: a keyed hash of a counter (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
2, 3"), in plain tensor operations, and in numpy's for small eager draws. `core.random` draws from it.

Words are int32 tensors, the two's complement view of unsigned ones: compiled on a CPU, that is faster than masked
int64, and every device has int32 arithmetic.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Rotation distances and the parity constant of Threefry-2x32 and its key schedule (Salmon et al. 2011, table 2).
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA

# Eager hashing on a CPU makes about 150 passes over memory: in chunks that stay in the cache it is 10 times as fast. A
# compiled draw is one pass.
_CHUNK = 2**18
# Of so few words numpy makes a hash in a third to a half of torch's time; of more, torch gives each of its threads a
# part.
_SMALL = 2**16


def check_key(key: Tensor) -> None:
    """Raise TypeError or ValueError unless this is a key or an array of keys."""
    if not isinstance(key, Tensor):
        seed = key if isinstance(key, int) else "seed"
        raise TypeError(f"a key must be a tensor, as core.random.key({seed}) is, got {type(key).__name__}")
    if key.dtype != torch.int32 or key.dim() == 0 or key.shape[-1] != 2:
        raise ValueError(f"a key must be int32 of shape (2,) or (..., 2), got {key.dtype} of shape {tuple(key.shape)}")


def check_shape(shape: Sequence[int]) -> None:
    """Raise TypeError or ValueError unless this is a sequence of sizes."""
    if isinstance(shape, (int, float)) or not hasattr(shape, "__iter__"):
        raise TypeError(f"a shape must be a sequence of integers, such as (3,), got {shape}")
    for size in shape:
        if isinstance(size, (float, tuple, list)):
            raise TypeError(f"a shape must be a sequence of integers, such as (3,), got {tuple(shape)}")
        if size < 0:
            raise ValueError(f"a shape must not have negative sizes, got {tuple(shape)}")


def draw(key: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Two random words per element: int32, each key.shape[:-1] + shape."""
    check_key(key)
    check_shape(shape)
    size, words = math.prod(shape), _words(key)
    if size <= _CHUNK or key.device.type != "cpu" or torch.compiler.is_compiling():
        hashes: Sequence[Tensor] = threefry2x32(*words, *_counters(0, size, key.device))  # each (..., size)
    else:
        starts = range(0, size, _CHUNK)
        chunks = [threefry2x32(*words, *_counters(i, min(i + _CHUNK, size), key.device)) for i in starts]
        hashes = [torch.cat(column, -1) for column in zip(*chunks, strict=True)]  # each (..., size)
    first, second = [word.reshape(key.shape[:-1] + tuple(shape)) for word in hashes]
    return first, second


def threefry2x32(key0: Tensor, key1: Tensor, counter0: int | Tensor, counter1: int | Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20 of the counter (counter0, counter1), in wrapping int32 arithmetic."""
    if _is_small_and_plain(key0, key1, counter0, counter1):
        return _by_numpy(key0, key1, counter0, counter1)
    schedule = (key0, key1, key0 ^ key1 ^ _PARITY)
    x0, x1 = key0 + counter0, key1 + counter1
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            # int32 shifts right with its sign: the mask clears the copies of the sign.
            wrapped = torch.bitwise_right_shift(x1, 32 - distance) & (2**distance - 1)
            x1 = (torch.bitwise_left_shift(x1, distance) | wrapped) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + (schedule[(group + 2) % 3] + (group + 1))
    return x0, x1


def _is_small_and_plain(*words: int | Tensor) -> bool:
    """True for few words on a CPU, outside of transforms, modes and tracers, to which a draw by numpy is a constant."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return False
    tensors = [word for word in words if not isinstance(word, int)]
    if any(type(word) is not Tensor or word.device.type != "cpu" for word in tensors):
        return False
    wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(word) for word in tensors)
    return not wrapped and max(word.numel() for word in tensors) <= _SMALL


def _by_numpy(key0: Tensor, key1: Tensor, counter0: int | Tensor, counter1: int | Tensor) -> tuple[Tensor, Tensor]:
    """The same hash. What an operation costs besides its arithmetic is a tenth of torch's, and numpy works in place."""
    # Unsigned words shift right without a sign; of dimension 1 or more, as numpy warns of scalars that wrap.
    words = [np.asarray(word, dtype=np.int32).view(np.uint32) for word in (key0, key1, counter0, counter1)]
    shape = np.broadcast(*words).shape
    k0, k1, c0, c1 = (word if word.ndim else word.reshape(1) for word in words)
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = (np.array(np.broadcast_to(x, shape or 1)) for x in (k0 + c0, k1 + c1))
    wrapped = np.empty_like(x1)
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 += x1
            np.right_shift(x1, 32 - distance, out=wrapped)
            x1 <<= distance
            x1 |= wrapped
            x1 ^= x0
        x0 += schedule[(group + 1) % 3]
        x1 += schedule[(group + 2) % 3] + (group + 1)
    first, second = (torch.from_numpy(x.view(np.int32)).reshape(shape) for x in (x0, x1))
    return first, second


def _words(key: Tensor) -> tuple[Tensor, Tensor]:
    """The two words of each key, to broadcast with a row of counters."""
    first, second = key.unbind(-1)  # each (...)
    return (first.unsqueeze(-1), second.unsqueeze(-1)) if key.dim() > 1 else (first, second)  # each (..., 1), or ()


def _counters(start: int, stop: int, device: torch.device) -> tuple[int | Tensor, Tensor]:
    """The high and low words of start, start + 1 ... stop - 1; the high word is 0 where 31 bits suffice."""
    if stop <= 2**31:
        return 0, torch.arange(start, stop, dtype=torch.int32, device=device)
    index = torch.arange(start, stop, dtype=torch.int64, device=device)
    return torch.bitwise_right_shift(index, 32).to(torch.int32), index.to(torch.int32)
