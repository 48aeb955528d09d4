# %% [markdown]
# # What does each of AlignTok's three stages buy?
#
# **Question.** AlignTok turns a vision foundation model into the tokenizer's encoder: first adapter and
# decoder learn to decode its frozen features, then the encoder itself is tuned while a preservation loss
# holds the latent in place, then the decoder is refined. What does each stage gain, and what does the
# preservation loss keep from being forgotten?
#
# The encoder reads the VFM's last layer only, as in the paper. Each stage is a run of its own with the one
# before as its parent, so the ablations of stage 2 share stage 1. At `pocket` about a quarter of an hour on
# one core.

# %% tags=["parameters"]
preset = "pocket_aligntok"
overrides = "{}"
root = "runs"
seed = 0  # the first of `seeds` seeds
headless = False
ablations = "w_sp 0,w_sp 5,before the adapter,cosine"  # of stage 2; fewer: fewer runs
seeds = 1
jobs = 1  # 2: two processes with one thread each

# %%
import torch

import vfmlab
from vfmlab import widgets
from vfmlab.plots import primitives
from vfmlab.studies import compare, stages
from vfmlab.widgets import expect, less, verdicts

widgets.set_up_notebook()
study = stages.ablation_rows(preset, overrides, range(seed, seed + seeds), ablations)
primitives.table(stages.plan_records(study[0]))

# %%
expect("only stage 2 trains the encoder", lambda: [bool(row["encoder"]) for row in gradients] == [False, True, False])
expect("stage 2 lowers rFD", lambda: less(rfd["perceptual"], rfd["latent"]))
expect("stage 3 lowers rFD", lambda: less(rfd["refine"], rfd["perceptual"]))

# %% [markdown]
# # Step by step
# ## 1. Three stages, one state each
#
#     stage 1: latent     frozen encoder -> [adapter] -> z -> [decoder]      brackets: what trains
#     stage 2: perceptual [encoder]      -> [adapter] -> z -> [decoder]      + preservation of stage 1's z
#     stage 3: refine     frozen encoder -> frozen adapter -> z -> [decoder]
#
# The diagram is a claim. One step of each stage is opened, `backward` is called, and the parameters show
# their own gradients. (Until they are trained, the stages stand on an untrained tokenizer.)

# %%
recipe = vfmlab.resolve(preset, overrides, seed=seed)
steps = {phase.stage: vfmlab.open_step(phase, root, fp32=True) for phase in recipe.phases() if phase.diffusion is None}


def gradient_norm(module):
    """Norm of the gradient that `backward` left at the module's parameters; 0: none of them got one."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return sum(g.square().sum().item() for g in gradients) ** 0.5


gradients = []
for stage, step in steps.items():
    step.loss.backward(retain_graph=True)
    gradients.append({"stage": stage} | {name: gradient_norm(part) for name, part in step.tokenizer.named_children()
                                         if any(True for _ in part.parameters())})
primitives.table(gradients, "norm of the gradient of the whole loss")

# %%
parts = [name for name in gradients[0] if name != "stage"]
primitives.heatmap([[float(row[part] > 0) for part in parts] for row in gradients], parts, list(steps),
                   "part", "stage", title="which parameters get a gradient (1)")

# %% [markdown]
# ## 2. The preservation loss by hand
# Stage 2 encodes the batch twice: with the encoder that learns, and with a frozen copy of it as stage 1 left
# it. Their mean squared difference is the term. At the first step the two are equal and it is 0; a nudge of
# the encoder moves it. Ten steps by hand show how far: they have one learning rate for all parts, where
# training gives the encoder a part of it (first table), so that here it moves further. The latent's drift
# counts in units of its own variance, which before stage 1 is trained is next to nothing.

# %%
tuned = next(step for step in steps.values() if "preservation" in step.terms)
new, old = tuned.posterior.mode(), tuned.reconstruction.reference["after"]
mine = (new - old).square().mean()
torch.testing.assert_close(mine, tuned.terms["preservation"].value, rtol=0, atol=1e-6)
tuned.explain()

# %%
def drift(step):
    """Of the latent, in units of its variance over the batch; of the encoder's map, 1 - cosine."""
    r = step.reconstruction
    after = (r.posterior.mode() - r.reference["after"]).square().mean() / r.reference["after"].var()
    before = 1 - torch.cosine_similarity(r.encoded, r.reference["before"], dim=1).mean()
    return after.item(), before.item()


# %%
optimizer, path = torch.optim.AdamW(tuned.parameters, lr=tuned.task.train.lr), []
for _ in range(10):
    optimizer.zero_grad()
    tuned.loss.backward()
    optimizer.step()
    tuned = tuned.next()
    path.append(drift(tuned))
now = tuned.posterior.mode() - tuned.reconstruction.reference["after"]
torch.testing.assert_close(now.square().mean(), tuned.terms["preservation"].value, rtol=1e-5, atol=1e-6)
lines = dict(zip(("latent moved", "encoder moved"), zip(*path, strict=True), strict=True))
primitives.curves({name: (range(1, 11), values) for name, values in lines.items()},
                  x="steps of stage 2", y="drift", log_y=True)

