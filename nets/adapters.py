"""LoRA adapters in the files of the library peft: `adapter_model.safetensors` beside `adapter_config.json`.

peft names a tensor after the module that it adapts, `base_model.model.h.0.attn.c_attn.lora_A.weight`, so a net's rename
table says where it belongs. Modules that are one matrix here (queries, keys and values) are blocks of its rows.
"""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import lora, tree
from core import spec as specs
from core.layers.low_rank import blocks
from core.tree import Tree
from nets.weights import Rename, WeightsError, listing, locate, read, read_config

FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
ENTRIES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "b",
    "lora_embedding_B": "a",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
"""peft's entries of an adapter -> ours; an embedding's are transposed, so A and B change over."""
PARTS = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}
FIXED = {"bias": ("none",), "lora_bias": (False,), "megatron_config": (None,), "peft_type": ("LORA",)}
FIXED |= {"alora_invocation_tokens": (None,), "layer_replication": (None,), "target_parameters": (None, [])}
FIXED |= {"trainable_token_indices": (None,), "use_qalora": (False,), "use_bdlora": (None,)}
FIXED |= {"init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}
"""Entries of adapter_config.json with supported values; other ways to initialise change the net's own weights."""

KINDS = {"rank_pattern": (dict, "an object"), "alpha_pattern": (dict, "an object")}
KINDS |= {"use_dora": (bool, "true or false"), "use_rslora": (bool, "true or false")}
"""Entries of adapter_config.json, absent or null included, and their types."""


class Adapter(NamedTuple):
    """An adapter of a file.

    adapters: as those of `core.lora.spec`.
    scale: s of `core.lora.adapted`.
    modules: parameters that the file holds whole, such as a new head; {} without any. See `overlay`.
    """

    adapters: Tree
    scale: float
    modules: Tree


def overlay(params: Tree, modules: Tree) -> Tree:
    """The parameters, those of `modules` in place of their own."""
    return tree.nest({**tree.flatten(params), **tree.flatten(modules)}, like=params)


class _Place(NamedTuple):
    """One of the modules whose weights are joined in one of ours."""

    name: str
    index: int
    rename: Rename


def _places(table: Mapping[str, Rename]) -> dict[str, _Place]:
    """Names of a file -> where they belong."""
    return {x: _Place(ours, i, rename) for ours, rename in table.items() for i, x in enumerate(rename.names)}


def _sizes(name: str, rows: int, count: int, known: Mapping[int, int], sizes: Mapping[str, Sequence[int]]) -> list[int]:
    """The rows of each module joined in a weight: those stated, or all but the first alike, as of grouped queries."""
    stated = [parts for end, parts in sizes.items() if name == end or name.endswith(f".{end}")]
    if stated:
        parts = list(stated[0])
    else:
        rest = [size for index, size in known.items() if index]
        first = known.get(0, rows - (count - 1) * rest[0] if rest else rows // count)
        parts = [first] + [(rows - first) // max(count - 1, 1)] * (count - 1)
    if (
        sum(parts) != rows
        or len(parts) != count
        or any(parts[i] != size for i, size in known.items())
        or min(parts) < 1
    ):
        shapes = ", ".join(f"{size} rows in module {index + 1} of {count}" for index, size in sorted(known.items()))
        raise WeightsError(
            f"adapter: {shapes or parts} do not fit the {rows} rows of '{name}'; it is for another model"
        )
    return parts


def read_peft(
    source: str, model: Tree, table: Mapping[str, Rename], *, sizes: Mapping[str, Sequence[int]] | None = None
) -> Adapter:
    """An adapter that peft wrote: a directory, one of its files, or a Hugging Face repository.

    Where peft gives modules ranks or scales of their own, b is multiplied so that one scale serves all. An adapter of
    an embedding that is the output layer, too, acts in both here, in peft in the look-up alone until it is merged.

    Args:
        model: the net's spec.
        table: the net's rename table.
        sizes: {end of one of our names: rows of each module that is joined there}. By default all but the first
            (queries) have equally many, and the file's shapes tell which.

    Raises:
        WeightsError: another kind of adapter, or one for another model: it names the first tensor that does not fit.
    """
    folder = str(Path(source).parent) if Path(source).is_file() else source
    config = read_config(folder, "adapter_config.json")
    for name, supported in FIXED.items():
        if name in config and config[name] not in supported:
            raise WeightsError(f"adapter: {name} is {config[name]!r}; only {supported[0]!r} is supported")
    for name, (kind, word) in KINDS.items():
        if not isinstance(config.get(name) or kind(), kind):
            raise WeightsError(f"adapter: {name} is {config[name]!r}; expected {word}")
    state = read(str(locate(source, FILES)), prefixes=())
    places, leaves = _places(table), dict(tree.items(model))
    entries: dict[str, dict[int, dict[str, Tensor]]] = {}
    modules: dict[str, dict[int, Tensor]] = {}
    scale = _module_scale(config, "")
    for key, value in state.items():
        path, entry = _split(key)
        if not value.is_floating_point():
            raise WeightsError(f"adapter: '{key}' holds {value.dtype}, expected floating-point numbers")
        if entry is None:  # a parameter as a whole; an embedding that has an adapter comes with its table
            place = _place(path.replace(".base_layer.", "."), places)
            modules.setdefault(place.name, {})[place.index] = value.T if place.rename.transposed else value
            continue
        place = _place(f"{path}.weight", places)
        own = _oriented(value, entry, len(leaves[place.name].shape)).contiguous()
        own = own.to(torch.promote_types(own.dtype, torch.float32))  # halves are computed with in float32, as by peft
        if ENTRIES[entry] == "b":
            rank = _of_module(config, path, "rank_pattern", "r")
            if own.shape[-1] != rank:
                raise WeightsError(f"adapter: '{key}' has rank {own.shape[-1]}, but adapter_config.json says {rank}")
            own = own * (_module_scale(config, path) / scale)
        entries.setdefault(place.name, {}).setdefault(place.index, {})[ENTRIES[entry]] = own
    adapters: dict[str, Tree] = {}
    for name, parts in entries.items():
        for entry in parts.values():
            if set(entry) != ({"a", "b", "magnitude"} if config.get("use_dora") else {"a", "b"}):
                names, parts_of = listing(table[name].names), listing(PARTS[part] for part in sorted(entry))
                reason = f"use_dora is {bool(config.get('use_dora'))}"
                raise WeightsError(f"adapter: of {names} the file has {parts_of}, but {reason} in adapter_config.json")
        known, count = {i: entry["b"].shape[0] for i, entry in parts.items()}, len(table[name].names)
        if count == 1:
            adapters[name] = parts[0]
            continue
        size = _sizes(name, leaves[name].shape[0], count, known, sizes or {})
        adapters[name] = {f"from_{sum(size[:i])}": entry for i, entry in parts.items()}
    if not adapters:
        raise WeightsError(f"adapter: '{source}' holds no lora_A and lora_B")
    nested = _nest(adapters, model)
    try:
        lora.items(specs.abstract(model), nested)
    except ValueError as error:
        raise WeightsError(f"adapter of '{source}': {error}") from None
    return Adapter(nested, scale, _nest(_whole(modules, table, leaves), model))


def _split(key: str) -> tuple[str, str | None]:
    """(module, entry of `ENTRIES`) of a name in a file, (name, None) of a whole parameter."""
    path = key.removeprefix(PREFIX)
    for entry in ENTRIES:
        if path.endswith(f".{entry}"):
            return path.removesuffix(f".{entry}"), entry
    if ".lora_" in path:
        raise WeightsError(f"adapter: '{key}' is unknown; expected one of {', '.join(ENTRIES)}")
    return path, None


def _place(path: str, places: Mapping[str, _Place]) -> _Place:
    """Where a name belongs; the net may have been inside another module, as GPT2Model is as `transformer.`."""
    parts = path.split(".")
    for i in range(len(parts)):
        if (place := places.get(".".join(parts[i:]))) is not None:
            return place
    close = difflib.get_close_matches(path, places, 2, cutoff=0.0)
    raise WeightsError(f"adapter: '{path}' is no parameter of the model, which has {listing(close)}")


def _oriented(value: Tensor, entry: str, ndim: int) -> Tensor:
    """A tensor of peft as a (rank, *rest), b (rows, rank) or a magnitude (rows,)."""
    if "embedding" in entry:
        return value.T
    if ENTRIES[entry] == "magnitude":
        return value.flatten()
    return value.flatten(1) if ENTRIES[entry] == "b" and ndim > 2 else value


def _of_module(config: dict[str, Any], path: str, pattern: str, default: str) -> float:
    """A module's rank or alpha, by name where the pattern has one."""
    own = config.get(pattern) or {}
    try:
        key = next((key for key in own if path and re.match(rf"(.*\.)?({key})$", path)), None)
    except re.error as error:
        raise WeightsError(f"adapter: {pattern} has a name that is no regular expression: {error}") from None
    value = config.get(default, 8) if key is None else own[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise WeightsError(f"adapter: {default} is {value!r}; expected a number above 0")
    return value


def _module_scale(config: dict[str, Any], path: str) -> float:
    """s of a module."""
    rank, alpha = _of_module(config, path, "rank_pattern", "r"), _of_module(config, path, "alpha_pattern", "lora_alpha")
    return lora.scale(rank, alpha, stabilised=bool(config.get("use_rslora")))


def _whole(modules: dict, table: Mapping[str, Rename], leaves: dict) -> dict[str, Tensor]:
    """Parameters that a file holds as a whole, joined and checked."""
    values = {}
    for name, parts in modules.items():
        if missing := [x for i, x in enumerate(table[name].names) if i not in parts]:
            raise WeightsError(f"adapter: '{missing[0]}' is missing; '{name}' is more than the file holds")
        value = torch.cat([parts[i] for i in sorted(parts)])
        if value.shape != torch.Size(leaves[name].shape):
            expected = tuple(leaves[name].shape)
            raise WeightsError(f"adapter: '{name}' has shape {tuple(value.shape)}, expected {expected}")
        values[name] = value.contiguous()
    return values


def _nest(values: dict[str, Tree], model: Tree) -> Tree:
    """The values by name as a tree like the model's, with `{}` where a list has none."""
    own, _ = tree.partition(model, lambda name, _: name in values)
    return tree.sort(tree.map_with_names(lambda name, _: values[name], own))


def write_peft(
    folder: str,
    adapters: Tree,
    scale: float,
    model: Tree,
    table: Mapping[str, Rename],
    *,
    prefix: str = "",
    stabilised: bool = False,
    modules: Tree = None,
    base: str | None = None,
    sizes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write adapters as peft does, so that `PeftModel.from_pretrained(model, folder)` reads them.

    Args:
        prefix: where the net is inside the module to adapt: "transformer." of a GPT2LMHeadModel.
        stabilised: write s as alpha / sqrt(rank).
        modules: parameters to save as a whole, such as a new head.
        base: name of the model, for `base_model_name_or_path`.
        model, table, sizes: as in `read_peft`. An adapter over all rows of several joined modules is cut between them.

    Raises:
        WeightsError: an adapter for another model, or one that peft has no form of.
    """
    from safetensors.torch import save_file

    state, ranks, magnitudes, transposed = {}, {}, False, False
    try:
        entries = lora.items(model, adapters)
    except ValueError as error:
        raise WeightsError(f"adapter: {error}") from None
    for name, leaf, adapter in entries:
        if name not in table:
            raise WeightsError(f"adapter: '{name}' has no name in peft's files: the rename table has no entry for it")
        transposed |= table[name].transposed
        for module, block in _modules(name, leaf, adapter, table[name], sizes or {}):
            path = prefix + module.removesuffix(".weight")
            ranks[path] = block["a"].shape[0]
            magnitudes |= "magnitude" in block
            state |= {f"{PREFIX}{path}.{entry}": value for entry, value in _peft_entries(leaf, block)}
    saved = []
    for name, value in tree.items(modules or {}):
        if name not in table or len(table[name].names) > 1:
            raise WeightsError(f"adapter: '{name}' is no parameter of one module of the model")
        path, _, leaf_name = (prefix + table[name].names[0]).rpartition(".")
        saved += [] if path in ranks else [path]  # under an adapter it is the layer's own table
        key = f"{path}.base_layer.{leaf_name}" if path in ranks else f"{path}.{leaf_name}"
        state[PREFIX + key] = value.T if table[name].transposed and value.ndim == 2 else value
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: r for path, r in ranks.items() if r != rank}
    config = {
        "alpha_pattern": {re.escape(path): _alpha(scale, r, stabilised) for path, r in others.items()},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _alpha(scale, rank, stabilised),
        "lora_dropout": 0.0,
        "modules_to_save": sorted(set(saved)) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {re.escape(path): r for path, r in others.items()},
        "target_modules": sorted(ranks),
        "task_type": None,
        "use_dora": magnitudes,
        "use_rslora": stabilised,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    save_file(tensors, Path(folder) / FILES[0], metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (Path(folder) / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _alpha(scale: float, rank: int, stabilised: bool) -> float:
    alpha = scale * (math.sqrt(rank) if stabilised else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha


def _modules(name: str, leaf: Any, adapter: Tree, rename: Rename, sizes: Mapping) -> Iterator[tuple[str, Tree]]:
    """(peft's module, its adapter) for each block of rows, cut where modules are joined."""
    rows, count = leaf.shape[0], len(rename.names)
    parts = list(blocks(adapter))
    known = {}
    for first, block in parts:
        size = block["b"].shape[0]
        if size < rows and count > 1:  # by its end: modules after the first are alike
            known[0 if first == 0 else count - (rows - first) // size] = size
    size = _sizes(name, rows, count, known, sizes)
    starts = [sum(size[:i]) for i in range(count)]
    for first, block in parts:
        last = first + block["b"].shape[0]
        inside = [i for i in range(count) if first <= starts[i] and starts[i] + size[i] <= last]
        if sum(size[i] for i in inside) != last - first:
            raise WeightsError(f"adapter: rows {first} to {last} of '{name}' are no modules of {listing(rename.names)}")
        for i in inside:
            own = slice(starts[i] - first, starts[i] - first + size[i])
            yield rename.names[i], {key: x if key == "a" else x[own] for key, x in block.items()}


def _peft_entries(leaf: Any, block: Tree) -> Iterator[tuple[str, Tensor]]:
    """peft's entries of an adapter of one module."""
    ndim = len(leaf.shape)
    if isinstance(leaf, specs.Table):
        yield "lora_embedding_A", block["b"].T
        yield "lora_embedding_B", block["a"].T
        return
    yield "lora_A.weight", block["a"]
    yield "lora_B.weight", block["b"].reshape(*block["b"].shape, *(1,) * (ndim - 2))
    if "magnitude" in block:
        yield "lora_magnitude_vector", block["magnitude"].reshape(*((1, -1) + (1,) * (ndim - 2) if ndim > 2 else (-1,)))
