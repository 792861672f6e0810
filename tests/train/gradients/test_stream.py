import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F

from core import random, spec, tree
from core.accumulators import histogram, moments, products, quantiles, top
from core.per_example import each, reports
from core.sketches import gradient_sketches, hashes
from nets.classifiers import mlp
from tests import processes
from train.gradients.stream import STATE, stream

pytestmark = pytest.mark.usefixtures("default_handlers")
ROOT = Path(__file__).parents[3]
COUNT = 103  # with batches of 10, the last has 3
DATA = {"x": random.normal(random.key(0), (COUNT, 5)), "y": torch.arange(COUNT) % 3}
ACCUMULATORS = {
    "square": {
        "moments": moments(),
        "histogram": histogram([0.0, 1.0, 4.0, 9.0, 100.0]),
        "quantiles": quantiles(),
        "top": top(4),
        "smallest": top(4, largest=False),
    },
    "entries": {"moments": moments(), "products": products()},
}
KEEP = ("square", "entries", "half")


def function(batch):
    x = batch["x"]
    return {"square": x.square().sum(1), "entries": x + batch["y"][:, None], "half": x[:, 0].to(torch.bfloat16)}


def run(folder=None, function=function, data=DATA, accumulators=ACCUMULATORS, **options):
    return stream(function, data, 10, accumulators, **{"keep": KEEP, "folder": folder, "quiet": True} | options)


def same_bits(a, b) -> bool:
    """True if two passes have the same results to the last bit, NaN included."""
    results = [[leaf.numpy() for leaf in tree.leaves(x.results)] for x in (a, b)]
    pairs = [*zip(*results, strict=True), *((a.kept[name], b.kept[name]) for name in a.kept)]
    return all((x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()) for x, y in pairs)


class Counted:
    """`function`, which counts its calls, and does something at one of them."""

    def __init__(self, at=None, action=None):
        self.calls, self.at, self.action = 0, at, action

    def __call__(self, batch):
        self.calls += 1
        if self.calls == self.at:
            self.action()
        return function(batch)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_what_a_pass_finds(on_disk, tmp_path):
    actual, whole = run(tmp_path if on_disk else None), function(DATA)
    squares = actual.results["square"]
    assert squares["moments"].count == COUNT
    assert float(squares["moments"].mean) == pytest.approx(float(whole["square"].double().mean()), rel=1e-12)
    assert torch.equal(squares["top"].indices, whole["square"].topk(4).indices)
    assert torch.equal(squares["smallest"].indices, whole["square"].topk(4, largest=False).indices)
    assert int(squares["histogram"].counts.sum()) == COUNT
    assert float(squares["quantiles"][2]) == pytest.approx(float(whole["square"].quantile(0.5)), rel=0.0101)
    entries = whole["entries"].double()
    torch.testing.assert_close(actual.results["entries"]["moments"].variance, entries.var(0))
    torch.testing.assert_close(actual.results["entries"]["products"].products, entries.T @ entries)
    for name, values in actual.kept.items():
        # Sums of five squares, in batches of another size; the rest is one rounding of the same numbers.
        np.testing.assert_allclose(values, whole[name].float().numpy(), rtol=1e-6 if name == "square" else 0)
        assert isinstance(values, np.memmap) == on_disk
    assert {p.name for p in tmp_path.iterdir()} == ({STATE, *(f"{n}.npy" for n in KEEP)} if on_disk else set())
    if on_disk:
        assert np.load(tmp_path / "entries.npy").shape == (COUNT, 5)


