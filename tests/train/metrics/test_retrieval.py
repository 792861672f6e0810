"""Ranks and recalls, also of ties and of several right items; TF-IDF."""

import itertools

import pytest
import torch

from train.metrics import retrieval


def test_ranks_and_figures():
    similarities = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    relevant = torch.eye(3, dtype=torch.bool)
    assert retrieval.ranks(similarities, relevant).tolist() == [1, 2, 3]
    figures = retrieval.figures(similarities, relevant)
    assert figures["recall_at_1"] == pytest.approx(1 / 3) and figures["recall_at_5"] == 1
    assert figures["mean_reciprocal_rank"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_equal_embeddings_find_nothing():
    """An index of the largest value alone would find the first."""
    assert retrieval.figures(torch.ones(4, 4), torch.eye(4, dtype=torch.bool))["recall_at_1"] == 0


def test_any_of_several_right_items_counts():
    relevant = retrieval.equal_texts(["a", "b", "a"], ["a", "b", "a"])
    assert relevant.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    similarities = torch.tensor([[0.1, 0.5, 0.9], [0.2, 0.1, 0.0], [0.5, 0.7, 0.5]])
    assert retrieval.ranks(similarities, relevant).tolist() == [1, 2, 2]


def test_a_query_without_an_item_is_refused():
    with pytest.raises(ValueError, match="with an item for each query"):
        retrieval.ranks(torch.ones(2, 2), torch.tensor([[True, False], [False, False]]))


def test_tfidf():
    items = ["the red cat", "the blue dog", "the the the"]
    similarities = retrieval.tfidf_similarities(["a red one", "the dog", "nothing"], items)
    assert similarities.shape == (3, 3) and similarities.argmax(1).tolist()[:2] == [0, 1]
    assert bool((similarities[2] == 0).all()) and similarities[0, 1] == 0
    assert retrieval.tfidf_similarities(["今天很好"], ["昨天不好", "good"])[0, 0] > 0  # characters, not whole clauses
    assert retrieval.tfidf_similarities(["a"], ["!", "?"]).tolist() == [[0, 0]]


def test_nearest_by_letters():
    items = ["digits: forty-two", "words: 1905-05-03", "digits: twelve"]
    assert retrieval.nearest_by_letters(["digits: forty-one", "words: 1905-05-04"], items) == [0, 1]


def test_chance_is_the_mean_over_all_orders():
    relevant = torch.tensor([[True, False, True, False], [False, False, False, True]])
    orders = torch.tensor(list(itertools.permutations(range(4)))).float()  # as similarities
    expected = [retrieval.figures(order.expand(2, 4), relevant, (1, 2, 4)) for order in orders]
    out = retrieval.chance(relevant, (1, 2, 4))
    for name, value in out.items():
        assert value == pytest.approx(sum(one[name] for one in expected) / len(expected)), name
    assert retrieval.chance(relevant, (10,)) == {"recall_at_10": 1}
