"""The Python examples of the pages run as they stand, one after the other."""

import ast
import textwrap

import pytest
import torch

from tests.test_pages import FENCE, PAGES, read

RUN = ["README.md", "core/README.md", "core/per_example/README.md", "nets/README.md", "train/README.md"]
# How the blocks of these pages begin that do not run: they are ```py, and are parsed only.
NOT_RUN = {
    "core/per_example/README.md": ["from backpack import backpack, extend\n"],  # another library
    "train/README.md": ["from train.ship import int8\n"],  # libraries of an extra
    "nets/README.md": [
        "params, cfg = gpt2.from_pretrained(",  # downloads
        "from nets.classifiers import torchvision_weights\n",
        "params, cfg = marian.from_pretrained(",  # downloads
        "params, cfg = bert.from_pretrained(",  # downloads
        'net("name", ',  # rows of tests/registry for a net that is still to be written
        'parity("name", ',
    ],
}


def blocks(page: str, *languages: str) -> list[str]:
    """The code of a page in one of these languages, in order."""
    return [textwrap.dedent(code) for _, language, code in FENCE.findall(read(page)) if language in languages]


@pytest.mark.parametrize("page", PAGES)
def test_examples_are_python(page):
    for block in blocks(page, "python", "py"):
        ast.parse(block, page)
    if page in RUN:
        beginnings = NOT_RUN.get(page, [])
        assert all(block.startswith(start) for block, start in zip(blocks(page, "py"), beginnings, strict=True))


@pytest.mark.parametrize("page", RUN)
@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_examples_run(page, traced, tmp_path, monkeypatch):
    """As they stand, but without inductor: what they compile is traced, which takes most of the time, or is not."""
    monkeypatch.chdir(tmp_path)  # some write files
    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile(f, **{**options, "backend": "aot_eager"}) if traced else f
    )
    names: dict = {}
    examples = blocks(page, "python")
    assert examples
    for block in examples:
        exec(compiled_source(block, page), names)
    if page == "core/per_example/README.md":
        for other in ("opacus", "torchjd"):
            torch.testing.assert_close(names[other], names["here"])
    if page == "README.md":
        torch.testing.assert_close(names["out"].mean, names["gradient"])
        torch.testing.assert_close(names["norms"], names["out"].total_norm)
        assert names["norms"].shape == (32,)
        assert names["ensemble"]["layers"][0]["weight"].shape == (8, 128, 64) and int(names["state"].step) == 1


def compiled_source(block: str, page: str):
    return compile(block, page, "exec")
