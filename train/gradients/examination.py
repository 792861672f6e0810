"""The gradient of every example of a data set at one model: what `experiments/examine.py` reports on.

    out = examine(loss, params, data, 64, folder=folder)
    out.scores["self_influence"]  # (N,)
    out.neighbours.indices  # (N, k)

Two passes over the data in bounded memory. The first adds up the mean gradient, as training does. The second has, of
each batch, `core.per_example.reports` (losses, norms of all parameters, products with the mean gradient: exact) and
sketches of the gradients, from which self-influence and neighbours are estimated. It holds the parameters, a Hash of
12 bytes for each of their entries, up to `GRADIENTS` bytes of gradients of examples, and the kept rows: in files,
where there is a folder.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from core import per_example, random, scores, sketches, tree
from core.scores import noise
from core.scores.sketched import Neighbours, sketched_neighbours, sketched_self_influence
from core.transforms import grad
from core.tree import Tree
from train.data.batching import evaluation_batches
from train.files import replacing
from train.gradients.stream import Progress, interruptible, stream

GRADIENTS = 2**26
"""Bytes of gradients of examples that are formed at once."""
PAIRS = 8
"""Pairs whose exact products are computed at once."""

Loss = Callable[[Tree, Tree], tuple[Tensor, dict[str, Tensor]]]


class Pair(NamedTuple):
    """Two examples and the exact cosine of their gradients."""

    first: int
    second: int
    cosine: float


class Examination(NamedTuple):
    """The gradients of N examples.

    Attributes:
        scores: {name: (N,) float64}: loss, norm, cosine (with the mean gradient), self_influence; with logits and
            labels also el2n.
        layers: (N, parameters), |g_n| of each parameter by itself; `names` are theirs.
        log_probs: (N, classes), or None where the loss has no logits.
        neighbours: by sketches, as are their cosines.
        redundant: pairs of examples whose gradients are alike, by the exact cosine.
        conflicting: pairs whose gradients oppose each other, likewise.
        noise_scale: B = tr Σ / |G|², in examples; infinite where |G|² is not told from 0.
        layer_noise: the same of each parameter, (parameters,).
        mean_norm: |mean gradient|.
        sketches: (N, size), of the gradients.
    """

    scores: dict[str, np.ndarray]
    layers: np.ndarray
    names: list[str]
    log_probs: Tensor | None
    neighbours: Neighbours
    redundant: list[Pair]
    conflicting: list[Pair]
    noise_scale: float
    layer_noise: np.ndarray
    mean_norm: float
    sketches: np.ndarray


def examine(
    loss: Loss,
    params: Tree,
    data: Tree,
    batch: int,
    *,
    labels: Tensor | None = None,
    size: int = 512,
    neighbours: int = 10,
    pairs: int = 20,
    damping: float = 0.1,
    key: Tensor | None = None,
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    identity: dict[str, Any] | None = None,
) -> Examination:
    """Examine the gradients of all examples.

    Args:
        loss: `loss(params, batch) -> (losses (N,), {"logits": (N, classes)} or {})`, without dropout.
        params: a tree of floating-point tensors; what else the loss uses is not reported on.
        data: a tree of tensors with leading axis `examples`, such as memory maps.
        batch: examples at a time.
        labels: (examples,), for EL2N.
        size: of a sketch.
        neighbours, pairs, damping: as in `core.scores.sketched`.
        key: of the sketches, (2,).
        folder, resume, identity: as in `train.gradients.stream.stream`.

    Raises:
        ValueError: fewer than two examples; PerExampleError, as `core.per_example.reports`; as `stream`.
    """
    path, count = None if folder is None else Path(folder), len(tree.leaves(data)[0])
    if count < 2:
        raise ValueError(f"expected at least two examples to examine, found {count}")
    params, batch = tree.sort(params), min(batch, count)
    device = tree.leaves(params)[0].device
    first = on(device, tree.map(lambda x: x[:batch], data))
    options = {"want": ("norm", "dot"), "has_aux": True}
    plan = per_example.plan(loss, params, first, **options)  # before anything long begins
    hashes = sketches.hashes(random.key(0) if key is None else key, params, size)
    mean = _mean_gradient(loss, params, data, batch, path)
    chunk = max(1, min(batch, GRADIENTS // (4 * tree.count(params))))

    mapped = _maps(loss, params, first)

    def values(part: Tree) -> dict[str, Tensor]:
        part = on(device, part)
        out = per_example.reports(loss, params, part, direction=mean, plan=plan, **options)
        rows = {"loss": out.losses, "norm": out.total_norm, "dot": out.total_dot}
        rows["layers"] = torch.stack(tree.leaves(out.norm), 1)  # (batch, parameters)
        rows["sketch"] = sketched(loss, params, part, hashes, size, chunk if mapped else None)
        if "logits" in out.aux:
            rows["log_probs"] = out.aux["logits"].float().log_softmax(-1)
        return rows

    keep = ["loss", "norm", "dot", "layers", "sketch"] + ["log_probs"] * _has_logits(loss, params, first)
    settings = {"folder": path, "resume": resume, "identity": {**(identity or {}), "size": size}}
    columns = stream(values, data, batch, keep=keep, title="gradients", **settings).kept
    return _scored(loss, params, data, columns, mean, labels, (neighbours, pairs, damping))


def on(device: torch.device, part: Tree) -> Tree:
    """A batch on a device; a copy where it would be memory that cannot be written."""
    return tree.map(lambda x: x.to(device), part)


def sketched(loss: Loss, params: Tree, batch: Tree, hashes: Tree, size: int, chunk: int | None) -> Tensor:
    """The sketches (N, size) of the gradients of a batch: of `chunk` examples at once, or None for one after the
    other, as a module that looks at values needs it."""

    def losses(params: Tree, part: Tree) -> Tensor:
        return loss(params, part)[0]

    if chunk is not None:
        return sketches.gradient_sketches(losses, params, batch, hashes, size, chunk=chunk)
    slope = grad(lambda p, part: losses(p, part).sum())
    ones = zip(*(x.split(1) for x in tree.leaves(batch)), strict=True)
    return torch.stack([sketches.sketch(hashes, slope(params, tree.unflatten(batch, one)), size) for one in ones])


def _maps(loss: Loss, params: Tree, first: Tree) -> bool:
    """True if the loss can be mapped over the examples."""

    def of_one(example: Tree) -> Tensor:
        return loss(params, tree.map(lambda x: x.unsqueeze(0), example))[0][0]

    try:
        with torch.no_grad():
            torch.func.vmap(of_one)(tree.map(lambda x: x[:2], first))
    except RuntimeError:
        return False
    return True


def _has_logits(loss: Loss, params: Tree, first: Tree) -> bool:
    with torch.no_grad():
        return "logits" in loss(params, tree.map(lambda x: x[:1], first))[1]


def _mean_gradient(loss: Loss, params: Tree, data: Tree, batch: int, folder: Path | None) -> Tree:
    """1/N sum_n g_n, added up in float64; kept in the folder for a pass that is resumed."""
    path = None if folder is None else folder / "mean_gradient.safetensors"
    if path is not None and path.exists():
        try:
            leaves = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"cannot resume: '{path}' is damaged ({error})") from None
        return tree.map(lambda x, old: old.to(x), params, tree.nest(leaves, like=params))
    count, device = len(tree.leaves(data)[0]), tree.leaves(params)[0].device
    slope = grad(lambda p, part: loss(p, part)[0].sum())
    total = tree.map(lambda x: torch.zeros_like(x, dtype=torch.float64), params)
    with interruptible(True) as stop, Progress("mean gradient", 0, count, False) as progress:
        for part in evaluation_batches(count, batch):
            if stop.requested:
                raise KeyboardInterrupt(f"stopped after {part.start} of {count} examples")
            own = on(device, tree.map(lambda x, part=part: x[part], data))
            total = tree.map(torch.add, total, slope(params, own))
            progress.show(part.stop)
    mean = tree.map(lambda x, like: (x / count).to(like), total, params)
    if path is not None:
        with replacing(path) as temporary:
            safetensors.torch.save_file(tree.map(lambda x: x.contiguous().cpu(), tree.flatten(mean)), temporary)
    return mean


def _scored(
    loss: Loss, params: Tree, data: Tree, columns: dict, mean: Tree, labels: Tensor | None, options
) -> Examination:
    neighbours, pairs, damping = options
    norm, rows = columns["norm"].astype(np.float64), torch.from_numpy(np.array(columns["sketch"]))
    if not np.isfinite(norm).all() or not np.isfinite(columns["loss"]).all():
        worst = int(np.flatnonzero(~np.isfinite(norm) | ~np.isfinite(columns["loss"]))[0])
        raise ValueError(f"the gradient of example {worst} is not finite (loss {columns['loss'][worst]:g})")
    mean_norm = float(tree.norm(tree.map(torch.Tensor.double, mean)))
    quotient = np.divide(columns["dot"], norm * mean_norm, out=np.zeros_like(norm), where=norm * mean_norm > 0)
    out = {"loss": columns["loss"].astype(np.float64), "norm": norm, "cosine": quotient.clip(-1, 1)}
    out["self_influence"] = sketched_self_influence(rows, damping).numpy()
    log_probs = torch.from_numpy(np.array(columns["log_probs"])) if "log_probs" in columns else None
    if log_probs is not None and labels is not None:
        out["el2n"] = scores.el2n(log_probs, labels).double().numpy()
    near = sketched_neighbours(rows, neighbours, pairs, torch.from_numpy(norm > np.median(norm) * 1e-3))
    kinds = [exact_pairs(loss, params, data, kind) for kind in (near.redundant, near.conflicting)]
    layers, names = np.array(columns["layers"]), tree.names(params)
    small = torch.from_numpy((layers.astype(np.float64) ** 2).mean(0))  # (parameters,)
    large = torch.stack([x.double().square().sum().cpu() for x in tree.leaves(mean)])
    parts = noise.two_batches(small, large, 1, len(norm))  # of all examples and of one
    scale = np.where(parts.square > 0, parts.trace / parts.square.clamp(min=1e-300), np.inf)
    trace, square = (float(x.sum()) for x in parts)
    return Examination(
        out,
        layers,
        names,
        log_probs,
        near,
        sorted(kinds[0], key=lambda pair: -pair.cosine),
        sorted(kinds[1], key=lambda pair: pair.cosine),
        trace / square if square > 0 else float("inf"),
        scale,
        mean_norm,
        columns["sketch"],
    )


def exact_pairs(loss: Loss, params: Tree, data: Tree, pairs: Tensor) -> list[Pair]:
    """The exact cosines of the gradients of pairs of examples (pairs, 2)."""
    out, device = [], tree.leaves(params)[0].device
    for part in pairs.split(PAIRS):
        examples = on(device, tree.map(lambda x, part=part: x[part.flatten()], data))
        gram = per_example.reports(loss, params, examples, ("gram",), has_aux=True).total_gram
        cosines = scores.cosine_matrix(gram)[::2, 1::2].diagonal()
        out += [Pair(i, j, c) for (i, j), c in zip(part.tolist(), cosines.tolist(), strict=True)]
    return out
