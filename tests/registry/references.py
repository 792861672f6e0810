"""References: modules that nobody here wrote, beside the nets that must compute the same from the same weights.

Three things are compared (`tests/nets/test_references.py`), each by a call:

    parity("resnet, basic", resnet, cfg, lambda: models().ResNet(...), (4, 3, 64, 64))   outputs and statistics
    names("resnet18", resnet, cfg, lambda: models().resnet18())                          names and shapes of all tensors
    initial("resnet", resnet, cfg, lambda: models().ResNet(...))                         initial values

The module is made when the test runs; where its library is not installed, the test is skipped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Reference:
    """A net and a module with the same weights.

    Args:
        module: makes it.
        shape: of the images that both see.
        source: the module's library, where the net's rename table knows several.
        without: patterns of the leaves whose initial values are not compared.
    """

    net: ModuleType
    cfg: Any
    module: Callable[[], nn.Module]
    shape: tuple[int, ...] = ()
    source: str | None = None
    without: tuple[str, ...] = ()


PARITY: dict[str, Reference] = {}
NAMES: dict[str, Reference] = {}
INITIAL: dict[str, Reference] = {}


def _add(rows: dict[str, Reference], name: str, row: Reference) -> None:
    if name in rows:
        raise ValueError(f"there are two references of the name '{name}'")
    rows[name] = row


def parity(name: str, net: ModuleType, cfg: Any, module: Callable, shape: tuple[int, ...]) -> None:
    _add(PARITY, name, Reference(net, cfg, module, shape))


def names(name: str, net: ModuleType, cfg: Any, module: Callable, source: str | None = None) -> None:
    _add(NAMES, name, Reference(net, cfg, module, source=source))


def initial(name: str, net: ModuleType, cfg: Any, module: Callable, without: tuple[str, ...] = ()) -> None:
    _add(INITIAL, name, Reference(net, cfg, module, without=without))
