"""Published weights: read a file, rename its tensors to ours, and check every name and shape.

Nothing here can run code from a file: safetensors hold only tensors, and `.bin` or `.pth` files are read with
`weights_only=True`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core import tree
from core.spec import Param, Stat
from core.tree import Tree

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class WeightsError(ValueError):
    """Weights that are not there, cannot be read, or do not fit; the message is one line that names them."""


@dataclass(frozen=True)
class Rename:
    """Where one of our leaves comes from: the name in the file, and whether the file holds it transposed.

    Several names are joined along our first axis.
    """

    theirs: str | tuple[str, ...]
    transposed: bool = False


def locate(source: str, names: tuple[str, ...] = FILES) -> Path:
    """The first of `names` in a local directory or, if there is no such directory, in a Hugging Face repository.

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
            unreachable = error  # it is not in the cache; another of the files may be
        except EntryNotFoundError:
            continue
        except Exception as error:  # a malformed or unknown repository id, a refused connection, no space left
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise WeightsError(f"'{source}' is no local file or directory, nor a repository: {reason}") from error
    if unreachable is not None:
        reason = "it is not in the local cache, and the hub cannot be reached"
        raise WeightsError(f"'{source}' is no local file or directory; {reason}") from unreachable
    raise WeightsError(f"repository '{source}' has none of the files {', '.join(names)}")


def read_config(source: str, name: str = "config.json") -> dict:
    """A JSON file beside published weights.

    Raises:
        WeightsError: it is missing or not a JSON object.
    """
    path = Path(source)
    return _read_json(locate(str(path.parent) if path.is_file() else source, (name,)))


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise WeightsError(f"'{path}' is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"'{path}' holds no JSON object")
    return value


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"'{path}' is no weights file; expected one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"'{path}' cannot be read as weights: {reason}") from error
    named = isinstance(state, dict) and all(isinstance(n, str) and isinstance(x, Tensor) for n, x in state.items())
    if not named:
        raise WeightsError(f"'{path}' holds something other than named tensors")
    return state


def read(source: str) -> dict[str, Tensor]:
    """All tensors of a weights file, a directory that has one (in one piece or sharded), or a hub repository.

    Raises:
        WeightsError: nothing there, truncated, garbled, or not a file of named tensors.
    """
    path = locate(source)
    if path.suffix != ".json":
        return _read_file(path)
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise WeightsError(f"'{path}' is no index of shards: it has no 'weight_map' of file names")
    folder = str(path.parent) if Path(source).exists() else source
    state: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise WeightsError(f"'{path}' names a shard outside its folder: '{shard}'")
        state.update(_read_file(locate(folder, (shard,))))
    return state


def _take(left: dict[str, Tensor], name: str, leaf: Param, rename: Rename, what: str) -> Tensor:
    """One of our leaves out of what is left of a file."""
    names = (rename.theirs,) if isinstance(rename.theirs, str) else rename.theirs
    for theirs in names:
        if theirs not in left:
            raise WeightsError(f"{what}: '{theirs}' is missing; expected for '{name}' {tuple(leaf.shape)}")
        if not left[theirs].is_floating_point() and not isinstance(leaf, Stat):  # torch counts batches in integers
            raise WeightsError(f"{what}: '{theirs}' holds {left[theirs].dtype}, expected floating-point numbers")
    values = [left.pop(theirs) for theirs in names]
    parts = [x.T if rename.transposed and x.ndim == 2 else x for x in values]
    rows = sum(sum(part.shape[:1]) for part in parts)
    like = all(part.ndim == len(leaf.shape) and part.shape[1:] == tuple(leaf.shape[1:]) for part in parts)
    if not like or rows != sum(leaf.shape[:1]):
        found = " + ".join(str(tuple(x.shape)) for x in values)
        wanted = tuple(reversed(leaf.shape)) if rename.transposed else tuple(leaf.shape)
        theirs = " + ".join(f"'{theirs}'" for theirs in names)
        raise WeightsError(f"{what}: {theirs} has shape {found}, expected {wanted} for '{name}'")
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fill(spec: Tree, state: dict[str, Tensor], table: dict[str, Rename], what: str = "weights") -> Tree:
    """The values of a spec from a file's tensors.

    Args:
        table: our name -> where it comes from. A `Stat` that has no entry keeps its initial value only if the table
            leaves it out on purpose, so every `Param` must have an entry.

    Raises:
        WeightsError: naming the first tensor that is missing, misshapen, or left over in the file.
    """
    left = dict(state)
    values = {}
    for name, leaf in tree.items(spec):
        if name not in table:
            if isinstance(leaf, Stat):
                values[name] = leaf.init(torch.zeros(2, dtype=torch.int32), leaf.shape, leaf.dtype)
                continue
            raise WeightsError(f"{what}: the rename table has no entry for '{name}'")
        value = _take(left, name, leaf, table[name], what)
        values[name] = value.detach().to(leaf.dtype).clone(memory_format=torch.contiguous_format)
    if left:
        some = ", ".join(f"'{name}'" for name in sorted(left)[:3])
        raise WeightsError(f"{what}: the file has {len(left)} tensors that the model has no place for: {some}")
    return tree.sort(tree.nest(values, like=spec))
