"""Lifted transformers: tied weights, reports per example, and attention in eval mode."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from core import tree
from core.lift import lift
from core.per_example import reports
from tests.core.test_lift import F64, by_hand, compiled


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    config.embd_pdrop = config.resid_pdrop = config.attn_pdrop = 0.0
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config).double()


IDS = torch.tensor([[1, 4, 2, 9, 16], [3, 3, 0, 5, 8]])


def gpt2_loss(values, ids, apply, train=False):
    logits = apply(values, ids, train=train, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow), "train"])
def test_tied_transformer_has_the_modules_gradient(gpt2, mode):
    params, stats, apply = lift(gpt2)
    names = tree.names(params)
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names and not tree.leaves(stats)
    f = grad(lambda p, ids: gpt2_loss(p, ids, apply, mode == "train"))
    gradient = (compiled(f) if mode == "compiled" else f)(params, IDS)
    logits = gpt2(IDS, use_cache=False).logits
    gpt2.zero_grad()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    assert len(names) == len(list(gpt2.parameters()))
    for name, p in gpt2.named_parameters():
        torch.testing.assert_close(tree.get(gradient, name), p.grad, msg=name)
    gpt2.zero_grad()


def test_tied_transformer_per_example(gpt2):
    params, _, apply = lift(gpt2)
    each = vmap(grad(lambda p, ids: gpt2_loss(p, ids[None], apply)), in_dims=(None, 0))(params, IDS)
    batch = grad(lambda p: gpt2_loss(p, IDS, apply))(params)
    torch.testing.assert_close(tree.map(lambda x: x.mean(0), each), batch)


def test_reports_per_example_of_a_tied_transformer(gpt2):
    params, _, apply = lift(gpt2)

    def loss(p, ids):
        logits = apply(p, ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1)

    out = reports(loss, params, IDS)
    torch.testing.assert_close(out.norm, tree.sort(by_hand(loss, params, IDS)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.sum, grad(lambda p: loss(p, IDS).sum())(params))


class Attention(nn.Module):
    """Self-attention and its weights, or None in their place."""

    def __init__(self, need_weights):
        super().__init__()
        self.inner, self.need_weights = nn.MultiheadAttention(4, 2, batch_first=True), need_weights

    def forward(self, x):
        return self.inner(x, x, x, need_weights=self.need_weights)


ATTENDING = {
    "layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
    "layer, norm first": lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True, norm_first=True),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 2, enable_nested_tensor=False
    ),
    "attention": lambda: Attention(True),
    "attention without weights": lambda: Attention(False),
}


@pytest.mark.parametrize("name", ATTENDING)
def test_attention_in_eval_mode(name):
    """torch's kernels for inference have no derivative: they are off inside the call, and only there."""
    torch.manual_seed(0)
    module = ATTENDING[name]().double().eval()
    params, _, apply = lift(module)
    x = torch.randn(3, 5, 4, dtype=F64, generator=torch.Generator().manual_seed(0))

    def loss(p, x):
        out = apply(p, x)
        return (out[0] if isinstance(out, tuple) else out).sin().sum((1, 2))

    out = reports(loss, params, x)
    torch.testing.assert_close(out.norm, tree.sort(by_hand(loss, params, x)), rtol=1e-9, atol=1e-12)
    assert torch.backends.mha.get_fastpath_enabled()
    torch.testing.assert_close(vmap(lambda x: loss(params, x[None])[0])(x), loss(params, x))
    module.train()
    y = module(x)
    loss_of_module = (y[0] if isinstance(y, tuple) else y).sin().sum()
    gradients = torch.autograd.grad(loss_of_module, list(module.parameters()))
    for (parameter, _), g in zip(module.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(tree.get(out.sum, parameter), g, rtol=1e-7, atol=1e-9)


def test_compiled_attention_in_eval_mode():
    params, _, apply = lift(ATTENDING["attention without weights"]().double().eval())
    x = torch.randn(3, 5, 4, dtype=F64, generator=torch.Generator().manual_seed(0))

    def loss(p, x):
        return apply(p, x)[0].sin().sum((1, 2))

    f = grad(lambda p: loss(p, x).sum())
    torch.testing.assert_close(compiled(f)(params), f(params))
    assert torch.backends.mha.get_fastpath_enabled()
