# %% [markdown]
# # Train a visual tokenizer
#
# **Question.** Can a small latent, made from frozen features, hold enough of the image to decode it again,
# and what does that latent look like?
#
# VFM-VAE reads several depths of a frozen VFM, squeezes them into a few channels and decodes coarse to
# fine. The plain VAE (`-p preset pocket_plain_vae`) sees pixels only. Both use the same loss terms, budget
# and decoder here.

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
from vfmlab.studies import show, sweep

widgets.set_up_notebook()
run = vfmlab.resolve(preset, overrides, seed=seed).tokenizer_phase
primitives.table([{"part": k, "value": v} for k, v in show.describe_run(run).items()])

# %% [markdown]
# ## 1. Train
# Stop it whenever you like: the state is written to the run's directory, and running this cell again goes
# on where it stopped. *Prediction:* the reconstruction error falls fast at first; the alignment loss (if
# there is one) falls more slowly.

# %% tags=["train:tokenizer"]
await widgets.train(run, root, headless)
folders = [runs.open_run(stage.id, root) for stage in run.recipe.phases()]  # one per stage of the recipe
states = {f: f.status() for f in folders}
primitives.table([{"run": f.id, "state": s.state, "seconds": round(s.seconds)} for f, s in states.items()])

# %% [markdown]
# ## 2. Curves
# Every term of the loss by itself, and PSNR of the training batches. *Prediction:* PSNR is still rising at
# the end: the pocket budget is minutes, not days.

# %%
figures.training_curves(folders)

# %% [markdown]
# ## 3. The same images before and after
# Above: held-out images; below: their reconstructions and the error, four times enlarged. *Prediction:*
# colours and shapes are right, edges and stripes are the first to go soft.

# %%
tokenizer = vfmlab.load_tokenizer(run.id, root)
images, labels, names = vfmlab.data.examples(run.data, n=8, seed=seed)
show.reconstructions({run.tokenizer.method: tokenizer}, images)

# %% [markdown]
# ## 4. The latent
# Diffusion is trained on latents with zero mean and unit variance per channel; mean and std are measured on
# the training images and kept in the checkpoint. Left to right: one row per channel. *Prediction:* with a
# VFM, channels show the object as a region.

# %%
show.latent_channels(tokenizer, images[:6])

# %%
figures.latent_statistics(tokenizer.statistics, run.tokenizer.method)

# %% [markdown]
# ## 5. What a sweep collects
# Numbers under the run's protocol, and the images above. `vfmlab sweep` runs this notebook at many settings
# and puts what each of them hands out here into one table and one page. *Prediction:* with more channels
# PSNR rises and the probe does not.

# %%
_, restored, _ = vfmlab.reconstruct(tokenizer, images)
sweep.result(vfmlab.evaluate(run.id, root, protocol=run.protocol), images=[images, restored])

# %% [markdown]
# ## Finding
# The tokenizer is in the run directory printed above, with its statistics; the figures show what it keeps.
#
# ## What next
# `03_reconstruction_report` sets it beside a baseline; `07_train_diffusion` asks the question that matters.
