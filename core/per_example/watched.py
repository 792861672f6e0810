"""Parameters that know what is done with them.

Inside `reports` each leaf of the parameters is a `Watched`: a plain object with `__torch_function__`, which lives only
inside of the loss. `F.linear(x, leaf)` thus reaches the rule of `F.linear` below, so that layers and nets hold no
per-example code. An operation without a rule is *spread*: each example gets its own copy of the parameter (of stride 0)
and the operation is mapped over the examples as batches of one; its gradients are then the copies' (`Spread`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from core import tree
from core.per_example.operations import PerExampleError, Sizes, report

ADVICE = "use per_example.each (vmap of grad) instead"


class Use(NamedTuple):
    """One use of a parameter."""

    parameter: str
    operation: str  # a key of operations.FORMS
    called: str  # the function that was called
    settings: tuple
    sizes: Sizes
    output: tuple  # shape of what the cotangent is of, without the batch axis
    dtype: torch.dtype


class LeafPlan(NamedTuple):
    """How a parameter is covered."""

    shape: tuple[int, ...]
    uses: tuple[Use, ...]
    method: str
    kept: bool  # the cotangents of all uses are brought together and reduced after the backward pass
    sums: bool  # the gradient of the sum comes from the reduction, which forms it anyway


@torch.compiler.assume_constant_result
def transform_depth() -> int:
    """How many torch.func transforms are open."""
    return len(torch._C._functorch.get_interpreter_stack() or [])


class Session:
    """What the Watched leaves of one call of the loss share: first a plan is written, later it is followed.

    Args:
        examples: N.
        plans: by parameter, or None while planning.
        answers: what `batched` answered while planning, in order.
        sinks: by parameter, the sinks of its uses: one list for each use.
    """

    def __init__(self, examples: int, plans=None, answers=(), want=(), sinks=None, direction=None, budget: int = 0):
        self.examples, self.plans, self.want, self.sinks = examples, plans, want, sinks
        self.direction, self.budget = direction or {}, budget
        self.planning = plans is None
        self.depth = transform_depth()
        self.uses: dict[str, list[Use]] = {}
        self.spreads: dict[str, Tensor] = {}
        self.answers, self.asked = ([] if self.planning else answers), 0
        self.kept: dict[str, list] = {}

    def check(self, name: str, what: str) -> None:
        if transform_depth() != self.depth:
            raise PerExampleError(
                f"'{name}' is used by {what} inside of another transform (an inner grad or vmap) in the loss: {ADVICE}"
            )

    def batched(self, x: Any, name: str, what: str) -> bool:
        """Whether x, a tensor or a size, has the batch axis: told by its odd size while planning, remembered later."""
        if not self.planning:
            asked, answer = self.answers[self.asked] if self.asked < len(self.answers) else ("nothing more", False)
            self.asked += 1
            if asked != f"{what} of '{name}'":
                now = f"{what} of '{name}'"
                raise PerExampleError(f"the plan is of another loss: it has {asked} where the loss has {now}")
            return answer
        answer = self._has_batch_axis(x.shape if isinstance(x, Tensor) else (x,), name, what)
        self.answers.append((f"{what} of '{name}'", answer))
        return answer

    def _has_batch_axis(self, shape: tuple, name: str, what: str) -> bool:
        n = self.examples
        if not any(size and size % n == 0 for size in shape):
            return False
        if shape[0] == n and n not in shape[1:]:
            return True
        found = ", ".join("N" if size == n else f"{size // n}*N" if size and size % n == 0 else f"{size}" for size in shape)
        raise PerExampleError(
            f"'{name}' meets ({found}) in {what}, for a batch of N: the batch must be one axis of its own, and the "
            f"leading one; {ADVICE}"
        )

    def record(self, leaf: "Watched", operation: str, called: str, settings: tuple, sizes: Sizes, y, saved) -> Tensor:
        """`y`, the result of one use of a leaf, with its report."""
        name, uses = leaf.name, self.uses.setdefault(leaf.name, [])
        index = len(uses)
        use = Use(name, operation, called, settings, sizes, tuple(y.shape[1:]), y.dtype)
        uses.append(use)
        if self.planning:
            return y
        plan = self.plans[name]
        if index >= len(plan.uses) or plan.uses[index][:6] != use[:6]:
            planned = f"{plan.uses[index].called} {plan.uses[index].output}" if index < len(plan.uses) else "no more"
            raise PerExampleError(
                f"the plan is of another loss: use {index + 1} of '{name}' is {called} {use.output}, planned {planned}"
            )
        if plan.kept:
            self.kept.setdefault(name, []).append(y.detach().new_empty(0) if saved is None else saved)
            spec = (operation, settings, plan.shape, ("keep",), "", 0)
            return report(spec, y, None, None, None, *self.sinks[name][index])
        want = (*self.want, "sum") if plan.sums else self.want
        if not want:
            return y
        spec = (operation, settings, plan.shape, want, plan.method, self.budget)
        weight = leaf.base if plan.sums else None
        return report(spec, y, weight, saved, self.direction.get(name), *self.sinks[name][index])

    def check_complete(self) -> None:
        """Raise if the loss did less than was planned."""
        for name, plan in self.plans.items():
            if len(self.uses.get(name, ())) != len(plan.uses):
                done = len(self.uses.get(name, ()))
                raise PerExampleError(
                    f"the plan is of another loss: it has {len(plan.uses)} uses of '{name}', the loss {done}"
                )

    def operand(self, leaf: "Watched") -> Tensor:
        """The value that an operation takes: apart from the graph where the report brings the gradient."""
        plan = None if self.planning else self.plans[leaf.name]
        return leaf.value.detach() if plan is not None and plan.sums else leaf.value

    def spread(self, leaf: "Watched") -> "Spread":
        """A copy of the leaf for each example."""
        if leaf.name not in self.spreads:
            # The first use may lie under torch.no_grad, and later ones take the same copies.
            with torch.enable_grad():
                base = self.operand(Watched(self, leaf.name, leaf.base))
                copies = base.unsqueeze(0).expand(self.examples, *base.shape)
                sizes = Sizes(1, 1, 1, base.numel())
                self.spreads[leaf.name] = self.record(leaf, "dense", "spread", (), sizes, copies, None)
        copies = self.spreads[leaf.name]
        copies = copies.mT if leaf.transposed else copies
        return Spread(self, leaf.name, copies.to(leaf.value.dtype))


def _method(name: str) -> Callable:
    def call(self, *args, **kwargs):
        return dispatch(getattr(Tensor, name), (self, *args), kwargs)

    return call


class _NoSuch(PerExampleError, AttributeError):
    """So that hasattr answers too."""


# What a parameter tells of itself without its values.
_FACTS = frozenset(
    "dim_order element_size get_device is_complex is_contiguous is_cpu is_cuda is_meta is_mps is_nested is_quantized "
    "is_sparse is_xpu itemsize layout nbytes ndimension nelement requires_grad stride".split()
)


class _Valued:
    """What Watched and Spread have in common: the face of a tensor, whose every operation goes to `dispatch`."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

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
        return self.t() if self.ndim == 2 else dispatch(Tensor.permute, (self, tuple(reversed(range(self.ndim)))), {})

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
            return dispatch(getattr(Tensor, name), (self, *args), kwargs)

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


