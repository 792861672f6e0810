"""Make torchvision importable where it was built for another torch. Import this before torchvision, transformers or
diffusers.

Its operators do not load there, and neither do its models, nor those of transformers and diffusers, unless the
operators that it looks for are declared. Tests (tests/conftest.py) and benchmarks need its models only.
"""

import contextlib
import importlib.util
import sys

import torch

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
