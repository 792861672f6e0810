"""Published weights: read a file, rename its tensors to ours, and check every name and shape.

Nothing here can run code from a file: safetensors hold only tensors, and pickled files are read with
`weights_only=True`.
"""

import argparse
import difflib
import json
import math
import re
import typing
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import tree
from core.spec import Param, Stat
from core.tree import Tree

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".pth.tar")
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ENTRIES = ("state_dict", "model_state_dict", "model")
"""The entries of a checkpoint that may hold the tensors."""
NOTES = ("mask_values",)
"""Entries beside the tensors that are none: of milesial's U-Net the values of its masks."""
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
"""Put before every name by DistributedDataParallel, torch.compile, and classes that wrap a net."""


class WeightsError(ValueError):
    """Weights that are not there, cannot be read, or do not fit; the message is one line that names them."""


@dataclass(frozen=True)
class Rename:
    """The name of one of our leaves in a file, and whether the file holds it transposed.

    Several names are joined along our first axis.
    """

    theirs: str | tuple[str, ...]
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, one or several."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


def locate(source: str, names: tuple[str, ...] = FILES) -> Path:
    """Path of the first of `names` in a local directory or, without such a directory, in a Hugging Face repository.

    Args:
        source: a file, a directory, or a repository id such as "openai-community/gpt2".

    Raises:
        WeightsError: none of the files is there, or the repository cannot be reached.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise WeightsError(f"'{source}' has none of the files {', '.join(names)}")
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    unreachable = None
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(source, name, local_files_only=unreachable is not None))
        except LocalEntryNotFoundError as error:
            unreachable = unreachable or error  # not in the cache; another of the files may be there
        except EntryNotFoundError:
            continue
        except Exception as error:  # a malformed or unknown repository id, no access to it, no space left
            raise WeightsError(_refusal(source, error)) from error
    if unreachable is not None:
        why = _first_line(unreachable.__cause__ or unreachable).partition(". ")[0]
        reason = f"it is not in the local cache, and the hub cannot be reached: {why}"
        raise WeightsError(f"'{source}' is no local file or directory; {reason}") from unreachable
    raise WeightsError(f"repository '{source}' has none of the files {', '.join(names)}")


def _refusal(source: str, error: Exception) -> str:
    """The line for a repository that is not there, or not for everyone. The hub answers 401 to both."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"repository '{source}' is gated: accept its terms on its page, and {login}"
    if isinstance(error, OSError) and error.strerror:  # those of the network have none
        place = f"'{error.filename}'" if error.filename else "the local cache"
        return f"'{source}': cannot write {place}: {error.strerror}; HF_HOME names another folder for downloads"
    nothing = f"'{source}' is no local file or directory, nor a repository"
    if isinstance(error, RepositoryNotFoundError):
        return f"{nothing} that everyone may read; if it is a private one, {login}"
    return f"{nothing}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def beside(source: str) -> str:
    """Where the other files of published weights are: the folder of a file; a directory or repository itself."""
    path = Path(source)
    return str(path.parent) if path.is_file() else source


def read_config(source: str, name: str = "config.json", optional: bool = False) -> dict:
    """A JSON file beside published weights; {} where an optional one is missing.

    Raises:
        WeightsError: it is missing or not a JSON object.
    """
    try:
        path = locate(beside(source), (name,))
    except WeightsError:  # if it is the source that is not there, reading the weights will say so
        if optional:
            return {}
        raise
    return _read_json(path)


