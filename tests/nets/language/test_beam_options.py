"""The one `Options` in beam search: stop sequences, several ends, the repetition penalty."""

import pytest
import torch

from nets.language.beam_search import beam_search
from nets.language.decoding import greedy
from nets.language.sampling import penalise_repetition
from tests.nets.language.beam_cases import (
    END,
    PADDING,
    assert_same,
    generated,
    listed,
    marian,
    marian_step,
    markov,
    texts,
)


@pytest.mark.parametrize("stop", [((2,),), ((2, 3), (0, 0, 3)), ((0,), (1,), (2,), (3,))], ids=str)
@pytest.mark.parametrize("min_length", [0, 2])
def test_stop_sequences_end_a_text_as_the_end_does(stop, min_length):
    step, cache, logs = markov()
    options = {"end": END, "stop": stop, "max_length": 4, "min_length": min_length}
    # A stop sequence in which the prompt has a part does not count.
    actual = beam_search(step, cache, torch.tensor([2]), beams=4**4, n_best=4**4, **options)
    expected = {text: p / len(text) for text, p in texts(logs[0], 4, 2, min_length, stop).items()}
    assert dict(listed(actual)) == pytest.approx(expected, rel=1e-12) and len(listed(actual)) == len(expected)
    # Few beams: at each position enough continuations are left that do not end.
    step, cache, _ = markov(batch=7)
    options |= {"max_length": 9, "padding": 9}
    one, other = (
        search(step, cache, torch.arange(7) % 4, **options, **more)
        for search, more in ((beam_search, {"beams": 1, "length_penalty": 0.0, "early_stopping": True}), (greedy, {}))
    )
    assert torch.equal(one.tokens[:, 0], other.tokens) and torch.equal(one.lengths[:, 0], other.lengths)
    some = beam_search(step, cache, torch.arange(7) % 4, beams=3, n_best=3, **options)
    for i in range(7):
        for text, _ in listed(some, i):
            ends = [m for m in range(1, len(text) + 1) if any(text[:m][-len(s) :] == s for s in ((END,), *stop))]
            assert min((m for m in ends if m > min_length), default=9) == len(text)


def test_repetition_penalty_is_that_of_sampling():
    step, cache, _ = markov()
    logits = cache["table"][0] * (1 + 0.05 * torch.arange(4)[:, None, None, None])

    def score(text, first, start):
        total, path = 0.0, (0, first, *text)
        for t, token in enumerate(text):
            present = torch.tensor([c in {*start, *path[2 : t + 2]} for c in range(4)])
            penalised = penalise_repetition(logits[t, path[t], path[t + 1]], present, 1.7)
            total += float(torch.log_softmax(penalised, -1)[token])
        return total

    options = {"end": END, "max_length": 4, "repetition_penalty": 1.7}
    for start, present in (([3], None), ([0, 2], torch.tensor([[True, False, True, False]]))):
        actual = beam_search(step, cache, torch.tensor([3]), beams=4**4, n_best=4**4, present=present, **options)
        expected = {text: score(text, 3, start) / len(text) for text in texts(logits, 4)}
        assert dict(listed(actual)) == pytest.approx(expected, rel=1e-12)
    step, cache, _ = markov(9, batch=7)
    one = beam_search(step, cache, torch.arange(7), beams=1, length_penalty=0.0, early_stopping=True, **options)
    other = greedy(step, cache, torch.arange(7), **options)
    assert torch.equal(one.tokens[:, 0], other.tokens)
    assert not torch.equal(other.tokens, greedy(step, cache, torch.arange(7), end=END, max_length=4).tokens)


def test_several_end_tokens_equal_transformers_marian():
    model, source, mask = marian()
    step, cache, shared = marian_step(model, source, mask, 16)
    ends = [END, 7, 19, 23]
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 16, "eos_token_id": ends}
    theirs = generated(model, source, attention_mask=mask, **options)
    options = {"beams": 3, "n_best": 3, "max_length": 16, "padding": PADDING, "shared": shared}
    options["stop"] = tuple((end,) for end in ends)
    actual = beam_search(step, cache, torch.full((6,), 2), **options)
    assert_same(actual, theirs.sequences[:, 1:].unflatten(0, (6, 3)), theirs.sequences_scores.reshape(6, 3))
    last = actual.tokens.gather(2, actual.lengths[:, :, None] - 1)
    assert len(last.unique()) > 2
