"""Plots: figures that any run may need; those of GANs, classifiers and gradients have modules of their own."""

from train.plots.figures import (
    COLOURS,
    GRID,
    INK,
    curves,
    heat_map,
    histogram,
    matrix,
    panels,
    reliability,
    scatter,
)
from train.plots.image_grids import image_grid

__all__ = [
    "COLOURS",
    "GRID",
    "INK",
    "curves",
    "heat_map",
    "histogram",
    "image_grid",
    "matrix",
    "panels",
    "reliability",
    "scatter",
]
