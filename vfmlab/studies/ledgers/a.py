"""Ledger A: what the papers of VFM tokenizers claim, on tokenizers that differ in one thing each.

Every tokenizer has the same decoder, pixel losses, images and generator unless the row is about that.
"""

from __future__ import annotations

from vfmlab.registry import LEDGERS
from vfmlab.studies.claims import Claim, Contrast, Entry, Ledger, better, gains_more, same

VFM_VAE, ALIGNTOK = "VFM-VAE (2510.18457)", "AlignTok (2509.25162)"
WIDE, DECODERS, HEADS = "wide latents", "decoders", "heads"


def _row(spec: str, until=None, block: str = "", scenes_only: bool = False) -> Entry:
    """A preset without its tier: `pocket` on drawn scenes, `photo` on photographs."""
    tiers = {"scenes": "pocket"} if scenes_only else {"scenes": "pocket", "photo": "photo"}
    return Entry({domain: f"{tier}_{spec}" for domain, tier in tiers.items()}, until, block)


def _aligntok(change: str, until=None) -> Entry:
    return _row(f"aligntok:stages.perceptual.losses.preservation.{change}", until)


def _head(tokenizer: str, wide: bool) -> Entry:
    """A tokenizer under one network of encoder and head, the head as wide as its encoder or four times as
    wide; both without a shift of times."""
    width = ",diffusion.network.head_width=512,diffusion.network.head_heads=8" if wide else ""
    return _row(f"{tokenizer}:diffusion.train.evaluate_at=[]{width}", block=HEADS, scenes_only=True)


ROWS = {
    "plain VAE": _row("plain_vae"),
    "SD-VAE": _row("sd_vae"),
    "VA-VAE": _row("va_vae"),
    "VA-VAE, margins 0": _row("va_vae:losses.vf.cos_margin=0,losses.vf.distance_margin=0"),
    "VFM-VAE": _row("vfm_vae"),
    "VFM-VAE, equivariance": _row("vfm_vae:equivariance.p_latent=0.5,equivariance.p_prior=0.25", "tokenizer"),
    "VFM-VAE, random VFM": _row("vfm_vae_random"),
    "VFM-VAE, VF 0": _row("vfm_vae_no_vf"),
    "VFM-VAE, last layer only": _row("vfm_vae_last_layer"),
    "AlignTok": _row("aligntok"),
    "AlignTok, w_sp 0": _aligntok("weight=0", "tokenizer"),
    "AlignTok, before the adapter": _aligntok("anchor=before"),
    "AlignTok, cosine": _aligntok("distance=cosine"),
    "RAE, common DiT": _row("rae@pocket_plain_vae", block=WIDE, scenes_only=True),
    "multi-layer RAE, common DiT": _row("multi_layer_rae@pocket_plain_vae", block=WIDE, scenes_only=True),
    "RAE, narrow head": _head("rae@pocket_vfm_vae_ddt", wide=False),
    "RAE, wide head": _head("rae@pocket_vfm_vae_ddt", wide=True),
    "VFM-VAE, narrow head": _head("vfm_vae_ddt", wide=False),
    "VFM-VAE, wide head": _head("vfm_vae_ddt", wide=True),
    "plain decoder": _row("vfm_vae+plain_decoder", "first_stage", DECODERS),
    "+ multi-scale fusion": _row("vfm_vae+fusion", "first_stage", DECODERS),
    "+ modern blocks": _row("vfm_vae+modern_blocks", "first_stage", DECODERS),
}

