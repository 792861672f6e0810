"""DETR and its losses against transformers'."""

from dataclasses import replace

import pytest
import torch
import transformers

from core import random, spec, tree
from nets.blocks.residual_stages import Stages
from nets.dense import detr
from tests.nets.parity import randomise
from train.losses import matching

CONFIG = detr.Config(7, Stages((1, 1, 1, 1), width=8), queries=5, layers=2, heads=4, width=32, hidden=40, dropout=0.0)
LABELS = torch.tensor([[3, 0, 6], [2, -1, -1]])
FRAMES = torch.tensor(
    [
        [[0.3, 0.4, 0.2, 0.5], [0.6, 0.6, 0.3, 0.2], [0.5, 0.5, 1.0, 1.0]],
        [[0.2, 0.2, 0.1, 0.1], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
).double()


@pytest.fixture(scope="module")
def reference():
    """Without auxiliary losses: with them, transformers hands the normalised output of a layer on to the next one."""
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    sizes = {"d_model": 32, "num_queries": 5, "num_labels": 7}
    for stack in ("encoder", "decoder"):
        sizes |= {f"{stack}_layers": 2, f"{stack}_attention_heads": 4, f"{stack}_ffn_dim": 40}
    config = transformers.DetrConfig(use_timm_backbone=False, backbone_config=backbone, dropout=0.0, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise(transformers.DetrForObjectDetection(config))
    return model.double().eval()


@pytest.fixture(scope="module")
def params(reference):
    return tree.map(torch.Tensor.double, detr.from_published(reference.state_dict(), CONFIG))


def inputs():
    mask = torch.ones(2, 96, 128, dtype=torch.bool)
    mask[1, 64:], mask[1, :, 96:] = False, False
    return random.normal(random.key(0), (2, 3, 96, 128)).double() * mask[:, None], mask


def test_outputs_losses_and_gradients_equal_transformers(reference, params):
    images, mask = inputs()
    targets = [
        {"class_labels": kinds[kinds >= 0], "boxes": rows[kinds >= 0]}
        for kinds, rows in zip(LABELS, FRAMES, strict=True)
    ]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # that of the weights of its classes
    try:
        expected = reference(images, mask.long(), labels=targets)
    finally:
        torch.set_default_dtype(default)
    out = detr.apply(params, images, CONFIG, mask=mask)
    torch.testing.assert_close(out["logits"][:, -1], expected.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(out["boxes"][:, -1], expected.pred_boxes, rtol=0, atol=1e-11)

    def loss(params):
        out = detr.apply(params, images, CONFIG, mask=mask)
        return matching.detr_loss(out["logits"][:, -1:], out["boxes"][:, -1:], LABELS, FRAMES)

    grads, (value, parts) = torch.func.grad_and_value(loss, has_aux=True)(params)[0], loss(params)
    for ours, theirs in (("classes", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
        torch.testing.assert_close(parts[ours], expected.loss_dict[theirs], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(value, expected.loss, rtol=1e-6, atol=1e-9)
    expected.loss.backward()
    theirs, flat = dict(reference.named_parameters()), tree.flatten(grads)
    compared = 0
    for name, rename in detr.rename_table(CONFIG, "transformers").items():
        p = theirs.get(rename.theirs)
        if p is not None and p.grad is not None:
            scale = float(p.grad.abs().max().clamp(min=1e-3))
            torch.testing.assert_close(flat[name], p.grad, rtol=0, atol=1e-6 * scale, msg=name)
            compared += 1
    assert compared > 80


def test_count():
    """That of facebook/detr-resnet-50, in which the weights of norms are constants."""
    model = detr.spec(detr.PRESETS["resnet50"])
    params = tree.flatten(spec.split(model, spec.abstract(model))[0])
    frozen = [name for name in params if name.startswith("backbone.") and ".norm." in name]
    assert sum(leaf.numel() for name, leaf in params.items() if name not in frozen) == 41_524_768


def test_matching_under_transforms():
    logits, frames = random.normal(random.key(1), (6, 2, 5, 8)), random.uniform(random.key(2), (6, 2, 5, 4))
    each = torch.stack([matching.matching(a, b, LABELS, FRAMES.float()) for a, b in zip(logits, frames, strict=True)])
    mapped = torch.vmap(lambda a, b: matching.matching(a, b, LABELS, FRAMES.float()))(logits, frames)
    assert torch.equal(mapped, each) and (each[:, 1, 1:] == -1).all() and (each[:, 0] >= 0).all()

    def gradient(logits, frames):
        return torch.func.grad(lambda a: matching.detr_loss(a[:, None], frames[:, None], LABELS, FRAMES.float())[0])(
            logits
        )

    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(logits[0], frames[0]), gradient(logits[0], frames[0]))


def test_more_objects_than_queries_and_none():
    logits, frames = random.normal(random.key(1), (1, 2, 8)), random.uniform(random.key(2), (1, 2, 4))
    match = matching.matching(logits, frames, LABELS[:1], FRAMES[:1].float())
    assert sorted(match[0].tolist())[0] == -1 and set(match[0].tolist()) == {-1, 0, 1}
    losses = matching.set_losses(logits, frames, torch.full((1, 3), -1), FRAMES[:1].float())
    assert losses["l1"] == 0 and losses["giou"] == 0 and losses["classes"] > 0


def test_every_layer_counts():
    logits, frames = random.normal(random.key(1), (2, 3, 5, 8)), random.uniform(random.key(2), (2, 3, 5, 4))
    total, parts = matching.detr_loss(logits, frames, LABELS, FRAMES.float())
    each = [matching.detr_loss(logits[:, [i]], frames[:, [i]], LABELS, FRAMES.float()) for i in range(3)]
    torch.testing.assert_close(total, sum(value for value, _ in each))
    assert parts == each[-1][1]


def test_costs_that_are_not_finite_are_the_last_choice():
    cost = torch.tensor([[[torch.nan, 1.0], [2.0, 3.0], [torch.inf, 4.0]]])
    assert matching.assign(cost, torch.ones(1, 2, dtype=torch.bool)).tolist() == [[1, 0]]


def test_dropout_needs_a_key():
    cfg = replace(CONFIG, dropout=0.1)
    values = spec.init(random.key(0), detr.spec(cfg))
    with pytest.raises(ValueError, match="dropout 0.1 draws random numbers; pass key="):
        detr.apply(values, torch.zeros(1, 3, 64, 64), cfg, train=True)
