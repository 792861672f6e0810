"""Tools for per-example gradients, each used as its own documentation says: `tool(case)` -> norms (batch,).

The norm is that of the whole gradient per example. Where a tool leaves a gradient a parameter, those that it left are
summed up; what it leaves out is for the table to find. A tool is imported only when it is called.
"""

import contextlib
import copy
import importlib.metadata
import tempfile

import torch
import torch.nn.functional as F
from cases import BATCH, Case
from torch import Tensor, nn

CRITERION = nn.CrossEntropyLoss


def loop(case: Case) -> Tensor:
    """The oracle: plain autograd on batches of one."""
    return squares_by_parameter(case).sum(0).sqrt()


def squares_by_parameter(case: Case) -> Tensor:
    """(parameters, batch): the oracle's squared norms, in the order of `named_parameters`."""
    parameters, rows = list(case.module.parameters()), []
    for i in range(BATCH):
        loss = F.cross_entropy(case.module(case.x[i : i + 1]), case.labels[i : i + 1])
        rows.append([g.square().sum() for g in torch.autograd.grad(loss, parameters)])
    return torch.tensor(rows, dtype=torch.float64).T


def functree(case: Case) -> Tensor:
    from core import per_example

    return per_example.reports(case.losses, case.params, (case.x, case.labels), want=("norm",)).total_norm


def vmap_grad(case: Case) -> Tensor:
    params = {name: p.detach() for name, p in case.module.named_parameters()}

    def loss(params, x, label):
        return F.cross_entropy(torch.func.functional_call(case.module, params, (x[None],)), label[None])

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, case.x, case.labels)
    return _norms(grads.values())


def expanded_weights(case: Case) -> Tensor:
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    logits = call_for_per_sample_grads(case.module, batch_size=BATCH, loss_reduction="sum")(case.x)
    CRITERION(reduction="sum")(logits, case.labels).backward()
    return _left(case.module, "grad_sample")


def opacus_hooks(case: Case) -> Tensor:
    from opacus import GradSampleModule

    module = GradSampleModule(_opacus(case), loss_reduction="sum")
    CRITERION(reduction="sum")(module(case.x), case.labels).backward()
    return _left(module, "grad_sample")


def opacus_ghost(case: Case) -> Tensor:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    module = GradSampleModuleFastGradientClipping(_opacus(case), max_grad_norm=1.0, loss_reduction="sum")
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=BATCH,
        loss_reduction="sum",
    )
    criterion = DPLossFastGradientClipping(module, optimizer, CRITERION(reduction="sum"), loss_reduction="sum")
    criterion(module(case.x), case.labels).backward()
    return module.per_sample_gradient_norms


class OtherFunction(Exception):
    """The module as a tool has changed it is a different function."""


def _opacus(case: Case) -> nn.Module:
    from opacus.validators import ModuleValidator

    # What Opacus has its own layers for (attention, recurrence) is replaced by these, with the same values.
    module = ModuleValidator.fix(case.module)
    if not torch.allclose(module(case.x), case.module(case.x)):
        raise OtherFunction("the layers that ModuleValidator.fix puts in give other outputs")
    return module


def backpack_grads(case: Case) -> Tensor:
    from backpack.extensions import BatchGrad

    return _left(_backpack(case, BatchGrad()), "grad_batch")


def backpack_norms(case: Case) -> Tensor:
    from backpack.extensions import BatchL2Grad

    parameters = _backpack(case, BatchL2Grad()).parameters()
    return sum(p.batch_l2 for p in parameters if hasattr(p, "batch_l2")).sqrt()


def _backpack(case: Case, extension) -> nn.Module:
    from backpack import backpack, extend

    module, criterion = extend(case.module), extend(CRITERION(reduction="sum"))
    loss = criterion(module(case.x), case.labels)
    with backpack(extension):
        loss.backward()
    return module


def torchjd(case: Case) -> Tensor:
    return _torchjd(case, batch_dim=0)


def torchjd_unbatched(case: Case) -> Tensor:
    return _torchjd(case, batch_dim=None)


def _torchjd(case: Case, batch_dim: int | None) -> Tensor:
    from torchjd.autogram import Engine

    engine = Engine(case.module, batch_dim=batch_dim)
    losses = CRITERION(reduction="none")(case.module(case.x), case.labels)
    return engine.compute_gramian(losses).diagonal().sqrt()


