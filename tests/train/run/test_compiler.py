"""Where compiled code is kept, and that processors of other instruction sets do not take it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from train.run import compiler

ROOT = Path(__file__).parents[3]


def test_cache_is_named_after_the_instruction_set(monkeypatch):
    for capability, name in (("AVX512", "avx512"), ("NO AVX", "no_avx")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        compiler.configure()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{default_cache_dir()}_{name}"
    compiler.configure()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].endswith("_no_avx")  # once set, it stays
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    compiler.configure()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


# Sizes that fill some vectors and leave a rest.
COMPILED = """
import torch
from core import random
from train.run import compiler
compiler.configure()
draw = torch.compile(lambda key: random.uniform(key, (67,)), fullgraph=True, dynamic=False)
assert torch.equal(draw(random.key(3)), random.uniform(random.key(3), (67,)))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="needs vector instructions")
def test_another_instruction_set_compiles_anew(tmp_path):
    variables = {n: v for n, v in os.environ.items() if n not in ("ATEN_CPU_CAPABILITY", "TORCHINDUCTOR_CACHE_DIR")}
    variables |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for settings in ({}, {"ATEN_CPU_CAPABILITY": "default"}, {}):
        subprocess.run([sys.executable, "-c", COMPILED], env=variables | settings, check=True, timeout=300)
    assert len(list(tmp_path.glob(f"{Path(default_cache_dir()).name}_*"))) == 2
