# %% [markdown]
# # Alignment on the diffusion side
#
# **Question.** A tokenizer can be aligned with a vision foundation model, and so can the network that is
# trained on its latents: REPA reads an early block out to the VFM's patch tokens, REG lets the network
# denoise the VFM's class token beside the latents, and VFM-VAE's joint recipe does both on aligned latents.
# What does each add, and is it more or less where the latents are aligned already?
#
# At the small tiers the target is the pocket VFM, which has never seen a label of these scenes. VFM-VAE's
# latents are made from this very model, so there the target holds nothing that is not in the latents;
# to the plain VAE's latents it adds what they lack.
#
# At `pocket` these are two tokenizers and nine generators, of about four minutes each on one core:
# three quarters of an hour. `-p settings repa` has five generators.

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
import torch
from torch.nn import functional as F

import vfmlab
from vfmlab import seeding, widgets
from vfmlab.diffusion import path
from vfmlab.plots import figures, primitives
from vfmlab.studies import alignment, compare, probing, reuse
from vfmlab.widgets import close, expect, less, verdicts

widgets.set_up_notebook()
study = alignment.rows(preset, baseline, overrides, range(seed, seed + seeds), settings)
primitives.table(alignment.plan_records(study))

# %%
last = settings.split(",")[-1]
expect("REPA's gradient ends at its block", lambda: norms["REPA"][-1] == 0)
expect("with stop-gradient none of it reaches the network", lambda: not any(norms["REPA, stopped"]))
expect("before training the cosine with the target is near 0", lambda: close(cosine, 0, within=0.2))
for name in filter(None, (preset, baseline)):
    expect(f"{name}: {last} is ahead of none", lambda name=name: less(gfd[f"{name} {last}"], gfd[f"{name} none"]))

# %% [markdown]
# # Step by step
# ## 1. REPA's cosine by hand
# One step of the aligned training (the tokenizer is taken from `root`, or is an untrained one). Tokens after
# an early block go through a small read-out and must point where the VFM's tokens of the clean image point.

# %%
step = vfmlab.open_step(vfmlab.resolve(f"{preset}+repa", overrides, seed=seed), root, phase="diffusion", fp32=True)
block = step.task.run.diffusion.alignment.block
tokens, goal = step.pieces.flow.read[block], step.batch.target.flatten(2).transpose(1, 2)
read = step.task.objective.projection.read
print(f"tokens after block {block}: {list(tokens.shape)}, of the VFM: {list(goal.shape)}")


def repa(tokens):
    """B N D tokens after the block -> 1 - cosine with the VFM's, mean over tokens and images."""
    return 1 - F.cosine_similarity(read(tokens), goal, dim=-1).mean()


torch.testing.assert_close(repa(tokens), step.terms["alignment"].value, rtol=0, atol=1e-6)
cosine = 1 - repa(tokens).item()
step.explain()

# %% [markdown]
# ## 2. Where the gradient goes
# The gradient of three losses, block by block: the velocity, REPA, and REPA on tokens that are cut off from
# the network (`detach`), which trains the read-out alone. A few steps are taken first, because a fresh DiT
# begins with closed gates.

# %%
optimizer = torch.optim.AdamW(step.parameters, lr=1e-3)
for _ in range(5):
    optimizer.zero_grad()
    step.loss.backward()
    optimizer.step()
    step = step.next()
goal = step.batch.target.flatten(2).transpose(1, 2)
tokens, blocks = step.pieces.flow.read[block], [*step.network.blocks]

# %%
def norm(loss, module):
    """Of the gradient of `loss` at all parameters of `module`."""
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    return sum(g.square().sum().item() for g in found if g is not None) ** 0.5


losses = {"velocity": step.terms["velocity"].value, "REPA": repa(tokens), "REPA, stopped": repa(tokens.detach())}
norms = {name: [norm(loss, module) for module in blocks] for name, loss in losses.items()}
assert norm(losses["REPA, stopped"], read) > 0
primitives.curves({k: (range(1, len(blocks) + 1), v) for k, v in norms.items()}, x="block", y="gradient norm")

