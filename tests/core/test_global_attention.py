import pytest
import torch
from torch.func import grad

from core import random, spec
from core.global_attention import (
    additive_keys,
    additive_scores,
    additive_spec,
    attend,
    dot_scores,
    general_keys,
    general_spec,
)

F64 = torch.float64


def draw(seed, *shape):
    return random.normal(random.key(seed), shape, F64)


QUERY, ANNOTATIONS = draw(0, 3, 2, 4), draw(1, 3, 5, 6)
MASK = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]


def test_additive_scores_are_the_papers_equation():
    p = spec.init(random.key(2), additive_spec(4, 6, 7), F64)
    scores = additive_scores(p, QUERY, additive_keys(p, ANNOTATIONS))
    for i, q, j in ((0, 1, 4), (2, 0, 3)):
        w, u, b, v = p["query"]["weight"], p["keys"]["weight"], p["keys"]["bias"], p["score"]["weight"][0]
        expected = v @ torch.tanh(w @ QUERY[i, q] + u @ ANNOTATIONS[i, j] + b)
        torch.testing.assert_close(scores[i, q, j], expected, rtol=1e-13, atol=1e-13)
    assert scores.shape == (3, 2, 5)


def test_general_scores_are_the_papers_equation():
    p = spec.init(random.key(2), general_spec(4, 6), F64)
    scores = dot_scores(QUERY, general_keys(p, ANNOTATIONS))
    expected = torch.einsum("bqn,nm,btm->bqt", QUERY, p["keys"]["weight"], ANNOTATIONS)
    torch.testing.assert_close(scores, expected, rtol=1e-13, atol=1e-13)


def test_contexts_are_means_of_what_the_mask_shows():
    scores = draw(3, 3, 2, 5)
    context, weights = attend(scores, ANNOTATIONS, MASK)
    for i, length in ((0, 5), (1, 2)):
        alone = torch.softmax(scores[i, :, :length], -1)
        torch.testing.assert_close(weights[i, :, :length], alone)
        torch.testing.assert_close(context[i], alone @ ANNOTATIONS[i, :length])
        assert (weights[i, :, length:] == 0).all()
    assert (context[2] == 0).all() and (weights[2] == 0).all()
    for all_see in (None, torch.ones_like(MASK)):
        torch.testing.assert_close(attend(scores, ANNOTATIONS, all_see)[0][0], context[0])


def test_source_without_tokens_has_finite_gradients_of_zero():
    p = spec.init(random.key(2), additive_spec(4, 6, 7), F64)

    def total(query, annotations):
        scores = additive_scores(p, query, additive_keys(p, annotations))
        return attend(scores, annotations, MASK)[0].sin().sum()

    of_query, of_annotations = grad(total, (0, 1))(QUERY, ANNOTATIONS)
    assert of_query.isfinite().all() and of_annotations.isfinite().all()
    assert (of_query[2] == 0).all() and (of_query[:2] != 0).any(-1).all()
    assert ((of_annotations != 0).any(-1) == MASK).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dot_scores(QUERY, ANNOTATIONS), "queries of width 4, keys of width 6"),
        (lambda: dot_scores(QUERY[:2], ANNOTATIONS), r"found \(2, 2, 4\) and \(3, 5, 6\)"),
        (lambda: attend(draw(3, 3, 2, 4), ANNOTATIONS), r"\(3, 2, 4\) and \(3, 5, 6\) do not fit"),
        (lambda: attend(draw(3, 3, 2, 5), ANNOTATIONS, MASK[:, :4]), r"expected a mask \(3, 5\)"),
        (lambda: attend(draw(3, 3, 2, 5), ANNOTATIONS, MASK.long()), "found torch.int64"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
