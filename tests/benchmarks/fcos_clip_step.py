"""The compiled train step of FCOS or CLIP beside the same nn.Module under torch.compile with fused AdamW.

FCOS on a ResNet-18, 256 x 256, batch 8, beside torchvision's backbone, pyramid and head; CLIP with a small ViT (4
layers, 256 wide, 64 x 64) beside transformers'. Both start from the same weights and minimise the same loss; the losses
of three steps must agree.

    python tests/benchmarks/fcos_clip_step.py [--net fcos|clip] [--side 256] [--batch 8] [--rounds 9] [--threads 2]
        [--no-compile]
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import torchvision_operators  # noqa: F401
from timing import interleaved, report
from torch import Tensor, nn

from core import random, tree
from nets.blocks.residual_stages import Stages
from nets.dense import fcos
from nets.multimodal import clip, clip_weights
from nets.weights import fill
from train import optimizers
from train.losses import detection
from train.losses.contrastive import in_batch_negatives
from train.step import make_step, start

RATE = 1e-4


def fcos_case(args: argparse.Namespace) -> tuple:
    """(params, spec, loss of params and batch, module that returns the loss, batch)."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    cfg = replace(fcos.PRESETS["resnet50"], classes=10, backbone=Stages(), offset=0.0)
    options = {"returned_layers": [2, 3, 4], "trainable_layers": 5, "norm_layer": nn.BatchNorm2d}
    extra = LastLevelP6P7(256, 256)
    model = FCOS(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None, extra_blocks=extra, **options), cfg.classes
    )
    params = fcos.from_published(model.state_dict(), cfg)
    images = random.normal(random.key(0), (args.batch, 3, args.side, args.side))
    corners = random.uniform(random.key(1), (args.batch, 6, 2)) * args.side / 2
    frames = torch.cat((corners, corners + args.side / 4), -1)
    labels = random.randint(random.key(2), (args.batch, 6), 0, cfg.classes).long()
    at = fcos.places(cfg, args.side, args.side)

    def of_outputs(logits: Tensor, distances: Tensor, centreness: Tensor) -> Tensor:
        targets = detection.fcos_targets(frames, labels, at.centres, at.strides)
        return detection.fcos_losses(logits, fcos.decode(distances, at), centreness, targets)[0]

    def loss(params, batch, keys):
        out = fcos.apply(params, batch[0], cfg, train=True)
        return of_outputs(out["logits"], out["distances"], out["centreness"])

    def module_loss():
        out = model.head(list(model.backbone(images).values()))
        return of_outputs(out["cls_logits"], out["bbox_regression"], out["bbox_ctrness"][..., 0]).mean

    return params, fcos.spec(cfg), loss, model, module_loss, (images,)


def clip_case(args: argparse.Namespace) -> tuple:
    import transformers

    side, length = args.side // 4, 32
    tower = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = tower | {"vocab_size": 4000, "max_position_embeddings": length, "eos_token_id": 3999, "bos_token_id": 3998}
    image = tower | {"image_size": side, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=128)
    model = transformers.CLIPModel(config)
    cfg = clip.Config(
        embedding=128, image=side, patch=8, image_layers=4, image_heads=4, image_width=256, vocabulary=4000,
        context=length, text_layers=4, text_heads=4, text_width=256, end_id=3999,
    )  # fmt: skip
    params = fill(clip.spec(cfg), model.state_dict(), clip_weights.transformers_table(cfg))
    images = random.normal(random.key(0), (args.batch, 3, side, side))
    tokens = random.randint(random.key(1), (args.batch, length), 0, 3998).long()
    tokens[:, -1] = 3999

    def loss(params, batch, keys):
        out = clip.apply(params, batch, cfg, train=True)
        return in_batch_negatives(out["image"], out["text"], scale=params["scale"].exp()).mean()

    def module_loss():
        logits = model(input_ids=tokens, pixel_values=images).logits_per_image
        targets = torch.arange(len(logits))
        return (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.T, targets)) / 2

    return params, clip.spec(cfg), loss, model, module_loss, (images, tokens)


def functree_step(params, model, loss, batch, compile: bool):
    optimizer = optimizers.adamw(RATE, weight_decay=0.01)
    state = start(random.key(1), tree.map(torch.clone, params), model, optimizer)
    train = make_step(loss, optimizer, donate=True, update_norm=False, compile=compile)

    def step():
        nonlocal state
        state, metrics = train(state, batch)
        return metrics["loss"]

    return step


def module_step(module: nn.Module, loss: Callable[[], Tensor], compile: bool):
    optimizer = torch.optim.AdamW(module.parameters(), RATE, weight_decay=0.01, fused=True)
    compiled = torch.compile(loss, dynamic=False) if compile else loss

    def step():
        value = compiled()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=("fcos", "clip"), default="fcos")
    for name, default in (("side", 256), ("batch", 0), ("rounds", 9), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    args.batch = args.batch or {"fcos": 8, "clip": 64}[args.net]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    params, model, loss, module, module_loss, batch = {"fcos": fcos_case, "clip": clip_case}[args.net](args)
    steps = {
        "functree": functree_step(params, model, loss, batch, args.compile),
        "nn.Module": module_step(module.train(), module_loss, args.compile),
    }
    values = {name: [float(step()) for _ in range(3)] for name, step in steps.items()}
    print("losses of 3 steps:", values)
    for ours, theirs in zip(*values.values(), strict=True):
        assert abs(ours - theirs) < 1e-3 * abs(theirs), values
    report(
        f"one train step of {args.net}, batch {args.batch}",
        interleaved(steps, args.rounds),
        "functree",
        {"nn.Module": 0.95},
    )


if __name__ == "__main__":
    main()
