"""The tier of photographs: every row builds at 32 and at 64 px, trains a step in each phase and draws samples."""

from __future__ import annotations

import pytest
import torch

from vfmlab import api, presets
from vfmlab.errors import ConfigError
from vfmlab.presets import variants

PHOTO = [name for name in presets.names() if name.startswith("photo_")]
OWN = [name for name in PHOTO if not presets.row(name).of]  # the others change one thing of these
# Drawn scenes, a VFM of random weights and the bundled judge: nothing of this needs a package or a data set.
SHORT = {
    "data.source": "scenes:medium", "data.train": 8, "data.val": 8, "train.batch": 4, "train.samples": 4, "train.vfm_cache": None,
    "protocol.features": "judge",
}  # fmt: skip
GENERATOR = {"samples": 4, "batch": 4, "evaluate_at": []}


def short(name):
    """A row of codes under the tier's transformer."""
    recipe = presets.get(name)
    kind, steps = ("ar", {}) if recipe.tokenizer.quantised else ("diffusion", {"protocol.sampler.steps": 2})
    generator = {f"{kind}.train.{field}": value for field, value in GENERATOR.items()} | steps
    # the VFM sees 64 px in place of 128, on the same grids
    weights = {} if recipe.vfm is None else {"vfm.weights": "random", "vfm.upscale": recipe.vfm.upscale / 2, "vfm.stride": 8}
    stages = {f"stages.{stage.name}.train.samples": 4 for stage in recipe.stages if stage.train and stage.train.get("samples")}
    return presets.get(f"{name}@photo_ar" if kind == "ar" else name, SHORT | generator | weights | stages)


def test_the_tier_has_a_row_of_every_family():
    methods = {presets.get(name).tokenizer.method for name in OWN}
    # dino_sae reads images through the patch embedding of a ViT; the tier's VFM is convolutional
    assert methods == {"plain_vae", "sd_vae", "va_vae", "vfm_vae", "aligntok", "rae", "fae", "vqgan", "vfmtok", "vqrae", "gae", "pae", "svg", "ps_vae",
                       "epsilon_vae"}
    assert {"photo_va_vae_no_margins", "photo_vfm_vae_random", "photo_vfm_vae_no_vf", "photo_vfm_vae_last_layer"} <= set(PHOTO)


@pytest.mark.parametrize("name", PHOTO)
def test_64_px_changes_the_down_sampling_alone(name):
    at_32, at_64 = presets.get(name), presets.get(f"{name}+64px")
    assert at_64.data.size == 2 * at_32.data.size == 64
    side = at_64.data.size // at_64.tokenizer.factor
    assert (at_64.tokenizer.channels, side) == (at_32.tokenizer.channels, 8)
    assert at_64.diffusion == at_32.diffusion
    if at_32.vfm is not None:
        assert at_64.data.size * at_64.vfm.upscale == at_32.data.size * at_32.vfm.upscale == 128, "the VFM sees as much"
    assert at_64.name == f"{name}_64px"


@pytest.mark.parametrize("name", [*OWN, "photo_sd_vae+64px", "photo_vfm_vae+64px"])
def test_a_row_trains_a_step_and_draws_samples(name, tmp_path):
    recipe = short(name)
    trained = {event.run_id for event in api.train(recipe, tmp_path) if event.kind == "step"}
    assert {phase.id for phase in recipe.phases()} <= trained
    *_, last = api.sample(recipe.id, labels=[0, 1], seed=0, guidance=1.5, root=tmp_path)
    assert last.images.shape == (2, 3, recipe.data.size, recipe.data.size)
    assert torch.isfinite(last.images).all()


def test_a_run_without_a_tokenizer_has_no_64_px():
    with pytest.raises(ConfigError, match="variant '64px' of 'pocket_judge': it changes a tokenizer"):
        variants.apply(presets.get("pocket_judge"), "64px")