# %% [markdown]
# ## 3. Do the two gradients agree?
# The cosine of REPA's gradient with the velocity's, block by block: above 0 alignment helps the velocity
# along, below 0 they pull apart. And how REPA's weight changes what reaches block 1.

# %%
def gradient(loss, module):
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None] or [torch.zeros(1)])


def weighed(weight):
    """Gradients of block 1: velocity, weight times REPA, and their sum."""
    a, b = gradient(losses["velocity"], blocks[0]), weight * gradient(losses["REPA"], blocks[0])
    angle = F.cosine_similarity(a, b, dim=0).item()
    shown = {"velocity": a.norm().item(), "REPA": b.norm().item(), "together": (a + b).norm().item()}
    return primitives.bars(shown, y="gradient norm at block 1", title=f"weight {weight:g}, cosine {angle:.2f}")


widgets.choose(weighed, headless, weight=[0.5, 0.1, 1.0, 4.0])

# %% [markdown]
# ## 4. REG's token
# The VFM's global token is one more token of the network's input: scaled to zero mean and unit variance over
# the data set, mixed with noise at the image's time, and denoised beside the latents. Numbers are drawn in
# the order in which the step draws them, so that the token's loss by hand is the library's. A fresh network
# answers 0: the first loss is the mean square of noise - token, about 2.

# %%
joint = vfmlab.open_step(vfmlab.resolve(f"{preset}+reg", overrides, seed=seed), root, phase="diffusion", fp32=True)
token = joint.task.objective.scale(joint.batch.token)  # B D
print(f"token {list(token.shape)}: mean {token.mean():+.2f}, std {token.std():.2f} over this batch")
joint.explain()

# %%
diffusion = joint.task.run.diffusion
random = seeding.StepRandom(joint.task.seed, joint.number, len(token), device=token.device)
random.randn(*joint.z.shape[1:])  # the noise of the latents
t = path.draw_times(diffusion.time, random)
labels = torch.where(random.rand() < diffusion.class_dropout, joint.network.num_classes, joint.labels)
noise = random.randn(token.shape[1])  # B D
noisy = (1 - t[:, None]) * token + t[:, None] * noise
out = joint.network(joint.noisy, t, labels, token=noisy)
by_hand = (out.v_class - (noise - token)).square().mean()
torch.testing.assert_close(by_hand, joint.terms["token_velocity"].value, rtol=0, atol=1e-6)
torch.testing.assert_close(out.v, joint.velocity, rtol=0, atol=1e-6)
weighed_sum = joint.terms["velocity"].value + diffusion.class_token.weight * by_hand
torch.testing.assert_close(weighed_sum, joint.loss, rtol=1e-6, atol=1e-6)
print(f"by hand {by_hand.item():.4f}, in the sum times {diffusion.class_token.weight:g}")

# %% [markdown]
# # At scale
# ## 5. Train
# Each tokenizer once, then one diffusion model per setting on its latents, all with the same noise, times
# and order of images. What is finished is not trained again. *Prediction:* alignment costs a few per cent
# of a step: targets are cached, and the read-out is small. Speeds compare only between rows that were
# trained side by side on a machine with nothing else to do.

# %%
results = compare.measured(study, root, jobs)
primitives.table(alignment.speed_records(study, root))

# %% [markdown]
# ## 6. Does the loss do what it says?
# *Prediction:* the cosine with the target rises quickly, and higher on VFM-VAE's latents, from which the
# target can almost be read off; the velocity loss itself hardly moves.

# %%
alignment.losses(study, root)

# %% [markdown]
# ## 7. Quality over training
# *Prediction:* the aligned rows lead early and the lead shrinks; it is larger on the plain VAE's latents.

# %%
alignment.convergence(study, root)

# %% [markdown]
# ## 8. Which block learns it, and when?
# Agreement (CKNNA) of every block with a reference over training, at t = 1/2 under the null label. First
# with the judge, a network of another architecture that no row is aligned with; then with REPA's own
# target, where there is one. *Prediction:* in the aligned rows the block with the read-out leads and the
# later blocks follow; without alignment the agreement grows slowly.

# %%
alignment.dynamics_maps(study, root)

