"""The first line of a table: names of its columns, or a pair of sentences."""

import pytest

from train.data import DataError
from train.data.translation.columns import columns


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("de\ten", (0, 1)),
        ("EN\tDE", (1, 0)),
        ("en\tfr\tde", (2, 0)),
        ("German\tEnglish", (0, 1)),
        ("english\tdeutsch", (1, 0)),
        ("eng\tdeu", (1, 0)),
        ("id\tsentence_de\tsentence_en", (1, 2)),
        ("source\ttarget", (0, 1)),
        ("Target text\tSource text\tscore", (1, 0)),
        ("src\ttgt", (0, 1)),
        ("id\tinput\toutput", (1, 2)),
        ("text\ttranslation", (0, 1)),
        ("sentence1\tsentence2", (0, 1)),
        ("eins\tone", None),
        ("der\tthe", None),
        ("ja\tyes", None),
        ("Ziel\ttarget", None),
        ("Die Quelle.\tThe source.", None),
        ("1\t2", None),
        ("", None),
        ("de", None),
        ("de\t", None),
    ],
)
def test_the_first_line_of_a_table(first, expected):
    assert columns(first, "de", "en") == expected


@pytest.mark.parametrize("first", ["de\tfr", "fr\tit\tes", "id\tsource", "text\tlabel", "en_US\tde"])
def test_a_first_line_that_names_other_columns(first):
    with pytest.raises(DataError, match=f"no pair of languages de-en; there are {first.replace(chr(9), ', ')}$"):
        columns(first, "de", "en")
