"""Released autoencoder of GAE (sii-research/GAE, Apache-2.0 by its README; arXiv 2603.10365) -> tokenizer
`gae`, without its teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vfmlab.tokenizers.gae import GAE
from vfmlab.weights import io
from vfmlab.weights.family import STATISTICS, family, headed, needed, section

PARTS = {  # prefixes of the release, and shorter ones -> ours
    "encoder.": "encoder.", "enc.": "encoder.", "adapter.model.": "adapter.", "adapter.": "adapter.",
    "decoder.": "decoder.", "dec.": "decoder.",
}  # fmt: skip


@family("gae", arguments=section("gae", "encoder", "latent", "decoder"))
def import_gae(state_dict: dict[str, Tensor], config: dict[str, Any]) -> GAE:
    """Release names and values -> :class:`vfmlab.tokenizers.gae.GAE`; it has no latent statistics yet.

    Args:
        state_dict: keys under "encoder." (or "enc."), "adapter." and "decoder." (or "dec.").
        config: `encoder` with `img`, `patch`, `dim`, `layers`, `heads`, `enc_out`; `latent`, the channels;
            `decoder` with `layers`, and `dim` and `heads` where they are not the encoder's; `sigma_std`.
    """
    needed(config, ("encoder", "decoder", "latent"), "gae")
    encoder, decoder, channels = config["encoder"], config["decoder"], int(config["latent"])
    needed(encoder, ("img", "patch", "dim", "layers", "heads", "enc_out"), "gae")
    needed(decoder, ("layers",), "gae")
    size, patch, width = int(encoder["img"]), int(encoder["patch"]), int(encoder["dim"])
    heads = int(encoder["heads"])
    options = GAE.Config.model_validate({
        "channels": channels, "factor": patch, "width": width, "depth": int(encoder["layers"]), "heads": heads,
        "features": int(encoder["enc_out"]), "noise": float(config.get("sigma_std", 0.2)),
        "decoder": {"kind": "plain_vit", "width": int(decoder.get("dim", width)),
                    "depth": int(decoder["layers"]), "heads": int(decoder.get("heads", heads))},
    })  # fmt: skip
    tokenizer = GAE(options, size)
    # Parts may be kept as "enc.sd.".
    state = {headed(key.replace(".sd.", ".", 1), PARTS): value for key, value in state_dict.items()}
    return io.load(tokenizer, state, "gae checkpoint", keep=STATISTICS)
