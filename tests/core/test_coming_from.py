"""core/COMING_FROM.md: both sides of each section run on the same numbers and agree; each error is the one it names."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from torch import nn

from core import random, spec, tree
from core.layers import batch_norm, dropout, linear, linear_spec
from core.per_example import reports
from core.spec import Param
from core.transforms import grad, vmap
from nets.classifiers import mlp
from train import optimizers
from train.data import batching
from train.losses import cross_entropy
from train.optimizers import schedules
from train.step import Policy, create, make_step

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "core" / "COMING_FROM.md").read_text(encoding="utf-8")


def part(title: str) -> str:
    (text,) = (part for part in TEXT.split("\n## ")[1:] if part.split("\n")[0] == title)
    return text


def run(title: str, folder: Path, after: dict, sides: tuple[str, ...] = ("There", "Here")) -> set[str]:
    """Run a part of the page, section by section, and what `after` has for a section; returns their titles.

    A block belongs to the side that was named last before it, "There" or "Here"; a section with one block to Here.
    """
    there, here = {"folder": folder}, {"folder": folder}
    titles = set()
    for section in part(title).split("\n### "):
        name, side = section.split("\n")[0], "Here"
        for text, block in re.findall(r"(.*?)```python\n(.*?)```", section, re.DOTALL):
            side = [side, *re.findall(r"^(There|Here)\b(?! is)", text, re.MULTILINE)][-1]
            if side in sides:
                exec(compile(block, f"COMING_FROM.md, {name}", "exec"), {"There": there, "Here": here}[side])
        if name in after:
            after[name](there, here)
        titles.add(name)
    return titles


def close(ours, theirs, atol=1e-6):
    """Trees or arrays of either library, leaf by leaf."""
    theirs = theirs if isinstance(theirs, (torch.Tensor, dict, list, tuple)) else torch.as_tensor(np.array(theirs))
    for x, y in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
        y = torch.as_tensor(np.array(y)) if isinstance(y, jax.Array) else y
        torch.testing.assert_close(x, y.detach(), atol=atol, rtol=1e-5, check_dtype=False)


def same_parameters(there, here):
    close(here["params"], tree.nest(dict(there["net"].state_dict())))


def of_names(*names, atol=1e-6):
    def compare(there, here):
        for name in names:
            close(here[name], there[name], atol)

    return compare


def begin_alike(there, here):
    here["x"], here["y"] = there["x"], there["y"]
    values = tree.nest({name: p.clone() for name, p in there["net"].state_dict().items()})
    spec.check(here["model"], values)
    here["params"] = values
    close(here["apply"](values, here["x"]), there["logits"])


def parameters(there, here):
    assert here["names"] == sorted(there["names"]) and here["count"] == there["count"] == 195
    assert "hidden.weight" in here["summary"] and "hidden" in there["summary"]


def backward(there, here):
    close(here["value"], there["value"])
    close(here["gradient"], tree.nest(there["gradient"]))
    here["table"] = torch.randn(6, 4)


def compiled_step(there, here):
    same_parameters(there, here)
    assert int(here["state"].step) == 3


def masks(there, here):
    for side in (there, here):
        assert set(side["noisy"].unique().tolist()) == {0.0, 2.0} and bool((side["plain"] == 1).all())


def saving(there, here):
    close(here["theirs"], tree.nest(dict(there["net"].state_dict())))
    same_parameters(there, here)
    with torch.no_grad():
        there["table"] = None


def tying(there, here):
    close(here["grad"](here["tied"])(there["table"].weight.detach().clone()), there["gradient"])


def amp(there, here):
    assert here["logits"].dtype == there["logits"].dtype == torch.bfloat16
    close(here["logits"].float(), there["logits"].float(), atol=0.05)


def loader(there, here):
    for side in (there, here):
        assert sorted(torch.cat(side["epoch"]).tolist()) == list(range(32)) and len(side["epoch"]) == 4


def lifted(there, here):
    close(here["logits"], here["module"].eval()(here["x"]))


def ema(there, here):
    same_parameters(there, here)
    close(here["average"], tree.nest(dict(there["ema"].module.state_dict())))


MODULE = {
    "A model": begin_alike,
    "Parameters": parameters,
    "Backward": backward,
    "Optimizer": same_parameters,
    "A compiled step": compiled_step,
    "Param groups": same_parameters,
    "lr_scheduler": lambda there, here: close(here["rates"], torch.tensor(there["rates"])),
    "Clipping": same_parameters,
    "Accumulation": same_parameters,
    "Train and eval, dropout": masks,
    "BatchNorm": of_names("mean", "var", "count"),
    "Saving": saving,
    "Freezing": same_parameters,
    "Tying": tying,
    "Hooks": of_names("report"),
    "Devices and AMP": amp,
    "DataLoader": loader,
    "Modules you have": lifted,
    "EMA": ema,
    "Walks over modules": same_parameters,
}


def keys(there, here):
    assert np.array_equal(jax.random.key_data(there["key"]).view(np.int32), here["key"].numpy())
    for name in ("u", "i", "b", "order"):
        assert np.array_equal(np.array(there[name]), here[name].numpy()), name
    close(here["n"], there["n"])


def optax(there, here):
    close(here["w"], there["w"])
    there["w"], here["w"] = there["w"] * 1, here["w"] * 1


def nan(there, here):
    assert here["bad"] == ["b.0"]


def names_of_trees(there, here):
    of_names("doubled", "leaves", "norm")(there, here)
    assert here["names"] == ["a", "b.0", "b.1"]


def sums(there, here):
    close(torch.stack(here["sums"]), there["sums"])
    of_names("total", "chosen")(there, here)


JAX = {
    "Keys": keys,
    "Grad": of_names("value", "gradient", "by_x"),
    "Vmap": of_names("each"),
    "Jit": of_names("result"),
    "Jvp, vjp, linearize": of_names("value", "slope", "pulled", "pushed", "product"),
    "Trees": names_of_trees,
    "Optax": optax,
    "Flax, haiku, equinox": lambda there, here: close(here["metrics"]["loss"].isfinite(), torch.tensor(True)),
    "Scan and cond": sums,
    "Stop_gradient": of_names("gradient"),
    "Nan": nan,
    "Orbax": lambda there, here: close(here["params"], here["state"].params),
}


@pytest.fixture
def light_compile(monkeypatch):
    """Trace without inductor; a whole module is torch's own affair."""
    torch._dynamo.reset()
    inductor = torch.compile

    def traced(f, **options):
        return f if isinstance(f, nn.Module) else inductor(f, **{**options, "backend": "aot_eager"})

    monkeypatch.setattr(torch, "compile", traced)


