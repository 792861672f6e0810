"""A net of `experiments/qa.py`, which answers questions by passages of a context: answers, figures, pictures.

The score of the passage from token i to token j is start_i + end_j, for i <= j < i + 30 in the context alone; the
answer is the best of all windows of the context. "No answer" scores start_0 + end_0, at [CLS], the least over the
windows (Devlin et al. 2019, arXiv:1810.04805, sections 4.2 and 4.3).
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Encoder, Trainable
from train import plots
from train.data import batching
from train.data.text import ragged
from train.data.text.ragged import Bucket
from train.data.text.squad import Answered, Question
from train.files import shown, write_json
from train.losses import cross_entropy
from train.metrics import answers as metrics
from train.plots import coloured_text
from train.plots.bars import grouped_bars
from train.run import SavedRun

TOKENS = 30
"""Tokens of an answer, at most."""
CANDIDATES = 20
"""Best passages of a window that are looked at; probabilities are among those of all windows."""


class Answerer(NamedTuple):
    """An encoder with the head "spans"; `longest` and `stride` are those of its windows, and with `refuses` it may say
    that there is no answer."""

    encoder: Encoder
    longest: int
    stride: int
    refuses: bool


class Window(NamedTuple):
    """The tokens from `first` on of question number `question` are of the context, `spots` their characters in it."""

    question: int
    first: int
    spots: tuple[tuple[int, int], ...]

    @property
    def last(self) -> int:
        return self.first + len(self.spots)


class Examples(NamedTuple):
    """tokens, types (windows, time); lengths, first and last + 1 token of the context, labels of start and end
    (windows,)."""

    tokens: Tensor
    types: Tensor
    lengths: Tensor
    first: Tensor
    last: Tensor
    start: Tensor
    end: Tensor


class Answer(NamedTuple):
    """A passage of the context, from its character `start` up to `end`; "" for no answer."""

    text: str
    start: int
    end: int
    score: float
    probability: float


def load(run: SavedRun, device: torch.device | str = "cpu") -> Answerer:
    """The net of a run, at its checkpoint."""
    args = run.config["args"]
    encoder = encoders.of_finetuned(run, device)
    return Answerer(encoder, args["tuning"]["longest"], args["stride"], run.config["refuses"])


# Windows.


def check_stride(longest: int, stride: int) -> None:
    """Raise ValueError: too few tokens; a context beside a question of half of them would not move on by the stride."""
    if longest < 16:
        raise ValueError(f"--longest is {longest}; expected at least 16, for a question and its context")
    most = longest - longest // 2 - 5
    if stride > most:
        raise ValueError(f"--stride is {stride}; expected up to {most} for windows of --longest {longest} tokens")


def windows(
    encoder: Encoder, questions: Sequence[Question], longest: int, stride: int
) -> tuple[list[Any], list[Window]]:
    """(the library's encoding of each window, the windows): all of each context, `stride` tokens in two neighbours.

    Of a question longer than half a window only the beginning is read.
    """
    asked = encoders.encodings(encoder, [question.question for question in questions], longest // 2)
    cut = [q.question[: max(last for _, last in e.offsets)] for q, e in zip(questions, asked, strict=True)]
    pairs = [(text, question.context) for text, question in zip(cut, questions, strict=True)]
    encodings, out = [], []
    for i, whole in enumerate(encoders.encodings(encoder, pairs, longest, stride=stride, strategy="only_second")):
        for encoding in (whole, *whole.overflowing):
            inside = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
            first = inside[0] if inside else len(encoding.ids)
            encodings.append(encoding)
            out.append(Window(i, first, tuple(encoding.offsets[place] for place in inside)))
    return encodings, out


def label(window: Window, question: Question) -> tuple[int, int]:
    """First and last token of the first answer that lies in the window as a whole; of none 0, where [CLS] is."""
    for text, start in question.answers:
        end = start + len(text)
        inside = [i for i, (a, b) in enumerate(window.spots, window.first) if a < end and b > start]
        if inside and window.spots[0][0] <= start and end <= window.spots[-1][1]:
            return inside[0], inside[-1]
    return 0, 0


def encoded(
    encoder: Encoder, questions: Sequence[Question], longest: int, stride: int
) -> tuple[Examples, list[Window]]:
    encodings, spots = windows(encoder, questions, longest, stride)
    tokens, lengths = ragged.padded([encoding.ids for encoding in encodings], encoder.cfg.padding_id)
    types, _ = ragged.padded([encoding.type_ids for encoding in encodings], 0)
    labels = [label(window, questions[window.question]) for window in spots]
    columns = [[window.first for window in spots], [window.last for window in spots], *zip(*labels, strict=True)]
    return Examples(tokens, types, lengths, *(torch.tensor(column, dtype=torch.int64) for column in columns)), spots


def unheld(data: Examples, spots: Sequence[Window], questions: Sequence[Question]) -> list[int]:
    """Numbers of the questions whose answer lies in no window as a whole, or has no token.

    To learn from them would be to learn that they have no answer.
    """
    held = {window.question for window, start in zip(spots, data.start.tolist(), strict=True) if start}
    return [i for i, question in enumerate(questions) if question.answers and i not in held]


def batch_at(data: Examples, buckets: Sequence[Bucket], key: Tensor, step: int, batch: int) -> Examples:
    """The batch of a step, a pure function of key and step, as wide as its bucket."""
    counts = tuple(len(bucket.members) for bucket in buckets)
    number, positions = batching.bucket_batch(key, step, counts, (batch,) * len(buckets))
    return narrow(data, buckets[number].members[positions], buckets[number].width)


def narrow(data: Examples, rows: Tensor, width: int) -> Examples:
    out = Examples(*(x[rows] for x in data))
    return out._replace(tokens=out.tokens[:, :width].contiguous(), types=out.types[:, :width].contiguous())


def logits(encoder: Encoder, params: tree.Tree, batch: Examples, **options: Any) -> Tensor:
    """(windows, time, 2): logits of start and end, -inf but at the context's tokens and [CLS]."""
    mask = encoders.mask_of(batch.tokens, batch.lengths)
    x = (batch.tokens, batch.types) if encoder.cfg.types > 1 else batch.tokens
    out = encoder.net.apply(params, x, encoder.cfg, mask=mask, **options).float()  # (windows, time, 2)
    place = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    allowed = (place == 0) | ((place >= batch.first[:, None]) & (place < batch.last[:, None]))  # (windows, time)
    return torch.where(allowed[..., None], out, -torch.inf)


def losses(params: tree.Tree, batch: Examples, keys: Tensor, encoder: Encoder, own: Trainable):
    """(windows,): mean cross-entropy of start and end, in nats."""
    out = logits(encoder, own.whole(params), batch, key=keys, train=True)
    start, end = out.unbind(-1)  # each (windows, time)
    hits = (start.argmax(-1) == batch.start) & (end.argmax(-1) == batch.end)
    values = [cross_entropy(x, y, reduction="none") for x, y in ((start, batch.start), (end, batch.end))]
    return (values[0] + values[1]) / 2, {"accuracy": hits.float().mean()}


# Answers.


def scores(start: Tensor, end: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """start_i + end_j of each passage of a context, -inf where it is none or too long.

    Args:
        start, end: (windows, time).
        first, last: (windows,), first and last + 1 token of the context.

    Returns: (windows, time, time).
    """
    place = torch.arange(start.shape[1], device=start.device)
    i, j = place[:, None], place[None, :]
    valid = (i <= j) & (j < i + TOKENS)  # (time, time)
    inside = (place >= first[:, None]) & (place < last[:, None])  # (windows, time)
    allowed = valid & inside[:, :, None] & inside[:, None, :]
    return torch.where(allowed, start[:, :, None] + end[:, None, :], -torch.inf)


@torch.no_grad()
def answer(model: Answerer, questions: Sequence[Question]) -> list[list[Answer]]:
    """The candidates for each question, the best first: passages of all windows, and "" if the net may refuse."""
    if not questions:
        return []
    data, spots = encoded(model.encoder, questions, model.longest, model.stride)
    device = tree.leaves(model.encoder.params)[0].device
    best: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    none = [float("inf")] * len(questions)
    for rows in data.lengths.argsort(stable=True).split(32):
        batch = tree.move(narrow(data, rows, int(data.lengths[rows].max())), device)
        start, end = logits(model.encoder, model.encoder.params, batch).unbind(-1)
        table = scores(start, end, batch.first, batch.last).flatten(1)  # (windows, time * time)
        top = table.topk(min(CANDIDATES, table.shape[1]))
        refusals = (start[:, 0] + end[:, 0]).tolist()
        for number, values, places, refusal in zip(
            rows.tolist(), top.values.tolist(), top.indices.tolist(), refusals, strict=True
        ):
            window, width = spots[number], start.shape[1]
            question = window.question
            none[question] = min(none[question], refusal)
            for value, place in zip(values, places, strict=True):
                if value > -float("inf"):
                    i, j = divmod(place, width)
                    span = window.spots[i - window.first][0], window.spots[j - window.first][1]
                    best[question][span] = max(value, best[question].get(span, value))
    return [_ranked(*row, model.refuses) for row in zip(questions, best, none, strict=True)]


def _ranked(question: Question, spans: dict[tuple[int, int], float], none: float, refuses: bool) -> list[Answer]:
    rows = [(question.context[a:b], a, b, score) for (a, b), score in spans.items()]
    if refuses or not rows:
        rows.append(("", 0, 0, none))
    rows.sort(key=lambda row: (-row[3], row[1], row[2]))
    probabilities = torch.tensor([row[3] for row in rows], dtype=torch.float64).softmax(0).tolist()
    return [Answer(*row, probability) for row, probability in zip(rows, probabilities, strict=True)]


# Figures.


def study(folder: Path, model: Answerer, part: Answered, baseline: Sequence[str] | None = None) -> dict[str, Any]:
    """Figures of `train.metrics.answers`, also by kind of question; writes f1_by_kind.png, answers.png, answers.html,
    scores.png and predictions.json, {id: answer}.

    Args:
        baseline: answers of another method, to stand beside the net's in the picture.
    """
    candidates = answer(model, part.questions)
    texts, gold = [rows[0].text for rows in candidates], [question.gold for question in part.questions]
    figures: dict[str, Any] = metrics.figures(texts, gold)
    if part.impossible:
        refused = [not text for text, right in zip(texts, gold, strict=True) if not right]
        figures["no_answer_recall"] = sum(refused) / len(refused)
    series = {"net": texts} | ({"most overlapping sentence": baseline} if baseline else {})
    table = {name: by_kind(part, rows) for name, rows in series.items()}
    figures["f1_by_kind"] = {name.rpartition(" (")[0]: value for name, value in table["net"].items()}
    grouped_bars(folder / "f1_by_kind.png", table, "F1 of words", "F1 by kind of question (number of questions)")
    short = sorted(range(len(texts)), key=lambda i: len(part.questions[i].context) > 1000)
    passages = [passage_of(part.questions[i], candidates[i]) for i in short[:100]]
    coloured_text.picture(folder / "answers.png", passages[:8])
    coloured_text.page(folder / "answers.html", passages, "Answers of the test questions")
    draw_scores(folder / "scores.png", model, part.questions[short[0]])
    write_json(folder / "predictions.json", {q.id: text for q, text in zip(part.questions, texts, strict=True)})
    return figures


def by_kind(part: Answered, texts: Sequence[str]) -> dict[str, float]:
    """{"kind (number)": mean F1}, the most frequent kinds first."""
    counts = Counter(question.kind for question in part.questions)
    totals = Counter[str]()
    for question, text in zip(part.questions, texts, strict=True):
        totals[question.kind] += metrics.f1(text, question.gold)
    return {f"{kind} ({count})": totals[kind] / count for kind, count in counts.most_common(12)}


def passage_of(question: Question, candidates: Sequence[Answer]) -> coloured_text.Passage:
    """The context, each word in the strength of the probability that it is in the answer."""
    spans = [match.span() for match in re.finditer(r"\s+|\S+", question.context)]
    values = [sum(c.probability for c in candidates if c.start < b and c.end > a) for a, b in spans]
    best, gold = candidates[0], " | ".join(dict.fromkeys(question.gold)) or "no answer"
    title = (
        f"{shown(question.question)}  {shown(best.text) or 'no answer'} ({best.probability:.0%}); right: {shown(gold)}"
    )
    return coloured_text.Passage(title, [question.context[a:b] for a, b in spans], torch.tensor(values).clamp(0, 1))


@torch.no_grad()
def draw_scores(path: Path, model: Answerer, question: Question, around: int = 12) -> None:
    """The scores of the passages near the best one: rows are first tokens, columns last ones."""
    data, spots = encoded(model.encoder, [question], model.longest, model.stride)
    batch = tree.move(data, tree.leaves(model.encoder.params)[0].device)
    start, end = logits(model.encoder, model.encoder.params, batch).unbind(-1)
    table = scores(start, end, batch.first, batch.last).cpu()  # (windows, time, time)
    number, i, _ = (int(n) for n in torch.unravel_index(table.argmax(), table.shape))
    window = spots[number]
    first, last = max(window.first, i - around), min(window.last, i + around)
    names = [shown(question.context[a:b]) for a, b in window.spots[first - window.first : last - window.first]]
    cells = table[number, first:last, first:last]
    cells = torch.where(cells.isfinite(), cells, torch.nan)
    plots.matrix(path, cells, names, names, "last token", "first token", shown(question.question), numbers=False)