CLAIMS = (
    Claim("order",
          "Latents of a VFM serve diffusion better than VA-VAE's, VA-VAE's better than a plain VAE's.",
          f"{ALIGNTOK}, {VFM_VAE}", "gFID 4.05 < 7.79 < 10.17 and 3.80 < 5.14 < 7.13",
          (better("gfd", "VFM-VAE", "VA-VAE"), better("gfd", "VA-VAE", "plain VAE"))),
    Claim("margins", "VFM-VAE is ahead of a VA-VAE whose loss has no margins, as its own has none.",
          "asked of VFM-VAE's comparison", "none published",
          (better("gfd", "VFM-VAE", "VA-VAE, margins 0"),)),
    Claim("pixels", "Better reconstruction is not better generation.",
          ALIGNTOK, "rFID .26 goes with gFID 10.17 and with 4.05",
          (better("rfd", "SD-VAE", "VFM-VAE"), better("gfd", "VFM-VAE", "SD-VAE"))),
    Claim("forgetting", "The preservation loss stops the encoder from forgetting.",
          f"{ALIGNTOK}, ablation of w_sp", "linear probe 9.5 -> 35.1 -> 40.6 for w_sp 0, 1, 5",
          (better("probe_linear", "AlignTok#perceptual", "AlignTok, w_sp 0#perceptual"),)),
    Claim("anchor", "The preservation loss must sit after the adapter.",
          f"{ALIGNTOK}, ablation", "gFID 2.19 after, 2.83 before",
          (better("gfd", "AlignTok", "AlignTok, before the adapter"),)),
    Claim("stages", "The three stages of AlignTok add up.",
          f"{ALIGNTOK}, table of stages", "rFID 1.63 -> .36 -> .26",
          (better("rfd", "AlignTok#perceptual", "AlignTok#latent"),
           better("rfd", "AlignTok#refine", "AlignTok#perceptual"))),
    Claim("cosine", "L2 and cosine do about equally well as the preservation loss.",
          f"{ALIGNTOK}, ablation", "gFID 2.19 and 2.23",
          (same("gfd", "AlignTok", "AlignTok, cosine"),)),
    Claim("semantics", "What the VFM has learnt makes a part of the gain, the recipe around it another.",
          "asked by reviewers of VFM-VAE and AlignTok", "none published",
          (better("gfd", "VFM-VAE", "VFM-VAE, random VFM"),
           better("gfd", "VFM-VAE, random VFM", "plain VAE"))),
    Claim("blocks", "In the decoder, fusion helps and modern blocks help more.",
          f"{VFM_VAE}, decoder table", "rFID 19.69 -> 14.35 -> 1.08 -> .71",
          (better("rfd", "+ multi-scale fusion", "plain decoder"),
           gains_more("rfd", ("+ multi-scale fusion", "+ modern blocks"),
                      ("plain decoder", "+ multi-scale fusion")))),
    Claim("brittle", "Distilled alignment is brittle, that of a frozen VFM is not.",
          VFM_VAE, "CKNNA -33.2 % against +1.6 % under perturbation",
          (Contrast("se_cknna_release_change_corrected", {"VFM-VAE, equivariance": 1.0, "VA-VAE": -1.0},
                    "VFM-VAE, trained for it, loses less CKNNA than VA-VAE"),
           Contrast("se_cknna_release_change_corrected", {"VFM-VAE": 1.0, "VA-VAE": -1.0},
                    "VFM-VAE, not trained for it, loses less CKNNA than VA-VAE"))),
    Claim("se_cknna", "SE-CKNNA tracks generation better than CKNNA.",
          VFM_VAE, "three points",
          open="a difference of two correlations over tokenizers", elsewhere="instruments_three_seeds.md"),
    Claim("vf_loss", "Without the VF loss a frozen VFM still serves diffusion better than a plain VAE.",
          "nobody published VF = 0", "none published",
          (better("gfd", "VFM-VAE, VF 0", "plain VAE"),)),
    Claim("depth", "Deeper layers alone serve diffusion better and reconstruct worse.",
          f"{VFM_VAE}, RAE (2510.11690)", "none for one tokenizer",
          (better("gfd", "VFM-VAE, last layer only", "VFM-VAE"),
           better("psnr", "VFM-VAE", "VFM-VAE, last layer only"))),
    Claim("layers", "Summing more layers reconstructs better and, unguided, generates worse.",
          "RAEv2 (2605.18324)",
          "PSNR 18.9 / 22.6 / 27.0, unguided gFID 1.50 / 1.65 / 3.01 at K 1 / 7 / 23",
          (better("psnr", "multi-layer RAE, common DiT", "RAE, common DiT"),
           better("gfd", "RAE, common DiT", "multi-layer RAE, common DiT"))),
    Claim("wide_head", "Wide latents need a head wider than the network; narrow ones gain less by it.",
          "RAE (2510.11690)", "unguided gFID 1.51 with the wide head; its ablation is not at hand",
          (better("gfd", "RAE, wide head", "RAE, narrow head"),
           gains_more("gfd", ("RAE, narrow head", "RAE, wide head"),
                      ("VFM-VAE, narrow head", "VFM-VAE, wide head")))),
)

# As the rule of outcomes wants them: 4,000 samples in 10 steps, whose noise follows the training seed.
OUTCOMES = {"protocol.n": 4000, "data.val": 4000, "protocol.sampler.steps": 10, "protocol.noise": "run"}

LEDGERS.register("a")(Ledger("What the papers of VFM tokenizers claim", ROWS, CLAIMS,
                             {"scenes": OUTCOMES, "photo": OUTCOMES}))
