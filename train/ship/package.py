"""Packages of a program: a folder with a file for its runtime, and a manifest that the loader holds every call to.

    save(program, "folder", to="onnx")
    net = load("folder")
    y = net(x=images)

| form | file | runtime |
| --- | --- | --- |
| aoti | model.pt2 | AOTInductor: compiled for this machine; from Python, or from C++ without it |
| onnx | model.onnx | onnxruntime, and whatever reads ONNX |
| torchscript | model.pt | libtorch: traced and frozen; deprecated by torch, for programs that cannot read the others |

A package is code: load only what you trust.
"""

import hashlib
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from core.tree import Tree
from train.files import plain, read_json, shown, write_json
from train.ship.program import Axis, Leaf, Program, ShipError, checked, constant_name, quiet, shaped

FORMS = {"aoti": "model.pt2", "onnx": "model.onnx", "torchscript": "model.pt"}
"""The file of each form."""
MANIFEST = "manifest.json"
INSTALL = 'pip install "functree[ship]"'


class Loaded(NamedTuple):
    """A package, ready to be called with the inputs by name.

    run: the leaves in order -> the outputs in order; it checks nothing.
    constants: {name of a parameter in the package: dtype and shape}, of what `swap` may replace.
    replace: gives the runtime other values for its constants, None where it cannot.
    """

    folder: Path
    form: str
    inputs: tuple[Leaf, ...]
    tree: Any
    run: Callable[[list[Tensor]], list[Tensor]]
    manifest: Mapping[str, Any]
    constants: frozenset[str] = frozenset()
    replace: Callable[[dict[str, Tensor]], None] | None = None

    @torch.no_grad()
    def __call__(self, **inputs: Tree) -> Tree:
        """The outputs.

        Raises ShipError: an input that is not of its dtype, shape or range, or that a transform of torch.func maps or
        differentiates; nothing is computed.
        """
        for name, value in tree.items(dict(inputs)):
            if isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
                raise ShipError(
                    f"input '{name}' is inside a transform of torch.func; packages have no gradient and no vmap"
                )
        return shaped(self.tree, self.run(checked(self.inputs, inputs)))


# Writing.


def save(program: Program, folder: str | Path, to: str, facts: Mapping[str, Any] | None = None) -> Path:
    """Write a program as a package, whole or not at all.

    Args:
        folder: a new folder.
        to: one of `FORMS`.
        facts: further entries of the manifest.

    Raises ShipError: the folder exists, the form is unknown, its packages or compiler are missing, it has no such
        operation, or what was traced has other values at another size.
    """
    if to not in FORMS:
        raise ShipError(f"form '{to}' is unknown; expected one of {', '.join(FORMS)}")

    def write(path: Path) -> None:
        try:
            with quiet(), torch.no_grad():
                _WRITE[to](program, path)
        except (ShipError, KeyboardInterrupt):
            raise
        except Exception as error:  # each exporter has its own classes
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ShipError(f"cannot write '{to}': {reason[:300]}") from error

    return write_package(Path(folder), to, program, write, facts or {})


