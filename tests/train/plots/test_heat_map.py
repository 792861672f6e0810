"""The heat map: its cells, scales and labels."""

import numpy as np
import pytest
import torch

from train import plots


def axes_of(tmp_path, *args, **options):
    """The axes after `heat_map` has drawn into them; the file is written too."""
    with plots.panels(tmp_path / "heat.png", 1, 1) as (axes,):
        plots.heat_map(axes, *args, **options)
    assert (tmp_path / "heat.png").read_bytes()[:4] == b"\x89PNG"
    return axes


def test_cells_lie_between_the_edges(tmp_path):
    values = torch.arange(6.0).reshape(2, 3)
    axes = axes_of(tmp_path, values, [0, 1, 2, 4], [1.0, 10.0, 100.0], "time", "norm", "Norms", log_y=True)
    (mesh,) = axes.collections
    np.testing.assert_array_equal(mesh.get_array(), values)
    np.testing.assert_array_equal(mesh.get_coordinates()[:, -1], [[4, 1], [4, 10], [4, 100]])
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "time" and axes.get_title() == "Norms"


def test_names_of_rows_and_colours_on_a_log_scale(tmp_path):
    axes = axes_of(tmp_path, [[1.0, 100.0], [-1.0, float("nan")]], [0, 1, 2], ["a", "b"], label="B", log_colour=True)
    (mesh,) = axes.collections
    assert mesh.get_array().mask.tolist() == [[False, False], [True, True]]
    assert type(mesh.norm).__name__ == "LogNorm" and (mesh.norm.vmin, mesh.norm.vmax) == (1, 100)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"] and axes.get_ylim() == (2, 0)


def test_nothing_above_zero_is_drawn_white(tmp_path):
    axes = axes_of(tmp_path, [[0.0, float("nan")]], [0, 1, 2], ["a"], log_colour=True)
    assert axes.collections[0].get_array().mask.all()


def test_a_path_in_place_of_axes(tmp_path):
    plots.heat_map(tmp_path / "alone.png", [[1.0]], [0, 1], [0, 1])
    assert (tmp_path / "alone.png").read_bytes()[:4] == b"\x89PNG"


def test_edges_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(1, 2\) values between 2 and 2 edges"):
        plots.heat_map("never.png", [[1.0, 2.0]], [0, 1], [0, 1])


def test_curve_without_anything_above_zero_is_not_logarithmic(tmp_path):
    with plots.panels(tmp_path / "curve.png", 1, 1) as (axes,):
        plots.curves(axes, {"a": ([1, 2], [-1.0, float("nan")])}, log=True)
    assert axes.get_yscale() == "linear"
