"""AlignTok's ablations: which runs they share, and sentences that follow from the numbers."""

from __future__ import annotations

import pytest

from vfmlab.errors import ConfigError
from vfmlab.evaluation.number import Number
from vfmlab.plots import stages
from vfmlab.studies.results import Result, Stage


def result(label, seed, **metrics):
    at = [Stage(stage, "tokenizer", label, 1.0, {k: Number(v[i], "p", 8) for k, v in metrics.items()})
          for i, stage in enumerate(("latent", "perceptual", "refine"))]  # fmt: skip
    return Result(label, label, seed, stages=at, numbers=at[-1].numbers)


def test_ablations_change_stage_two_and_share_stage_one():
    rows = stages.ablation_rows("tiny_aligntok", {}, [0], list(stages.ABLATIONS))
    assert rows[0].label == stages.BASE
    assert {row.tokenizers[0].id for row in rows} == {rows[0].tokenizers[0].id}
    assert [len(row.phases) for row in rows] == [3, 2, 2, 2, 2]
    tuned = {row.label: row.tokenizers[1] for row in rows}
    assert len({run.id for run in tuned.values()}) == len(rows)
    terms = {label: run.losses.get("preservation") for label, run in tuned.items()}
    assert terms["w_sp 0"] is None
    assert {k: (t.weight, t.anchor, t.distance) for k, t in terms.items() if t} == {
        "w_sp 1": (1.0, "after", "l2"), "w_sp 5": (5.0, "after", "l2"), "before the adapter": (1.0, "before", "l2"), "cosine": (1.0, "after", "cosine"),
    }  # fmt: skip


def test_unknown_ablation_and_preset_without_stages():
    with pytest.raises(ConfigError, match="ablations: unknown 'w_sp 2'"):
        stages.ablation_rows("tiny_aligntok", {}, [0], ["w_sp 2"])
    with pytest.raises(ConfigError, match="'tiny_vfm_vae' has no stage 'perceptual'"):
        stages.ablation_rows("tiny_vfm_vae", {}, [0], [])


def test_finding_follows_the_numbers_after_stage_two():
    values = {"w_sp 0": (0.3, 0.2), "w_sp 1": (0.4, 0.6), "w_sp 5": (0.5, 0.7)}
    results = [result(k, seed, rfd=(1.0, rfd, 0.1), probe_linear=(0.8, probe + 0.01 * seed, 0.0)) for k, (rfd, probe) in values.items() for seed in (0, 1)]
    text = stages.finding(results)
    assert "rFD 1 -> 0.4 -> 0.1: each stage lowers it" in text
    assert "the probe rises with w_sp, 9.5 < 35.09 < 40.55. Here: yes: 0.205 (w_sp 0), 0.605 (w_sp 1), 0.705 (w_sp 5); the ends: seeds do not overlap" in text
    assert "rFD rises with w_sp, 0.33 < 0.36 < 0.49. Here: yes" in text
    assert "adapter" not in text, "no sentence about what was not trained"
    worse = [result(k, 0, rfd=(1.0, rfd, 2.0), probe_linear=(0.8, 1 - probe, 0.0)) for k, (rfd, probe) in values.items()]
    text = stages.finding(worse)
    assert "not every stage lowers it" in text
    assert "Here: no: 0.8 (w_sp 0), 0.4 (w_sp 1), 0.3 (w_sp 5); the ends: one seed" in text
    assert "1 seed a row: no spread is known" in text
