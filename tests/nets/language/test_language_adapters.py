"""Adapters of Llama and T5 against the library peft: logits, read from its files and written for it."""

import pytest
import torch

from core import lora, tree
from nets.adapters import overlay, read_peft, write_peft
from nets.language import llama, t5, t5_weights
from tests.nets.language import llama_cases, t5_cases
from tests.nets.language.llama_cases import distance, ids
from tests.nets.test_adapters import adapt

peft = pytest.importorskip("peft")
pytestmark = [
    # peft asks transformers for a property under its old name, and says that it saves an adapted table as a whole.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

ATTENTION = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMAS = {
    "queries and values": ("llama", {"target_modules": ATTENTION}),
    "all": ("llama", {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"gate_proj": 2}}),
    "dora": ("llama", {"target_modules": ["k_proj", "up_proj", "down_proj"], "use_dora": True}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"]}),
    "table": ("llama", {"target_modules": ["embed_tokens"]}),
    "tied, biases": ("qwen2", {"target_modules": ALL}),
    "windows": ("mistral", {"target_modules": ALL}),
}
T5S = {
    "queries and values": ("1.0", ["q", "v"]),
    "others": ("1.0", ["k", "o", "wi", "wo"]),
    "gated": ("1.1", ["q", "k", "wi_0", "wi_1"]),
    "half of a gate": ("1.1", ["v", "wi_1"]),
}


def both_ways(base, options, params, apply, model, table, folder, expected):
    """The adapter that peft wrote is read, and again by peft what we write; the logits are those of peft, in double
    precision, where both sides' rounding is far below any tolerance."""
    theirs, params = adapt(base(), **options).double(), tree.cast(params, torch.float64)
    theirs.save_pretrained(folder / "theirs")
    adapters, scale, modules = read_peft(str(folder / "theirs"), model, table)
    whole, logits = overlay(params, modules), expected(theirs)
    assert distance(apply(params), logits) > 1e-2
    assert distance(apply(lora.adapted(whole, adapters, scale)), logits) < 1e-12
    assert distance(apply(lora.merge(whole, adapters, scale)), logits) < 1e-12
    write_peft(str(folder / "ours"), adapters, scale, model, table, modules=modules)
    again = peft.PeftModel.from_pretrained(base(), str(folder / "ours")).eval().double()
    assert distance(expected(again), logits) < 1e-12
    return adapters


@pytest.mark.parametrize("case", LLAMAS)
def test_llamas_adapters(case, tmp_path):
    family, options = LLAMAS[case]
    model = llama_cases.model_of(family)
    cfg = llama.published_config(model.config.to_dict())

    @torch.no_grad()
    def logits(net):
        return net(ids()).logits

    adapters = both_ways(
        lambda: llama_cases.exact(llama_cases.model_of(family)),
        options,
        llama.from_published(dict(model.state_dict()), cfg),
        lambda params: llama.apply(params, ids(), cfg),
        llama.spec(cfg),
        llama.rename_table(cfg),
        tmp_path,
        logits,
    )
    if case == "queries and values":  # 16 rows of queries, then 8 of keys and of values
        assert set(adapters["blocks"][1]["attn"]["qkv"]["weight"]) == {"from_0", "from_24"}


@pytest.mark.parametrize("case", T5S)
def test_t5s_adapters(case, tmp_path):
    version, targets = T5S[case]
    (tmp_path / "net").mkdir()
    t5_cases.write(tmp_path / "net", version)
    params, cfg = t5_weights.from_pretrained(str(tmp_path / "net"))
    source, target = t5_cases.pairs(3, 40, 48)

    @torch.no_grad()
    def logits(net):
        return net(input_ids=source, attention_mask=(source != 0).long(), decoder_input_ids=target).logits

    both_ways(
        lambda: t5_cases.exact(t5_cases.model_in(tmp_path / "net")),
        {"target_modules": targets},
        params,
        lambda params: t5.apply(params, (source, target), cfg),
        t5.spec(cfg),
        t5_weights.rename_table(cfg),
        tmp_path,
        logits,
    )
