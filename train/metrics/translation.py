"""How good translations are: BLEU and chrF by sacrebleu, sentences and tokens; the loss of smoothed targets."""

import math
from collections.abc import Sequence

from torch import Tensor

from train.losses.basic import cross_entropy


def smoothed_divergence(logits: Tensor, labels: Tensor, smoothing: float, padding: int) -> Tensor:
    """Kullback-Leibler divergence of the prediction p from the smoothed target q, its mean over the tokens.

    KL(q | p) = -sum q log p - H(q);  q = (1 - smoothing) * label + smoothing / classes

    So it is the cross-entropy less the entropy of q, and 0 is perfect (Vaswani et al. 2017, section 5.4; Szegedy et al.
    2016, arXiv:1512.00567, section 7).

    Args:
        logits: (..., classes).
        labels: (...) integers; where they are `padding` they do not count.
        smoothing: in [0, 1).
    """
    classes = logits.shape[-1]
    wrong = smoothing / classes
    right = 1 - smoothing + wrong
    entropy = -right * math.log(right) - (classes - 1) * wrong * math.log(wrong) if smoothing else 0.0
    return cross_entropy(logits, labels, label_smoothing=smoothing, ignore_id=padding) - entropy


def token_accuracy(logits: Tensor, labels: Tensor, padding: int) -> Tensor:
    """The share of tokens that are right, given those before them: logits (..., classes), labels (...)."""
    counted = labels != padding
    hits = (logits.detach().argmax(-1) == labels) & counted
    return hits.sum().float() / counted.sum().clamp(min=1)


def scores(found: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """`bleu` and `chrf` of a whole test set, in [0, 100], each with sacrebleu's signature, and `exact_match`, the share
    of sentences that are right word for word.

    Papineni et al. 2002; Popović 2015; Post 2018, "A Call for Clarity in Reporting BLEU Scores" (arXiv:1804.08771).

    Raises ValueError if there are no sentences, or not as many as references.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if len(found) != len(references) or not found:
        raise ValueError(f"expected as many translations as references, found {len(found)} and {len(references)}")
    bleu, chrf = BLEU(), CHRF()
    return {
        "bleu": bleu.corpus_score(list(found), [list(references)]).score,
        "chrf": chrf.corpus_score(list(found), [list(references)]).score,
        "exact_match": sum(a == b for a, b in zip(found, references, strict=True)) / len(references),
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }
