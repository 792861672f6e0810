"""Where another tool is right about per-example norms, and functree everywhere: both against plain autograd."""

import pytest
import torch
from cases import CASES, case
from table import verdict
from tools import TOOLS, loop, version

PLAIN = ["multilayer perceptron", "convolution"]
NORMS = ["layer norm", "group norm"]
CONVOLUTIONS = ["grouped convolution", "depthwise convolution"]
SHARED = ["embedding tied to the output layer", "linear used twice"]
CIRCULAR = "convolution, circular padding"
POSITIONS = ["position embedding, looked up once", "position embedding, time = batch"]
REST = ["RMS norm", "class token and layer scale"]

# In the other cases the tool is wrong, leaves parameters out, refuses or stops; table.py says which.
RIGHT = {
    "vmap(grad)": [name for name in CASES if name != "LSTM"],
    "ExpandedWeights": [*PLAIN, *NORMS, *CONVOLUTIONS, *SHARED, CIRCULAR, "embedding", "LSTM", "linear on a 4-D input"],
    "Opacus hooks": [*PLAIN, *NORMS, *CONVOLUTIONS, *SHARED, *REST, "embedding", "LSTM", "linear on a 4-D input"],
    "Opacus ghost": [*PLAIN, *NORMS, *CONVOLUTIONS, *REST, "embedding", "LSTM"],
    "BackPACK BatchGrad": [*PLAIN, *CONVOLUTIONS, "embedding", "LSTM", "linear on a 4-D input"],
    "BackPACK BatchL2Grad": [*PLAIN, "embedding", "LSTM", "linear on a 4-D input"],
    "TorchJD batch_dim=0": [name for name in CASES if name not in (SHARED[0], *POSITIONS, "LSTM")],
    "TorchJD batch_dim=None": [name for name in CASES if name not in SHARED],
    "fastDP": [*PLAIN, *NORMS, "embedding", "embedding with a padding index", "linear on a 4-D input"],
    "captum": [*PLAIN, "linear used twice", "linear on a 4-D input"],
    "ASDL": PLAIN,
    "kronfluence": [*PLAIN, "linear on a 4-D input"],
    "kronfluence, shared": [*PLAIN, "linear used twice", "linear on a 4-D input"],
}


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_one_function(name):
    about = case(name)
    torch.testing.assert_close(about.function(about.params, about.x), about.module(about.x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_functree_is_right_in_every_case(name):
    assert verdict("functree", name) == ("exact", "")


@pytest.mark.slow
@pytest.mark.parametrize("tool", RIGHT)
def test_the_tool_agrees_where_it_is_right(tool):
    if version(tool) is None:
        pytest.skip(f"{TOOLS[tool][1]} is not installed")
    verdicts = {name: verdict(tool, name)[0] for name in RIGHT[tool]}
    assert verdicts == dict.fromkeys(RIGHT[tool], "exact")


def test_verdicts(monkeypatch):
    """Verdicts on tools that fail in a known way."""

    def without_bias(case):
        case.module.out.bias.requires_grad_(False)
        grads = torch.func.vmap(torch.func.grad(lambda p, x, y: case.losses(p, (x[None], y[None]))[0]), (None, 0, 0))
        gradients = grads(case.params, case.x, case.labels)
        squares = [gradients["first"]["weight"], gradients["first"]["bias"], gradients["out"]["weight"]]
        return sum(g.flatten(1).square().sum(1) for g in squares).sqrt()

    def refusing(case):
        raise NotImplementedError("no such layer")

    broken = {
        "exact": loop,
        "wrong: 5 %": lambda case: 1.05 * loop(case),
        "shape (4,)": lambda case: loop(case)[:4],
        "refuses": refusing,
        "stops": lambda case: {}["missing"],
    }
    for words, tool in broken.items():
        monkeypatch.setitem(TOOLS, "made", (tool, "torch"))
        assert verdict("made", "multilayer perceptron")[0] == words
    monkeypatch.setitem(TOOLS, "made", (without_bias, "torch"))
    assert verdict("made", "multilayer perceptron")[0].startswith("leaves out out.bias: ")
    monkeypatch.setitem(TOOLS, "made", (loop, "no-such-distribution"))
    assert verdict("made", "multilayer perceptron")[0] == "not installed"
