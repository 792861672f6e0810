"""Rows of the experiments with texts."""

import json
from pathlib import Path

from tests.registry.experiments.experiment import Experiment
from train.data.translation import dates
from train.run.ranks import BY_ROWS


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


def questions(folder: Path) -> None:
    """questions.csv with a bad row; pairs.jsonl with a bad line; lines.txt; tables that are empty or too small."""
    things = ("cat", "dog", "house", "river", "tree", "lamp", "train", "letter")
    rows = [f'what is a {a} {b}?,"a {b}, and it has a {a}: number {i}"' for i, a in enumerate(things) for b in things]
    (folder / "questions.csv").write_text("\n".join(["question,answer", *rows, "no answer", ""]), encoding="utf-8")
    lines = [json.dumps({"source": f"say {i}", "target": f"{i} {i + 1}"}) for i in range(120)]
    (folder / "pairs.jsonl").write_text("\n".join([*lines[:7], "{", *lines[7:]]), encoding="utf-8")
    (folder / "lines.txt").write_text("a cat in a house\n\nthe river\na train\n", encoding="utf-8")
    (folder / "reviews.tsv").write_text("text\tlabel\na cat\tx\na dog\ty\na house\tx\na tree\ty\n", encoding="utf-8")
    (folder / "few.tsv").write_text("one\teins\ntwo\tzwei\n", encoding="utf-8")
    (folder / "empty.csv").write_text("", encoding="utf-8")


QUESTIONS = ("--data", "questions.csv", "--source", "question", "--target", "answer")

