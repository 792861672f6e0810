"""Generated sequences of brackets, balanced or not: a problem that is all order.

Of a balanced sequence, two different brackets that change places make an unbalanced one: both classes have the same
lengths and the same numbers of each bracket, so that counts of tokens say nothing.
"""

from torch import Tensor

from core import random
from train.data import DataError

PAIRS = ("()", "[]")
CLOSING = dict(PAIRS)
CLASSES = ("unbalanced", "balanced")


def is_balanced(text: str) -> bool:
    """Every bracket closes the last open one of its kind, and none stays open."""
    waiting = []
    for bracket in text:
        if bracket in CLOSING:
            waiting.append(CLOSING[bracket])
        elif not waiting or waiting.pop() != bracket:
            return False
    return not waiting


def brackets(key: Tensor, count: int, shortest: int = 4, longest: int = 40) -> tuple[list[str], list[int]]:
    """(texts, labels): `count` sequences of even lengths from `shortest` to `longest`, every second one balanced.

    Args:
        key: (2,).

    Raises DataError: lengths below 4 (two brackets cannot be unbalanced by changing places and stay the same in
    number) or in the wrong order.
    """
    if not 4 <= shortest <= longest:
        raise DataError(f"brackets: lengths from {shortest} to {longest}; expected at least 4, in order")
    length_key, walk_key, swap_key = random.split(key, 3).unbind(0)
    halves = random.randint(length_key, (count,), -(-shortest // 2), longest // 2 + 1).tolist()
    draws = random.uniform(walk_key, (count, 2, longest)).tolist()
    places = random.randint(swap_key, (count, 64, 2), 0, longest).tolist()
    texts = []
    for i in range(count):
        text = _walk(halves[i], *draws[i])
        texts.append(text if i % 2 else _swapped(text, places[i]))
    return texts, [i % 2 for i in range(count)]


def _walk(half: int, turns: list[float], kinds: list[float]) -> str:
    """A balanced sequence of `half` pairs; each next bracket opens or closes with the probability that makes all
    sequences equally likely (Arnold and Sleep 1980, "Uniform random generation of balanced parenthesis strings")."""
    text, waiting, left = [], [], 2 * half
    for turn, kind in zip(turns, kinds, strict=True):
        if not left:
            break
        depth = len(waiting)
        # P(open) = (depth + 2) (left - depth) / (2 left (depth + 1))
        if turn * 2 * left * (depth + 1) < (depth + 2) * (left - depth):
            opening, closing = PAIRS[int(kind * len(PAIRS))]
            text.append(opening)
            waiting.append(closing)
        else:
            text.append(waiting.pop())
        left -= 1
    return "".join(text)


def _swapped(text: str, places: list[list[int]]) -> str:
    """The sequence with two brackets changed over, so that it is no longer balanced."""
    every = [(i, j) for i in range(len(text)) for j in range(i)] if len(text) <= 6 else []
    for i, j in [*((a % len(text), b % len(text)) for a, b in places), *every]:
        letters = list(text)
        letters[i], letters[j] = letters[j], letters[i]
        if not is_balanced("".join(letters)):
            return "".join(letters)
    return text[::-1]  # ")...(", never balanced