class Watched(_Valued):
    """A parameter: `value` is what the operation sees, the parameter `base`, perhaps transposed and cast."""

    def __init__(self, session: Session, name: str, base: Tensor, value: Tensor | None = None, transposed: bool = False):
        self.session, self.name, self.base = session, name, base
        self.value = base if value is None else value
        self.transposed = transposed

    @property
    def plain(self) -> Tensor:
        return self.value

    def t(self):
        if self.ndim != 2:
            return self if self.ndim < 2 else dispatch(Tensor.t, (self,), {})
        return self._changed(self.value.T, not self.transposed)

    def _changed(self, value: Tensor, transposed: bool):
        if not self.session.planning and not torch.is_grad_enabled():
            raise PerExampleError(f"'{self.name}' is cast or transposed under torch.no_grad; use .detach()")
        return Watched(self.session, self.name, self.base, value, transposed)

    def transpose(self, first: int, second: int):
        if self.ndim == 2 and {first % 2, second % 2} == {0, 1}:
            return self.t()
        return dispatch(Tensor.transpose, (self, first, second), {})

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


class Spread(_Valued):
    """A value that each example has its own copy of, all equal: (N, *shape)."""

    def __init__(self, session: Session, name: str, value: Tensor):
        self.session, self.name, self.value = session, name, value

    @property
    def plain(self) -> Tensor:
        return self.value[0]


