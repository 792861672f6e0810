import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from core import random, tree
from core.spec import Param, Stat
from train import checkpoints
from train.checkpoint_storage import LIMITS, reason
from train.checkpoints import CheckpointError, Checkpoints

ROOT = Path(__file__).parents[2]


class Moments(NamedTuple):
    mu: dict
    nu: dict
    count: Tensor


class State(NamedTuple):
    params: dict
    opt_state: tuple
    key: Tensor
    step: Tensor


def make_state(seed: int = 0, width: int = 4) -> State:
    def draw(name: int, *shape: int) -> Tensor:
        return random.normal(random.fold_in(random.key(seed), name), shape)

    params = {
        "blocks": [{"bias": draw(0, width), "weight": draw(1, width, 3)}, {"weight": draw(2, width, width).T}],
        "scale": draw(3, 5).to(torch.bfloat16),
    }
    moments = Moments(tree.map(torch.zeros_like, params), tree.map(torch.ones_like, params), torch.tensor(7))
    return State(params, (moments, ()), random.key(seed + 2**31), torch.tensor(seed, dtype=torch.int32))


def same(a: tree.Tree, b: tree.Tree) -> bool:
    left, right = tree.flatten(a), tree.flatten(b)
    return left.keys() == right.keys() and all(
        x.dtype == right[n].dtype and x.shape == right[n].shape and torch.equal(x, right[n]) for n, x in left.items()
    )


def write(directory: Path, *steps: int, **options) -> None:
    with Checkpoints(directory, {"width": 4}, **options) as writer:
        for step in steps:
            writer.save(step, make_state(step), {"val_loss": float(step)})


def data_files(folder: Path) -> list[Path]:
    return [p for p in (folder / "state").rglob("d/*") if p.is_file()]


