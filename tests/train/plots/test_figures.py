import numpy as np
import pytest
import torch
from matplotlib import rc_context
from PIL import Image

from train import plots


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def amount(picture: np.ndarray, colour: str, tolerance: int = 12) -> int:
    """Number of pixels of a colour."""
    expected = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(picture - expected).max(-1) <= tolerance).sum())


@pytest.mark.parametrize("log", [False, True])
def test_curves_draw_every_line(log, tmp_path):
    xs = torch.arange(20)
    plots.curves(
        tmp_path / "deep" / "c.png",
        {"train": (xs, torch.exp(-xs / 5)), "validation": ([0, 10, 19], [1.0, float("nan"), 2.0]), "end": ([5], [3.0])},
        ylabel="loss",
        title="curves",
        log=log,
    )
    picture = pixels(tmp_path / "deep" / "c.png")
    assert amount(picture, plots.COLOURS[0]) > 400 and amount(picture, plots.COLOURS[2]) > 60
    assert 0 < amount(picture, plots.COLOURS[1]) < 120  # in the legend only: the gap at nan leaves no segment
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["c.png"]


def test_a_matplotlibrc_that_wants_latex(tmp_path):
    lines = {"a_b": ([1, 2], [1.0, 1e4]), "50 %": ([1], [1.0])}
    with rc_context({"text.usetex": True}), plots.panels(tmp_path / "a.png", 1, 2) as (left, right):
        plots.curves(left, lines, ylabel="loss_a", title="$x", log=True)
        plots.matrix(right, torch.eye(3), ["#", "&", "\\"])
    assert amount(pixels(tmp_path / "a.png"), plots.COLOURS[0]) > 200


