"""What is known of the recipes behind the `paper` presets, field by field, for `vfmlab.presets.published`."""

from __future__ import annotations

from typing import Any, NamedTuple

from vfmlab.presets.tiers import EPOCH

UNKNOWN = "unknown"


class Fact(NamedTuple):
    """field: dotted, `STAGE/FIELD` of a stage's settings. paper, release: what each says; `UNKNOWN`."""

    field: str
    paper: Any = UNKNOWN
    release: Any = UNKNOWN
    grade: str = ""
    note: str = ""

    @property
    def said(self) -> Any:
        """The release's value where it is known, else the paper's."""
        return self.paper if self.release is UNKNOWN else self.release


def paper(field: str, value: Any, note: str = "") -> Fact:
    return Fact(field, paper=value, grade="P", note=note)


def release(field: str, value: Any, note: str = "", paper: Any = UNKNOWN) -> Fact:
    return Fact(field, paper, value, "C" if paper is UNKNOWN else "P, C", note)


def noted(field: str, value: Any, note: str = "") -> Fact:
    return Fact(field, paper=value, grade="N", note=note)


def unknown(field: str, note: str = "ours") -> Fact:
    return Fact(field, note=note)


STEPS_OURS = "our budget"
ROUNDED = "64 epochs, rounded up to thousands"
KL = "1e-6 against a reconstruction that is summed over 3 x 256 x 256 values; here it is a mean"

# LightningDiT-XL/1 as VA-VAE, VFM-VAE and GAE train it.
LIGHTNING = (
    release("diffusion.network.kind", "lightningdit"), release("diffusion.network.size", "XL"), release("diffusion.network.patch", 1),
    release("diffusion.train.batch", 1024), release("diffusion.train.lr", 2e-4), release("diffusion.train.betas.1", 0.95),
    release("diffusion.cosine_loss", 1.0), release("diffusion.time.kind", "lognormal"),
)  # fmt: skip
SAMPLED = (
    release("protocol.sampler.solver", "euler"), release("protocol.sampler.steps", 250, "intervals; the release counts points, of which 250 make 249"),
    release("protocol.sampler.shift", 1 / 0.3, "0.3 in the release's time"),
)  # fmt: skip
OPEN = ("weight_decay", "schedule", "ema_halflife")
OPEN_DIT = tuple(unknown(f"diffusion.train.{name}") for name in OPEN)
SUMMED = (release("losses.kl.weight", 1e-6 / (3 * 256**2), KL),)


def rate(epochs: float, note: str = "") -> Fact:
    """Images that the generator sees."""
    return paper("diffusion.train.samples", round(epochs * EPOCH), note or f"{epochs:g} epochs")


