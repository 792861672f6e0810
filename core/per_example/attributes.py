"""Attributes of a watched parameter, and refusals of functions that look at its values or write into it."""

from typing import Any

import torch
from torch import Tensor, nn

from core.per_example.errors import ADVICE, MissingError, PerExampleError
from core.per_example.leaves import Content, call, contents_in, watched

_FACTS = frozenset(
    "device dtype is_cpu is_cuda is_meta is_mps is_nested is_quantized is_sparse is_xpu itemsize layout nbytes ndim "
    "shape".split()
)
_VALUES = frozenset("item tolist numpy __float__ __int__ __index__ __complex__ __array__".split())
_STRIDED = frozenset("as_strided as_strided_ as_strided_copy as_strided_scatter".split())
_IN_PLACE = frozenset(
    name
    for where in (Tensor, torch, nn.init)
    for name in dir(where)
    if (name.endswith("_") and not name.startswith("_"))
    or name in ("__ipow__", "__idiv__", "__ifloordiv__", "__imod__")
)


def attribute(session, content: Content, name: str) -> Any:
    """The attribute of this name, if it needs no value."""
    if name == "requires_grad":  # like a leaf of autograd; the tensors of a plan have none
        return True
    if name in _FACTS:
        return getattr(content.plain, name)
    ndim = content.plain.ndim
    if name in ("mT", "mH") or (name in ("T", "H") and ndim == 2):
        return session.call(Tensor.transpose, (content, -2, -1), {})
    if name == "T":
        return session.call(Tensor.permute, (content, tuple(reversed(range(ndim)))), {})
    if name in ("real", "imag") and content.plain.is_complex():
        return session.call(getattr(torch, name), (content,), {})
    if name == "real":
        return content
    method = getattr(Tensor, name, None)
    if callable(method):  # Dynamo looks methods that are written in Python up like attributes
        return lambda *args, **kwargs: call(method, (watched(content), *args), kwargs)
    raise MissingError(f"parameter '{content.name}' has no .{name} inside the loss: {ADVICE}")


def check_function(name: str, content: Content, args: tuple, kwargs: dict) -> None:
    """Raise if the function of this name takes a value out of the graph, or writes into a parameter."""
    if name == "__bool__":
        raise PerExampleError(f"the loss branches on the value of '{content.name}'; use torch.where")
    if name in _VALUES:
        raise PerExampleError(
            f"the loss takes the value of '{content.name}' out of the graph (.item() or the like); use .detach()"
        )
    if name in _STRIDED:
        raise PerExampleError(
            f"'{content.name}' is used by {name}, which looks at its memory, where the copies of all examples are one: "
            "use .unfold or .reshape"
        )
    if "out" in kwargs and contents_in(kwargs["out"]):
        _refuse_write(contents_in(kwargs["out"])[0].name, "by out=")
    if name == "__setitem__" or name in _IN_PLACE:
        for written in contents_in(args[:1] if args else kwargs):
            _refuse_write(written.name, "by assignment" if name == "__setitem__" else f"by .{name}()")


def _refuse_write(name: str, how: str) -> None:
    raise PerExampleError(f"the loss writes into parameter '{name}' {how}; nothing is changed in place")
