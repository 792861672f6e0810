"""Packages of a net in several forms: built once, compared with the net itself, and timed."""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from core import int4, int8, tree
from core.tree import Tree
from experiments.parts.shipped import Subject
from train.data.fingerprint import fingerprint
from train.data.understood import understood
from train.plots import bars
from train.run import compiler
from train.ship import Loaded, Program, ShipError, compare, export, load, package, save
from train.ship import int8 as integers
from train.ship.compare import Row

Form = Literal["onnx", "onnx-int8", "aoti", "torchscript"]
FORMS: tuple[Form, ...] = ("onnx", "onnx-int8", "aoti", "torchscript")
NEEDS = {"onnx": ("onnx", "onnxruntime", "onnxscript")}
"""Libraries beside torch that forms need."""
EAGER = "eager float32"


class Built(NamedTuple):
    """A net's program, its packages by form, and the seconds that the export took."""

    program: Program
    packages: dict[str, Loaded]
    seconds: float


def build(subject: Subject, folder: Path, forms: Sequence[Form], say: Callable[[str], None] = print) -> Built:
    """Export a net and write what is missing of its packages: `folder`/FORM.

    Raises ShipError: a package of other weights or ranges is there; besides what `export` and `save` raise.
    """
    began = time.perf_counter()
    program = export(subject.apply, subject.params, subject.some(max(2, subject.fewest)), subject.ranges)
    seconds = time.perf_counter() - began
    say(f"exported in {seconds:.1f} s: {len(program.exported.graph.nodes)} nodes")
    identity = {"weights": fingerprint(subject.params), "takes": str(program.inputs)}
    for form in forms:
        check_same(folder / form, identity)
    if "aoti" in forms:
        compiler.configure()
    packages = {}
    for form in sorted(forms, key=FORMS.index):
        if not (folder / form).exists():
            say(f"writing {form} ...")
            if form == "onnx-int8":
                _integers(subject, program, folder, identity)
            else:
                save(program, folder / form, form, identity)
        packages[form] = load(folder / form)
    return Built(program, packages, seconds)


def check_same(folder: Path, identity: Mapping[str, str]) -> None:
    """Raise ShipError if there is a package of other weights or ranges."""
    if folder.exists():
        stored = load(folder).manifest
        if any(stored.get(name) != value for name, value in identity.items()):
            raise ShipError(f"'{folder}' holds a package of other weights or ranges; choose another --out")


def _integers(subject: Subject, program: Program, folder: Path, identity: Mapping[str, str]) -> None:
    """onnx-int8, from `folder`/onnx or, if that is not wanted, one that goes away again."""
    with tempfile.TemporaryDirectory() as place:
        source = folder / "onnx" if (folder / "onnx").exists() else save(program, Path(place) / "onnx", "onnx")
        calibration = list(subject.calibrating()) if subject.static else None
        integers.quantise(load(source), program, folder / "onnx-int8", calibration, identity)


@torch.no_grad()
def outputs(call: Callable[..., Tree], subject: Subject, batch: int, count: int) -> list[Tensor]:
    """Outputs of `count` examples, `batch` at a time: its leaves."""
    parts = []
    for first in range(0, count, batch):
        parts.append(tree.leaves(call(**subject.some(batch, first))))
    return [torch.cat(column)[:count] for column in zip(*parts, strict=True)]


def own_forms(subject: Subject) -> dict[str, tuple[Callable[..., Tree], int]]:
    """{form: (function, bytes)} of the net itself, and of its weights as 8-bit and 4-bit integers."""
    eight, four = int8.quantise(subject.params), int4.quantise(subject.params)
    forms = {
        EAGER: (subject.params, subject.params),
        "int8 weights": (int8.unformed(eight), eight),
        "int4 weights": (int4.unformed(four), four),
    }
    sizes = {name: int8.nbytes(stored) for name, (_, stored) in forms.items()}
    return {
        name: (functools.partial(subject.apply, leaves), sizes[name])
        for name, (leaves, _) in forms.items()
        if name == EAGER or sizes[name] < sizes[EAGER]  # a net of convolutions has no matrices for 4 bits
    }


