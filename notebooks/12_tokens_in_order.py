# %% [markdown]
# # Does a codebook stay alive, and how are its codes drawn?
#
# **Question.** A quantised tokenizer says an image with a few codes. Why do most entries of a plain codebook
# die in the first steps, and what brings them back? And how does a generator draw an image from them, one
# code after the other?
#
# A token's code is its nearest entry, and only an entry that is chosen gets a gradient. SimVQ
# (arXiv 2411.02038) makes all entries one linear map of frozen random vectors: a step for one of them moves
# them all.

# %% tags=["parameters"]
preset = "pocket_vqgan"
overrides = "{}"
root = "runs"
seed = 0
headless = False
entries = 1024
steps = 300
quantisers = "vq,cosine,simvq"  # variants of the preset in section 5; more: fsq, lfq, ema
draws = 400  # steps of the small generator in section 7

# %%
import math

import torch
from torch.nn import functional as F

import vfmlab
from vfmlab import config, vfm, widgets
from vfmlab.ar import sampling
from vfmlab.ar.llamagen import CodeShape
from vfmlab.evaluation.instruments.codebook import perplexity
from vfmlab.plots import primitives
from vfmlab.registry import QUANTIZERS, TOKEN_NETWORKS
from vfmlab.seeding import SampleRandom
from vfmlab.studies import show
from vfmlab.widgets import expect, less, verdicts

widgets.set_up_notebook()
run = vfmlab.resolve(preset, overrides, seed=seed).tokenizer_phase

# %%
images, labels, names = vfmlab.data.examples(run.data, n=16, seed=seed)
vision = vfm.build(config.VFM(name="pocket"), run.data.size)

# %%
maps = vision.features(images, (-1,)).maps[-1]  # B D h w
tokens = maps.flatten(2).transpose(1, 2)  # B N D
tokens = tokens / tokens.std()
print(tuple(tokens.shape), "tokens of the pocket VFM's last layer")

# %%
expect("exactly the chosen entries get a gradient", lambda: torch.equal(moved, counts > 0))
expect("one step of SimVQ moves every entry", lambda: bool(shifted.all()))
expect("SimVQ ends with more entries in use than the plain codebook",
       lambda: less(use["vq"][1][-1], use["simvq"][1][-1]))
expect("the plain codebook loses entries on the way", lambda: less(use["vq"][1][-1], max(use["vq"][1])))
first_kind, *_, last_kind = quantisers.split(",")
expect(f"in the tokenizer, {last_kind} uses more entries than {first_kind}",
       lambda: less(reports[first_kind]["codebook_used"], reports[last_kind]["codebook_used"]))
expect(f"{last_kind} has the higher PSNR", lambda: less(reports[first_kind]["psnr"], reports[last_kind]["psnr"]))
expect("the generator's first loss is ln K", lambda: abs(losses[0] - math.log(shape.entries)) < 1e-3)
expect("what a code follows says more than how often it is there", lambda: less(losses[-1], alone))
expect("drawn by hand is drawn by the library", lambda: torch.equal(made, library))

# %% [markdown]
# # Step by step: a codebook
# ## 1. A quantiser by hand
# Entries begin near zero, uniform in (-1/K, 1/K), as VQGAN's do. *Prediction:* between entries that are all
# near zero the nearest one is a matter of direction, so at first many are chosen.

# %%
torch.manual_seed(seed)
width = tokens.shape[-1]
codebook = torch.empty(entries, width).uniform_(-1 / entries, 1 / entries).requires_grad_()
# |z - e|^2 but for |z|^2, which is the same for all entries and would take digits from their differences
distance = codebook.square().sum(-1) - 2 * tokens.flatten(0, 1) @ codebook.t()  # BN K
codes = distance.argmin(-1)
counts = codes.bincount(minlength=entries)
assert counts.sum() == len(codes)
used = int((counts > 0).sum())
print(f"{used} of {entries} entries are used by {len(codes)} tokens; perplexity {perplexity(counts):.1f}")

