# %% [markdown]
# # Train latent diffusion
#
# **Question.** How fast does the same small DiT learn the latents of this tokenizer?
#
# First half: flow matching by hand, one step and one sampler, checked against a case with a closed form.
# Second half: the whole training.

# %% tags=["parameters"]
preset = "pocket_vfm_vae"
overrides = "{}"
root = "runs"
seed = 0
headless = False

# %%
import torch

import vfmlab
from vfmlab import runs, widgets
from vfmlab.plots import figures, primitives
from vfmlab.studies import probing, show, sweep
from vfmlab.widgets import close, expect, less, verdicts

widgets.set_up_notebook()
run = vfmlab.resolve(preset, overrides, seed=seed)
primitives.table([{"part": k, "value": v} for k, v in show.describe_run(run).items()])

# %%
expect("an untrained network, which says 0, scores 2: the variance of noise minus data",
       lambda: close(by_hand[0], 2, within=0.3))
expect("half the step, half the error of Euler", lambda: close(errors[100] / errors[200], 2, within=0.1))
expect("gFD falls over the training", lambda: less(gfd[-1], gfd[0]))
expect("so does gFD to own reconstructions", lambda: less(own[-1], own[0]))
expect("the error by time is largest in the noisy half", lambda: less(0.5, hardest))
expect("samples are nearer to reconstructions than to images", lambda: less(report["gfd_own"], report["gfd"]))

# %% [markdown]
# # Step by step
# ## 1. One step, opened
# The tokenizer is trained first if it is not there yet. Then one step of the diffusion training: clean
# latents, a time for each, the noisy latent, the velocity that is wanted and the one that is predicted.
# Latents have zero mean and unit variance, so that noise is as large as what it is mixed with.

# %%
await widgets.train(run.tokenizer_phase, root, headless)
step = vfmlab.open_step(run, root, phase="diffusion", fp32=True)
tensors = {"z": step.z, "t": step.t, "noisy": step.noisy, "target": step.target, "predicted": step.velocity}
with torch.no_grad():
    facts = {name: {"shape": str(list(x.shape)), "mean": x.mean().item(), "std": x.std().item()}
             for name, x in tensors.items()}
primitives.table([{"tensor": name} | fact for name, fact in facts.items()])

# %% [markdown]
# ## 2. The same by hand
# The path is a straight line from data (t = 0) to noise (t = 1), so its velocity is noise minus data. From
# what the step wants, the noise can be solved for; it must be a standard normal. The loss is a mean square.

# %%
noise = step.target + step.z
t = step.t[:, None, None, None]  # B 1 1 1
noisy = (1 - t) * step.z + t * noise
loss = (step.velocity - (noise - step.z)).square().mean()
print(f"noise: mean {noise.mean():+.3f}, std {noise.std():.3f}; loss by hand {loss:.6f}")
torch.testing.assert_close(noisy, step.noisy, rtol=0, atol=1e-5)
if not run.diffusion.cosine_loss:
    torch.testing.assert_close(loss, step.terms["velocity"].value, rtol=1e-4, atol=1e-5)

# %%
step.explain()

# %% [markdown]
# ## 3. Which times are drawn, and where is it hard?
# Ten steps by hand, with PyTorch's own optimiser. First the loss of each batch, then the mean over all images
# of these batches whose times fall into the same tenth. Near data the noise cannot be separated from a latent
# that hardly has any, near noise the data cannot.

# %%
optimizer = torch.optim.AdamW(step.parameters, lr=run.diffusion.train.lr)
by_hand, dots = [], []
for _ in range(10):
    optimizer.zero_grad()
    step.loss.backward()
    optimizer.step()
    by_hand.append(step.loss.item())
    dots += zip(step.t.tolist(), step.pieces.flow.velocity.tolist(), strict=True)
    step = step.next()
figure = primitives.curves({"loss of a batch": (range(10), by_hand)}, x="step", y="loss")
figure

# %%
times, losses = torch.tensor(dots).unbind(1)
tenth = (10 * times).long().clamp(max=9)
level = {0.1 * k + 0.05: losses[tenth == k].mean().item() for k in tenth.unique().tolist()}
primitives.curves({"mean loss": (list(level), list(level.values()))}, x="t (0 data, 1 noise)", y="loss of an image")

# %% [markdown]
# ## 4. A sampler in five lines
# Start from noise, follow the velocity back to the data. Where data are a Gaussian, N(m, s^2), the perfect
# velocity is known, and the way from noise x to data is the line m + s x: the error is all Euler's.

# %%
def euler(velocity, x, steps):
    """From noise (t = 1) to data (t = 0) in equal steps."""
    for k in range(steps):
        x = x - velocity(x, 1 - k / steps) / steps
    return x


def gaussian(x, t, m=2.0, s=0.5):
    """E[noise - data | x at t] for data N(m, s^2)."""
    off = (x - (1 - t) * m) / ((1 - t) ** 2 * s**2 + t**2)
    return t * off - (m + (1 - t) * s**2 * off)