@contextmanager
def file_size_limit(size: int):
    """Stands for a full disk: the system refuses what orbax's own threads write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_state_config_and_types_come_back(tmp_path):
    with Checkpoints(tmp_path, {"width": 4, "clip": float("inf")}, argv=["train.py", "--width=4"]) as writer:
        writer.save(12, make_state(3), {"val_loss": float("nan")}, wait=True)
        assert os.listdir(tmp_path) == ["12"]
    restored = checkpoints.restore(tmp_path, make_state(9))
    assert same(restored, make_state(3))
    assert type(restored) is State and type(restored.opt_state[0]) is Moments and restored.opt_state[1] == ()
    assert restored.params["scale"].dtype == torch.bfloat16 and restored.step.shape == ()
    assert checkpoints.read_config(tmp_path) == {"width": 4, "clip": "Infinity"}
    record = checkpoints.read_record(tmp_path, 12)
    assert (record.step, record.argv, record.metrics) == (12, ["train.py", "--width=4"], {"val_loss": "NaN"})
    restored.params["blocks"][0]["bias"].add_(1.0)  # the memory is ours to write to


@pytest.mark.parametrize(
    "leaf",
    [
        torch.arange(6, dtype=torch.int64).reshape(2, 3),
        torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
        torch.tensor(True),
        torch.zeros(0, 3),
        torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        torch.tensor([1.5, float("nan"), -0.0], dtype=torch.float16),
        torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.ones(1).expand(4),
        torch.tensor([1.0], dtype=torch.float64),
        torch.tensor([7], dtype=torch.uint16),
    ],
    ids=lambda leaf: str(leaf.dtype).removeprefix("torch.") + str(tuple(leaf.shape)),
)
def test_every_dtype_keeps_its_bits(leaf, tmp_path):
    state = {"a/b ü": leaf, "other": torch.ones(1)}
    with Checkpoints(tmp_path) as writer:
        writer.save(0, state)
    restored = checkpoints.restore(tmp_path, state)["a/b ü"]
    assert restored.dtype == leaf.dtype and restored.shape == leaf.shape
    if leaf.is_complex() or leaf.element_size() not in (1, 2):
        assert restored.numpy().tobytes() == leaf.resolve_conj().numpy().tobytes()
    else:
        bits = {1: torch.uint8, 2: torch.int16}[leaf.element_size()]
        assert torch.equal(restored.view(bits), leaf.view(bits))


def test_orbax_alone_reads_the_arrays(tmp_path):
    import orbax.checkpoint as ocp

    write(tmp_path, 1)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        found = reader.restore(tmp_path / "1", args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))["state"]
    expected = make_state(1)
    np.testing.assert_array_equal(found["params.blocks.0.weight"], expected.params["blocks"][0]["weight"].numpy())
    np.testing.assert_array_equal(found["key"], expected.key.numpy())


def test_leaves_may_be_overwritten_as_soon_as_save_returns(tmp_path):
    state = {"w": torch.ones(1000, 1000)}
    with Checkpoints(tmp_path) as writer:
        writer.save(1, state)
        state["w"].zero_()
    assert torch.equal(checkpoints.restore(tmp_path, state)["w"], torch.ones(1000, 1000))


def test_key_order_of_the_template_does_not_matter(tmp_path):
    with Checkpoints(tmp_path) as writer:
        writer.save(1, {"b": torch.ones(2), "a": torch.zeros(2)})
    restored = checkpoints.restore(tmp_path, {"b": torch.zeros(2), "a": torch.zeros(2)})
    assert list(restored) == ["a", "b"] and restored["b"].sum() == 2


def test_part_and_spec_templates(tmp_path):
    params = {"norm": {"mean": torch.ones(3)}, "weight": torch.full((2, 3), 2.0)}
    with Checkpoints(tmp_path) as writer:
        writer.save(1, {"params": params, "params_ema": torch.ones(9), "step": torch.tensor(5)})
    spec = {"weight": Param((2, 3)), "norm": {"mean": Stat((3,))}}
    assert same(checkpoints.restore(tmp_path, spec, part="params"), params)
    assert checkpoints.restore(tmp_path, torch.tensor(0), part="step") == 5
    meta = tree.map(lambda x: x.to("meta"), params)
    assert same(checkpoints.restore(tmp_path, meta, part="params"), params)
    with pytest.raises(CheckpointError, match="'stats.a' is missing"):
        checkpoints.restore(tmp_path, {"a": torch.zeros(1)}, part="stats")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "scale": torch.zeros(6).bfloat16()}, r"scale' is bfloat16 \(5,\), expected bfloat16 \(6,\)"),
        (lambda p: {**p, "scale": torch.zeros(5)}, r"'params.scale' is bfloat16 \(5,\), expected float32 \(5,\)"),
        (lambda p: {**p, "head": torch.zeros(2)}, r"'params.head' is missing, expected float32 \(2,\)"),
        (lambda p: {"blocks": p["blocks"]}, "it has 'params.scale', which is not expected"),
        (lambda p: {**p, "blocks": [*p["blocks"], {"weight": torch.zeros(1)}]}, "'params.blocks.2.weight' is missing"),
    ],
)  # fmt: skip
def test_checkpoint_of_another_net_names_the_leaf(change, message, tmp_path):
    write(tmp_path, 1)
    like = make_state()
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.restore(tmp_path, like._replace(params=change(like.params)))
    assert str(tmp_path / "1") in str(caught.value) and "\n" not in str(caught.value)


def test_keeps_the_last_and_the_best(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 5.0, 6: 1.0}
    with Checkpoints(tmp_path, keep_last=2, best="val_loss") as writer:
        for step, loss in losses.items():
            writer.save(step, {"w": torch.tensor([float(step)])}, {"val_loss": loss})
    assert checkpoints.steps(tmp_path) == [2, 5, 6]
    assert checkpoints.best(tmp_path, "val_loss") == 2 and checkpoints.best(tmp_path, "val_loss", "max") == 5
    assert checkpoints.best(tmp_path, "accuracy") is None
    assert checkpoints.restore(tmp_path, {"w": torch.zeros(1)}, step=2)["w"] == 2


def test_resuming_from_an_earlier_step_drops_the_other_history(tmp_path):
    write(tmp_path, 1, 2, 3)
    with Checkpoints(tmp_path, resume=1) as writer:
        assert checkpoints.steps(tmp_path) == [1, 2, 3]
        writer.save(2, make_state(20), wait=True)
        assert checkpoints.steps(tmp_path) == [1, 2]
        writer.save(2, make_state(21))  # the same step again: the newer one counts
    assert same(checkpoints.restore(tmp_path, make_state()), make_state(21))
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_new_run_does_not_overwrite_another(tmp_path):
    write(tmp_path, 1, 4)
    with pytest.raises(CheckpointError, match="holds checkpoints of another run .newest: step 4."):
        Checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "does not exist, expected a folder with checkpoints named by their step"),
        (lambda d: d.write_text("hello"), "is a file, expected a folder with checkpoints"),
        (lambda d: (d / "pictures").mkdir(parents=True), "no checkpoint in .*: expected folders named by their step"),
        (
            lambda d: (d / "7").mkdir(parents=True),
            "7 is not a checkpoint of functree, or is damaged: it has no ",
        ),
        (lambda d: (d / "07").mkdir(parents=True), "no checkpoint in "),
    ],
    ids=["missing", "file", "no-steps", "empty-step", "padded"],
)
def test_not_a_checkpoint(prepare, message, tmp_path):
    directory = tmp_path / "checkpoints"
    prepare(directory)
    for read in (checkpoints.read_config, lambda d: checkpoints.restore(d, make_state())):
        with pytest.raises(CheckpointError, match=message):
            read(directory)


def test_missing_step_lists_what_is_there(tmp_path):
    write(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5 in .*: it has 1, 2"):
        checkpoints.restore(tmp_path, make_state(), step=5)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 3, len(content) // 3 + 40):
        content[at] ^= 0x5A
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: [truncate(p) for p in data_files(f)],
        lambda f: [garble(p) for p in data_files(f)],
        lambda f: [p.unlink() for p in data_files(f)],
        lambda f: (f / "state" / "manifest.ocdbt").write_bytes(b""),
        lambda f: shutil.rmtree(f / "state"),
        lambda f: truncate(f / "manifest" / "metadata"),
        lambda f: (f / "manifest" / "metadata").unlink(),
        lambda f: (f / "manifest" / "metadata").write_text('{"format": "something else"}'),
        lambda f: (f / "manifest" / "metadata").write_text('{"format": "functree checkpoint 1", "step": 3}'),
        lambda f: (f / "manifest" / "metadata").write_bytes(b"\xff\xfe"),
    ],
    ids=[
        "truncated", "garbled", "no-data", "empty-index", "no-state", "half-manifest", "no-manifest",
        "foreign-manifest", "incomplete-manifest", "binary-manifest",
    ],
)  # fmt: skip
def test_damage_is_said_and_an_intact_step_is_named(damage, tmp_path):
    write(tmp_path, 1, 2, 3)
    for path in data_files(tmp_path / "2"):
        garble(path)
    damage(tmp_path / "3")
    with pytest.raises(CheckpointError, match="step 1 is intact: choose it with step=1") as caught:
        checkpoints.restore(tmp_path, make_state())
    line = str(caught.value)
    assert line.startswith(str(tmp_path / "3")) and "\n" not in line and len(line) < 500
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert same(checkpoints.restore(tmp_path, make_state(), step=1), make_state(1))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.restore(tmp_path, make_state(), step=2)


@pytest.mark.parametrize("damage", [truncate, garble, Path.unlink])
def test_damage_to_any_one_file_is_found_or_harmless(damage, tmp_path):
    write(tmp_path, 1)
    found = 0
    for path in [p for p in (tmp_path / "1").rglob("*") if p.is_file()]:
        content = path.read_bytes()
        damage(path)
        try:
            assert same(checkpoints.restore(tmp_path, make_state()), make_state(1))
        except CheckpointError as error:
            assert "damaged" in str(error)
            found += 1
        path.write_bytes(content)
    assert found >= 3


def test_silent_bit_flip_is_found(tmp_path):
    """A value that decodes well but is another one: the checksum in the manifest sees it."""
    write(tmp_path, 1)
    path = tmp_path / "1" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    manifest["leaves"]["key"]["crc32"] ^= 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="'key' is not what was written .wrong checksum.; no older checkpoint"):
        checkpoints.restore(tmp_path, make_state())


def test_full_disk_is_one_line_and_the_last_good_one_stays(tmp_path, capfd, caplog):
    big = {"w": random.normal(random.key(0), (1000, 1000))}
    with Checkpoints(tmp_path) as writer:
        writer.save(1, big, wait=True)
        with file_size_limit(1_000_000), caplog.at_level(logging.INFO):
            writer.save(2, big)
            with pytest.raises(CheckpointError, match="cannot write .*2: file too large; the last good one is step 1"):
                writer.wait()
        assert not caplog.records and capfd.readouterr() == ("", "")
        assert os.listdir(tmp_path) == ["1"] and checkpoints.latest(tmp_path) == 1
        writer.save(3, big)  # with room again the run goes on
    assert same(checkpoints.restore(tmp_path, big), big) and checkpoints.steps(tmp_path) == [1, 3]


def test_full_disk_on_close_does_not_hide_the_error_of_the_run(tmp_path):
    with file_size_limit(1_000_000), pytest.raises(KeyboardInterrupt) as caught:
        with Checkpoints(tmp_path) as writer:
            writer.save(2, {"w": random.normal(random.key(0), (1000, 1000))})
            raise KeyboardInterrupt
    assert "file too large; there is no earlier one" in caught.value.__notes__[0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_reasons_of_a_full_disk(code):
    """The two forms in which the system's code arrives: from Python, and in the text of a tensorstore error."""
    inside = ValueError(f"RESOURCE_EXHAUSTED: Failed to write 7 bytes: {os.strerror(code)} [os_error_code='{code}']")
    assert {reason(inside), reason(OSError(code, os.strerror(code)))} == {LIMITS[code]}


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make the checkpoint folder"):
        Checkpoints(tmp_path / "file" / "checkpoints")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.ones(1), "b": 3}, "'b' is a int, expected a tensor"),
        ({"a": torch.ones(1, device="meta")}, "'a' is on the meta device"),
        ({"a.b": torch.ones(1)}, "keys must be strings without dots"),
        ({"a": torch.zeros(0)}, "it holds no numbers"),
    ],
)
def test_states_that_cannot_be_saved(state, message, tmp_path):
    with Checkpoints(tmp_path) as writer, pytest.raises(CheckpointError, match=message):
        writer.save(1, state)
    assert os.listdir(tmp_path) == []


