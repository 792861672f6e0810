"""Sessions: one call of a loss on watched parameters. `Planning` records every use of every parameter, `Following`
takes the way that was planned and attaches the reports.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.per_example.attributes import attribute, check_function
from core.per_example.backward_rules import Sizes, report
from core.per_example.custom_functions import CustomFunction, inside_custom_function
from core.per_example.dynamo import transform_depth
from core.per_example.errors import ADVICE, PerExampleError
from core.per_example.forward_rules import RULES
from core.per_example.leaves import Copies, Parameter, called, contents_in
from core.per_example.mapped import spread_call


class Use(NamedTuple):
    """One use of a parameter."""

    parameter: str
    operation: str  # a key of backward_rules.FORMS
    called: str  # the function that was called
    settings: tuple
    sizes: Sizes
    output: tuple  # shape of the output, without the batch axis
    dtype: torch.dtype  # of the output


class LeafPlan(NamedTuple):
    """The uses of one parameter, and the way its gradients are reduced."""

    shape: tuple[int, ...]
    uses: tuple[Use, ...]
    method: str
    keep: bool  # the cotangents of all uses are kept and reduced together after the backward pass
    sums: bool  # the gradient of the sum comes from the reduction, which forms it anyway


def inside_vjp(f: Callable[[], Any]) -> Any:
    """`f()` inside a torch.func transform, where autograd.Functions of a parameter arrive at `Session.call`."""
    outs = []

    def run(x: Tensor) -> Tensor:
        outs.append(f())
        return x

    torch.func.vjp(run, torch.zeros(()))
    return outs[0]


def _misplaced(shape: tuple, n: int, name: str, what: str) -> PerExampleError:
    sizes = ["N" if size == n else f"{size // n}*N" if size and size % n == 0 else f"{size}" for size in shape]
    return PerExampleError(
        f"'{name}' meets ({', '.join(sizes)}) in {what}, for a batch of N: the batch must be one axis of its own"
        f"{', and the leading one' if sizes.count('N') == 1 else ''}; {ADVICE}"
    )


class Session:
    """The state that the watched parameters of one call of the loss share."""

    examples: int
    planning: bool

    def __init__(self, examples: int, observer: Any):
        self.examples, self.observer = examples, observer
        self.depth = transform_depth()
        self.uses: dict[str, list[Use]] = {}
        self.copies: dict[str, Tensor] = {}

    def answer(self, question: str, shape: tuple, name: str, what: str) -> int | None:
        """The batch axis of a shape, None if it has none."""
        raise NotImplementedError

    def whole(self, layer: str, run: Callable[[], Any], mapped: Callable[[], Any]) -> Any:
        """`run()`, a layer on watched parameters; where that cannot be covered, `mapped()`."""
        raise NotImplementedError

    def record(self, leaf: Parameter, operation: str, called: str, settings: tuple, sizes: Sizes, y, saved) -> Tensor:
        """`y`, the result of one use of a parameter, with its report."""
        raise NotImplementedError

    def operand(self, leaf: Parameter) -> Tensor:
        """The value that an operation takes."""
        raise NotImplementedError

    def axis(self, x: Any, name: str, what: str) -> int | None:
        """The batch axis of x, a tensor or a size: by its odd size while planning, by the plan later."""
        return self.answer(f"{what} of '{name}'", x.shape if isinstance(x, Tensor) else (x,), name, what)

    def batched(self, x: Tensor, name: str, what: str) -> bool:
        """True if x has the batch axis, which must be the leading one."""
        axis = self.axis(x, name, what)
        if axis:
            raise _misplaced(x.shape, self.examples, name, what)
        return axis == 0

    def use(self, leaf: Parameter, operation: str, called: str, settings: tuple, sizes: Sizes, y: Tensor) -> Use:
        """Note a use of a parameter and return it."""
        use = Use(leaf.name, operation, called, settings, sizes, tuple(y.shape[1:]), y.dtype)
        self.uses.setdefault(leaf.name, []).append(use)
        return use

    def spread(self, leaf: Parameter) -> Copies:
        """A copy of the parameter per example."""
        if leaf.name not in self.copies:
            # The first use may lie under torch.no_grad, and later ones take the same copies.
            with torch.enable_grad():
                base = self.operand(Parameter(self, leaf.name, leaf.base, leaf.base))
                copies = base.unsqueeze(0).expand(self.examples, *base.shape)  # (N, *shape)
                sizes = Sizes(1, 1, 1, base.numel())
                self.copies[leaf.name] = self.record(leaf, "dense", "spread", (), sizes, copies, None)
        copies = self.copies[leaf.name]
        for dtype in leaf.casts:
            copies = copies.to(dtype)
        return Copies(self, leaf.name, copies.mT if leaf.transposed else copies)

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a function of parameters or copies: by its rule, or mapped over the examples."""
        content = contents_in((args, kwargs))[0]
        what = called(func, args)
        if what == "__get__":
            return attribute(self, content, func.__self__.__name__)  # type: ignore[attr-defined]  # a getter's
        check_function(what, content, args, kwargs)
        if transform_depth() != self.depth:
            raise PerExampleError(
                f"'{content.name}' is used by {what} inside another transform (an inner grad or vmap) in the loss: "
                f"{ADVICE}"
            )
        rule = RULES.get(func)
        if rule is not None:
            out = rule(self, *args, **kwargs)
            if out is not NotImplemented:
                return out
        return spread_call(self, func, args, kwargs)


