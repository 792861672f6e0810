"""Watched parameters: the tensors that stand for the parameters inside a loss.

Each is a tensor without values whose every operation arrives at `Session.call` by `__torch_function__`. `F.linear(x,
leaf)` thus reaches the rule of `F.linear` (`core.per_example.forward_rules`), and layers and nets hold no per-example
code. An operation without a rule is mapped over the examples (`core.per_example.mapped`), each with its own copy of the
parameter; results without a batch axis are `Copies`, again in a `Watched`.

A `Watched` lies on the meta device: code that gets past `__torch_function__` meets a tensor without values and fails. A
tensor with values would lose the report in silence.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from core import tree
from core.per_example.errors import PerExampleError
from core.tree import Tree


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter: `value` is the operand of operations, the leaf `base` after its casts, perhaps transposed."""

    session: Any
    name: str
    base: Tensor
    value: Tensor
    casts: tuple[torch.dtype, ...] = ()
    transposed: bool = False

    @property
    def plain(self) -> Tensor:
        """The value, a tensor without a watch."""
        return self.value

    def t(self) -> "Parameter":
        """The transposed parameter, still watched."""
        self._check_grad("transposed")
        return Parameter(self.session, self.name, self.base, self.value.mT, self.casts, not self.transposed)

    def cast(self, dtype: torch.dtype) -> "Parameter":
        """The parameter in another dtype, still watched."""
        if dtype == self.value.dtype:
            return self
        self._check_grad("cast")
        casts = (*self.casts, dtype)
        return Parameter(self.session, self.name, self.base, self.value.to(dtype), casts, self.transposed)

    def _check_grad(self, what: str) -> None:
        if not torch.is_grad_enabled():
            raise PerExampleError(f"'{self.name}' is {what} under torch.no_grad; use .detach()")


@dataclass(frozen=True, eq=False)
class Copies:
    """A value with a copy per example, all equal: (N, *shape)."""

    session: Any
    name: str
    value: Tensor

    @property
    def plain(self) -> Tensor:
        """One of the copies, a tensor without a watch."""
        # As value[0], but by a function that `observer` does not count as an example that a loss takes out.
        return self.value.split((1, len(self.value) - 1))[0].squeeze(0)


Content = Parameter | Copies


class Watched(Tensor):
    """A parameter inside a loss, or a value computed from parameters alone; see `watched`."""

    def content(self) -> None:
        """Stands on the class so that Dynamo finds it; `watched` sets the instance's own attribute, a `Content`."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]  # torch's has an argument for itself
        content = contents(self)
        kind = "parameter" if isinstance(content, Parameter) else "value of parameter"
        return f"<{kind} '{content.name}' {tuple(self.shape)} inside a loss>"

    def __format__(self, spec: str) -> str:
        return repr(self)

    # Asked for often; without these each is a call of __torch_function__. torch's stubs have attributes in their place.
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Shape of the value."""
        return contents(self).plain.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of the value."""
        return contents(self).plain.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Device of the value."""
        return contents(self).plain.device

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """Number of dimensions of the value."""
        return contents(self).plain.ndim


def watched(content: Content) -> Watched:
    """The tensor that stands for a parameter, or for copies, in the loss."""
    value = content.plain
    # Under a FakeTensorMode it would be a FakeTensor, which cannot change its class.
    with nullcontext() if torch.compiler.is_compiling() else torch._C._DisableTorchDispatch():
        out = torch.empty(value.shape, dtype=value.dtype, device="meta").as_subclass(Watched)
    out.content = content  # type: ignore[method-assign, assignment]
    return out


def contents(x: Any) -> Any:
    """The parameter or the copies behind a `Watched`; anything else as it is.

    Raises:
        PerExampleError: Dynamo took the tensor apart without __torch_function__.
    """
    if not isinstance(x, Watched):
        return x
    if not isinstance(x.content, (Parameter, Copies)):
        raise PerExampleError("a parameter is iterated over or unpacked, which torch.compile hides: use .unbind(0)")
    return x.content


def plain(x: Any) -> Any:
    """The value of a parameter, or one of equal copies; anything else as it is."""
    return x.plain if isinstance(x, (Parameter, Copies)) else x


def contents_in(args: Any) -> list[Content]:
    """The parameters and copies among the leaves of arguments."""
    return [leaf for leaf in tree.leaves(args) if isinstance(leaf, (Parameter, Copies))]


def call(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Call a function with watched arguments, by its rule or mapped over the examples.

    Any function of tensors may be called so, such as a module's (`core.lift`). Returns parameters and copies again as
    `Watched`.
    """
    args = tuple([_unwrapped(x) for x in args])
    kwargs = {key: _unwrapped(x) for key, x in kwargs.items()}
    out = contents_in((args, kwargs))[0].session.call(func, args, kwargs)
    if isinstance(out, Tensor):
        return out
    # torch's trees, because the outputs of transformers are registered with these.
    return pytree.tree_map(lambda x: watched(x) if isinstance(x, (Parameter, Copies)) else x, out)


def _unwrapped(x: Any) -> Any:
    # Most arguments are no trees, and compiled code walks trees slowly.
    return tree.map(contents, x) if isinstance(x, (tuple, list, dict)) else contents(x)


def watch(session: Any, params: Tree, names: Iterable[str]) -> Tree:
    """The parameters as a loss sees them: those of these names watched."""
    names = frozenset(names)
    return tree.map_with_names(
        lambda name, leaf: watched(Parameter(session, name, leaf, leaf)) if name in names else leaf, params
    )


def in_tuple(args: tuple, kwargs: dict) -> bool:
    """True for a watched parameter in a tuple of tensors, where Dynamo does not look for tensors of a subclass."""
    return any(type(x) is tuple and any(isinstance(y, Watched) for y in x) for x in (*args, *kwargs.values()))


def invoke(func: Callable, args: tuple, kwargs: dict) -> Any:
    """`func(*args, **kwargs)`, tuples with watched parameters as lists, methods of tensors as methods: Dynamo does not
    enter those written in Python."""
    name = getattr(func, "__name__", "")
    if in_tuple(args, kwargs):
        args = tuple(list(x) if type(x) is tuple else x for x in args)
        kwargs = {key: list(x) if type(x) is tuple else x for key, x in kwargs.items()}
    if args and isinstance(args[0], Tensor) and getattr(Tensor, name, None) is func:
        return getattr(args[0], name)(*args[1:], **kwargs)
    return func(*args, **kwargs)


class Invoked(TorchFunctionMode):
    """Every function is called as `invoke` does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return invoke(func, args, kwargs or {})


_COMPARISONS = frozenset("lt le gt ge eq ne __lt__ __le__ __gt__ __ge__ __eq__ __ne__".split())


def called(func: Callable, args: tuple = ()) -> str:
    """The name of a function, for errors and plans."""
    if func is custom_function_call:
        return args[0].__name__
    name = getattr(func, "__name__", str(func))
    # Python turns x < p into p > x where p's class is a subclass of x's: so it is, except while planning.
    return "comparison" if name in _COMPARISONS else name
