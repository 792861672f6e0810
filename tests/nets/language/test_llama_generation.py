"""Texts of Llama and its kin against transformers' `generate`, from caches, in any batch, and by beams."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from core import random
from nets.language import generation, gpt2, llama
from nets.language.beam_search import beam_search
from nets.language.decoding import greedy
from tests.nets.language import gpt2_cases
from tests.nets.language.llama_cases import FAMILIES, distance, ids, model_of, tiny


@pytest.fixture(scope="module", params=FAMILIES)
def both(request):
    """(transformers' model, our parameters, our configuration)"""
    model = model_of(request.param)
    cfg = llama.published_config(model.config.to_dict())
    return model, llama.from_published(model.state_dict(), cfg), cfg


def generated(model, prompt, steps, **options):
    """New tokens of transformers' search; without an end, `steps` of them."""
    options |= {"attention_mask": torch.ones_like(prompt), "max_new_tokens": steps, "do_sample": False}
    return model.generate(prompt, pad_token_id=30, **options)[:, prompt.shape[1] :]


def test_cached_steps_equal_the_whole_pass(both):
    _, params, cfg = both
    tokens, lengths = ids(3, 20), torch.tensor([8, 3, 5])
    expected = llama.apply(params, tokens, cfg)
    caches = llama.empty_caches(params, cfg, 3, 20)
    scores, caches = llama.decode(params, tokens[:, :8], caches, torch.zeros(3, dtype=torch.int64), cfg)
    assert distance(scores, expected[:, :8]) < 1e-5
    rows = torch.arange(3)
    for t in range(12):
        scores, caches = llama.decode(params, tokens[rows, lengths + t][:, None], caches, lengths + t, cfg)
        assert distance(scores[:, 0], expected[rows, lengths + t]) < 1e-5, t


@pytest.mark.parametrize(("alpha", "early"), [(1.0, False), (0.6, True), (0.0, "never")])
def test_beams_equal_transformers(both, alpha, early):
    model, params, cfg = both
    prompt, steps = ids(3, 6), 12
    end = int(llama.generate(params, prompt, cfg, steps, temperature=0.0)[1, 4])
    options = {"num_beams": 4, "eos_token_id": end, "length_penalty": alpha, "early_stopping": early}
    expected = generated(model, prompt, steps, num_return_sequences=2, **options)
    caches, first, position = generation.start(llama.decode, llama.empty_caches, params, prompt, cfg, 8)
    step = generation.stepper(llama.decode, params, cfg)
    options = {"beams": 4, "n_best": 2, "end": end, "max_length": steps, "length_penalty": alpha}
    options |= {"early_stopping": early, "padding": 30, "position": position, "positions_axis": 2}
    actual = beam_search(step, caches, first, **options).tokens.flatten(0, 1)
    assert actual.tolist() == expected[:, : actual.shape[1]].tolist() and (expected[:, actual.shape[1] :] == 30).all()


@pytest.mark.parametrize("net", [llama, gpt2])
def test_beams_of_ragged_prompts_are_those_of_each_alone(net):
    params, cfg = tiny() if net is llama else gpt2_cases.tiny()
    prompts, lengths = ids(3, 6), torch.tensor([6, 2, 4])
    step, options = generation.stepper(net.decode, params, cfg), {"end": 3, "max_length": 9, "positions_axis": 2}

    def texts(search, rows, time, **more):
        start = generation.start(
            net.decode, net.empty_caches, params, prompts[rows, :time], cfg, time, lengths=lengths[rows]
        )
        caches, first, position = start
        return search(step, caches, first, position=position, **options, **more)

    for search, more in ((greedy, {}), (beam_search, {"beams": 3, "n_best": 2})):
        together = texts(search, slice(None), 6, **more)
        for i, n in enumerate(lengths.tolist()):
            alone = texts(search, slice(i, i + 1), n, **more)
            assert alone.lengths.tolist() == together.lengths[i : i + 1].tolist()
            width = alone.tokens.shape[-1]
            assert alone.tokens.tolist() == together.tokens[i : i + 1, ..., :width].tolist()
    plain = net.generate(params, prompts, cfg, 9, lengths=lengths, temperature=0.0, end=3)
    assert texts(greedy, slice(None), 6).tokens.tolist() == plain.tolist()


@pytest.mark.parametrize("window", [None, 4])
def test_text_past_the_context_equals_a_loop_without_a_cache(window):
    params, cfg = tiny(window=window)
    prompt, steps = ids(2, 5), 30
    actual = llama.generate(params, prompt, cfg, steps, temperature=0.0)
    read = text = prompt
    for _ in range(steps):
        read = read[:, -8:] if read.shape[1] > 16 else read
        token = llama.apply(params, read, cfg)[:, -1].argmax(-1)
        read, text = (torch.cat([x, token[:, None]], 1) for x in (read, text))
    assert actual.tolist() == text[:, 5:].tolist()


def test_compiled_decode_is_one_graph_for_all_tokens():
    torch._dynamo.reset()
    params, cfg = tiny(layers=1, window=4, rope_factor=4.0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(llama.decode, backend=counter, fullgraph=True, dynamic=False)
    options = {"key": random.key(1), "top_k": 20}
    eager = llama.generate(params, ids(3, 5), cfg, 12, **options)
    assert torch.equal(llama.generate(params, ids(3, 5), cfg, 12, decode=compiled, **options), eager)
    assert counter.frame_count == 2, "one graph for the prompt, one for every token after it"


@pytest.mark.parametrize(
    ("positions", "lengths", "message"),
    [
        (17, None, "17 tokens exceed the context of 16"),
        (5, [5, 0], "at least one token"),
        (4, None, "a cache of shape"),
    ],
)
def test_start_is_checked(positions, lengths, message):
    params, cfg = tiny()
    lengths = None if lengths is None else torch.tensor(lengths)
    with pytest.raises(ValueError, match=message):
        generation.start(llama.decode, llama.empty_caches, params, ids(2, 5), cfg, positions, lengths=lengths)