class Planning(Session):
    """Records uses, and which arguments have the batch axis, on tensors without values.

    Raises:
        CustomFunction: from the loss, which calls a custom autograd.Function with a parameter; use `inside_vjp`.
    """

    planning = True

    def __init__(self, examples: int, observer):
        super().__init__(examples, observer)
        self.answers: list[tuple[str, Any]] = []
        self.mapped: dict[str, str] = {}  # functions that are mapped over the examples, by name: a parameter of each
        self.layers: dict[str, str] = {}  # lifted layers that are mapped over the examples: why

    def answer(self, question: str, shape: tuple, name: str, what: str) -> int | None:
        """Find the examples' axis of a shape, None without one, and note it as the answer to a question."""
        axes = [i for i, size in enumerate(shape) if size and size % self.examples == 0]
        if len(axes) > 1 or any(shape[i] != self.examples for i in axes):
            raise _misplaced(shape, self.examples, name, what)
        self.answers.append((question, axes[0] if axes else None))
        return self.answers[-1][1]

    def whole(self, layer: str, run: Callable[[], Any], mapped: Callable[[], Any]) -> Any:
        """As `Session.whole`; notes which of the two it was."""
        uses = {name: list(of) for name, of in self.uses.items()}
        before = len(self.answers), uses, dict(self.copies), dict(self.mapped), dict(self.layers)
        try:
            self.answers.append((layer, True))
            return run()
        except PerExampleError as refusal:
            error = refusal  # the name after `as` ends with the clause
            count, self.uses, self.copies, self.mapped, self.layers = before
            self.answers = self.answers[:count]
            try:
                self.answers.append((layer, False))
                out = mapped()
            except PerExampleError:
                raise error from None
        self.layers[layer] = str(error).partition(ADVICE)[0].rstrip(";: ")
        return out

    def record(self, leaf, operation, called, settings, sizes, y, saved) -> Tensor:
        """Note a use; the output is unchanged."""
        self.use(leaf, operation, called, settings, sizes, y)
        return y

    def operand(self, leaf: Parameter) -> Tensor:
        """Value that an operation gets in place of a watched parameter."""
        return leaf.value

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call an operation. Raises CustomFunction inside a custom autograd.Function."""
        if not self.depth and not torch.compiler.is_compiling() and inside_custom_function():
            raise CustomFunction
        return super().call(func, args, kwargs)


class Following(Session):
    """Takes the answers of a plan, and attaches the reports to the operations' outputs.

    Args:
        examples: N.
        plans, answers: of the `Plan`.
        want: quantities to report.
        sinks: by parameter, the sinks of its uses: one list for each use.
        direction: by parameter, for "dot".
        budget: bytes of gradients that are formed at once.
    """

    planning = False

    def __init__(self, examples: int, plans: dict, answers: tuple, want=(), sinks=None, direction=None, budget=None):
        super().__init__(examples, nullcontext())
        self.plans, self.answers, self.answered = plans, answers, 0
        self.want, self.sinks, self.direction, self.budget = want, sinks, direction or {}, budget
        self.inputs: dict[str, list] = {}

    def whole(self, layer: str, run: Callable[[], Any], mapped: Callable[[], Any]) -> Any:
        """Run a layer in the way that the plan says."""
        return (run if self.answer(layer, (), layer, layer) else mapped)()

    def answer(self, question: str, shape: tuple, name: str, what: str) -> Any:
        """Answer that the plan has to a question. Raises PerExampleError for another question."""
        planned, answer = self.answers[self.answered] if self.answered < len(self.answers) else ("nothing more", None)
        self.answered += 1
        if planned != question:
            raise PerExampleError(f"the plan is of another loss: it has {planned} where the loss has {question}")
        return answer

    def record(self, leaf, operation, called, settings, sizes, y, saved) -> Tensor:
        """Output of a use, with a tap that reports it. Raises PerExampleError for a use that the plan has not."""
        name = leaf.name
        use, index = self.use(leaf, operation, called, settings, sizes, y), len(self.uses[name]) - 1
        plan = self.plans[name]
        if index >= len(plan.uses) or plan.uses[index][:6] != use[:6]:
            planned = f"{plan.uses[index].called} {plan.uses[index].output}" if index < len(plan.uses) else "no more"
            raise PerExampleError(
                f"the plan is of another loss: use {index + 1} of '{name}' is {called} {use.output}, planned {planned}"
            )
        if self.sinks is None:
            return y
        if plan.keep:
            self.inputs.setdefault(name, []).append(y.detach().new_empty(0) if saved is None else saved)
            spec = (operation, settings, plan.shape, ("keep",), "", 0)
            return report(spec, y, None, saved, None, *self.sinks[name][index])
        want = (*self.want, "sum") if plan.sums else self.want
        if not want:
            return y
        spec = (operation, settings, plan.shape, want, plan.method, self.budget)
        weight = leaf.base if plan.sums else None
        return report(spec, y, weight, saved, self.direction.get(name), *self.sinks[name][index])

    def operand(self, leaf: Parameter) -> Tensor:
        """Value that an operation gets in place of a watched parameter."""
        # Apart from the graph where the report brings the gradient.
        return leaf.value.detach() if self.plans[leaf.name].sums else leaf.value

    def check_complete(self) -> None:
        """Raise if the loss did less than was planned."""
        for name, plan in self.plans.items():
            if len(self.uses.get(name, ())) != len(plan.uses):
                uses = len(self.uses.get(name, ()))
                raise PerExampleError(
                    f"the plan is of another loss: it has {len(plan.uses)} uses of '{name}', the loss {uses}"
                )
