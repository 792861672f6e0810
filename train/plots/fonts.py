"""Fonts for letters that matplotlib's own font lacks: Chinese, Japanese, Korean and others, from those installed."""

import functools
import logging
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure
    from matplotlib.text import Text

log = logging.getLogger(__name__)

# Families with Chinese characters, kana and hangul in one style; asked first, as a font with a few of them also counts.
PREFERRED = (
    "Noto Sans CJK SC", "Noto Sans CJK TC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP",
    "Noto Sans KR", "Source Han Sans SC", "Source Han Sans CN", "Source Han Sans", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans GB", "Hiragino Sans", "Heiti SC", "Apple SD Gothic Neo",
    "Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS", "Droid Sans Fallback",
)  # fmt: skip
# Fonts that have every letter, as a box or as a bitmap that matplotlib cannot draw.
NO_LETTERS = ("Last Resort", "Adobe Blank", "Noto Color Emoji", "Apple Color Emoji")
WARNED: set[str] = set()  # packages that were named in this process
WIDE = 1.6  # a Chinese character is that much wider than the mean Latin letter


def width(text: str) -> float:
    """The width of a line of text in Latin letters."""
    return sum(WIDE if _is_wide(letter) else 1 for letter in text)


def use(figure: "Figure") -> None:
    """Give each text of a figure the fonts that its letters need, after its own.

    Letters that no installed font has are logged once per package to install, and drawn as boxes.
    """
    wanted = {text: lacking(text.get_text(), text.get_fontproperties()) for text in texts(figure)}
    letters = frozenset().union(*wanted.values())
    if not letters:
        return
    families, rest = fallbacks(letters)
    for text in (text for text, needs in wanted.items() if needs):
        text.set_fontfamily([*text.get_fontfamily(), *families])
    if rest:
        _warn(rest)


def texts(artist: "Artist") -> Iterator["Text"]:
    """The texts in a figure. Labels of ticks are made when they are asked for, half of the time that a grid of small
    images takes; so those of axes that are off are not."""
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    if isinstance(artist, Text):
        yield artist
    for child in artist.get_children():
        if not isinstance(child, Axis) or child.axes.axison:
            yield from texts(child)


def lacking(text: str, properties: object = None) -> frozenset[str]:
    """Letters of a text that the font of these properties, matplotlib's default if None, does not have."""
    from matplotlib import font_manager

    # Spaces, line feeds and control characters leave no box.
    letters = frozenset(letter for letter in text if letter.isprintable() and not letter.isspace())
    if not letters or all(map(str.isascii, letters)):
        return frozenset()
    return letters - charmap(str(font_manager.findfont(properties)))


def fallbacks(letters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """(the installed families that have these letters between them, the letters that none has)."""
    families, rest = _of_known_fonts(letters)
    return _of_known_fonts(letters) if rest and _add_new_fonts() else (families, rest)


def _of_known_fonts(letters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    from matplotlib.font_manager import fontManager

    known = {font.name: font.fname for font in fontManager.ttflist if not font.name.startswith(NO_LETTERS)}
    families, rest = choose(letters, {name: charmap(known[name]) for name in PREFERRED if name in known})
    more, rest = choose(rest, {name: charmap(path) for name, path in known.items()}) if rest else ([], rest)
    return families + more, rest


def choose(letters: frozenset[str], fonts: dict[str, frozenset[str]]) -> tuple[list[str], frozenset[str]]:
    """(families that have the letters between them, the letters left): always the font that has most of the rest.

    fonts: {family: its letters}; of equals the first.
    """
    families = []
    while letters and fonts:
        best = max(fonts, key=lambda name: len(letters & fonts[name]))
        if not letters & fonts[best]:
            break
        families.append(best)
        letters -= fonts[best]
    return families, letters


@functools.cache
def charmap(path: str) -> frozenset[str]:
    """The letters of a font file; none if matplotlib cannot read it."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def _add_new_fonts() -> bool:
    """Tell matplotlib of fonts installed after it made its list; False if there are none."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {str(font.fname) for font in fontManager.ttflist}
    new = [path for path in findSystemFonts() if path not in known and charmap(path)]
    for path in new:
        fontManager.addfont(path)
    return bool(new)


def _warn(letters: Iterable[str]) -> None:
    """Log, once per package that would help, that no font has these letters."""
    by_package: dict[str, str] = {}
    for letter in sorted(letters):
        package = _package(letter)
        by_package[package] = by_package.get(package, "") + letter
    for package, some in by_package.items():
        if package not in WARNED:
            WARNED.add(package)
            log.warning(
                "no font here has the letters %s: pictures show boxes instead; install one, such as %s",
                some[:8],
                package,
            )


def _package(letter: str) -> str:
    """The package of Debian and Ubuntu with a font for a letter. Emoji are wide too, and no letters; matplotlib draws
    outlines, not the coloured bitmaps of other fonts."""
    if unicodedata.category(letter).startswith("S"):
        return "fonts-symbola"
    return "fonts-noto-cjk" if _is_wide(letter) else "fonts-noto"


def _is_wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF"