ROWS = [
    Experiment(
        "embed",
        (*QUESTIONS, "--layers", "1", "--width", "32", "--vocabulary", "80", "--longest", "16", "--batch", "8")
        + ("--epochs", "1", "--cloze", "1", "--shapes", "2", "--save-every", "4"),
        14,
        pictures=("loss.png", "recall.png", "similarity.png"),
        files=("tokenizer.json", "mistakes.txt"),
        inputs=questions,
        baseline="tfidf_recall_at_1",
        refusals=(
            (("--data", "nowhere"), "'nowhere' does not exist; expected a folder, a TSV, CSV or JSONL"),
            (
                ("--data", "questions.csv", "--source", "title"),
                "no columns 'title' and 'target'; there are question",
            ),
            (("--data", "empty.csv"), "empty.csv: there is not one pair of sentences"),
            (("--data", "few.tsv"), "few.tsv: too few sentences to hold out one in 10"),
            ((*QUESTIONS, "--batch", "500"), "a batch of 500 is more than the"),
            (("--lora", "4"), "--lora adapts weights that have learned something; name them with --weights"),
            (("--weights", "runs"), "config.json"),
            (("--width", "40", *QUESTIONS), "--width is 40; expected a multiple of 32"),
            (("--resume", "--name", "a", "--sharpness", "10"), "with --sharpness 10.0: it was started with 20.0"),
        ),
        commands=(
            (("search", "--file", "lines.txt", "a cat"), ()),
            (("evaluate",), ("evaluations/validation/similarity.png", "evaluations/validation/result.json")),
            (("evaluate", *QUESTIONS), ("evaluations/questions.csv/mistakes.txt",)),
            (("encode", "--file", "lines.txt"), ()),
            (("map", "--data", "reviews.tsv"), ("map.png",)),
            (("similarity", "a cat", "a dog"), ("similarity_2.png",)),
        ),
    ),
    Experiment(
        "text2text",
        ("--data", "pairs.jsonl", "--prefix", "count: ", "--vocabulary", "40", "--longest", "32", "--tokens", "200")
        + ("--shapes", "2", "--dropout", "0.1", "--steps", "12", "--save-every", "6", "--eval-every", "6"),
        12,
        pictures=("loss.png", "attention/encoder.png", "attention/decoder.png", "attention/cross.png"),
        files=("samples.txt", "tokenizer.json", "mistakes.txt"),
        inputs=questions,
        baseline="nearest_exact_match",
        shards=BY_ROWS,
        together=("--learning-rate", "1e-4"),
        refusals=(
            (("--preset", "huge"), "--preset"),
            (("--data", "nowhere"), "'nowhere' does not exist; expected a folder, a TSV, CSV or JSONL"),
            ((*QUESTIONS[:2], "--source", "title"), "no columns 'title' and 'target'; there are question, answer"),
            (("--data", "pairs.jsonl", "--longest", "3"), "has up to 3 tokens on both sides"),
            (("--data", "pairs.jsonl", "--vocabulary", "3"), "a vocabulary of 3 is too small"),
            (("--data", "pairs.jsonl", "--tokens", "2"), "a batch of 2 tokens has no room for a sentence"),
            (("--lora", "4"), "--lora adapts weights that have learned something; name them with --weights"),
            (("--weights", "runs"), "config.json"),
            (("--resume", "--name", "a", "--preset", "v1.1-tiny"), "v1.1-tiny: it was started with tiny"),
        ),
        commands=(
            (("predict", "say 3", "--beam", "2", "--n-best", "2"), ()),
            (("predict", "say 3", "--temperature", "1", "--checkpoint", "6"), ()),
            (("evaluate", "--beam", "1"), ("evaluations/validation/result.json",)),
            (("evaluate", "--data", "pairs.jsonl", "--metric", "bleu"), ("evaluations/pairs.jsonl/mistakes.txt",)),
        ),
    ),
    Experiment(
        "gpt",
        ("--text", "text.txt", "--batch", "2", "--steps", "20", "--eval-every", "4", "--save-every", "8"),
        20,
        pictures=("loss.png",),
        files=("sample.txt", "tokenizer.json"),
        inputs=text,
        baseline="unigram_entropy",
        shards=(*BY_ROWS, "tensor"),
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
        shards=BY_ROWS,
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
        "pretrain",
        ("--data", "text.txt", "--vocabulary", "300", "--layers", "2", "--width", "32", "--context", "24")
        + ("--batch", "2", "--steps", "20", "--eval-every", "4", "--save-every", "8", "--dropout", "0.1"),
        20,
        pictures=("loss.png", "loss_by_position.png", "filled.png", "attention.png"),
        files=("filled.txt", "tokenizer.json"),
        inputs=text,
        baseline="unigram_entropy",
        shards=BY_ROWS,
        refusals=(
            (("--data", "nowhere.txt"), "nowhere.txt does not exist"),
            (("--objective", "replaced"), "invalid choice 'replaced' for argument '--objective'"),
            (("--data", "text.txt", "--width", "48"), "--width is 48; expected a multiple of 32"),
            (("--data", "text.txt", "--context", "900"), "tokens; windows of 898 need over ten times as many"),
            (("--data", "text.txt", "--context", "2"), "--context is 2; expected at least 3, room for [CLS] and [SEP]"),
            (("--data", "text.txt", "--lines", "--batch", "50"), "a batch of 50 is more than the 36 sequences"),
            (("--data", "text.txt", "--vocabulary", "5"), "a vocabulary of 5 is too small"),
            (("--objective", "span", "--vocabulary", "90"), "--vocabulary is 90; expected more than the 100 sentinels"),
            (("--objective", "span", "--context", "4"), "--context 4 has no room for a span"),
            (("--objective", "span", "--lines"), "--lines is for the objectives masked and distil"),
            (("--objective", "causal", "--lora", "2", "--weights", "a"), "--lora is for --objective masked"),
            (
                (
                    "--objective",
                    "distil",
                ),
                "--objective distil needs --teacher",
            ),
            (("--teacher", "runs/pretrain/a"), "--teacher is for --objective distil; the objective is masked"),
            (
                ("--objective", "distil", "--teacher", "runs/pretrain/a", "--data", "text.txt", "--context", "24")
                + ("--layers", "3"),
                "--layers is 3; expected up to the 2 of the teacher",
            ),
            (("--lora", "2"), "--lora needs --weights"),
            (("--weights", "runs/pretrain/a", "--data", "text.txt", "--context", "200"), "expected up to the 128"),
            (("--resume", "--name", "a", "--mask-rate", "0.2"), "with --mask-rate 0.2: it was started with 0.15"),
        ),
        commands=(
            (("fill", "The [MASK] brown [MASK] jump", "--top", "2"), ()),
            (("evaluate",), ("evaluations/held_out/result.json", "evaluations/held_out/filled.png")),
            (("attention", "The brown fox"), ("attention_of_text.png",)),
            (("evaluate", "--data", "text.txt", "--checkpoint", "8"), ("evaluations/text.txt/result.json",)),
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
        shards=BY_ROWS,
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
        shards=BY_ROWS,
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
