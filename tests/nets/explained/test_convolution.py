"""The four ways of convolution, its transpose and its gradients against torch's own, in double precision."""

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F

from core import random
from nets.explained import convolution
from nets.explained.convolution import WAYS, im2col, input_gradient, matrix, stretch, transposed, weight_gradient

OPTIONS = [
    {},
    {"padding": 1},
    {"stride": 2},
    {"dilation": 2},
    {"groups": 2},
    {"stride": 3, "padding": 2},
    {"padding": (2, 1), "dilation": (1, 2), "groups": 4},
    {"stride": (2, 1), "padding": (0, 3), "dilation": (2, 1), "groups": 2},
    {"stride": (1, 4), "padding": 5, "dilation": 3},
]
KERNELS = [(1, 1), (3, 3), (2, 4)]
TRANSPOSED = [
    {},
    {"padding": 1},
    {"stride": 2, "output_padding": 1},
    {"stride": (3, 2), "padding": (1, 2), "output_padding": (2, 0), "groups": 2},
    {"stride": 2, "padding": 3, "dilation": (2, 3), "groups": 4},
    {"dilation": 3, "output_padding": 2},
    {"stride": 2, "padding": 4, "output_padding": (1, 0)},  # more than kernel 3 paints: cut off
]
DOUBLE = torch.float64


def normal(number, *shape):
    return random.normal(random.fold_in(random.key(0), number), shape, DOUBLE)


def case(kernel, options, size=(9, 10)):
    return normal(0, 2, 4, *size), normal(1, 8, 4 // options.get("groups", 1), *kernel)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_torchs_convolution_with_its_gradients(way, kernel, options):
    x, weight = case(kernel, options)
    actual, expected = (f(x, weight, **options) for f in (WAYS[way], F.conv2d))
    close(actual, expected)
    dy = normal(2, *expected.shape)
    ours, theirs = (
        grad(lambda x, w, f=f: (f(x, w, **options) * dy).sum(), argnums=(0, 1))(x, weight)
        for f in (WAYS[way], F.conv2d)
    )
    close(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
def test_shapes_at_the_edge(way):
    for batch, size, kernel in ((1, (3, 3), (3, 3)), (3, (1, 7), (1, 5)), (1, (1, 1), (1, 1)), (0, (4, 4), (3, 3))):
        x, weight = normal(0, batch, 2, *size), normal(1, 3, 2, *kernel)
        close(WAYS[way](x, weight), F.conv2d(x, weight))
    x, weight = normal(0, 2, 2, 2, 3), normal(1, 3, 2, 4, 4)  # a kernel larger than the image, but not than the padded
    close(WAYS[way](x, weight, padding=2), F.conv2d(x, weight, padding=2))


@pytest.mark.parametrize("way", WAYS)
def test_single_precision(way):
    x, weight = (t.float() for t in case((3, 3), {}))
    actual = WAYS[way](x, weight, padding=1)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, F.conv2d(x, weight, padding=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "matrix"])
def test_under_vmap(way):
    options = {"stride": 2, "padding": 1, "groups": 2}
    x, weight = case((3, 2), options)
    weights = torch.stack([weight, 2 * weight, weight.flip(0)])
    close(vmap(lambda x: WAYS[way](x[None], weight, **options)[0])(x), F.conv2d(x, weight, **options))

    def loss(f):
        return lambda w: f(x, w, **options).square().sum()

    each = torch.stack([grad(loss(F.conv2d))(w) for w in weights])
    close(vmap(grad(loss(WAYS[way])))(weights), each)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "matrix"])
