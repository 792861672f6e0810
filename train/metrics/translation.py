"""Metrics of translations: BLEU, chrF, exact matches, token accuracy, perplexity, divergence from smoothed targets."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from train.losses.weighted import WeightedLoss, token_cross_entropy


def smoothed_divergence(logits: Tensor, labels: Tensor, smoothing: float, padding: int) -> WeightedLoss:
    """Kullback-Leibler divergence of the prediction p from the smoothed target q, a mean over the tokens.

    KL(q | p) = -sum q log p - H(q);  q = (1 - smoothing) * label + smoothing / classes

    So it is the cross-entropy less the entropy of q, and 0 is perfect (Vaswani et al. 2017, section 5.4; Szegedy et al.
    2016, arXiv:1512.00567, section 7).

    Args:
        logits: (examples, ..., classes).
        labels: (examples, ...) integers; where they are `padding` they do not count.
        smoothing: in [0, 1).
    """
    classes = logits.shape[-1]
    wrong = smoothing / classes
    right = 1 - smoothing + wrong
    entropy = -right * math.log(right) - (classes - 1) * wrong * math.log(wrong) if smoothing else 0.0
    cross, counts = token_cross_entropy(logits, labels, label_smoothing=smoothing, ignore_id=padding)  # -sum q log p
    return WeightedLoss(cross - entropy * counts, counts)  # each (examples,)


def token_accuracy(logits: Tensor, labels: Tensor, padding: int) -> Tensor:
    """Fraction of right tokens, given those before them: logits (..., classes), labels (...)."""
    valid = labels != padding
    hits = (logits.detach().argmax(-1) == labels) & valid
    return hits.sum().float() / valid.sum().clamp(min=1)


# Languages without spaces between words: sacrebleu's tokenizers that need no dictionary.
TOKENIZERS = {"zh": "zh", "ja": "char", "th": "char"}


def scores(translations: Sequence[str], references: Sequence[str], language: str = "") -> dict[str, float | str]:
    """`bleu` and `chrf` of a whole test set, in [0, 100], each with sacrebleu's signature, and `exact_match`, the
    fraction of sentences equal to their reference.

    BLEU counts words, so that of Chinese, Japanese and Thai is of characters; the signature says so (`tok:zh`).
    Papineni et al. 2002; Popović 2015; Post 2018, "A Call for Clarity in Reporting BLEU Scores" (arXiv:1804.08771).

    Args:
        language: that of the translations: "zh", "zh-CN" ...

    Raises ValueError if there are no sentences, or not as many as references.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if len(translations) != len(references) or not translations:
        counts = f"{len(translations)} and {len(references)}"
        raise ValueError(f"expected as many translations as references, found {counts}")
    bleu, chrf = BLEU(tokenize=_tokenizer(language)), CHRF()
    return {
        "bleu": bleu.corpus_score(list(translations), [list(references)]).score,
        "chrf": chrf.corpus_score(list(translations), [list(references)]).score,
        "exact_match": sum(a == b for a, b in zip(translations, references, strict=True)) / len(references),
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], language: str = ""
) -> dict[str, float | str]:
    """`bleu` in [0, 100] and its signature as in `scores`, `exact_match`, the fraction of captions equal to one of
    theirs; each has at least one reference, any number of them.

    Raises ValueError as `scores`.
    """
    from sacrebleu.metrics import BLEU

    if len(captions) != len(references) or not captions:
        raise ValueError(f"expected as many captions as references, found {len(captions)} and {len(references)}")
    # sacrebleu's streams: the first references of all, the second ones, None where there is none.
    streams = [list(row) for row in itertools.zip_longest(*references)]
    bleu = BLEU(tokenize=_tokenizer(language))
    return {
        "bleu": bleu.corpus_score(list(captions), streams).score,
        "exact_match": sum(a in several for a, several in zip(captions, references, strict=True)) / len(captions),
        "bleu_signature": str(bleu.get_signature()),
    }


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`rouge_1`, `rouge_2` and `rouge_l`, means of the F1 of each text in [0, 100], with stemming, by rouge-score.

    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries". Words are of Latin letters and digits only.

    Raises ValueError: the package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("ROUGE needs the package rouge-score: pip install rouge-score") from None
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {f"rouge_{name[5:].lower()}": 100 * sum(row[name].fmeasure for row in rows) / len(rows) for name in rows[0]}


def word_perplexity(nats: float, references: Sequence[str], language: str = "") -> float:
    """exp(nats / words): the same for any division of the sentences into tokens.

    Args:
        nats: cross-entropy of all sentences together, their ends included.
        references: the sentences; words as BLEU has them (punctuation apart), and one end per sentence.
        language: as in `scores`.
    """
    from sacrebleu.metrics import BLEU

    tokenizer = BLEU(tokenize=_tokenizer(language)).tokenizer
    return math.exp(nats / sum(len(tokenizer(sentence).split()) + 1 for sentence in references))


def _tokenizer(language: str) -> str:
    return TOKENIZERS.get(language.lower().replace("_", "-").partition("-")[0], "13a")
