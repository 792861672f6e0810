"""Published weights: every kind of file is read, and each fault of one is a line that names it."""

import argparse
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from core import random, spec, tree
from core.layers import batch_norm_spec, linear_spec
from nets.weights import (
    ENTRIES,
    PREFIXES,
    SUFFIXES,
    Rename,
    WeightsError,
    fill,
    locate,
    read,
    read_config,
    strip_prefixes,
)

SPEC = {"head": linear_spec(3, 2), "norm": batch_norm_spec(3)}
TABLE = {
    "head.bias": Rename("fc.b"),
    "head.weight": Rename("fc.w", transposed=True),
    "norm.bias": Rename("bn.beta"),
    "norm.mean": Rename("bn.mean"),
    "norm.var": Rename("bn.var"),
    "norm.weight": Rename("bn.gamma"),
}


def tensors():
    """The content of a file of these weights, in another library's names and layout."""
    shapes = {"bn.beta": (3,), "bn.gamma": (3,), "bn.mean": (3,), "bn.var": (3,), "fc.b": (2,), "fc.w": (3, 2)}
    keys = random.split(random.key(0), len(shapes)).unbind(0)
    return {name: random.normal(key, shape) for (name, shape), key in zip(shapes.items(), keys, strict=True)}


def shards(folder: Path, index: str, save, suffix: str):
    names = sorted(tensors())
    weight_map = {name: f"part-{i % 2}.{suffix}" for i, name in enumerate(names)}
    for part in set(weight_map.values()):
        save({name: tensors()[name] for name in names if weight_map[name] == part}, folder / part)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def old_pickle(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


WRITERS = {
    "safetensors": lambda folder: save_file(tensors(), folder / "model.safetensors"),
    "pickle": lambda folder: torch.save(tensors(), folder / "pytorch_model.bin"),
    "pickle before torch 1.6": lambda folder: old_pickle(tensors(), folder / "pytorch_model.bin"),
    "safetensors, sharded": lambda folder: shards(folder, "model.safetensors.index.json", save_file, "safetensors"),
    "pickle, sharded": lambda folder: shards(folder, "pytorch_model.bin.index.json", torch.save, "bin"),
}


@pytest.fixture(params=WRITERS)
def folder(request, tmp_path):
    WRITERS[request.param](tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "test"}')
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """A hub whose repository "someone/weights" is the folder that was put into it."""
    repositories = {}

    def download(repository, name, **_):
        if not (repositories[repository] / name).is_file():
            raise EntryNotFoundError(f"404 for {name}")
        # Each file lands by itself, as in the cache of the real hub.
        target = repositories["cache"] / name
        shutil.copy(repositories[repository] / name, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return repositories


def test_every_kind_of_file_is_read(folder):
    assert read_config(str(folder)) == {"model_type": "test"}
    torch.testing.assert_close(read(str(folder)), tensors(), rtol=0, atol=0)
    # The file itself, and its index, are as good as their folder.
    path = locate(str(folder))
    torch.testing.assert_close(read(str(path)), tensors(), rtol=0, atol=0)
    assert read_config(str(path)) == {"model_type": "test"}


def test_every_kind_of_file_is_read_from_the_hub(folder, hub, tmp_path_factory):
    hub |= {"someone/weights": folder, "cache": tmp_path_factory.mktemp("cache")}
    torch.testing.assert_close(read("someone/weights"), tensors(), rtol=0, atol=0)
    assert read_config("someone/weights") == {"model_type": "test"}


def test_a_repository_without_weights(hub, tmp_path):
    hub |= {"someone/weights": tmp_path, "cache": tmp_path}
    with pytest.raises(WeightsError, match="repository 'someone/weights' has none of the files model.safetensors, "):
        read("someone/weights")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nobody/nothing", "not in the local cache, and the hub cannot be reached: .*offline mode is enabled"),
        ("./no/such/folder", "nor a repository"),
        ("no such folder", "nor a repository"),
    ],
)
def test_an_unknown_repository_offline(source, message, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for f in (read, read_config):
        with pytest.raises(WeightsError, match=f"^'{source}' is no local file or directory.*{message}") as raised:
            f(source)
        assert "\n" not in str(raised.value)


def test_offline_takes_what_is_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--weights"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    WRITERS["pickle"](snapshot)
    download = huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: download(*a, cache_dir=tmp_path, **k))
    torch.testing.assert_close(read("someone/weights"), tensors(), rtol=0, atol=0)


# Files that are damaged.


def truncate(path: Path, keep: float):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


