"""Training of nets that enlarge pictures: batches, objectives, optimizers; SRGAN's game."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from core import spec, tree
from experiments.parts import classifier as classifiers
from experiments.parts.upscaler import Upscaler
from nets.classifiers import vgg
from nets.superresolution import by_name, drcn, srgan
from nets.weights import listing
from train import losses, optimizers
from train.adversarial import step as games
from train.adversarial.objectives import NON_SATURATING
from train.data.images import patches, resize
from train.optimizers import Optimizer, schedules
from train.scale.distributed import Distributed
from train.step import Policy, TrainState, create, make_step

LOSSES = {"mse": losses.mse, "l1": losses.l1, "charbonnier": losses.charbonnier}
VGG_SCALE = 1 / 12.75
"""Factor on the feature maps of VGG-19, whose squared error is then of the size of the pixels' (section 3.2)."""


def batch_at(
    key: Tensor, step: int, args: Any, high: Sequence[Tensor], low: Mapping[int, Sequence[Tensor]]
) -> dict[str, Tensor]:
    """The batch of a step: `small`, `bicubic`, `high`, and for DRCN `share`, the weight of its single predictions.

    Of several scales each has its turn.

    Args:
        args: those of superres.py.
        high: pictures (channels, height, width) of bytes.
        low: {scale: their `patches.lowered_all`}.
    """
    scale = args.scale[step % len(args.scale)]
    small, large = patches.batch_at(key, step, args.batch, args.patch, scale, high, low[scale])
    batch = {"bicubic": resize.enlarged(small, scale), "high": large, "small": small}
    if by_name.PRESETS[args.net] is drcn:
        batch["share"] = torch.full((args.batch,), max(0.0, 1 - 2 * step / args.steps))  # 0 from half of the steps on
    return batch


def inner(x: Tensor, scale: int) -> Tensor:
    """The patches without the pixels whose bicubic enlargement is another than in the whole picture."""
    border = resize.REACH * scale
    return x[..., border:-border, border:-border]


def objective(net: ModuleType, cfg: Any, loss: str, residual: bool) -> Callable:
    """Loss per example of a batch, as `train.step.make_step` takes it."""

    def error(out: Tensor, batch: dict, scale: int) -> Tensor:
        return LOSSES[loss](inner(out, scale), inner(batch["high"], scale), reduction="none").flatten(1).mean(1)

    def f(params: tree.Tree, batch: dict, keys: Tensor) -> tuple[Tensor, dict]:
        scale = batch["high"].shape[-1] // batch["small"].shape[-1]
        if net is drcn:
            each = drcn.predictions(params, batch["bicubic"], cfg)  # (examples, recursions, 1, patch, patch)
            out, share = drcn.averaged(params, each), batch["share"]
            single = torch.stack([error(y, batch, scale) for y in each.unbind(1)]).mean(0)
            value = share * single + (1 - share) * error(out, batch, scale)
        else:
            both = batch["small"], batch["bicubic"]
            out = by_name.enlarge(net, params, cfg, *both, scale, residual=residual, train=True)
            value = error(out, batch, scale)
        mse = (inner(out, scale) - inner(batch["high"], scale)).detach().float().square().mean()
        return value, {"mse": mse}

    return f


