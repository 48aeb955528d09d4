"""Ledger C: what the papers of discrete tokenizers claim of quantisers, VFMTok and VQRAE.

Quantisers are compared in pocket_vqgan. What its decoder makes of an entry is 64 wide whatever the entry's
width (128 at width 128, where the decoder has 1.6 times the parameters). Codes are counted on held-out
images. VFMTok's feature loss rebuilds the VFM's last level, whichever levels a row reads. Linear probes are
of the latents, which are codes, as in all reports. VFMTok's own, of the class token of its feature decoder,
is that of the claim `class_token`, measured by the instrument of that name; the understanding that VQRAE
measures is of the continuous features. On photographs budgets are those of docs/results/photo.md: 30,720
images for a tokenizer, whatever its stages, 76,800 for a generator.
"""

from __future__ import annotations

from vfmlab.registry import LEDGERS
from vfmlab.studies.claims import Claim, Contrast, Entry, Ledger, better, same
from vfmlab.studies.rows import Until

VFMTOK, VQRAE, LLAMAGEN = "VFMTok (2507.08441)", "VQRAE (2511.23386)", "LlamaGen (2406.06525)"
SIMVQ = "SimVQ (2411.02038)"
QUANTISERS = {"VQ": "+vq", "cosine VQ": "+cosine", "SimVQ": "+simvq"}
UNHELD = "stages.tune.losses.preservation.weight=0"
OF_TOKEN = "of the class token, not of the latents"
BUDGET = "train.samples=30720"


def _stages(pixels: int, tune: int) -> str:
    """Budgets of VQRAE's stages."""
    return f"stages.pixels.train.samples={pixels},stages.tune.train.samples={tune}"


STAGES = _stages(20_480, 10_240)
# End to end: one step of the first stage, whose encoder is still the VFM that the second distils from.
AT_ONCE, AT_ONCE_PHOTO = _stages(32, 15_328), _stages(32, 30_688)


def _row(spec: str, block: str, until: Until = "tokenizer", photo: str | None = None,
         budget: str = BUDGET) -> Entry:
    """A preset without its tier: `pocket` on drawn scenes, `photo` on photographs, there as `photo` says and
    within `budget`."""
    photo = photo or spec
    photo = f"photo_{photo}{',' if ':' in photo else ':'}{budget}"
    return Entry({"scenes": f"pocket_{spec}", "photo": photo}, until, block)


def _tokens(change: str = "", variant: str = "", photo: str | None = None) -> Entry:
    """VFMTok under the tier's autoregressive transformer, measured at its end; `photo`: the change on
    photographs."""
    end = "ar.train.evaluate_at=[]"
    here = ",".join(filter(None, (end, change)))
    there = ",".join(filter(None, (end, photo or change, "ar.train.samples=76800")))
    return _row(f"vfmtok{variant}@pocket_ar:{here}", "region tokens", None,
                f"vfmtok{'' if photo else variant}@photo_ar:{there}")


ROWS = {
    **{f"{name}, width {d}": _row(f"vqgan{variant}+d{d}", "quantisers")
       for name, variant in QUANTISERS.items() for d in (8, 32, 128) if (name, d) != ("SimVQ", 8)},
    "FSQ": _row("vqgan+fsq", "quantisers"),
    "LFQ": _row("vqgan+lfq", "quantisers"),
    **{f"VQRAE, {name}, width {d}": _row(f"vqrae{QUANTISERS[name]}:tokenizer.channels={d}", "VQRAE",
                                         budget=STAGES)
       for name in ("SimVQ", "cosine VQ") for d in (8, 128)},
    "VQRAE, no distillation": _row("vqrae_no_distillation", "VQRAE",
                                   photo=f"vqrae:{UNHELD}", budget=STAGES),
    "VQRAE, end to end": _row(f"vqrae:{AT_ONCE}", "VQRAE", photo="vqrae", budget=AT_ONCE_PHOTO),
    "VQRAE, end to end, no distillation": _row(f"vqrae_no_distillation:{AT_ONCE}", "VQRAE",
                                               photo=f"vqrae:{UNHELD}", budget=AT_ONCE_PHOTO),
    "VFMTok": _tokens(),
    "VFMTok, no feature loss": _tokens(variant="_no_features", photo="losses.feature_reconstruction=0"),
    "VFMTok, random VFM": _tokens(variant="+random"),
    "VFMTok, random encoder": _tokens(variant="+encoder_random"),
    "VFMTok, plain attention": _tokens(variant="_cross", photo="tokenizer.attends=cross"),
    "VFMTok, second level": _tokens("vfm.layers=[1,-1],tokenizer.levels=[1]",
                                    photo="vfm.layers=[4,-2],tokenizer.levels=[4]"),
    "VFMTok, last level": _tokens("vfm.layers=[-1]", photo="vfm.layers=[-2]"),
    "VFMTok, 36 tokens": _tokens("tokenizer.tokens=36"),
    "VFMTok, 16 tokens": _tokens("tokenizer.tokens=16"),
}  # fmt: skip


