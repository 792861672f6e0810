"""WordPiece, byte pairs and unigram pieces: three tokenizers learned from one text, inspected and compared.

Byte pairs merge the most frequent pair of neighbours, again and again (Sennrich et al. 2016, arXiv:1508.07909);
WordPiece (Devlin et al. 2019, arXiv:1810.04805) takes the longest known pieces of a word; unigram pieces (Kudo 2018,
arXiv:1804.10959) have probabilities. Each is learned from nine tenths of the text, by the `tokenizers` library, and
measured on the rest, blocks from all over it. Without --text, the text is the language reference of Python:

    python experiments/compare_tokenizers.py                               about 20 seconds on 2 CPU cores
    python experiments/compare_tokenizers.py --text FILE --sentence "Any words." --vocabulary 8000

It leaves the tokenizers (byte_pairs.json also for gpt.py --tokenizer), and pictures: how words are merged, the pieces
of a sentence, tokens per word by the size of the vocabulary.
Expected, with 4000 tokens each: 1.66 tokens per word with WordPiece, 1.84 with byte pairs, which alone keep line breaks
and indentation, 1.54 with unigram pieces; 7.06 with characters.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import plots
from train.data.text import subwords, tokenizers
from train.data.text.sentencepiece import SPACE
from train.data.text.text import embedded_text, open_text
from train.data.text.tokenizers import BytePairTokenizer
from train.data.understood import understood
from train.run import Count, command_line
from train.run.logs import RunLog
from train.run.run import check_name, new_folder

RUNS = Path("runs/compare_tokenizers")
BLOCK = 2000  # characters, of which every tenth block is held out
SENTENCE = "The interpreter's tokenizer understands naïve identifiers, e.g. 'reinitialisation_2'."
PAIRS = "byte pairs"
KINDS: dict[str, Callable[[list[str], int], BytePairTokenizer]] = {
    "WordPiece": subwords.train_word_piece,
    PAIRS: tokenizers.train_byte_pairs,
    "unigram": subwords.train_unigram,
}


@dataclass(frozen=True)
class Args:
    text: Path | None = None
    """Text file, folder of them, or a text by its name (shakespeare, wikitext-2); the embedded text if None."""
    sentence: str = SENTENCE
    """Sentence whose tokens are shown."""
    words: tuple[str, ...] = ()
    """Words whose merges are drawn; long words of the text, from frequent to rare, if empty."""
    vocabulary: Count = 4000
    """Size of the vocabularies that are inspected."""
    sizes: tuple[Count, ...] = (500, 1000, 2000, 4000, 8000)
    """Other sizes, for the curves."""
    name: str | None = None
    """Folder under runs/compare_tokenizers; the date and time if None."""


def parts_of(text: str) -> tuple[list[str], str]:
    """(lines to learn from, held-out text): every tenth block of about 2000 characters, cut at white space."""
    blocks = re.findall(rf"[\s\S]{{{BLOCK}}}\S{{0,100}}|[\s\S]+", text)
    held_out = "".join(blocks[9::10])
    lines = [line for i, block in enumerate(blocks) if i % 10 != 9 for line in block.splitlines(keepends=True)]
    return lines, held_out


def measure(tokenizer: BytePairTokenizer, text: str) -> dict[str, float]:
    """Figures of a tokenizer on a text; words are what white space separates."""
    ids, words = tokenizer.encode(text), len(text.split())
    unknown = [tokenizer.token_id(token) for token in ("[UNK]", "<unk>")]
    return {
        "tokens_per_word": len(ids) / max(words, 1),
        "characters_per_token": len(text) / max(len(ids), 1),
        "unknown": sum(i in unknown for i in ids) / max(len(ids), 1),
        "vocabulary_used": len(set(ids)) / tokenizer.vocabulary_size,
    }


def label(token: str, byte_level: bool) -> str:
    """A token as a reader sees it: spaces as ␣, the bytes of byte pairs as characters where they are some."""
    if byte_level:
        token = bytes(tokenizers.BYTES[letter] for letter in token).decode(errors="backslashreplace")
    return token.replace(" ", "␣").replace(SPACE, "␣").replace("\n", "\\n")


def longest(kind: str, tokenizer: BytePairTokenizer, text: str, most: int = 8) -> list[str]:
    """The longest tokens that a text uses, the longest first."""
    tokens = {label(tokenizer.tokenizer.id_to_token(i), kind == PAIRS) for i in set(tokenizer.encode(text))}
    return sorted((t for t in tokens if re.search(r"\w", t)), key=lambda t: (-len(t.lstrip("#␣")), t))[:most]


def some_words(text: str, count: int = 4) -> list[str]:
    """Words of 8 to 14 letters, from the most frequent to one that occurs once."""
    counts = Counter(re.findall(r"\b[^\W\d_]{8,14}\b", text))
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    return [ordered[round((len(ordered) - 1) * i**2 / (count - 1) ** 2)] for i in range(count)] if ordered else []


def draw_merges(path: Path, tokenizer: BytePairTokenizer, words: list[str]) -> None:
    """A tree per word: letters below, each merge where it comes in the order of learning, its number beside it."""
    with plots.panels(path, (len(words) + 1) // 2, min(2, len(words)), 6.4, 3.6) as axes:
        for panel, word in zip(axes, words, strict=False):
            letters, merges = subwords.merges(tokenizer, f" {word}")
            heights = {(i, i + 1): (float(i), 0.35) for i in range(len(letters))}
            for step, merge in enumerate(merges, 1):
                children = [heights[merge.first, merge.middle], heights[merge.middle, merge.last]]
                centre = sum(x for x, _ in children) / 2
                for x, y in children:
                    panel.plot([x, x, centre], [y, step, step], color=plots.COLOURS[0], lw=1.2, zorder=1)
                text = label("".join(letters[merge.first : merge.last]), True) + f"\n{merge.rank + 1}"
                box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": plots.COLOURS[0], "lw": 0.8}
                panel.text(centre, step, text, ha="center", va="center", fontsize=8, bbox=box, color=plots.INK)
                heights[merge.first, merge.last] = (centre, float(step))
            for i, letter in enumerate(letters):
                panel.text(i, 0, label(letter, True), ha="center", va="center", fontsize=11, color=plots.INK)
            tops = len(letters) - len(merges)
            panel.set_title(f"{word}: {tops} token{'s' * (tops > 1)}", color=plots.INK, fontsize=11)
            panel.set(xlim=(-0.7, len(letters) - 0.3), ylim=(-0.7, max(len(merges), 1) + 0.9), xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            panel.grid(False)
        for panel in axes[len(words) :]:
            panel.set_axis_off()


def draw_pieces(path: Path, rows: dict[str, list[tuple]], sentence: str) -> None:
    """The sentence, a row per tokenizer, each token a box over its characters; colours change from word to word."""
    with plots.panels(path, 1, 1, min(0.16 * len(sentence) + 2, 40), 0.55 * len(rows) + 1.2) as (panel,):
        for y, pieces in enumerate(rows.values()):
            for _, _, (first, last), word in pieces:
                colour = plots.COLOURS[(word or 0) % 3]
                panel.barh(-y - 1, last - first, 0.7, first, color=colour, alpha=0.35, ec=colour, lw=1.0)
        for i, letter in enumerate(sentence):
            panel.text(i + 0.5, 0, letter, ha="center", va="center", family="monospace", fontsize=9, color=plots.INK)
            for y in range(len(rows)):
                panel.text(i + 0.5, -y - 1, letter, ha="center", va="center", family="monospace", fontsize=8)
        panel.set_yticks([-y - 1 for y in range(len(rows))], [f"{name}: {len(p)}" for name, p in rows.items()])
        panel.set(xlim=(0, max(len(sentence), 1)), ylim=(-len(rows) - 0.6, 0.7), xticks=[])
        panel.spines[:].set_visible(False)
        panel.grid(False)


def draw_sizes(path: Path, curves: dict[str, dict[int, dict[str, float]]]) -> None:
    with plots.panels(path, 1, 3, 4.6, 4.0) as axes:
        figures = {
            "tokens_per_word": "tokens per word",
            "characters_per_token": "characters per token",
            "vocabulary_used": "share of the vocabulary in held-out text",
        }
        for panel, (figure, name) in zip(axes, figures.items(), strict=True):
            lines = {kind: (list(by), [row[figure] for row in by.values()]) for kind, by in curves.items()}
            plots.curves(panel, lines, "size of the vocabulary", "", name)
            panel.set_xscale("log")
            sizes = list(next(iter(curves.values())))
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
            panel.minorticks_off()


def show(kind: str, pieces: list[tuple]) -> None:
    """Print the tokens of the sentence with their characters and the numbers of their words."""
    print(f"\n{kind}, {len(pieces)} tokens: token, its characters, the number of its word")
    cells = [
        f"{label(token, kind == PAIRS)} {first}-{last} {'-' if word is None else word}"
        for token, _, (first, last), word in pieces
    ]
    for i in range(0, len(cells), 6):
        print("  " + "".join(f"{cell:<24}" for cell in cells[i : i + 6]).rstrip())


def read(args: Args) -> tuple[str, str]:
    """(text, its name)."""
    if args.text is None:
        return embedded_text(), "embedded: the language reference of Python"
    data: Any = open_text(args.text, None, RUNS / "tokens")
    return data.tokenizer.decode(data.tokens), data.name


def main(args: Args) -> None:
    check_name(RUNS, args.name)
    start, (text, name) = time.perf_counter(), read(args)
    lines, held_out = parts_of(text)
    if not held_out.strip():
        raise ValueError(
            f"--text has {len(text):,} characters; expected at least {10 * BLOCK:,}, of which some are held out"
        )
    sizes = sorted({*args.sizes, args.vocabulary})
    least = 257  # the bytes and the end of a text
    if sizes[0] < least:
        raise ValueError(
            f"--sizes and --vocabulary expect at least {least} tokens, room for the bytes; found {sizes[0]}"
        )
    if not args.sentence.strip():
        raise ValueError("--sentence is empty; expected some words")
    words = list(args.words) or some_words(text)
    if wrong := [word for word in words if not re.fullmatch(r"[^\W\d_]+", word)]:
        raise ValueError(f"--words: '{wrong[0]}' is no word of letters alone")
    facts = {"text": name, "characters": len(text), "held out": len(held_out), "words": len(text.split())}
    understood(print, facts | {"vocabularies": list(map(str, sizes)), "merges drawn of": words})

    folder = new_folder(RUNS, args.name)
    curves: dict[str, dict[int, dict[str, float]]] = {kind: {} for kind in KINDS}
    inspected: dict[str, BytePairTokenizer] = {}
    config = {"experiment": RUNS.name, "args": args}
    with RunLog(folder, config, total=len(KINDS) * len(sizes), unit="tokenizers") as log:
        log.print(f"run in {folder}")
        done = 0
        for kind, train in KINDS.items():
            for size in sizes:
                began = time.perf_counter()
                tokenizer = train(lines, size)
                seconds, done = time.perf_counter() - began, done + 1
                curves[kind][size] = measure(tokenizer, held_out) | {"seconds": seconds}
                log.metrics(done, {"vocabulary": size} | {f"{kind}/{k}": v for k, v in curves[kind][size].items()})
                log.progress(done, 1, size=size)
                if size == args.vocabulary:
                    inspected[kind] = tokenizer
                    tokenizer.save(folder / f"{kind.replace(' ', '_').lower()}.json")
        rows = {kind: subwords.inspect(tokenizer, args.sentence) for kind, tokenizer in inspected.items()}
        if words:
            draw_merges(folder / "merges.png", inspected[PAIRS], words)
        draw_pieces(folder / "pieces.png", rows, args.sentence)
        draw_sizes(folder / "sizes.png", curves)
        characters = len(held_out) / max(len(held_out.split()), 1)
        tops = {kind: longest(kind, tokenizer, held_out) for kind, tokenizer in inspected.items()}
        figures = {kind: by[args.vocabulary] for kind, by in curves.items()}
        log.result(
            {
                "characters_per_word": characters,  # tokens per word of a tokenizer of characters
                "figures": figures,
                "longest": tops,
                "sentence": {
                    kind: [label(piece[0], kind == PAIRS) for piece in pieces] for kind, pieces in rows.items()
                },
                "sizes": {kind: {str(size): row for size, row in by.items()} for kind, by in curves.items()},
                "seconds": time.perf_counter() - start,
            }
        )
    for kind, pieces in rows.items():
        show(kind, pieces)
        print(f"  longest in held-out text: {', '.join(tops[kind])}")
    print(f"\n{args.vocabulary:,} tokens, on held-out text; a tokenizer of characters has {characters:.2f} per word")
    for kind, row in figures.items():
        words, characters = (
            f"{row['tokens_per_word']:.2f} per word",
            f"{row['characters_per_token']:.2f} characters each",
        )
        used, unknown = f"{row['vocabulary_used']:.0%} of them used", f"{row['unknown']:.2%} unknown"
        print(f"  {kind:<10} {words}, {characters}, {used}, {unknown}; learned in {row['seconds']:.1f} s")
    print(f"{time.perf_counter() - start:.0f} s; files in {folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, main))
