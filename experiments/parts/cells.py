"""Cells of a recurrent language model along a text: the cell that goes with each of a few features.

Karpathy et al. 2015, "Visualizing and understanding recurrent networks" (arXiv:1506.02078), section 4.2, looked for
such cells by hand. Here the cell is the one whose value correlates most with the feature.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from core import tree
from core.tree import Tree
from nets.language import rnn
from train.data.text.tokenizers import CharTokenizer
from train.plots import coloured_text
from train.plots.coloured_text import Passage

MOST = 40_000
"""Tokens that are looked at."""
SHOWN, ON_PAGE = 320, 1500
"""Letters of a passage in the picture, and on the page."""


def features(text: str) -> dict[str, Tensor]:
    """Features of each character of a text, by what they are about: name -> (characters,) float.

    Quotes and brackets end with the paragraph at the latest: a text may leave them open.
    """
    values: dict[str, list[float]] = {name: [] for name in ("quotes", "brackets", "line", "indentation", "word", "end")}
    quoted, depth, column, indentation, word, only_spaces = False, 0, 0, 0, 0, True
    for i, letter in enumerate(text):
        following = text[i + 1] if i + 1 < len(text) else " "
        if letter in '"“”„«»':
            quoted = not quoted
        depth = max(0, depth + (letter in "([{（") - (letter in ")]}）"))
        if letter == "\n":
            column, indentation, only_spaces = 0, 0, True
            quoted, depth = (False, 0) if following == "\n" else (quoted, depth)
        else:
            column, only_spaces = column + 1, only_spaces and letter == " "
            indentation += only_spaces
        word = word + 1 if letter.isalnum() else 0
        row = (quoted, depth > 0, column, indentation, word, word > 0 and not following.isalnum())
        for name, value in zip(values, row, strict=True):
            values[name].append(float(value))
    titles = (
        "inside quotes", "inside brackets", "position in the line", "indentation of the line", "position in the word",
        "last letter of a word",
    )  # fmt: skip
    return {title: torch.tensor(column) for title, column in zip(titles, values.values(), strict=True)}


def pieces_of(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token, with the spaces that belong to it."""
    if isinstance(tokenizer, CharTokenizer):
        return [tokenizer.chars[i] for i in ids]
    before = tokenizer.decode([ids[0]])  # a decoder may drop the space before the first word
    return [tokenizer.decode([ids[0], i]).removeprefix(before) for i in ids]


@torch.no_grad()
def cells_along(params: Tree, cfg: rnn.Config, ids: Tensor) -> Tensor:
    """The cells of all layers after each token, from -1 to 1: ids (time,) -> (time, layers width).

    tanh(c) of an LSTM, of other nets the hidden states.
    """
    _, states = rnn.features(params, ids[None], cfg, every_step=True)
    return torch.cat([torch.tanh(state["c"]) if "c" in state else state["h"] for state in states], -1)[0].float()


def correlations(cells: Tensor, feature: Tensor) -> Tensor:
    """Pearson's correlation of each cell with the feature: (time, cells), (time,) -> (cells,); 0 of constants."""
    x, y = cells - cells.mean(0), feature - feature.mean()
    return (y @ x) / (x.norm(dim=0) * y.norm()).clamp(min=1e-12)


def draw(folder: Path, params: Tree, cfg: rnn.Config, tokenizer, tokens) -> list[str]:
    """Write cells.png and cells.html, and return a line for each feature.

    The cell is found on the first half of `tokens`, its correlation is that on the second half, which is drawn; the
    strongest comes first. A cell that falls where the feature rises is turned over. A feature that the text does not
    have is left out.
    """
    device = tree.leaves(params)[0].device
    ids = tokens[torch.arange(min(MOST, len(tokens)))].long().to(device)
    pieces, half = pieces_of(tokenizer, ids.tolist()), len(ids) // 2
    cells = cells_along(params, cfg, ids).cpu()  # (time, cells)
    last = torch.tensor([len(piece) for piece in pieces]).cumsum(0) - 1  # (time,): of each token's last character
    rows = []
    for name, of_characters in features("".join(pieces)).items():
        feature = of_characters[last.clamp(min=0)]  # (time,)
        of_first, of_second = (correlations(cells[part], feature[part]) for part in (slice(half), slice(half, None)))
        if of_first.any() and of_second.any():
            best = int(of_first.abs().argmax())
            sign = of_first[best].sign()
            rows.append((float(sign * of_second[best]), name, best, feature, sign))
    lines, small, large = [], [], []
    for correlation, name, best, feature, sign in sorted(rows, key=lambda row: -row[0]):
        cell = f"cell {best % cfg.width} of layer {best // cfg.width + 1}{' turned over' if sign < 0 else ''}"
        lines.append(f"{name}: {cell}, correlation {correlation:.2f}")
        for passages, letters in ((small, SHOWN), (large, ON_PAGE)):
            part = _passage(pieces, feature, half, letters)
            passages.append(Passage(lines[-1], pieces[part], sign * cells[part, best]))
    if lines:
        coloured_text.picture(folder / "cells.png", small)
        coloured_text.page(folder / "cells.html", large, "Cells of a recurrent net along a text")
    return lines


def _passage(pieces: list[str], feature: Tensor, first: int, letters: int) -> slice:
    """Tokens from `first` on, whole lines of up to `letters` letters where the feature varies most."""
    ends = torch.tensor([0] + [len(piece) for piece in pieces[first:]]).cumsum(0)  # (tokens + 1,)
    text = "".join(pieces[first:])
    best, most = slice(first, None), -1.0
    for line in re.finditer(r"(?<=\n)[^\n]", text[: max(0, len(text) - letters)]):
        stop = text.rfind("\n", line.start(), line.start() + letters)
        stop = len(text[:stop].rstrip()) if stop > line.start() + letters // 2 else line.start() + letters
        a, b = (int(torch.searchsorted(ends, at)) for at in (line.start(), stop))
        spread = float(feature[first + a : first + b].std(correction=0)) if b > a else -1.0
        if spread > most:
            best, most = slice(first + a, first + b), spread
    return best
