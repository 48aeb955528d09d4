# %% [markdown]
# # Start here: from images to latents to samples
#
# **Question.** What are the parts of a latent diffusion pipeline built on a vision foundation model (VFM),
# and what does each of them do to a picture?
#
# This notebook trains nothing. It looks at the images, at what a frozen VFM sees in them, at what the
# diffusion model will have to learn, at one training step of each of the two trained parts, tensor by tensor,
# and at the plan of the run that the next notebooks carry out.

# %% tags=["parameters"]
preset = "pocket_vfm_vae"  # any name from `vfmlab presets`
overrides = "{}"  # JSON with dotted names, e.g. '{"train.samples": 50000}'
root = "runs"  # where runs are kept
seed = 0
headless = False  # True: no widgets; every result is the same

# %%
import torch

import vfmlab
from vfmlab import presets, runs, widgets
from vfmlab.plots import figures, primitives
from vfmlab.studies import show
from vfmlab.widgets import expect, less, verdicts

widgets.set_up_notebook()
run = vfmlab.resolve(preset, overrides, seed=seed)
print(f"{run.name}: images from {run.data.source} at {run.data.size} px, run id {run.id}")

# %%
expect("a latent has at most a quarter of the image's numbers", lambda: latent.numel() <= images[0].numel() / 4)
expect("half way (t = 0.5) noise has more power than the images", lambda: less(*power[0.5]))

# %% [markdown]
# ## 1. The images
# One string says where images come from. `scenes` are drawn by the library: ten classes (a shape, plain or
# striped) in front of changing backgrounds, so that everything here runs offline. *Prediction:* you can
# name the class of each picture at a glance; if you cannot, no judge will separate good samples from bad.

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
# Training mixes data x with noise n on a straight line, x_t = (1 - t) x + t n, and learns the velocity
# v = n - x. Here on pixels; the library does it on latents. *Prediction:* the class is readable
# until about t = 0.6.

# %%
show.noising(images[:6], times=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), seed=seed)

# %% [markdown]
# The same in numbers: the velocity leads from any x_t straight back to x, and the mean square of (1 - t) x
# beside that of t n says which of the two x_t is mostly made of. Pixels spread less than noise does; latents
# are brought to its spread, so that there the two are equal half way.

# %%
noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
power = {}
for t in (0.1, 0.25, 0.5, 0.75, 0.9):
    data, added = (1 - t) * images, t * noise
    state, velocity = data + added, noise - images  # x_t, v
    assert torch.allclose(state - t * velocity, images, atol=1e-5)
    power[t] = data.square().mean().item(), added.square().mean().item()
primitives.table([{"t": t, "power of the data": a, "of the noise": b} for t, (a, b) in power.items()])

# %% [markdown]
# ## 4. One training step of the tokenizer, tensor by tensor
# `open_step` is the door to any training step: what goes in, what the encoder and the decoder make of it, and
# the terms of the loss. The weights are fresh, so look at shapes and at the sizes of the terms.

# %%
step = vfmlab.open_step(run, root, fp32=True)
latent = step.z[0]
shapes = {"images": step.images, **{f"VFM layer {k}": m for k, m in step.features.items()}}
shapes |= {"z": step.z, "decoded": step.decoded}
primitives.table([{"tensor": name, "B C H W": str(list(t.shape))} for name, t in shapes.items()])

# %%
figures.loss_terms(step.explain().records)

# %% [markdown]
# ## 5. One training step of the generator
# On the latents of a tokenizer (until `02` has trained one: an untrained one), the network is asked for the
# velocity at a random time for each image.

# %%
flow = vfmlab.open_step(run, root, phase="diffusion", fp32=True)
assert torch.allclose(flow.noisy, flow.z + flow.t[:, None, None, None] * flow.target, atol=1e-5)
print(flow.note or "the tokenizer is a trained one")
flow.explain()

# %% [markdown]
# ## 6. The plan
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
# ## Predictions

# %%
verdicts()

# %% [markdown]
# ## Finding
# Ours, executed on 28 November 2026: pocket tier, seed 0. A latent has 512 numbers for the 3,072 of its
# image. At the first step alignment to the VFM is 85 % of the tokenizer's loss; a fresh generator says 0, so
# that its loss is 2.01, the variance of noise minus data, and only its last layer has a gradient.
#
# Three frozen or trained maps are chained: images to VFM features, features to a small normalised latent,
# and noise to latents. The notebooks change one of them at a time and measure what that does to the last one.
#
# ## What next
# `01_foundation_features` asks what the features keep and what they lose; `02_train_a_tokenizer` builds on
# them.
