"""Packages: the numbers of eager torch at both ends of their ranges, checked calls, weights that are replaced."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from core import tree
from tests.train.ship.exports import face, inputs_of, program_of
from train.ship import Axis, ShipError, export, load, package, save, swap
from train.ship.compare import difference

ROOT = Path(__file__).parents[3]
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def needs(form: str) -> None:
    if form == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)


def check(folder: Path, name: str, form: str, tolerance: float = 1e-5) -> None:
    """A package of a net equals eager torch with one example and with the most."""
    needs(form)
    program, (apply, params) = program_of(name), face(name)
    one = load(save(program, folder / form, form))
    for n in (1, 8):
        inputs = inputs_of(name, n, seed=9)
        with torch.no_grad():
            expected = apply(params, **inputs)
        error = difference(tree.leaves(expected), tree.leaves(one(**inputs)))
        assert error < tolerance, f"{name} as {form}: off by {error:.1e} of {n} examples"


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
@pytest.mark.parametrize("name", ["mlp"])
def test_package_equals_eager(tmp_path, name, form):
    check(tmp_path, name, form)


TWELVE = ("mlp", "convolutional", "resnet", "vit", "gpt2", "llama", "bert", "transformer", "unet", "rnn, gru", "espcn",
          "fcos")  # fmt: skip


SHORT = ("convolutional", "vit", "gpt2", "bert", "rnn, gru", "espcn")
"""Those that ONNX takes seconds for; the others, and AOTInductor but for one, are of the long suite."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SHORT else pytest.mark.long) for n in TWELVE]
)
def test_onnx_equals_eager_in_twelve_nets(tmp_path, name):
    check(tmp_path, name, "onnx")


@compiler
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "mlp" else pytest.mark.long) for n in TWELVE]
)
def test_aoti_equals_eager_in_twelve_nets(tmp_path, name):
    check(tmp_path, name, "aoti")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "vit", "gpt2", "unet"])
def test_torchscript_equals_eager(tmp_path, name):
    check(tmp_path, name, "torchscript")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """A package that needs no other library."""
    return save(program_of("mlp"), tmp_path_factory.mktemp("mlp") / "package", "torchscript")


def test_package_checks_every_call(script):
    one, x = load(script), inputs_of("mlp", 3)["x"]
    for wrong, error in (
        (x[:, :-1], "input 'x' has shape"),
        (x.double(), "input 'x' is torch.float64; expected torch.float32"),
        (x[:0], "is 0; expected 1 to 8"),
        (torch.cat([x] * 3), "is 9; expected 1 to 8"),
    ):
        with pytest.raises(ShipError) as raised:
            one(x=wrong)
        assert error in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(ShipError, match=r"^inputs x\.0\.0, x\.0\.1, .*, x\.1\.1 and 10 more; expected x$"):
        one(x=x.tolist())
    for transform in (torch.func.grad(lambda x: one(x=x).sum()), torch.func.vmap(lambda x: one(x=x[None]))):
        with pytest.raises(ShipError, match="input 'x' is inside a transform of torch.func"):
            transform(x)
    turned = x.T.contiguous().T
    assert not turned.is_contiguous() and torch.equal(one(x=turned), one(x=x))


def test_packages_are_whole_or_absent(tmp_path, script, monkeypatch):
    program = program_of("mlp")
    with pytest.raises(ShipError, match="exists already; expected a new folder"):
        save(program, script, "torchscript")
    with pytest.raises(ShipError, match="form 'tflite' is unknown; expected one of aoti, onnx, torchscript"):
        save(program, tmp_path / "a", "tflite")
    monkeypatch.setattr(package.torch.jit, "freeze", lambda module: 1 / 0)
    with pytest.raises(ShipError, match="cannot write 'torchscript': division by zero"):
        save(program, tmp_path / "b", "torchscript")
    assert not list(tmp_path.iterdir())


