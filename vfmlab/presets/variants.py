"""Variants: the same, but for one named change. `pocket_vfm_vae+no_style`, `pocket_plain_vae+repa`, several
after each other.

The same config has the same id, whichever way it was written. Four groups, all in :data:`VARIANTS`:

* *decoder and latent*, on any run with a progressive decoder. The paper of VFM-VAE (arXiv 2510.18457) names
  the four rows of its decoder table and not the fields behind them; the grouping is ours. These keep the
  run's name.
* *controls*: one ingredient is taken away. If a control does as well as the method, the ingredient was not
  the reason.
* *quantisers*, on any run with one: another one of about as many entries.
* *diffusion-side alignment*: REPA, iREPA, REG, REPA-E, the joint recipe of VFM-VAE, and a split DiT for
  encoder reuse.
  They share the run's tokenizer. At `tiny` and `pocket` the target is the bundled pocket VFM, which has never
  seen the scenes' labels. For VFM-VAE it is the tokenizer's own VFM: the target tells the network nothing
  that is not in the latents, and what it can add is the order in which things are learnt; in the paper the
  two differ (SigLIP2, DINOv2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vfmlab.config import Recipe, override, parse
from vfmlab.errors import ConfigError, nearest

Changes = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One named change.

    Args:
        about: one line. changes: dotted fields, or how they follow from the recipe. named: the run's name
        says it too.
        needs: part of the recipe that it changes, a key of :data:`PARTS`.
    """

    about: str
    changes: Changes | Callable[[Recipe], Changes]
    named: bool = False
    needs: str = ""


# -- decoder and latent ------------------------------------------------------------------------------------

TABLE = ("plain_decoder", "fusion", "modern_blocks", "multi_layer")
PAPER_RFID = dict(zip(TABLE, (19.69, 14.35, 1.08, 0.71), strict=True))  # 5 M images, ImageNet 256
WIDTHS = (4, 8, 16, 32, 48, 64, 128)  # with a linear start at most 3 f^2: 48 at f4
STEPS = 16  # widths of a matched decoder are multiples of channel_max / STEPS


def _off(*parts: str) -> Changes:
    return {f"tokenizer.decoder.{part}": False for part in parts}


_LAST = {"vfm.layers": [-1]}


def _last_layer(run: Recipe) -> Changes:
    return {"vfm.layers": [(run.vfm.layers or (-1,))[-1]]}


_PLAIN = _off("style", "attention", "running_sum", "multiscale", "blur") | _LAST | {
    "tokenizer.decoder.layer": "conv", "tokenizer.decoder.upsample": "nearest", "losses.multiscale": 0,
}  # fmt: skip
_SINGLE, _FUSED = _PLAIN | _off("fusion"), _PLAIN | {"tokenizer.decoder.fusion": True}


def decoder_size(run: Recipe) -> int:
    """Parameters of the recipe's decoder."""
    import torch

    from vfmlab.registry import DECODERS

    c = run.tokenizer
    with torch.device("meta"):
        decoder = DECODERS.get(c.decoder.kind)(c.decoder, c.channels, run.data.size // c.factor,
                                               run.data.size)
    return sum(p.numel() for p in decoder.parameters())


