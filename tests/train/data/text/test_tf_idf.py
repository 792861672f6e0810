"""TF-IDF with logistic regression beside the commonest class."""

import pytest

from train.data.text import tf_idf
from train.data.text.labelled import LabelledSet, Records


def set_of(pairs):
    texts, labels = zip(*pairs, strict=True)
    records = Records(texts, labels)
    return LabelledSet("a", tuple(sorted(set(labels))), records, records, records, "")


@pytest.mark.parametrize(
    ("texts", "unit"),
    [
        (["a plain text", "another"], "words"),
        (["词汇阅读是关键 08年考研", "中国 top 10"], "characters"),
        (["ラーメンを食べる"], "characters"),
        (["한국어는 띄어 쓴다"], "words"),  # Korean has spaces between its words
        (["1 2 3 ..."], "words"),
    ],
)
def test_unit_fits_the_script(texts, unit):
    assert tf_idf.unit_of(texts) == unit


def test_letters_are_those_of_any_script():
    assert tf_idf.has_letters(["()", "词"]) and not tf_idf.has_letters(["([)]", "1 2 3 ..."])


def test_pairs_of_words_count():
    """No single word tells these classes apart, pairs do."""
    out = tf_idf.baselines(set_of([("not good", "x"), ("good not", "y"), ("bad I", "y"), ("I bad", "x")] * 5))
    assert out == (1.0, 0.5, "words")


def test_commonest_class_and_characters():
    out = tf_idf.baselines(set_of([("好看的电影", "1"), ("很好的电影", "1"), ("很差的电影", "0")] * 5))
    assert out.unit == "characters" and out.tf_idf == 1.0 and abs(out.commonest_class - 2 / 3) < 1e-9
