"""The page writer: escaped, complete, the same parts as HTML and as Markdown."""

from __future__ import annotations

import io

import plotly.graph_objects as go
from PIL import Image

from vfmlab.plots import primitives
from vfmlab.studies.page import Folded, Lines, Page, Picture, definitions

EVIL = "<script>alert('x')</script> & \"quotes\""


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, format="PNG")
    return buffer.getvalue()


def evil():
    page = Page(EVIL, EVIL, EVIL, EVIL, {EVIL: EVIL}, command=EVIL)
    page.add(EVIL, EVIL, primitives.table([{EVIL: EVIL, "bold": f"**{EVIL}**"}]), Lines([EVIL]), Folded(EVIL, EVIL))
    page.add("", "", Picture(png(), EVIL, bold=EVIL), [Picture(png(), EVIL)])
    return page


def test_everything_is_escaped():
    text = evil().html()
    assert "<script>" not in text
    assert text.count("&lt;script&gt;") >= 18
    assert f"<b>{EVIL[:1]}" not in text
    assert text.count("data:image/png;base64,") == 2


def test_a_page_begins_with_question_verdict_and_definitions():
    page = Page("Title", "Which?", "None: one seed.", definitions=definitions())
    page.add("Numbers", "Under `aa`.", primitives.table([{"row": "a", "rFD ↓": "**1**"}]))
    for text in (page.html(), page.markdown()):
        places = [text.index(part) for part in ("Title", "Which?", "None: one seed.", "rFD", "gFD", "protocol", "judge", "Numbers")]
        assert places == sorted(places)
    assert "<b>1</b>" in page.html()
    assert "| a | **1** |" in page.markdown()
    assert "Under aa." in page.html()


def test_signs_of_markdown_are_not_in_the_html():
    page = Page("Title", verdict="**None**: `a` is one seed.")
    page.add("Lines", "", Lines(["`a` against `b`: **undecided**."]))
    assert "None: a is one seed." in page.html()
    assert "<li>a against b: undecided.</li>" in page.html()
    assert "**undecided**" in page.markdown()


def test_links_of_markdown_are_links_in_the_html():
    page = Page("Title", verdict="See [`a` & b](results/a.md#b-c) and [bad](javascript:alert(1)).")
    page.add("Table", "", primitives.table([{"where": "elsewhere: [a.md](a.md)", "bold": "**[b](https://b.org/c)**"}]))
    text = page.html()
    for link in ('<a href="results/a.md#b-c">a &amp; b</a>', '<a href="a.md">a.md</a>', '<b><a href="https://b.org/c">b</a></b>'):
        assert link in text
    assert "[bad](javascript:alert(1))" in text
    assert "[a.md](a.md)" in page.markdown()


def test_plotly_is_in_a_page_once():
    page = Page("Title")
    page.add("Figures", "", go.Figure(), go.Figure())
    text = page.html()
    assert text.count("plotly-graph-div") == 2
    assert len(text) < 8_000_000
    assert "Figures" not in page.markdown()


def test_tables_show_whole_heads_and_what_is_missing():
    table = primitives.table([{"a long head that was cut": 1.23456}, {"other": None, "list": [0, 1]}])
    assert table.rows == [["1.23", "–", "–"], ["–", "–", "[0, 1]"]]
    assert "<th>a long head that was cut</th>" in table._repr_html_()
    assert primitives.fragment(table) == table._repr_html_()