def fastdp(case: Case) -> Tensor:
    from fastDP import PrivacyEngine, autograd_grad_sample

    # The engine keeps the norms only until it has clipped by them, so they are read just before that.
    seen, clip = [], autograd_grad_sample._per_block_clip_grad

    def read_and_clip(layer, named_params, *rest):
        norms = [p.norm_sample for _, p in named_params if hasattr(p, "norm_sample")]
        seen.append(torch.stack(norms).norm(dim=0))
        clip(layer, named_params, *rest)

    autograd_grad_sample._per_block_clip_grad = read_and_clip
    try:
        sizes = {"batch_size": BATCH, "sample_size": 100, "epochs": 1}
        engine = PrivacyEngine(case.module, **sizes, noise_multiplier=0.0, loss_reduction="sum")
        optimizer = torch.optim.SGD(case.module.parameters(), lr=0.1)
        engine.attach(optimizer)
        CRITERION(reduction="sum")(case.module(case.x), case.labels).backward()
        optimizer.step()  # says which parameters it leaves out
    finally:
        autograd_grad_sample._per_block_clip_grad = clip
    return seen[-1]


def captum(case: Case) -> Tensor:
    from captum.influence import TracInCP

    data = torch.utils.data.TensorDataset(case.x, case.labels)
    options = {"loss_fn": CRITERION(reduction="sum"), "batch_size": BATCH, "sample_wise_grads_per_batch": True}
    # One checkpoint, what the module holds already, at learning rate 1: the self-influence is the squared norm.
    influence = TracInCP(case.module, data, checkpoints=["now"], checkpoints_load_func=lambda *_: 1.0, **options)
    return influence.self_influence().sqrt()


def asdl(case: Case) -> Tensor:
    from asdl.gradient import batch_gradient

    def closure():
        loss = CRITERION(reduction="sum")(case.module(case.x), case.labels)
        loss.backward()
        return loss

    return batch_gradient(case.module, closure).norm(dim=1)


def kronfluence(case: Case) -> Tensor:
    return _kronfluence(case, shared=False)


def kronfluence_shared(case: Case) -> Tensor:
    return _kronfluence(case, shared=True)


def _kronfluence(case: Case, shared: bool) -> Tensor:
    from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    data = torch.utils.data.TensorDataset(case.x, case.labels)
    # Without preconditioning, the self-influence is the squared norm.
    factors = FactorArguments(strategy="identity", has_shared_parameters=shared)
    double = {f"{name}_dtype": torch.float64 for name in ("per_sample_gradient", "precondition", "score")}
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(case.module, Classification())
        analyzer = Analyzer("norms", model, Classification(), cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors("identity", data, per_device_batch_size=BATCH, factor_args=factors)
        analyzer.compute_self_scores("self", "identity", data, BATCH, score_args=ScoreArguments(**double))
        return analyzer.load_self_scores("self")["all_modules"].sqrt()


def _left(module: nn.Module, name: str) -> Tensor:
    """The norms over what a tool left at the parameters under this name."""
    return _norms(getattr(p, name) for p in module.parameters() if getattr(p, name, None) is not None)


def _norms(grads) -> Tensor:
    return sum(g.flatten(1).square().sum(1) for g in grads).sqrt()


# Column: (adapter, the distribution that it needs).
TOOLS = {
    "functree": (functree, None),
    "vmap(grad)": (vmap_grad, "torch"),
    "ExpandedWeights": (expanded_weights, "torch"),
    "Opacus hooks": (opacus_hooks, "opacus"),
    "Opacus ghost": (opacus_ghost, "opacus"),
    "BackPACK BatchGrad": (backpack_grads, "backpack-for-pytorch"),
    "BackPACK BatchL2Grad": (backpack_norms, "backpack-for-pytorch"),
    "TorchJD batch_dim=0": (torchjd, "torchjd"),
    "TorchJD batch_dim=None": (torchjd_unbatched, "torchjd"),
    "fastDP": (fastdp, "fastDP"),
    "captum": (captum, "captum"),
    "ASDL": (asdl, "asdfghjkl"),
    "kronfluence": (kronfluence, "kronfluence"),
    "kronfluence, shared": (kronfluence_shared, "kronfluence"),
}


def version(tool: str) -> str | None:
    """Version of the tool's distribution; None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(TOOLS[tool][1])
    return None


def run(tool: str, case: Case) -> Tensor:
    """The tool's norms of a case of its own, since many tools leave hooks and attributes in a module."""
    default = torch.get_default_dtype()
    # Some tools make tensors and layers of the default precision.
    torch.set_default_dtype(torch.float64)
    try:
        return TOOLS[tool][0](case._replace(module=copy.deepcopy(case.module))).detach()
    finally:
        torch.set_default_dtype(default)