def test_compiled(way):
    torch._dynamo.reset()
    options = {"stride": 2, "padding": 1, "groups": 2}
    x, weight = case((3, 2), options)
    gradient = grad(lambda w: WAYS[way](x, w, **options).square().sum())
    close(torch.compile(gradient, fullgraph=True, dynamic=False, backend="aot_eager")(weight), gradient(weight))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_backward_written_out(kernel, options):
    x, weight = case(kernel, options)
    dy = normal(2, *F.conv2d(x, weight, **options).shape)
    actual = input_gradient((9, 10), weight, dy, **options)
    close(actual, torch.nn.grad.conv2d_input(x.shape, weight, dy, **options))
    m = matrix(weight, (9, 10), **options)
    close(actual, (m.T @ dy.flatten(1).T).T.view(x.shape))
    actual = weight_gradient(x, kernel, dy, **options)
    close(actual, torch.nn.grad.conv2d_weight(x, weight.shape, dy, **options))


@pytest.mark.parametrize("options", TRANSPOSED, ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (4, 5)], ids=str)
def test_transposed(kernel, options):
    x, weight = normal(0, 2, 8, 5, 6), normal(1, 8, 4 // options.get("groups", 1), *kernel)
    actual, expected = (f(x, weight, **options) for f in (transposed, F.conv_transpose2d))
    close(actual, expected)
    dy = normal(2, *expected.shape)
    ours, theirs = (
        grad(lambda x, w, f=f: (f(x, w, **options) * dy).sum(), argnums=(0, 1))(x, weight)
        for f in (transposed, F.conv_transpose2d)
    )
    close(ours, theirs)


def test_transposed_cuts_off_what_the_image_does_not_reach():
    x, weight = normal(0, 1, 1, 1, 1), normal(1, 1, 1, 1, 1)
    options = {"padding": 1, "output_padding": 3, "dilation": 4}
    close(transposed(x, weight, **options), torch.zeros(1, 1, 2, 2, dtype=DOUBLE))
    close(F.conv_transpose2d(x, weight, **options), torch.zeros(1, 1, 2, 2, dtype=DOUBLE))


def test_matrix_is_sparse_and_toeplitz():
    weight = normal(0, 1, 1, 3, 3)
    m = matrix(weight, (6, 5))
    assert m.is_sparse and m.is_coalesced() and m.shape == (4 * 3, 6 * 5) and m._nnz() == 4 * 3 * 9
    again = torch.sparse_coo_tensor(m.indices(), m.values(), m.shape, is_coalesced=True, check_invariants=True)
    dense = again.to_dense()
    for i, j in ((1, 1), (3, 2), (2, 0)):  # a row is the first one, shifted
        assert dense[i * 3 + j].equal(dense[0].roll(i * 5 + j))
    assert matrix(weight, (6, 5), padding=1)._nnz() == (6 * 3 - 2) * (5 * 3 - 2)  # none for the padding


def test_matrix_is_coalesced_with_groups_and_dilation():
    m = matrix(normal(0, 4, 2, 2, 3), (7, 6), stride=(2, 1), padding=2, dilation=(1, 2), groups=2)
    torch.sparse_coo_tensor(m.indices(), m.values(), m.shape, is_coalesced=True, check_invariants=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_columns_are_torchs(options):
    options = {name: value for name, value in options.items() if name != "groups"}
    x = normal(0, 2, 3, 9, 10)
    assert im2col(x, (2, 3), **options).equal(F.unfold(x, (2, 3), **options))


def test_stretch():
    x = torch.tensor([[1, 2], [3, 4]])
    assert stretch(x, (2, 3)).tolist() == [[1, 0, 0, 2], [0, 0, 0, 0], [3, 0, 0, 4]]


def test_inputs_are_unchanged():
    x, weight = case((3, 3), {})
    before = x.clone(), weight.clone()
    dy = F.conv2d(x, weight)
    for way in WAYS.values():
        way(x, weight)
    input_gradient((9, 10), weight, dy), weight_gradient(x, 3, dy), transposed(dy, weight, 2)
    assert x.equal(before[0]) and weight.equal(before[1]) and dy.equal(F.conv2d(x, weight))


@pytest.mark.parametrize(
    ("x", "weight", "options", "message"),
    [
        ((4, 9, 9), (8, 4, 3, 3), {}, "x has shape (4, 9, 9); expected four axes"),
        ((2, 4, 9, 9), (8, 4, 3), {}, "weight has shape (8, 4, 3); expected four axes"),
        ((2, 4, 9, 9), (8, 3, 3, 3), {}, "x has 4 channels; expected 1 groups of 3, the weight's"),
        ((2, 4, 9, 9), (8, 4, 3, 3), {"groups": 3}, "groups is 3; expected a divisor of d_in, 4"),
        ((2, 4, 9, 9), (7, 2, 3, 3), {"groups": 2}, "groups is 2; expected a divisor of d_out, 7"),
        ((2, 4, 9, 9), (8, 4, 3, 3), {"groups": 0}, "groups is 0; expected a divisor of d_in, 4"),
        (
            (2, 4, 5, 9),
            (8, 4, 4, 3),
            {"dilation": 2},
            "does not fit into the padded image: image (5, 9), kernel (4, 3)",
        ),
        ((2, 4, 9, 9), (8, 4, 3, 3), {"stride": 0}, "stride is 0; expected a number of at least 1, or two of them"),
        ((2, 4, 9, 9), (8, 4, 3, 3), {"padding": (1, -1)}, "padding is (1, -1); expected a number of at least 0"),
        ((2, 4, 9, 9), (8, 4, 3, 3), {"padding": "same"}, "padding is same; expected a number of at least 0"),
        ((2, 4, 9, 9), (8, 4, 3, 3), {"dilation": (1, 1, 1)}, "dilation is (1, 1, 1); expected a number of at least 1"),
    ],
    ids=["image", "kernel", "channels", "d_in", "d_out", "no_groups", "large", "stride", "padding", "same", "three"],
)
@pytest.mark.parametrize("way", WAYS)
def test_refused_in_one_line(way, x, weight, options, message):
    with pytest.raises(ValueError) as caught:
        WAYS[way](torch.zeros(x), torch.zeros(weight), **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: transposed(x[:, :3], w), "x has 3 channels; expected 4, as the transposed weight"),
        (lambda x, w: transposed(x, w, groups=3), "groups is 3; expected a divisor of d_in, 4"),
        (lambda x, w: transposed(x, w, 2, 0, (0, 2)), "output_padding is (0, 2); expected less than stride (2, 2)"),
        (
            lambda x, w: transposed(x, w, padding=4),
            "padding (4, 4) crops the whole output of kernel (3, 3) and x (2, 4, 5",
        ),
        (lambda x, w: transposed(x[0], w), "x has shape (4, 5, 5); expected four axes"),
        (lambda x, w: input_gradient((8, 8), w, x), "dy has shape (2, 4, 5, 5); expected (2, 4, 6, 6)"),
        (lambda x, w: weight_gradient(x, 3, x), "dy has shape (2, 4, 5, 5); expected (2, 4, 3, 3)"),
        (lambda x, w: weight_gradient(x, 6, x), "the kernel does not fit into the padded image: image (5, 5)"),
        (lambda x, w: matrix(w[0], (5, 5)), "weight has shape (6, 3, 3); expected four axes"),
        (lambda x, w: matrix(w, (0, 5)), "size is (0, 5); expected a number of at least 1"),
        (lambda x, w: im2col(x, (3, 0)), "kernel is (3, 0); expected a number of at least 1"),
    ],
    ids=lambda value: "" if callable(value) else value.split(";")[0].replace(" ", "_"),
)
def test_the_others_refuse_in_one_line(call, message):
    with pytest.raises(ValueError) as caught:
        call(torch.zeros(2, 4, 5, 5), torch.zeros(4, 6, 3, 3))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_dtypes_are_refused():
    with pytest.raises(TypeError, match="x is torch.float32 and the weight torch.float64; expected the same"):
        convolution.by_fft(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3, dtype=DOUBLE))