KILLED = """
import sys, torch
from train.checkpoints import Checkpoints
writer = Checkpoints(sys.argv[1], resume=0)
state = {"w": torch.ones(1500, 1500)}
for step in range(1, 1000):
    writer.save(step, {"w": state["w"] * step})
    print(step, flush=True)
"""


def test_killed_while_saving_leaves_only_whole_checkpoints(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        for line in process.stdout:
            if int(line) == 5:
                process.send_signal(signal.SIGKILL)
                break
    like = {"w": torch.empty(1500, 1500)}
    for step in checkpoints.steps(tmp_path):
        assert torch.equal(checkpoints.restore(tmp_path, like, step)["w"], torch.full((1500, 1500), float(step)))
    assert checkpoints.latest(tmp_path) >= 4
    assert any(not name.isdecimal() for name in os.listdir(tmp_path))  # it was killed in the middle of one
    with Checkpoints(tmp_path, resume=checkpoints.latest(tmp_path)):
        assert all(name.isdecimal() for name in os.listdir(tmp_path))  # the remains are swept away


def test_import_loads_neither_jax_nor_orbax():
    code = "import sys, train.checkpoints; assert not {'jax', 'orbax', 'safetensors', 'tensorstore'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_params_as_one_plain_file(tmp_path):
    params = make_state(4).params
    checkpoints.export_params(tmp_path / "params.safetensors", params, {"note": "a test"})
    assert same(checkpoints.import_params(tmp_path / "params.safetensors"), params)
    assert same(checkpoints.import_params(tmp_path / "params.safetensors", params), params)
    with pytest.raises(CheckpointError, match="'head' is missing"):
        checkpoints.import_params(tmp_path / "params.safetensors", {**params, "head": torch.zeros(1)})
    truncate(tmp_path / "params.safetensors")
    with pytest.raises(CheckpointError, match="cannot read .* as a safetensors file"):
        checkpoints.import_params(tmp_path / "params.safetensors")
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoints.import_params(tmp_path / "missing.safetensors")
