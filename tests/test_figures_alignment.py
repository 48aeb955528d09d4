"""Tables and figures on alignment: rows share tokenizers, changes are taken seed by seed."""

from __future__ import annotations

import pytest
import torch

from vfmlab import presets, runs
from vfmlab.errors import ConfigError
from vfmlab.evaluation.number import Number
from vfmlab.plots import figures
from vfmlab.studies import alignment
from vfmlab.studies.results import Result

NUMBERS = {
    "tiny_vfm_vae none": (20.0, 22.0), "tiny_vfm_vae repa": (19.0, 21.0), "tiny_plain_vae none": (30.0, 30.0), "tiny_plain_vae repa": (24.0, 24.0),
}  # fmt: skip


def study(names=("repa",)):
    return alignment.rows("tiny_vfm_vae", "tiny_plain_vae", {}, range(2), names)


def results():
    return [
        Result(name, name, seed, numbers={"gfd": Number(values[seed], "abc", 32), "class_accuracy": Number(0.5, "abc", 32)})
        for name, values in NUMBERS.items() for seed in range(2)
    ]  # fmt: skip


def test_rows_share_the_tokenizer_and_are_the_presets():
    rows = alignment.rows("tiny_vfm_vae", "tiny_plain_vae", {}, range(1), ("repa", "reg", "joint"))
    assert [row.label for row in rows[:4]] == ["tiny_vfm_vae none", "tiny_vfm_vae repa", "tiny_vfm_vae reg", "tiny_vfm_vae joint"]
    assert len({row.run.last.parent for row in rows}) == 2
    assert len({row.run.id for row in rows}) == 8
    for row, preset in zip(rows[1:4], ("repa", "reg", "joint"), strict=True):
        assert row.run.id == presets.get(f"tiny_vfm_vae_{preset}").id
    assert alignment.split_row("tiny_vfm_vae", {}, 0).run.id == presets.get("tiny_vfm_vae_ddt").id
    records = alignment.plan_records(rows)
    assert records[0]["REPA"] == records[2]["REPA"] == ""
    assert "block 1" in records[3]["REPA"]
    with pytest.raises(ConfigError, match="unknown alignment 'rapa' \\(did you mean 'repa'"):
        study(("rapa",))
    with pytest.raises(ConfigError, match="trains no diffusion model"):
        alignment.rows("pocket_vfm", "", {}, range(1), ())


def test_what_each_side_adds():
    table = alignment.two_sided(study(), results())
    assert [row["diffusion side"] for row in table] == ["none", "repa"]
    assert table[1]["tiny_vfm_vae: gFD"] == "20 (19, 21)"
    assert table[1]["tiny_vfm_vae: change"] == "-5.0 %, -4.5 %"
    assert table[1]["tiny_plain_vae: change"] == "-20.0 %, -20.0 %"
    assert "tiny_vfm_vae: change" not in table[0]


def test_what_was_not_logged_is_a_clear_line(tmp_path):
    rows = study()
    for row in rows:
        runs.create(row.phases[-1], tmp_path)
    for draw in (alignment.convergence, alignment.dynamics_maps):
        with pytest.raises(ConfigError, match="set diffusion.train.evaluate_at"):
            draw(rows, tmp_path)
    assert not alignment.losses(rows, tmp_path).data


def test_figures_of_reuse():
    records = [
        {"encoder": "every step", "steps": 8, "encodings": 8, "seconds an image": 0.8, "gFD": 5.0},
        {"encoder": "every 2 steps", "steps": 8, "encodings": 4, "seconds an image": 0.6, "gFD": 6.0},
        {"encoder": "4 steps", "steps": 4, "encodings": 4, "seconds an image": 0.4, "gFD": 9.0},
    ]  # fmt: skip
    figure = figures.reuse_figure(records)
    assert [list(trace.x) for trace in figure.data] == [[0.6, 0.8], [0.4, 0.8]]
    assert list(figure.data[0].text) == ["every 2 steps", "every step"]
    matrix = torch.tensor([[1.0, 0.9, 0.5], [0.9, 1.0, 0.8], [0.5, 0.8, 1.0]])
    figure = figures.similarity_figure([1.0, 0.6, 0.2], {1: matrix, 2: matrix}, encoder=1)
    assert list(figure.data[0].x) == [0.6, 0.2]
    assert list(figure.data[0].y) == pytest.approx([0.9, 0.8])
    assert figure.data[1].name == "block 2 (head)"