def _watching(args: Any) -> "list[_Valued]":
    return [leaf for leaf in tree.leaves(args) if isinstance(leaf, _Valued)]


def called(func: Callable) -> str:
    return getattr(func, "__name__", str(func))


def dispatch(func: Callable, args: tuple, kwargs: dict) -> Any:
    """What `__torch_function__` does: the rule of the function, or each example for itself."""
    first = _watching((args, kwargs))[0]
    session = first.session
    session.check(first.name, called(func))
    rule = RULES.get(func)
    if rule is not None:
        out = rule(session, *args, **kwargs)
        if out is not NotImplemented:
            return out
    return spread_call(session, func, args, kwargs)


# Operations with a rule. Each returns NotImplemented where its rule does not apply.


def _linear(session: Session, input, weight, bias=None):
    if not isinstance(weight, Watched) or weight.ndim != 2:
        return NotImplemented
    y = _product(session, input, weight, "linear")
    return y if y is NotImplemented else _plus(y, bias, "linear")


def _plus(y, bias, what: str):
    """y + bias, as an operation of its own, so that eager and compiled layers have one plan."""
    return y if bias is None else y + bias


def _product(session: Session, x, weight: Watched, what: str):
    """x W^T."""
    if not isinstance(x, Tensor) or x.ndim < 2 or not session.batched(x, weight.name, what):
        return NotImplemented
    y = F.linear(x, session.operand(weight))
    p, d = weight.base.shape
    sizes = Sizes(x[0].numel() // x.shape[-1] if x.ndim > 2 else 1, 1, p, d)
    return session.record(weight, "linear", what, (weight.transposed,), sizes, y, x)


def _matmul(session: Session, input, other):
    if not isinstance(other, Watched) or other.ndim != 2:
        return NotImplemented
    return _product(session, input, other.t(), "matmul")


def _mm(session: Session, input, mat2):
    return _matmul(session, input, mat2)


def _rmatmul(session: Session, weight, x):
    return _matmul(session, x, weight)


def _per_axis(value, dims: int) -> tuple:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _conv(name: str, dims: int, function: Callable) -> Callable:
    def rule(session: Session, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        x = input
        if not isinstance(weight, Watched) or weight.transposed or not isinstance(x, Tensor) or x.ndim != dims + 2:
            return NotImplemented if not isinstance(bias, _Valued) or isinstance(weight, _Valued) else _plus(
                function(x, weight, None, stride, padding, dilation, groups), _beside(bias, dims), name
            )
        if not session.batched(x, weight.name, name):
            return NotImplemented
        stride, dilation, kernel = _per_axis(stride, dims), _per_axis(dilation, dims), tuple(weight.shape[2:])
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            x = F.pad(x, [n for total in reversed(totals) for n in (total // 2, total - total // 2)])
            padding = 0
        padding = _per_axis(0 if padding == "valid" else padding, dims)
        y = function(x, session.operand(weight), None, stride, padding, dilation, groups)
        sizes = Sizes(y[0, 0].numel(), groups, weight.shape[0] // groups, weight.base[0].numel())
        settings = (kernel, stride, padding, dilation, groups)
        y = session.record(weight, "conv", name, settings, sizes, y, x)
        return y if bias is None else _plus(y, _beside(bias, dims), name)

    return rule


def _conv_transpose(name: str, dims: int, function: Callable) -> Callable:
    def rule(session, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        x = input
        if not isinstance(weight, Watched) or weight.transposed or not isinstance(x, Tensor) or x.ndim != dims + 2:
            return NotImplemented if not isinstance(bias, _Valued) or isinstance(weight, _Valued) else _plus(
                function(x, weight, None, stride, padding, output_padding, groups, dilation), _beside(bias, dims), name
            )
        if not session.batched(x, weight.name, name):
            return NotImplemented
        stride, padding, dilation = (_per_axis(value, dims) for value in (stride, padding, dilation))
        y = function(x, session.operand(weight), None, stride, padding, output_padding, groups, dilation)
        sizes = Sizes(x[0, 0].numel(), groups, weight.shape[0] // groups, weight.base[0].numel())
        settings = (tuple(weight.shape[2:]), stride, padding, dilation, groups)
        y = session.record(weight, "conv_transpose", name, settings, sizes, y, x)
        return y if bias is None else _plus(y, _beside(bias, dims), name)

    return rule


def _beside(bias, dims: int):
    """A channel's bias in the shape in which it is added."""
    return bias.reshape(bias.shape[0], *(1,) * dims)


def _embedding(
    session, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    ids = input
    if not isinstance(weight, Watched) or weight.transposed:
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq:
        raise PerExampleError(f"'{weight.name}': embedding with max_norm or scale_grad_by_freq has no per-example gradient")
    return _look_up(session, weight, ids, padding_idx, "embedding")


def _look_up(session: Session, weight: Watched, ids: Tensor, padding_idx: int | None, what: str):
    batched = session.batched(ids, weight.name, what)
    if not batched:  # the same rows for every example
        ids = ids.unsqueeze(0).expand(session.examples, *ids.shape)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    rows = session.operand(weight)
    y = F.embedding(ids, rows, padding)
    sizes = Sizes(ids[0].numel(), 1, *weight.shape)
    y = session.record(weight, "embedding", what, (padding,), sizes, y, ids)
    return y if batched else Spread(session, weight.name, y)


def _getitem(session: Session, weight, index):
    integers = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.ndim > 0
    if not isinstance(weight, Watched) or weight.transposed or weight.ndim != 2 or not integers:
        return NotImplemented
    return _look_up(session, weight, index % weight.shape[0], None, "indexing")


def _normalised(session: Session, operation: str, settings: tuple, normalise: Callable, x: Any, weight: Any) -> Any:
    """weight * normalised x."""
    own = isinstance(weight, Watched) and not weight.transposed and isinstance(x, Tensor)
    if own and session.batched(x, weight.name, operation):
        y = normalise(x, session.operand(weight))
        sizes = Sizes(1, 1, 1, weight.base.numel())
        return session.record(weight, operation, operation, settings, sizes, y, x)
    return NotImplemented


def _layer_norm(session, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    shape = tuple(normalized_shape)
    y = _normalised(session, "layer_norm", (shape, eps), lambda x, w: F.layer_norm(x, shape, w, None, eps), input, weight)
    if y is NotImplemented:
        y = F.layer_norm(input, shape, eps=eps)
        y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(session, input, normalized_shape, weight=None, eps=None):
    shape = tuple(normalized_shape)
    y = _normalised(session, "rms_norm", (shape, eps), lambda x, w: F.rms_norm(x, shape, w, eps), input, weight)
    if y is NotImplemented:
        y = F.rms_norm(input, shape, eps=eps)
        y = y if weight is None else y * weight
    return y


def _channels(y: Any, weight, bias):
    """The affine map of a norm with one weight a channel."""
    dims = y.ndim - 2
    y = y if weight is None else y * _beside(weight, dims)
    return y if bias is None else y + _beside(bias, dims)


def _group_norm(session, input, num_groups, weight=None, bias=None, eps=1e-5):
    groups = num_groups
    y = _normalised(session, "group_norm", (groups, eps), lambda x, w: F.group_norm(x, groups, w, None, eps), input, weight)
    if y is NotImplemented:
        y = _channels(F.group_norm(input, groups, eps=eps), weight, None)
    return _channels(y, None, bias)


def _instance_norm(
    session,
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    if use_input_stats and running_mean is not None:
        raise batch_statistics(weight if weight is not None else bias, "instance norm that keeps running statistics")
    y = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _channels(y, weight, bias)


def batch_statistics(leaf, what: str) -> PerExampleError:
    where = f"'{leaf.name}'" if isinstance(leaf, _Valued) else "a layer without weights"
    return PerExampleError(
        f"{where}: {what} in training mode mixes the examples of a batch, so no example has a gradient of its own; "
        "use group norm, or eval mode"
    )


def _batch_norm(session, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        raise batch_statistics(weight if weight is not None else bias, "batch norm")
    y = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return _channels(y, weight, bias)


def _batch_norm_of_torch(session, input, weight, bias, running_mean, running_var, training, momentum, eps, *rest):
    return _batch_norm(session, input, running_mean, running_var, weight, bias, training, momentum, eps)


def _like(function: Callable) -> Callable:
    """A tensor made in the likeness of a parameter, from nothing of its values."""

    def rule(session, *args, **kwargs):
        return function(*(x.plain if isinstance(x, _Valued) else x for x in args), **kwargs)

    return rule


def _setitem(session, x, index, value):
    name = _watching((index, value))[0].name
    raise PerExampleError(f"'{name}' is written into another tensor by assignment; use torch.cat, stack or where")


_MADE_LIKE = (
    *(Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros),
    *(torch.empty_like, torch.full_like, torch.is_complex, torch.is_floating_point, torch.ones_like, torch.zeros_like),
)

RULES: dict[Callable, Callable] = {
    F.batch_norm: _batch_norm,
    F.embedding: _embedding,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.linear: _linear,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    Tensor.__getitem__: _getitem,
    Tensor.__matmul__: _matmul,
    Tensor.__setitem__: _setitem,
    Tensor.__rmatmul__: _rmatmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _mm,
    torch.matmul: _matmul,
    torch.mm: _mm,
    torch.batch_norm: _batch_norm_of_torch,
    torch.embedding: lambda session, weight, ids, *rest: _embedding(session, ids, weight, *rest),
    **{f: _like(f) for f in _MADE_LIKE},
    **{f: _conv(f"conv{n}d", n, f) for n, f in enumerate((F.conv1d, F.conv2d, F.conv3d), 1)},
    **{
        f: _conv_transpose(f"conv_transpose{n}d", n, f)
        for n, f in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1)
    },
}


# Operations without one.

_ELEMENTWISE = frozenset(
    "add sub mul div true_divide __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ "
    "__pow__ __rpow__ pow subtract multiply divide rsub maximum minimum where addcmul addcdiv lerp lt le gt ge eq ne "
    "__lt__ __le__ __gt__ __ge__ neg abs exp log sqrt rsqrt square tanh sigmoid relu silu gelu softplus clamp sign sin "
    "cos reciprocal".split()
)


# Of these, a size may be that of the batch.
_SIZED = frozenset("expand broadcast_to repeat tile reshape view".split())


def spread_call(session: Session, func: Callable, args: tuple, kwargs: dict) -> Any:
    """The function mapped over the examples, each with its own copy of the parameters and a batch of one.

    Returns:
        a tensor (or a tree of them) with the batch leading if an argument had it, else Spread values.
    """
    given, what = (args, kwargs), called(func)
    name = _watching(given)[0].name
    values, batched = [], []
    for value in tree.leaves(given):
        if isinstance(value, Watched):
            value = session.spread(value)
        sized = what in _SIZED and type(value) is int
        values.append(value)
        batched.append((isinstance(value, Tensor) or sized) and session.batched(value, name, what))

    def function(flat: list) -> Any:
        args, kwargs = tree.unflatten(given, flat)
        return func(*args, **kwargs)

    try:
        if what in _ELEMENTWISE:
            out = _aligned(function, values, batched)
        else:
            out = _one_by_one(function, values, batched, session.examples if session.planning else None)
    except PerExampleError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        raise PerExampleError(
            f"'{name}' is used by {what}, which has no rule here and cannot be mapped over the examples "
            f"({str(error).splitlines()[0]}): {ADVICE}"
        ) from error
    if session.planning:
        whole = function([v.plain if isinstance(v, Spread) else v for v in values])
        _check_axes(session, whole, out, any(batched), name, what)
    if any(batched):
        return out
    return pytree.tree_map(lambda x: Spread(session, name, x) if isinstance(x, Tensor) else x, out)


def _aligned(function: Callable, values: list, batched: list[bool]) -> Tensor:
    """An elementwise function: the copies broadcast against the batch, nothing is mapped."""
    ranks = [v.ndim for v in values if isinstance(v, (Tensor, Spread))]
    rank = max(ranks)  # of the result, a batch of one with it
    flat = []
    for value in values:
        if isinstance(value, Spread):
            shape = (1,) * (rank - value.ndim) + tuple(value.value.shape[1:])
            if any(batched) and shape[0] != 1:
                raise PerExampleError(
                    f"'{value.name}': a value of shape {tuple(shape)}, the same for every example, meets the batch in its "
                    "first axis; everything with a batch axis must come in through `batch`"
                )
            shape = shape[1:] if any(batched) else shape
            value = value.value.reshape(value.value.shape[0], *shape)
        flat.append(value)
    return function(flat)


def _one_by_one(function: Callable, values: list, batched: list[bool], planned: int | None) -> Any:
    """Any other function, by vmap. While planning for so many examples one shows the shapes: vmap runs a function that
    it has no rule for as often as there are examples."""
    sized = [type(v) is int and b for v, b in zip(values, batched, strict=True)]
    mapped = [isinstance(v, Spread) or (isinstance(v, Tensor) and b) for v, b in zip(values, batched, strict=True)]

    def one(*parts: Tensor) -> Any:
        remaining = iter(parts)
        flat = []
        for value, is_batched, is_sized, is_mapped in zip(values, batched, sized, mapped, strict=True):
            if is_mapped:
                part = next(remaining)
                flat.append(part.unsqueeze(0) if is_batched else part)
            else:
                flat.append(1 if is_sized else value)
        return function(flat)

    parts = [v.value if isinstance(v, Spread) else v for v, m in zip(values, mapped, strict=True) if m]
    if planned is None:
        out = torch.func.vmap(one)(*parts)
    else:
        out = pytree.tree_map(lambda x: x.new_empty((planned, *x.shape)), one(*(part[0] for part in parts)))
    # torch's trees, because the outputs of transformers are registered with these.
    return pytree.tree_map(lambda x: x.squeeze(1) if x.shape[1] == 1 else x, out) if any(batched) else out


def _check_axes(session: Session, whole: Any, out: Any, batched: bool, name: str, what: str) -> None:
    """That mapping gave the shapes which the function itself gives."""
    for expected, found in zip(pytree.tree_leaves(whole), pytree.tree_leaves(out), strict=True):
        shape = tuple(found.shape) if batched else tuple(found.shape[1:])
        if tuple(expected.shape) != shape:
            raise PerExampleError(
                f"'{name}': the result of {what} keeps no batch axis of its own in front (it mixes or moves the "
                f"examples): {ADVICE}"
            )
