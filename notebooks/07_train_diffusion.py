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
from vfmlab.studies import sweep

widgets.set_up_notebook()
run = vfmlab.resolve(preset, overrides, seed=seed)
primitives.table([{"part": k, "value": v} for k, v in figures.describe_run(run).items()])

# %% [markdown]
# ## 1. Train
# The tokenizer is trained first if it is not there yet; then the images are encoded once into a latent cache, and the DiT
# learns the velocity from noise to data. *Prediction:* the loss flattens early, long before the samples are good: in
# flow matching the loss says little about sample quality.

# %% tags=["train:diffusion"]
await widgets.train(run, root, headless)
folder = runs.open_run(run.id, root)
figures.training_curves([folder])

# %% [markdown]
# ## 2. Quality over training
# Frechet distance of samples (gFD) to real images and to the tokenizer's own reconstructions, and how many samples a
# judge recognises as the class they were asked to be. *Prediction:* both distances fall together; the one to the
# reconstructions ends lower, since it does not see the decoder's own error (rFD).

# %%
figures.convergence([folder])

# %% [markdown]
# ## 3. Samples, raw weights and averaged weights
# One column per class, same noise. *Prediction:* the averaged (EMA) weights draw cleaner shapes.

# %%
figures.sample_rows(run.id, root, variants={"EMA": {"ema": True}, "raw": {"ema": False}}, per_class=1, seed=seed)

# %% [markdown]
# ## 4. Where on the path is the error?
# The loss by time bin on held-out latents. *Prediction:* highest in the middle-to-noisy part, where the class is decided.

# %%
figures.loss_by_time(run.id, root, seed=seed)

# %% [markdown]
# ## 5. What a sweep collects
# The numbers under the run's protocol, and one sample per class; see `vfmlab sweep`.

# %%
sweep.result(vfmlab.evaluate(run.id, root, protocol=run.protocol), images=figures.class_samples(run.id, root, seed=seed))

# %% [markdown]
# ## Finding
# The last point of the curves above is this tokenizer's answer at this budget; `10_compare_and_report` sets two of them side by side.
#
# ## What next
# `09_sampling_and_guidance` plays with the sampler; `10_compare_and_report` compares.