def test_damaged_packages_are_refused(tmp_path, script):
    with pytest.raises(ShipError, match="is no package; expected a folder with manifest.json"):
        load(tmp_path)
    shutil.copytree(script, tmp_path / "a")
    with open(tmp_path / "a" / "model.pt", "ab") as file:
        file.write(b"!")
    with pytest.raises(ShipError, match="is not the file that its manifest describes"):
        load(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({"form": "tflite"}))
    with pytest.raises(ShipError, match="is no manifest of a package"):
        load(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text('{"form": "torch')
    with pytest.raises(ShipError, match="manifest.json is not valid JSON"):
        load(tmp_path / "a")
    with pytest.raises(ShipError, match="'torchscript' keeps its parameters; only 'aoti' packages take others"):
        swap(load(script), face("mlp")[1])


def test_a_missing_runtime_is_named(script, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ShipError, match=r'onnxruntime is not installed; expected pip install "functree\[ship\]"'):
        package.needed("onnxruntime")


def test_a_trace_that_fixes_a_size_is_refused(tmp_path):
    """torch.jit.trace keeps the numbers of its example where Python has seen them."""

    def apply(params, x):
        return x * (3 if torch.jit.is_tracing() else x.shape[0])

    program = export(apply, {"w": torch.ones(1)}, {"x": torch.ones(3, 2)}, {"x": {0: Axis("batch", 1, 4)}})
    with pytest.raises(ShipError, match="'torchscript' has other values at {'batch': 1}: its trace fixes a size"):
        save(program, tmp_path / "a", "torchscript")


MAIN = """\
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>
#include <iostream>

int main(int argc, char** argv) {
  torch::NoGradGuard guard;
  torch::inductor::AOTIModelPackageLoader package(argv[1]);
  std::vector<torch::Tensor> inputs = {torch::linspace(-1, 1, std::stoi(argv[2])).reshape({2, -1})};
  auto outputs = package.run(inputs);
  std::cout.precision(9);
  for (int64_t i = 0; i < outputs[0].numel(); i++)
    std::cout << outputs[0].flatten()[i].item<float>() << "\\n";
}
"""


@compiler
@pytest.mark.long
def test_a_program_of_15_lines_of_c_runs_a_package(tmp_path):
    folder = Path(torch.__file__).parent
    (tmp_path / "main.cpp").write_text(MAIN)
    includes = [f"-I{folder / 'include'}", f"-I{folder / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = ["g++", "-std=c++20", "-O1", abi, *includes, "main.cpp", "-o", "main", "-Wl,--no-as-needed", *libraries]
    subprocess.run([*command, "-ldl"], cwd=tmp_path, check=True, capture_output=True)
    apply, params = face("mlp")
    width = inputs_of("mlp", 2)["x"].shape[1]
    save(program_of("mlp"), tmp_path / "mlp", "aoti")
    arguments = ["./main", str(tmp_path / "mlp" / "model.pt2"), str(2 * width)]
    out = subprocess.run(arguments, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    expected = apply(params, x=torch.linspace(-1, 1, 2 * width).reshape(2, -1))
    torch.testing.assert_close(torch.tensor([float(line) for line in out.split()]), expected.flatten())


def test_weights_that_a_package_does_not_hold_are_refused(script):
    """AOTInductor writes small parameters into the code, which load_constants leaves as they are without a word."""
    _, params = face("mlp")
    taken = {}
    one = load(script)._replace(form="aoti", replace=taken.update)
    held = frozenset(one.manifest["parameters"])
    with pytest.raises(ShipError, match="'layers.1.bias' is part of the compiled code and cannot be replaced"):
        swap(one._replace(constants=held - {"layers.1.bias"}), params)
    one = one._replace(constants=held)
    with pytest.raises(ShipError, match="parameter 'layers.2.bias' of the package is missing"):
        swap(one, {"layers": params["layers"][:2]})
    with pytest.raises(ShipError, match=r"'layers.0.bias' is float64 \(8,\); expected float32 \(8,\)"):
        swap(one, tree.cast(params, torch.float64))
    assert not taken
    swap(one, params)
    assert taken.keys() == held and torch.equal(taken["layers.0.bias"], params["layers"][0]["bias"])


@compiler
@pytest.mark.long
@pytest.mark.parametrize("name", ["mlp", "unet"])
def test_aoti_takes_other_weights(tmp_path, name):
    apply, params = face(name)
    one = load(save(program_of(name), tmp_path / name, "aoti"))
    others, inputs = tree.map(lambda leaf: 1.1 * leaf, params), inputs_of(name, 4)
    swap(one, others)
    with torch.no_grad():
        assert difference(apply(others, **inputs), one(**inputs)) < 1e-5


def test_an_input_that_is_ignored_and_one_that_onnx_lacks(tmp_path):
    needs("onnx")

    program = export(lambda p, a, b: p["w"] * a, {"w": torch.ones(2)}, {"a": torch.ones(3, 2), "b": torch.ones(3)})
    for form in ("onnx", "torchscript"):
        one = load(save(program, tmp_path / form, form))
        assert torch.equal(one(a=torch.full((3, 2), 5.0), b=torch.ones(3)), torch.full((3, 2), 5.0))
    half = export(lambda p, x: x, {"w": torch.ones(2)}, {"x": torch.ones(3, dtype=torch.bfloat16)})
    with pytest.raises(ShipError, match="input 'x' is bfloat16; 'onnx' packages take float32, float16 and integers"):
        save(half, tmp_path / "half", "onnx")
