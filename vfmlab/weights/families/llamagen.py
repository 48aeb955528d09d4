"""LlamaGen's convolutional tokenizer (arXiv 2406.06525, VQ-16 and VQ-8) -> tokenizer `vqgan`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vfmlab.errors import ConfigError
from vfmlab.registry import TOKENIZERS
from vfmlab.tokenizers.vqgan import VQGAN
from vfmlab.weights import io
from vfmlab.weights.family import STATISTICS, family, headed, rewritten, settings

NAME = "llamagen-vq"
DEFAULTS: dict[str, Any] = {
    "image_size": 256, "ch": 128, "ch_mult": (1, 1, 2, 2, 4), "encoder_res_blocks": 2, "z_channels": 256,
    "codebook_size": 16_384, "codebook_embed_dim": 8, "commit_loss_beta": 0.25, "entropy_loss_ratio": 0.0,
}  # fmt: skip
# Facts of a training, and what follows from the others.
WITHOUT_EFFECT = ("batch", "seed", "checks", "parameters", "decoder_res_blocks", "loss", "image_size_in")
RENAMES = [
    (r"\bnin_shortcut\b", "shortcut"),
    (r"\bproj_out\b", "proj"),
    (r"\bmid\.0\.", "middle.block1."),
    (r"\bmid\.1\.", "middle.attention."),
    (r"\bmid\.2\.", "middle.block2."),
    (r"\bconv_blocks\.", "stages."),
    (r"\bres\.(\d+)\.", r"blocks.\1."),
    (r"\battn\.(\d+)\.", r"attentions.\1."),
    (r"\b(?:down|up)sample\.conv\b", "resample.conv"),
]
"""Of the convolutional networks: a key of the release -> ours. The release counts a decoder's levels from the
coarsest, as we do."""
HEADS = {"quantize.embedding.": "quantizer.", "quant_conv.": "quant.",
         "post_quant_conv.": "decoder.post_quant.", "decoder.": "decoder.net."}


def counters(module: VQGAN) -> list[str]:
    """What a release has no values for: latent statistics, and how often an entry was used."""
    return [*STATISTICS, "quantizer.usage", "quantizer.batches"]


@family(NAME)
def llamagen_vq(state_dict: dict[str, Tensor], config: dict[str, Any]) -> VQGAN:
    """A tokenizer with `codes(images)` and `decode_codes(codes)`; it has no latent statistics yet.

    Args:
        state_dict: keys as released. config: `image_size` (weights of one size fit others), `ch`, `ch_mult`,
            `encoder_res_blocks` (the decoder has one more), `z_channels`, `codebook_size`,
            `codebook_embed_dim`, `commit_loss_beta`, `entropy_loss_ratio`; the defaults are VQ-16's.
    """
    c = settings(config, DEFAULTS, NAME, WITHOUT_EFFECT)
    multipliers, size = tuple(c["ch_mult"]), int(c["image_size"])
    factor, blocks = 2 ** (len(multipliers) - 1), int(c["encoder_res_blocks"])
    if size % factor:
        raise ConfigError(f"{NAME}: image_size {size} is not divisible by {factor}, the factor of ch_mult "
                          f"{list(multipliers)}")
    shared = {"width": c["ch"], "multipliers": multipliers, "attention": (size // factor,),
              "inner": c["z_channels"]}
    options = VQGAN.Config.model_validate({
        "channels": c["codebook_embed_dim"], "factor": factor, "blocks": blocks, **shared,
        "quantizer": {"kind": "cosine", "size": c["codebook_size"], "beta": c["commit_loss_beta"]},
        "decoder": {"kind": "conv", "blocks": blocks + 1, **shared},
    })
    tokenizer = TOKENIZERS.get("vqgan")(options, size)
    renamed = {headed(rewritten(key, RENAMES), HEADS): value for key, value in state_dict.items()
               if not key.endswith("codebook_used")}
    return io.load(tokenizer, renamed, f"{NAME} checkpoint", keep=counters(tokenizer)).eval()
