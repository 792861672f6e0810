"""One call of a loss on watched parameters: first a plan is written, later it is followed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.per_example.backward_rules import Sizes, report
from core.per_example.errors import ADVICE, PerExampleError
from core.per_example.forward_rules import RULES
from core.per_example.leaves import Spread, Watched, called, watched_in
from core.per_example.mapped import spread_call


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


def _multiply(a: tuple, b: tuple) -> bool:
    """Whether matmul takes tensors of these shapes, their axes in front left out."""
    return bool(a) and bool(b) and a[-1] == (b[-2] if len(b) > 1 else b[0])


def _reversed(left: Tensor, right: Any, name: str) -> bool:
    as_is, reverse = _multiply(left.shape, right.shape), _multiply(right.shape, left.shape)
    if as_is and reverse:
        raise PerExampleError(
            f"'{name}' {tuple(right.shape)} is multiplied by @, where both orders fit and torch.compile does not tell "
            "them apart: write torch.matmul or F.linear"
        )
    return reverse


class Session:
    """What the Watched leaves of one call of the loss share: first a plan is written, later it is followed.

    Args:
        examples: N.
        plans: by parameter, or None while planning.
        answers: what `batched` answered while planning, in order.
        sinks: by parameter, the sinks of its uses: one list for each use.
    """

    def __init__(
        self, examples: int, plans=None, answers=(), want=(), sinks=None, direction=None, budget: int | None = None
    ):
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
        shape = x.shape if isinstance(x, Tensor) else (x,)
        return self._recall(f"{what} of '{name}'", lambda: self._has_batch_axis(shape, name, what))

    def _recall(self, question: str, find: Callable[[], bool]) -> bool:
        """What was found while planning."""
        if self.planning:
            self.answers.append((question, find()))
            return self.answers[-1][1]
        asked, answer = self.answers[self.asked] if self.asked < len(self.answers) else ("nothing more", False)
        self.asked += 1
        if asked != question:
            raise PerExampleError(f"the plan is of another loss: it has {asked} where the loss has {question}")
        return answer

    def _has_batch_axis(self, shape: tuple, name: str, what: str) -> bool:
        n = self.examples
        if not any(size and size % n == 0 for size in shape):
            return False
        if shape[0] == n and n not in shape[1:]:
            return True
        found = ", ".join(
            "N" if size == n else f"{size // n}*N" if size and size % n == 0 else f"{size}" for size in shape
        )
        raise PerExampleError(
            f"'{name}' meets ({found}) in {what}, for a batch of N: the batch must be one axis of its own, and the "
            f"leading one; {ADVICE}"
        )

    def record(self, leaf: Watched, operation: str, called: str, settings: tuple, sizes: Sizes, y, saved) -> Tensor:
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

    def operand(self, leaf: Watched) -> Tensor:
        """The value that an operation takes: apart from the graph where the report brings the gradient."""
        plan = None if self.planning else self.plans[leaf.name]
        return leaf.value.detach() if plan is not None and plan.sums else leaf.value

    def spread(self, leaf: Watched) -> Spread:
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

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """A function with watched arguments: its rule, or each example for itself."""
        name = watched_in((args, kwargs))[0].name
        self.check(name, called(func))
        args = self._as_written(func, args, name)
        rule = RULES.get(func)
        if rule is not None:
            out = rule(self, *args, **kwargs)
            if out is not NotImplemented:
                return out
        return spread_call(self, func, args, kwargs)

    def _as_written(self, func: Callable, args: tuple, name: str) -> tuple:
        """While compiling, `W @ x` arrives as matmul(x, W), like `x @ W`: the shapes tell, or it is refused."""
        if func is not Tensor.matmul or not torch.compiler.is_compiling() or not isinstance(args[0], Tensor):
            return args
        left, right = args
        if self._recall(f"the order of @ with '{name}'", lambda: _reversed(left, right, name)):
            return right, left
        return args