x = torch.randn(4096, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
errors = {n: (euler(gaussian, x, n) - (2.0 + 0.5 * x)).abs().mean().item() for n in (25, 50, 100, 200, 400)}
assert errors[400] < 0.01
primitives.curves({"error of Euler": (list(errors), list(errors.values()))}, x="steps", y="error", log_y=True)

# %% [markdown]
# # At scale
# ## 5. Train
# The images are encoded once into a latent cache, and the DiT learns the velocity. *Prediction:* the loss
# flattens early, long before the samples are good: in flow matching it says little about sample quality.

# %% tags=["train:diffusion"]
await widgets.train(run, root, headless)
folder = runs.open_run(run.id, root)
figures.training_curves([folder])

# %% [markdown]
# ## 6. Your sampler on the trained network
# The five lines above, the library's noise, guidance off: the pictures are the library's.

# %%
model = vfmlab.load_diffusion(run.id, root)
labels = torch.arange(min(8, model.num_classes), device=model.device)
start = torch.randn(len(labels), *model.tokenizer.latent_shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def velocity(x, t):
    return model.network(x, torch.full((len(x),), t, device=x.device), labels)


pictures = {"noise": start[:, :3].clamp(-1, 1)}
if run.diffusion.class_token is None:
    mine = model.tokenizer.decode(euler(velocity, start.to(model.device), 20)).cpu()
    how = {"guidance": 1.0, "steps": 20, "sampler": {"solver": "euler", "shift": 1.0}}
    *_, theirs = vfmlab.sample(model, labels.tolist(), noise=start, previews=0, **how)
    torch.testing.assert_close(mine, theirs.images, rtol=0, atol=1e-2)
    pictures = {"by hand": mine, "the library": theirs.images}
primitives.rows(pictures)

# %% [markdown]
# ## 7. Quality over training
# Frechet distance of samples (gFD) to real images and to the tokenizer's own reconstructions, and how many
# samples a judge recognises as the class they were asked to be. *Prediction:* both distances fall together.

# %%
points = [point for point in folder.metrics("evaluation") if "gfd" in point]
gfd, own = ([point[key]["value"] for point in points] for key in ("gfd", "gfd_own"))
figures.convergence([folder])

# %% [markdown]
# ## 8. Samples, raw weights and averaged weights
# One column per class, same noise. *Prediction:* the averaged (EMA) weights draw cleaner shapes.

# %%
show.sample_rows(run.id, root, variants={"EMA": {"ema": True}, "raw": {"ema": False}}, per_class=1, seed=seed)

# %% [markdown]
# ## 9. One step back from any time
# The estimate of the clean latent from one call of the network, x - t v, decoded, for images noised to
# time t.

# %%
images, classes, _ = vfmlab.data.examples(run.data, n=len(labels), seed=seed)


@torch.no_grad()
def one_call(t):
    z = model.tokenizer.encode(images.to(model.device)).mode()
    x = (1 - t) * z + t * start.to(z)
    v = model.network(x, torch.full((len(x),), t, device=x.device), classes.to(x.device))
    return primitives.rows({"image": images, f"estimate from t = {t:g}": model.tokenizer.decode(x - t * v).cpu()})


alone = run.diffusion.class_token is None  # a network with a class token needs one beside the latents
widgets.choose(one_call, headless, t=[0.5, 0.2, 0.8, 0.95]) if alone else "this network denoises a token, too"

# %% [markdown]
# ## 10. Where on the path is the error?
# The loss by time bin on held-out latents. *Prediction:* highest in the middle-to-noisy part, where the
# class is decided.

# %%
lines = probing.loss_by_time(run.id, root, seed=seed)
hardest = max(zip(*lines[run.id], strict=True), key=lambda point: point[1])[0]
primitives.curves(lines, x="t (0 data, 1 noise)", y="velocity error / target power")

# %% [markdown]
# ## 11. What a sweep collects
# The numbers under the run's protocol, and one sample per class; see `vfmlab sweep`.

# %%
samples = show.class_samples(run.id, root, seed=seed)
report = vfmlab.evaluate(run.id, root, protocol=run.protocol)
sweep.result(report, images=samples)

# %% [markdown]
# ## Predictions

# %%
verdicts()

# %% [markdown]
# ## Finding
# Ours, executed on 29 November 2026: pocket tier, generator trained by Muon, seed 0, N = 1000 (`55f08ee0`).
#
# | images seen | gFD | gFD to own reconstructions | class accuracy |
# |---|---|---|---|
# | 12,800 | 35.2 | 32.9 | 0.194 |
# | 25,600 | 21.5 | 19.9 | 0.396 |
# | 51,200 | 15.6 | 14.3 | 0.577 |
#
# - Nearly all of gFD is the generator's: to the tokenizer's own reconstructions it is 14.3, and rFD is
#   0.224.
# - The loss flattens early, as predicted: from 14,080 images to the end it falls from 0.54 to 0.41, while
#   gFD falls to less than half.
# - **Wrong: the error over time.** In units of the target's power it is largest next to the *data* (0.42 at
#   t = 0.05), where the noise in a latent cannot be seen, smallest at 0.45 (0.14), and rises to 0.26 at
#   0.95.
# - By eye, EMA weights draw the cleaner shapes, as predicted. Squares and triangles have soft corners still.
#
# One seed: no verdict beside any other tokenizer; another training of the same recipe and seed came to 15.3
# (`10_compare_and_report`). Three seeds are in `docs/results/scenes.md` (N = 4000,
# `6b8a2033`): 15.6, 15.6 and 14.4 after 51,200 images. With AdamW (`+adamw`, `docs/results/tokenizers.md`,
# seeds 0 and 1) the same latents gave 26.5 and 24.7. `10_compare_and_report` sets two tokenizers side by
# side.
#
# ## What next
# `09_sampling_and_guidance` plays with the sampler; `10_compare_and_report` compares.
