"""Pictures of several lines: places by hand, bands, names that are no markup."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np

from benchmarks.report.curves import Line, lines


def test_lines_stand_where_their_values_are_and_names_are_no_markup() -> None:
    x, y = np.array([0.0, 1.0, 2.0]), np.array([0.0, 10.0, 5.0])
    drawn = [Line("<b>&gold</b>", x, y, y - 1, y + 1), *(Line(f"run {i}", x[:1], y[:1]) for i in range(5))]
    figure = lines('a "title"', drawn, across="KL", caption="What it says.")
    root = ElementTree.fromstring(figure.svg)
    texts = [text.text for text in root.iter("text")]
    assert "<b>&gold</b>" in texts and "KL" in texts and 'a "title"' in root.attrib["aria-label"]
    paths = {
        name: [p.attrib["d"] for p in root.iter("path") if p.attrib["class"] == name] for name in ("mean", "band mean")
    }
    places = [tuple(map(float, place.split())) for place in paths["mean"][0][1:].split("L")]
    assert [place[0] for place in places] == [52, 241, 430]  # from the left end of the axis to the right one
    assert places[1][1] < places[2][1] < places[0][1]  # higher values stand higher
    assert len(paths["band mean"]) == 1 and len(re.findall("L", paths["band mean"][0])) == 5
    classes = [p.attrib["class"] for p in root.iter("path") if "grid" not in p.attrib["class"]]
    assert classes[2:] == ["second", "third", "fourth", "second", "third"]