@pytest.mark.parametrize(
    ("shape", "dtype"), [((6, 3, 8, 8), torch.float32), ((6, 1, 8, 8), torch.float32), ((6, 8, 8), torch.uint8)]
)
def test_grid_shows_the_values(shape, dtype, tmp_path):
    images = torch.zeros(shape, dtype=dtype)
    images[-1] = 255 if dtype == torch.uint8 else 7.0
    plots.image_grid(tmp_path / "g.png", images, columns=3)
    picture = pixels(tmp_path / "g.png")
    height, width, _ = picture.shape
    cells = [picture[height * (2 * r + 1) // 4, width * (2 * c + 1) // 6] for r in range(2) for c in range(3)]
    assert [int(c.mean()) for c in cells] == [0, 0, 0, 0, 0, 255]


@pytest.mark.parametrize("shape", [(2, 1, 1, 5), (2, 3, 1, 1), (2, 1, 1)])
def test_grid_of_single_rows_and_pixels(shape, tmp_path):
    plots.image_grid(tmp_path / "g.png", torch.zeros(shape))
    assert amount(pixels(tmp_path / "g.png"), "#000000") > 500


def test_grid_with_titles_of_any_length(tmp_path):
    plots.image_grid(
        tmp_path / "g.png", torch.rand(5, 3, 4, 8), titles=["a", "b" * 60, "two\nlines", "狗", ""], title="t"
    )
    assert pixels(tmp_path / "g.png").shape[1] > 100


@pytest.mark.parametrize("size", [(3, 4), (30, 40), (2, 300), (1, 1)])
def test_matrix(size, tmp_path):
    values = torch.zeros(size)
    values[0, 0] = 1.0
    rows = [f"row {i}" for i in range(size[0])] if size[0] < 10 else None
    plots.matrix(tmp_path / "m.png", values.bfloat16(), rows, xlabel="source", ylabel="target", title="attention")
    assert amount(pixels(tmp_path / "m.png"), "#08306b") > 4 or size == (1, 1)


@pytest.mark.parametrize("count", [1, 2])
def test_grid_is_as_wide_as_its_title(count, tmp_path):
    plots.image_grid(tmp_path / "g.png", torch.rand(count, 1, 4, 4), title="First layer (64 filters)", scale=0.4)
    picture = pixels(tmp_path / "g.png")
    assert (picture[:, :4] == 255).all() and (picture[:, -4:] == 255).all()


def test_matrix_makes_room_for_long_labels(tmp_path):
    names = [letter * 24 for letter in "nu"]
    plots.matrix(tmp_path / "m.png", torch.eye(2), names, names, "predicted", "class")
    assert amount(pixels(tmp_path / "m.png"), "#08306b") > 2 * 40**2  # two dark cells


def test_reliability_writes_the_calibration_error(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    texts = []
    original = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **k: (texts.append(s), original(self, x, y, s, **k))[1])
    plots.reliability(tmp_path / "r.png", [0.1, 0.6, 0.9], [0.0, 0.4, 0.9], [0, 30, 10])
    assert texts == ["ECE 15.0 %"]
    plots.reliability(tmp_path / "empty.png", [0.5], [0.5], [0])
    assert amount(pixels(tmp_path / "r.png"), plots.COLOURS[1], 120) > 20


def test_panels_hold_what_is_drawn_into_them(tmp_path):
    with plots.panels(tmp_path / "p.png", 2, 2) as (first, second, third, fourth):
        plots.curves(first, {"train": (range(20), range(20))}, title="curves")
        plots.reliability(second, [0.1, 0.6, 0.9], [0.0, 0.4, 0.9], [0, 30, 10])
        plots.matrix(third, torch.eye(20))
        plots.histogram(fourth, {"a": [1.0, 2.0]})
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
    picture = pixels(tmp_path / "p.png")
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    for row, column in ((0, 0), (0, 1), (1, 1)):
        part = picture[row * height : (row + 1) * height, column * width : (column + 1) * width]
        assert amount(part, plots.COLOURS[0], 60) > 100, (row, column)
    assert amount(picture[height:, :width], "#08306b") > 100
    with pytest.raises(RuntimeError, match="half"), plots.panels(tmp_path / "none.png", 1, 1):
        raise RuntimeError("half drawn")
    assert not (tmp_path / "none.png").exists()


def test_histogram_leaves_out_what_is_not_finite(tmp_path):
    plots.histogram(tmp_path / "h.png", {"a": [1.0, 2.0, float("inf")], "b": torch.ones(3, 3)}, log=True, xlabel="x")
    assert (tmp_path / "h.png").stat().st_size > 3000


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda p: plots.curves(p, {"a": ([1, 2], [1])}), r"curve 'a' has xs \(2,\) and ys \(1,\)"),
        (lambda p: plots.image_grid(p, torch.zeros(2, 4, 8, 8)), "expected .count, 1 or 3, height, width."),
        (lambda p: plots.image_grid(p, torch.zeros(2, 8, 8), titles=["a"]), "1 titles for 2 images"),
        (lambda p: plots.matrix(p, [[1.0]], ["a", "b"]), "2 row labels for 1 rows"),
        (lambda p: plots.matrix(p, [1.0]), r"has shape \(1,\), expected"),
        (lambda p: plots.reliability(p, [1], [1, 1], [1]), "expected one length"),
        (lambda p: plots.histogram(p, {"a": [float("nan")]}), "no finite value"),
    ],
)
def test_wrong_shapes(draw, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


def test_no_global_state(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.curves(tmp_path / "c.png", {"a": ([1, 2], [1, 2])})
    assert dict(matplotlib.rcParams) == before


def test_every_class_is_in_the_legend_of_points(tmp_path, monkeypatch):
    """matplotlib leaves out labels that begin with an underscore."""
    figures = []
    monkeypatch.setattr("train.plots.figures.write", lambda path, figure: figures.append(figure))
    plots.scatter(tmp_path / "a.png", torch.rand(3, 2), torch.arange(3), ["_pydecimal", "$email$", "asyncio"])
    texts = figures[0].axes[0].get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["_pydecimal", "$email$", "asyncio"]
