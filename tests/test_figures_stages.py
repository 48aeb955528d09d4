"""AlignTok's ablations: which runs they share, and their numbers after each stage."""

from __future__ import annotations

import pytest

from vfmlab.errors import ConfigError
from vfmlab.evaluation.number import Number
from vfmlab.studies import stages
from vfmlab.studies.results import Result, Stage, after, means


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


def test_numbers_after_a_stage_are_those_of_its_run():
    values = {"w_sp 0": (0.3, 0.2), "w_sp 1": (0.4, 0.6), "w_sp 5": (0.5, 0.7)}
    results = [result(k, 0, rfd=(1.0, rfd, 0.1), probe_linear=(0.8, probe, 0.0)) for k, (rfd, probe) in values.items()]
    assert means(after(results, stages.TUNED), "rfd") == {k: [rfd] for k, (rfd, _) in values.items()}
    assert means(after(results, "refine"), "probe_linear") == {k: [0.0] for k in values}
    points = {trace.name: (trace.x[0], trace.y[0]) for trace in stages.trade_off(results).data}
    assert points == values | {"stage 1": (1.0, 0.8)}
