"""Adapters of low rank: forms that agree, initial values, DoRA, many in one batch, rows, errors; over the whole zoo."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.nn import functional as F

from core import initializers, lora, per_example, random, spec, tree
from core.layers import conv, conv_spec, conv_transpose, embedding, embedding_spec, linear, linear_spec
from core.layers.low_rank import LowRank
from nets.language import llama
from tests.registry import NETS
from tests.test_laws import PLAIN, batch, one_key_each, scalar, values

KEY = random.key(0)


def is_matrix(name, leaf):
    return leaf.ndim > 1 if isinstance(leaf, torch.Tensor) else len(leaf.shape) > 1


def drawn_normal(adapters, key=KEY, dtype=torch.float64):
    """Adapters of a spec with every entry from N(0, 0.3^2): B that is zero would hide most mistakes."""
    return spec.init(key, tree.map(lambda p: spec.Param(p.shape, initializers.normal(0.3), p.axes, dtype), adapters))


def adapters_of(net, rank=2):
    (params, running), parameters = values(net), spec.split(net.spec, net.spec)[0]
    return params, running, drawn_normal(lora.spec(parameters, is_matrix, rank))


def net_loss(net, running, x, key, form, train=True):
    return lambda params, adapters: scalar(net.apply(tree.merge(form(params, adapters, 0.5), running), x, key, train))


# Every net


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_unformed_weights_equal_merged_ones_in_every_net(net):
    params, running, adapters = adapters_of(net)
    x, key = batch(net, 3), random.key(2)
    before = tree.map(torch.clone, (params, adapters))
    losses = [net_loss(net, running, x, key, form) for form in (lora.adapted, lora.merge)]
    torch.testing.assert_close(losses[0](params, adapters), losses[1](params, adapters), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(losses[0](params, adapters), scalar(net.apply(tree.merge(params, running), x, key, True)))
    actual, expected = (grad(f, 1)(params, adapters) for f in losses)
    largest = max(float(g.abs().max()) for g in tree.leaves(expected))
    for (name, a), b in zip(tree.items(actual), tree.leaves(expected), strict=True):
        assert float((a - b).abs().max()) <= 1e-10 * largest, name
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), (params, adapters), before)


@pytest.mark.parametrize("name", ["mlp", "resnet", "mobilenet_v2", "vit", "dcgan generator", "unet", "gpt2"])
def test_many_adapters_in_one_batch_equal_one_by_one(name):
    net = NETS[name]
    params, running, _ = adapters_of(net)
    model = lora.spec(spec.split(net.spec, net.spec)[0], is_matrix, 2)
    three = [drawn_normal(model, random.key(i)) for i in range(3)]
    x, ids = batch(net, 4), torch.tensor([2, 0, 2, 1])

    def one(adapters, x):
        values = tree.merge(lora.adapted(params, adapters, 0.5), running)
        return tree.map(lambda y: y[0], net.apply(values, tree.map(lambda leaf: leaf[None], x), None, False))

    def loss(adapters, x):
        return scalar(tree.map(lambda y: y[None], one(adapters, x)))

    each = lora.choose(tree.stack(three), ids)
    together, gradients = vmap(one)(each, x), vmap(grad(loss))(each, x)
    for i, adapters in enumerate(tree.unstack(each)):
        example = tree.map(lambda leaf, i=i: leaf[i], x)
        tree.map(torch.testing.assert_close, tree.map(lambda y, i=i: y[i], together), one(adapters, example))
        tree.map(torch.testing.assert_close, tree.map(lambda g, i=i: g[i], gradients), grad(loss)(adapters, example))


SOME = ("mlp", "resnet", "gpt2", "dcgan generator", "sagan critic")


@pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.long) for n in PLAIN])
def test_reports_per_example_through_adapters_equal_vmap_of_grad(name):
    net = NETS[name]
    params, running, adapters = adapters_of(net)
    train = not net.mixes

    def loss(adapters, examples):
        merged = tree.merge(lora.adapted(params, adapters, 0.5), running)
        out = net.apply(merged, examples["x"], examples["key"], train)
        return vmap(lambda one: scalar(tree.map(lambda leaf: leaf[None], one)))(out)

    examples = {"key": one_key_each(4), "x": batch(net, 4)}
    norms = tree.map(lambda g: g.flatten(1).norm(dim=1), per_example.each(loss, adapters, examples))
    total = torch.stack(tree.leaves(norms)).square().sum(0).sqrt()
    for norm, expected in zip(
        tree.leaves(per_example.reports(loss, adapters, examples).norm), tree.leaves(norms), strict=True
    ):
        assert float((norm - expected).abs().max() / total.max()) <= 1e-10  # an empty text has none
    assert per_example.verify(loss, adapters, examples, examples=2) <= 1e-10


# mlp by default, those of SOME slow, all others long.
COMPILED = [
    pytest.param(n, marks=[] if n == "mlp" else pytest.mark.slow if n in SOME else pytest.mark.long) for n in PLAIN
]


@pytest.mark.parametrize("name", COMPILED)
def test_gradients_by_adapters_compile_to_one_graph(name):
    torch._dynamo.reset()
    net = NETS[name]
    params, running, adapters = tree.cast(adapters_of(net), torch.float32)
    counter = CompileCounterWithBackend("aot_eager")

    def gradients(adapters, x, key):
        return grad(net_loss(net, running, x, key, lora.adapted), 1)(params, adapters)

    compiled = torch.compile(gradients, backend=counter, fullgraph=True, dynamic=False)
    for seed in (1, 2):
        args = adapters, batch(net, 4, torch.float32, seed), random.key(seed)
        actual, expected = compiled(*args), gradients(*args)
        largest = max(float(g.abs().max()) for g in tree.leaves(expected))
        tree.map(lambda a, b, e=1e-5 * largest: torch.testing.assert_close(a, b, rtol=1e-4, atol=e), actual, expected)
    assert counter.frame_count == 1


# One layer

LAYERS = {
    "linear": (linear_spec(5, 6), linear, lambda n: (n, 4, 5)),
    "linear, no bias": (linear_spec(5, 6, bias=False), linear, lambda n: (n, 5)),
    "conv1d": (conv_spec(4, 6, 3, dims=1), conv, lambda n: (n, 4, 7)),
    "conv2d": (conv_spec(4, 6, 3), lambda p, x: conv(p, x, stride=2, padding=1), lambda n: (n, 4, 7, 7)),
    "conv, reflect": (
        conv_spec(4, 6, 3),
        lambda p, x: conv(p, x, padding=1, padding_mode="reflect"),
        lambda n: (n, 4, 7, 7),
    ),
    "conv, groups": (
        conv_spec(4, 6, 3, groups=2),
        lambda p, x: conv(p, x, groups=2, padding="same"),
        lambda n: (n, 4, 5, 5),
    ),
    "conv3d": (conv_spec(2, 3, 2, dims=3), conv, lambda n: (n, 2, 3, 3, 3)),
    "conv_transpose": (
        conv_spec(4, 6, 3, transposed=True),
        lambda p, x: conv_transpose(p, x, stride=2),
        lambda n: (n, 4, 5, 5),
    ),
    "conv_transpose, groups": (
        conv_spec(4, 6, 3, groups=2, transposed=True),
        lambda p, x: conv_transpose(p, x, groups=2, output_padding=1, stride=2),
        lambda n: (n, 4, 5, 5),
    ),
}
WITH_ROWS = [name for name in LAYERS if "transpose" not in name]


def layer(name, magnitudes=False, targets=("weight",)):
    model, f, shape = LAYERS[name]
    params = spec.init(KEY, model, torch.float64)
    adapters = drawn_normal(lora.spec(model, targets, 2, magnitudes=magnitudes), random.key(1))
    return params, adapters, f, random.normal(random.key(2), shape(3), torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_with_low_rank_equals_the_formed_weight(name):
    params, adapters, f, x = layer(name)
    a, b = adapters["weight"]["a"], adapters["weight"]["b"]
    formed = params["weight"] + 0.7 * torch.einsum("or,r...->o...", b, a)
    expected = f({**params, "weight": formed}, x)
    torch.testing.assert_close(f(lora.adapted(params, adapters, 0.7), x), expected)
    torch.testing.assert_close(lora.merge(params, adapters, 0.7)["weight"], formed)
    torch.testing.assert_close(lora.unmerge(lora.merge(params, adapters, 0.7), adapters, 0.7), params)
    assert not torch.allclose(expected, f(params, x))


@pytest.mark.parametrize("name", WITH_ROWS)
def test_dora_is_the_formed_weight_of_the_paper(name):
    params, adapters, f, x = layer(name, magnitudes=True)
    a, b, m = (adapters["weight"][key] for key in ("a", "b", "magnitude"))

    def formed(a, b, m):  # eq. 5, the norm constant in the gradient
        v = params["weight"] + 0.7 * torch.einsum("or,r...->o...", b, a)
        norm = v.detach().flatten(1).norm(dim=1)
        return v * (m / norm).reshape(-1, *(1,) * (v.ndim - 1))

    torch.testing.assert_close(lora.merge(params, adapters, 0.7)["weight"], formed(a, b, m))

    def loss(adapters):
        return f(lora.adapted(params, adapters, 0.7), x).sin().sum()

    def expected(adapters):
        own = adapters["weight"]
        return f({**params, "weight": formed(own["a"], own["b"], own["magnitude"])}, x).sin().sum()

    torch.testing.assert_close(loss(adapters), expected(adapters))
    tree.map(torch.testing.assert_close, grad(loss)(adapters), grad(expected)(adapters))
    with pytest.raises(ValueError, match="'weight' was merged with magnitudes"):
        lora.unmerge(params, adapters, 0.7)


def test_dora_starts_as_the_net_itself():
    model = linear_spec(5, 6)
    params = spec.init(KEY, model)
    adapters = lora.init(random.key(1), lora.spec(model, ["weight"], 2, magnitudes=True), params)
    torch.testing.assert_close(adapters["weight"]["magnitude"], params["weight"].norm(dim=1))
    torch.testing.assert_close(lora.merge(params, adapters, 2.0), params)


@pytest.mark.parametrize("magnitudes", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_blocks_of_rows_have_adapters_of_their_own(name, magnitudes):
    params, adapters, f, x = layer(name, magnitudes, {"weight": ((0, 2), (4, 6))})
    assert tree.names(adapters)[0] == "weight.from_0.a" and set(adapters["weight"]) == {"from_0", "from_4"}
    merged = lora.merge(params, adapters, 0.7)
    torch.testing.assert_close(f(lora.adapted(params, adapters, 0.7), x), f(merged, x))
    assert torch.equal(merged["weight"][2:4], params["weight"][2:4])
    for first in (0, 4):
        alone = {"weight": params["weight"][first : first + 2]}
        own = lora.merge(alone, {"weight": adapters["weight"][f"from_{first}"]}, 0.7)["weight"]
        torch.testing.assert_close(merged["weight"][first : first + 2], own)


def test_embedding_looks_up_and_a_tied_head_sees_the_same_weight():
    model = embedding_spec(7, 4, axes=("vocabulary", "embed"))
    params = spec.init(KEY, model, torch.float64)
    adapters = drawn_normal(lora.spec(model, ["weight"], 2), random.key(1))
    values, ids = lora.adapted(params, adapters, 0.7), torch.tensor([[1, 6, 1]])
    formed = lora.merge(params, adapters, 0.7)["weight"]
    torch.testing.assert_close(embedding(values, ids), formed[ids])
    torch.testing.assert_close(embedding(values, ids) @ values["weight"].T, formed[ids] @ formed.T)


def test_other_code_meets_the_formed_weight():
    weight = random.normal(KEY, (4, 3))
    low = LowRank(weight, {"a": random.normal(random.key(1), (2, 3)), "b": random.normal(random.key(2), (4, 2))}, 2.0)
    formed, x = low.dense(), torch.arange(3.0)
    assert (low.shape, low.ndim, low.dtype, low.device) == (weight.shape, 2, weight.dtype, weight.device)
    for actual, expected in (
        (low[1:], formed[1:]),
        (2 * low + low / 2, 2.5 * formed),
        (low @ x, formed @ x),
        (x * low, x * formed),
        (F.linear(x, low), F.linear(x, formed)),
        (torch.cat([low, low]), torch.cat([formed, formed])),
        (low.norm(), formed.norm()),
    ):
        torch.testing.assert_close(actual, expected)


def test_half_weights_are_adapted_in_float32():
    """The scale of a change below bfloat16's steps is kept in the products, and rounded once where it is merged."""
    model = linear_spec(64, 64, bias=False)
    params = spec.init(KEY, model, torch.bfloat16)
    adapters = tree.map(lambda p: 0.02 * p, drawn_normal(lora.spec(model, ["weight"], 4), dtype=torch.float32))
    x = random.normal(random.key(2), (8, 64)).to(torch.bfloat16)
    merged = lora.merge(params, adapters, 1.0)["weight"]
    a, b = adapters["weight"]["a"].double(), adapters["weight"]["b"].double()
    exact = params["weight"].double() + b @ a
    assert merged.dtype == torch.bfloat16
    assert (merged == exact.to(torch.bfloat16)).float().mean() > 0.999
    change = lora.adapted(params, adapters, 1.0)
    assert linear(change, x).dtype == torch.bfloat16
    wide = F.linear(x.double(), exact)
    error = (linear(change, x).double() - wide).abs().max() / wide.abs().max()
    assert error < 2**-7