def write_package(
    folder: Path, form: str, program: Program, write: Callable[[Path], None], facts: Mapping[str, Any]
) -> Path:
    """A folder with the file that `write` writes and its manifest, whole or not at all."""
    if folder.exists():
        raise ShipError(f"'{shown(folder)}' exists already; expected a new folder for the package")
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}.", dir=folder.parent))
    try:
        began = time.perf_counter()
        write(place / FORMS[form])
        manifest = {
            "form": form,
            "file": FORMS[form],
            "sha256": _digest(place / FORMS[form]),
            "bytes": (place / FORMS[form]).stat().st_size,
            "inputs": [
                {"name": i.name, "dtype": i.dtype, "shape": [_size(n) for n in i.shape]} for i in program.inputs
            ],
            "outputs": list(program.outputs),
            "tree": program.form,
            "parameters": {name: _kind(value) for name, value in used(program).items()},
            "torch": torch.__version__,
            "build_seconds": round(time.perf_counter() - began, 2),
            **facts,
        }
        write_json(place / MANIFEST, plain(manifest))
        place.chmod(0o755)
        os.replace(place, folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return folder


def _size(n: int | Axis) -> Any:
    return n if isinstance(n, int) else n._asdict()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_compiler() -> bool:
    """True where there is a C++ compiler, which AOTInductor needs."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def _write_aoti(program: Program, path: Path) -> None:
    if not has_compiler():
        raise ShipError("'aoti' compiles C++, and no compiler was found; expected g++ or the one that CXX names")
    from torch._inductor import aoti_compile_and_package

    # Or the compiler writes parameters of up to 8 elements into the code, and `swap` could not replace them.
    settings = {"always_keep_tensor_constants": True}
    aoti_compile_and_package(program.exported, package_path=str(path), inductor_configs=settings)


def _write_onnx(program: Program, path: Path) -> None:
    needed("onnx", "onnxscript")
    for leaf in program.inputs:
        if leaf.dtype == "bfloat16":  # numpy, by which onnxruntime takes its inputs, has no such numbers
            raise ShipError(f"input '{leaf.name}' is bfloat16; 'onnx' packages take float32, float16 and integers")
    names = {"input_names": [leaf.name for leaf in program.inputs], "output_names": list(program.outputs)}
    if program.outputs == ("",):
        names["output_names"] = ["y"]
    out = torch.onnx.export(program.exported, (), dynamo=True, optimize=True, verbose=False, **names)
    out.save(path, external_data=False)


def _write_torchscript(program: Program, path: Path) -> None:
    traced = torch.jit.trace(program.module, program.example, check_trace=False)
    for sizes in ends(program):
        values = resized(program, sizes)
        for ours, theirs in zip(program.module(*values), traced(*values), strict=True):
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True):
                raise ShipError(f"'torchscript' has other values at {sizes}: its trace fixes a size")
    torch.jit.freeze(traced).save(str(path))


_WRITE = {"aoti": _write_aoti, "onnx": _write_onnx, "torchscript": _write_torchscript}


def needed(*packages: str) -> list[Any]:
    """The modules of packages. Raises ShipError naming what is not installed."""
    out = []
    for name in packages:
        try:
            out.append(importlib.import_module(name))
        except ImportError:
            raise ShipError(f"the package {name.partition('.')[0]} is not installed; expected {INSTALL}") from None
    return out


# Sizes within a program's ranges.


def ends(program: Program) -> list[dict[str, int]]:
    """The sizes at the low end of all ranges and at the high end."""
    axes = {axis.name: axis for leaf in program.inputs for axis in leaf.shape if isinstance(axis, Axis)}
    both = [{name: axis.low for name, axis in axes.items()}, {name: axis.high for name, axis in axes.items()}]
    return both if axes else both[:1]


def resized(program: Program, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
    """The example with other sizes along its named axes: cut, or repeated from the start."""
    out = []
    for leaf, value in zip(program.inputs, program.example, strict=True):
        for i, axis in enumerate(leaf.shape):
            if isinstance(axis, Axis):
                indices = torch.arange(sizes[axis.name]) % value.shape[i]
                value = value.index_select(i, indices)
        out.append(value.contiguous())
    return tuple(out)


# Reading.


def load(folder: str | Path) -> Loaded:
    """A package on the CPU.

    Raises ShipError: it is no package, its file is not that of its manifest, or its runtime is not installed.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ShipError(f"'{shown(folder)}' is no package; expected a folder with {MANIFEST}")
    try:
        manifest = read_json(folder / MANIFEST)
    except ValueError as error:
        raise ShipError(str(error)) from None
    try:
        form, path, digest = manifest["form"], folder / FORMS[manifest["form"]], manifest["sha256"]
        inputs = tuple(
            Leaf(leaf["name"], leaf["dtype"], tuple(n if isinstance(n, int) else Axis(**n) for n in leaf["shape"]))
            for leaf in manifest["inputs"]
        )
        form_of_outputs = manifest["tree"]
    except (KeyError, TypeError) as error:
        raise ShipError(f"{shown(folder / MANIFEST)} is no manifest of a package: {error!r}") from None
    if not path.is_file() or _digest(path) != digest:
        raise ShipError(f"{shown(path)} is not the file that its manifest describes; write the package again")
    try:
        with quiet():
            run, *rest = _READ[form](path, [leaf.name for leaf in inputs])
    except ShipError:
        raise
    except Exception as error:  # each runtime has its own classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ShipError(f"cannot load {shown(path)}: {reason[:300]}") from error
    return Loaded(folder, form, inputs, form_of_outputs, run, manifest, *rest)


def _read_aoti(path: Path, names: list[str]) -> tuple:
    from torch._inductor import aoti_load_package

    runner = aoti_load_package(str(path))
    constants = frozenset(runner.get_constant_fqns())

    def replace(values: dict[str, Tensor]) -> None:
        runner.load_constants(values, check_full_update=False, user_managed=False)

    return lambda values: list(runner(*values)), constants, replace


def _read_onnx(path: Path, names: list[str]) -> tuple:
    (runtime,) = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    read = {entry.name for entry in session.get_inputs()}  # without what the function ignores

    def run(values: list[Tensor]) -> list[Tensor]:
        inputs = zip(names, values, strict=True)
        out = session.run(None, {name: value.numpy() for name, value in inputs if name in read})
        return [torch.from_numpy(value) for value in out]

    return (run,)


def _read_torchscript(path: Path, names: list[str]) -> tuple:
    module = torch.jit.load(str(path))
    return (lambda values: list(module(*values)),)


_READ = {"aoti": _read_aoti, "onnx": _read_onnx, "torchscript": _read_torchscript}


def swap(package: Loaded, params: Tree) -> None:
    """Give an AOTInductor package other parameters of the same shapes, in place; its compiled code stays.

    Raises ShipError: another form; a parameter that the package does not hold by its name (the compiler writes some,
        such as those of one element, into the code, and would keep their old values); another shape or dtype.
    """
    if package.replace is None:
        raise ShipError(f"'{package.form}' keeps its parameters; only 'aoti' packages take others")
    values = {constant_name(name): leaf for name, leaf in tree.items(params)}
    stored = package.manifest.get("parameters", {})
    for name, kind in stored.items():
        if name not in values:
            raise ShipError(f"parameter '{name}' of the package is missing")
        if _kind(values[name]) != kind:
            raise ShipError(f"parameter '{name}' is {_kind(values[name])}; expected {kind}")
        if name not in package.constants:
            raise ShipError(f"parameter '{name}' is part of the compiled code and cannot be replaced; export again")
    package.replace({name: values[name].detach().contiguous() for name in stored})


def used(program: Program) -> dict[str, Tensor]:
    """The parameters that the graph reads, by their names in it; a count of batch norm, say, is none of them."""
    signature, values = program.exported.graph_signature, program.exported.state_dict
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    read = {node.name for node in program.exported.graph.nodes if node.op == "placeholder" and node.users}
    return {name: values[name] for node, name in names.items() if node in read}


def _kind(leaf: Tensor) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
