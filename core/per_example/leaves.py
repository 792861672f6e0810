"""Parameters that know what is done with them.

Inside of a loss that is reported on, each leaf of the parameters is a `Watched`: a plain object with
`__torch_function__`, which lives only inside of the loss. `F.linear(x, leaf)` thus reaches the rule of `F.linear`
(`core.per_example.forward_rules`), so that layers and nets hold no per-example code. An operation without a rule is
*spread* (`core.per_example.mapped`): each example gets its own copy of the parameter, and what comes out is a
`Spread`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core import tree
from core.per_example.errors import ADVICE, PerExampleError


def _method(name: str) -> Callable:
    def call(self, *args, **kwargs):
        return self.session.call(getattr(Tensor, name), (self, *args), kwargs)

    return call


class _NoSuch(PerExampleError, AttributeError):
    """So that hasattr answers too."""


# What a parameter tells of itself without its values.
_FACTS = frozenset(
    "dim_order element_size get_device is_complex is_contiguous is_cpu is_cuda is_meta is_mps is_nested is_quantized "
    "is_sparse is_xpu itemsize layout nbytes ndimension nelement requires_grad stride".split()
)


class Valued:
    """What Watched and Spread have in common: the face of a tensor, whose every operation goes to `Session.call`."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return watched_in((args, kwargs))[0].session.call(func, args, kwargs or {})

    @property
    def shape(self) -> torch.Size:
        return self.plain.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.plain.dtype

    @property
    def device(self) -> torch.device:
        return self.plain.device

    @property
    def ndim(self) -> int:
        return self.plain.ndim

    @property
    def T(self):
        return self.t() if self.ndim == 2 else self.permute(tuple(reversed(range(self.ndim))))

    @property
    def mT(self):
        return self.transpose(-2, -1)

    def size(self, *args):
        return self.plain.size(*args)

    def dim(self) -> int:
        return self.plain.ndim

    def numel(self) -> int:
        return self.plain.numel()

    def is_floating_point(self) -> bool:
        return self.plain.is_floating_point()

    def __len__(self) -> int:
        return len(self.plain)

    def __iter__(self):
        return iter(self.unbind(0))

    def __bool__(self):
        raise PerExampleError(f"the loss branches on the value of '{self.name}'; use torch.where")

    def _take_out(self, *args, **kwargs):
        raise PerExampleError(
            f"the loss takes the value of '{self.name}' out of the graph (.item() or the like); use .detach()"
        )

    item = tolist = numpy = __float__ = __int__ = __index__ = __complex__ = __array__ = _take_out

    def detach(self) -> Tensor:
        return self.plain.detach()

    def __getattr__(self, name: str):
        if name in _FACTS:
            return getattr(self.plain, name)
        if name.startswith("_") or not callable(getattr(Tensor, name, None)):
            raise _NoSuch(f"parameter '{self.__dict__.get('name', '')}' has no .{name} inside of the loss: {ADVICE}")

        def call(*args, **kwargs):
            if name.endswith("_"):
                self._write(f"by .{name}()")
            return self.session.call(getattr(Tensor, name), (self, *args), kwargs)

        return call

    def _write(self, how: str):
        raise PerExampleError(f"the loss writes into parameter '{self.name}' {how}; nothing is changed in place")

    # Python looks operators up on the class.
    __add__, __sub__, __mul__, __truediv__ = _method("add"), _method("sub"), _method("mul"), _method("div")
    __radd__, __rmul__, __pow__, __neg__ = _method("add"), _method("mul"), _method("pow"), _method("neg")
    __rsub__, __rtruediv__, __rpow__ = _method("__rsub__"), _method("__rdiv__"), _method("__rpow__")
    __matmul__, __rmatmul__ = _method("matmul"), _method("__rmatmul__")
    __getitem__, __abs__ = _method("__getitem__"), _method("abs")
    __lt__, __le__, __gt__, __ge__ = _method("lt"), _method("le"), _method("gt"), _method("ge")
    __eq__, __ne__, __hash__ = _method("eq"), _method("ne"), object.__hash__
    __mod__, __floordiv__ = _method("remainder"), _method("floor_divide")

    def __pos__(self):
        return self

    def __setitem__(self, index, value):
        self._write("by assignment")

    def __iadd__(self, other):
        self._write("by +=, -=, *= or the like")

    __isub__ = __imul__ = __itruediv__ = __ipow__ = __ifloordiv__ = __imod__ = __imatmul__ = __iadd__


class Watched(Valued):
    """A parameter: `value` is what the operation sees, the parameter `base`, perhaps transposed and cast."""

    def __init__(self, session, name: str, base: Tensor, value: Tensor | None = None, transposed: bool = False):
        self.session, self.name, self.base = session, name, base
        self.value = base if value is None else value
        self.transposed = transposed

    @property
    def plain(self) -> Tensor:
        return self.value

    def t(self):
        if self.ndim != 2:
            return self if self.ndim < 2 else self.session.call(Tensor.t, (self,), {})
        return self._changed(self.value.T, not self.transposed)

    def _changed(self, value: Tensor, transposed: bool):
        if not self.session.planning and not torch.is_grad_enabled():
            raise PerExampleError(f"'{self.name}' is cast or transposed under torch.no_grad; use .detach()")
        return Watched(self.session, self.name, self.base, value, transposed)

    def transpose(self, first: int, second: int):
        if self.ndim == 2 and {first % 2, second % 2} == {0, 1}:
            return self.t()
        return self.session.call(Tensor.transpose, (self, first, second), {})

    def to(self, *args, **kwargs):
        return self._changed(self.value.to(*args, **kwargs), self.transposed)

    def float(self):
        return self.to(torch.float32)

    def double(self):
        return self.to(torch.float64)

    def half(self):
        return self.to(torch.float16)

    def bfloat16(self):
        return self.to(torch.bfloat16)

    def contiguous(self):
        return self


class Spread(Valued):
    """A value that each example has its own copy of, all equal: (N, *shape)."""

    def __init__(self, session, name: str, value: Tensor):
        self.session, self.name, self.value = session, name, value

    @property
    def plain(self) -> Tensor:
        return self.value[0]


def watched_in(args: Any) -> "list[Valued]":
    return [leaf for leaf in tree.leaves(args) if isinstance(leaf, Valued)]


def called(func: Callable) -> str:
    return getattr(func, "__name__", str(func))
