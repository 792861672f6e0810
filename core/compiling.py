"""Marks for torch.compile that do not import its front end, Dynamo: only programs that compile pay for that second.

`torch.compiler.allow_in_graph` and `assume_constant_result` import Dynamo when they are applied. These decorators wait
until something else does, as `torch.compile` does at its first call.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

_FRONT_END = "torch._dynamo"
_marks: list[tuple[str, Callable]] = []


def allow_in_graph(f: Callable) -> Callable:
    """`torch.compiler.allow_in_graph`, applied once Dynamo is imported."""
    return _mark("allow_in_graph", f)


def assume_constant_result(f: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, applied once Dynamo is imported."""
    return _mark("assume_constant_result", f)


def _mark(name: str, f: Callable) -> Callable:
    if _FRONT_END in sys.modules:
        getattr(sys.modules[_FRONT_END], name)(f)
        return f
    if not _marks:
        sys.meta_path.insert(0, _Finder())
    _marks.append((name, f))
    return f


class _Finder(MetaPathFinder):
    """Finds Dynamo where it is, and has the marks applied right after its module has run."""

    def find_spec(self, name: str, path, target=None):
        if name != _FRONT_END:
            return None
        sys.meta_path.remove(self)  # from here on as if it had never been there
        spec: Any = importlib.util.find_spec(name)  # not None: torch has this module
        run = spec.loader.exec_module

        def run_and_mark(module: ModuleType) -> None:
            run(module)
            for mark, f in _marks:
                getattr(module, mark)(f)

        spec.loader.exec_module = run_and_mark
        return spec
