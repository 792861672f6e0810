"""Logistic regression on TF-IDF: what a classifier of texts without a net reaches, in seconds."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from train.data.text.labelled import LabelledSet

LETTER = re.compile(r"[^\W\d_]")
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Thai, Lao, Burmese, Khmer, kana, Han."""
PENALTIES = (1.0, 10.0, 100.0)
"""Inverse strengths of the L2 penalty, of which the validation part chooses."""


class Baselines(NamedTuple):
    """Test accuracies of TF-IDF with logistic regression and of always the commonest class.

    unit: "words" or "characters", of which single ones and pairs are counted.
    """

    tf_idf: float
    commonest_class: float
    unit: str


def unit_of(texts: Sequence[str]) -> str:
    """Characters, if most of the letters are of a script without spaces between words, else words."""
    letters = sum(len(LETTER.findall(text)) for text in texts)
    unspaced = sum(len(UNSPACED.findall(text)) for text in texts)
    return "characters" if 2 * unspaced > letters else "words"


def has_letters(texts: Sequence[str]) -> bool:
    """True if there are words or characters for TF-IDF to count."""
    return any(LETTER.search(text) for text in texts)


def baselines(data: LabelledSet) -> Baselines:
    """Both, learned from the training part.

    tf-idf(n, text) = (1 + log count(n, text)) (1 + log((1 + texts) / (1 + texts with n))), of norm 1
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train, validation, test = data.parts.values()
    unit = unit_of(train.texts)
    # The pattern takes words of one letter too, such as "I" and "a".
    kind = {"analyzer": "char"} if unit == "characters" else {"token_pattern": r"(?u)\b\w+\b"}
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **kind)
    known = vectors.fit_transform(train.texts)
    models = [LogisticRegression(C=penalty, max_iter=2000).fit(known, train.labels) for penalty in PENALTIES]
    seen = vectors.transform(validation.texts)
    best = max(models, key=lambda model: model.score(seen, validation.labels))  # the first of equals
    commonest = max(data.classes, key=train.labels.count)
    shares = [label == commonest for label in test.labels]
    return Baselines(float(best.score(vectors.transform(test.texts), test.labels)), sum(shares) / len(shares), unit)
