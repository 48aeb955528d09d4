"""Ledger B: what the second wave of continuous tokenizers claims: spheres, priors, RAEv2, diffusion decoders.

Latents are compared under pocket_plain_vae's generator, networks on one latent. Guided numbers have protocols
of their own and are not compared with unguided ones. On photographs budgets are those of
docs/results/photo.md: 30,720 images for a tokenizer, whatever its stages, 76,800 for a generator.
"""

from __future__ import annotations

import json

from vfmlab.presets import dino_sae, pae
from vfmlab.presets.tiers import Tree
from vfmlab.registry import LEDGERS
from vfmlab.studies.claims import Claim, Entry, Ledger, better, gains_more, same
from vfmlab.studies.ledgers.a import OUTCOMES
from vfmlab.studies.rows import Until

HAE, GAE, PAE, RAEV2 = "HAE (2601.22904)", "GAE (2603.10365)", "PAE (2605.07915)", "RAEv2 (2605.18324)"
JOINT = "joint compression and classification (2310.19675)"
PS_VAE, EPSILON, SVG = "PS-VAE (2512.17909)", "Epsilon-VAE (2410.04081)", "SVG (2510.15301)"
COMMON = "@pocket_plain_vae"
SPHERE = "rae@pocket_plain_vae+sphere"
UNGUIDED = "protocol.guidance.kind=null,protocol.guidance.scale=1,protocol.guidance.interval=[0,1]"
RAEV2_NET = f"multi_layer_rae{COMMON}+raev2:{UNGUIDED}"
VELOCITIES = "diffusion.network.least_time=null"
WIDTHS = (4, 8, 16)
WHOLE, HALVES = "train.samples=30720", "train.samples=15360"  # of one stage, of each of two
APART = ",".join(f"stages.{stage}.train.samples={images}" for stage, images in
                 (("apart", 10_240), ("pixels", 15_360), ("together", 5120)))
HALF, TWICE = ", half as wide a network", ", twice as wide a network"
PRIORS = "stages.autoencoder.losses"


def _there(spec: str) -> str:
    return spec.replace(COMMON, COMMON.replace("pocket", "photo"))


def _row(spec: str, block: str, until: Until = None, photo: str = WHOLE) -> Entry:
    """A preset without its tier: `pocket` on drawn scenes, `photo` on photographs, there with the images of
    each of its stages; empty: no such row on photographs."""
    on_photos = {"photo": f"photo_{_there(spec)}{',' if ':' in spec else ':'}{photo}"} if photo else {}
    return Entry({"scenes": f"pocket_{spec}"} | on_photos, until, block)


def _width(spec: str, channels: int, photo: str = WHOLE) -> Entry:
    change = f"plain_vae{spec}:tokenizer.linear_start=false,tokenizer.channels={channels}"
    return _row(change, "classes apart", "tokenizer", photo)


def _length(scenes: int, photo: int) -> Entry:
    """Tokens decoded at half of the mean length that standardised ones have over training images, 11.2 on
    drawn scenes and 18.1 on photographs, or twice."""
    there = f"photo_{_there(SPHERE)}:tokenizer.decode_length={photo},{WHOLE}"
    return Entry({"scenes": f"pocket_{SPHERE}:tokenizer.decode_length={scenes}", "photo": there}, None,
                 "wide latents")


def _frozen(decoder: Tree, images: int) -> Entry:
    """The frozen VFM's tokens without noise, before another tokenizer's decoder and budget: its control."""
    return _row("rae:tokenizer.noise=0,tokenizer.linear_start=false,losses.multiscale=0,"
                f"train.samples={images},tokenizer.decoder={json.dumps(decoder)}", "wide latents",
                "tokenizer", photo="")


def _network(spec: str, width: int) -> Entry:
    """Under the common generator in another width, with heads of the same 32 channels."""
    change = f":diffusion.network.width={width},diffusion.network.heads={width // 32}"
    return _row(spec + change, "wide latents", photo="")


def _pae(*without: str) -> Entry:
    changes = ",".join(f"{PRIORS}.{name}.weight=0" for name in without)
    return _row(f"pae{':' if changes else ''}{changes}", "small latents", photo=HALVES)


