"""Nets out of Python: programs of torch.export, their packages, quantised ones, and what each form costs."""

from train.ship.package import FORMS, Loaded, load, save, swap
from train.ship.program import Axis, Leaf, Program, ShipError, export

__all__ = ["FORMS", "Axis", "Leaf", "Loaded", "Program", "ShipError", "export", "load", "save", "swap"]