def _matched(changes: Changes) -> Callable[[Recipe], Changes]:
    """`changes` with channels scaled until the decoder has about as many parameters as the recipe's own."""

    def of(run: Recipe) -> Changes:
        whole, decoder, sizes = decoder_size(run), run.tokenizer.decoder, []
        step = max(1, decoder.channel_max // STEPS)
        for width in range(step, 2 * decoder.channel_max + 1, step):
            base = round(decoder.channel_base * width / decoder.channel_max)
            widths = {"tokenizer.decoder.channel_max": width, "tokenizer.decoder.channel_base": base}
            sizes.append((abs(decoder_size(override(run, changes | widths)) - whole), width, widths))
        return changes | min(sizes, key=lambda size: size[:2])[2]

    return of


def _width(channels: int) -> Callable[[Recipe], Changes]:
    """d channels; z' keeps its width as far as whole factors allow, so that the decoder behind it is the
    same. A sphere keeps its size beside the length of noise, which grows with d.
    """

    def of(run: Recipe) -> Changes:
        from vfmlab.nn.sphere import mean_length

        own, radius = run.tokenizer.channels, run.tokenizer.radius
        sphere = {} if radius is None else {
            "tokenizer.radius": radius * mean_length(channels) / mean_length(own)}
        factor = max(1, round(own * run.tokenizer.decoder.decompress_factor / channels))
        return {"tokenizer.channels": channels, "tokenizer.decoder.decompress_factor": factor} | sphere

    return of


# -- diffusion-side alignment ------------------------------------------------------------------------------

SETTINGS = ("repa", "irepa", "reg", "joint")
_POCKET = {"vfm": {"name": "pocket"}}
_PHOTO = {"vfm": {"name": "efficientnet_lite0", "upscale": 4.0, "stride": 16}}
# At 32 px DINOv2 reads images enlarged to 224: 16 x 16 tokens, brought to the network's 8 x 8.
_SMALL = {"vfm": {"name": "dinov2_s14", "upscale": 7.0}}
_PAPER = {
    "vfm": {"name": "dinov2_b14", "upscale": 0.875},
    "cache": False,
}  # 16 x 16 x 768 an image: too much to keep
# Per tier: target, width of its global token, and the read-out. The papers' are block 8 of 28 and width 2048;
# at `pocket` half the depth and twice the width.
TARGETS: dict[str, tuple[Changes, int, Changes]] = {
    "tiny": (_POCKET, 128, {"block": 1, "hidden": 32}),
    "pocket": (_POCKET, 128, {"block": 2, "hidden": 256}),
    "photo": (_PHOTO, 1280, {"block": 2, "hidden": 256}),
    "small": (_SMALL, 384, {"block": 4, "hidden": 2048}),
    "paper": (_PAPER, 768, {"block": 8, "hidden": 2048, "weight": 0.5}),
}


def _aligned(repa: bool = False, reg: bool = False, **more: Any) -> Callable[[Recipe], Changes]:
    """REPA with options `more` of its section, REG, or both."""

    def of(run: Recipe) -> Changes:
        target, width, readout = TARGETS[run.tier]
        align = {"diffusion.alignment": target | readout | more} if repa else {}
        return align | ({"diffusion.class_token": target, "diffusion.network.token": width} if reg else {})

    return of


def _tuned(run: Recipe) -> Changes:
    return _aligned(repa=True)(run) | {"diffusion.tune": {}, "diffusion.cache": False}


def _split(run: Recipe) -> Changes:
    """A DiT of encoder and head in place of the recipe's network, of about its size."""
    net, (width, depth, heads) = run.diffusion.network, run.diffusion.network.sizes
    head = max(1, depth // 4)
    return {"diffusion.network": {
        "kind": "ddt", "width": width, "depth": max(1, depth - head), "heads": heads, "patch": net.patch, "qk_norm": True,
        "rmsnorm": getattr(net, "rmsnorm", True), "head_width": width, "head_depth": head, "head_heads": heads,
    }}  # fmt: skip


def _in_context(run: Recipe) -> Changes:
    """RAEv2's network of the recipe's width and depth, the second read-out at a quarter of the depth, sampled
    with internal guidance; scale and interval are the paper's."""
    net, (width, depth, heads) = run.diffusion.network, run.diffusion.network.sizes
    return {
        "diffusion.network": {
            "kind": "raev2", "width": width, "depth": depth, "heads": heads, "patch": net.patch,
            "head_width": getattr(net, "head_width", width), "head_depth": getattr(net, "head_depth", 1),
            "head_heads": getattr(net, "head_heads", heads), "base_depth": max(1, depth // 4),
            "time_tokens": 4, "class_tokens": 8,
        },
        "diffusion.cosine_loss": 0.0,
        "protocol.guidance": {"kind": "internal", "scale": 1.78, "interval": (0.1, 1.0)},
    }  # fmt: skip


def _discrete(run: Recipe) -> Changes:
    """Codebook loss (beta 0.25) with a little entropy in place of KL. Numbers of codebooks and entries:
    ours."""
    tokenizer = {"discrete": True, "codebooks": 2, "vocabulary": 64 if run.tier == "tiny" else 1024}
    losses = {"losses.kl": 0.0, "losses.codebook": {"weight": 1.0, "entropy": 0.1}}
    return {f"tokenizer.{name}": value for name, value in tokenizer.items()} | losses


# About 2^5, and the sets of the paper (arXiv 2309.15505, table 1) for 2^8, 2^10, 2^12, 2^14, 2^16 entries.
FSQ_LEVELS = ((8, 4), (8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 6, 5), (8, 8, 8, 5, 5, 5))


def _quantiser(kind: str) -> Callable[[Recipe], Changes]:
    """Another quantiser of about as many entries, with the width and the loss that it needs."""

    def changes(run: Recipe) -> Changes:
        own = run.tokenizer.quantizer
        of_kind = {"fsq": lambda: math.prod(own.levels), "lfq": lambda: 2**run.tokenizer.channels}
        size = of_kind[own.kind]() if own.kind in of_kind else own.size
        if kind == "fsq":
            levels = min(FSQ_LEVELS, key=lambda levels: abs(math.log(math.prod(levels) / size)))
            return {"tokenizer.quantizer": {"kind": kind, "levels": levels},
                    "tokenizer.channels": len(levels), "losses.codebook": 0.0}  # it has no loss
        if kind == "lfq":
            return {"tokenizer.quantizer": {"kind": kind, "commitment": 0.25},
                    "tokenizer.channels": round(math.log2(size)), "losses.codebook.entropy": 0.1}
        back = {} if "codebook" in run.losses else {"losses.codebook": 1.0}  # fsq had none
        return {"tokenizer.quantizer": {"kind": kind, "size": size}} | back

    return changes


def _at_64(run: Recipe) -> Changes:
    """Images of 64 px with latents and VFM maps on the grids that the recipe has, by more down-sampling."""
    finer = 64 / run.data.size
    changes = {"data.size": 64, "tokenizer.factor": round(run.tokenizer.factor * finer)}
    if run.vfm is not None:
        changes["vfm.upscale"] = run.vfm.upscale / finer
    if widths := getattr(run.tokenizer, "block_out_channels", None):
        changes["tokenizer.block_out_channels"] = (*widths, *widths[-1:] * round(math.log2(finer)))
    return changes


def _on_a_sphere(run: Recipe) -> Changes:
    """Latents on the sphere of the mean length of a normal vector and the spherical path (HAE's), in fp32;
    solver and cosine term as that path allows."""
    from vfmlab.nn.sphere import mean_length

    solver = run.protocol.sampler.solver
    return {
        "tokenizer.radius": mean_length(run.tokenizer.channels), "diffusion.path": "sphere",
        "diffusion.cosine_loss": 0.0, "diffusion.train.precision": "fp32",
        "protocol.sampler.solver": solver if solver == "heun" else "euler",
    }  # fmt: skip


VARIANTS: dict[str, Variant] = {
    name: Variant(about, changes, needs="decoder") for name, about, changes in (
        ("plain_decoder", "3x3 residual blocks, nearest up-sampling, z' read once, last VFM layer only", _SINGLE),
        ("fusion", "the plain decoder with z' fused into every block", _FUSED),
        ("modern_blocks", "the whole decoder, last VFM layer only", _LAST),
        ("multi_layer", "the whole decoder, all VFM layers of the run: the run as it is", {}),
        ("plain_matched", "plain_decoder with about the whole decoder's parameters", _matched(_SINGLE)),
        ("fusion_matched", "fusion with about the whole decoder's parameters", _matched(_FUSED)),
        ("no_fusion", "z' enters block 0 only", _off("fusion")),
        ("no_attention", "no self-attention in the decoder", _off("attention")),
        ("no_style", "no mapping network, no modulation", _off("style")),
        ("no_blur", "no blur after up-sampling", _off("blur")),
        ("no_sum", "images are read from each block's features, not from their running sum", _off("running_sum")),
        ("no_multiscale", "an image from the last block only, and no loss on lower ones", _off("multiscale") | {"losses.multiscale": 0}),
        ("conv_blocks", "3x3 residual blocks in place of ConvNeXt layers", {"tokenizer.decoder.layer": "conv"}),
        ("nearest", "nearest-neighbour up-sampling in place of pixel-shuffle", {"tokenizer.decoder.upsample": "nearest"}),
        ("no_kl", "a deterministic latent: no log-variance, no KL term", {"tokenizer.kl": False, "losses.kl": 0}),
        *((f"d{d}", f"{d} latent channels, the same decoder behind z'", _width(d)) for d in WIDTHS),
        ("f8", "down-sampling by 8", {"tokenizer.factor": 8}),
        ("f16", "down-sampling by 16", {"tokenizer.factor": 16}),
    )
} | {
    "random": Variant("control: a VFM of random weights, as encoder and as target", {"vfm.weights": "random"}, named=True),
    "encoder_random": Variant("VFMTok reads a VFM of random weights, rebuilds the true one's last level", {"tokenizer.encoder": "random"}, named=True, needs="regions"),
    "no_vf": Variant("control: without the VF loss", {"losses.vf.weight": 0.0}, named=True),
    "last_layer": Variant("control: the last of the VFM's layers only", _last_layer, named=True, needs="vfm"),
    "64px": Variant("images of 64 px on the same latent and VFM grids", _at_64, True, "tokenizer"),
    "sphere": Variant("latents on a sphere, joined with noise along great circles", _on_a_sphere),
    "discrete": Variant("a quantised latent in place of the Gaussian", _discrete, named=True),
    **{kind: Variant(f"the quantiser is {about}", _quantiser(kind), True, "quantiser") for kind, about in (
        ("vq", "the plain one: the nearest entry of a learned codebook"), ("cosine", "the nearest by angle"),
        ("simvq", "SimVQ: one linear map of frozen vectors"), ("fsq", "FSQ: channels rounded to levels"),
        ("lfq", "LFQ: signs of the channels"), ("ema", "a codebook of moving averages"))},
    "repa": Variant("REPA: an early block is aligned with a VFM's patch tokens", _aligned(True), True, "diffusion"),
    "irepa": Variant("REPA with a convolution and spatially normalised targets", _aligned(True, projector="conv", spatial_norm=1.0), True, "diffusion"),
    "reg": Variant("REG: a VFM's global token is denoised beside the latents", _aligned(reg=True), True, "diffusion"),
    "joint": Variant("REPA and REG", _aligned(True, True), True, "diffusion"),
    "repa_e": Variant("REPA-E: the tokenizer learns on through the alignment loss", _tuned, True, "diffusion"),
    "adamw": Variant("AdamW trains the whole diffusion model", {"diffusion.train.optimizer": "adamw", "diffusion.train.matrix_lr": None}, True, "diffusion"),
    "muon": Variant("Muon trains the matrices inside the diffusion model's blocks", {"diffusion.train.optimizer": "muon"}, True, "diffusion"),
    "raev2": Variant("RAEv2's network: conditions as tokens, clean latents predicted, internal guidance", _in_context, True, "diffusion"),
    "ddt": Variant("a DiT of encoder and head, whose encoder can serve several sampling steps", _split, True, "diffusion"),
}  # fmt: skip
WHOLE = {"diffusion.network", "tokenizer.quantizer", "ar.network"}
FITTED = ("plain_matched", "fusion_matched")
# What a variant needs: whether a recipe has it, what it is called, and a preset that has it.
PARTS: dict[str, tuple[Callable[[Recipe], Any], str, str]] = {
    "decoder": (lambda run: getattr(getattr(run.tokenizer, "decoder", None), "kind", None) == "progressive",
                "a progressive decoder", "pocket_vfm_vae"),
    "tokenizer": (lambda run: run.tokenizer, "a tokenizer", "pocket_vfm_vae"),
    "diffusion": (lambda run: run.diffusion, "a diffusion model", "pocket_vfm_vae"),
    "quantiser": (lambda run: run.tokenizer and run.tokenizer.quantised, "a quantiser", "pocket_vqgan"),
    "regions": (lambda run: run.tokenizer and run.tokenizer.method == "vfmtok",
                "VFMTok's encoder of region tokens", "pocket_vfmtok"),
    "vfm": (lambda run: run.vfm, "the 'vfm' section", "pocket_vfm_vae"),
}


def apply(recipe: Recipe, name: str) -> Recipe:
    """`recipe` changed as variant `name` says.

    Raises:
        ConfigError: no such variant, or the recipe has not the part that it changes.
    """
    if name not in VARIANTS:
        raise ConfigError(f"unknown variant '{name}'{nearest(name, VARIANTS)}")
    variant = VARIANTS[name]
    if variant.needs:
        _check(recipe, name, variant.needs)
    changes = variant.changes(recipe) if callable(variant.changes) else variant.changes
    if any(field.startswith("vfm.") for field in changes):
        _check(recipe, name, "vfm")
    if variant.named:
        if variant.needs == "diffusion":  # another diffusion model on the same tokenizer
            changes = changes | {"diffusion.tokenizer_of": recipe.diffusion.tokenizer_of or recipe.name}
        changes = changes | {"name": f"{recipe.name}_{name}"}
    return _out_of_stages(change(recipe, changes), changes)


def _out_of_stages(recipe: Recipe, changes: Changes) -> Recipe:
    """A loss that `changes` take out stays out: no stage brings it back with a weight of its own."""
    gone = {field.split(".")[1] for field, value in changes.items()
            if re.fullmatch(r"losses\.[^.]+(\.weight)?", field) and value == 0}
    tree = recipe.model_dump(mode="json")
    for stage in tree["stages"]:
        stage["losses"] = {term: own for term, own in stage["losses"].items() if term not in gone or own == 0}
    return recipe if tree == recipe.model_dump(mode="json") else parse(tree)


def change(recipe: Recipe, changes: Changes) -> Recipe:
    """`recipe` with dotted changes, of which those of :data:`WHOLE` replace a whole part."""
    tree = recipe.model_dump(mode="json")
    for field in WHOLE & changes.keys():
        section, part = field.split(".")
        tree[section][part] = changes[field]
    if WHOLE & changes.keys():
        recipe = parse(tree)
    return override(recipe, {field: value for field, value in changes.items() if field not in WHOLE})


def _check(recipe: Recipe, name: str, part: str) -> None:
    has, what, example = PARTS[part]
    if not has(recipe):
        raise ConfigError(f"variant '{name}' of '{recipe.name}': it changes {what}, which this run does not "
                          f"have; use for example {example}")