# %%
aligned = any(row.run.diffusion.alignment for row in study)
alignment.dynamics_maps(study, root, target=True) if aligned else "no row has REPA"

# %% [markdown]
# ## 9. Both sides
# Down: the diffusion side, across: the tokenizer. *Prediction:* aligning the latents does more than
# aligning the network, and the two gains do not add up in full.

# %%
gfd = {r.label: [s.numbers["gfd"].value for s in results if s.label == r.label and "gfd" in s.numbers] for r in results}
primitives.table(alignment.two_sided(study, results))

# %%
alignment.samples(study, root, seed=seed)

# %% [markdown]
# ## 10. A guidance scale for the class token alone
# The token that REG generates can be guided like the latents, or left as it comes (scale 1). *Prediction:*
# the difference is small, because the token is one of many.

# %%
token = [row for row in study if row.run.diffusion.class_token is not None]
scales = {"1": {"scale": 1.0}, "1.5": {"scale": 1.5}, "1.5, token 1": {"scale": 1.5, "token": 1.0}}
records = probing.guidance_records(token[-1].run.id, root, scales) if token else []
primitives.table(records) if token else "no row has a class token"

# %% [markdown]
# ## 11. One encoding for several steps
# A DiT of encoder and head on the same latents. How alike are its blocks from one sampling step to the
# next, and what is lost when the encoder runs at every second, third, fourth step only? *Prediction:*
# neighbouring steps are alike except near the data; reusing the encoding loses less than taking fewer
# steps, but the head's share bounds what it can save.

# %%
split = alignment.split_row(preset, overrides, seed)
compare.measured([split], root, jobs)
times, alike = alignment.block_similarity(split, root)
figures.similarity_figure(times, alike, encoder=split.run.diffusion.network.depth)

# %%
records = reuse.records(split.run.id, root)
primitives.table(records)

# %%
figures.reuse_figure(records)

# %% [markdown]
# ## Predictions

# %%
verdicts()

# %% [markdown]
# ## Finding
# Executed on 28 November 2026, `pocket`, generators with Muon, seed 0, N = 1000; gFD, class accuracy:
#
# | diffusion side | VFM-VAE | plain VAE |
# |---|---|---|
# | none | 15.3, 0.574 | 20.8, 0.438 |
# | REPA | 14.0, 0.630 | 20.0, 0.498 |
# | REG | 15.0, 0.605 | 21.4, 0.428 |
# | joint | 15.1, 0.623 | 19.0, 0.489 |
#
# Aligning the latents does more than aligning the network: 5.5 gFD from column to column without alignment,
# at most 1.8 down a column. The lead of the aligned rows does not clearly shrink over training. One seed; in
# `docs/results/scenes.md` three seeds of the upper left row spread over 1.3 gFD, about as far as the gain
# of REPA: **undecided**, as is whether the two sides add up.
#
# Two seeds, generators with AdamW (`docs/results/alignment.md`, N = 1000), gFD as mean (seed 0, seed 1):
#
# | latents | none | REPA | change, seed by seed |
# |---|---|---|---|
# | VFM-VAE | 25.6 (26.5, 24.7) | 25.2 (25.4, 24.9) | -1.1, +0.2 |
# | plain VAE | 30.4 (30.2, 30.5) | 28.7 (29.1, 28.3) | -1.1, -2.2 |
#
# On VFM-VAE's latents the signs differ: **undecided**. On the plain VAE's gFD falls in both seeds, and with
# Muon too; that is a hint.
#
# Reuse of the encoder (section 11, N = 500): every 4th step costs 0.1 gFD, key steps cost none, and 10 of the 20
# steps without reuse cost 0.1 as well. Where fewer steps are as good, reuse buys nothing: here the sampler's 20
# steps are more than this network needs. The small scale is a limit: a network of four blocks, minutes of
# training, and a target that is itself small.
#
# ## What next
# `-p seeds 3` gives the differences a spread. `vfmlab train pocket_plain_vae_repa_e` tunes the tokenizer
# through the alignment loss too (REPA-E); `06_latent_space` asks what the latents of these tokenizers know
# before any diffusion model sees them.
