"""Gradients per example: norms, dot products, Gram matrices, second moments, clipped sums, from one pass over a batch.

    out = reports(loss, params, batch, want=("norm", "gram"))        loss(params, batch) -> (N,)
    out.norm["blocks"][0]["attn"]["qkv"]["weight"]                   (N,)

Every parameter is covered exactly, or the call raises and names it. `plan` shows how, `verify` proves it, `each` is the
reference: vmap(grad).
"""

from core.per_example.errors import PerExampleError
from core.per_example.exact import each, verify
from core.per_example.plan import Plan
from core.per_example.reports import Reports, combine, plan, reports, total_norm
from core.per_example.weighted import Weighted, clip_factor, clipped, weighted

__all__ = [
    "PerExampleError",
    "Plan",
    "Reports",
    "Weighted",
    "clip_factor",
    "clipped",
    "combine",
    "each",
    "plan",
    "reports",
    "total_norm",
    "verify",
    "weighted",
]
