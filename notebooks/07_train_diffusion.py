# %% [markdown]
# # Train a diffusion model on the latents
#
# **Question.** How fast does the same small DiT learn the latents of this tokenizer?

# %% tags=["parameters"]
preset = "pocket_vfm_vae"
overrides = "{}"
root = "runs"
seed = 0
headless = False

# %%
import vfmlab
from vfmlab import runs, widgets
from vfmlab.plots import figures, primitives
from vfmlab.studies import probing, show, sweep

widgets.set_up_notebook()
run = vfmlab.resolve(preset, overrides, seed=seed)
primitives.table([{"part": k, "value": v} for k, v in show.describe_run(run).items()])

# %% [markdown]
# ## 1. Train
# The tokenizer is trained first if it is not there yet; then the images are encoded once into a latent
# cache, and the DiT learns the velocity from noise to data. *Prediction:* the loss flattens early, long
# before the samples are good: in flow matching the loss says little about sample quality.

# %% tags=["train:diffusion"]
await widgets.train(run, root, headless)
folder = runs.open_run(run.id, root)
figures.training_curves([folder])

# %% [markdown]
# ## 2. Quality over training
# Frechet distance of samples (gFD) to real images and to the tokenizer's own reconstructions, and how many
# samples a judge recognises as the class they were asked to be. *Prediction:* both distances fall together;
# the one to the reconstructions ends lower, since it does not see the decoder's own error (rFD).

# %%
figures.convergence([folder])

# %% [markdown]
# ## 3. Samples, raw weights and averaged weights
# One column per class, same noise. *Prediction:* the averaged (EMA) weights draw cleaner shapes.

# %%
show.sample_rows(run.id, root, variants={"EMA": {"ema": True}, "raw": {"ema": False}}, per_class=1, seed=seed)

# %% [markdown]
# ## 4. Where on the path is the error?
# The loss by time bin on held-out latents. *Prediction:* highest in the middle-to-noisy part, where the
# class is decided.

# %%
lines = probing.loss_by_time(run.id, root, seed=seed)
primitives.curves(lines, x="t (0 data, 1 noise)", y="velocity error / target power")

# %% [markdown]
# ## 5. What a sweep collects
# The numbers under the run's protocol, and one sample per class; see `vfmlab sweep`.

# %%
samples = show.class_samples(run.id, root, seed=seed)
sweep.result(vfmlab.evaluate(run.id, root, protocol=run.protocol), images=samples)

# %% [markdown]
# ## Finding
# Our recorded runs (`docs/results/tokenizers.md`: seeds 0 and 1, protocol `55f08ee0`, N = 1000), gFD as
# mean (each seed):
#
# | row | 12,800 images | 25,600 | 51,200 |
# |---|---|---|---|
# | VFM-VAE | 64.1 (65.3, 62.9) | 37.1 (37.6, 36.5) | 25.6 (26.5, 24.7) |
# | plain VAE | 64.8 (63.7, 65.8) | 44 (43.4, 44.7) | 30.4 (30.2, 30.5) |
#
# At 12,800 images the seeds overlap: undecided. From 25,600 on VFM-VAE is ahead in both seeds.
# The last point of the curves above is this tokenizer's answer at this budget; `10_compare_and_report` sets
# two of them side by side.
#
# ## What next
# `09_sampling_and_guidance` plays with the sampler; `10_compare_and_report` compares.
