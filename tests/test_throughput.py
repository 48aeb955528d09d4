"""The page of throughput: its figures are the plan's, and the page in docs is the one that the command makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfmlab import presets
from vfmlab.cli import main
from vfmlab.plots.primitives import Table
from vfmlab.studies import throughput
from vfmlab.training import plan, price

PAGE = Path(__file__).parents[1] / "docs" / "throughput.md"
ANEW = "write the page anew: see its last line"


def planned(name):
    recipe = presets.get(name)
    return recipe, plan.plan(recipe)


@pytest.fixture(scope="module")
def tiny():
    return planned("tiny_plain_vae")


def test_images_a_second_times_flops_is_the_peak(tiny):
    (tokenizer, generator), (_, costs) = throughput.steps([tiny], 0.25), tiny
    for row, phase in zip((tokenizer, generator), costs["phases"], strict=True):
        most = float(row["H100: images/s at most"].replace(",", ""))
        assert most * phase["flops"]["step_per_image"] == pytest.approx(price.PEAK["H100"], rel=1e-2)
        assert float(row["H100: at 25%"].replace(",", "")) == pytest.approx(most / 4, rel=1e-2)
        assert row["run"] in phase["id"]


def test_hours_and_evaluation_are_the_plans(tiny):
    recipe, costs = tiny
    (row,) = throughput.wholes([(recipe, {**costs, "phases": [big(phase) for phase in costs["phases"]]})], 8, 0.5)
    flops = 1e12 * sum(phase["total_flops"] for phase in costs["phases"])
    coder = costs["phases"][0]["flops"]
    flops += 1e12 * coder["encode"] * recipe.data.train * (1 + recipe.data.flip)
    assert hours(row["8 A100: hours at most"]) == pytest.approx(flops / price.PEAK["A100"] / 8 / 3600, rel=1e-2, abs=0.5)
    assert hours(row["8 A100: at 50%"]) == pytest.approx(2 * hours(row["8 A100: hours at most"]), rel=1e-2, abs=1)
    n = recipe.protocol.n
    measured = n * (costs["phases"][1]["sampling_flops"] + coder["encode"] + 2 * coder["decode"]) * 1e12 / 1e15
    assert hours(row[f"evaluation of {n:,}, PFLOP"]) == pytest.approx(measured, rel=1e-2, abs=0.5)


def big(phase):
    """The phase with a terabyte's worth of everything, so that rounding does not hide a figure."""
    scaled = {key: 1e12 * value for key, value in phase.items() if key in ("total_flops", "sampling_flops")}
    return phase | scaled | {"flops": {key: 1e12 * value for key, value in phase["flops"].items()}}


def hours(text):
    return float(text.replace(",", ""))


def test_a_shared_phase_has_one_row(tiny):
    assert len(throughput.steps([tiny, tiny], 0.35)) == 2


@pytest.mark.parametrize("name", ["paper_ar_b", "paper_rae"])
def test_the_page_has_the_rows_that_the_command_writes(name):
    """Of two presets whose plan takes a second; the others' settings by the ids of their runs."""
    page, mine = PAGE.read_text(), planned(name)
    for rows in (throughput.steps([mine], 0.35), throughput.wholes([mine], 8, 0.35)):
        for cells in Table(rows).rows:
            # a phase that presets share stands under the first of them
            assert f" | {' | '.join(cells[1:])} |" in page, ANEW
    assert page.rstrip().endswith("Made by `vfmlab plan paper --gpus 8 --mfu 0.35 --page`.")


def test_the_page_has_every_paper_preset_as_it_is():
    page = PAGE.read_text()
    for name in presets.names():
        if presets.row(name).tier == "paper":
            assert f"| {name} |" in page, f"{name}: {ANEW}"
            for phase in presets.get(name).phases():
                assert phase.imported is not None or f"| {phase.id.rpartition('-')[2]} |" in page, f"{phase.id}: {ANEW}"


def test_the_command_takes_presets_and_tiers(capsys):
    assert main.main(["plan", "tiny_plain_vae", "tiny_rae", "--page"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Throughput expected")
    assert "| tiny_plain_vae | tokenizer |" in text
    assert "| tiny_rae |" in text
    assert main.main(["plan"]) == 2
    assert "no preset" in capsys.readouterr().err