ROWS = {
    "RAE": _row(f"rae{COMMON}", "wide latents"),
    "RAE, no noise": _row(f"rae{COMMON}:tokenizer.noise=0", "wide latents"),
    "RAE on a sphere": _row(SPHERE, "wide latents"),
    **{f"{label}{how}": _network(spec, width) for how, width in ((HALF, 64), (TWICE, 256))
       for label, spec in (("RAE", f"rae{COMMON}"), ("RAE on a sphere", SPHERE))},
    "RAE on a sphere, radial 0": _row(f"{SPHERE}:diffusion.path.radial=0", "wide latents"),
    "RAE on a sphere, radial 1": _row(f"{SPHERE}:diffusion.path.radial=1", "wide latents"),
    "RAE on a sphere, half length": _length(6, 9),
    "RAE on a sphere, twice the length": _length(24, 36),
    # The VFM of photographs has no patch embedding in whose place a stem could stand.
    "DINO-SAE": _row(f"dino_sae{COMMON}", "wide latents", photo=""),
    "frozen tokens, DINO-SAE's decoder": _frozen(dino_sae.POCKET["decoder"], 7680),
    "SVG": _row(f"svg{COMMON}", "wide latents", photo=""),
    "frozen tokens, SVG's decoder": _frozen(pae.SVG_POCKET["decoder"], 30_720),
    # The layers of the VFM of photographs have other widths and grids: nothing to fuse.
    "bounded fusion": _row(f"multi_layer_rae{COMMON}:tokenizer.fusion={{}}", "wide latents", photo=""),
    "unbounded fusion": _row(f"multi_layer_rae{COMMON}:tokenizer.fusion.caps=null,"
                             "tokenizer.fusion.dropout=[0,0,0]", "wide latents", photo=""),
    "RAEv2's network": _row(RAEV2_NET, "wide latents", photo=""),
    "RAEv2's network, velocities": _row(f"{RAEV2_NET},{VELOCITIES}", "wide latents", photo=""),
    "GAE, KL": _row(f"gae:{PRIORS}.semantic.weight=0,{PRIORS}.kl=1e-6,tokenizer.latent=gaussian",
                    "small latents", photo=HALVES),
    **{f"GAE, semantic {weight}": _row(f"gae:{PRIORS}.semantic.weight={weight}", "small latents",
                                       photo=HALVES) for weight in (0, 0.5, 1, 2)},
    "PAE": _pae(),
    "PAE, no priors": _pae("gram", "cascade", "semantic"),
    "PAE, structure alone": _pae("cascade", "semantic"),
    "PAE, continuity alone": _pae("gram", "semantic"),
    "PAE, semantics alone": _pae("gram", "cascade"),
    "PAE, small angle": _row(f"pae:{PRIORS}.cascade.degrees=[42.5]", "small latents", photo=HALVES),
    "PAE, large angle": _row(f"pae:{PRIORS}.cascade.degrees=[85]", "small latents", photo=HALVES),
    "PS-VAE": _row("ps_vae", "small latents", photo=HALVES),
    "Epsilon-VAE": _row("epsilon_vae", "diffusion decoders", "tokenizer"),
    "Epsilon-VAE, no image loss": _row("epsilon_vae:losses.l1=0", "diffusion decoders", "tokenizer"),
    "Epsilon-VAE, GAN": _row("epsilon_vae_gan", "diffusion decoders", "tokenizer"),
    "Epsilon-VAE, 6 steps": _row("epsilon_vae:tokenizer.decoder.steps=6", "diffusion decoders", "tokenizer"),
    **{f"plain VAE, width {channels}": _width("", channels) for channels in WIDTHS},
    **{f"classes apart, width {channels}": _width("_apart", channels, APART) for channels in WIDTHS},
}

