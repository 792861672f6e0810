"""Taps: reports of a layer that arrive with the gradient.

`tap(x, sink, report)` is `x`. In the backward pass `report` arrives as the cotangent of `sink`, a second input that the
forward pass does not use. Differentiating with respect to the sink gives the report, through grad, vmap,
torch.compile and sharding alike, with no hooks and no mutation:

    out, report = y, s        ->  d out / d x = 1,   "d out / d s" := report

A layer that the loss does not reach runs no backward and reports nothing (its sink's gradient is zero). Reports of
several uses of a sink add up, as cotangents do.
"""

import torch
from torch import Tensor

from core.compiling import allow_in_graph


class _Tap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, sink: Tensor, report: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, cotangent):
        (report,) = ctx.saved_tensors
        return cotangent, report, None

    @staticmethod
    def jvp(ctx, x_tangent, sink_tangent, report_tangent):
        return x_tangent.view_as(x_tangent)


# Dynamo refuses a Function with a jvp of its own, loses its vmap rule, and in some forms drops the backward silently;
# called through allow_in_graph it is one opaque node that AOTAutograd differentiates correctly.
@allow_in_graph
def _tap(x: Tensor, sink: Tensor, report: Tensor) -> Tensor:
    return _Tap.apply(x, sink, report)


def tap(x: Tensor, sink: Tensor, report: Tensor) -> Tensor:
    """`x` itself; its backward hands `report` to `sink` as the cotangent of `sink`.

    Args:
        x: any shape. The report is made when the backward pass reaches x.
        sink: floating point, of the shape of `report`.
        report: carries no derivative of its own (it is detached). It is not scaled by the cotangent of x.

    Raises:
        ValueError: sink and report differ in shape.
    """
    if sink.shape != report.shape:
        raise ValueError(f"tap: the sink has shape {tuple(sink.shape)}, the report {tuple(report.shape)}")
    return _tap(x, sink, report.detach().to(sink.dtype))