# Initial values and scale


def test_adapters_start_as_peft_draws_them():
    model = {"table": embedding_spec(50, 400, axes=("vocabulary", "embed")), "up": linear_spec(400, 50)}
    adapters = spec.init(KEY, lora.spec(model, ["table.weight", "up.weight"], 8))
    a, table = adapters["up"]["weight"]["a"], adapters["table"]["weight"]["a"]
    assert a.shape == (8, 400) and adapters["up"]["weight"]["b"].shape == (50, 8)
    assert all(not adapters[key]["weight"]["b"].any() for key in adapters)
    assert 0.95 / 20 < float(a.abs().max()) <= 1 / 20  # kaiming_uniform(sqrt 5): 1 / sqrt(fan in)
    assert abs(float(table.std()) - 1) < 0.1
    params = spec.init(KEY, model)
    tree.map(torch.testing.assert_close, lora.merge(params, adapters, 2.0), params)


def test_an_output_layer_of_a_vocabulary_is_no_table():
    """It is a linear layer: its A is drawn as one's, and its magnitudes have a place."""
    model = llama.spec(llama.Config(50, 8, layers=1, heads=2, kv_heads=2, width=16, hidden=16))
    adapters = spec.init(KEY, lora.spec(model, ["output.weight", "tokens.weight"], 64))
    assert abs(float(adapters["tokens"]["weight"]["a"].std()) - 1) < 0.1
    assert float(adapters["output"]["weight"]["a"].abs().max()) <= 1 / 4
    assert "magnitude" in lora.spec(model, ["output.weight"], 2, magnitudes=True)["output"]["weight"]


