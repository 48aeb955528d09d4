"""The parts of figures that nothing else draws."""

from __future__ import annotations

import torch

from vfmlab.plots import primitives
from vfmlab.registry import TOKENIZERS


def test_every_method_has_a_colour_of_its_own():
    colours = {name: primitives.colour(f"pocket_{name}") for name in TOKENIZERS.names()}

    assert len(set(colours.values())) == len(colours)


def test_a_plane_has_one_scale_and_joins_lines_alone():
    walk, cloud = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.rand(50, 2, requires_grad=True)
    figure = primitives.plane({"walk": walk, "ends": walk, "cloud": cloud}, lines=["walk"])
    assert [(trace.name, trace.mode) for trace in figure.data] == [("walk", "lines"), ("ends", "markers"), ("cloud", "markers")]
    assert (figure.data[0].x, figure.data[0].y) == ((0, 3), (0, 4))
    assert figure.layout.yaxis.scaleanchor == "x"
    assert figure.data[1].marker.size > figure.data[2].marker.size, "a few points are seen"


def test_a_points_label_stands_inside_the_figure():
    figure = primitives.scatter([{"name": "a", "x": 0.1, "y": 1}, {"name": "b", "x": 0.9, "y": 2}, {"name": "c", "x": None, "y": 3}], "x", "y")
    assert [trace.textposition for trace in figure.data] == ["middle right", "middle left", "middle right"]


def test_names_of_a_heatmap_may_repeat():
    figure = primitives.heatmap([[1, 2, 3]], [4, 7, 4], ["row"], "class", "")
    assert figure.data[0].x is None, "by place: of two columns with one name plotly draws one"
    assert figure.layout.xaxis.tickvals == (0, 1, 2)
    assert figure.layout.xaxis.ticktext == ("4", "7", "4")
    assert figure.data[0].y == ("row",)


def test_a_number_is_rounded_before_its_form_is_chosen():
    assert [primitives.number(v) for v in (999.4, 999.6, -999.6, 1000.4, 0.12345)] == ["999", "1,000", "-1,000", "1,000", "0.123"]


def test_a_dashed_line_has_the_colour_of_its_own():
    lines = {name: ([0, 1], [0, 1]) for name in ("mine", "mine, less", "other", "other, less")}
    figure = primitives.curves(lines, dashed=("mine, less", "other, less"))
    assert [line.line.color for line in figure.data] == [primitives.PALETTE[i] for i in (0, 0, 1, 1)]
