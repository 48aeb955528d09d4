# %% [markdown]
# # Alignment on the diffusion side
#
# **Question.** A tokenizer can be aligned with a vision foundation model, and so can the network that is
# trained on its latents: REPA reads an early block out to the VFM's patch tokens, REG lets the network
# denoise the VFM's class token beside the latents, and VFM-VAE's joint recipe does both on aligned latents.
# What does each add, and is it more or less where the latents are aligned already?
#
# At the small tiers the target is the pocket VFM, which has never seen a label of these scenes. VFM-VAE's
# latents are made from this very model, so there the target tells the network nothing that is not in its
# latents; to the plain VAE it is news.

# %% tags=["parameters"]
preset = "pocket_vfm_vae"
baseline = "pocket_plain_vae"  # a second tokenizer; "" for none
overrides = "{}"
root = "runs"
seed = 0  # the first of `seeds` seeds
headless = False
settings = "repa,reg,joint"  # beside none; irepa is there too
seeds = 1
jobs = 1  # 2: two processes with one thread each

# %%
import json
import sys

from vfmlab import widgets
from vfmlab.plots import figures, primitives
from vfmlab.studies import alignment, compare, probing

widgets.set_up_notebook()
changes, names = json.loads(overrides), [name for name in settings.split(",") if name]
study = alignment.rows(preset, baseline, changes, range(seed, seed + seeds), names)
primitives.table(alignment.plan_records(study))

# %% [markdown]
# ## 1. Train
# Each tokenizer once, then one diffusion model per setting on its latents, all with the same noise, times
# and order of images. What is finished is not trained again. *Prediction:* alignment costs a few per cent
# of a step: targets are cached, and the read-out is small. Speeds compare only between rows that were
# trained side by side on a machine with nothing else to do.

# %%
failed = compare.train(study, root, jobs, stream=sys.stdout)
results = compare.collect(study, root, failed)
primitives.table(alignment.speed_records(study, root))

# %% [markdown]
# ## 2. Does the loss do what it says?
# *Prediction:* the cosine with the target rises quickly, and higher on VFM-VAE's latents, from which the
# target can almost be read off; the velocity loss itself hardly moves.

# %%
alignment.losses(study, root)

# %% [markdown]
# ## 3. Quality over training
# *Prediction:* the aligned rows lead early and the lead shrinks; it is larger on the plain VAE's latents.

# %%
alignment.convergence(study, root)

# %% [markdown]
# ## 4. Which block learns it, and when?
# Agreement (CKNNA) of every block with a reference over training, at t = 1/2 under the null label. First
# with the judge, a network of another architecture that no row is aligned with; then with REPA's own
# target, where there is one. *Prediction:* in the aligned rows the block with the read-out leads and the
# later blocks follow; without alignment the agreement grows slowly.

# %%
alignment.dynamics_maps(study, root)

# %%
aligned = {"repa", "irepa", "joint"} & set(names)
alignment.dynamics_maps(study, root, target=True) if aligned else "no row has REPA"

# %% [markdown]
# ## 5. Both sides
# Down: the diffusion side, across: the tokenizer. *Prediction:* aligning the latents does more than
# aligning the network, and the two gains do not add up in full.

# %%
primitives.table(alignment.two_sided(study, results))

# %%
alignment.samples(study, root, seed=seed)

# %% [markdown]
# ## 6. A guidance scale for the class token alone
# The token that REG generates can be guided like the latents, or left as it comes (scale 1). *Prediction:*
# the difference is small, because the token is one of many.

# %%
token = [row for row in study if row.run.diffusion.class_token is not None]
scales = {"1": {"scale": 1.0}, "1.5": {"scale": 1.5}, "1.5, token 1": {"scale": 1.5, "token": 1.0}}
records = probing.guidance_records(token[-1].run.id, root, scales) if token else []
primitives.table(records) if token else "no row has a class token"

# %% [markdown]
# ## 7. One encoding for several steps
# A DiT of encoder and head on the same latents. How alike are its blocks from one sampling step to the
# next, and what is lost when the encoder runs at every second, third, fourth step only? *Prediction:*
# neighbouring steps are alike except near the data; reusing the encoding loses less than taking fewer
# steps, but the head's share bounds what it can save.

# %%
split = alignment.split_row(preset, changes, seed)
failed = compare.train([split], root, jobs, stream=sys.stdout)
times, alike = alignment.block_similarity(split, root)
figures.similarity_figure(times, alike, encoder=split.run.diffusion.network.depth)

# %%
records = alignment.reuse_records(split, root)
primitives.table(records)

# %%
figures.reuse_figure(records)

# %% [markdown]
# ## Finding
# Our recorded runs (`docs/results/alignment.md`: 51,200 images, protocol `55f08ee0`, N = 1000), gFD as mean
# (seed 0, seed 1):
#
# | latents | none | REPA | change, seed by seed |
# |---|---|---|---|
# | VFM-VAE | 25.6 (26.5, 24.7) | 25.2 (25.4, 24.9) | -1.1, +0.2 |
# | plain VAE | 30.4 (30.2, 30.5) | 28.7 (29.1, 28.3) | -1.1, -2.2 |
#
# On VFM-VAE's latents the seeds overlap and the signs differ: **undecided**. On the plain VAE's latents gFD
# falls in both seeds and the seeds do not overlap; two seeds make that a hint.
#
# | diffusion side, seed 0 alone | VFM-VAE | plain VAE |
# |---|---|---|
# | none | 26.5 | 30.2 |
# | REPA | 25.4 | 29.1 |
# | REG | 26.1 | 31.5 |
# | joint | 25.1 | 27.8 |
#
# REG and the joint recipe have one seed. VFM-VAE's two seeds without alignment differ by 1.8, more than any
# change in its column: **undecided**, as is whether the two sides add up. Reuse of the encoder has one seed
# too: gFD 19.0 at every step and 20.5 at every 4th, 18.7 with 5 of the 20 steps and no reuse;
# **undecided**. The small scale is a limit: a network of four blocks, minutes of training, and a target
# that is itself small.
#
# ## What next
# `-p seeds 3` gives the differences a spread. `vfmlab train pocket_plain_vae_repa_e` tunes the tokenizer
# through the alignment loss too (REPA-E); `06_latent_space` asks what the latents of these tokenizers know
# before any diffusion model sees them.
