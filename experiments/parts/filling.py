"""Masked tokens and spans filled in by a net of `experiments/pretrain.py`, printed and as pictures; its attention."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from core.attention import attention, queries_keys_values
from experiments.parts import encoder as encoders
from experiments.parts import writer
from experiments.parts.encoder import Encoder
from experiments.parts.translator import draw_maps
from experiments.parts.writer import Sampling, Writer
from train.data.text import masking
from train.data.text.subwords import SENTINELS
from train.files import replacing, shown
from train.plots import coloured_text
from train.plots.coloured_text import Passage

MASK = "[MASK]"
"""A missing word, or span, in a text."""
SHOWN = 4
"""Passages, layers and heads that are drawn."""


class Filled(NamedTuple):
    """A text with its masks filled in; for each mask the likeliest (piece, probability), best first; of a span, without
    a probability."""

    text: str
    choices: list[list[tuple[str, float | None]]]


def piece(tokenizer: Any, token: int) -> str:
    """The text of a token, with a space before it where a word begins."""
    name = tokenizer.tokenizer.id_to_token(token) or ""
    if name.startswith("##"):
        return name[2:]
    if re.search("[Ġ▁]", name):
        return name.replace("Ġ", " ").replace("▁", " ")
    return (
        name if "Ġthe" in tokenizer.tokenizer.get_vocab() or "▁the" in tokenizer.tokenizer.get_vocab() else f" {name}"
    )


def fill(net: Encoder | Writer, text: str, top: int) -> Filled:
    """The text with the likeliest words, and the `top` likeliest ones of each mask.

    Raises ValueError: there is no mask, more of them than the net sees, or no Unicode text.
    """
    text.encode()  # of a lone surrogate
    return fill_masks(net, text, top) if isinstance(net, Encoder) else fill_spans(net, text)


@torch.no_grad()
def fill_masks(net: Encoder, text: str, top: int) -> Filled:
    """Words for each [MASK] of a text, special tokens excepted.

    Raises ValueError: no mask in it, or not all within the net's context.
    """
    marks = masking.marks_of(net.tokenizer)
    own = net.tokenizer.tokenizer.id_to_token(marks.mask)
    whole = text.replace(MASK, own)
    (encoding,) = encoders.encodings(net, [whole], net.cfg.context)
    tokens = torch.tensor([encoding.ids], device=tree.leaves(net.params)[0].device)
    positions = (tokens[0] == marks.mask).nonzero()[:, 0]
    if not whole.count(own):
        raise ValueError(f"'{shown(text)}' has no {own}")
    if len(positions) < whole.count(own):
        raise ValueError(f"'{shown(text[:60])}' has masks beyond the {net.cfg.context} tokens that the net sees")
    hidden = net.net.features(net.params, tokens, net.cfg)[0, positions]  # (masks, width)
    logits = net.net.token_logits(net.params, hidden, net.cfg).float().cpu()
    logits[:, marks.special] = -torch.inf
    best = logits.softmax(-1).topk(min(top, len(marks.ordinary)))
    choices = [
        [(piece(net.tokenizer, i), p) for i, p in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return Filled(_inserted(whole, own, [row[0][0] for row in choices]), choices)


def _inserted(text: str, mark: str, pieces: Sequence[str]) -> str:
    """The text with a piece in place of each mark; one that goes on a word has no space before it."""
    first, *rest = text.split(mark)
    for new, after in zip(pieces, rest, strict=True):
        word = new.startswith(" ") or not first
        first = (first + new.strip() if word else first.rstrip() + new) + after
    return first


def fill_spans(net: Writer, text: str) -> Filled:
    """The likeliest span for each [MASK], or sentinel, of a text. Raises ValueError: there is none."""
    numbers = iter(range(len(text)))
    whole = re.sub(re.escape(MASK), lambda _: f"<extra_id_{next(numbers)}>", text)
    names = re.findall(r"<extra_id_\d+>", whole)
    if not names:
        raise ValueError(f"'{shown(text)}' has no {MASK} or <extra_id_0>")
    ids = [net.tokenizer.token_id(name) for name in names]
    if None in ids:
        raise ValueError(f"'{shown(text[:60])}' has {len(names)} masks; the net has no {names[ids.index(None)]}")
    flags = Sampling(max_new_tokens=16 * len(names), temperature=0.0)
    (row,) = writer.write(net, writer.ids_of(net, whole), flags).rows
    spans = {token: net.tokenizer.decode(_after(row, token, {*ids, *net.ends})) for token in ids}
    for name, token in zip(names, ids, strict=True):
        whole = whole.replace(name, spans[token].strip(), 1)
    return Filled(whole, [[(spans[token], None)] for token in ids])


def _after(row: list[int], sentinel: int, ends: set[int]) -> list[int]:
    """Tokens after a sentinel, up to the next one or the end."""
    if sentinel not in row:
        return []
    rest = row[row.index(sentinel) + 1 :]
    return rest[: next((i for i, token in enumerate(rest) if token in ends), len(rest))]


# Pictures.


def passages(net: Encoder | Writer, batch: Any) -> list[Passage]:
    """Texts of a batch with what the net puts in: blue where it is right, orange with the truth where it is not."""
    one = of_masks if isinstance(net, Encoder) else of_spans
    return [one(net, batch, i) for i in range(0, len(batch[0]), -(-len(batch[0]) // SHOWN))]  # from all of the batch


def of_masks(net: Encoder, batch: masking.Masked, i: int) -> Passage:
    """One example of a batch."""
    device, marks = tree.leaves(net.params)[0].device, masking.marks_of(net.tokenizer)
    tokens, guesses = batch.tokens[i], {}
    with torch.no_grad():
        hidden = net.net.features(net.params, tokens[None].to(device), net.cfg)[0, batch.positions[i].to(device)]
        best = net.net.token_logits(net.params, hidden, net.cfg).argmax(-1).cpu()
    for position, guess, truth, counted in zip(
        batch.positions[i], best, batch.targets[i], batch.counted[i], strict=True
    ):
        if counted:
            guesses[int(position)] = int(guess), int(truth)
    pieces, values = [], []
    for position, token in enumerate(tokens.tolist()):
        if position in guesses:
            guess, truth = guesses[position]
            wrong = "" if guess == truth else f" ({piece(net.tokenizer, truth).strip()})"
            pieces.append(piece(net.tokenizer, guess) + wrong)
            values.append(0.9 if wrong else -0.9)
        elif token not in marks.special.tolist():
            pieces.append(piece(net.tokenizer, token))
            values.append(0.0)
    right = sum(guess == truth for guess, truth in guesses.values())
    return Passage(f"{right} of {len(guesses)} tokens right", pieces, values)


def of_spans(net: Writer, batch: tuple[Tensor, Tensor], i: int) -> Passage:
    """One example of a batch, its spans as the net writes them."""
    inputs, targets = (part[i].tolist() for part in batch)
    sentinel = net.tokenizer.token_id("<extra_id_0>")
    marks = {token for token in inputs if sentinel - SENTINELS < token <= sentinel} | set(net.ends)
    flags = Sampling(max_new_tokens=len(targets), temperature=0.0)
    (row,) = writer.write(net, inputs, flags).rows
    pieces, values, right = [], [], 0
    for token in inputs:
        if token in net.ends:
            continue
        if token not in marks:
            pieces.append(piece(net.tokenizer, token))
            values.append(0.0)
            continue
        guess, truth = (_after(tokens, token, marks) for tokens in (row, targets))
        texts = ["".join(piece(net.tokenizer, part) for part in tokens) for tokens in (guess, truth)]
        pieces.append(texts[0] + ("" if guess == truth else f" ({texts[1].strip()})"))
        values.append(-0.9 if guess == truth else 0.9)
        right += guess == truth
    return Passage(f"{right} of {len(marks) - 1} spans right", pieces, values)


def draw_filled(folder: Path, parts: list[Passage]) -> None:
    """filled.png, and filled.txt with the truth in brackets where the net is wrong."""
    coloured_text.picture(folder / "filled.png", parts)
    with replacing(folder / "filled.txt") as path:
        lines = (f"{part.title}\n{''.join(part.pieces).strip()}\n" for part in parts)
        path.write_text("\n".join(lines), encoding="utf-8")


@torch.no_grad()
def attention_maps(net: Encoder, tokens: Tensor) -> Tensor:
    """Attention weights (batch, layers, heads, time, time) of an encoder; each row sums to 1."""
    mask, maps = tokens != net.cfg.padding_id, []
    states = net.net.hidden_states(net.params, tokens, net.cfg, mask=mask)
    for p, x in zip(net.params["blocks"], states, strict=False):
        q, k, _ = queries_keys_values(p["attn"], x, net.cfg.heads)
        each = torch.eye(tokens.shape[1], dtype=x.dtype, device=x.device).expand(*k.shape[:2], -1, -1)
        maps.append(attention(q, k, each, mask=mask[:, None, None, :], method="explicit"))  # weights times 1
    return torch.stack(maps, 1)


def draw_attention(path: Path, net: Encoder, tokens: Tensor) -> None:
    """The first layers and heads on one text (time,)."""
    weights = attention_maps(net, tokens[None].to(tree.leaves(net.params)[0].device))[:, :SHOWN, :SHOWN].cpu()
    names = [piece(net.tokenizer, token).strip() for token in tokens.tolist()]
    draw_maps(path, weights, names, names)
