import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core import tree
from core.spec import Param, Stat
from tests.train.run.checkpoint_cases import Moments, State, make_state, same, write
from train.run import checkpoints
from train.run.checkpoints import CheckpointError, Checkpoints

ROOT = Path(__file__).parents[3]


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
        state = reader.restore(tmp_path / "1", args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))["state"]
    expected = make_state(1)
    np.testing.assert_array_equal(state["params.blocks.0.weight"], expected.params["blocks"][0]["weight"].numpy())
    np.testing.assert_array_equal(state["key"], expected.key.numpy())


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


def test_import_loads_neither_jax_nor_orbax():
    heavy = "{'jax', 'orbax', 'safetensors', 'tensorstore'}"
    code = f"import sys, train.run.checkpoints; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_params_as_one_plain_file(tmp_path):
    params = make_state(4).params
    checkpoints.export_params(tmp_path / "params.safetensors", params, {"note": "a test"})
    assert same(checkpoints.import_params(tmp_path / "params.safetensors"), params)
    assert same(checkpoints.import_params(tmp_path / "params.safetensors", params), params)
    with pytest.raises(CheckpointError, match="'head' is missing"):
        checkpoints.import_params(tmp_path / "params.safetensors", {**params, "head": torch.zeros(1)})
    path = tmp_path / "params.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot read .* as a safetensors file"):
        checkpoints.import_params(tmp_path / "params.safetensors")
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoints.import_params(tmp_path / "missing.safetensors")
