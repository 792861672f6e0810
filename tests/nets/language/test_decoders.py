"""Tests that GPTs and Llamas share: files in shards, texts of prompts of unequal length, texts in any batch."""

import pytest
import torch
from safetensors.torch import load_file

from core import random
from nets.language import gpt2, llama
from tests.nets.language import gpt2_cases, llama_cases
from tests.nets.language.gpt2_cases import ids

NETS = {family: (gpt2, gpt2_cases) for family in gpt2_cases.FAMILIES}
NETS |= {family: (llama, llama_cases) for family in llama_cases.FAMILIES}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sharded_weights(family, tmp_path):
    net, cases = NETS[family]
    for folder, size in (("one", "1GB"), ("many", "5kB")):
        cases.model_of(family).save_pretrained(tmp_path / folder, max_shard_size=size)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    params, cfg = net.from_pretrained(str(tmp_path / "many"))
    state = load_file(tmp_path / "one" / "model.safetensors")
    torch.testing.assert_close(params, net.from_published(state, cfg), rtol=0, atol=0)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("family", NETS)
def test_greedy_text_of_ragged_prompts_equals_transformers(family, penalty):
    net, cases = NETS[family]
    model = cases.model_of(family)
    cfg = net.published_config(model.config.to_dict())
    params = net.from_published(model.state_dict(), cfg)
    prompts, lengths = ids(4, 9), torch.tensor([9, 1, 4, 7])
    options = {"lengths": lengths, "temperature": 0.0, "repetition_penalty": penalty}
    actual = net.generate(params, prompts, cfg, 15, **options)
    assert len(actual.unique()) > 3
    for i, n in enumerate(lengths):
        prompt = prompts[i : i + 1, :n]
        options = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 30, "repetition_penalty": penalty}
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, n:]
        assert actual[i].tolist() == expected[0].tolist(), i


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_example_gets_the_same_text_in_any_batch(family):
    net, cases = NETS[family]
    params, cfg = cases.tiny(**({"window": 4} if family == "mistral" else {}))
    prompts, lengths, keys = ids(4, 6), torch.tensor([6, 3, 5, 1]), random.split(random.key(3), 4)
    together = net.generate(params, prompts, cfg, 10, lengths=lengths, key=keys)
    for i, n in enumerate(lengths):
        alone = net.generate(params, prompts[i : i + 1, :n], cfg, 10, key=keys[i : i + 1])
        assert torch.equal(alone, together[i : i + 1]), i
    assert len({tuple(row) for row in together.tolist()}) == 4
