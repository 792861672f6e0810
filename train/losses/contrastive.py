"""Contrastive losses: the embeddings of a pair are near each other, and far from those of the batch's other pairs."""

import torch
from torch import Tensor

from train.losses.basic import cross_entropy


def in_batch_negatives(a: Tensor, b: Tensor, *, scale: float | Tensor = 20.0, matches: Tensor | None = None) -> Tensor:
    """Cross-entropy of each text's partner among the other side's texts of the batch, the mean of both directions.

        s_ij = scale a_i · b_j;    loss_i = -(log softmax_j(s_ij) + log softmax_j(s_ji)) / 2    at j = i

    Henderson et al. 2017 (arXiv:1705.00652); van den Oord et al. 2018, InfoNCE (arXiv:1807.03748); of both directions,
    Radford et al. 2021, CLIP (arXiv:2103.00020). A guess among all has ln(batch).

    Args:
        a, b: (batch, width), of norm 1 where cosines are meant; row i of one belongs to row i of the other.
        scale: one over the temperature.
        matches: (batch, batch) boolean, True where b_j fits a_i too (`same_texts`): these are no negatives.

    Returns:
        A loss per pair, (batch,), in float32 or wider.
    """
    if a.ndim != 2 or a.shape != b.shape:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"in_batch_negatives: expected two tables of embeddings (batch, width), found {shapes}")
    wide = torch.promote_types(a.dtype, torch.float32)
    scores = scale * a.to(wide) @ b.to(wide).T  # (batch, batch)
    partners = torch.arange(len(a), device=a.device)
    if matches is not None:
        if matches.shape != scores.shape or matches.dtype != torch.bool:
            actual = f"{tuple(matches.shape)} of {matches.dtype}"
            raise ValueError(
                f"in_batch_negatives: expected matches {tuple(scores.shape)} of torch.bool, found {actual}"
            )
        scores = torch.where(matches & (partners != partners[:, None]), -torch.inf, scores)
    there, back = (cross_entropy(s, partners, reduction="none") for s in (scores, scores.T))  # each (batch,)
    return (there + back) / 2


def same_texts(a: Tensor, b: Tensor) -> Tensor:
    """`matches` of pairs by the numbers of their texts: a, b (batch,) integers -> (batch, batch) boolean.

    b_j fits a_i where both pairs have a text in common, or where it is the text a_i itself.
    """
    return (a[:, None] == a) | (b[:, None] == b) | (a[:, None] == b)
