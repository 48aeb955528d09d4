"""Comparisons: rows, and tables that hold every seed, at the `tiny` tier."""

from __future__ import annotations

import json

import pytest

from vfmlab import compare
from vfmlab.errors import ConfigError


def test_rows_are_settings_times_seeds():
    rows = compare.parse(["tiny_plain_vae", "no VF=tiny_vfm_vae:losses.vf.weight=0,train.lr=0.001"], [0, 3])
    assert [(r.label, r.seed) for r in rows] == [(label, seed) for seed in (0, 3) for label in ("tiny_plain_vae", "no VF")]
    assert "vf" not in rows[1].run.losses
    assert (rows[3].run.seed, rows[3].run.train.lr) == (3, 0.001)
    with pytest.raises(ConfigError, match="same config"):
        compare.parse(["a=tiny_plain_vae", "b=tiny_plain_vae"], [0])
    with pytest.raises(ConfigError, match="did you mean 'tiny_plain_vae'"):
        compare.parse(["tiny_plane_vae"], [0])


def test_spread_shows_every_seed():
    assert compare.spread([1.0]) == "1"
    assert compare.spread([1.0, 2.0]) == "1.5 (1, 2)"


@pytest.mark.timeout(600)
def test_end_to_end(tmp_path):
    sets = {"diffusion.train.evaluate_at": [64], "protocol.n": 16}
    page = compare.run(["plain=tiny_plain_vae"], [0, 1], tmp_path / "runs", tmp_path / "out", jobs=2, overrides=sets)
    text = page.read_text()
    assert "| plain |" in text
    assert "gFD over training" in text
    results = json.loads(page.with_suffix(".json").read_text())["results"]
    assert [r["seed"] for r in results] == [0, 1]
    assert {p["samples"] for r in results for p in r["curve"]} == {64}
    assert page.with_suffix(".html").stat().st_size > 100_000