def test_scale():
    assert lora.scale(16, 32) == 2 and lora.scale(16, 32, stabilised=True) == 8


def test_scale_may_be_a_tensor_per_adapter():
    params, adapters, f, x = layer("linear")
    stacked, scales = tree.stack([adapters, adapters]), torch.tensor([0.5, 2.0], dtype=torch.float64)
    both = vmap(lambda a, s: f(lora.adapted(params, a, s), x))(stacked, scales)
    for y, s in zip(both, (0.5, 2.0), strict=True):
        torch.testing.assert_close(y, f(lora.adapted(params, adapters, s), x))


# Errors

MODEL = {"attn": [{"k": linear_spec(4, 4), "q": linear_spec(4, 4)}], "norm": {"weight": spec.Param((4,))}}


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        (
            ["q.weight", "query.weight"],
            2,
            "'query.weight' is no parameter of the model; the closest are .*attn.0.q.weight",
        ),
        (["q"], 2, "'q' is no parameter of the model"),
        (["norm.weight"], 2, r"'norm.weight' of shape \(4,\) is no matrix"),
        ("q.weight", 2, r"expected a list of names, as in \['q.weight'\]"),
        (["q.weight"], 0, "rank is 0; expected at least 1"),
        ({"q.weight": ((0, 5),)}, 2, r"rows \[\(0, 5\)\] of 'attn.0.q.weight' are no blocks of its 4 rows"),
        ({"q.weight": ((0, 3), (2, 4))}, 2, "are no blocks"),
        ({"q.weight": ()}, 2, "are no blocks"),
        (lambda name, leaf: False, 2, "the predicate is true of no weight"),
    ],
)
def test_targets_that_are_not_there_are_named(targets, rank, message):
    with pytest.raises(ValueError, match=message) as error:
        lora.spec(MODEL, targets, rank)
    assert "\n" not in str(error.value)


