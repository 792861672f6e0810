"""Packages for onnxruntime with 8-bit integers: weights alone and activations as they come, or both by calibration.

`dynamic` suits nets of matrix products (Transformers): weights are quantised beforehand, each activation when it is
there. `static` suits nets of convolutions: the range of each activation comes from examples (Jacob et al. 2018,
arXiv:1712.05877). A quantiser that finds nothing to do says nothing; here that is an error, and the manifest counts the
operations that compute with integers.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from core.tree import Tree
from train.ship.package import FORMS, Loaded, needed, write_package
from train.ship.program import Program, ShipError, checked, quiet

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
INTEGER_PRODUCTS = ("ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul", "QLinearConv", "QLinearMatMul", "QGemm")


def quantise(
    package: Loaded,
    program: Program,
    folder: str | Path,
    calibration: Iterable[Mapping[str, Tree]] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write an ONNX package with 8-bit integers, whole or not at all.

    Args:
        package: a loaded package of the form "onnx".
        program: the program it was written from.
        calibration: batches of inputs, which the package sees to find the range of each activation (static); None for
            dynamic quantisation.
        facts: further entries of the manifest.

    Raises ShipError: another form, the folder exists, there is nothing to quantise, or no batch to calibrate with.
    """
    if package.form != "onnx":
        raise ShipError(f"8-bit integers are for 'onnx' packages; '{package.folder}' is '{package.form}'")
    needed("onnx")
    (tools,) = needed("onnxruntime.quantization")
    source, counts = package.folder / FORMS["onnx"], {}

    def write(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as place, quiet(), _silent():
            if calibration is None:
                tools.quantize_dynamic(source, path, weight_type=tools.QuantType.QInt8, per_channel=True)
            else:
                ready = Path(place) / "ready.onnx"
                tools.quant_pre_process(source, ready, skip_symbolic_shape=True)
                reader = _reader(tools.CalibrationDataReader, package, calibration)
                options = {"weight_type": tools.QuantType.QInt8, "activation_type": tools.QuantType.QUInt8}
                options |= {"quant_format": tools.QuantFormat.QDQ, "per_channel": True}
                tools.quantize_static(ready, path, reader, **options)
        counts.update(count_integers(path))
        if not counts["quantised"]:
            raise ShipError(f"nothing of '{package.folder}' was quantised: it has no products of constant matrices")

    entries = {**(facts or {}), "calibrated": calibration is not None, "quantised": counts}
    return write_package(Path(folder), "onnx", program, write, entries)


def count_integers(path: Path) -> dict[str, int]:
    """{"quantised": products of 8-bit integers, "products": all} of an ONNX file."""
    (onnx,) = needed("onnx")
    graph = onnx.load(str(path)).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type in PRODUCTS]
    # QDQ: a product between DequantizeLinear nodes, which the runtime fuses into one of integers.
    between = [n for n in products if all(makers.get(x) == "DequantizeLinear" for x in n.input[:2])]
    whole = sum(node.op_type in INTEGER_PRODUCTS for node in graph.node)
    return {"products": len(products) + whole, "quantised": len(between) + whole}


def _reader(base: type, package: Loaded, batches: Iterable[Mapping[str, Tree]]) -> Any:
    """The batches as onnxruntime reads them. Raises ShipError: there is none, or one is not finite."""
    rows = [
        {leaf.name: value.numpy() for leaf, value in zip(package.inputs, checked(package.inputs, batch), strict=True)}
        for batch in batches
    ]
    for i, row in enumerate(rows):
        if wrong := [name for name, values in row.items() if not np.isfinite(values).all()]:
            raise ShipError(f"calibration batch {i}: input '{wrong[0]}' has values that are not finite")
    if not rows:
        raise ShipError("there is no batch to calibrate with; expected at least one")

    class Reader(base):
        def __init__(self) -> None:
            self.rows = iter(rows)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rows, None)

        def rewind(self) -> None:
            self.rows = iter(rows)

    return Reader()


@contextmanager
def _silent() -> Iterator[None]:
    """Context without the quantiser's advice on the root logger."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)
