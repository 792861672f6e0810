"""FCOS and its losses against torchvision's."""

from dataclasses import replace

import pytest
import torch

from core import boxes, random, spec, tree
from nets.blocks.residual_stages import Stages
from nets.dense import fcos
from tests.nets.parity import randomise
from train.compiled import compiled
from train.losses import detection

models = pytest.importorskip("torchvision.models.detection", exc_type=ImportError)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelP6P7  # noqa: E402

CONFIG = replace(fcos.PRESETS["resnet50"], classes=5, backbone=Stages(), offset=0.0)


@pytest.fixture(scope="module")
def reference():
    """torchvision's FCOS on a ResNet-18, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"returned_layers": [2, 3, 4], "trainable_layers": 5, "norm_layer": torch.nn.BatchNorm2d}
        backbone = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, extra_blocks=LastLevelP6P7(256, 256), **options
        )
        model = models.FCOS(backbone, 5, score_thresh=0.01)
        for p in model.head.parameters():
            p.data += 0.02 * torch.randn_like(p)
    return randomise(model).double().eval()


def test_detections_equal_torchvision(reference, monkeypatch):
    """Its suppression is a compiled operation that is not everywhere; ours takes its place."""
    from torchvision.ops import boxes as box_ops

    monkeypatch.setattr(box_ops, "batched_nms", boxes.suppress)
    params = tree.map(torch.Tensor.double, fcos.from_published(reference.state_dict(), CONFIG))
    images = random.normal(random.key(0), (2, 3, 128, 128)).double()
    with torch.no_grad():
        levels = list(reference.backbone(images).values())
        sizes = [x.shape[2] * x.shape[3] for x in levels]
        outputs = {name: list(x.split(sizes, 1)) for name, x in reference.head(levels).items()}
        anchors = reference.anchor_generator(ImageList(images, [(128, 128)] * 2), levels)
        split = [list(one.double().split(sizes)) for one in anchors]
        expected = reference.postprocess_detections(outputs, split, [(128, 128)] * 2)
    out = fcos.detect(params, images, CONFIG, score=reference.score_thresh, threshold=reference.nms_thresh)
    assert all(len(one.labels) == 100 for one in out)
    for ours, theirs in zip(out, expected, strict=True):
        assert torch.equal(ours.labels, theirs["labels"])
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=1e-9, atol=0)
        torch.testing.assert_close(ours.boxes, theirs["boxes"], rtol=1e-6, atol=1e-4)


def test_names_and_counts(reference):
    params = fcos.from_published(reference.state_dict(), CONFIG)
    assert tree.count(spec.split(fcos.spec(CONFIG), params)[0]) == sum(p.numel() for p in reference.parameters())


def test_outputs_losses_and_gradients_equal_torchvision(reference):
    params = tree.map(torch.Tensor.double, fcos.from_published(reference.state_dict(), CONFIG))
    images = random.normal(random.key(0), (2, 3, 128, 128)).double()
    levels = list(reference.backbone(images).values())
    expected = reference.head(levels)
    out = fcos.apply(params, images, CONFIG)
    for ours, theirs in (("logits", "cls_logits"), ("distances", "bbox_regression")):
        torch.testing.assert_close(out[ours], expected[theirs], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out["centreness"], expected["bbox_ctrness"][..., 0], rtol=1e-10, atol=1e-10)

    anchors = reference.anchor_generator(ImageList(images, [(128, 128)] * 2), levels)
    at = fcos.places(CONFIG, 128, 128)
    centres = (anchors[0][:, :2] + anchors[0][:, 2:]) / 2
    torch.testing.assert_close(at.centres, centres.float())

    frames = torch.tensor(
        [
            [[10.0, 20, 90, 100], [30, 30, 60, 60], [0, 0, 127, 127], [100, 100, 100, 120]],
            [[5, 5, 40, 25], [20, 10, 120, 60], [0, 0, 0, 0], [0, 0, 0, 0]],
        ]
    ).double()
    labels = torch.tensor([[1, 4, 0, 2], [3, 2, -1, -1]])
    targets = [
        {"boxes": rows[usable], "labels": kinds[usable]}
        for rows, kinds in zip(frames, labels, strict=True)
        for usable in [(kinds >= 0) & (rows[:, 2] > rows[:, 0])]
    ]
    sizes = [x.shape[2] * x.shape[3] for x in levels]
    theirs = reference.compute_loss(targets, expected, anchors, sizes)

    def loss(params):
        out = fcos.apply(params, images, CONFIG)
        to_predict = detection.fcos_targets(frames, labels, at.centres.double(), at.strides.double())
        exact = fcos.Places(at.centres.double(), at.strides.double(), at.levels)
        predicted = fcos.decode(out["distances"], exact)
        value, metrics = detection.fcos_losses(out["logits"], predicted, out["centreness"], to_predict)
        return value.mean, {name: metric.mean for name, metric in metrics.items()}

    grads, means = torch.func.grad(loss, has_aux=True)(params)
    for ours, name in (("boxes", "bbox_regression"), ("centreness", "bbox_ctrness"), ("classes", "classification")):
        torch.testing.assert_close(means[ours], theirs[name], rtol=1e-7, atol=1e-9)
    sum(theirs.values()).backward()
    flat = tree.flatten(grads)
    for name, rename in fcos.rename_table(CONFIG).items():
        p = dict(reference.named_parameters()).get(rename.theirs)
        if p is not None:
            scale = float(p.grad.abs().max().clamp(min=1e-3))
            torch.testing.assert_close(flat[name], p.grad, rtol=0, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("preset", ["small", "medium"])
def test_every_side_learns_from_the_first_step(preset):
    """A side whose distances are all cut off by their relu would stay at 0."""
    cfg = replace(fcos.PRESETS[preset], classes=3)
    params = spec.init(random.key(0), fcos.spec(cfg))
    images = random.normal(random.key(1), (2, 3, 64, 64))
    assert (fcos.apply(params, images, cfg)["distances"] > 0).all()


@pytest.mark.slow
def test_compiled_by_inductor_has_the_same_gradients():
    """With `F.interpolate` in the pyramid, inductor lost three quarters of the gradient of the coarser levels."""
    cfg = replace(
        CONFIG, classes=3, backbone=Stages((1, 1, 1, 1), width=16), convolutions=1, width=16, groups=4, extra=0
    )
    params, stats = spec.split(fcos.spec(cfg), spec.init(random.key(0), fcos.spec(cfg)))
    images = random.normal(random.key(1), (2, 3, 128, 128))

    def loss(params):
        return fcos.apply(tree.merge(params, stats), images, cfg)["logits"].square().mean()

    gradient = torch.func.grad(loss)
    for (name, actual), expected in zip(
        tree.items(compiled(gradient)(params)), tree.leaves(gradient(params)), strict=True
    ):
        # Another order of sums; a gradient that is lost is off by its own size.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()) + 1e-12, msg=name)
