"""Which training examples the prediction of a fine-tuned classifier rests on, by gradients per example.

Influence functions (Koh and Liang 2017, arXiv:1703.04730) of the head, whose inputs do not depend on it; or inner
products and cosines of gradients, of the head or of all that was trained.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from core import tree
from core.curvature import ggn_vp
from core.per_example import reports
from core.scores import gradient_cosine, influence, inverse_by_conjugate_gradient
from core.transforms import grad
from core.tree import Tree
from experiments.parts import encoder as encoders
from experiments.parts import encoder_classifier
from experiments.parts.encoder import Encoder
from experiments.parts.encoder_classifier import Classifier
from nets.language.bert import HEADS
from train.data.text import ragged
from train.data.text.ragged import Ragged
from train.gradients.stream import stream
from train.losses import cross_entropy
from train.run import SavedRun

Score = Literal["influence", "gradient", "cosine"]
PART = 4096  # states of training examples at a time
TEXTS = 32  # training texts at a time


class Read(NamedTuple):
    """Inputs of the head, (examples, width), and labels (examples,)."""

    states: Tensor
    labels: Tensor


def head_of(encoder: Encoder, params: Tree) -> Tree:
    """The head among all parameters of the encoder, or their spec."""
    return tree.partition(params, lambda name, _: name.partition(".")[0] in HEADS[encoder.cfg.head])[0]


@torch.no_grad()
def read(encoder: Encoder, data: Ragged) -> Read:
    """The last state of the first token of each text, on the encoder's device."""
    device = tree.leaves(encoder.params)[0].device
    states = torch.empty(len(data.lengths), encoder.cfg.width, device=device)
    for rows, (tokens, lengths) in ragged.evaluation_batches(data.tokens, data.lengths, 64):
        tokens, lengths = tokens.to(device), lengths.to(device)
        mask = encoders.mask_of(tokens, lengths)
        states[rows.to(device)] = encoder.net.features(encoder.params, tokens, encoder.cfg, mask=mask)[:, 0]
    return Read(states, data.labels.to(device))


def head_loss(encoder: Encoder) -> Callable[[Tree, Read], Tensor]:
    """`loss(head, batch) -> (examples,)`, in nats, without dropout."""

    def loss(head: Tree, batch: Read) -> Tensor:
        logits = encoder.net.outputs(head, batch.states[:, None], encoder.cfg)  # (examples, classes)
        return cross_entropy(logits, batch.labels, reduction="none")

    return loss


def head_support(encoder: Encoder, head: Tree, train: Read, test: Read, score: Score, damping: float) -> Tensor:
    """Support (examples,) of each training example for the labels of `test`: above 0, the example helps.

    influence: rise of the mean loss of `test`, in nats, if the example were left out of training, to first order, with
    the Gauss-Newton matrix of the head as curvature. gradient, cosine: of the gradients of the two losses.

    Args:
        damping: added to the curvature.
    """
    loss = head_loss(encoder)
    if score != "influence":
        return _support(loss, head, train, PART, grad(lambda p: loss(p, test).mean())(head), score)

    def product(vector: Tree) -> Tree:
        def outputs(p: Tree) -> Tensor:
            return encoder.net.outputs(p, train.states[:, None], encoder.cfg)

        return ggn_vp(outputs, lambda z: cross_entropy(z, train.labels), head, vector)

    inverse = inverse_by_conjugate_gradient(product, damping, tolerance=1e-3)
    return -influence(loss, head, train, test, inverse).cpu() / len(train.labels)


def support(loss: Callable[[Tree, Ragged], Tensor], params: Tree, train: Ragged, test: Ragged, score: Score) -> Tensor:
    """`head_support` by the gradients of all parameters of the loss: one pass over the training texts.

    Args:
        loss: `loss(params, batch) -> (examples,)`.
        score: gradient or cosine.
    """
    direction = grad(lambda p: loss(p, test).mean())(params)
    out = torch.empty(len(train.lengths))
    for rows in train.lengths.argsort(stable=True).split(32 * TEXTS):  # of similar length
        part = tree.map(lambda x, rows=rows: x[rows], train)
        part = part._replace(tokens=part.tokens[:, : int(part.lengths.max())])
        out[rows] = _support(loss, params, part, TEXTS, direction, score)
    return out


def supporter(
    run: SavedRun, model: Classifier, train: Ragged, score: Score, leaves: str, damping: float
) -> Callable[[Ragged], Tensor]:
    """Texts with labels -> support (training texts,) for these labels.

    Args:
        run, model: a run and the classifier at its checkpoint.
        leaves: parameters whose gradients count: "head", or "trained", all that the run has trained.

    Raises ValueError: the influence of all that was trained, whose curvature is out of reach.
    """
    device = tree.leaves(model.encoder.params)[0].device
    if leaves == "head":
        states, head = read(model.encoder, train), head_of(model.encoder, model.encoder.params)
        return lambda test: head_support(model.encoder, head, states, read(model.encoder, test), score, damping)
    if score == "influence":
        raise ValueError("--score influence is that of the head; with --leaves trained expected gradient or cosine")
    base, parts, values = encoders.finetuned_parts(run, device)
    loss_and_metrics = encoder_classifier.loss_of(base, parts.whole, train=False)

    def loss(params: Tree, batch: Ragged) -> Tensor:
        return loss_and_metrics(params, batch)[0]

    return lambda test: support(loss, values, tree.move(train, device), tree.move(test, device), score)


def _support(loss: Callable, params: Tree, data: Tree, batch: int, direction: Tree, score: Score) -> Tensor:
    def values(part: Tree) -> dict[str, Tensor]:
        if score == "cosine":
            return {"support": gradient_cosine(loss, params, part, direction)}
        return {"support": reports(loss, params, part, ("dot",), direction=direction).total_dot}

    size = min(batch, len(tree.leaves(data)[0]))
    return torch.from_numpy(stream(values, data, size, keep=("support",), title="gradients").kept["support"])