FACTS: dict[str, tuple[Fact, ...]] = {
    "paper_vfm_vae": (
        release("vfm.name", "siglip2_l16_512"), release("vfm.upscale", 2.0), release("vfm.layers", (0, 12, -1)),
        release("tokenizer.channels", 32), release("tokenizer.factor", 16), release("tokenizer.projection", "attention"),
        release("data.crop", (0.5, 1.0), "whether side or area is drawn is unknown; ours: the side, uniformly"),
        release("data.least_side", 256), unknown("data.flip"),
        release("train.optimizer", "adam"), release("train.betas", (0.0, 0.99)), release("train.batch", 512),
        release("train.ema_halflife", 160_000), release("train.clip", None), unknown("train.schedule"), unknown("train.weight_decay"),
        release("strong/train.samples", 20_000_000), release("strong/train.lr", 1e-4), release("strong/losses.l1.weight", 1.0),
        release("strong/losses.lpips.weight", 10.0), release("strong/losses.kl.weight", 1e-6, "both sides are means"),
        release("strong/losses.multiscale.weight", 0.1), release("strong/losses.multiscale.until", 5_000_000),
        release("strong/losses.vf.weight", 5.0), release("strong/losses.vf.cos_margin", 0.0), release("strong/losses.vf.distance_margin", 0.0),
        release("strong/losses.vf.adaptive", True), release("strong/losses.adversarial.weight", 1.0),
        release("strong/losses.adversarial.loss", "hinge"), release("strong/losses.adversarial.discriminator", "projected"),
        release("strong/equivariance.p_latent", 0.5), release("strong/equivariance.p_prior", 0.25),
        release("strong/equivariance.scales", (0.25, 0.5, 0.75, 1.0)),
        release("weak/train.samples", 20_000_000), release("weak/losses.vf.weight", 1.0),
        release("ssim/train.samples", 1_000_000), release("ssim/train.lr", 5e-5), release("ssim/losses.kl", None),
        release("ssim/losses.vf", None), release("ssim/losses.lpips.weight", 2.0), release("ssim/losses.ssim.weight", 1.0),
        release("patchgan/train.samples", 3_000_000), release("patchgan/losses.l1", None), release("patchgan/losses.lpips", None),
        release("patchgan/losses.ssim", None), release("patchgan/losses.adversarial.weight", 1.0, "the first discriminator stays on"),
        release("patchgan/losses.adversarial:patch.weight", 1.0), release("patchgan/losses.adversarial:patch.loss", "lsgan"),
        release("patchgan/losses.adversarial:patch.discriminator.scales", 3),
        release("patchgan/losses.adversarial:patch.discriminator.norm", "virtual_batch", "over virtual batches of 8"),
        release("patchgan/losses.feature_matching.weight", 10.0), release("patchgan/equivariance.p_latent", 0.0),
        *LIGHTNING, rate(64, ROUNDED), *SAMPLED, *OPEN_DIT,
    ),
    "paper_vfm_vae_joint": (
        release("diffusion.network.kind", "sit"), release("diffusion.network.size", "XL"), release("diffusion.network.patch", 1),
        release("diffusion.network.qk_norm", True), release("diffusion.cosine_loss", 0.0), release("diffusion.class_token.weight", 0.03),
        release("diffusion.class_token.vfm", "dinov2_b14"), release("diffusion.alignment.weight", 0.5), release("diffusion.alignment.block", 8),
        release("diffusion.alignment.vfm", "dinov2_b14"), unknown("diffusion.time.kind", "ours: uniform, as SiT"), rate(80),
        release("protocol.sampler.solver", "sde"), release("protocol.sampler.steps", 250, "intervals, each with one evaluation"),
        unknown("protocol.sampler.shift"),
    ),
    "paper_va_vae": (
        release("vfm.name", "dinov2", "the size is unknown; ours: DINOv2-L/14"), release("tokenizer.channels", 32), release("tokenizer.factor", 16),
        release("losses.vf.weight", 0.1), release("losses.vf.cos_margin", 0.5), release("losses.vf.distance_margin", 0.25),
        release("losses.vf.adaptive", True), *SUMMED, release("losses.adversarial.weight", 0.5), unknown("losses.lpips.weight"),
        noted("train.samples", 160_000_000, f"listed by VFM-VAE; {STEPS_OURS} is smaller"), unknown("train.batch"), unknown("train.optimizer"), unknown("train.lr"),
        unknown("losses.adversarial.start"), *LIGHTNING, rate(64, ROUNDED), *SAMPLED, *OPEN_DIT,
    ),
    "paper_plain_vae": (
        release("tokenizer.channels", 32), release("tokenizer.factor", 16), *SUMMED, unknown("losses.lpips.weight"), unknown("losses.adversarial.weight"),
        unknown("train.samples"), unknown("train.batch"), unknown("train.optimizer"), unknown("train.lr"), *LIGHTNING, rate(64, ROUNDED), *SAMPLED, *OPEN_DIT,
    ),
    "paper_plain_vae_repa_e": (
        release("diffusion.tune.statistics", "batch", "of the diffusion loss; running ones for the tokenizer's step"),
        unknown("diffusion.network.kind", "ours: sit"), unknown("diffusion.network.size"), unknown("diffusion.network.patch"),
        unknown("diffusion.train.batch"), unknown("diffusion.train.lr"), unknown("diffusion.train.betas.1"), unknown("diffusion.cosine_loss"),
        unknown("diffusion.time.kind"), unknown("diffusion.alignment.weight"), unknown("diffusion.tune.weight"), unknown("diffusion.train.samples"),
        unknown("protocol.sampler.solver"), unknown("protocol.sampler.steps"), unknown("protocol.sampler.shift"),
    ),
    "paper_sd_vae": (
        release("tokenizer.channels", 4), release("tokenizer.factor", 8), unknown("diffusion.network.patch", "ours: 2, as many tokens as at f16"),
        unknown("diffusion.train.samples"),
    ),
    "paper_aligntok": (
        noted("vfm.name", "dinov2_l14"), noted("tokenizer.channels", 32), noted("tokenizer.factor", 16), noted("latent/losses.kl", None),
        noted("latent/losses.lpips.weight", 1.0), noted("latent/losses.adversarial.weight", 0.5),
        noted("perceptual/losses.preservation.weight", 1.0), noted("perceptual/losses.preservation.anchor", "after"),
        noted("perceptual/losses.preservation.distance", "l2"), unknown("tokenizer.adapter_width"), unknown("train.optimizer"), unknown("train.lr"),
        unknown("latent/train.samples"), unknown("perceptual/train.samples"), unknown("refine/train.samples"),
        noted("diffusion.network.kind", "lightningdit"), noted("diffusion.network.size", "XL"),
        unknown("diffusion.train.samples", "80 k steps; of 1024 images, which the source does not state, these are 64 epochs"),
        noted("protocol.sampler.steps", 30, "intervals, each with one evaluation"),
    ),
    "paper_aligntok_d64": (noted("tokenizer.channels", 64),),
    "paper_rae": (
        release("vfm.name", "dinov2_b14_reg"), release("tokenizer.channels", 768), release("tokenizer.noise", 0.8), unknown("tokenizer.noise_law"),
        release("data.crop", (2 / 3, 2 / 3), "resized to 384, random crop of 256; here the crop is cut first and resized once (Lanczos)"),
        release("losses.l1.weight", 1.0), release("losses.lpips.weight", 1.0), release("losses.adversarial.weight", 0.75),
        release("losses.adversarial.adaptive", True), release("losses.adversarial.discriminator", "rae_dino"),
        release("diffusion.network.kind", "ddt"), release("diffusion.time.kind", "lognormal", "of the current configuration"),
        release("diffusion.time.shift", (768 * 16**2 / 4096) ** 0.5, "sqrt of the latent's size over 4096"),
        unknown("train.samples"), unknown("train.batch"), unknown("train.lr"), unknown("diffusion.train.batch"), unknown("protocol.sampler.steps"),
    ),
    "paper_multi_layer_rae": (
        release("vfm.name", "dinov3_l16"), release("tokenizer.channels", 1024), release("tokenizer.last", 7), release("tokenizer.stride", 2),
        release("tokenizer.pooled", True), release("tokenizer.noise", 0.8), release("tokenizer.noise_law", "uniform"), release("tokenizer.noise_on", "raw"),
        release("tokenizer.places", True),
        release("train.ema_halflife", 161_000, "0.9978 a step"), release("losses.l1.weight", 1.0), release("losses.lpips.weight", 1.0),
        release("losses.adversarial.weight", 0.75),
        release("losses.adversarial.adaptive", True), release("train.batch", 512), release("train.optimizer", "adamw"),
        release("train.lr", 2e-4), release("train.schedule", "cosine", "falls to a tenth there, to zero here"), release("train.betas", (0.9, 0.95)),
        release("train.samples", 16 * EPOCH), unknown("train.clip"),
        release("losses.adversarial.start", 8 * EPOCH, "from epoch 8"), release("losses.adversarial.discriminator_start", 6 * EPOCH, "from epoch 6"),
    ),
    "paper_multi_layer_rae_raev2": (
        release("diffusion.network.kind", "raev2"), release("diffusion.network.width", 1440, paper=1152), release("diffusion.network.depth", 28),
        release("diffusion.network.heads", 20, paper=16), release("diffusion.network.head_width", 2048), release("diffusion.network.head_depth", 2),
        release("diffusion.network.head_heads", 16), release("diffusion.time.kind", "lognormal"), release("diffusion.time.shift", 8.0),
        release("diffusion.class_dropout", 0.1), release("diffusion.train.optimizer", "muon", "ours: AdamW; +muon changes it"),
        release("diffusion.train.lr", 2e-4), release("diffusion.train.schedule", "linear", "constant for 25 epochs, falling until 50; constant here"),
        release("diffusion.train.clip", 1.0), release("diffusion.train.batch", 1024), release("diffusion.train.samples", 80 * EPOCH),
        release("diffusion.train.ema_halflife", 1_420_000, "0.9995 a step"),
        release("protocol.sampler.solver", "euler"), release("protocol.sampler.steps", 100, "intervals"),
        release("protocol.guidance.kind", "internal"), release("protocol.guidance.scale", 1.78), release("protocol.guidance.interval", (0.1, 1.0)),
    ),
    "paper_gae": (
        release("vfm.name", "dinov2_l14"), release("vfm.upscale", 0.875, "224 px"), release("tokenizer.channels", 32), release("tokenizer.factor", 16),
        release("teacher/train.optimizer", "adamw"), release("teacher/train.lr", 1e-4), release("teacher/train.weight_decay", 0.05),
        release("teacher/train.betas", (0.9, 0.98)), release("teacher/train.samples", 100 * EPOCH),
        release("teacher/train.schedule", "cosine", "falls to a tenth there, to zero here"),
        release("teacher/train.warmup", 5 * EPOCH, "5 %"), release("autoencoder/losses.l1.weight", 1.0), release("autoencoder/losses.lpips.weight", 1.0),
        release("autoencoder/losses.semantic.weight", 1.0), release("autoencoder/losses.adversarial.weight", 0.5),
        release("autoencoder/losses.adversarial.start", 5000 * 1024, "from step 5001"),
        release("autoencoder/losses.adversarial.adaptive", False), unknown("autoencoder/losses.adversarial.discriminator.width", "ours: LDM's 64"),
        release("autoencoder/losses.kl", None),
        release("autoencoder/train.lr", 1e-5, "with a factor of 20 that no released line reads"), release("autoencoder/train.weight_decay", 0.05),
        release("autoencoder/train.batch", 1024), release("autoencoder/train.samples", 200 * EPOCH),
        *LIGHTNING, release("diffusion.network.qk_norm", False, "at 80 epochs; with it at 800"), release("diffusion.train.ema_halflife", 7_000_000, "0.9999 a step"),
        rate(80), release("diffusion.time.shift", 1 / 0.7, "0.7 in the release's time"), release("protocol.sampler.solver", "sde"),
        release("protocol.sampler.steps", 250, "intervals; the last step of size .004 is the mean there"),
        release("protocol.sampler.shift", 1 / 0.4, "0.4 in the release's time"), release("protocol.labels", "balanced"),
    ),
    "paper_dino_sae": (
        release("vfm.name", "dinov3_l16"), release("tokenizer.channels", 1024), release("tokenizer.factor", 16),
        paper("align/losses.token_cosine.weight", 0.5), paper("align/losses.l1.weight", 1.0), paper("align/losses.lpips.weight", 1.0),
        paper("align/train.lr", 1e-5), paper("align/train.betas", (0.9, 0.999)), paper("align/train.batch", 512), paper("align/train.samples", 20 * EPOCH),
        paper("align/train.ema_halflife", 3_550_000, "0.9999 a step"),
        paper("smooth/losses.token_cosine", None), paper("smooth/losses.adversarial.weight", 0.5), paper("smooth/losses.adversarial.loss", "hinge"),
        paper("smooth/losses.adversarial.discriminator_start", 0, "alone for 2 epochs"),
        paper("smooth/losses.adversarial.start", 2 * EPOCH, "the term counts from epoch 3"),
        paper("smooth/train.lr", 5e-5), paper("smooth/train.betas", (0.5, 0.9)), paper("smooth/train.batch", 512), paper("smooth/train.samples", 40 * EPOCH),
        paper("smooth/train.ema_halflife", 142_000, "0.9975 a step"),
        paper("tokenizer.noise", 0.8), paper("tokenizer.noise_end", 1.2), paper("tokenizer.noise_rise", 20 * EPOCH),
        paper("tokenizer.radius", 32.0, "the mean length of a normal vector of 1024 channels, 31.99"), paper("tokenizer.decode_length", 14.0),
        paper("diffusion.path.kind", "sphere"), paper("diffusion.path.radial", 0.1),
        paper("diffusion.network.kind", "lightningdit", "ours: the wide head of the earlier version"), paper("diffusion.time.kind", "lognormal"),
        paper("diffusion.time.shift", 8.0), paper("diffusion.train.lr", 2e-4), paper("diffusion.train.betas", (0.9, 0.95)), paper("diffusion.train.batch", 1024),
        paper("diffusion.train.ema_halflife", 1_420_000, "0.9995 a step"), rate(80), paper("protocol.sampler.solver", "euler"),
        paper("protocol.sampler.steps", 50, "intervals"),
    ),
    "paper_epsilon_vae": (
        paper("tokenizer.channels", 8), paper("tokenizer.factor", 16), paper("tokenizer.decoder.base", 96), paper("tokenizer.decoder.multipliers", (1, 1, 2, 2, 4)),
        paper("tokenizer.decoder.blocks", 2), paper("tokenizer.decoder.steps", 3), paper("losses.denoising.weight", 1.0), paper("losses.lpips.weight", 0.5),
        paper("losses.adversarial.weight", 0.5), paper("losses.adversarial.discriminator", "trajectory"), paper("losses.adversarial.loss", "nonsaturating"),
        paper("losses.adversarial.adaptive", False), unknown("losses.adversarial.r1"), paper("losses.kl", None, "none is mentioned"),
        paper("train.optimizer", "adam"), paper("train.betas", (0.0, 0.999)), paper("train.lr", 1e-4), paper("train.batch", 256),
        paper("train.samples", 256_000_000, "a million steps"), paper("train.warmup", 1_280_000, "5 k steps"), paper("train.ema_halflife", 177_000, "0.999 a step"),
        paper("diffusion.network.kind", "dit", "DiT-XL/2 there; ours: LightningDiT-XL/1"),
    ),
    "paper_ps_vae": (
        paper("vfm.name", "dinov2_b14"), paper("vfm.upscale", 0.875, "224 px"), paper("tokenizer.channels", 96), paper("tokenizer.depth", 3),
        paper("losses.feature_reconstruction.weight", 1.0, "the text's; another section has other weights"), paper("losses.l1.weight", 0.1),
        paper("losses.lpips.weight", 0.1), unknown("losses.kl.weight"), unknown("losses.adversarial.weight", "ours: LDM's"), paper("train.batch", 96),
        paper("train.lr", 1e-4), unknown("train.samples"), paper("diffusion.time.shift", 96**0.5 / 4, "sqrt(C P^2 / 16) with patches of one"),
        unknown("diffusion.network.kind", "the published generator is text to image"),
    ),
    "paper_fae": (
        noted("tokenizer.channels", 32), noted("vfm.name", "dinov2", "the size is not in our sources; ours: g/14"),
        unknown("losses.kl.weight"), unknown("train.samples"), unknown("train.batch"), unknown("train.lr"), unknown("diffusion.train.samples"),
    ),
    "paper_pae": (
        release("vfm.name", "dinov2_l14"), release("vfm.upscale", 0.875, "224 px"), release("tokenizer.channels", 32), release("tokenizer.depth", 6),
        unknown("autoencoder/losses.gram.weight"), unknown("autoencoder/losses.cascade.weight"), unknown("autoencoder/losses.semantic.weight"),
        unknown("train.samples"), unknown("train.batch"), unknown("train.lr"), noted("diffusion.train.samples", 80 * EPOCH, "of the numbers at 80 epochs"),
    ),
    "paper_vqgan": (
        release("tokenizer.factor", 16), release("tokenizer.quantizer.kind", "cosine"), release("tokenizer.quantizer.size", 16384), release("tokenizer.channels", 8),
        release("tokenizer.quantizer.beta", 0.25), release("losses.l2.weight", 1.0), release("losses.lpips.weight", 1.0),
        release("losses.adversarial.weight", 0.5), release("losses.adversarial.start", 20_000 * 128), release("losses.adversarial.loss", "hinge"),
        release("train.optimizer", "adam", "the paper's is taken", paper="adamw"), release("train.weight_decay", 0.0, "the paper's is taken", paper=0.05),
        release("train.lr", 1e-4), release("train.schedule", "constant"), release("train.clip", 1.0), release("train.batch", 128),
        release("train.samples", 40 * EPOCH), release("data.crop", (0.8, 1.0), "ADM's random crop, the short side 1 to 1.25 x 256 at random; here its share is uniform"),
        release("data.flip", True), unknown("train.ema_halflife"),
    ),
    "paper_vfmtok": (
        release("vfm.name", "dinov2_l14_reg"), release("vfm.layers", (6, 12, 18, -1)), release("data.size", 336), release("tokenizer.tokens", 256),
        release("tokenizer.channels", 12), release("tokenizer.quantizer.kind", "cosine"), release("tokenizer.quantizer.size", 16384),
        release("tokenizer.quantizer.beta", 0.25), release("tokenizer.width", 512), release("tokenizer.depth", 6), release("tokenizer.heads", 8),
        release("tokenizer.points", 4), release("tokenizer.hidden", 1024), release("tokenizer.decoder_depth", 6), release("tokenizer.decoder_hidden", 1368),
        release("tokenizer.registers", 4), release("tokenizer.registers_first", False, "last there, where a causal transformer cannot use them"),
        release("tokenizer.masks", False, "two mask tokens there", paper=True), release("losses.l2.weight", 2.0, "added twice there", paper=1.0),
        release("losses.lpips.weight", 1.0), release("losses.feature_reconstruction.weight", 1.0), release("losses.adversarial.weight", 0.5),
        release("losses.adversarial.start", 20_000 * 256, "step 20,000; of 256 images, the paper's batch"),
        release("losses.adversarial.loss", "softplus_hinge", "softplus for the generator, hinge for the discriminator"),
        release("losses.adversarial.discriminator.backbone", "dino_s16"), release("losses.adversarial.discriminator.add_class", True),
        release("losses.adversarial.discriminator.crop", 0.5), release("losses.adversarial.discriminator.virtual_batch", 8),
        release("losses.adversarial.discriminator.augment", ()),
        release("train.optimizer", "adam", "the paper's is taken", paper="adamw"), release("train.weight_decay", 0.0, "the paper's is taken", paper=0.05),
        release("train.betas", (0.9, 0.95)), release("train.lr", 1e-4), release("train.warmup", 4 * EPOCH), release("train.schedule", "constant"),
        release("train.clip", 1.0), release("train.batch", 16, "of the scripts; the paper's is taken", paper=256), release("train.samples", 50 * EPOCH),
        release("data.crop", (0.8, 1.0), "ADM's random crop, the short side 1 to 1.25 x 336 at random; here its share is uniform"), release("data.flip", True),
    ),
    "paper_vqrae": (
        paper("vfm.name", "siglip2_so400m_256"), paper("tokenizer.channels", 1536), paper("tokenizer.quantizer.kind", "simvq"),
        paper("tokenizer.quantizer.size", 16384), paper("tokenizer.quantizer.beta", 0.25), paper("pixels/losses.l2.weight", 1.0),
        paper("pixels/losses.lpips.weight", 1.1, "in ConvNeXt-S there, VGG here"), paper("pixels/losses.adversarial", None),
        paper("pixels/train.samples", 102_400_000, "100 k steps"), paper("pixels/train.batch", 1024), paper("pixels/train.lr", 4e-4),
        paper("pixels/train.betas", (0.9, 0.999)), paper("pixels/train.weight_decay", 1e-4), paper("pixels/train.warmup", 2_048_000, "2 k steps"),
        paper("pixels/train.schedule", "cosine", "falls to a quarter there, to zero here"), paper("pixels/train.clip", 1.0),
        paper("tune/train.samples", 71_680_000, "70 k steps"), paper("tune/train.lr", 1e-4), paper("tune/losses.preservation.weight", 1.0),
        paper("tune/losses.adversarial.weight", 0.1), paper("tune/losses.adversarial.start", 51_200_000, "50 k steps"),
        paper("tune/losses.adversarial.lr", 4e-5), unknown("tune/losses.adversarial.discriminator"),
        paper("data.crop", "random", "of which shares is not said; the centre here"), paper("data.flip", True),
    ),
    "paper_ar_b": (
        release("ar.network.size", "B"), release("ar.train.lr", 1e-4), release("ar.train.schedule", "constant"), release("ar.train.betas", (0.9, 0.95)),
        release("ar.train.weight_decay", 0.05), release("ar.train.clip", 1.0), release("ar.train.batch", 256), release("ar.train.samples", 300 * EPOCH),
        release("ar.class_dropout", 0.1), release("ar.ten_crops", 1.1), release("protocol.guidance.scale", 2.0), release("protocol.token_sampler.top_k", 0),
        release("protocol.token_sampler.temperature", 1.0), release("protocol.labels", "random"), unknown("ar.train.ema_halflife"),
    ),
}  # fmt: skip
_AR = {fact.field: fact for fact in FACTS["paper_ar_b"]}