class Writes:
    """Unpickling this makes a file: code from the pickle has run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def program(path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)


def index(folder: Path, text: str):
    (folder / "model.safetensors.index.json").write_text(text)


SAFE, BIN = "model.safetensors", "pytorch_model.bin"
UNREADABLE = "cannot be read as weights"
FAULTS = {
    "empty folder": (lambda d: None, "has none of the files"),
    "truncated header": (lambda d: (WRITERS["safetensors"](d), truncate(d / SAFE, 0.1)), UNREADABLE),
    "truncated safetensors": (
        lambda d: (WRITERS["safetensors"](d), truncate(d / SAFE, 0.9)),
        UNREADABLE,
    ),
    "truncated pickle": (lambda d: (WRITERS["pickle"](d), truncate(d / BIN, 0.7)), UNREADABLE),
    "garbled safetensors": (lambda d: (d / SAFE).write_bytes(b"\xff" * 99), UNREADABLE),
    "garbled pickle": (lambda d: (d / BIN).write_bytes(b"not a pickle"), UNREADABLE),
    "empty file": (lambda d: (d / SAFE).touch(), UNREADABLE),
    "empty pickle": (lambda d: (d / BIN).touch(), UNREADABLE),
    "a list": (lambda d: torch.save([torch.zeros(2)], d / BIN), "something other than named tensors: a list; expected"),
    "numbers": (
        lambda d: torch.save({"epoch": 3, "model": {"lr": 0.1}}, d / BIN),
        "something other than named tensors: the entries 'epoch', 'model'; expected tensors by name, alone or as one",
    ),
    "no names": (lambda d: torch.save({0: torch.zeros(2)}, d / BIN), "something other than named tensors"),
    "a module": (
        lambda d: torch.save(torch.nn.Linear(2, 2), d / BIN),
        r"it holds a torch.nn.modules.linear.Linear, which could run code; save its tensors alone with torch.save\(mod",
    ),
    "a program": (
        lambda d: program(d / BIN),
        r"it is a program in TorchScript; save its tensors alone with torch.save\(mod",
    ),
    "index is not JSON": (lambda d: index(d, "{"), "not readable as JSON"),
    "index is a list": (lambda d: index(d, "[]"), "holds no JSON object"),
    "index without map": (lambda d: index(d, "{}"), "no 'weight_map'"),
    "index of numbers": (lambda d: index(d, '{"weight_map": {"a": 1}}'), "no 'weight_map' of file names"),
    "index leads outside": (lambda d: index(d, '{"weight_map": {"a": "../b.bin"}}'), "outside its folder: '../b.bin'"),
    "index of other files": (lambda d: index(d, '{"weight_map": {"a": "config.json"}}'), "has none of|no weights file"),
    "a shard is missing": (
        lambda d: (WRITERS["safetensors, sharded"](d), (d / "part-1.safetensors").unlink()),
        "has none of the files part-1.safetensors",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named_in_one_line(fault, tmp_path):
    damage, message = FAULTS[fault]
    damage(tmp_path)
    with pytest.raises(WeightsError, match=message) as raised:
        read(str(tmp_path))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)  # torch advises to switch it off


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "weights.npz").touch()
    with pytest.raises(WeightsError, match="no weights file; expected one of .safetensors"):
        read(str(tmp_path / "weights.npz"))
    (tmp_path / "weights.tar").touch()
    with pytest.raises(WeightsError, match="no weights file; expected one of .*, .ckpt, .pth.tar"):
        read(str(tmp_path / "weights.tar"))


# Checkpoints that hold more than tensors, under names with prefixes.


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".safetensors"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_tensors_of_a_checkpoint(entry, suffix, tmp_path):
    path = tmp_path / f"last{suffix}"
    content = {entry: tensors(), "epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}
    torch.save(content, path)
    torch.testing.assert_close(read(str(path)), tensors(), rtol=0, atol=0)


@pytest.mark.parametrize("prefix", [*PREFIXES, "module._orig_mod.", "model.backbone.module."])
def test_prefixes_of_wrappers(prefix, tmp_path):
    state = {prefix + name: x for name, x in tensors().items()}
    stripped, what = strip_prefixes(state)
    assert what == prefix
    torch.testing.assert_close(stripped, tensors(), rtol=0, atol=0)
    torch.save(state, tmp_path / "a.pt")
    torch.testing.assert_close(read(str(tmp_path / "a.pt")), tensors(), rtol=0, atol=0)
    # Some formats have such a prefix in their own names.
    torch.testing.assert_close(read(str(tmp_path / "a.pt"), prefixes=()), state, rtol=0, atol=0)
    mixed = {**state, "step": torch.zeros(())}
    assert strip_prefixes(mixed) == (mixed, "") and strip_prefixes({}) == ({}, "")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_config(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(WeightsError, match="JSON"):
        read_config(str(tmp_path), optional=True)


def test_no_config(tmp_path):
    with pytest.raises(WeightsError, match="has none of the files config.json"):
        read_config(str(tmp_path))
    assert read_config(str(tmp_path), optional=True) == {}


@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "plain pickle"])
def test_code_in_a_pickle_does_not_run(form, tmp_path):
    ran, path = tmp_path / "ran", tmp_path / BIN
    bad = {"weight": torch.zeros(2), "other": Writes(ran)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"other": Writes(ran)}))
    else:
        torch.save(bad, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match="cannot be read as weights") as raised:
        read(str(tmp_path))
    assert not ran.exists() and "\n" not in str(raised.value)
    # It would have run.
    with path.open("rb") as file:
        (torch.load(file, weights_only=False) if form != "plain pickle" else pickle.load(file))
    assert ran.exists()


# From names to a tree.


def test_fill_renames_and_transposes():
    state = tensors()
    values = fill(SPEC, state, TABLE)
    assert torch.equal(values["head"]["weight"], state["fc.w"].T) and values["head"]["weight"].is_contiguous()
    for ours, theirs in (("bias", "bn.beta"), ("mean", "bn.mean"), ("var", "bn.var"), ("weight", "bn.gamma")):
        assert torch.equal(values["norm"][ours], state[theirs])
    # A Stat that the file does not have keeps its initial value.
    assert values["norm"]["count"] == 0
    spec.check(SPEC, values)
    assert list(values) == sorted(values) and list(values["norm"]) == sorted(values["norm"])


def test_fill_gives_values_of_its_own():
    state = {name: torch.nn.Parameter(x.to(torch.bfloat16)) for name, x in tensors().items()}
    values = fill(SPEC, state, TABLE)
    for name, leaf in tree.items(values):
        assert leaf.dtype == torch.float32 and not leaf.requires_grad, name
    with torch.no_grad():
        state["fc.b"].zero_()
    assert (values["head"]["bias"] != 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fc.w": None},
            r"test: 'fc.w' is missing; expected for 'head.weight' \(2, 3\); the file has 'fc.b', .* and 2 more$",
        ),
        (
            {"fc.w": None, "head.w": torch.zeros(3, 2)},
            r"'fc.w' is missing; expected for 'head.weight' \(2, 3\); the file has 'head.w'$",
        ),
        (dict.fromkeys(tensors()), r"'fc.b' is missing; expected for 'head.bias' \(2,\); the file has no tensors$"),
        ({"fc.w": torch.zeros(2, 3)}, r"'fc.w' has shape \(2, 3\), expected \(3, 2\) for 'head.weight'"),
        ({"bn.var": torch.zeros(4)}, r"'bn.var' has shape \(4,\), expected \(3,\) for 'norm.var'"),
        ({"fc.b": torch.zeros(2, dtype=torch.int8)}, "'fc.b' holds torch.int8, expected floating-point"),
        ({"fc.c": torch.zeros(2), "fc.d": torch.zeros(2)}, "the file has 2 tensors .* no place for: 'fc.c', 'fc.d'"),
    ],
)
def test_fill_names_what_does_not_fit(change, message):
    state = {name: x for name, x in {**tensors(), **change}.items() if x is not None}
    with pytest.raises(WeightsError, match=message):
        fill(SPEC, state, TABLE, "test")


@pytest.mark.parametrize("transposed", [False, True])
def test_fill_joins_several_tensors_along_the_first_axis(transposed):
    table = {"bias": Rename(("q.b", "k.b"), transposed), "weight": Rename(("q.w", "k.w"), transposed)}
    state = {name: x for name, x in zip(("q.b", "k.b"), torch.arange(5.0).split([3, 2]), strict=True)}
    weight = torch.arange(20.0).reshape(5, 4)
    state |= {name: x.T if transposed else x for name, x in zip(("q.w", "k.w"), weight.split([3, 2]), strict=True)}
    values = fill(linear_spec(4, 5), state, table)
    assert torch.equal(values["weight"], weight) and torch.equal(values["bias"], torch.arange(5.0))

    with pytest.raises(WeightsError, match="'k.w' is missing; expected for 'weight'"):
        fill(linear_spec(4, 5), {name: x for name, x in state.items() if name != "k.w"}, table)
    for wrong in (torch.zeros(1, 4), torch.zeros(2, 3), torch.zeros(8)):
        wrong = wrong.T if transposed and wrong.ndim == 2 else wrong
        with pytest.raises(WeightsError, match=r"'q.w' \+ 'k.w' has shape .*, expected .* for 'weight'") as error:
            fill(linear_spec(4, 5), state | {"k.w": wrong}, table)
        assert f" + {tuple(wrong.shape)}, " in str(error.value)


def test_fill_needs_an_entry_for_every_parameter():
    with pytest.raises(WeightsError, match="the rename table has no entry for 'head.bias'"):
        fill(SPEC, tensors(), {name: rename for name, rename in TABLE.items() if name != "head.bias"})
    with pytest.raises(WeightsError, match="'fc.b' is missing; expected for 'norm.bias'"):
        fill(SPEC, tensors(), {**TABLE, "norm.bias": Rename("fc.b")})
