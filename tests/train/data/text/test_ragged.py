"""Sequences of tokens: encoding, buckets, batches, baselines."""

import pytest
import torch

from core import random
from train.data import DataError
from train.data.text import ragged, tokenizers
from train.data.text.labelled import Records
from train.data.text.tokenizers import UNK

RECORDS = Records(tuple("ab" * n for n in range(1, 21)), tuple("xy" * 10))


def data_of(kind="characters", longest=100, vocabulary=10):
    tokenizer = ragged.learn_tokenizer(RECORDS.texts, vocabulary, kind)
    return ragged.encoded(RECORDS, ("x", "y"), tokenizer, kind, longest), tokenizer


def test_encoded():
    data, tokenizer = data_of(longest=30)
    assert tokenizer.vocabulary_size == 6  # four special tokens, a, b
    assert data.tokens.shape == (20, 30) and data.lengths.tolist() == [min(2 * n, 30) for n in range(1, 21)]
    assert data.labels.tolist() == [0, 1] * 10
    assert not data.tokens[torch.arange(30) >= data.lengths[:, None]].any()
    tokens, lengths = ragged.encode(["a z", "", "b"], tokenizer, "characters", 30)
    assert lengths.tolist() == [2, 0, 1] and tokens[0, 1] == UNK
    words, _ = ragged.encode(["ab", "abab abab"], data_of("words", vocabulary=50)[1], "words", 30)
    assert (words > UNK).tolist() == [[True, False], [True, True]]


def test_rare_words_are_unknown():
    tokenizer = ragged.learn_tokenizer(["a fine film", "a dull film"], 100, "words", min_count=2)
    ids, _ = ragged.encode(["a fine film"], tokenizer, "words", 30)
    assert tokenizer.vocabulary_size == 6 and (ids == UNK).tolist() == [[False, True, False]]


def test_spaces_are_tokens_if_asked_for():
    texts, kind = ["今天 天气", " 天 气　好 "], "characters-and-spaces"
    tokenizer = ragged.learn_tokenizer(texts, 100, kind)
    tokens, lengths = ragged.encode(texts, tokenizer, kind, 30)
    assert lengths.tolist() == [5, 5] and tokens[0, 2] == tokens[1, 1] == tokens[1, 3] > UNK
    assert ragged.encode(texts, ragged.learn_tokenizer(texts, 100, "characters"), "characters", 30)[1].tolist() == [
        4,
        3,
    ]


@pytest.mark.parametrize("kind", ["words", "characters", "characters-and-spaces", "bpe"])
def test_capitals_are_known_to_a_tokenizer_of_lower_case_texts(kind, tmp_path):
    tokenizer = ragged.learn_tokenizer(["a fine film", "dull 7"], 300, kind)
    tokenizer.save(tmp_path / "tokenizer.json")
    tokenizer = tokenizers.load(tmp_path / "tokenizer.json")
    ids, lengths = ragged.encode(["A Fine FILM", "a fine film"], tokenizer, kind, 30)
    assert ids[0].tolist() == ids[1].tolist() and lengths[0] == lengths[1] and (ids > UNK).all()
    tokenizer = ragged.learn_tokenizer(["A fine film", "dull 7"], 300, kind)  # has capitals of its own
    ids, lengths = ragged.encode(["A fine film", "a fine film"], tokenizer, kind, 30)
    assert ids[0].tolist() != ids[1].tolist()
    assert not ragged.is_lower(["()", "今天"]) and ragged.is_lower(["()", "é"])


def test_batches_are_of_similar_length_and_cover_an_epoch():
    data, _ = data_of()
    buckets = ragged.make_buckets(data.lengths, 2, 5)
    assert [bucket.width for bucket in buckets] == [20, 40] and ragged.steps_per_epoch(buckets, 5) == 4
    key = random.key(0)
    epoch = [ragged.batch_at(data, buckets, key, step, 5) for step in range(4)]
    assert sorted(int(n) for batch in epoch for n in batch.lengths) == data.lengths.tolist()
    assert {batch.tokens.shape for batch in epoch} == {(5, 20), (5, 40)}
    again = ragged.batch_at(data, buckets, key, 2, 5)
    assert all(torch.equal(a, b) for a, b in zip(again, epoch[2], strict=True))
    later = [ragged.batch_at(data, buckets, key, step, 5) for step in range(4, 8)]
    assert [b.lengths.tolist() for b in later] != [b.lengths.tolist() for b in epoch]
    assert [bucket.width for bucket in ragged.make_buckets(data.lengths, 8, 20)] == [40]
    with pytest.raises(DataError, match="a batch of 21 is more than the 20 sequences"):
        ragged.make_buckets(data.lengths, 1, 21)


def test_evaluation_covers_all_once():
    data, _ = data_of()
    seen = []
    for rows, (tokens, lengths) in ragged.evaluation_batches(data.tokens, data.lengths.flip(0), 8):
        assert tokens.shape == (len(rows), int(lengths.max()))
        seen += rows.tolist()
    assert sorted(seen) == list(range(20))


def test_baselines():
    """Words that say the class are enough for a bag of words; their order is not seen by it."""
    texts, labels = ["good a", "bad a", "good b", "bad b", "good c"] * 8, ["x", "y", "x", "y", "x"] * 8
    tokenizer = ragged.learn_tokenizer(texts, 50, "words")

    def figures(texts):
        records = Records(tuple(texts), tuple(labels))
        part = ragged.encoded(records, ("x", "y"), tokenizer, "words", 9)
        return ragged.baselines(part, part, tokenizer.vocabulary_size)

    assert figures(texts) == {"commonest_class_accuracy": pytest.approx(0.6), "bag_of_words_accuracy": 1.0}
    order = [" ".join(("good", "bad") if label == "x" else ("bad", "good")) for label in labels]
    assert figures(order)["bag_of_words_accuracy"] == pytest.approx(0.6)
