"""Several processes give what one process gives with the whole batch: curves, states, gradients, derivatives.

The cases are those of `process_cases.py`; gloo processes run them, a few in one start, and this process the reference.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from core import tree
from nets.classifiers import resnet
from tests import launched

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import process_cases as cases  # noqa: E402

# Sums in another order: 1e-7 of a loss of 4 is an ulp; over 20 steps AdamW passes some of them on.
CURVE = 2e-6


def outputs(folder, names: str, ranks: int) -> dict[str, list[dict]]:
    for code, _, err in launched.together(HERE / "process_cases.py", folder, names, ranks=ranks):
        assert code == 0, err
    keys = [name.partition("@")[0] + ("_resumed" if "@" in name else "") for name in names.split(",")]
    return {key: [torch.load(folder / f"{key}-{rank}.pt") for rank in range(ranks)] for key in keys}


@pytest.fixture(scope="module")
def alone():
    return cases.train(None)


def check(ranks: list[dict], reference: tuple) -> None:
    curve, state = reference
    torch.testing.assert_close(ranks[0]["curve"], curve[: len(ranks[0]["curve"])], rtol=0, atol=CURVE)
    for other in ranks[1:]:
        assert torch.equal(other["curve"], ranks[0]["curve"])
        assert all(torch.equal(x, ranks[0]["state"][name]) for name, x in other["state"].items())
    if len(curve) == len(ranks[0]["curve"]):
        for name, x in tree.flatten(state).items():  # where a gradient is nearly 0, AdamW divides it by itself
            torch.testing.assert_close(ranks[0]["state"][name], x, rtol=0, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    names = "transforms,replicate,fsdp,tensor,batch_norm,local_norm,far_from_zero,watched,half"
    names += ",unlike_weights,carried,carried_in_parts"
    return outputs(tmp_path_factory.mktemp("two"), names, 2)


@pytest.mark.parametrize("way", ["replicate", "fsdp", "tensor"])
def test_two_processes_are_one(two, alone, way):
    check(two[way], alone)


def test_curves_can_tell_a_missing_reduction(two, alone):
    """The first half of the rows alone has another curve by far."""
    step = cases.make_step(lambda *args: cases.losses(*args, cfg=cases.CFG), cases.optimizer(), compile=False)
    state = cases.create(cases.random.key(0), cases.gpt2.spec(cases.CFG), cases.optimizer())
    for i in range(3):
        state, metrics = step(state, tuple(x[:4] for x in cases.batch_of(i)))
    assert abs(float(metrics["loss"] - alone[0][2, 0])) > 1e-3


def test_derivatives_of_collectives(two):
    """The loss of all is the sum of the processes'; with x_r = (0, 1, 2) + r and 2 processes."""
    out = [ranks["transforms"] for ranks in ({"transforms": x} for x in two["transforms"])]
    x = [torch.arange(3.0), torch.arange(3.0) + 1]
    total = x[0] + x[1]
    expected = {
        "sum_over": [3 * total**2 * 3] * 2,  # Σ_r (r + 1) Σ total³
        "stack_over": [3 * x[r] ** 2 * 3 for r in range(2)],
        "enter": [3 * x[0] ** 2 + 6 * x[1] ** 2] * 2,
        "leave": [3 * total**2] * 2,
        "join": [3 * x[r] ** 2 for r in range(2)],
    }
    tangents = {"sum_over": [(3 * total**2 * 2).sum() * (r + 1) for r in range(2)]}
    for name, grads in expected.items():
        for rank in range(2):
            values = out[rank][name]
            torch.testing.assert_close(values["grad"], grads[rank], msg=name)
            assert torch.equal(values["compiled"], values["grad"]), name
            assert torch.equal(values["vmapped"][0], values["grad"]), name
            if name in tangents:
                torch.testing.assert_close(values["tangent"], tangents[name][rank])


def test_raw_collectives_refuse_transforms(two):
    refused = two["transforms"][0]["refused"]
    assert len(refused) == 6 and all("outside of grad, vmap and jvp" in line for line in refused)


def test_scatter_and_gather_are_a_sum(two):
    whole = torch.arange(24.0).reshape(2, 4, 3) * 3
    for rank, out in enumerate(x for x in two["transforms"]):
        assert torch.equal(out["scattered"][0], whole.chunk(2, 0)[rank])
        assert torch.equal(out["scattered"][1], whole.chunk(2, 1)[rank])
        assert all(torch.equal(x, whole) for x in out["gathered"])