# %% [markdown]
# ## 2. One step, of a codebook and of SimVQ
# Codebook loss |sg(z) - e|^2 and commitment 0.25 |z - sg(e)|^2, by hand, and the gradient of every entry.
# *Prediction:* exactly the chosen entries have one.

# %%
x = tokens.flatten(0, 1)
chosen = codebook[codes]
loss = (chosen - x).square().mean() + 0.25 * (x - chosen.detach()).square().mean()
(gradient,) = torch.autograd.grad(loss, codebook)
moved = gradient.abs().sum(1) > 0
assert torch.equal(moved, counts > 0)
library = QUANTIZERS.get("vq")(QUANTIZERS.get("vq").Config(size=entries), width)
library.weight.data = codebook.detach().clone()
out = library(tokens)
print(f"by hand {loss.item():.6f}, the library's {out.loss.item():.6f}; {int(moved.sum())} entries move")
torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-6)
assert (out.indices.flatten() == codes).float().mean() > 0.999  # the order of a sum may decide a tie

# %% [markdown]
# The same step of SimVQ. Its entries are C W^T: C is drawn once and frozen, W alone is trained. *Prediction:*
# W gets its gradient from the chosen entries, and a step along it moves all of them.

# %%
vectors = torch.randn(entries, width) / width**0.5  # C
W = torch.nn.Linear(width, width, bias=False).weight
mapped = vectors @ W.t()  # K D
near = (mapped.square().sum(-1) - 2 * x @ mapped.t()).argmin(-1)
loss = (mapped[near] - x).square().mean() + 0.25 * (x - mapped[near].detach()).square().mean()
(gradient,) = torch.autograd.grad(loss, W)
shifted = (vectors @ (W - 0.1 * gradient).t() - mapped).norm(dim=1) > 0
library = QUANTIZERS.get("simvq")(QUANTIZERS.get("simvq").Config(size=entries), width)
library.vectors.copy_(vectors)
library.map.weight.data = W.detach().clone()
out = library(tokens)
torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-6)
assert (out.indices.flatten() == near).float().mean() > 0.999
print(f"{len(near.unique())} of {entries} entries are chosen, {int(shifted.sum())} move")

# %% [markdown]
# ## 3. Many steps
# A linear encoder in front, a linear decoder behind, and how many entries the tokens use after each step.
# *Prediction:* all codebooks lose entries at first. The plain one keeps losing, because entries that moved
# towards the tokens win everything; SimVQ, whose map has to grow first, comes back, and goes on doing so.

# %%
use, lost, ends, kinds = {}, {}, {}, ("vq", "cosine", "simvq")
variance = (tokens - tokens.mean((0, 1))).square().mean()
for kind in kinds:
    torch.manual_seed(seed)
    quantiser = QUANTIZERS.get(kind)(QUANTIZERS.get(kind).Config(size=entries), 32).train()
    encoder, decoder = torch.nn.Linear(width, 32), torch.nn.Linear(32, width)
    parts = torch.nn.ModuleList([encoder, quantiser, decoder])
    optimiser = torch.optim.Adam(parts.parameters(), lr=3e-3)
    use[kind] = ([], [])
    for step in range(steps):
        out = quantiser(encoder(tokens))
        error = (decoder(out.latent) - tokens).square().mean()
        optimiser.zero_grad(), (error + out.loss).backward(), optimiser.step()
        use[kind][0].append(step), use[kind][1].append(len(out.indices.unique()))
    lost[kind], ends[kind] = float(error.detach() / variance), out.indices.flatten()

# %%
primitives.curves(use, x="step", y="entries used")

# %%
primitives.table([{"quantiser": k, "used": use[k][1][-1], "error / variance": f"{lost[k]:.3f}"}
                  for k in kinds])

# %% [markdown]
# ## 4. An entry for every token?
# How many tokens each entry has at the end, most frequent first. A flat line would be a codebook whose every
# entry says as much as the others. *Prediction:* all fall steeply: background is most of a scene.

