"""Masked tokens beside transformers' collator; corrupted spans beside T5's own arithmetic."""

import itertools
from collections import Counter

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from core import random
from train.data import DataError
from train.data.text import masking, subwords
from train.data.text.tokenizers import CharTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENIZER = subwords.train_word_piece([f"{a}{b} {b}" for a in LETTERS for b in LETTERS], 120)
MARKS = masking.marks_of(TOKENIZER)
LEAST = 1e-3
"""Probability below which a difference is no accident; keys and seeds are fixed, so that it is the same each time."""


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return random.split(random.key(seed), count)


@pytest.fixture(scope="module")
def tokens():
    """Examples with special tokens inside, of different lengths, filled up with padding."""
    ids = MARKS.ordinary[random.randint(random.key(3), (1500, 40), 0, len(MARKS.ordinary)).long()]
    ids[:, 7] = TOKENIZER.token_id("[UNK]")
    ids = masking.surrounded(ids, MARKS)
    ids[::3, 30:] = MARKS.padding
    ids[::3, 29] = MARKS.last
    return ids


def kinds(before, after, predicted) -> dict[str, int]:
    """Numbers of ordinary tokens by what became of them."""
    counts = {
        "left": ~predicted & ~torch.isin(before, MARKS.special),
        "mask": predicted & (after == MARKS.mask),
        "other": predicted & (after != MARKS.mask) & (after != before),
        "same": predicted & (after == before),
    }
    return {name: int(where.sum()) for name, where in counts.items()}


def predicted_of(masked: masking.Masked) -> torch.Tensor:
    out = torch.zeros_like(masked.tokens, dtype=torch.bool)
    return out.scatter(1, masked.positions, masked.counted)


def test_shares_are_those_of_transformers_collator(tokens):
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.tokenizer,
        **{f"{name}_token": f"[{mark}]" for name, mark in
           {"pad": "PAD", "unk": "UNK", "cls": "CLS", "sep": "SEP", "mask": "MASK"}.items()},
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(theirs, mlm_probability=0.15, seed=0)
    batch = collator([{"input_ids": row} for row in tokens])
    their_places = batch["labels"] != -100
    masked = masking.mask_tokens(keys(len(tokens)), tokens, MARKS)
    ours, others = (
        kinds(tokens, after, places)
        for after, places in ((masked.tokens, predicted_of(masked)), (batch["input_ids"], their_places))
    )
    assert chi2_contingency([list(ours.values()), list(others.values())]).pvalue > LEAST, (ours, others)
    by_position = [places[:, 1:29].sum(0).tolist() for places in (predicted_of(masked), their_places)]
    assert chi2_contingency([row[:7] + row[8:] for row in by_position]).pvalue > LEAST  # not that of [UNK]
    assert not their_places[:, 8].any() and not predicted_of(masked)[:, 8].any()
    # Random tokens: ours are never special, theirs may be; of the ordinary ones all are as likely.
    for after, places in ((masked.tokens, predicted_of(masked)), (batch["input_ids"], their_places)):
        new = after[places & (after != tokens) & (after != MARKS.mask)]
        counts = torch.bincount(new, minlength=TOKENIZER.vocabulary_size)[MARKS.ordinary]
        assert chisquare(counts.numpy()).pvalue > LEAST
    assert not torch.isin(masked.tokens[masked.tokens != tokens], MARKS.special[MARKS.special != MARKS.mask]).any()


def test_each_token_has_the_probability_of_the_rate(tokens):
    """80/10/10 and 15 % in numbers; the number per example is that of its own tokens."""
    masked = masking.mask_tokens(keys(len(tokens)), tokens, MARKS)
    ordinary = (~torch.isin(tokens, MARKS.special)).sum(1)
    count = masked.counted.sum(1)
    assert ((count == (0.15 * ordinary).floor()) | (count == (0.15 * ordinary).floor() + 1)).all()
    assert abs(float(count.sum() / ordinary.sum()) - 0.15) < 0.002
    numbers = kinds(tokens, masked.tokens, predicted_of(masked))
    total = int(count.sum())
    shares = [numbers[name] / total for name in ("mask", "other", "same")]
    assert all(abs(share - expected) < 0.01 for share, expected in zip(shares, (0.8, 0.1, 0.1), strict=True))


def test_masks_are_functions_of_key_and_example(tokens):
    part = tokens[:8]
    masked = masking.mask_tokens(keys(8), part, MARKS)
    alone = masking.mask_tokens(keys(8)[5:6], part[5:6], MARKS)
    assert all(torch.equal(a[5], b[0]) for a, b in zip(masked, alone, strict=True))
    anew = masking.mask_tokens(keys(8, seed=1), part, MARKS)
    assert not torch.equal(masked.tokens, anew.tokens)
    for each in (masked, anew):
        assert torch.equal(each.tokens.scatter(1, each.positions, each.targets), part)  # nothing else has changed


def test_texts_of_few_tokens():
    """One token is always predicted; without any, nothing is, and nothing changes."""
    texts = torch.tensor([[MARKS.first, 9, MARKS.last], [MARKS.first, MARKS.last, MARKS.padding]])
    masked = masking.mask_tokens(keys(2), texts, MARKS)
    assert masked.counted.sum(1).tolist() == [1, 0] and torch.equal(masked.tokens[1], texts[1])
    assert masking.mask_tokens(keys(2), texts, MARKS, 0.999).counted.shape == (2, 3)