_EACH = ("structure", "continuity", "semantics")
CLAIMS = (
    Claim("sphere", "On a VFM's tokens the geodesic path of a sphere beats the straight path.",
          HAE, "gFID 2.65 against 15.95", (better("gfd", "RAE on a sphere", "RAE"),)),
    Claim("sphere_width", "That gap shrinks as the network gets wider than the tokens.", "RJF (2602.10099)",
          "gFID 24.2 -> 6.77 at B, 10.08 -> 4.21 at L, 9.29 -> 3.62 at XL",
          tuple(gains_more("gfd", (f"RAE{narrow}", f"RAE on a sphere{narrow}"),
                           (f"RAE{wide}", f"RAE on a sphere{wide}"))
                for narrow, wide in ((HALF, ""), ("", TWICE)))),
    Claim("radial", "A little radial penalty is best.", HAE, "4.40 / 3.90 / 5.70 at 0 / .1 / 1",
          (better("gfd", "RAE on a sphere", "RAE on a sphere, radial 0"),
           better("gfd", "RAE on a sphere", "RAE on a sphere, radial 1"))),
    Claim("length", "The length at decoding matters: the mean length is better than half of it and twice.",
          HAE, "gFID 7.36 / 2.65 at 8 / 14",
          tuple(better("gfd", "RAE on a sphere", f"RAE on a sphere, {other}")
                for other in ("half length", "twice the length"))),
    Claim("noise", "Noise on the decoder's latents costs reconstruction and helps generation.", HAE,
          "rFID .37 -> .78, gFID 32.64 -> 2.65",
          (better("rfd", "RAE, no noise", "RAE"), better("gfd", "RAE", "RAE, no noise"))),
    Claim("stem", "A convolutional stem buys PSNR at the same meaning.", HAE,
          "19.55 -> 26.20 dB without noise, linear probe 89 -> 87",
          (better("psnr", "DINO-SAE#align", "frozen tokens, DINO-SAE's decoder"),
           same("probe_linear", "DINO-SAE#align", "frozen tokens, DINO-SAE's decoder"))),
    Claim("branch", "Eight trained channels beside a VFM's tokens buy PSNR at the same meaning.", SVG,
          "rFID .65 with them; none without at hand",
          (better("psnr", "SVG", "frozen tokens, SVG's decoder"),
           same("probe_linear", "SVG", "frozen tokens, SVG's decoder"))),
    Claim("guidance", "Internal guidance is ahead of a weaker model's, that of CFG, that of none.", RAEV2,
          "gFID 1.06, 1.14, 1.49, 1.65",
          open="one network under several protocols, which vfmlab guide draws",
          elsewhere="guidance_raev2.md"),
    Claim("prediction", "Internal guidance wants clean latents predicted, not velocities.", RAEV2,
          "gFID 1.06 against 1.87, both with internal guidance",
          open="a network under two protocols is no two rows; docs/results/raev2_guided.json has its "
               "numbers"),
    Claim("prediction_unguided",
          "Clean latents serve a network of two read-outs better without guidance too.",
          "asked beside RAEv2", "none published for velocities; 1.65 for clean latents",
          (better("gfd", "RAEv2's network", "RAEv2's network, velocities"),)),
    Claim("semantic", "Without the semantic loss generation collapses; its weight hardly matters.", GAE,
          "gFID 12.55 / 2.35 / 2.36 / 2.45",
          (better("gfd", "GAE, semantic 1", "GAE, semantic 0"),
           same("gfd", "GAE, semantic 0.5", "GAE, semantic 1"),
           same("gfd", "GAE, semantic 1", "GAE, semantic 2"))),
    Claim("rms", "Without a semantic loss tokens of one length are ahead of a KL latent.", GAE,
          "rFID .764 against .977, gFID 12.55 against 16.72",
          (better("rfd", "GAE, semantic 0", "GAE, KL"), better("gfd", "GAE, semantic 0", "GAE, KL"))),
    Claim("fusion", "Unbounded fusion of layers reconstructs better and generates worse than bounded.",
          "HiRAE", "rFID .023 / .209, gFID 7.9 / 2.4",
          (better("rfd", "unbounded fusion", "bounded fusion"),
           better("gfd", "bounded fusion", "unbounded fusion"))),
    Claim("priors", "Structure, continuity and semantics each help alone, and more together.", PAE,
          "gFID 7.18 -> 2.5 to 2.7 -> 1.86",
          (*(better("gfd", f"PAE, {one} alone", "PAE, no priors") for one in _EACH),
           *(better("gfd", "PAE", f"PAE, {one} alone") for one in _EACH))),
    Claim("cascade", "Two angles in cascade beat either.", PAE, "gFID 1.80 against 2.00 and 2.04",
          (better("gfd", "PAE", "PAE, small angle"), better("gfd", "PAE", "PAE, large angle"))),
    Claim("compress", "Compressed tokens generate better than wide ones, and pixels repair what they lose.",
          PS_VAE, "table of S-VAE, RAE, PS-VAE",
          (better("gfd", "PS-VAE", "RAE"), better("psnr", "PS-VAE", "PS-VAE#semantic"))),
    Claim("toy", "The share of samples off the manifold grows with the ambient dimension.", PS_VAE, "a toy",
          open="networks on points of a plane, in notebook 13",
          elsewhere="notebooks/13_spheres_priors_decoders"),
    Claim("decoding",
          "Of a diffusion decoder's losses that on the image gains most; more than three steps lose.",
          EPSILON, "rFID 22.04 -> 11.76 -> 8.24",
          (better("rfd", "Epsilon-VAE", "Epsilon-VAE, no image loss"),
           better("rfd", "Epsilon-VAE, GAN", "Epsilon-VAE"),
           gains_more("rfd", ("Epsilon-VAE, no image loss", "Epsilon-VAE"),
                      ("Epsilon-VAE", "Epsilon-VAE, GAN")),
           better("rfd", "Epsilon-VAE", "Epsilon-VAE, 6 steps"))),
    Claim("reuse",
          "An encoder's features vary less over t than the head's; key steps should be dense at noise.",
          "Faster Diffusion, TiUE", "9 of 50 key steps",
          open="one network under many samplers, which vfmlab reuse draws", elsewhere="reuse.md"),
    Claim("instruments", "VIV, LNC and iFID predict gFID better than rFID.", "their papers", ".87, .79, .65",
          open="correlations over tokenizers", elsewhere="instruments_three_seeds.md"),
    Claim("joint", "After a first stage that tells classes apart they are read better at equal bits.", JOINT,
          "+1.5 % accuracy on CIFAR-10, over cross-entropy end to end",
          tuple(better("probe_1bpp", f"classes apart, width {channels}", f"plain VAE, width {channels}")
                for channels in WIDTHS)),
    Claim("offset", "Meaning denoised a moderate time ahead of texture beats both in step.", "SFD",
          "offset of .3", open="that generator is not here"),
    Claim("two_levels", "Two noise levels in one image help.", "2607.02508", "none",
          open="that training is not here"),
)

# No claim is about the course of training, whose measurements cost as much as the training itself.
END = {**OUTCOMES, "diffusion.train.evaluate_at": []}

LEDGERS.register("b")(Ledger("What the second wave of continuous tokenizers claims", ROWS, CLAIMS,
                             {"scenes": END, "photo": END | {"diffusion.train.samples": 76_800}}))