def optimizer_of(args: Any) -> Optimizer:
    """Adam or SGD with momentum and weight decay, its rate falling along a cosine, and the clipping by its name.

    adjustable: each value of the gradient within limit / rate (Kim et al. 2016, section 3.2), that is rate * gradient
    within the limit, before the momentum. norm: the gradient's norm within the limit.

    Raises ValueError: adjustable clipping of Adam, whose steps do not grow with the gradient.
    """
    rate = schedules.warmup_cosine(args.learning_rate, args.steps // 50, args.steps)
    norm = [optimizers.clip_by_global_norm(args.clip)] if args.clip and args.clipping == "norm" else []
    if args.optimizer == "adam":
        if args.clipping == "adjustable":
            raise ValueError("--clipping adjustable is for --optimizer sgd; expected norm")
        return optimizers.chain(*norm, optimizers.adam(rate))
    decay = optimizers.add_decayed_weights(args.weight_decay)
    value = [optimizers.clip_by_value(args.clip)] if args.clip and args.clipping == "adjustable" else []
    return optimizers.chain(*norm, decay, optimizers.scale_by_learning_rate(rate), *value, optimizers.trace(0.9))


def content(source: Path | None, stage: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Feature maps phi of images (batch, 3, height, width) in [0, 1], whose squared error is SRGAN's content loss.

    Args:
        source: a run of classify.py with a VGG; "published" (VGG-19 by download) or its file; None for the pixels.
        stage: its stage, counted from 1.

    Raises ValueError: another net, or one without that stage.
    """
    if source is None:
        return lambda x: x
    if not source.exists() and str(source) != "published":
        raise ValueError(f"--classifier '{source}' does not exist; expected a run of classify.py, or published")
    is_run = classifiers.is_run(source)
    trained, values = classifiers.load(source) if is_run else classifiers.published(str(source), "vgg19")
    net, cfg = classifiers.net_of(trained)
    if net is not vgg or trained.channels != 3:
        raise ValueError(
            f"--classifier '{source}' is a {trained.net} of {trained.channels} channels; expected a VGG of 3"
        )
    if stage > len(cfg.stages):
        raise ValueError(f"--content-stage is {stage}; {trained.net} has {len(cfg.stages)} stages")
    values = tree.move(values, device)

    def phi(x: Tensor) -> Tensor:
        maps = vgg.feature_maps(values, classifiers.normalised(x, trained), cfg)
        return VGG_SCALE * maps[stage - 1]

    return phi


def game(
    cfg: srgan.Config, phi: Callable[[Tensor], Tensor], weight: float, residual: bool
) -> tuple[Callable, Callable]:
    """Losses of SRGAN's critic and generator, as `train.adversarial.step.make_step` takes them.

    weight: of the adversarial loss, 1e-3 in the paper.
    """

    def generated(params: tree.Tree, batch: dict) -> Tensor:
        both = batch["small"], batch["bicubic"]
        return by_name.enlarge(srgan, params, cfg, *both, cfg.scale, residual=residual, train=True)

    def scores(params: tree.Tree, images: Tensor) -> Tensor:
        return srgan.critic(params, images, cfg, train=True)

    def critic_loss(own, other, batch, key, memory):
        real, fake = scores(own, batch["high"]), scores(own, generated(other, batch))
        return NON_SATURATING.critic(real, fake), ({"real": real.mean().detach(), "fake": fake.mean().detach()}, memory)

    def generator_loss(own, other, batch, key, memory):
        fake = generated(own, batch)
        distance = losses.mse(phi(fake), phi(batch["high"]))  # E|phi(y) - phi(G(x))|²
        adversarial = NON_SATURATING.generator(scores(other, fake))  # E[-log D(G(x))]
        metrics = {"content": distance.detach(), "adversarial": adversarial.detach()}
        return distance + weight * adversarial, (metrics, memory)

    return critic_loss, generator_loss


def check(args: Any) -> None:
    """Raise ValueError unless patches of `--patch` pixels can be lowered by all scales, and have an inner part."""
    for scale in args.scale:
        if args.patch % scale:
            raise ValueError(f"--patch is {args.patch}; expected a multiple of the scale {scale}")
        if args.patch <= (least := 2 * resize.REACH * scale):
            raise ValueError(f"--patch is {args.patch}; expected more than {least} for the scale {scale}")


def beginning(
    args: Any,
    net: ModuleType,
    cfg: Any,
    key: Tensor,
    policy: Policy,
    phi: Callable[[Tensor], Tensor] | None,
    start: Upscaler | None,
) -> tuple[tree.Tree, Callable]:
    """(the state before the first step; from `Run.distributed` to the step).

    Args:
        phi: with SRGAN, of `content`; the state is then of both players.
        start: the net whose values the state begins with.
    """
    options = {"policy": policy, "compile": args.common.compile}
    if phi is None:
        optimizer = optimizer_of(args)
        state = create(key, net.spec(cfg), optimizer)
        loss = objective(net, cfg, args.loss, args.residual)

        def step_of(distributed: Distributed | None) -> Callable:
            return make_step(loss, optimizer, donate=True, distributed=distributed, **options)

        return state if start is None else _from(state, net.spec(cfg), cfg, start), step_of
    both = optimizer_of(args), optimizer_of(args)
    state = games.create(key, net.critic_spec(cfg), net.spec(cfg), *both)
    if start is not None:
        state = state._replace(generator=_from(state.generator, net.spec(cfg), cfg, start))
    step = games.make_step(*game(cfg, phi, args.adversarial, args.residual), *both, **options)
    return state, lambda _: step


def _from(state: TrainState, model: tree.Tree, cfg: Any, start: Upscaler) -> TrainState:
    """The state with the values of a net that differs in its scale at most; its leaves of other shapes are left out,
    which is said.

    Raises ValueError: it differs in more.
    """
    sizes, others = (
        {k: v for k, v in vars(c).items() if k not in ("scale", "scales", "size")} for c in (cfg, start.cfg)
    )
    if sizes != others:
        raise ValueError(f"--weights: the net there is {start.cfg}, expected {cfg}, perhaps of another scale")
    own, theirs = tree.flatten(tree.merge(state.params, state.stats)), tree.flatten(start.values)
    same = {name for name, x in own.items() if name in theirs and theirs[name].shape == x.shape}
    if anew := [name for name in own if name not in same]:
        print(f"--weights, a {start.name}: of other shapes, and so drawn anew: {listing(anew)}")
    values = {name: theirs[name].to(x.device) if name in same else x for name, x in own.items()}
    params, stats = spec.split(model, tree.sort(tree.nest(values, like=model)))
    return state._replace(params=params, stats=stats)