def _uses_more(first: str, second: str) -> Contrast:
    return better("codebook_used", first, second)


CLAIMS = (
    Claim("width", "The wider an entry, the fewer a plain codebook uses and the worse it reconstructs.",
          f"{VFMTOK}, {LLAMAGEN}", "use 97 -> .3 % from width 8 to 256",
          (_uses_more("VQ, width 8", "VQ, width 32"), _uses_more("VQ, width 32", "VQ, width 128"),
           better("rfd", "VQ, width 8", "VQ, width 128"),
           better("rfd", "cosine VQ, width 8", "VQ, width 128"))),
    Claim("simvq", "SimVQ uses its whole codebook where a plain one collapses, and reconstructs better.",
          SIMVQ, "use near 100 % against a few percent",
          tuple(contrast for d in (32, 128) for contrast in (
              _uses_more(f"SimVQ, width {d}", f"VQ, width {d}"),
              better("psnr", f"SimVQ, width {d}", f"VQ, width {d}")))),
    Claim("cosine", "A cosine codebook wants narrow entries.", LLAMAGEN, "width 8 of 8, 32, 256",
          (better("rfd", "cosine VQ, width 8", "cosine VQ, width 32"),
           better("rfd", "cosine VQ, width 32", "cosine VQ, width 128"))),
    Claim("opposite", "On a VFM's features SimVQ gets better with width, cosine VQ worse.",
          VQRAE, "SimVQ up to 1536 of 1152, cosine down to 8 to 12",
          (better("rfd", "VQRAE, SimVQ, width 128", "VQRAE, SimVQ, width 8"),
           better("rfd", "VQRAE, cosine VQ, width 8", "VQRAE, cosine VQ, width 128"))),
    Claim("features",
          "The feature loss keeps meaning in codes, helps generation, and leaves reconstruction alone.",
          VFMTOK, f"linear probe 69 against 23 ({OF_TOKEN}), gFID 3.42 against 3.71, rFID .89 and .92",
          (better("probe_linear", "VFMTok", "VFMTok, no feature loss"),
           better("gfd", "VFMTok", "VFMTok, no feature loss"),
           same("rfd", "VFMTok", "VFMTok, no feature loss"))),
    Claim("guidance_gap", "Codes of a VFM need no guidance, those of pixels do.",
          VFMTOK, "gFID unguided / guided .8 to 1.0 against 4 to 6",
          open="each network under two protocols", elsewhere="codes_guided.md"),
    Claim("levels", "A middle level reconstructs better, the last level generates better and means more.",
          VFMTOK, f"rFID best in the middle; gFID and probe ({OF_TOKEN}) best with the last",
          (better("rfd", "VFMTok, second level", "VFMTok, last level"),
           better("gfd", "VFMTok, last level", "VFMTok, second level"),
           better("probe_linear", "VFMTok, last level", "VFMTok, second level"))),
    Claim("tokens", "Reconstruction improves with tokens; generation is flat beyond about half of them.",
          VFMTOK, "144 of 256 tokens",
          (better("rfd", "VFMTok", "VFMTok, 36 tokens"),
           better("rfd", "VFMTok, 36 tokens", "VFMTok, 16 tokens"),
           same("gfd", "VFMTok", "VFMTok, 36 tokens"))),
    Claim("sweep", "Over guidance FID is U-shaped, precision rises and recall falls.",
          LLAMAGEN, "guided samples of one network",
          open="one network under several protocols: vfmlab guide --whole decides it",
          elsewhere="guidance_codes.md"),
    Claim("random", "With random weights, as encoder and as target of the feature loss, generation is worse.",
          "a control of ours", "none published",
          (better("gfd", "VFMTok", "VFMTok, random VFM"),)),
    Claim("random_encoder", "With a random encoder and the true VFM's feature loss codes mean less and "
          "generation is worse.", VFMTOK, f"gFID 3.73 against 3.42, linear probe 59 against 69 ({OF_TOKEN})",
          (better("gfd", "VFMTok", "VFMTok, random encoder"),
           better("probe_linear", "VFMTok", "VFMTok, random encoder"))),
    Claim("deformable", "Deformable attention gives codes more meaning than plain cross-attention.",
          VFMTOK, f"linear probe 69 against 34 ({OF_TOKEN}), gFID 3.42 against 3.89",
          (better("probe_linear", "VFMTok", "VFMTok, plain attention"),
           better("gfd", "VFMTok", "VFMTok, plain attention"))),
    Claim("class_token", "The class token of the feature decoder means more with the feature loss, with a "
          "trained VFM as encoder and with deformable attention.", VFMTOK,
          "its linear probe: 69 against 23, 59 and 34",
          tuple(better("probe_class_token", "VFMTok", f"VFMTok, {other}")
                for other in ("no feature loss", "random encoder", "plain attention"))),
    Claim("objective",
          "A VFM of masked pixels reconstructs best, one of contrast and masked latents generates best.",
          VFMTOK, "table of VFMs", open="one VFM is bundled for drawn scenes"),
    Claim("distillation", "Distillation keeps a tuned encoder's meaning; without it pixels gain.",
          VQRAE, "none for two stages without it; end to end see end_to_end",
          (better("probe_linear", "VQRAE, SimVQ, width 128", "VQRAE, no distillation"),
           better("rfd", "VQRAE, no distillation", "VQRAE, SimVQ, width 128"))),
    Claim("end_to_end", "Trained end to end too, distillation keeps the encoder's meaning; without it pixels "
          "gain.", VQRAE, "MME-P of the continuous features 1435.2 against 608.9, rFID 2.84 against 2.69",
          (better("probe_linear", "VQRAE, end to end", "VQRAE, end to end, no distillation"),
           better("rfd", "VQRAE, end to end, no distillation", "VQRAE, end to end"))),
    Claim("stages", "Two stages keep more meaning and reconstruct better than end to end, both with "
          "distillation.", VQRAE,
          "MME-P of the continuous features 1439.1 against 1435.2, rFID 2.71 against 2.84",
          (better("probe_linear", "VQRAE, SimVQ, width 128", "VQRAE, end to end"),
           better("rfd", "VQRAE, SimVQ, width 128", "VQRAE, end to end"))),
    Claim("scalars",
          "FSQ and LFQ use more codes than plain VQ and reconstruct between it and cosine VQ.",
          f"table of {SIMVQ}", "all codes; rFID 2.80 and 2.88 between 2.63 and 3.7",
          tuple(contrast for name in ("FSQ", "LFQ") for contrast in (
              _uses_more(name, "VQ, width 8"), better("rfd", "cosine VQ, width 8", name),
              better("rfd", name, "VQ, width 8")))),
)

OUTCOMES = {"protocol.n": 4000, "data.val": 4000, "protocol.noise": "run"}

LEDGERS.register("c")(Ledger("What the papers of discrete tokenizers claim", ROWS, CLAIMS,
                             {"scenes": OUTCOMES, "photo": OUTCOMES}))