def test_nn_module_agrees(light_compile, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert run("Coming from nn.Module", tmp_path, MODULE) == {*MODULE, "Coming from nn.Module"}


def test_what_replaces_jax_runs(light_compile, tmp_path):
    titles = run("Coming from JAX", tmp_path, {}, sides=("Here",))
    assert titles == {*JAX, "Coming from JAX", "What there is not"}


@pytest.mark.slow
def test_jax_agrees(light_compile, tmp_path):
    run("Coming from JAX", tmp_path, JAX)


def test_traps():
    names = dict(globals())
    (block,) = re.findall(r"```python\n(.*?)```", part("Traps"), re.DOTALL)
    exec(compile(block, "COMING_FROM.md, Traps", "exec"), names)
    assert names["same"] and names["overwritten"]
    assert len(set(map(tuple, names["per_example"].tolist()))) > 1


GIVEN = (
    Param,
    linear_spec,
    make_step,
    Policy,
    batch_norm,
    batching,
    dropout,
    linear,
    mlp,
    reports,
    grad,
    schedules,
    vmap,
)
"""Used by the table of errors and by `MORE`, beside the names below."""


def given() -> dict:
    cfg, noisy = mlp.Config((4, 8, 3)), mlp.Config((4, 8, 3), dropout=0.5)
    key, optimizer = random.key(0), optimizers.adamw(1e-3)

    def losses(params, batch, keys):
        return cross_entropy(mlp.apply(params, batch[0], cfg), batch[1], reduction="none")

    return {
        **globals(),
        "cfg": cfg,
        "noisy": noisy,
        "key": key,
        "optimizer": optimizer,
        "params": spec.init(key, mlp.spec(cfg)),
        "x": torch.ones(6, 4),
        "y": torch.arange(6) % 3,
        "net": nn.Linear(4, 3),
        "losses": losses,
        "loss": lambda params, x, y: losses(params, (x, y), None).mean(),
        "state": create(key, mlp.spec(cfg), optimizer),
    }


ERRORS = re.findall(r"^\| `(.*?)` \| `(.*?)`(?: |:|$)", part("Errors"), re.MULTILINE)


@pytest.mark.parametrize("written, error", ERRORS, ids=[written for written, _ in ERRORS])
def test_errors_are_those_of_the_page(written, error):
    with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError)) as caught:
        eval(written, given())
    assert error in str(caught.value)