def _ar(size: str, epochs: int, scale: float) -> tuple[Fact, ...]:
    own = (release("ar.network.size", size), release("ar.train.samples", epochs * EPOCH),
           release("protocol.guidance.scale", scale))
    return (*own, *(fact for field, fact in _AR.items() if field not in {each.field for each in own}))


FACTS |= {"paper_ar_l": _ar("L", 300, 2.0), "paper_ar_xl": _ar("XL", 50, 1.75),
          "paper_ar_xxl": _ar("XXL", 50, 1.75), "paper_ar_3b": _ar("3B", 50, 1.65)}


def _vfmtok_ar(size: str, epochs: int) -> tuple[Fact, ...]:
    return (
        release("ar.network.kind", "llamagen"), release("ar.network.size", size), paper("ar.train.samples", epochs * EPOCH, "300 epochs below 1 B parameters, else 200"),
        release("ar.train.batch", 512), release("ar.train.lr", 1e-4, "the paper: per 256 images; not scaled in the release"),
        release("ar.train.schedule", "constant"), release("ar.train.warmup", 0), release("ar.train.optimizer", "adamw"), release("ar.train.betas", (0.9, 0.95)),
        release("ar.train.weight_decay", 0.05, "of tensors of two and more dimensions"), release("ar.train.clip", 1.0),
        release("ar.train.ema_halflife", 3_550_000, "0.9999 a step"), release("ar.class_dropout", 0.1),
        release("ar.network.dropout", 0.1, "not of attention's probabilities, of which the paper has it too"),
        release("ar.cache", False, "codes are computed at every step"), release("ar.ten_crops", None, "LlamaGen stores ten crops; here data.crop and data.flip"),
        unknown("protocol.guidance.scale", "ours: LlamaGen's" if size != "2B" else "ours: LlamaGen's of 3B"),
        unknown("protocol.labels", "ours: LlamaGen's random labels"),
        unknown("protocol.token_sampler.top_k", "ours: LlamaGen's"), unknown("protocol.token_sampler.temperature", "ours: LlamaGen's"),
    )  # fmt: skip


