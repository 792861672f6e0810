"""Printing of the facts that a script starts from: its data, weights and settings, as it understood them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.files import shown

MOST = 8
"""Items of a list or table that are printed; the rest are counted."""


def understood(write: Callable[[str], None], facts: Mapping[str, Any]) -> None:
    """Write one line per fact, name and value in two columns.

    `facts` functions give these: `text.facts`, `images.sets.facts`, `images.pairs.facts`, `translation.sets.facts`; a
    script adds its own (weights, sizes), or joins several with `|`.

    Args:
        write: called with each line: `print`, or `run.log.print`.
        facts: numbers, text, tables {name: value}, and lists, of items or of (item, reason) pairs. None, and an empty
            text, list or table, has no line.
    """
    lines = {name: line_of(value) for name, value in facts.items()}
    lines = {name: line for name, line in lines.items() if line}
    width = max(map(len, lines), default=0)
    for name, line in lines.items():
        write(f"{name:<{width}}  {line}")


def line_of(value: Any) -> str:
    """A value on one line, of a long list or table only the first items.

    1234567 -> "1,234,567"; {"a": 3} -> "1: a (3)"; [("x.png", "is empty")] -> "1: x.png is empty".
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return _listed([f"{shown(str(name))} ({line_of(item)})" for name, item in value.items()], ", ")
    if isinstance(value, Sequence) and not isinstance(value, str):
        together = "; " if any(isinstance(item, tuple) for item in value) else ", "
        return _listed([" ".join(map(str, i)) if isinstance(i, tuple) else str(i) for i in value], together)
    return shown(str(value))


def _listed(items: list[str], separator: str) -> str:
    if not items:
        return ""
    rest = f" and {len(items) - MOST:,} more" if len(items) > MOST else ""
    return f"{len(items):,}: {separator.join(shown(item) for item in items[:MOST])}{rest}"