def test_targets_are_ends_of_names_patterns_or_a_predicate():
    for targets in (["q.weight"], ["attn.0.q.weight"], ["*.q.weight"], lambda name, leaf: name.endswith("q.weight")):
        assert tree.names(lora.spec(MODEL, targets, 2)) == ["attn.0.q.weight.a", "attn.0.q.weight.b"]
    assert len(tree.names(lora.spec(MODEL, ["*.weight"][:0] + ["attn*weight"], 2))) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"attn": [{"v": a["attn"][0]["q"]}]}, "'attn.0.v', which the model has not"),
        (lambda a: {"attn": [a["attn"][0]] * 2}, "'attn.1', which the model has not"),
        (
            lambda a: {"attn": [{"q": {"weight": {"a": torch.ones(2, 4)}}}]},
            "of 'attn.0.q.weight' has 'a'; expected 'a' and",
        ),
        (lambda a: {"attn": [{"q": {"weight": torch.ones(4, 4)}}]}, "at 'attn.0.q.weight' expected an adapter"),
        (lambda a: tree.map(lambda x: torch.ones(3, 3), a), r"a \(3, 3\) and b \(3, 3\) do not fit the shape \(4, 4\)"),
    ],
)
def test_adapters_for_another_model_are_named(change, message):
    params, adapters = spec.init(KEY, MODEL), spec.init(KEY, lora.spec(MODEL, ["q.weight"], 2))
    for f in (lora.adapted, lora.merge, lora.unmerge):
        with pytest.raises(ValueError, match=message) as error:
            f(params, change(adapters), 1.0)
        assert "\n" not in str(error.value)


def test_magnitudes_have_no_place_in_embeddings_and_transposed_convolutions():
    with pytest.raises(ValueError, match="magnitudes"):
        lora.spec(embedding_spec(5, 4), ["weight"], 2, magnitudes=True)
    params, adapters, f, x = layer("conv_transpose", magnitudes=True)
    with pytest.raises(ValueError, match="magnitudes"):
        f(lora.adapted(params, adapters, 1.0), x)
