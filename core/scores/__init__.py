"""Scores per example and of per-example gradients: difficulty, influence, similarity, noise; attribution to inputs.

Where a score of an example does not depend on the other examples, the scores of a large set are those of its parts,
joined by `torch.cat`.
"""

from core.scores.alignment import cosine_matrix, gradient_cosine, task_gram
from core.scores.attribution import Attribution, integrated_gradients
from core.scores.difficulty import el2n, forgetting_events, grand, normalised_within_class, vog
from core.scores.fisher import empirical_fisher_diagonal, fisher_diagonal
from core.scores.influence import (
    influence,
    inverse_by_conjugate_gradient,
    low_rank_influence,
    low_rank_self_influence,
    projections,
    self_influence,
)
from core.scores.kernel import empirical_ntk, ntk_trace, pseudo_ntk
from core.scores.noise import gradient_diversity, gradient_snr, layer_snr
from core.scores.sketched import sketched_neighbours, sketched_self_influence
from core.scores.suspicion import label_probability, label_suspicion, neighbour_agreement
from core.scores.tracin import gradient_products, tracin, tracin_on_mean, tracin_self

__all__ = [
    "Attribution",
    "cosine_matrix",
    "el2n",
    "empirical_fisher_diagonal",
    "empirical_ntk",
    "fisher_diagonal",
    "forgetting_events",
    "gradient_cosine",
    "gradient_diversity",
    "gradient_products",
    "gradient_snr",
    "grand",
    "influence",
    "integrated_gradients",
    "inverse_by_conjugate_gradient",
    "label_probability",
    "label_suspicion",
    "layer_snr",
    "low_rank_influence",
    "low_rank_self_influence",
    "neighbour_agreement",
    "normalised_within_class",
    "ntk_trace",
    "projections",
    "pseudo_ntk",
    "self_influence",
    "sketched_neighbours",
    "sketched_self_influence",
    "task_gram",
    "tracin",
    "tracin_on_mean",
    "tracin_self",
    "vog",
]
