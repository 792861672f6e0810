"""A run whose step carries a state: its checkpoints hold the state, and a resumed run ends with the same bits."""

import dataclasses
import shutil

import pytest
import torch

from core import tree
from tests.train.run.test_run import args_of, resumed
from tests.train.test_carry import BATCH, CLIPPED_SGD, MODEL, TIME, TOKENS, initial, make_loss, zeros
from train.data.text.text import lane_batch
from train.run import begin, open_run
from train.run.checkpoints import CheckpointError
from train.step import make_step

pytestmark = pytest.mark.usefixtures("default_handlers")
IDENTITY, F32 = {"net": {"width": 5}}, torch.float32


def train(root, args, forget=False, batch=BATCH):
    """The parameters and the carry at the end; `forget` begins with a carry of zeros although resumed."""
    run = begin(root, args, free=("steps",))
    new = {"carry": zeros(F32, batch), "state": initial(F32)}
    saved = run.restore(new, IDENTITY, args.steps)
    state, carry = saved["state"], (new if forget else saved)["carry"]
    step = make_step(make_loss("examples", 0.2), CLIPPED_SGD, carry=True, donate=True, compile=False)
    with run.open({}):
        for at, inputs in run.steps(lane_batch(TOKENS, t, batch, TIME) for t in run.remaining):
            state, metrics, carry = step(state, (inputs, carry))
            run.record(at, metrics, batch * TIME)
            if run.due(at, args.common.save_every):
                run.save(at, {"carry": carry, "state": state})
    return {"carry": carry, "state": state}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of runs, in which run a has done 3 of the 5 steps that it takes; a pass has 6."""
    root = tmp_path_factory.mktemp("runs") / "lanes"
    train(root, args_of("a", steps=3))
    return root


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_never_stopped(stopped, tmp_path):
    whole = train(tmp_path, args_of("b", steps=5))
    for forget in (False, True):  # with zeros in place of its carry it ends otherwise
        root = tmp_path / str(forget) / "lanes"
        shutil.copytree(stopped, root)
        again = train(root, resumed(args_of(steps=5), "a"), forget)
        same = [torch.equal(x, y) for x, y in zip(*map(tree.leaves, (again, whole)), strict=True)]
        assert all(same) != forget


def test_the_net_of_a_checkpoint_that_has_a_carry(stopped):
    saved = open_run(stopped / "a", stopped, "3")
    params = saved.learned(MODEL, "state", averaged=False)
    assert tree.names(params) == tree.names(MODEL)
    assert torch.equal(params["last"]["weight"], saved.restore(MODEL, "state.params")["last"]["weight"])
    assert saved.restore(zeros(F32), "carry")["h"].abs().min() > 0


def test_a_carry_of_another_batch_size_or_none(stopped, tmp_path):
    message = r"3 does not fit: 'carry.c' is float32 \(4, 5\), expected float32 \(8, 5\)$"
    with pytest.raises(CheckpointError, match=message):
        train(stopped, resumed(args_of(steps=5), "a"), batch=8)
    run = begin(stopped, resumed(args_of(steps=5), "a"), free=("steps",))
    with pytest.raises(CheckpointError, match="does not fit: .*'params.hidden.bias' is missing"):
        run.restore(initial(F32), IDENTITY, 5)
    plain = begin(tmp_path, args_of("old", steps=1))  # whose checkpoint is the state alone, and is restored as ever
    plain.restore(initial(F32), IDENTITY, 1)
    with plain.open({}):
        plain.save(1, initial(F32))
    later = dataclasses.replace(resumed(args_of(), "old"), steps=1)
    torch.testing.assert_close(begin(tmp_path, later).restore(initial(F32), IDENTITY, 1), initial(F32), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="does not fit: 'carry.c' is missing, expected float32"):
        train(tmp_path, later)
