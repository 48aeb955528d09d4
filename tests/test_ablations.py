"""Decoder ablations: variants change what they say and nothing else, rate has its closed forms."""

from __future__ import annotations

import json
import math

import pytest
import torch

from vfmlab import api, config, presets, runs
from vfmlab.errors import ConfigError
from vfmlab.evaluation.number import Number
from vfmlab.plots import figures
from vfmlab.presets import variants
from vfmlab.studies import ablations, compare
from vfmlab.studies.results import Result, means

BUILT = [name for name, variant in variants.VARIANTS.items() if variant.needs == "decoder"]
TINY, POCKET = presets.get("tiny_vfm_vae"), presets.get("pocket_vfm_vae")


@pytest.mark.parametrize("name", BUILT)
def test_every_variant_can_be_built(name):
    """At the tiny tier with images through it; at pocket, widths and sizes fit."""
    run = variants.apply(TINY, name)
    tokenizer = api.build_tokenizer(config.override(run, {"vfm.weights": "random"}))
    images = tokenizer.decode_raw(tokenizer.posterior(torch.zeros(1, 3, 16, 16)).mode())
    assert images[0].shape == (1, 3, 16, 16)
    assert len(images) == (run.tokenizer.decoder.blocks if run.tokenizer.decoder.multiscale else 1)
    changed = variants.apply(POCKET, name)
    assert variants.decoder_size(changed) > 0
    assert changed.train == POCKET.train  # equal budget
    assert changed.diffusion == POCKET.diffusion
    assert changed.data == POCKET.data


def test_rows_of_the_table_add_one_part_after_the_other():
    plain, fusion, modern, whole = (variants.apply(POCKET, name) for name in variants.TABLE)
    assert whole.id == POCKET.id
    differ = {name for name, value in plain.tokenizer.decoder if value != getattr(fusion.tokenizer.decoder, name)}
    assert differ == {"fusion"}
    assert modern.tokenizer == whole.tokenizer
    assert plain.vfm.layers == fusion.vfm.layers == modern.vfm.layers == (-1,)
    assert whole.vfm.layers != (-1,)
    assert "multiscale" not in plain.losses
    assert plain.losses.keys() | {"multiscale"} == whole.losses.keys()
    assert list(variants.PAPER_RFID) == list(variants.TABLE)


@pytest.mark.parametrize("name", ["plain", "fusion"])
def test_matched_twins_have_the_whole_decoders_size(name):
    whole = variants.decoder_size(POCKET)
    row, twin = (variants.apply(POCKET, other) for other in ({"plain": "plain_decoder"}.get(name, name), f"{name}_matched"))
    assert abs(variants.decoder_size(twin) / whole - 1) < 0.06 < variants.decoder_size(row) / whole - 1
    kept = {"channel_base", "channel_max"}
    assert row.tokenizer.decoder.model_dump(exclude=kept) == twin.tokenizer.decoder.model_dump(exclude=kept)


def test_width_keeps_the_decoder_behind_the_latent():
    narrow, wide = variants.apply(POCKET, "d4").tokenizer, variants.apply(POCKET, "d32").tokenizer
    assert (narrow.channels, wide.channels) == (4, 32)
    assert narrow.channels * narrow.decoder.decompress_factor == wide.channels * wide.decoder.decompress_factor == 64


def test_bad_input_is_one_clear_line():
    with pytest.raises(ConfigError, match="unknown variant 'no_stile' .*'no_style'"):
        variants.apply(POCKET, "no_stile")
    with pytest.raises(ConfigError, match="it changes the 'vfm' section"):
        variants.apply(presets.get("pocket_plain_vae"), "modern_blocks")
    with pytest.raises(ConfigError, match="progressive decoder"):
        variants.apply(presets.get("paper_plain_vae"), "fusion")
    assert variants.apply(presets.get("pocket_plain_vae"), "no_style").tokenizer.decoder.style is False


