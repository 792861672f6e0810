"""Figures of captions beside those without a net, and pictures: right and wrong, and where each word looks."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core import tree
from experiments.parts import captioner as parts
from experiments.parts.translator import GREEDY, Decoder
from nets.multimodal import captioner
from train.data.images import captions
from train.data.text.tokenizers import SentenceTokenizer
from train.files import replacing, shown, write_json
from train.metrics import translation
from train.plots import captions as pictures
from train.plots import figures

SHOWN = 12
"""Pictures of a sheet."""
MISTAKES = 4
"""Wrong captions that follow the first ones on the sheet."""
DRAWN = 3
"""Pictures whose attention is drawn."""
WORDS = 23
"""Tokens whose attention is drawn; later ones are left out."""
RIGHT, WRONG = figures.COLOURS[2], figures.COLOURS[1]


def commonest(train: parts.Pictures) -> str:
    return Counter(text for several in train.captions for text in several).most_common(1)[0][0]


def nearest(images: Tensor, train: parts.Pictures, side: int = 16) -> list[str]:
    """The first caption of the training picture that is nearest in pixels, averaged to `side` per axis."""

    def small(images: Tensor) -> Tensor:
        rows = [F.adaptive_avg_pool2d(part.float(), side).flatten(1) for part in images.split(256)]
        return torch.cat(rows)  # (count, 3 side side)

    others = small(train.images)
    rows = torch.cat([torch.cdist(part, others).argmin(1) for part in small(images).split(256)])
    return [train.captions[i][0] for i in rows.tolist()]


def baselines(test: parts.Pictures, train: parts.Pictures, language: str) -> dict[str, float]:
    """Figures of two captions without a net: the commonest one, and that of the nearest training picture."""
    texts = {"commonest": [commonest(train)] * len(test.images), "nearest": nearest(test.images, train)}
    out = {}
    for name, own in texts.items():
        values = translation.caption_scores(own, test.captions, language)
        out |= {f"{name}_exact_match": values["exact_match"], f"{name}_bleu": values["bleu"]}
    return out


SUMMARY = """\
{exact_match:.2%} of {pictures} captions word for word (the commonest: {commonest_exact_match:.2%}, that of the \
nearest picture: {nearest_exact_match:.2%}), BLEU {bleu:.2f} ({commonest_bleu:.2f}, {nearest_bleu:.2f})
BLEU|{bleu_signature}"""


def study(
    folder: Path, model: parts.Captioner, data: parts.Data, language: str, decoder: Decoder = GREEDY
) -> dict[str, Any]:
    """Figures of the captions of the test part; writes captions.png, attention_1.png ... and mistakes.txt."""
    test = data.test
    best = parts.write(model, test.images, decoder)
    texts = [one.text for one in best]
    out = translation.caption_scores(texts, test.captions, language) | baselines(test, data.train, language)
    lines = ["picture\tcaptions\twritten"]
    for name, own, text in zip(test.names, test.captions, texts, strict=True):
        if text not in own:
            lines.append(f"{name}\t{' | '.join(map(shown, own))}\t{shown(text)}")
    with replacing(folder / "mistakes.txt") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    wrong = [i for i, text in enumerate(texts) if text not in test.captions[i]]
    first = range(min(SHOWN - len(wrong[:MISTAKES]), len(texts)))
    rows = [*first, *[i for i in wrong if i not in first][:MISTAKES]]
    below = [_compared(texts[i], test.captions[i]) for i in rows]
    title = "Captions of the first pictures, and the first mistakes (orange, above the truth)"
    pictures.captioned(folder / "captions.png", test.images[rows].numpy(), below, title=title)
    for i in range(min(DRAWN, len(texts))):
        attention(folder / f"attention_{i + 1}.png", model, test.images[i], best[i].ids)
    return {**out, "pictures": len(texts)}


def _compared(text: str, own: Sequence[str]) -> list[tuple[str, str]]:
    return [(text, RIGHT)] if text in own else [(text or "no word", WRONG), (own[0], figures.INK)]


@torch.no_grad()
def attention(path: Path, model: parts.Captioner, image: Tensor, ids: list[int]) -> None:
    """Where each token of a caption looks, by the last layer of the decoder, mean over the heads; the class token, on
    which some of the attention may lie, is left out."""
    params, cfg, tokenizer, marks = model
    tokens = torch.tensor([[marks.start, *ids][: cfg.context]])
    maps = captioner.attention_maps(tree.move(params, "cpu"), (parts.normalised(image[None]), tokens), cfg)
    side = cfg.image // cfg.patch
    rows = maps[0, -1].mean(0)[:, 1:].unflatten(1, (side, side))  # (tokens, side, side)
    whole = isinstance(tokenizer, SentenceTokenizer)
    own = tokenizer.tokens(ids) if whole else [tokenizer.decode([token]).strip() for token in ids]
    names = [*own, "(end)"][: min(len(rows), WORDS)]
    pictures.words(path, image.numpy(), rows[: len(names)].numpy(), names)


def write_predictions(
    folder: Path, model: parts.Captioner, paths: Sequence[Path], decoder: Decoder, maps: bool
) -> tuple[int, list[tuple]]:
    """A new folder with captions.json, captions.csv and sheets of twelve; with `maps` the attention of each.

    -> (number of pictures, those that cannot be read and why).
    Raises DataError: none can be read.
    """
    images, numbers, skipped = captions.read_pictures(paths, model.cfg.image, whole=True)
    folder.mkdir(parents=True)
    names, best = [shown(paths[i]) for i in numbers.tolist()], parts.write(model, images, decoder)
    for name, one in zip(names, best, strict=True):
        print(f"{name}: {shown(one.text)}")
    records = [{"picture": n, "caption": one.text, "score": one.score} for n, one in zip(names, best, strict=True)]
    write_json(folder / "captions.json", records)
    with replacing(folder / "captions.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, ["picture", "caption", "score"])
        lines.writeheader()
        lines.writerows(records)
    for page, start in enumerate(range(0, len(names), SHOWN), 1):
        below = [[(one.text or "no word", figures.INK)] for one in best[start : start + SHOWN]]
        pictures.captioned(folder / f"captions_{page}.png", images[start : start + SHOWN].numpy(), below)
    for i in range(len(names) if maps else 0):
        attention(folder / f"attention_{i + 1}.png", model, images[i], best[i].ids)
    return len(names), skipped