@pytest.mark.parametrize("options, code", [((), 1), (("-P",), 0)])
def test_a_file_of_the_users_hides_the_package_unless_its_folder_is_left_out(options, code, tmp_path):
    (tmp_path / "train.py").write_text("from train.files import shown\nprint(shown('found'))\n")
    command = [sys.executable, *options, "train.py"]
    result = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == code
    assert ("found" in result.stdout) if code == 0 else ("'train' is not a package" in result.stderr)


# What a newcomer writes less often: (written, error).
MORE = [
    ("Param(3)", "Param: the shape is 3; expected a tuple"),
    ("Param((3,), 0.0)", "Param: init is float; expected an initialiser"),
    ("Param((3,), dtype='float32')", "Param: dtype is 'float32'; expected a torch.dtype"),
    ("spec.split(params, mlp.spec(cfg))", "split: 'layers.0.bias' is Tensor; a spec's leaves are Param or Stat"),
    ("optimizers.adamw(1e-3, mask={})", "mask is dict; expected a function (name, leaf)"),
    ("optimizers.freeze(optimizer, 'layers')", "the predicate of freeze is str; expected a function (name, leaf)"),
    ("optimizers.chain(optimizer, 1e-3)", "optimizer: got float; expected an Optimizer"),
    ("optimizers.by_path([optimizer], mlp.apply)", "by_path: the optimizers are list; expected a dict"),
    ("optimizers.ema(0.9, optimizer)", "optimizer: got float; expected an Optimizer"),
    ("optimizers.accumulate(4, optimizer)", "optimizer: got int; expected an Optimizer"),
    ("optimizers.adam(1e-3, (0.9, 0.99))", "beta1 must be a number, got tuple"),
    ("optimizers.clip_by_global_norm(params)", "limit must be a number, got dict"),
    ("optimizer.init(mlp.apply)", "optimizer: the parameters are function; expected a floating-point tensor or a tree"),
    ("make_step(optimizer, losses)", "the loss is Optimizer; expected a function, loss(params, batch, keys)"),
    ("make_step(losses, losses)", "optimizer: got losses, not called; expected an Optimizer"),
    ("make_step(losses, optimizer, policy=Policy('bfloat16'))", "the policy is Policy(compute='bfloat16'); expected"),
    ("make_step(lambda p, b, k: (x, x), optimizer, compile=False)(state, x)", "the loss returned (Tensor, Tensor)"),
    ("make_step(losses, optimizer, compile=False)(state, ())", "must agree in their leading axis: no leaf"),
    ("make_step(losses, optimizer, compile=False)(state, {'t': 1.0})", "step: 't' of the batch is float"),
    ("cross_entropy(x, y.numpy())", "labels is ndarray; expected a tensor"),
    ("random.randint(key, 0, 10, (3,))", "a shape must be a sequence of integers, such as (3,), got 0"),
    ("random.normal(key, (-1, 3))", "a shape must not have negative sizes, got (-1, 3)"),
    ("random.split(key, (2, 3))", "a shape must be a sequence of integers, such as (3,), got ((2, 3),)"),
    ("random.bernoulli(key, (3,))", "expected a number or a tensor, got (3,)"),
    ("random.bernoulli(0.5, key)", "a key must be a tensor"),
    ("dropout(key, x, 0.5)", "dropout: rate must be in [0, 1), found a tensor of shape (6, 4)"),
    ("linear(params, x)", "linear: 'weight' is not among the parameters, which are layers"),
    ("vmap(torch.add, in_dims=[0, None])(x, x)", "in_dims of argument 0 is a list, the argument a Tensor"),
    ("batching.epoch_batch(0, 0, 10, 2)", "a key must be a tensor, as core.random.key(0) is"),
    ("reports(mlp.apply, optimizers.adamw, x)", "the parameters are function; expected a floating-point tensor or"),
]


@pytest.mark.parametrize("written, error", MORE, ids=[written for written, _ in MORE])
def test_other_errors_name_what_was_expected(written, error):
    test_errors_are_those_of_the_page(written, error)
