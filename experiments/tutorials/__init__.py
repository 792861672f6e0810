"""Tutorials as scripts of cells, and the notebooks that `python -m experiments.tutorials` makes of them."""