def config_of(base: Any, **fields: Any) -> Any:
    """A net's configuration of values from a file: a dataclass, or one with some fields replaced.

    Raises:
        WeightsError: a value of another type than its field, not finite, or one that the net refuses.
    """
    kind, defaults = (base, {}) if isinstance(base, type) else (type(base), vars(base))
    for name, hint in typing.get_type_hints(kind).items():
        types = set(typing.get_args(hint) or (hint,))  # {int, NoneType} of `int | None`
        if name not in fields or not types <= {bool, float, int, str, type(None)}:
            continue
        value = fields[name]
        fits = type(value) in types | ({int} if float in types else set())
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            words = getattr(hint, "__name__", hint)
            raise WeightsError(f"the configuration makes no model: {name} is {value!r}; expected {words}")
    try:
        return kind(**{**defaults, **fields})
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the configuration makes no model: {error}") from error


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise WeightsError(f"'{path}' is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"'{path}' holds no JSON object")
    return value


def fetch(address: str, directory: str | Path | None = None) -> Path:
    """Download a weights file whose name ends in the beginning of its SHA-256 sum; one that is there already is not
    fetched again.

    Args:
        directory: folder to keep it in; None is a folder in the user's cache.

    Raises:
        WeightsError: there is no connection, or the file has another checksum and is removed.
    """
    import pooch

    file = address.rpartition("/")[2]
    folder = Path(directory) if directory is not None else Path(pooch.os_cache("functree")) / "weights"
    try:
        path = Path(pooch.retrieve(address, known_hash=None, fname=file, path=folder))
    except Exception as error:  # whatever the network library raises
        raise WeightsError(f"cannot fetch {address}: {_first_line(error)}") from None
    expected, digest = Path(file).stem.rpartition("-")[2], pooch.file_hash(str(path), alg="sha256")
    if not digest.startswith(expected):
        path.unlink()
        sums = f"its SHA-256 sum is {digest[:8]}..., not {expected}..."
        raise WeightsError(f"{address} is not the published file: {sums}")
    return path


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.name.endswith(SUFFIXES):
        raise WeightsError(f"'{path}' is no weights file; expected one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Training scripts keep their flags beside the tensors; a Namespace holds values and runs nothing.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(f"'{path}' cannot be read as weights: {_reason(error)}") from error
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name not in NOTES}
    if _are_named_tensors(content):
        return content
    entries = content if isinstance(content, dict) else {}
    for entry in ENTRIES:
        if _are_named_tensors(entries.get(entry)):
            return entries[entry]
    kind = f"the entries {listing(map(str, entries))}" if entries else f"a {type(content).__name__}"
    expected = f"expected tensors by name, alone or as one of the entries {', '.join(ENTRIES)}"
    raise WeightsError(f"'{path}' holds something other than named tensors: {kind}; {expected}")


def _are_named_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(n, str) and isinstance(x, Tensor) for n, x in value.items())


def _reason(error: Exception) -> str:
    """One line on why a file cannot be read; torch's own advises to read it in a way that runs its code."""
    text, alone = str(error).strip(), "save its tensors alone with torch.save(model.state_dict(), ...)"
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it holds a {named[1]}, which could run code; {alone}"
    if "TorchScript" in text:
        return f"it is a program in TorchScript; {alone}"
    if "weights_only" in text:
        return "it is damaged, or torch.save did not write it"
    return _first_line(error)