# %% [markdown]
# # At scale
# ## 3. Train
# The method in three stages, then stage 2 once more for every ablation. What is finished is not trained
# again. *Prediction:* stage 2 is the slowest per image (its gradient passes through the encoder, and the
# frozen copy encodes each batch too), stage 3 the fastest. The table of section 5 has the seconds, the first
# table of this page the images.

# %%
results = compare.measured(study, root, jobs)
method = [r for r in results if r.label == study[0].label]
rfd = {stage: [r.numbers["rfd"].value for r in stages.after(method, stage) if "rfd" in r.numbers] for stage in steps}
primitives.table([{"after stage": stage, "rFD": " ".join(map(primitives.number, v))} for stage, v in rfd.items()])

# %% [markdown]
# ## 4. The same images after each stage
# Below each stage its error, four times enlarged. *Prediction:* after stage 1 colours and places are right
# and details are gone, because the last layer never held them; stage 2 brings a part of them back.

# %%
stages.reconstructions(study, root)

# %% [markdown]
# ## 5. What each stage buys
# "latent moved" is the squared distance to the latent of stage 1 in units of its variance, "encoder moved"
# is 1 - cosine to the frozen VFM. The paper's numbers (ImageNet 256) stand beside: only their order
# compares. *Prediction:* rFD falls with each stage; the linear probe falls a little in stage 2 and stays as
# it is in stage 3, which leaves the encoder alone.

# %%
primitives.table(stages.stage_records(study, results, root))

# %% [markdown]
# ## 6. Ablations of stage 2
# All rows after stage 2. *Prediction:* without preservation (w_sp 0) the latent moves furthest and the
# probe falls; w_sp 5 keeps more and reconstructs less; an anchor before the adapter leaves the latent free
# to move.

# %%
primitives.table(stages.ablation_records(study, results, root))

# %%
stages.trade_off(results)

# %% [markdown]
# ## 7. Where is the semantics?
# The first three principal components of the latent as colours. *Prediction:* where preservation is on,
# objects stay regions of one colour, as after stage 1.

# %%
stages.latents(study, root)

# %% [markdown]
# ## Predictions

# %%
verdicts()

# %% [markdown]
# ## Finding
# Three seeds at `pocket` (N = 4000), by `vfmlab claims a --only anchor cosine forgetting stages`
# (`docs/results/claims.md`), mean (each seed); the paper's numbers stand beside:
#
# | after stage | paper: rFID | rFD | PSNR (dB) | linear probe |
# |---|---|---|---|---|
# | 1 latent | 1.63 | 1.27 (1.23, 1.34, 1.23) | 21.2 (21.2, 21.1, 21.2) | 0.882 (0.88, 0.879, 0.888) |
# | 2 perceptual | 0.36 | 0.635 (0.697, 0.645, 0.564) | 23.8 (23.7, 23.5, 24.3) | 0.869 (0.867, 0.863, 0.876) |
# | 3 refine | 0.26 | 0.611 (0.678, 0.587, 0.57) | 24.2 (24.1, 23.8, 24.8) | 0.869 (0.867, 0.863, 0.876) |
#
# - Stage 2 halves rFD, as predicted (**supported**). Stage 3 takes 4 % off, between -15 and +26 %: undecided.
# - The probe falls a little in stage 2, and in stage 3 it stays what it is, as predicted.
# - Stage 2 is the slowest per image, as predicted. Stage 3 is not the fastest: stage 1 takes as long.
#
# | after stage 2 | paper: rFID, probe (%) | rFD | linear probe |
# |---|---|---|---|
# | w_sp 0 | 0.33, 9.5 | 0.414 (0.444, 0.412, 0.385) | 0.744 (0.727, 0.747, 0.759) |
# | w_sp 1 | 0.36, 35.1 | 0.635 (0.697, 0.645, 0.564) | 0.869 (0.867, 0.863, 0.876) |
# | w_sp 1, before the adapter | 0.34, 15.6 | 0.486 (0.531, 0.498, 0.43) | 0.849 (0.849, 0.843, 0.854) |
# | w_sp 1, cosine | 0.37, 38.0 | 0.587 (0.637, 0.58, 0.543) | 0.857 (0.851, 0.852, 0.869) |
#
# - The preservation loss stops the encoder from forgetting: probe +0.124, between +0.11 and +0.139
#   (**supported**), and takes a quarter of the rFD that stage 2 could win.
# - Where the anchor stands, and L2 or cosine: gFD -0.04 and +0.36, both +-1.1 (**undecided**).
# - w_sp 5 has seed 0 alone: rFD 0.857, probe 0.878, the published direction.
#
# The small scale is a limit: drawn scenes, minutes of training, no adversarial term, and a small VFM whose
# last layer keeps less of the pixels than DINOv2's.
#
# ## What next
# `-p seeds 3` gives the differences a spread; `vfmlab train pocket_aligntok_random` is the control that
# separates semantics from the recipe; `10_compare_and_report` asks what the latents are worth to a diffusion
# model.