def compared(subject: Subject, built: Built, batch: int, count: int, rounds: int) -> list[Row]:
    """A row per form: `count` examples for errors and agreement, and the time of a call of `batch` examples."""
    forms = {name: (call, size, 0.0, "") for name, (call, size) in own_forms(subject).items()}
    for form, one in built.packages.items():
        counts = one.manifest.get("quantised")
        products = f"{counts['quantised']} of {counts['products']}" if counts else ""
        forms[form] = (one, one.manifest["bytes"], one.manifest["build_seconds"], products)
    expected = outputs(forms[EAGER][0], subject, batch, count)
    seconds = timings(subject, {name: entry[0] for name, entry in forms.items()}, batch, rounds)
    rows = []
    for name, (call, size, building, products) in forms.items():
        out = outputs(call, subject, batch, count)
        agreed = None if subject.classes is None else compare.agreement(expected[0], out[0], subject.classes)
        ratio = compare.ratio(seconds[name], seconds[EAGER])
        milliseconds = 1000 * statistics.median(seconds[name])
        error = compare.difference(expected, out)
        rows.append(Row(name, error, agreed, size, milliseconds, ratio, building, products))
    return rows


def timings(
    subject: Subject, calls: Mapping[str, Callable[..., Tree]], batch: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each form for `batch` examples, taken in turns."""
    inputs = subject.some(batch)
    return compare.timed({name: functools.partial(call, **inputs) for name, call in calls.items()}, rounds)


def errors_at_the_ends(subject: Subject, built: Built) -> dict[str, float]:
    """The error of each package at both ends of its ranges: the example cut and repeated to these sizes."""
    worst = dict.fromkeys(built.packages, 0.0)
    for sizes in package.ends(built.program):
        values = package.resized(built.program, sizes)
        inputs = {leaf.name: value for leaf, value in zip(built.program.inputs, values, strict=True)}
        with torch.no_grad():
            expected = subject.apply(subject.params, **inputs)
        for form, one in built.packages.items():
            worst[form] = max(worst[form], compare.difference(tree.leaves(expected), tree.leaves(one(**inputs))))
    return worst


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Bars of size and time, the net itself as the line."""
    figures = {"MB": {row.form: row.bytes / 1e6 for row in rows}}
    figures["ms per call"] = {row.form: row.milliseconds for row in rows}
    bars.bars(path, figures, EAGER, title=title)


def usable(forms: Sequence[Form] | None) -> tuple[tuple[Form, ...], list[tuple[str, str]]]:
    """(Forms to write, those left out with the reason): what was asked for, or all that can be written here."""
    if forms is not None:
        if len(set(forms)) < len(forms):
            raise ValueError(f"--forms is {' '.join(forms)}; expected each once")
        return tuple(forms), []
    reasons = {}
    for form in FORMS:
        absent = [name for name in NEEDS.get(form.removesuffix("-int8"), ()) if not find_spec(name)]
        if absent:
            reasons[form] = f"needs {package.INSTALL}"
        if form == "aoti" and not package.has_compiler():
            reasons[form] = "needs a C++ compiler"
    return tuple(form for form in FORMS if form not in reasons), list(reasons.items())


def show(subject: Subject, forms: Sequence[Form], left_out: Sequence[tuple[str, str]]) -> None:
    """Print what was understood."""
    leaves = {f"input '{name}'": f"{value.dtype}, {tuple(value.shape)}" for name, value in subject.inputs.items()}
    ranges = sorted({f"{a.name} {a.low} to {a.high}" for axes in subject.ranges.values() for a in axes.values()})
    number = len(next(iter(subject.inputs.values())))
    lines = {"net": subject.kind, "examples": number, **leaves, "sizes that may change": ranges}
    understood(print, lines | {"forms": list(forms), "left out": left_out})
