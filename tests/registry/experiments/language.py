"""Rows of the experiments with texts."""

from pathlib import Path

from tests.registry.experiments.experiment import Experiment
from train.data.translation import dates


def text(folder: Path) -> None:
    lines = (f"The {n} quick brown foxes jump over {n * n} lazy dogs, and café owners laugh.\n" for n in range(40))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")


def pairs(folder: Path) -> None:
    """Parallel files in pairs/; tables with one empty side and of other languages; files of unlike length."""
    (folder / "pairs").mkdir()
    for part, sentences in zip(("train", "val", "test"), dates.pairs(120, 12, 10), strict=True):
        for language, lines in zip(("de", "en"), zip(*sentences, strict=True), strict=True):
            (folder / "pairs" / f"{part}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "empty.tsv").write_text("de\ten\n" + "Haus\t\n" * 300, encoding="utf-8")
    (folder / "french.tsv").write_text("fr\ten\n" + "maison\thouse\n" * 300, encoding="utf-8")
    (folder / "a.de").write_text("eins\nzwei\n", encoding="utf-8")
    (folder / "b.en").write_text("one\n", encoding="utf-8")


ROWS = [
    Experiment(
        "gpt",
        ("--text", "text.txt", "--batch", "2", "--steps", "20", "--eval-every", "4", "--save-every", "8"),
        20,
        pictures=("loss.png",),
        files=("sample.txt", "tokenizer.json"),
        inputs=text,
        baseline="unigram_entropy",
        refusals=(
            (("--text", "nowhere.txt"), "nowhere.txt does not exist"),
            (("--batch", "3", "--micro-batches", "2"), "--batch 3 does not divide into --micro-batches 2"),
            (("--text", "text.txt", "--preset", "gpt2"), "a context of 1024"),
        ),
        commands=(
            (("sample", "--max-new-tokens", "5", "--count", "2"), ()),
            (("sample", "--max-new-tokens", "5", "--checkpoint", "best"), ()),
            (("evaluate", "--text", "text.txt"), ()),
        ),
    ),
    Experiment(
        "char_rnn",
        ("--text", "text.txt", "--batch", "2", "--window", "16", "--width", "16", "--steps", "20")
        + ("--eval-every", "4", "--save-every", "8", "--dropout", "0.1"),
        20,
        pictures=("loss.png", "cells.png"),
        files=("cells.html", "sample.txt", "tokenizer.json"),
        inputs=text,
        baseline="unigram_entropy",
        refusals=(
            (("--text", "nowhere.txt"), "nowhere.txt does not exist"),
            (("--text", "text.txt", "--window", "2000"), "expected at least"),
            (("--text", "text.txt", "--tokenizer", "words", "--vocabulary", "3"), "a vocabulary of 3 is too small"),
            (("--text", "text.txt", "--cutoffs", "5", "3"), "expected cutoffs that rise from 1 to"),
            (("--resume", "--name", "a", "--batch", "4"), "with --batch 4: it was started with 2"),
        ),
        commands=(
            (("sample", "--max-new-tokens", "5", "--count", "2"), ()),
            (("sample", "--max-new-tokens", "5", "--checkpoint", "best"), ()),
            (("evaluate", "--text", "text.txt"), ()),
        ),
    ),
    Experiment(
        "generate",
        ("--text", "text.txt", "--batch", "2", "--layers", "2", "--width", "32", "--draft-width", "32")
        + ("--context", "32", "--steps", "20", "--save-every", "8", "--ahead", "1", "3", "--rounds", "1"),
        20,
        pictures=("speed.png",),
        files=("sample.txt", "tokenizer.json"),
        inputs=text,
        baseline="unigram_entropy",
        refusals=(
            (("--text", "nowhere.txt"), "nowhere.txt does not exist"),
            (("--width", "48"), "--width is 48; expected a multiple of 32"),
            (("--draft-width", "40"), "--draft-width is 40; expected a multiple of 32"),
            (("--ahead", "130"), "--ahead is [130]; expected numbers of tokens that fit --context 128"),
            (("--text", "text.txt", "--context", "1000"), "a context of 1000 needs more"),
        ),
        commands=(
            (("sample", "--max-new-tokens", "5", "--count", "2", "--min-p", "0.1"), ()),
            (("sample", "--max-new-tokens", "5", "--draft", "runs/generate/a", "--ahead", "2"), ()),
        ),
    ),
    Experiment(
        "noise_scale",
        ("--text", "text.txt", "--batch", "4", "--steps", "12", "--save-every", "6"),
        12,
        pictures=("noise_scale.png",),
        inputs=text,
        refusals=(
            (("--batch", "12"), "--batch is 12; expected a power of two from 4 on"),
            (("--batch", "4", "--micro-batches", "3"), "--batch 4 does not divide into --micro-batches 3"),
            (("--text", "nowhere"), "nowhere does not exist"),
            (("--preset", "nanogns", "--text", "text.txt", "--batch", "0"), "--batch is 0; expected at least 1"),
        ),
    ),
    Experiment(
        "translate",
        ("--data", "pairs", "--vocabulary", "300", "--tokens", "300", "--steps", "12", "--save-every", "6")
        + ("--eval-every", "6"),
        12,
        pictures=("loss.png", "attention/encoder.png", "attention/decoder.png", "attention/cross.png"),
        files=("samples.txt", "tokenizer.json"),
        inputs=pairs,
        baseline="copy_bleu",
        refusals=(
            (("--preset", "huge"), "--preset"),
            (("--tokenizer", "letters"), "--tokenizer"),
            (("--data", "nowhere"), "'nowhere' does not exist"),
            (("--data", "pairs", "--target", "fr"), "no pair of languages de-fr; there are de, en"),
            (("--source", "en", "--target", "en"), "source and target are both en"),
            (("--data", "a.de,b.en"), "a.de has 2 sentences and b.en has 1 sentences; expected as many"),
            (("--data", "empty.tsv"), "there is not one pair of sentences, as all of column 2 of empty.tsv is empty"),
            (("--data", "french.tsv"), "french.tsv: no pair of languages de-en; there are fr, en"),
            (("--data", "pairs", "--vocabulary", "100"), "a vocabulary of 100 is too small: expected at least 260"),
            (("--dropout", "1"), "--dropout is 1.0; expected a number in [0, 1)"),
            (("--resume", "--name", "a", "--preset", "base"), "with --preset base: it was started with tiny"),
        ),
        commands=(
            (("translate", "Der Bus", "--beam", "2", "--n-best", "2"), ()),
            (("translate", "Der Bus", "--beam", "2", "--n-best", "2", "--checkpoint", "6"), ()),
            (("evaluate", "--beam", "1"), ()),
        ),
    ),
    Experiment(
        "seq2seq",
        ("--data", "pairs", "--vocabulary", "300", "--tokens", "300", "--steps", "12", "--save-every", "6")
        + ("--eval-every", "6", "--dropout", "0.2", "--teacher-forcing", "0.5"),
        12,
        pictures=("loss.png", "attention/cross.png"),
        files=("samples.txt", "tokenizer.json"),
        inputs=pairs,
        baseline="copy_bleu",
        refusals=(
            (("--kind", "rnn"), "--kind"),
            (("--scores", "luong"), "--scores"),
            (("--input-feeding",), "input_feeding needs attention dot or general"),
            (("--data", "nowhere"), "'nowhere' does not exist"),
            (("--teacher-forcing", "1.5"), "--teacher-forcing is 1.5; expected a number in [0, 1]"),
            (("--data", "pairs", "--vocabulary", "100"), "a vocabulary of 100 is too small: expected at least 260"),
            (("--resume", "--name", "a", "--scores", "dot"), "with --scores dot: it was started with bahdanau"),
        ),
        commands=(
            (("translate", "Der Bus", "--beam", "2", "--n-best", "2"), ()),
            (("translate", "Der Bus", "--temperature", "1", "--checkpoint", "6"), ()),
            (("evaluate", "--beam", "1"), ()),
        ),
    ),
    Experiment(
        "playground",
        ("--lengths", "16", "32", "--rounds", "1", "--steps", "20", "--save-every", "10"),
        20,
        pictures=tuple(
            f"{name}.png"
            for name in ("positions", "masks", "smoothed_targets", "learning_rate", "attention_maps", "cost")
        ),
        baseline="copied_letters_right",
        refusals=(
            (("--run", "nowhere"), "'nowhere' is not the folder of a run"),
            (("--run", "runs/playground/a", "Der Bus"), "is a run of playground.py, expected one of translate.py"),
            (("Der Bus",), "'Der Bus' is for a translator; name its run with --run"),
            (("--lengths",), "--lengths is empty; expected at least one length"),
            (("--resume", "--name", "a", "--steps", "3"), "--steps is 3, but 'runs/playground/a' has done 20"),
        ),
    ),
]
