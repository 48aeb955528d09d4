"""The `paper` presets beside papers and releases: nothing differs without a word, and the page is the one that is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfmlab import presets
from vfmlab.cli import main
from vfmlab.config import override
from vfmlab.errors import ConfigError
from vfmlab.presets import published
from vfmlab.presets.published import facts, lines, rows, same, value
from vfmlab.presets.published_facts import UNKNOWN, Fact, release, unknown

PAPER = published.presets()


@pytest.mark.parametrize("name", PAPER)
def test_every_paper_preset_is_held_against_its_sources(name):
    """Each field exists; what differs from a source, and what is two things at once, says why."""
    found = list(lines(name))
    assert len(found) > 3
    assert len({line.fact.field for line in found}) == len(found)
    for fact, ours, agrees in found:
        assert agrees or fact.note, f"{fact.field}: {fact.said} there, {ours} here; say why"
        assert (fact.grade == "") == (fact.said is UNKNOWN), fact.field
        assert set(fact.grade.split(", ")) <= {"P", "C", "N", ""}


def test_values_are_those_of_stages_and_sections():
    recipe = presets.get("paper_vfm_vae")
    assert value(recipe, "strong/losses.vf.weight") == 5.0
    assert value(recipe, "weak/losses.vf.weight") == 1.0
    assert value(recipe, "ssim/losses.vf.weight") is None, "the term is off"
    assert value(recipe, "diffusion.alignment.weight") is None
    for field, line in (("weeak/train.lr", "'weak'"), ("train.batsh", "'batch'")):
        with pytest.raises(ConfigError, match=line):
            value(recipe, field)


def test_what_differs_is_seen():
    recipe = presets.get("paper_vfm_vae")
    for fact in facts("paper_vfm_vae"):
        if fact.field == "train.batch":
            assert same(fact.said, value(recipe, "train.batch"))
            assert not same(fact.said, value(override(recipe, {"train.batch": 256}), "train.batch"))
    assert same((0.0, 0.99), [0, 0.99])
    assert not same((0.0, 0.99), (0.0,))
    assert same(None, None)
    assert not same(None, 0.0)
    assert not same(True, 1.0) or same(1, 1)
    assert release("x", 2, paper=1) == Fact("x", 1, 2, "P, C")
    assert unknown("x").said is UNKNOWN


def test_a_preset_made_of_another_has_its_facts_but_for_its_own():
    base, own = ({f.field: f for f in facts(name)} for name in ("paper_aligntok", "paper_aligntok_d64"))
    assert own["tokenizer.channels"].said == 64
    assert {k: v for k, v in own.items() if k != "tokenizer.channels"} == {k: v for k, v in base.items() if k != "tokenizer.channels"}


def test_the_page_is_the_one_that_the_command_writes(capsys):
    assert main.main(["presets", "--published"]) == 0
    page = (Path(__file__).parents[1] / "docs" / "paper_presets.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip(), "write it anew: see its last line"
    assert "differs" in page
    for name in PAPER:
        assert f"## {name}\n" in page
        assert all(row["field"] in page for row in rows(name))
