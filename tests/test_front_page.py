"""README.md and README.zh.md: short, and the same page in two languages."""

import re
from pathlib import Path

from nets.classifiers import by_name

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
TEXTS = (ENGLISH, CHINESE)


def blocks(page: str) -> list[str]:
    """The fenced blocks, without comments, which are translated."""
    return [re.sub(r" *# .*", "", block) for block in re.findall(r"```(.*?)```", page, re.DOTALL)]


def without_blocks(page: str) -> str:
    return re.sub(r"```.*?```", "", page, flags=re.DOTALL)


def test_both_have_the_same_blocks_and_commands():
    english, chinese = map(blocks, TEXTS)
    assert english == chinese and len(english) >= 6


def test_both_have_the_same_headings():
    english, chinese = (re.findall(r"^#+ ", without_blocks(page), re.MULTILINE) for page in TEXTS)
    assert english == chinese and len(english) >= 8


def test_both_have_the_same_tables_and_figures():
    english, chinese = ([line for line in page.splitlines() if line.startswith("|")] for page in TEXTS)
    assert len(english) == len(chinese) >= 40
    for ours, theirs in zip(english, chinese, strict=True):
        assert ours.count(" | ") == theirs.count(" | "), theirs
        numbers = [re.findall(r"\d+\.\d+", re.sub(r"\(http[^)]*\)", "", line)) for line in (ours, theirs)]
        assert numbers[0] == numbers[1], theirs


def test_both_have_the_same_links_and_code():
    for pattern in (r"\]\(([^)]*)\)", r"`([^`\n]+)`"):
        english, chinese = (sorted(re.findall(pattern, without_blocks(page))) for page in TEXTS)
        assert english == chinese


def test_is_short():
    prose = [line for line in without_blocks(ENGLISH).splitlines() if not line.startswith(("|", "!"))]
    words = re.sub(r"\]\([^)]*\)", "]", "\n".join(prose)).split()
    assert len(words) <= 900
    assert (ROOT / "experiments" / "gallery" / "strip.jpg").stat().st_size < 300_000


def test_nets_of_the_table_exist():
    names = re.findall(r"`--net ([\w-]+)`", ENGLISH)
    assert len(names) >= 12
    for name in names:
        by_name.find(name)
