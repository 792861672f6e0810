"""Figures of answers to questions: exact match and F1 over words, as SQuAD's evaluation has them.

Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text" (arXiv:1606.05250), section 6.1;
for questions without an answer Rajpurkar et al. 2018 (arXiv:1806.03822).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")


def normal(text: str) -> str:
    """Lower case, without punctuation (ASCII's), articles and spare white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", text).split())


def exact_match(answer: str, gold: Sequence[str]) -> float:
    """1 if the answer is one of `gold`; without any of these, if it is empty."""
    return float(any(normal(answer) == normal(text) for text in gold or ("",)))


def f1(answer: str, gold: Sequence[str]) -> float:
    """2 P R / (P + R) of the words that answer and gold answer share, the largest over `gold`."""
    return max(_f1(normal(answer).split(), normal(text).split()) for text in gold or ("",))


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = (Counter(words) & Counter(gold)).total()
    return 2 * common / (len(words) + len(gold))  # P = common / words, R = common / gold


def figures(answers: Sequence[str], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means of `exact_match` and `f1`, from 0 to 1."""
    pairs = list(zip(answers, gold, strict=True))
    return {
        "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
        "f1": sum(f1(*pair) for pair in pairs) / len(pairs),
    }
