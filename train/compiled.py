"""Functions through torch.compile, with the options that train steps and samplers need."""

from collections.abc import Callable

import torch
from torch import Tensor

from core import tree


def compiled(f: Callable, backend: str = "inductor", *, channels_last: bool = False) -> Callable:
    """`f` through torch.compile, one graph per set of shapes; exceptions raised by `f` while tracing pass unchanged.

    channels_last: on a CPU, let inductor choose the memory layout of images. For an `f` without gradients: small U-Nets
        are 7 to 15 percent faster by it (tests/benchmarks/diffusion_sampling.py).
    """
    graph = None

    def run(*args):
        nonlocal graph
        if graph is None:
            options = _options(backend, args, channels_last)
            graph = torch.compile(f, fullgraph=True, dynamic=False, backend=backend, options=options)
        try:
            return graph(*args)
        except torch._dynamo.exc.TorchDynamoException:
            # Dynamo hides what f itself raises (a ValueError of the loss, say); called again, f raises it plainly.
            f(*args)
            raise

    return run


def _options(backend: str, args: tuple, channels_last: bool) -> dict | None:
    if backend != "inductor" or not all(
        leaf.device.type == "cpu" for leaf in tree.leaves(args) if isinstance(leaf, Tensor)
    ):
        return None
    # On a CPU, inductor lays images out with their channels last. Parameters and their gradients come and go in the
    # usual order, so in a train step the copies cost more than the layout gains (tests/benchmarks/classifiers.py);
    # and torch 2.13 loses gradients in that layout, of diffusers' U-Net at least (tests/benchmarks/diffusion_unet.py).
    # A value of more than 30 operations that is used twice it writes to a buffer; below that it copies the operations
    # into both users, which in the rounds of a Threefry doubles and doubles again. From 16 on, the step of a small
    # Transformer with dropout compiles in 91 s, not 190; from 8 on in 89 s, but in a profile of a U-Net's step the
    # generated kernels (a tenth of it) then take a quarter longer.
    return {"layout_optimization": channels_last, "realize_opcount_threshold": 16}
