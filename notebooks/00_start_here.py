# %% [markdown]
# # Start here: from images to latents to samples
#
# **Question.** What are the parts of a latent diffusion pipeline built on a vision foundation model (VFM),
# and what does each of them do to a picture?
#
# This notebook trains nothing. It looks at the images, at what a frozen VFM sees in them, at what the
# diffusion model will have to learn, and at the plan of the run that the next notebooks carry out.

# %% tags=["parameters"]
preset = "pocket_vfm_vae"  # any name from `vfmlab presets`
overrides = "{}"  # JSON with dotted names, e.g. '{"train.samples": 50000}'
root = "runs"  # where runs are kept
seed = 0
headless = False  # True: no widgets; every result is the same

# %%
import vfmlab
from vfmlab import presets, runs, widgets
from vfmlab.plots import primitives
from vfmlab.studies import show

widgets.set_up_notebook()
run = vfmlab.resolve(preset, overrides, seed=seed)
print(f"{run.name}: images from {run.data.source} at {run.data.size} px, run id {run.id}")

# %% [markdown]
# ## 1. The images
# One string says where images come from. `scenes` are drawn by the library: ten classes (a shape, plain or
# striped) in front of changing backgrounds, so that everything here runs offline. *Prediction:* you can
# name the class of each picture at a glance; if you cannot, no judge will tell good samples from bad ones.

# %%
images, labels, names = vfmlab.data.examples(run.data, n=16, seed=seed)
primitives.grid(images, columns=8, title=", ".join(names))

# %% [markdown]
# ## 2. What a frozen VFM sees
# Each map below shows the first three principal components of the features at one depth as colours.
# *Prediction:* early layers keep edges and colour, late layers paint the object in one colour whatever its
# texture.

# %%
vfm = vfmlab.vfm.build(run.vfm or vfmlab.config.recipe.VFM(), run.data.size)
show.features(vfm, images[:8])

# %% [markdown]
# ## 3. What diffusion has to undo
# Training mixes data with noise on a straight line, $x_t = (1-t)\,x + t\,\epsilon$, and learns the velocity
# $v = \epsilon - x$. Here on pixels; the library does it on latents. *Prediction:* the class is readable
# until about t = 0.6.

# %%
show.noising(images[:6], times=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), seed=seed)

# %% [markdown]
# ## 4. The plan
# A run is a frozen config. Its phases are trained one after the other, each in a directory of its own whose
# name ends in the hash of its config: the same config is never trained twice, and an interrupted one goes
# on.

# %%
phases = [phase for phase in run.phases() if phase.budget]
primitives.table([{"phase": p.stage, "run": p.id, "images seen": p.budget} for p in phases])

# %%
listed = {name: presets.get(name).tier for name in presets.names()}
primitives.table([{"preset": k, "tier": tier, "what": presets.summary(k)} for k, tier in listed.items()])

# %%
trained = [{"run": d.id, "state": d.status().state, "images": d.status().samples} for d in runs.scan(root)]
primitives.table(trained or [{"run": "none yet"}])

# %% [markdown]
# ## Finding
# Three frozen or trained maps are chained: images to VFM features, features to a small normalised latent,
# and noise to latents. The bench changes one of them at a time and measures what that does to the last one.
#
# ## What next
# `01_foundation_features` asks what the features keep and what they lose; `02_train_a_tokenizer` builds on
# them.
