"""The columns of a table of sentence pairs, by the names in its first line."""

import re

from train.data import DataError

LANGUAGES = {
    "ar": "ara arabic",
    "cs": "ces cze czech",
    "da": "dan danish dansk",
    "de": "deu ger german deutsch",
    "el": "ell gre greek",
    "en": "eng english englisch anglais inglés",
    "es": "spa spanish spanisch español",
    "fa": "fas per persian farsi",
    "fi": "fin finnish suomi",
    "fr": "fra fre french französisch français",
    "he": "heb hebrew",
    "hi": "hin hindi",
    "hu": "hun hungarian magyar",
    "id": "ind indonesian",
    "it": "ita italian italienisch italiano",
    "ja": "jpn japanese",
    "ko": "kor korean",
    "nl": "nld dut dutch nederlands",
    "no": "nor nb nn norwegian norsk",
    "pl": "pol polish polski",
    "pt": "por portuguese português",
    "ro": "ron rum romanian",
    "ru": "rus russian",
    "sv": "swe swedish svenska",
    "tr": "tur turkish türkçe",
    "uk": "ukr ukrainian",
    "vi": "vie vietnamese",
    "zh": "zho chi chinese cmn",
}
"""Languages by their ISO 639-1 codes, with further codes and names that tables use."""
CODES = frozenset(
    (
        "aa ab af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en "
        "eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu "
        "ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my "
        "na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm "
        "sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za "
        "zh zu"
    ).split()
)
NAMES = {name: code for code, names in LANGUAGES.items() for name in names.split()}
SOURCES = frozenset("source src input original".split())
TARGETS = frozenset("target tgt trg output translation translated reference".split())
TEXTS = frozenset("text sentence sentences segment string line".split())
OTHERS = frozenset("id index number score label split domain".split())


def columns(first: str, source: str, target: str) -> tuple[int, int] | None:
    """The columns of source and target by the first line of a table; None if that line is a pair of sentences.

    The line names the columns if all its words are names of languages ("de", "en-US", "German", "sentence_de"), or
    "source", "target" and the like ("src", "input", "translation"), or "text", "sentence", "id", "score".

    Args:
        first: the line.
        source, target: codes of the languages, such as "de" and "en", or names of columns as they are.

    Raises DataError (without the table's name): it names columns, but neither these nor source and target.
    """
    cells = [cell.strip() for cell in first.split("\t")]
    names = [cell.lower() for cell in cells]
    if all(name.lower() in names for name in (source, target)):
        return names.index(source.lower()), names.index(target.lower())
    words = [_words(name) for name in names]
    if any(_is_name(name) for name in (source, target)):
        raise DataError(f"no columns '{source}' and '{target}'; there are {', '.join(cells)}")
    if len(cells) < 2 or not all(words) or not all(_is_known(word) for parts in words for word in parts):
        return None
    codes = [language.lower().replace("_", "-") for language in (source, target)]
    by_language = [_cells(words, frozenset([code])) for code in codes]
    if all(by_language):
        return by_language[0][0], by_language[1][0]
    if not any(_language(word) and word not in OTHERS for parts in words for word in parts):
        sources, targets, texts = (_cells(words, known) for known in (SOURCES, TARGETS, TEXTS))
        if targets and (sources or texts):
            return (sources or texts)[0], targets[0]
        if len(texts) == 2:
            return texts[0], texts[1]
    if source in SOURCES and target in TARGETS:
        raise DataError(f"no columns '{source}' and '{target}'; there are {', '.join(cells)}")
    raise DataError(f"no pair of languages {source}-{target}; there are {', '.join(cells)}")


def _is_name(name: str) -> bool:
    """True of what can be the name of a column alone, and of no language: "article"."""
    return not re.fullmatch(r"[a-z]{2,3}([-_]\w+)?", name.lower()) and not all(map(_is_known, _words(name.lower())))


def _words(cell: str) -> list[str]:
    """ "sentence_de" -> sentence, de; "text2" -> text; "en_us" -> en-us."""
    if _language(cell.replace("_", "-")):
        return [cell.replace("_", "-")]
    return [word.rstrip("0123456789") for word in re.split(r"[\W_]+", cell) if word.rstrip("0123456789")]


def _is_known(word: str) -> bool:
    return bool(_language(word)) or word in SOURCES | TARGETS | TEXTS | OTHERS


def _language(word: str) -> str | None:
    """The code of a language by its code or name: "german" -> "de", "en-us" -> "en-us"."""
    if word in NAMES:
        return NAMES[word]
    base, _, region = word.partition("-")
    return word if base in CODES and (not region or len(region) in (2, 4)) else None


def _cells(words: list[list[str]], known: frozenset[str]) -> list[int]:
    """The cells with one of the words, as it is or as the name of a language."""
    return [i for i, parts in enumerate(words) if any(word in known or _language(word) in known for word in parts)]