def listing(names: Iterable[str], most: int = 3) -> str:
    """The first names in quotation marks, and the number of the others."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + rest


def read(source: str, prefixes: tuple[str, ...] = PREFIXES) -> dict[str, Tensor]:
    """All tensors of a weights file, a directory that has one (in one piece or sharded), or a hub repository.

    A checkpoint may hold them as one of its `ENTRIES`.

    Args:
        prefixes: see `strip_prefixes`.

    Raises:
        WeightsError: nothing there, truncated, garbled, or not a file of named tensors.
    """
    path = locate(source)
    if path.suffix != ".json":
        return strip_prefixes(_read_file(path), prefixes)[0]
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise WeightsError(f"'{path}' is no index of shards: it has no 'weight_map' of file names")
    folder = str(path.parent) if Path(source).exists() else source
    state: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise WeightsError(f"'{path}' names a shard outside its folder: '{shard}'")
        state.update(_read_file(locate(folder, (shard,))))
    return strip_prefixes(state, prefixes)[0]


def strip_prefixes(state: dict[str, Tensor], prefixes: tuple[str, ...] = PREFIXES) -> tuple[dict[str, Tensor], str]:
    """(tensors, what was stripped): the prefixes of wrappers, such as "module.", where all names carry one."""
    stripped = ""
    while state and (prefix := next((p for p in prefixes if all(name.startswith(p) for name in state)), "")):
        state, stripped = {name.removeprefix(prefix): x for name, x in state.items()}, stripped + prefix
    return state, stripped


def _take(remaining: dict[str, Tensor], name: str, leaf: Param, rename: Rename, what: str, others: list[str]) -> Tensor:
    """One of our leaves, popped from the remaining tensors of a file.

    others: names in the file to show where one is missing.
    """
    for theirs in rename.names:
        if theirs not in remaining:
            close = difflib.get_close_matches(theirs, others, len(others), cutoff=0.0) if others else []
            beside = f"the file has {listing(close)}" if close else "the file has no tensors"
            raise WeightsError(f"{what}: '{theirs}' is missing; expected for '{name}' {tuple(leaf.shape)}; {beside}")
        if not remaining[theirs].is_floating_point() and not isinstance(leaf, Stat):  # torch counts batches in integers
            dtype = remaining[theirs].dtype
            raise WeightsError(f"{what}: '{theirs}' holds {dtype}, expected floating-point numbers")
    values = [remaining.pop(theirs) for theirs in rename.names]
    parts = [x.T if rename.transposed and x.ndim == 2 else x for x in values]
    rows = sum(sum(part.shape[:1]) for part in parts)
    alike = all(part.ndim == len(leaf.shape) and part.shape[1:] == tuple(leaf.shape[1:]) for part in parts)
    if not alike or rows != sum(leaf.shape[:1]):
        theirs = " + ".join(f"'{theirs}'" for theirs in rename.names)
        shapes = " + ".join(str(tuple(x.shape)) for x in values)
        expected = tuple(reversed(leaf.shape)) if rename.transposed else tuple(leaf.shape)
        raise WeightsError(f"{what}: {theirs} has shape {shapes}, expected {expected} for '{name}'")
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fill(spec: Tree, state: dict[str, Tensor], table: dict[str, Rename], what: str = "weights") -> Tree:
    """The values of a spec from a file's tensors.

    Args:
        table: our name -> its name in the file. A `Stat` that has no entry keeps its initial value only if the table
            leaves it out on purpose, so every `Param` must have an entry.

    Raises:
        WeightsError: naming the first tensor that is missing, misshapen, or left over in the file.
    """
    remaining = dict(state)
    known = {theirs for rename in table.values() for theirs in rename.names}
    others = [name for name in state if name not in known] or list(state)
    values = {}
    for name, leaf in tree.items(spec):
        if name not in table:
            if isinstance(leaf, Stat):
                values[name] = leaf.init(torch.zeros(2, dtype=torch.int32), leaf.shape, leaf.dtype)
                continue
            raise WeightsError(f"{what}: the rename table has no entry for '{name}'")
        value = _take(remaining, name, leaf, table[name], what, others)
        values[name] = value.detach().to(leaf.dtype).clone(memory_format=torch.contiguous_format)
    if remaining:
        names = listing(sorted(remaining))
        raise WeightsError(f"{what}: the file has {len(remaining)} tensors that the model has no place for: {names}")
    return tree.sort(tree.nest(values, like=spec))


def published_state(
    params: Tree, table: dict[str, Rename], sizes: dict[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """The tensors of a file in its names, from ours: the inverse of `fill`.

    Args:
        sizes: the end of one of our names -> the rows of each of the tensors that it joins; equal parts by default.

    Raises:
        WeightsError: naming the first leaf that has no entry in the table, or whose rows do not divide.
    """
    state = {}
    for name, leaf in tree.items(params):
        if name not in table:
            raise WeightsError(f"weights: the rename table has no entry for '{name}'")
        names = table[name].names
        equal = (leaf.shape[0] // len(names),) * len(names) if leaf.ndim else (1,)
        rows = next((n for end, n in (sizes or {}).items() if f".{name}".endswith(f".{end}")), equal)
        if len(names) > 1 and (len(rows) != len(names) or sum(rows) != leaf.shape[0]):
            raise WeightsError(
                f"weights: the {leaf.shape[0]} rows of '{name}' are not those of {listing(names)}: {rows}"
            )
        for theirs, part in zip(names, leaf.split(list(rows)) if len(names) > 1 else [leaf], strict=True):
            part = part.T if table[name].transposed and part.ndim == 2 else part
            state[theirs] = part.detach().clone(memory_format=torch.contiguous_format)
    return state
