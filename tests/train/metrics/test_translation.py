import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.text import BLEUScore

from core import random
from train.metrics import translation


def example():
    logits = random.normal(random.key(0), (2, 4, 7))
    return logits, torch.tensor([[3, 1, 6, 0], [2, 0, 0, 0]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_divergence_is_that_of_torch(smoothing):
    """Loss of smoothed targets written out."""
    logits, labels = example()
    value = translation.smoothed_divergence(logits, labels, smoothing, padding=0).mean
    q = (1 - smoothing) * F.one_hot(labels, 7) + smoothing / 7
    divergence = F.kl_div(logits.log_softmax(-1), q, reduction="none").sum(-1)[labels != 0].mean()
    torch.testing.assert_close(value, divergence)
    right = q.clamp(min=1e-9).log()
    perfect = translation.smoothed_divergence(right, labels, smoothing, padding=0).mean
    torch.testing.assert_close(perfect, torch.tensor(0.0), atol=1e-6, rtol=0)
    assert translation.smoothed_divergence(logits, torch.zeros_like(labels), smoothing, padding=0).mean == 0


def test_token_accuracy_counts_no_padding():
    logits, labels = example()
    expected = (logits.argmax(-1) == labels)[labels != 0].float().mean()
    torch.testing.assert_close(translation.token_accuracy(logits, labels, padding=0), expected)
    assert translation.token_accuracy(F.one_hot(labels, 7).float(), labels, padding=0) == 1.0
    assert translation.token_accuracy(logits, torch.zeros_like(labels), padding=0) == 0.0


def test_scores():
    references = ["the cat sat on the mat .", "a dog barks in the old yard ."]
    same = translation.scores(references, references)
    assert same["bleu"] == pytest.approx(100) and same["chrf"] == pytest.approx(100) and same["exact_match"] == 1.0
    other = translation.scores(["the cat sat on a mat .", references[1]], references)
    assert 50 < other["bleu"] < 100 and 50 < other["chrf"] < 100 and other["exact_match"] == 0.5
    assert other["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_of_languages_without_spaces():
    references = ["今天天气很好，我们去公园散步。", "火车八点半从上海出发。"]
    near = ["今天天气很好，我们去公园跑步。", references[1]]
    for language, tokenizer in (("zh", "zh"), ("zh_TW", "zh"), ("ja", "char")):
        figures = translation.scores(near, references, language)
        assert 80 < figures["bleu"] < 100 and f"|tok:{tokenizer}|" in figures["bleu_signature"]
    assert translation.scores(near, references)["bleu"] < 60  # a sentence is one word or two


def test_rouge():
    """By hand: 5 of 6 words, 3 of 5 pairs of words, and 5 in order."""
    pytest.importorskip("rouge_score")
    out = translation.rouge(["the cat sat on the mat"], ["the cat lay on the mats"])
    assert out == pytest.approx({"rouge_1": 100 * 5 / 6, "rouge_2": 60, "rouge_l": 100 * 5 / 6})


def test_refusals():
    with pytest.raises(ValueError, match="as many translations as references, found 1 and 2"):
        translation.scores(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="found 0 and 0"):
        translation.scores([], [])


def test_word_perplexity_counts_words_punctuation_and_ends():
    """Two sentences of 4 and 2 tokens, and an end each; of Chinese, characters."""
    nats = 8 * math.log(10)
    assert translation.word_perplexity(nats, ["Stop, you two", "Go!"]) == pytest.approx(10)
    assert translation.word_perplexity(nats, ["你好吗", "去吧"], "zh-CN") == pytest.approx(math.exp(nats / 7))


def test_scores_of_captions_with_several_references():
    """By hand: all words are in a reference, 6 of 7 pairs, 4 of 5 triples and 2 of 3 fours; and torchmetrics."""
    own = ["a cat on the red mat", "a dog barks"]
    references = [["a cat on the mat", "one cat on the red rug"], ["dogs bark", "a dog barks", "barking"]]
    figures = translation.caption_scores(own, references)
    assert figures["exact_match"] == 0.5 and figures["bleu_signature"].startswith("nrefs:var|")
    assert figures["bleu"] == pytest.approx(100 * (6 / 7 * 4 / 5 * 2 / 3) ** 0.25)
    assert figures["bleu"] / 100 == pytest.approx(float(BLEUScore()(own, references)), abs=1e-6)
    single = [several[:1] for several in references]
    one = translation.scores(own, [several[0] for several in single])
    assert translation.caption_scores(own, single)["bleu"] == one["bleu"]
    assert translation.caption_scores(own, [[text, "x"] for text in own])["exact_match"] == 1.0
    for wrong in ([], own[:1]):
        with pytest.raises(ValueError, match="as many captions as references"):
            translation.caption_scores(wrong, references)
