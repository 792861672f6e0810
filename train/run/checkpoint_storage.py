"""Storage of `train.run.checkpoints`: tensors as arrays, arrays in orbax, any failure in one line."""

import errno
import logging
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LIMITS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "file too large"}


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found or read, or does not fit; one line that says which and why."""


class Damaged(CheckpointError):
    """The folder is there, but it is not, or no longer, a whole checkpoint."""


class Quiet(logging.Filter):
    """While it is on, what orbax logs is dropped (its failures are raised to us anyway); nothing else is touched."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for records that orbax logs."""
        return "orbax" not in Path(record.pathname).parts

    def on(self) -> None:
        """Begin to filter."""
        logging.getLogger("absl").addFilter(self)

    def off(self) -> None:
        """Stop filtering."""
        logging.getLogger("absl").removeFilter(self)

    def __enter__(self) -> None:
        self.on()

    def __exit__(self, *_) -> None:
        self.off()


class Abandoned:
    """A `sys.unraisablehook` that drops what tensorstore says of writes that went on after another one had failed.

    Orbax stops its event loop at the first failure, which is raised to us; the other writes find it closed, at any
    later time and in threads of their own.
    """

    def __init__(self, previous: Any):
        self._previous = previous

    def __call__(self, unraisable: Any) -> None:
        if not (unraisable.object is None and repr(unraisable.exc_value) == "RuntimeError('Event loop is closed')"):
            self._previous(unraisable)


class Unretrieved(logging.Filter):
    """Drops what asyncio says of the writes that failed after another one had, when they are thrown away: any time."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for failures of orbax's writes that nobody has retrieved."""
        trace = record.exc_info[2] if record.exc_info else None
        if record.exc_info and trace is None and "never retrieved" in record.getMessage():
            return False  # it was raised by no Python code: tensorstore's own, under orbax
        while trace is not None:
            if "orbax" in Path(trace.tb_frame.f_code.co_filename).parts:
                return False
            trace = trace.tb_next
        return True


def writer() -> Any:
    """An orbax checkpointer that writes in the background. Imports orbax, which takes a second, and jax with it."""
    if "jax" not in sys.modules:
        import jax

        # Orbax starts jax's backends. Nobody else here uses jax, so it must not take the GPU's memory away from torch.
        jax.config.update("jax_platforms", "cpu")
    import orbax.checkpoint as ocp

    if not isinstance(sys.unraisablehook, Abandoned):
        sys.unraisablehook = Abandoned(sys.unraisablehook)
        logging.getLogger("asyncio").addFilter(Unretrieved())
    # The storage formats that `read_arrays` knows.
    state = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(state=state, manifest=ocp.JsonCheckpointHandler()))


def start_write(checkpointer: Any, target: Path, arrays: dict[str, np.ndarray], manifest: dict) -> None:
    """Begin to write the folder `target`; the arrays must stay as they are until it is complete."""
    import orbax.checkpoint as ocp

    arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(manifest))
    checkpointer.save(target, args=arguments)


def to_array(name: str, leaf: Tensor) -> np.ndarray:
    """A copy of a tensor in host memory. Dtypes that numpy lacks (bfloat16, float8) become those of ml_dtypes."""
    if not isinstance(leaf, Tensor):
        raise CheckpointError(f"cannot save the state: '{name}' is a {type(leaf).__name__}, expected a tensor")
    if leaf.is_meta:
        raise CheckpointError(f"cannot save the state: '{name}' is on the meta device and has no values")
    try:
        host = leaf.detach().resolve_conj().resolve_neg()
        host = host.to("cpu", copy=True, memory_format=torch.contiguous_format)
        try:
            return host.numpy()
        except TypeError:
            import ml_dtypes

            bits = {1: torch.uint8, 2: torch.int16}[host.element_size()]
            return host.view(bits).numpy().view(getattr(ml_dtypes, dtype_name(leaf)))
    except (TypeError, KeyError, AttributeError, RuntimeError):
        kind = f"a {type(leaf).__name__} of {leaf.dtype}"
        raise CheckpointError(f"cannot save the state: '{name}' is {kind}, which has no numpy form") from None


def to_tensor(array: np.ndarray, like: object) -> Tensor:
    """The inverse of `to_array`, with the dtype and on the device of `like` (the CPU for meta tensors and specs)."""
    bits = {1: np.uint8, 2: np.int16}.get(array.dtype.itemsize) if not array.dtype.isbuiltin == 1 else None
    host = torch.from_numpy(np.require(array if bits is None else array.view(bits), requirements=["C", "W"]))
    host = host if bits is None else host.view(like.dtype)
    device = getattr(like, "device", host.device)
    return host if device.type == "meta" else host.to(device)


def dtype_name(leaf: object) -> str:
    """Name of a leaf's dtype, such as "float32"."""
    return str(leaf.dtype).removeprefix("torch.")


def describe(array: np.ndarray) -> dict:
    """A leaf's entry in the manifest."""
    return {"dtype": array.dtype.name, "shape": list(array.shape), "crc32": checksum(array)}


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def check_fits(what: Path | str, stored: dict[str, dict], template: dict[str, object], part: str = "") -> None:
    """Raise CheckpointError naming the first leaf whose presence, shape or dtype differs from the template."""
    place = f"{part}." if part else ""

    def form(shape, dtype: str) -> str:
        return f"{dtype} {tuple(shape)}"

    for name, leaf in template.items():
        expected = form(leaf.shape, dtype_name(leaf))
        if name not in stored:
            raise CheckpointError(f"{what} does not fit: '{place}{name}' is missing, expected {expected}")
        present = form(stored[name]["shape"], stored[name]["dtype"])
        if present != expected:
            raise CheckpointError(f"{what} does not fit: '{place}{name}' is {present}, expected {expected}")
    for name in stored:
        if name not in template:
            raise CheckpointError(f"{what} does not fit: it has '{place}{name}', which is not expected")


def read_arrays(folder: Path, leaves: dict[str, dict]) -> dict[str, np.ndarray]:
    """Read the leaves of a manifest by name. Raises Damaged if they cannot be read or are not what was written."""
    import tensorstore

    # Orbax would do, but after a failed read its event loop goes on complaining on stderr from other threads.
    context = tensorstore.Context()
    store = {"driver": "ocdbt", "base": (folder.absolute() / "state").as_uri() + "/"}
    arrays = {}
    try:
        opened = {
            name: tensorstore.open(
                {"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}}, open=True, read=True, context=context
            )
            for name, leaf in leaves.items()
            if 0 not in leaf["shape"]
        }
        reading = {name: future.result().read() for name, future in opened.items()}
        for name, leaf in leaves.items():
            arrays[name] = reading[name].result() if name in reading else np.empty(leaf["shape"], _numpy_dtype(leaf))
    except Exception as error:
        raise Damaged(f"{folder} is damaged: cannot read its tensors ({reason(error)})") from None
    for name, leaf in leaves.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray) or describe(array) != leaf:
            raise Damaged(f"{folder} is damaged: '{name}' is not what was written (wrong checksum)")
    return arrays


def _numpy_dtype(leaf: dict) -> np.dtype:
    try:
        return np.dtype(leaf["dtype"])
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, leaf["dtype"]))


def reason(error: BaseException) -> str:
    """The first line of an exception, or its plain cause where that is a limit of the disk."""
    number, text = getattr(error, "errno", None), str(error)
    for code, meaning in LIMITS.items():
        # Errors of tensorstore carry the system's code in their text only.
        if number == code or f"os_error_code='{code}'" in text:
            return meaning
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return line if len(line) <= 200 else line[:200] + " ..."