def test_study_leaves_out_twins_that_are_no_others():
    """At the tiny tier the plain decoder has the whole decoder's size already."""
    rows = ablations.study("tiny_vfm_vae", "plain_decoder,plain_matched,fusion", '{"train.samples": 32}', seed=3, seeds=2)
    assert [(r.label, r.seed) for r in rows] == [(name, s) for s in (3, 4) for name in ("plain_decoder", "fusion")]
    assert rows[-1].run.train.samples == 32
    assert all(len(row.phases) == 1 for row in rows)
    sizes = ablations.sizes_of(rows)
    assert [line["row"] for line in sizes] == ["plain_decoder", "fusion"]
    assert sizes[1]["decoder parameters"] > sizes[0]["decoder parameters"]


def results(values):
    """{label: rFD per seed}; PSNR is 30 - rFD."""
    made = []
    for label, seeds in values.items():
        for seed, rfd in enumerate(seeds):
            numbers = {"rfd": Number(rfd, "a", 9), "psnr": Number(30 - rfd, "a", 9)}
            parameters = {"trained": 9, "tokenizer": 9, "decoder": 5, "vfm": 0}
            made.append(Result(label, label, seed, numbers=numbers, parameters=parameters, seconds={"tokenizer": 3.0}, hash="a"))
    return made


def test_steps_are_changes_from_row_to_row():
    values = {"plain_decoder": [10, 10.2], "fusion": [8.0, 8.2], "modern_blocks": [2.0, 2.2], "multi_layer": [2.1, 1.9]}
    step = ablations.steps(results(values))[2]
    assert step["change in the paper"] == pytest.approx(1.08 / 14.35 - 1)
    assert step["change here"] == pytest.approx(2.1 / 8.1 - 1)


def test_figures_have_every_row():
    found = results({"plain_decoder": [10, 11], "no_blur": [3, 3.1], "multi_layer": [2, 2.1]})
    assert [row[0] for row in ablations.table(found).rows] == ["plain_decoder", "no_blur", "multi_layer"]
    assert [row[0] for row in ablations.paper_beside(found).rows] == ["plain_decoder", "multi_layer"]
    bar, dots = figures.seed_bars(means(found, "rfd"), "rFD").data
    assert not bar.showlegend  # it would say "trace 0"
    assert list(bar.y) == pytest.approx([10.5, 3.05, 2.05])
    assert len(dots.y) == 6


@pytest.mark.parametrize(("bits", "step", "error"), [(1, 1.596, 0.3634), (2, 0.9957, 0.1188), (3, 0.5860, 0.03744), (4, 0.3352, 0.01154), (5, 0.1881, 0.003495)])
def test_quantiser_is_that_of_max(bits, step, error):
    """Steps and errors of table II in Max 1960."""
    assert ablations.gaussian_step(bits) == pytest.approx(step, abs=2e-3)
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    rounded = ablations.quantise(x, bits)
    assert len(rounded.unique()) == 2**bits
    assert float((rounded - x).square().mean()) == pytest.approx(error, rel=0.02)


def test_rate_and_distortion(tmp_path, monkeypatch):
    """Untrained weights do: PSNR grows with bits up to that without rounding, and the rate is counted right."""
    monkeypatch.setenv("VFMLAB_CACHE", str(tmp_path / "cache"))
    sets = {"train.samples": 8, "data.train": 48, "data.val": 24, "protocol.n": 24}
    rows = ablations.study("tiny_vfm_vae", "d4,d8", json.dumps(sets))
    assert compare.train(rows, tmp_path, jobs=1) == {}
    records = ablations.rate_distortion(rows, tmp_path, bits=(1, 4, 12), n=16)
    assert [(r["channels"], r["bits"]) for r in records] == [(4, 1), (4, 4), (4, 12), (8, 1), (8, 4), (8, 12)]
    assert [r["rate"] for r in records] == [c * 16 * b / 256 for c in (4, 8) for b in (1, 4, 12)]
    assert len({r["protocol"] for r in records}) == 1
    numbers = api.evaluate(rows[0].phases[-1].id, tmp_path, {"n": 16})
    assert records[2]["psnr"] == pytest.approx(numbers["psnr"].value, abs=0.02)
    assert records[2]["rfd"] == pytest.approx(numbers["rfd"].value, rel=0.05)
    assert math.isfinite(records[0]["rfd"])
    assert len(figures.rate_curves(records).data) == 4
    assert len(ablations.rate_table(records).rows) == 6
    assert [run.id for run in runs.scan(tmp_path)] == [row.phases[0].id for row in rows]
