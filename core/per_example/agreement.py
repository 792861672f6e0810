"""Comparison of the losses that are reported on with the loss itself: on two examples, once per plan."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from core import tree
from core.per_example.arguments import batch_size, split_aux
from core.per_example.errors import PerExampleError
from core.per_example.leaves import watch
from core.per_example.trace import Following, LeafPlan, inside_vjp
from core.tree import Tree


def have_values(params: Tree, batch: Tree) -> bool:
    """False while compiling, and for tensors without values."""
    if torch.compiler.is_compiling():
        return False
    return not any(isinstance(x, FakeTensor) or x.is_meta for x in tree.leaves((params, batch)))


def _first_member(x: Tensor) -> Tensor:
    """A tensor without its transforms; of an ensemble under vmap, its first member."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        batched = functorch.is_batchedtensor(x)
        x = functorch.get_unwrapped(x).select(functorch.maybe_get_bdim(x), 0) if batched else functorch.get_unwrapped(x)
    return x


def compare_losses(
    loss: Callable,
    params: Tree,
    batch: Tree,
    plans: dict[str, LeafPlan],
    answers: tuple,
    mapped: dict[str, str],
    lifted: bool,
    eps: float,
    has_aux: bool,
) -> None:
    """Compare the losses of the first and the last example, computed as planned, with those of the loss itself; of an
    ensemble under vmap, those of its first member.

    Operations without a rule, and layers of lifted modules that cannot be covered otherwise, are mapped over the
    examples, one at a time; where they mix the examples of a batch, the two differ. Of lifted layers that run whole,
    as their authors wrote them, the losses are compared with those of the examples alone, too.

    Args:
        lifted: some layers of a lifted module run whole.
        eps: of the coarsest dtype that the loss computes in. Rounding is allowed 4 sqrt(eps) of the larger loss.

    Raises:
        PerExampleError: they differ; it names what was mapped.
    """
    params, batch = tree.map(_first_member, params), tree.map(_first_member, batch)
    count = batch_size(batch)
    pair = tree.map(lambda x: x[[0, count - 1]] if count > 1 else x.clone(), batch)  # (2, ...)
    devices = {x.device for x in tree.leaves((params, batch)) if x.device.type == "cuda"}

    def planned() -> Tensor:
        following = Following(min(count, 2), plans, answers)
        return split_aux(loss(watch(following, params, plans), pair), has_aux)[0]

    def plain() -> Tensor:  # of parameters that require a gradient, as in the call itself
        def losses(leaves: list[Tensor]) -> Tensor:
            return split_aux(loss(tree.unflatten(params, leaves), pair), has_aux)[0]

        return torch.func.vjp(losses, tree.leaves(params))[0]

    def alone() -> Tensor:
        ones = [tree.map(lambda x, i=i: x[i : i + 1], pair) for i in range(min(count, 2))]
        return torch.cat([split_aux(loss(params, one), has_aux)[0] for one in ones])

    values = []
    for f in (plain, lambda: inside_vjp(planned), *([alone] if lifted and count > 1 else [])):
        with torch.random.fork_rng(devices=list(devices)):  # a loss that draws from it draws the same twice
            values.append(f().detach())
    expected, reported = values[:2]
    tolerance = 4 * eps**0.5
    scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())

    def agree(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)

    if lifted and count > 1 and not agree(values[2], expected):
        worst = int((values[2] - expected).abs().nan_to_num(torch.inf).argmax())
        raise PerExampleError(
            f"the loss mixes its examples in a lifted module: that of one of two is {float(expected[worst]):g} beside "
            f"the other, {float(values[2][worst]):g} alone; or it changes from call to call"
        )
    if agree(reported, expected):
        return
    worst = int((reported - expected).abs().nan_to_num(torch.inf).argmax())
    functions = " or ".join(f"{what} of '{name}'" for what, name in list(mapped.items())[:3])
    causes = f"it mixes its examples in {functions}, which is mapped over them one at a time, " if mapped else ""
    raise PerExampleError(
        f"the loss of one of two examples is {float(expected[worst]):g}, but {float(reported[worst]):g} as it would be "
        f"reported on: {causes}it asks for the type of a parameter, or it changes from call to call"
    )