def test_synchronised_batch_norm_is_that_of_the_whole_batch(two):
    reference = cases.gradient_of(resnet.PRESETS["cifar-resnet8"])
    out, local = two["batch_norm"][0], two["local_norm"][0]
    for part in ("grads", "increments"):
        for name, x in reference[part].items():
            error = float((out[part][name] - x).norm() / x.norm().clamp(min=1e-6))
            assert error < 1e-5, (part, name, error)
    name = max(reference["grads"], key=lambda name: float(reference["grads"][name].norm()))
    assert float((local["grads"][name] - reference["grads"][name]).norm() / reference["grads"][name].norm()) > 0.01


def test_weights_that_differ_between_processes(two):
    """Each process is told by the others, through the statistics, how they change their losses: in one unit."""
    reference = cases.gradient_of(resnet.PRESETS["cifar-resnet8"], weights=cases.UNLIKE)
    for out in two["unlike_weights"]:
        torch.testing.assert_close(out["loss"], reference["loss"])
        for part in ("grads", "increments"):
            for name, x in reference[part].items():
                error = float((out[part][name] - x).norm() / x.norm().clamp(min=1e-6))
                assert error < 1e-5, (part, name, error)


@pytest.mark.parametrize("case", ["carried", "carried_in_parts"])
def test_a_carried_state_and_metrics_per_example_are_those_of_the_whole_batch(two, case):
    reference = cases.read_on(None)
    assert reference["each"].shape == (8,) and reference["carry"].abs().max() > 0.1
    for out in two[case]:
        for name, x in reference.items():
            torch.testing.assert_close(out[name], x, rtol=1e-5, atol=1e-6, msg=name)


def test_synchronised_batch_norm_far_from_zero(two):
    for out in two["far_from_zero"]:  # 1000 in float32 has steps of 6e-5
        torch.testing.assert_close(out["together"], out["all"], rtol=0, atol=1e-3)


def test_per_example_norms_of_all_processes(two):
    reference = cases.watch_of(None)
    for out in two["watched"]:
        assert out["norms"].shape == (8,)
        for name, x in reference.items():
            torch.testing.assert_close(out[name], x, rtol=1e-5, atol=1e-7, msg=name)


@pytest.fixture
def fake_group():
    """Process 3 of 8 whose collectives move nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("way", "sizes", "share"), [("fsdp", {"data": 8}, 8), ("hsdp", {"replica": 2, "data": 4}, 4)])
def test_pieces_of_eight_processes(fake_group, way, sizes, share):
    over = cases.distribute(cases.gpt2.spec(cases.CFG), cases.open_mesh(sizes), way)
    whole = cases.create(cases.random.key(0), cases.gpt2.spec(cases.CFG), cases.optimizer())
    state = over.cut(whole)
    for part in ("params", "opt_state"):
        numbers, all_of_them = tree.count(getattr(state, part)), tree.count(getattr(whole, part))
        assert abs(numbers - all_of_them / share) <= 2  # the counts of the optimizer are whole
    step = cases.make_step(
        lambda *args: cases.losses(*args, cfg=cases.CFG), cases.optimizer(), distributed=over, compile=False
    )
    after, metrics = step(state, cases.batch_of(0))
    assert tree.structure(after) == tree.structure(state)
    assert all(x.shape == y.shape for x, y in zip(tree.leaves(after), tree.leaves(state), strict=True))
    with pytest.raises(ValueError, match="a batch of 7 examples does not divide over 8 processes"):
        step(state, tuple(x[:7] for x in cases.batch_of(0)))


@pytest.mark.slow
def test_four_processes_and_resuming_on_four_and_on_one(two, tmp_path, alone):
    """At step 10 from the state of two processes."""
    first = two["half"][0]["state"]
    torch.save(first, tmp_path / "state.pt")
    four = outputs(tmp_path, f"fsdp,hsdp,tensor_and_data,fsdp@{tmp_path / 'state.pt'}", 4)
    rest = four.pop("fsdp_resumed")
    torch.testing.assert_close(rest[0]["curve"], alone[0][10:], rtol=0, atol=CURVE)
    for ranks in four.values():
        check(ranks, alone)
    template = cases.create(cases.random.key(0), cases.gpt2.spec(cases.CFG), cases.optimizer())
    curve, _ = cases.train(None, steps=range(10, 20), state=tree.nest(first, like=template))
    torch.testing.assert_close(curve, alone[0][10:], rtol=0, atol=CURVE)


@pytest.mark.slow
def test_other_options(tmp_path, alone):
    more = outputs(tmp_path, "micro,donated,muon,tensor_joined", 2)
    for name, ranks in more.items():
        check(ranks, cases.train(None, optimizer_name="muon") if name == "muon" else alone)


@pytest.mark.long
def test_compiled_steps(tmp_path, alone):
    for ranks in outputs(tmp_path, "compiled,compiled_tensor", 2).values():
        check(ranks, alone)
