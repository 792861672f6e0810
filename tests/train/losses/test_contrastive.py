"""In-batch negatives: against torch and sentence-transformers; texts that occur twice; gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from core import random
from train.losses.contrastive import in_batch_negatives, same_texts


def embeddings(count=6, width=5, dtype=torch.float32):
    keys = random.split(random.key(0), 2)
    return [F.normalize(random.normal(key, (count, width)), dim=-1).to(dtype) for key in keys]


def test_both_directions_are_torch_cross_entropies():
    a, b = embeddings()
    scores, labels = 20 * a @ b.T, torch.arange(6)
    there, back = (F.cross_entropy(s, labels, reduction="none") for s in (scores, scores.T))
    torch.testing.assert_close(in_batch_negatives(a, b), (there + back) / 2)
    torch.testing.assert_close(in_batch_negatives(a, b), in_batch_negatives(b, a))


@pytest.mark.slow
def test_equals_sentence_transformers():
    """Its name for it until version 6 was MultipleNegativesSymmetricRankingLoss."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    directions = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    theirs = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=20.0, **directions)
    leaves = [x.requires_grad_() for x in embeddings()]
    a, b = (F.normalize(x, dim=-1) for x in leaves)  # which theirs does by itself
    ours, expected = in_batch_negatives(a, b).mean(), theirs.compute_loss_from_embeddings([a, b], None)
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (ours, expected))
    torch.testing.assert_close(*gradients)


def test_equal_texts_are_no_negatives():
    """Pairs 0 and 3 have their first text in common, 1 and 4 their second, and the first of 5 is the second of 2."""
    first, second = torch.tensor([10, 11, 12, 10, 14, 22]), torch.tensor([20, 21, 22, 23, 21, 25])
    matches = same_texts(first, second)
    assert matches.nonzero().tolist() == [[0, 0], [0, 3], [1, 1], [1, 4], [2, 2], [3, 0], [3, 3], [4, 1], [4, 4]] + [
        [5, 2],
        [5, 5],
    ]
    a, b = embeddings()
    loss = in_batch_negatives(a, b, matches=matches)
    others = torch.tensor([0, 1, 2, 4, 5])  # all but pair 3
    row = F.cross_entropy(20 * a[0] @ b[others].T, torch.tensor(0))
    column = F.cross_entropy(20 * b[0] @ a[others].T, torch.tensor(0))
    torch.testing.assert_close(loss[0], (row + column) / 2)
    assert bool((loss < in_batch_negatives(a, b)).all())


def test_a_pair_that_fits_all_others_has_nothing_to_tell_apart():
    a, b = embeddings()
    loss = in_batch_negatives(a, b, matches=torch.ones(6, 6, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.zeros(6))
    gradient = torch.func.grad(lambda x: in_batch_negatives(x, b, matches=torch.ones(6, 6, dtype=torch.bool)).sum())(a)
    assert torch.equal(gradient, torch.zeros_like(a))


def test_a_guess_has_ln_batch_and_half_precision_is_widened():
    same = torch.ones(8, 4) / 2
    torch.testing.assert_close(in_batch_negatives(same, same), torch.full((8,), math.log(8)))
    a, b = embeddings(dtype=torch.bfloat16)
    out = in_batch_negatives(a, b)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, in_batch_negatives(a.float(), b.float()))


def test_shapes_are_checked():
    a, b = embeddings()
    with pytest.raises(ValueError, match=r"two tables of embeddings \(batch, width\), found \(6, 5\) and \(5, 5\)"):
        in_batch_negatives(a, b[:5])
    with pytest.raises(ValueError, match=r"expected matches \(6, 6\) of torch.bool, found \(6, 6\) of torch.float32"):
        in_batch_negatives(a, b, matches=torch.ones(6, 6))
