"""Choosing a VFM and a tokenizer: fitting a VFM to a latent, screening, standings with their intervals, both rounds."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vfmlab import config, vfm
from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation.number import Number
from vfmlab.studies import choose, compare
from vfmlab.studies.results import Result

SMALL = {"data.train": 48, "data.val": 16, "protocol.n": 16}


@pytest.mark.parametrize(("name", "size"), [("timm:efficientnet_lite0", 32), ("timm:resnet18", 32), ("timm:convnext_atto", 32), ("pocket", 32), ("dinov2_s14", 64)])
def test_the_last_map_lies_on_the_latents_grid(name, size):
    fields = choose.settings(name, size, 4)
    cfg = config.VFM(**{key.removeprefix("vfm."): value for key, value in fields.items() if key.startswith("vfm.")}, weights="random")
    model = vfm.build(cfg, size)
    assert model.grid(fields["losses.vf.layer"]) == (size // 4, size // 4)
    assert fields["losses.vf.layer"] in cfg.layers
    assert all(model.grid(layer)[0] % (size // 4) == 0 for layer in cfg.layers)


def rows(values, name="gfd"):
    return [Result(label, f"{label}-{seed}", seed, numbers={name: Number(value, "p")})
            for label, mine in values.items() for seed, value in enumerate(mine)]


def test_standings_are_contrasts_with_the_first():
    found = choose.standings(rows({"a": [31.0, 33.0, 32.0], "b": [20.0, 22.1, 21.0], "c": [20.4, 21.9, 21.4]}))
    assert [s.label for s in found] == ["b", "c", "a"]
    assert found[0].behind == 0
    assert found[1].behind == pytest.approx(0.2, abs=1e-6)
    assert [s.tied for s in found] == [True, True, False]
    assert choose.verdict(found, 3) == "None: 3 seeds do not tell c from the first, b, gFD 21 (20, 22.1, 21)."
    assert choose.verdict([found[0], found[2]], 3).endswith(": ahead of all others by more than 3 seeds leave open.")
    assert choose.verdict(choose.standings(rows({"a": [1.0], "b": [2.0]})), 1).startswith("None: one seed")
    assert choose.standings([]) == []


@pytest.mark.parametrize(
    ("rfd", "own", "says"),
    [((1.0, 2.0), (3.0, 4.0), "its decoder loses less and its latents are modelled better"), ((2.0, 1.0), (3.0, 4.0), "though its decoder loses more"),
     ((1.0, 2.0), (4.0, 3.0), "though its latents are modelled worse"), ((2.0, 1.0), (4.0, 3.0), "neither its decoder nor its latents")],
)  # fmt: skip
def test_why_the_first_is_first(rfd, own, says):
    ranking = choose.standings(rows({"a": [1.0, 2.0], "b": [3.0, 4.0]}))
    parts = [{"a": [numbers[0]] * 2, "b": [numbers[1]] * 2} for numbers in (rfd, own)]
    results = [one.replace(numbers={**one.numbers, "gfd_own": other.numbers["gfd_own"]})
               for one, other in zip(rows(parts[0], "rfd"), rows(parts[1], "gfd_own"), strict=True)]
    assert says in choose.why(results, ranking)
    assert choose.why(rows(parts[0], "rfd"), ranking) == "", "half of it is no reason"
    tied = choose.standings(rows({"a": [1.0, 2.0], "b": [3.0, 1.5]}))
    assert choose.why(results, tied) == "", "what is not told apart has no reason"


def test_round_one_goes_by_gfd_and_leaves_out_what_has_none():
    found = [*rows({"a": [31.0], "b": [20.0]}), Result("c", "c-0", failed="out of memory")]
    assert choose.screened(found) == ["b", "a"]


def test_a_finalist_that_lost_a_seed_is_not_ranked():
    found = rows({"a": [31.0, 33.0], "b": [20.0, 22.0]})[:-1]
    left = choose.standings(found)
    assert [s.label for s in left] == ["a"]
    assert choose.verdict(left, 2) == "None: no other finalist was measured with every seed. It is a, gFD 32 (31, 33)."


def test_small_folders_keep_a_fifth_apart(tmp_path):
    for k in range(20):
        Image.new("RGB", (20, 20), (12 * k, 0, 0)).save(tmp_path / f"{k:02d}.png")
    data = config.Data(source=f"folder:{tmp_path}", size=16, train=20_000, val=1000)
    assert choose.images(data) == {"data.val": 4, "data.train": 16}
    assert choose.images(data.model_copy(update={"train": 10})) == {"data.val": 4, "data.train": 10}
    assert choose.images(config.Data(source="scenes:easy", train=64)) == {}


def test_a_split_of_the_folders_own_is_kept(tmp_path):
    for k in range(20):
        (tmp_path / ("val" if k < 3 else "train")).mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (12 * k, 0, 0)).save(tmp_path / ("val" if k < 3 else "train") / f"{k:02d}.png")
    data = config.Data(source=f"folder:{tmp_path}", size=16, train=20_000, val=1000)
    assert choose.images(data) == {"data.val": 3, "data.train": 17}


def test_the_judge_is_none_of_the_candidates():
    """Of no candidate's family where there is such a one, else of no candidate's model, else a line."""
    ours = "classifier:mobilenetv2@128"
    assert choose.judge(ours, ["efficientnet_lite0", "dinov2_b14"]) == ours
    assert choose.judge(ours, ["mobilenetv2"]) == "classifier:efficientnet_lite2@128"
    assert choose.judge(ours, ["efficientnet_lite0", "mobilenetv2"]) == "classifier:efficientnet_lite2@128"
    assert choose.judge("judge", ["mobilenetv2"]) == "judge"
    with pytest.raises(ConfigError, match="every judge that is at hand .* is a candidate"):
        choose.judge(ours, ["efficientnet_lite2", "mobilenetv2"])
    candidates = ("folder:nowhere", ["efficientnet_lite2", "mobilenetv2"], "runs", "page", "")
    with pytest.raises(ConfigError, match="is a candidate; name others, or set protocol.features"):
        choose.run(*candidates)
    with pytest.raises(DataError, match="nowhere"):  # it goes on, to the images
        choose.run(*candidates, overrides={"protocol.features": "vfm:dinov2_b14"})


def test_a_judge_that_is_a_candidate_is_refused_before_anything_is_trained(tmp_path):
    """One line with the row's name, though only the generator, which comes last, is judged while it is trained."""
    row = "photo_vfm_vae:vfm.name=mobilenetv2,vfm.layers=[1,5,-2],losses.vf.layer=-2,diffusion.train.evaluate_at=[64]"
    more = {"data.source": "scenes:easy", "train.samples": 64, "diffusion.train.samples": 64}
    with pytest.raises(ConfigError, match="row 'own eyes': the VFM 'mobilenetv2' and protocol.features .* the same vision model"):
        compare.run(["plain=photo_plain_vae", f"own eyes={row}"], [0], tmp_path / "runs", tmp_path / "page", overrides=more)
    assert not (tmp_path / "runs").exists()


