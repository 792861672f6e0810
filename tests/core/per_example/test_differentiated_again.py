"""Reports that are differentiated again are refused."""

import pytest
import torch

from core import per_example, tree
from core.per_example import PerExampleError
from tests.core.per_example import net_models  # noqa: F401 - adds its models
from tests.core.per_example.models import make

WANTS = [("norm",), ("gram",), ("square",), ("dot",), ()]


def quantity(model, want):
    def f(params):
        direction = params if "dot" in want else None
        out = per_example.reports(model.loss, params, model.batch, want, direction=direction)
        return sum(x.sum() for x in tree.leaves((out.losses, out.sum, [getattr(out, q) for q in want])))

    return f


@pytest.mark.parametrize(
    "name", ["linear 2-D", "linear 3-D", "layer scale", "embedding", "tied", "conv1d", "layer_norm"]
)
def test_reports_are_not_differentiated_again(name):
    model = make(name)
    for want in WANTS:
        with pytest.raises(PerExampleError, match="cannot be differentiated again"):
            torch.func.grad(quantity(model, want))(model.params)
    with pytest.raises(PerExampleError, match="cannot be differentiated again"):
        torch.func.jvp(quantity(model, ("norm",)), (model.params,), (model.params,))
    for method in ("kept", "twice"):
        for field in ("losses", "sum", "norm", "weights", "total_norm"):
            with pytest.raises(PerExampleError, match="cannot be differentiated again"):
                torch.func.grad(
                    lambda p, m=method, field=field: sum(
                        x.sum()
                        for x in tree.leaves(
                            getattr(per_example.clipped(model.loss, p, model.batch, 0.1, method=m), field)
                        )
                    )
                )(model.params)


def test_gradient_by_autograd_is_refused_too():
    model = make("linear 3-D")
    params = tree.map(lambda p: p.clone().requires_grad_(), model.params)
    with pytest.raises(PerExampleError, match="cannot be differentiated again"):
        per_example.reports(model.loss, params, model.batch).total_norm.sum().backward()
