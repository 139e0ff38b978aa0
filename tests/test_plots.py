"""Plots: what they show, of which data, in a page and in either colour scheme."""

import math
from xml.etree import ElementTree

import matplotlib
import pytest

from dllm_jax.plots import bar_plot, line_plot, stacked_bars

NAN, INF = math.nan, math.inf


def lines(series, **options):
  return line_plot(series, x_label="x", y_label="y", **options)


PLOTS = {
  "lines": lines({
    "a<": [(1, 3.0, 0.1), (2, 2.0, NAN), (3, INF, 0.1)],
    "b": [],
  }),
  "logarithmic": lines({"a<": [(100, 3.0, INF), (6000, 2.0, 0.1)]}, log_x=True),
  "bars": bar_plot(
    {"a<": {"x": (0.5, 0.1), "y": (NAN, NAN)}, "b": {"y": (1.0, 0.2)}},
    y_label="share",
    high=1.0,
  ),
  "alone": bar_plot({"a<" * 20: {"x": (3.0, 0.0)}, "b": {}}, y_label="x"),
  "stacked": stacked_bars(
    {"a<": {"x": 1.0, "y": NAN}, "b": {"y": 2.0}},
    x_label="GiB",
    limits={"b": 3.0},
  ),
}


def texts(svg):
  return [t.text for t in ElementTree.fromstring(svg).findall(".//{*}text")]


@pytest.mark.parametrize("svg", PLOTS.values(), ids=PLOTS)
def test_a_plot_follows_the_scheme_and_asks_for_nothing(svg):
  assert any("a<" in text for text in texts(svg))
  assert "prefers-color-scheme:dark" in svg and "DOCTYPE" not in svg
  assert ">*{" not in svg  # it would reach the page around it
  for absent in ("nan", "inf", "url(http", "@import"):
    assert absent not in svg.lower()


def test_plots_of_a_page_have_ids_of_their_own():
  found = [
    node.get("id")
    for svg in PLOTS.values()
    for node in ElementTree.fromstring(svg).iter()
    if node.get("id")
  ]
  assert found and len(set(found)) == len(found)


def test_the_same_data_gives_the_same_bytes_whatever_the_reader_has_set():
  series = {"a": [(1, 2.0, 0.1), (9, 3.0, 0.1)]}
  expected = lines(series)
  with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red"}):
    before = dict(matplotlib.rcParams)
    assert lines(series) == expected
    assert dict(matplotlib.rcParams) == before


def test_a_curve_far_above_the_others_is_named_and_left_out():
  near = {f"c{i}": [(1.0, 3.0 + 0.1 * i, 0.1)] for i in range(3)}
  svg = lines({**near, "far": [(1.0, 30.0, 1.0)]})
  assert texts(svg)[-4:] == ["c0", "c1", "c2", "far (above)"]
  assert not {"30", "20"} & set(texts(svg))
  whole = lines({**near, "far": [(1.0, 30.0, 1.0)]}, log_y=True)
  assert texts(whole)[-1] == "far" and {"10", "20"} <= set(texts(whole))


def test_names_beyond_the_colours_are_dashed():
  svg = lines({
    str(i): [(0, 1.0, 0.0), (1, 2.0 + i / 9, 0.0)] for i in range(15)
  })
  assert "stroke-dasharray" in svg
  assert "stroke-dasharray" not in PLOTS["lines"]


def test_names_are_taken_as_they_stand():
  svg = lines({"_a": [(1, 2.0, 0.1)], "$b$ $c": [(1, 2.5, 0.1)]})
  assert [text.strip() for text in texts(svg)[-2:]] == ["_a", "$b$ $c"]


def test_bars_end_with_the_axis_and_say_their_height():
  found = texts(PLOTS["bars"])
  assert "0.5" in found and "1" in found and "1.2" not in found
  assert found[-2:] == ["x", "y"]
  assert texts(PLOTS["alone"]).count("x") == 1  # the axis says it


def test_limits_are_marked_in_red():
  assert "limit" in texts(PLOTS["stacked"])
  assert "#e0002d" in PLOTS["stacked"]
  plain = stacked_bars({"a": {"x": 1.0}}, x_label="GiB")
  assert "#e0002d" not in plain and "limit" not in texts(plain)


@pytest.mark.parametrize(
  "draw",
  [
    lambda: lines({"a": [(1, NAN, 0.0)], "b": []}),
    lambda: bar_plot({"a": {}}, y_label="y"),
    lambda: stacked_bars({}, x_label="x"),
  ],
)
def test_nothing_to_plot(draw):
  with pytest.raises(ValueError, match="nothing to plot"):
    draw()