def test_a_tokenizer_without_masks_is_refused():
    with pytest.raises(DataError, match=r"no \[CLS\] or <s>, which masked tokens need"):
        masking.marks_of(subwords.add_sentinels(subwords.train_unigram(["a text"] * 3, 12)))


# Spans.


def test_sizes_are_those_of_the_authors():
    assert masking.span_sizes(568) == (85, 28, 512, 114) and masking.tokens_of_input(512) == 568
    for inputs in (8, 64, 100, 512, 1000):
        tokens = masking.tokens_of_input(inputs)
        assert masking.span_sizes(tokens).inputs <= inputs < masking.span_sizes(tokens + 1).inputs
    assert masking.span_sizes(2) == (1, 1, 3, 3) and masking.span_sizes(10, 0.99, 1.0).spans == 1


def test_every_composition_is_as_likely():
    out = masking.composition(keys(20_000), 7, 3)
    assert (out.sum(1) == 7).all() and (out > 0).all()
    counts = Counter(map(tuple, out.tolist()))
    every = [parts for parts in itertools.product(range(1, 6), repeat=3) if sum(parts) == 7]
    assert counts.keys() == set(every) and chisquare([counts[parts] for parts in every]).pvalue > LEAST
    assert masking.composition(keys(2), 5, 1).tolist() == [[5], [5]]
    assert masking.composition(keys(1), 4, 4).tolist() == [[1, 1, 1, 1]]


def noise_of_the_authors(lengths: list[int], spans: int, generator: torch.Generator) -> list[bool]:
    """T5's noise mask as its paper's code has it: shuffled flags of the first item of each segment, then both kinds of
    segments in turn. lengths: numbers of noise tokens and of others."""
    parts = []
    for count in lengths:
        flags = (torch.arange(count - 1) < spans - 1)[torch.randperm(count - 1, generator=generator)]
        segment = torch.cat([torch.zeros(1, dtype=torch.long), flags.long().cumsum(0)])
        parts.append(torch.bincount(segment, minlength=spans).tolist())
    return [hidden for noise, other in zip(*parts, strict=True) for hidden in [False] * other + [True] * noise]


def test_spans_are_distributed_as_the_authors():
    """Positions that are hidden, and lengths of the first span."""
    count, time, generator = 4000, 40, torch.Generator().manual_seed(0)
    sizes = masking.span_sizes(time)
    texts = torch.arange(time).expand(count, time) + 100
    inputs, _ = masking.corrupt_spans(keys(count), texts, 99, 1)
    ours = torch.ones(count, 200, dtype=torch.bool).scatter(1, inputs, False)[:, 100 : 100 + time]
    lengths = [sizes.noise, time - sizes.noise]
    theirs = torch.tensor([noise_of_the_authors(lengths, sizes.spans, generator) for _ in range(count)])
    positions = [part.sum(0)[1:].tolist() for part in (ours, theirs)]
    assert chi2_contingency(positions).pvalue > LEAST
    firsts = [Counter(int((~row[row.int().argmax() :]).int().argmax()) for row in part) for part in (ours, theirs)]
    names = sorted(firsts[0] | firsts[1])
    assert chi2_contingency([[part[name] for name in names] for part in firsts]).pvalue > LEAST


@pytest.mark.parametrize("time", [2, 3, 17, 73])
def test_inputs_and_targets_make_the_text_again(time):
    sizes, sentinel = masking.span_sizes(time), 999
    texts = torch.arange(time) + 10 * torch.arange(1, 6)[:, None]
    inputs, targets = masking.corrupt_spans(keys(5), texts, sentinel, 1)
    assert inputs.shape == (5, sizes.inputs) and targets.shape == (5, sizes.targets)
    for row, target, text in zip(inputs.tolist(), targets.tolist(), texts.tolist(), strict=True):
        assert row.pop() == target.pop() == 1 and row[0] < 900 <= row[-1]  # it begins with text, and ends in a span
        assert [token for token in row if token > 900] == [sentinel - i for i in range(sizes.spans)]
        starts = [i for i, token in enumerate(target) if token > 900]
        assert [target[i] for i in starts] == [sentinel - i for i in range(sizes.spans)]
        spans = {target[a]: target[a + 1 : b] for a, b in itertools.pairwise([*starts, len(target)])}
        assert all(spans.values())
        assert [part for token in row for part in spans.get(token, [token])] == text


def test_sentinels_count_down_from_the_last_id():
    tokenizer = subwords.add_sentinels(subwords.train_unigram(["to go and to be gone"] * 9, 30))
    ids = [tokenizer.token_id(f"<extra_id_{i}>") for i in range(100)]
    assert ids == list(range(tokenizer.vocabulary_size - 1, tokenizer.vocabulary_size - 101, -1))
    assert tokenizer.encode("to <extra_id_0> be") == [*tokenizer.encode("to"), ids[0], *tokenizer.encode("be")]


def test_characters_have_no_special_tokens():
    with pytest.raises(DataError, match="a tokenizer of characters has no special tokens"):
        masking.marks_of(CharTokenizer(("a",)))
