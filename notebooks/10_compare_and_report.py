# %% [markdown]
# # Which tokenizer serves diffusion better?
#
# **Question.** The same DiT, the same budget, the same noise: on whose latents does it converge faster, and is it the tokenizer with the
# better reconstructions?

# %% tags=["parameters"]
preset = "pocket_vfm_vae"
baseline = "pocket_plain_vae"
overrides = "{}"
root = "runs"
seed = 0
headless = False
report = ""  # where to write the HTML report; empty: <root>/report.html

# %%
from pathlib import Path

import vfmlab
from vfmlab import runs, widgets
from vfmlab.plots import figures, primitives
from vfmlab.studies import report as pages
from vfmlab.training import progress

widgets.set_up_notebook()
chosen = {name: vfmlab.resolve(name, overrides, seed=seed) for name in (preset, baseline)}
for run in chosen.values():
    progress.follow(vfmlab.train(run, root=root), "plain" if headless else "auto")
folders = [runs.open_run(run.id, root) for run in chosen.values()]

# %% [markdown]
# ## 1. Convergence
# *Prediction:* the VFM's latents give the lower curve from the first point on; both still fall at the end.

# %%
figures.convergence(folders)

# %% [markdown]
# ## 2. Samples from the same noise

# %%
primitives.rows({name: figures.class_samples(run.id, root, seed=seed) for name, run in chosen.items()})

# %% [markdown]
# ## 3. The numbers, with their protocol
# rFD stands beside every gFD: it is the floor that no diffusion model on these latents can get under by much.

# %%
reports = {name: vfmlab.evaluate(run.id, root) for name, run in chosen.items()}
primitives.table(figures.report_rows(reports))

# %% [markdown]
# ## 4. Better reconstruction, better generation?
# *Prediction:* not here: the point further left (better rFD) is not the lower one.

# %%
figures.trade_off(reports)

# %% [markdown]
# ## 5. One page to keep
# Figures, tables, configs and protocol hashes in a single HTML file that needs no network.

# %%
page = pages.write(chosen, root, Path(report or f"{root}/report.html"), seed=seed)
print("report:", page)

# %% [markdown]
# ## Finding
# One seed and one small data set: a hint. The study in `docs/` repeats this with two seeds and a control without the alignment loss.
#
# ## What next
# Change one thing (`-p overrides '{"losses.vf.weight": 0}'`) and run this notebook again.
