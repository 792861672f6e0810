"""Weights of 8 bits: their errors, their size, layers that take them as they are; over the whole zoo."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

from core import int8, lora, random, spec, tree
from core.layers import embedding, embedding_spec, linear, linear_spec
from core.layers.int8 import Int8
from core.layers.unformed import formed
from nets.language import llama
from tests.nets.language.llama_cases import distance, ids
from tests.registry import NETS
from tests.test_laws import batch, values

KEY = random.key(0)
CONFIG = llama.Config(500, 64, layers=3, heads=4, kv_heads=2, width=128, hidden=352, tied=True)


def net(seed=0, **options):
    params = spec.init(random.key(seed), llama.spec(replace(CONFIG, **options)))
    return tree.map(lambda p: 3 * p if p.ndim > 1 else p, params)


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 2)])
def test_an_entry_is_off_by_up_to_half_a_step_of_its_row(shape, dtype):
    weight = random.normal(KEY, shape).to(dtype) * torch.logspace(-3, 3, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    weight = torch.cat([weight.to(dtype), torch.zeros(1, *shape[1:], dtype=dtype)])
    quantised = int8.quantise({"weight": weight})["weight"]
    scale, integers = quantised["scale"].double(), quantised["int8"]
    assert integers.dtype == torch.int8 and integers.shape == weight.shape and quantised["scale"].dtype == dtype
    rows = integers.flatten(1).double()
    assert rows[:-1].abs().amax(1).tolist() == [127] * shape[0] and not rows[-1].any()
    step = 0.5 if dtype != torch.bfloat16 else 0.75  # s is rounded, so that the largest may be 127.5 steps
    assert ((weight.double().flatten(1) - rows * scale[:, None]).abs() <= step * scale[:, None] * (1 + 1e-6)).all()
    leaf = int8.unformed({"weight": quantised})["weight"]
    assert isinstance(leaf, Int8) and (leaf.shape, leaf.ndim, leaf.dtype) == (weight.shape, weight.ndim, dtype)
    torch.testing.assert_close(leaf.dense().double(), (rows * scale[:, None]).reshape(weight.shape), rtol=1e-2, atol=0)


def test_a_quarter_of_the_memory_and_what_is_kept():
    params = net()
    quantised = int8.quantise(params)
    assert int8.nbytes(quantised) / int8.nbytes(params) < 0.26
    assert int8.nbytes(int8.unformed(quantised)) == int8.nbytes(quantised)
    assert set(tree.names(params)) - set(tree.names(quantised)) == {n for n, p in tree.items(params) if p.ndim > 1}
    assert torch.equal(quantised["norm"]["weight"], params["norm"]["weight"])
    some = int8.quantise(params, lambda name, leaf: name.endswith("qkv.weight"))
    assert [name for name in tree.names(some) if name.endswith("int8")] == [
        f"blocks.{i}.attn.qkv.weight.int8" for i in range(3)
    ]


def test_logits_are_those_of_float32_to_5_percent():
    """Rounding errors of 8 bits are independent, so they add up as squares over the layers: 1 % each."""
    params, tokens = net(), ids(2, 40, vocabulary=500)
    expected = llama.apply(params, tokens, CONFIG)
    actual = llama.apply(int8.unformed(int8.quantise(params)), tokens, CONFIG)
    assert 1e-3 < distance(actual, expected) < 0.05
    x, model = random.normal(KEY, (9, 128)), {"weight": params["blocks"][0]["attn"]["qkv"]["weight"]}
    scale = int8.quantise(model)["weight"]["scale"]
    error = (linear(int8.unformed(int8.quantise(model)), x) - linear(model, x)).abs()
    assert (error <= x.abs().sum(-1, keepdim=True) * scale / 2 + 1e-5).all()


# Functions of them


@pytest.mark.parametrize("name", NETS)
def test_unformed_weights_equal_formed_ones_in_every_net(name):
    net = NETS[name]
    params, running = values(net)
    quantised, x = int8.quantise(params), batch(net, 2)

    def out(params):
        return net.apply(tree.merge(params, running), x, random.key(2), False)

    unformed = int8.unformed(quantised)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9), out(unformed), out(formed(unformed)))


def test_layers_of_any_leading_axes_and_half_precision():
    params = int8.unformed(int8.quantise(spec.init(KEY, {"up": linear_spec(6, 5), "table": embedding_spec(9, 6)})))
    dense, x = formed(params), random.normal(KEY, (2, 3, 6))
    torch.testing.assert_close(linear(params["up"], x), linear(dense["up"], x))
    torch.testing.assert_close(linear(params["up"], x[0, 0]), linear(dense["up"], x[0, 0]))
    rows = torch.tensor([[0, 8, 3]])
    assert torch.equal(embedding(params["table"], rows, padding_id=3), embedding(dense["table"], rows))
    half = tree.cast(spec.init(KEY, linear_spec(6, 5)), torch.bfloat16)
    actual = linear(int8.unformed(int8.quantise(half)), x.bfloat16())
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, linear(half, x.bfloat16()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("count", [1, 30])  # few rows of x are multiplied by another form
def test_compiles_to_one_graph(count):
    """The leaves may be made inside, or come in."""
    torch._dynamo.reset()
    counter, cfg = CompileCounterWithBackend("aot_eager"), replace(CONFIG, layers=1)
    options = {"backend": counter, "fullgraph": True, "dynamic": False}

    def apply(quantised, x):
        return llama.apply(int8.unformed(quantised), x, cfg)

    compiled = torch.compile(apply, **options), torch.compile(llama.apply, **options)
    for seed in (0, 1):
        quantised, x = int8.quantise(net(seed, layers=1)), ids(1, count, vocabulary=500)
        expected = apply(quantised, x)
        torch.testing.assert_close(compiled[0](quantised, x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled[1](int8.unformed(quantised), x, cfg), expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


def test_an_ensemble_equals_one_by_one():
    three, x = [int8.quantise(net(seed)) for seed in range(3)], ids(2, 9, vocabulary=500)
    together = vmap(lambda quantised: llama.apply(int8.unformed(quantised), x, CONFIG))(tree.stack(three))
    for i, quantised in enumerate(three):
        torch.testing.assert_close(together[i], llama.apply(int8.unformed(quantised), x, CONFIG))


def test_adapters_learn_over_weights_of_8_bits():
    """W + s B A with W of 8 bits: gradients by A and B are those over the formed weight."""
    params, x = int8.unformed(int8.quantise(net())), ids(2, 9, vocabulary=500)
    adapters = spec.init(KEY, lora.spec(llama.spec(CONFIG), ["qkv.weight", "up.weight"], 2))
    adapters = tree.map(lambda a: a + 0.1, adapters)

    def loss(adapters, params):
        return llama.apply(lora.adapted(params, adapters, 0.5), x, CONFIG).sin().sum()

    actual, expected = (grad(loss)(adapters, base) for base in (params, formed(params)))
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3), actual, expected)


def test_generation_from_caches_equals_the_whole_pass():
    params = int8.unformed(int8.quantise(net()))
    prompt = ids(2, 5, vocabulary=500)
    text = llama.generate(params, prompt, CONFIG, 8, temperature=0.0)
    for t in range(8):
        read = torch.cat([prompt, text[:, :t]], 1)
        assert torch.equal(llama.apply(params, read, CONFIG)[:, -1].argmax(-1), text[:, t])


def test_leaves_without_rows_are_named():
    with pytest.raises(ValueError, match=r"int8: 'step' of shape \(\) and torch.float32 has no rows of real numbers"):
        int8.quantise({"step": torch.tensor(1.0)}, lambda name, leaf: True)
