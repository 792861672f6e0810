"""Texts by name: downloaded once, checked, kept in the user's cache."""

from pathlib import Path
from typing import NamedTuple

from train.data.downloads import Download, fetch_all


class NamedText(NamedTuple):
    """A text file of a set: the set's folder in the cache, what is downloaded into it, the file in there, and what the
    text is, with its licence."""

    folder: str
    download: Download
    file: str
    about: str


_SHAKESPEARE = Download(
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
# The address from which llama.cpp measures perplexities, since the authors' own is gone; the same archive.
_WIKITEXT_2 = Download(
    "https://huggingface.co/datasets/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
    "sha256:ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    tuple(f"wikitext-2-raw/wiki.{part}.raw" for part in ("train", "valid", "test")),
)
_LICENCE = "Wikipedia articles (Merity et al. 2016, arXiv:1609.07843), CC BY-SA 3.0"
TEXTS = {
    "shakespeare": NamedText("shakespeare", _SHAKESPEARE, "input.txt", "Karpathy's tiny Shakespeare, public domain"),
    "wikitext-2": NamedText("wikitext-2", _WIKITEXT_2, "wikitext-2-raw/wiki.train.raw", _LICENCE),
    "wikitext-2-valid": NamedText("wikitext-2", _WIKITEXT_2, "wikitext-2-raw/wiki.valid.raw", _LICENCE),
    "wikitext-2-test": NamedText("wikitext-2", _WIKITEXT_2, "wikitext-2-raw/wiki.test.raw", _LICENCE),
}
"""wikitext-2 is the training part, as raw text; the other two parts are texts of their own, to evaluate on."""


def fetch_text(name: str, directory: Path | str | None = None, base_url: str | None = None) -> Path:
    """Fetch a text of `TEXTS`, unless it is there already and whole, and return its file.

    Args as `train.data.downloads.fetch_all`. Raises DataError: no connection, wrong checksum.
    """
    text = TEXTS[name]
    return fetch_all(text.folder, [text.download], directory, base_url) / text.file
