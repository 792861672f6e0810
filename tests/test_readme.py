"""The Python examples of the pages run as they stand, one after the other."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "page", ["README.md", "core/README.md", "core/per_example/README.md", "nets/README.md#image-classifiers-by-name"]
)
def test_examples_run(page, monkeypatch):
    torch._dynamo.reset()
    # The examples compile through inductor; here the tracing is what is of interest.
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, **{**options, "backend": "aot_eager"}))
    path, _, section = page.partition("#")
    text = (ROOT / path).read_text(encoding="utf-8")
    if section:  # the others name what the reader is to bring
        (text,) = (part for part in text.split("\n## ") if part.split("\n")[0].lower().replace(" ", "-") == section)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compiled_source(block, page), names)
    if page == "README.md":
        torch.testing.assert_close(names["out"].mean, names["gradient"])
        assert torch.equal(names["norms"], names["out"].total_norm) and names["norms"].shape == (32,)
        assert names["ensemble"]["layers"][0]["weight"].shape == (8, 128, 64) and int(names["state"].step) == 1


def compiled_source(block: str, page: str):
    return compile(block, page, "exec")
