"""8-bit packages for onnxruntime, and torchao's tensors as leaves: that something was quantised, and how well."""

import pytest
import torch

from core import random, spec, tree
from core.layers import linear, linear_spec
from tests.train.ship.exports import face, inputs_of, program_of
from train.ship import FORMS, ShipError, compare, load, save
from train.ship import int8 as integers


@pytest.fixture(autouse=True, scope="module")
def packages():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


def both(folder, name: str, static: bool):
    """A net's package and its quantised one."""
    program = program_of(name)
    one = load(save(program, folder / "onnx", "onnx"))
    batches = [inputs_of(name, 4, seed=20 + i) for i in range(8)] if static else None
    return one, load(integers.quantise(one, program, folder / "int8", batches))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "static"), [("resnet", True), ("convolutional", True), ("gpt2", False)])
def test_quantised_packages_compute_with_integers(tmp_path, name, static):
    one, small = both(tmp_path, name, static)
    counts = small.manifest["quantised"]
    apply, params = face(name)
    matrices = sum(leaf.ndim > 1 for leaf in tree.leaves(params))
    assert counts["quantised"] >= (matrices if static else 4), counts
    assert integers.count_integers(one.folder / FORMS["onnx"])["quantised"] == 0
    inputs = inputs_of(name, 8, seed=3)
    with torch.no_grad():
        error = compare.difference(apply(params, **inputs), small(**inputs))
    # Not 0, or nothing was rounded; 8 bits are 1 % per layer.
    assert 1e-5 < error < 0.1, error
    with pytest.raises(ShipError, match="has shape"):
        small(**{key: value[:, :1] for key, value in inputs.items()})


def test_nothing_to_quantise_is_an_error(tmp_path):
    from train.ship import export

    program = export(lambda p, x: x.relu() * p["w"], {"w": torch.ones(2)}, {"x": torch.ones(3, 2)})
    one = load(save(program, tmp_path / "onnx", "onnx"))
    with pytest.raises(ShipError, match="was quantised: it has no products of constant matrices"):
        integers.quantise(one, program, tmp_path / "int8")
    with pytest.raises(ShipError, match="there is no batch to calibrate with; expected at least one"):
        integers.quantise(one, program, tmp_path / "int8", [])
    with pytest.raises(ShipError, match="calibration batch 1: input 'x' has values that are not finite"):
        integers.quantise(one, program, tmp_path / "int8", [{"x": torch.full((3, 2), v)} for v in (1.0, torch.nan)])
    script = load(save(program, tmp_path / "script", "torchscript"))
    with pytest.raises(ShipError, match="8-bit integers are for 'onnx' packages; .* is 'torchscript'"):
        integers.quantise(script, program, tmp_path / "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["onnx", "script"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torchao's own, of what it lacks here
def test_torchao_tensors_are_leaves():
    """A weight that torchao has quantised takes the place of ours: nothing in the nets knows it."""
    quantization = pytest.importorskip("torchao.quantization")
    params = spec.init(random.key(0), {"up": linear_spec(64, 32)})
    module = torch.nn.Linear(64, 32)
    module.weight = torch.nn.Parameter(params["up"]["weight"])
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    leaf = module.weight
    assert type(leaf) is not torch.nn.Parameter
    x = random.normal(random.key(1), (3, 64))
    with torch.no_grad():
        ours, theirs = linear(params["up"], x), linear({**params["up"], "weight": leaf}, x)
    assert 1e-5 < compare.difference(ours, theirs) < 0.02  # rounded, and near