def test_bad_input_is_one_line(tmp_path):
    for more, complaint in (
        ({"vfms": []}, "--vfm names no vision model"),
        ({"vfms": ["pockt"]}, r"unknown VFM 'pockt' \(did you mean 'pocket'\?\)"),
        ({"vfms": ["pocket"], "methods": ["vfm_va"]}, "did you mean 'tiny_vfm_vae'"),
        ({"vfms": ["pocket"], "methods": ["plain_vae"]}, "'tiny_plain_vae' reads no VFM"),
        ({"vfms": ["pocket"], "seeds": (0, 0)}, "0 is named twice"),
        ({"vfms": ["pocket"], "seeds": ()}, "seeds: none is named"),
        ({"vfms": ["pocket"], "finalists": -1}, "finalists = -1"),
        ({"vfms": ["pocket"], "overrides": {"seed": 5}}, "--set seed: .* give --seeds"),
        ({"vfms": ["pocket"], "overrides": {"train.samples": 5}}, "--set train.samples: .* give --tokenizer-images"),
        ({"vfms": ["pocket"], "overrides": {"vfm.layers": [-1]}}, "--set vfm.layers: .* leave it out"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            choose.run("scenes:easy", root=tmp_path, out=tmp_path / "c", command="", tier="tiny", **more)


def test_every_candidate_has_one_network_and_one_budget():
    """Also those whose own generator is another, and those that are trained in stages."""
    fields = {"data.source": "scenes:easy", **choose._short(choose.Budget(6400, 800, 400), 400, None)}
    chosen = choose.specs(["pocket"], ["vfm_vae", "vfm_vae_last_layer", "rae", "aligntok", "pae"], "pocket", {"data.source": "scenes:easy"})
    study = choose._rows(chosen, [0], fields)
    assert len({row.run.diffusion.network.model_dump_json() for row in study}) == 1
    for row in study:
        seen = [phase.budget for phase in row.phases if phase.generator is None]
        assert sum(seen) == pytest.approx(6400, abs=len(seen)), row.label
    assert len([phase for phase in study[-2].phases if phase.generator is None]) == 3
    layers = {row.label: row.run.vfm.layers for row in study if row.run.vfm is not None}
    assert layers["vfm_vae_last_layer on pocket"] == (-1,)
    assert len(layers["vfm_vae on pocket"]) == 3


def test_finalists_are_told_apart_by_holm():
    """Three lie behind the first by more than the interval of each; all three at once, that may be luck."""
    behind = {"b": [10.5, 10.8], "c": [10.65, 10.5], "d": [10.6, 10.7]}
    first, *rest = choose.standings(rows({"a": [10.0, 10.1], **behind}))
    assert all(s.behind > s.half_width for s in rest)
    assert [s.tied for s in rest] == [True] * 3
    assert choose.verdict([first, *rest], 2).startswith("None: 2 seeds do not tell c, ")


def test_both_rounds_and_the_recipe(tmp_path, capsys):
    budget = choose.Budget(16, 16, 8)
    more = {"tier": "tiny", "seeds": (0, 1), "finalists": 1, "budget": budget, "overrides": SMALL, "methods": ["vfm_vae"], "jobs": 1}
    page = choose.run("scenes:easy", ["pocket"], tmp_path / "runs", tmp_path / "choice", "vfmlab choose", **more)
    text, found = page.read_text(encoding="utf-8"), json.loads((tmp_path / "choice.json").read_text(encoding="utf-8"))
    assert {s["label"] for s in found["ranking"]} == {"plain VAE", "vfm_vae on pocket"}
    assert [r["seed"] for r in found["first"]] == [0, 0]
    assert len(found["results"]) == 4
    assert all(set(r["logged"]) >= {"gfd"} and r["logged"]["gfd"][-1]["samples"] == 8 for r in found["first"]), "the screening's own budget"
    assert "**Verdict.**" in text
    recipe = config.parse(json.loads((tmp_path / "choice.recipe.json").read_text(encoding="utf-8")))
    assert recipe.tokenizer.method == ("vfm_vae" if found["ranking"][0]["label"].startswith("vfm") else "plain_vae")
    assert recipe.train.samples == 64, "the tier's own budget"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.jsonl")}
    choose.run("scenes:easy", ["pocket"], tmp_path / "runs", tmp_path / "again", "vfmlab choose", **more)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.jsonl")}
