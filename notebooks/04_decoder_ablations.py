# %% [markdown]
# # Which part of the decoder does the work?
#
# **Question.** VFM-VAE's decoder is a plain one plus multi-scale fusion of the latent, plus modern blocks, plus features of
# several VFM layers. What does each step buy, and how many latent channels and bits does it need?
#
# Rows are named variants of one config (`vfmlab/presets/variants.py`). All train the tokenizer alone (its first stage, if the recipe has several) on
# the same images for the same budget. The steps change the number of parameters too, so rows named `..._matched` have
# their widths scaled to the whole decoder's size.

# %% tags=["parameters"]
preset = "pocket_vfm_vae"
overrides = "{}"
root = "runs"
seed = 0  # the first of `seeds` seeds
headless = False
rows = "plain_decoder,plain_matched,fusion,fusion_matched,modern_blocks,multi_layer"  # more: no_attention, no_style, no_blur, f8 ...
seeds = 2
widths = "4,8,16,32"  # latent channels
jobs = 1  # 2: two processes with one thread each

# %%
import sys

from vfmlab import widgets
from vfmlab.plots import ablations, primitives
from vfmlab.studies import compare

widgets.set_up_notebook()
study = ablations.study(preset, rows, overrides, seed, seeds)
primitives.table(ablations.sizes_of(study))

# %% [markdown]
# ## 1. Train every row
# What is finished is not trained again. *Prediction:* rows with modern blocks take longer a step than their parameter count
# suggests, because narrow layers at full resolution are bound by memory.

# %%
failed = compare.train(study, root, jobs, stream=sys.stdout)
results = compare.collect(study, root, failed)
print("\n".join(f"{r.label}, seed {r.seed}: {r.failed}" for r in results if r.failed) or f"{len(results)} runs trained")

# %% [markdown]
# ## 2. The same images through every row
# Below each row its error, four times enlarged. *Prediction:* the plain decoder is soft everywhere; with the last VFM layer alone, stripes and
# edges go first; several layers bring them back.

# %%
ablations.reconstructions(study, root)

# %% [markdown]
# ## 3. In numbers
# Mean and each seed. Compare a row with its neighbour at the same width *and* with its matched twin: what survives both is
# not a matter of size. *Prediction:* PSNR and rFD improve from row to row.

# %%
ablations.table(results)

# %%
ablations.bars(results, "rfd")

# %% [markdown]
# ## 4. Beside the paper
# The paper's rFID (ImageNet 256, 5 M images) and rFD here have different units: only the changes from step to step compare. The
# paper says: fusion helps, modern blocks dominate.

# %%
ablations.paper_beside(results)

# %%
print(ablations.finding(results))

# %% [markdown]
# ## 5. Rate and distortion
# The whole decoder at several latent widths; the normalised latent is rounded to a few bits per value before it is
# decoded. *Prediction:* few channels at many bits lose to more channels at fewer bits, until each value is too coarse.

# %%
by_width = ablations.study(preset, ",".join(f"d{width}" for width in widths.split(",")), overrides, seed, seeds)
failed = compare.train(by_width, root, jobs, stream=sys.stdout)
rates = ablations.rate_distortion([row for row in by_width if row.phases[-1].id not in failed], root)
ablations.rate_curves(rates)

# %%
ablations.rate_table(rates)

# %%
print(ablations.rate_finding(rates))

# %% [markdown]
# ## Finding
# The sentences printed in steps 4 and 5 follow from the numbers of this run: order of the steps, whether seeds overlap, which width is best at which
# rate. The small scale is a limit: drawn scenes, minutes of training, rFD in the features of a small judge.
#
# ## What next
# The same rows from the command line, side by side: `vfmlab compare pocket_vfm_vae+plain_decoder pocket_vfm_vae+no_style pocket_vfm_vae --seeds 0 1 2`.
# Whether a better decoder also serves diffusion is asked in `10_compare_and_report`.