# %%
ordered = {k: ends[k].bincount(minlength=entries).sort(descending=True).values.tolist()[:100] for k in kinds}
primitives.curves({k: (range(len(v)), v) for k, v in ordered.items()}, x="entry, by frequency", y="tokens")

# %% [markdown]
# # At scale
# ## 5. In a tokenizer
# The preset with each quantiser, everything else the same, trained where it is not there yet.
# `codebook_used` is the share of entries that any held-out image has. *Prediction:* where the encoder learns
# too, the order of section 3 stays, and a collapsed codebook costs PSNR.

# %%
trained, reports = {}, {}
for kind in quantisers.split(","):
    one = vfmlab.resolve(f"{preset}+{kind}", overrides, seed=seed).tokenizer_phase
    await widgets.train(one, root, headless)
    trained[kind], reports[kind] = vfmlab.load_tokenizer(one.id, root), vfmlab.evaluate(one.id, root)
shown = ("codebook_used", "codebook_perplexity", "psnr", "rfd")
primitives.table([{"quantiser": kind} | {k: f"{report[k].value:.3g}" for k in shown}
                  for kind, report in reports.items()])

# %%
show.reconstructions(trained, images[:8])

# %% [markdown]
# # Step by step: a generator
# ## 6. Codes are all there is
# Images decoded from codes alone, and from codes of which a quarter are drawn anew. *Prediction:* a wrong
# code spoils its own place and little else, because the decoder is convolutional.

# %%
tokenizer = trained[quantisers.split(",")[-1]]
codes = tokenizer.codes(images[:8].to(tokenizer.stat_mean.device))  # B T
random = torch.Generator().manual_seed(seed)
other = torch.randint(tokenizer.codebook_size, codes.shape, generator=random).to(codes)
wrong = torch.rand(codes.shape, generator=random).to(codes.device) < 0.25
spoiled = tokenizer.decode_codes(torch.where(wrong, other, codes)).cpu()
print(f"{codes.shape[1]} codes of {tokenizer.codebook_size}: {codes[0, :8].tolist()} ...")
rebuilt = tokenizer.decode_codes(codes).cpu()
primitives.rows({"image": images[:8], "codes": rebuilt, "a quarter wrong": spoiled})

# %% [markdown]
# ## 7. A generator, by hand
# LlamaGen's transformer, small, reads [class, code 0 .. code T - 2] and gives logits of [code 0 .. code
# T - 1]; a tenth of the labels is replaced by "no class". *Prediction:* its output begins at zero, so the
# first loss is ln K; the last is below the entropy of the codes' frequencies, which know no order.

# %%
torch.manual_seed(seed)
many, classes, named = vfmlab.data.examples(run.data, n=512, seed=seed + 1)
shape, device = CodeShape.of(tokenizer), tokenizer.stat_mean.device
known = torch.cat([tokenizer.codes(part.to(device)) for part in many.split(64)]).cpu()  # N T
kind, none = TOKEN_NETWORKS.get("llamagen"), int(classes.max()) + 1
network = kind(kind.Config(width=64, depth=2, heads=4, multiple=32), shape, none).train()
optimiser, losses = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05), []
for _ in range(draws):
    rows = torch.randint(len(known), (32,))
    given = torch.where(torch.rand(32) < 0.1, none, classes[rows])
    loss = F.cross_entropy(network(given, known[rows]).flatten(0, 1), known[rows].flatten())
    optimiser.zero_grad(), loss.backward(), optimiser.step()
    losses.append(loss.item())

# %%
often = known.flatten().bincount(minlength=shape.entries) / known.numel()
alone = float(-(often[often > 0] * often[often > 0].log()).sum())
print(f"nats a code: ln K {math.log(shape.entries):.2f}, frequencies {alone:.2f}, last loss {losses[-1]:.2f}")
primitives.curves({"generator": (range(len(losses)), losses)}, x="step", y="nats a code")

