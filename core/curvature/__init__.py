"""Curvature of a loss by products alone: Hessian, Gauss-Newton and Fisher, their spectra, traces and inverses.

A linear operator is a function from a tree of parameters to a tree like it. Only `dense` forms a matrix.
"""

from core.curvature.krylov import (
    Density,
    Eigenpairs,
    Lanczos,
    lanczos,
    ritz_values,
    smoothed,
    spectral_density,
    top_eigenpairs,
)
from core.curvature.products import fisher_vp, ggn_vp, sampled_fisher_vp
from core.curvature.solve import Solution, conjugate_gradient, low_rank_inverse
from core.curvature.trace import Estimate, hutchinson_diagonal, hutchinson_trace
from core.curvature.vectors import dense, probe

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "Lanczos",
    "Solution",
    "conjugate_gradient",
    "dense",
    "fisher_vp",
    "ggn_vp",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "lanczos",
    "low_rank_inverse",
    "probe",
    "ritz_values",
    "sampled_fisher_vp",
    "smoothed",
    "spectral_density",
    "top_eigenpairs",
]
