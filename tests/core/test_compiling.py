"""Marks for torch.compile, in a process of its own: Dynamo must not have been imported before."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import torch
from core import compiling

@compiling.allow_in_graph
def opaque(x):
    torch._C._functorch.is_batchedtensor(x)  # Dynamo has no way to trace this
    return x + 1

@compiling.assume_constant_result
def constant():
    return len(open(__import__("os").devnull).read()) + 3

assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
f = torch.compile(lambda x: opaque(x) * constant(), backend="eager", fullgraph=True)
assert f(torch.ones(2)).tolist() == [6, 6]

@compiling.allow_in_graph  # now at once
def later(x):
    torch._C._functorch.is_batchedtensor(x)
    return x + 2

g = torch.compile(lambda x: later(x), backend="eager", fullgraph=True)
assert g(torch.ones(2)).tolist() == [3, 3]
assert not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path)
"""


def test_marks_are_applied_when_dynamo_is_imported():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=ROOT)


def test_the_library_is_imported_without_dynamo():
    modules = ("core.per_example", "core.tap", "core.spec", "nets.language.gpt2", "train.step", "train.run.run")
    program = f"import sys, {', '.join(modules)}; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