def test_batches_have_one_shape_so_a_compiled_function_is_compiled_once():
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = run(function=compiled)
    for a, b in zip(tree.leaves((actual.results, actual.kept)), tree.leaves((run().results, run().kept)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_fewer_examples_than_a_batch():
    few = tree.map(lambda x: x[:7], DATA)
    actual = run(data=few)
    np.testing.assert_allclose(actual.kept["square"], function(few)["square"], rtol=1e-6)
    assert actual.results["square"]["moments"].count == 7


def test_gradients_of_a_whole_data_set():
    """Norms by `reports`, the mean gradient and its variance by `each`, inner products by sketches."""
    cfg = mlp.Config((5, 4, 3))
    params = spec.init(random.key(1), mlp.spec(cfg))
    hashing = hashes(random.key(2), params, 32)

    def loss(params, batch):
        return F.cross_entropy(mlp.apply(params, batch["x"], cfg), batch["y"], reduction="none")

    def gradients(batch):
        return {
            "norm": reports(loss, params, batch).total_norm,
            "gradient": each(loss, params, batch),
            "sketch": gradient_sketches(loss, params, batch, hashing, 32),
        }

    expected = {"norm": {"top": top(5)}, "gradient": {"moments": moments()}, "sketch": {"products": products()}}
    actual = run(function=gradients, accumulators=expected, keep=("norm", "sketch"))
    whole = reports(loss, params, DATA, want=("norm", "square"))
    np.testing.assert_allclose(actual.kept["norm"], whole.total_norm, rtol=1e-5)
    for name, mean in tree.items(actual.results["gradient"]["moments"].mean):
        torch.testing.assert_close(mean.float(), tree.get(whole.mean, name), rtol=1e-4, atol=1e-6)
        variance = tree.get(actual.results["gradient"]["moments"].variance, name).float()
        torch.testing.assert_close(variance, tree.get(whole.variance, name), rtol=1e-3, atol=1e-6)
    sketches = torch.from_numpy(actual.kept["sketch"]).double()
    torch.testing.assert_close(actual.results["sketch"]["products"].products, sketches.T @ sketches)


# --- stopped and resumed


def test_interrupted_pass_is_saved_and_resumed_with_the_same_bits(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="stopped after 40 of 103 examples; .* can be resumed"):
        run(tmp_path, Counted(4, interrupt))
    assert (tmp_path / "square.partial.npy").exists() and not (tmp_path / "square.npy").exists()
    again = Counted()
    assert same_bits(run(tmp_path, again, resume=True), run())
    assert again.calls == 1 + 7  # the first batch, to see that the function is the same, and what was left
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("every", [0.0, 1000.0], ids=["saved", "unsaved"])
def test_pass_that_fails_is_resumed_with_the_same_bits(every, tmp_path):
    def fail():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        run(tmp_path, Counted(8, fail), every=every)
    again = Counted()
    assert same_bits(run(tmp_path, again, resume=True), run())
    assert again.calls == (1 + 4 if every == 0.0 else 11)


KILLED = """
import time
from pathlib import Path
from tests.train.gradients.test_stream import function, run

def slow(batch):
    time.sleep(0.05)
    return function(batch)

run(Path("pass"), slow, every=0.0)
"""


def saved_examples(path) -> int:
    if not path.exists():
        return 0
    with safetensors.safe_open(path, "pt") as file:
        return int(file.metadata()["done"])


def test_killed_pass_is_resumed_with_the_same_bits(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = processes.start([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment)
    while saved_examples(tmp_path / "pass" / STATE) < 30:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "pass" / "square.npy").exists()
    again = Counted()
    assert same_bits(run(tmp_path / "pass", again, resume=True), run())
    assert again.calls <= 1 + 8


def test_finished_pass_is_read_and_a_new_one_begins_with_resume(tmp_path):
    actual = run(tmp_path / "new", resume=True)
    again = Counted()
    assert same_bits(run(tmp_path / "new", again, resume=True), actual) and again.calls == 1
    os.rename(tmp_path / "new" / "square.npy", tmp_path / "new" / "square.partial.npy")  # killed before it had its name
    assert same_bits(run(tmp_path / "new", resume=True), actual)


def test_progress_says_how_fast_and_how_far(capsys):
    run(quiet=False, title="squares")
    assert capsys.readouterr().out.startswith(f"squares {COUNT}/{COUNT}  ")


# --- refusals


def other_function(batch):
    return {**function(batch), "entries": 1.01 * function(batch)["entries"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": False}, "has a pass already; continue it with resume, or choose another folder"),
        ({"data": {**DATA, "y": DATA["y"].index_fill(0, torch.tensor([51]), 7)}}, "it has data y digest .*, expected"),
        ({"data": tree.map(lambda x: x[:50], DATA)}, "it has examples 103, expected 50"),
        ({"function": other_function}, "another function, which had other values of 'entries' for the first batch"),
        (
            {"accumulators": {**ACCUMULATORS, "square": {"top": top(4, largest=False)}}},
            "square top largest True, expected False",
        ),
        (
            {"accumulators": {"square": ACCUMULATORS["square"]}},
            "now asked for accumulators entries moments kind None, expected moments",
        ),
        ({"keep": ("square",)}, r"it has keep \['entries', 'half', 'square'\], expected \['square'\]"),
        ({"identity": {"step": 3}}, "it has identity step None, expected 3"),
    ],
    ids=["exists", "data", "size", "function", "accumulator", "missing", "keep", "identity"],
)
def test_other_pass_is_named(options, message, tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{"resume": True} | options)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counted(4, interrupt))
    (tmp_path / "half.partial.npy").unlink()
    with pytest.raises(ValueError, match=r"cannot resume: '.*half.npy' is missing or damaged"):
        run(tmp_path, resume=True)
    (tmp_path / STATE).write_bytes(b"\x08")
    with pytest.raises(ValueError, match=f"cannot resume: '.*{STATE}' is no state of a pass"):
        run(tmp_path, resume=True)
    (tmp_path / STATE).unlink()
    (tmp_path / "square.npy").write_bytes(b"mine")
    with pytest.raises(ValueError, match="square.npy' exists already, and no state of a pass beside it"):
        run(tmp_path)
    assert (tmp_path / "square.npy").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": ("circle",)}, "the function returns no 'circle', only square, entries, half"),
        ({"function": lambda batch: {"square": batch["x"].sum()}}, "the function returns no 'entries'"),
        (
            {"function": lambda batch: {"a": batch["x"].sum()}, "keep": ("a",), "accumulators": None},
            r"'a' has shape \(\), expected \(10, ...\), one value per example",
        ),
        (
            {"function": lambda batch: {"a": {"b": batch["x"]}}, "keep": ("a",), "accumulators": None},
            "'a' is a dict; only single tensors can be kept",
        ),
        ({"data": {"x": DATA["x"], "y": DATA["y"][1:]}}, r"leading axis, the examples: 'x' \(103, 5\), 'y' \(102,\)"),
        ({"data": {"x": DATA["x"][:0], "y": DATA["y"][:0]}}, r"'x' \(0, 5\)"),
    ],
    ids=["name", "accumulated", "shape", "tree", "sizes", "empty"],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
