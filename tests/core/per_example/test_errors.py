"""Losses without a per-example gradient are refused in one line that names the parameter."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core import per_example, tree
from core.layers import batch_norm
from core.per_example import PerExampleError
from tests.core.per_example import net_models  # noqa: F401 - adds its models
from tests.core.per_example.models import Draw, N, value

DRAW = Draw("errors")
STATS = {"count": torch.zeros((), dtype=torch.float64), "mean": DRAW(4), "var": DRAW(4).exp()}
PARAMS = {"bias": DRAW(4), "deep": [{"weight": DRAW(4, 4)}], "norm": {"bias": DRAW(4), "weight": DRAW(4)}}
X, SEQUENCES, OTHER = DRAW(N, 4), DRAW(N, 4, 4), DRAW(N, 4)

REFUSED = {}


def refused(message: str, *, sequences: bool = False):
    def add(loss):
        REFUSED[loss.__name__] = loss, message, SEQUENCES if sequences else X
        return loss

    return add


def output(p, x):
    return F.linear(x, p["deep"][0]["weight"])


# what the loss returns


@refused(r"must return one value per example, \(N,\); it returned \(\)")
def returns_a_scalar(p, x):
    return output(p, x).sum()


@refused(r"must return one value per example, \(N,\); it returned \(N, 1\)")
def returns_a_column(p, x):
    return output(p, x)[:, :1]


@refused(r"must return one value per example, \(N,\); it returned \(4, N\)", sequences=True)
def returns_the_batch_behind(p, x):
    return output(p, x).sum(-1).T


@refused("must return floating-point values, not torch.int64")
def returns_integers(p, x):
    return output(p, x).sum(1).long()


@refused("must return one value per example, .*NoneType")
def returns_nothing(p, x):
    return None


@refused("the same for every example")
def returns_a_parameter(p, x):
    return p["bias"].sum()


@refused("the same for every example")
def looks_at_another_batch(p, x):
    return output(p, OTHER).sum(1)


# transforms inside


@refused("'deep.0.weight' is used by linear inside another transform.*per_example.each")
def gradient_penalty(p, x):
    return torch.func.grad(lambda x: output(p, x).sin().sum())(x).square().sum(1)


@refused("'bias' is used by mul inside another transform")
def gradient_penalty_of_a_raw_parameter(p, x):
    return torch.func.grad(lambda x: (x * p["bias"]).sin().sum())(x).square().sum(1)


@refused("'deep.0.weight' is used by linear inside another transform")
def vmap_inside(p, x):
    return torch.func.vmap(lambda x: output(p, x[None]).sum())(x)


@refused("a loss may not contain a gradient")
def autograd_inside(p, x):
    (g,) = torch.autograd.grad(output(p, x).sin().sum(), x, create_graph=True)
    return g.square().sum(1)


# the batch axis


@refused(r"'deep.0.weight' meets \(4\*N, 4\) in linear.*one axis of its own", sequences=True)
def folded(p, x):
    return output(p, x.reshape(-1, 4)).reshape(len(x), -1).sum(1)


@refused(r"'deep.0.weight' meets \(4\*N, 4\) in linear", sequences=True)
def flattened(p, x):
    return output(p, x.flatten(0, 1)).reshape(x.shape[0], -1).sum(1)


@refused(r"'bias' meets \(4\*N, 4\) in mul", sequences=True)
def folded_before_a_raw_parameter(p, x):
    return (x.reshape(-1, 4) * p["bias"]).reshape(len(x), -1).sum(1)


@refused(r"'bias': the result of cat has no batch axis of its own")
def examples_among_parameters(p, x):
    return torch.cat([x, p["bias"][None]]).sum(1)[: len(x)]


@refused(r"'bias': the result of cosine_similarity has no batch axis of its own")
def reduced_over_the_batch(p, x):
    return x.sum(1) + F.cosine_similarity(x, p["bias"], dim=0).sum()


@refused("everything with a batch axis must come in through `batch`")
def captured(p, x):
    return output(p, x + OTHER).sum(1)


@refused("'deep.0.weight'.* the same for every example, meets the batch.*through `batch`")
def captured_apart(p, x):
    return x.sum(1) + output(p, OTHER).sum(1)


# batch norm


@refused("'norm.bias|'norm.weight'.*: batch norm in training mode mixes the examples")
def batch_norm_in_training(p, x):
    return value(batch_norm(p["norm"] | STATS, output(p, x), train=True))


@refused("batch norm in training mode mixes the examples")
def batch_norm_without_affine(p, x):
    return value(batch_norm(STATS, output(p, x), train=True))


@refused("'bias': batch norm in training mode mixes the examples")
def batch_norm_of_torch(p, x):
    return value(F.batch_norm(output(p, x), None, None, p["bias"], training=True))


@refused("batch norm in training mode mixes the examples")
def batch_norm_of_torch_without_affine(p, x):
    return value(F.batch_norm(output(p, x), None, None, None, None, True))


@refused("batch norm in training mode mixes the examples")
def batch_norm_under_its_other_name(p, x):
    return value(torch.batch_norm(output(p, x), None, None, None, None, True, 0.1, 1e-5, False))


@refused("'norm.weight': instance norm that keeps running statistics")
def instance_norm_with_statistics(p, x):
    stats = STATS["mean"].clone(), STATS["var"].clone()
    return value(F.instance_norm(x[:, :, None].expand(-1, -1, 3), *stats, p["norm"]["weight"]))


# loops over the examples


@refused("loops over its examples .by (unbind|iteration).: .* per_example.each")
def loop_over_rows(p, x):
    return torch.stack([output(p, row[None]).sum() for row in x])


@refused("loops over its examples .by __getitem__.")
def loop_by_index(p, x):
    return torch.stack([output(p, x[i][None]).sum() for i in range(len(x))])


@refused("loops over its examples .by __getitem__.")
def loop_by_slices(p, x):
    return torch.cat([output(p, x[i : i + 1]).sum(1) for i in range(x.shape[0])])


@refused("loops over its examples .by select.")
def loop_by_select(p, x):
    return torch.stack([output(p, x.select(0, i)[None]).sum() for i in range(x.size(0))])


@refused("loops over its examples .by split.")
def loop_by_split(p, x):
    return torch.cat([output(p, part).sum(1) for part in x.split(1)])


@refused("loops over its examples .by chunk.")
def loop_by_chunk(p, x):
    return torch.cat([output(p, part).sum(1) for part in torch.chunk(x, len(x))])


@refused("loops over its examples .by tensor_split.")
def loop_by_tensor_split(p, x):
    return torch.cat([output(p, part).sum(1) for part in x.tensor_split(x.shape[0], dim=0)])


@refused("loops over its examples .by __getitem__.")
def loop_over_columns(p, x):
    return torch.stack([output(p, x.T[:, i]).sum() for i in range(len(x))])


@refused("loops over its examples .by unbind.")
def loop_over_the_second_axis(p, x):
    return torch.stack([output(p, row).sum() for row in x.T.unbind(1)])


@refused("loops over its examples .[0-9]+ operations for 61 examples, [0-9]+ for 127.: compute")
def loop_over_masks(p, x):
    numbers = torch.arange(len(x))
    return torch.stack([(output(p, x).sum(1) * (numbers == i)).sum() for i in range(len(x))])


@refused("loops over its examples .by unbind.")
def loop_over_pairs(p, x):
    return torch.stack([value(a[None] - b[None])[0] for a, b in zip(output(p, x), x, strict=True)])


# values and writing


@refused(r"writes into parameter 'bias' by .mul_\(\)")
def multiplied_in_place(p, x):
    return (x * p["bias"].mul_(2)).sum(1)


@refused("writes into parameter 'bias' by assignment")
def assigned(p, x):
    p["bias"][0] = 1.0
    return (x * p["bias"]).sum(1)


@refused(r"writes into parameter 'bias' by .add_\(\)")
def added_in_place(p, x):
    bias = p["bias"]
    bias += 1
    return (x * bias).sum(1)


@refused("writes into parameter 'bias' by out=")
def written_by_out(p, x):
    return torch.mul(x, 2.0, out=p["bias"]).sum(1)


@refused("'bias' is written into another tensor by assignment")
def assigned_elsewhere(p, x):
    x = x.clone()
    x[:, 0] = p["bias"][0]
    return output(p, x).sum(1)


@refused("'deep.0.weight' is used by as_strided, which looks at its memory")
def strided(p, x):
    return F.linear(x, p["deep"][0]["weight"].as_strided((4, 4), (4, 1))).sum(1)


@refused(r"writes into parameter 'bias' by .zero_\(\)")
def initialised_again(p, x):
    return (x * nn.init.zeros_(p["bias"])).sum(1)


@refused("branches on the value of 'bias'; use torch.where")
def branches(p, x):
    return x.sum(1) if p["bias"].sum() > 0 else x.prod(1)


@refused("may not look at values")
def branches_on_an_output(p, x):
    return x.sum(1) if output(p, x).sum() > 0 else x.prod(1)


for name, take in {
    "item": lambda p: p.sum().item(),
    "float": lambda p: float(p.sum()),
    "int": lambda p: int(p[0]),
    "index": lambda p: range(3)[p[0]],
    "numpy": lambda p: p.numpy().sum(),
    "tolist": lambda p: p.tolist()[0],
}.items():
    REFUSED[f"takes out by {name}"] = lambda p, x, take=take: x.sum(1) * take(p["bias"]), "takes the value of 'bias'", X
for name in ("data", "grad"):
    REFUSED[f"asks for {name}"] = (
        lambda p, x, name=name: x.sum(1) * getattr(p["bias"], name),
        f"'bias' has no .{name}",
        X,
    )


@refused("'bias' is used by __getitem__.* cannot be mapped over the examples")
def shape_by_value(p, x):
    return x.sum(1) * p["bias"][p["bias"] > 0].sum()


@refused("'bias' is cast under torch.no_grad; use .detach")
def cast_without_gradient(p, x):
    with torch.no_grad():
        bias = p["bias"].float()
    return (x * bias).sum(1)


@refused("'deep.0.weight': embedding with max_norm")
def renormalised_table(p, x):
    return F.embedding(x.long() % 4, p["deep"][0]["weight"], max_norm=1.0).sum((1, 2))


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", REFUSED)
def test_loss_is_refused(name):
    loss, message, x = REFUSED[name]
    before = tree.map(torch.clone, PARAMS)
    if name == "autograd_inside":
        x = x.clone().requires_grad_()
    with pytest.raises(PerExampleError, match=message) as caught:
        per_example.reports(loss, PARAMS, x)
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(PARAMS, before, rtol=0, atol=0)


def test_parameter_iterated_over_while_compiling():
    """Dynamo takes it apart without asking; eagerly it is exact."""

    def loss(p, x):
        return sum((x * row).sin().sum(1) for row in p["deep"][0]["weight"])

    assert per_example.verify(loss, PARAMS, X) <= 1e-10
    torch._dynamo.reset()
    f = torch.compile(per_example.reports, backend="aot_eager", fullgraph=True, dynamic=False)
    with pytest.raises(Exception, match="a parameter is iterated over or unpacked, .* use .unbind"):
        f(loss, PARAMS, X)


COMPILED = (
    "loop_over_rows",
    "returns_a_scalar",
    "folded",
    "folded_before_a_raw_parameter",
    "batch_norm_in_training",
)


@pytest.mark.parametrize("name", COMPILED)
def test_loss_is_refused_while_compiling(name):
    loss, message, x = REFUSED[name]
    torch._dynamo.reset()
    f = torch.compile(lambda p, x: per_example.reports(loss, p, x), backend="aot_eager", fullgraph=True, dynamic=False)
    with pytest.raises(Exception, match=message):
        f(PARAMS, x)


# examples that mix

MIXING = {
    "mean of the batch": lambda p, x: value(output(p, x) - output(p, x).mean(0)),
    "norm of the batch": lambda p, x: value(output(p, x / x.norm())),
    "softmax over the batch": lambda p, x: value(torch.softmax(output(p, x), 0)),
    "place in the batch": lambda p, x: value(output(p, x)) * torch.arange(1, len(x) + 1),
    "first example alone": lambda p, x: value(x.index_add(0, torch.zeros(1, dtype=torch.int64), p["bias"][None])),
}


@pytest.mark.parametrize("name", MIXING)
def test_verify_sees_examples_that_mix(name):
    # Functions that are mapped one at a time are already refused while planning.
    with pytest.raises(PerExampleError, match="mixes its examples(: that of example| in index_add of 'bias')"):
        per_example.verify(MIXING[name], PARAMS, X)


def test_verify_sees_gradients_that_mix():
    """Each loss is that of the example alone, its gradient is not."""

    def loss(p, x):
        y = output(p, x).sum(1)
        return y + (y - y.detach()).sum()

    with pytest.raises(PerExampleError, match="'deep.0.weight': the norm of example 0 is off by"):
        per_example.verify(loss, PARAMS, X)