FACTS |= {f"paper_vfmtok_ar_{size.lower()}": _vfmtok_ar(size, epochs)
          for size, epochs in (("B", 300), ("L", 300), ("XL", 300), ("XXL", 200), ("2B", 200), ("3B", 200))}
FACTS["paper_hirae"] = (
    paper("tokenizer.last", 24, "all blocks"), paper("tokenizer.stride", 1), unknown("tokenizer.pooled"), paper("train.batch", 128),
)  # fmt: skip
FACTS["paper_rar_l"] = (release("ar.network.kind", "rar"), release("ar.network.size", "L"))
FACTS["paper_rar_xl"] = (
    release("ar.network.kind", "rar"), release("ar.network.size", "XL"),
    release("protocol.guidance.scale", 6.5, "VFMTok-RAR's"), release("protocol.token_sampler.guidance_power", 1.0),
)  # fmt: skip
FACTS["paper_ar_l_orders"] = (
    release("ar.permuted.until", 200 * EPOCH), release("ar.permuted.raster", 300 * EPOCH), release("ar.train.samples", 400 * EPOCH),
    release("ar.train.batch", 2048), release("ar.train.lr", 4e-4), release("ar.train.betas", (0.9, 0.96)), release("ar.train.weight_decay", 0.03),
    release("ar.train.schedule", "cosine", "falls to 1e-5 there, to zero here"), release("ar.train.warmup", 100 * EPOCH),
    release("protocol.guidance.scale", 16.0, "RAR-L's"), release("protocol.token_sampler.guidance_power", 2.75),
    unknown("ar.ten_crops", "ours: none"),
)  # fmt: skip
