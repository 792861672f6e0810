"""Settings for all tests: two workers share two cores, so each of them, and what it starts, computes on one thread."""

import contextlib
import importlib.util
import os
import sys

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# Where torchvision was built for another torch its operators do not load, and neither do its models, nor those of
# transformers, unless the operators that it looks for are declared.
if importlib.util.find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError, OSError):
        for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[_name]
        OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
        with contextlib.suppress(RuntimeError):
            OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