# %% [markdown]
# ## 8. Code by code
# Each code is drawn where the sum of the probabilities passes a uniform number of the image's own; keys and
# values of what was drawn stay in a cache. Places that are not drawn yet show the most frequent code.
# *Prediction:* this loop draws what the library draws.

# %%
network.eval()
label = torch.full((4,), int(classes[0]))
u, cache = SampleRandom(seed, range(4)).rand(shape.tokens), network.cache(4)
made, frames = torch.full((4, shape.tokens), int(often.argmax())), {}
logits = network.first(label, cache)  # B K
for k in range(shape.tokens):
    made[:, k] = sampling.choose(torch.softmax(logits, dim=1), u[:, k])
    if (k + 1) % max(1, shape.tokens // 4) == 0:
        frames[f"{k + 1} codes"] = tokenizer.decode_codes(made.to(device)).cpu()
    if k + 1 < shape.tokens:
        logits = network.next(made[:, k], cache)
library = sampling.sample(network, label, SampleRandom(seed, range(4)))
assert torch.equal(made, library)
primitives.rows(frames, title=named[0])

# %% [markdown]
# ## 9. Guidance
# Logits under the class, led away from those under none: u + s (c - u). *Prediction:* with s the images of
# one class become more alike.

# %%
guided = {}
for scale in (1.0, 2.0, 6.0):
    random, strength = SampleRandom(seed, range(4)), config.Guidance(scale=scale)
    found = sampling.sample(network, label, random, guidance=strength)
    guided[f"guidance {scale:g}"] = tokenizer.decode_codes(found.to(device)).cpu()
primitives.rows(guided)

# %% [markdown]
# ## Predictions

# %%
verdicts()

# %% [markdown]
# ## Finding
# One run of 2026-11-28, `pocket_vqgan`, seed 0. Section 3, 1024 tokens of 16 images; entries used of 1024:
#
# | quantiser | step 0 | 10 | 50 | 100 | 200 | 300 | error / variance |
# |---|---|---|---|---|---|---|---|
# | vq | 120 | 41 | 14 | 14 | 13 | 14 | 0.364 |
# | cosine | 132 | 54 | 18 | 21 | 30 | 44 | 0.274 |
# | simvq | 110 | 22 | 45 | 32 | 54 | 68 | 0.311 |
#
# All lose at first; the plain codebook does not come back, the others do, as predicted. More entries in use did
# not mean a smaller error: cosine, which compares directions alone, uses fewer than SimVQ and loses less.
#
# Section 5, 15,360 images, 1,000 held out:
#
# | quantiser | entries used | perplexity | PSNR | rFD |
# |---|---|---|---|---|
# | vq | 4 % | 24 | 20.9 dB | 2.48 |
# | cosine | 43 % | 200 | 23.9 dB | 0.99 |
# | simvq | 78 % | 266 | 22.6 dB | 1.49 |
#
# The same order as in section 3, both ways: a collapsed codebook costs 2 to 3 dB, and the one with the most
# entries in use is not the one with the best images. One seed: between cosine and SimVQ it settles nothing.
# Three seeds are in `docs/results/claims_codes.md`.
#
# Write down for your own run which quantiser ends with the most entries in use, and whether more use went
# with a higher PSNR. They need not agree.
#
# ## What next
# A generator at scale on the same codes: `vfmlab train pocket_vqgan+simvq@pocket_ar`, or RAR's network in
# random orders, `@pocket_rar`; then `vfmlab sample RUN --guidance 2`.
# More steps, `-p steps 2000`: how far does SimVQ climb? Change the width of section 5 with
# `-p overrides '{"tokenizer.channels": 4}'`: does a plain codebook live longer in few dimensions? At three
# seeds 4 % of it is in use at width 4 as at 8 (`docs/results/findings.md`).
# `07_train_diffusion` shows the other kind of generator, which needs no codes.
