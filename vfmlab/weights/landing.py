"""How a family's imported module becomes a tokenizer of a run: the run's sections, and the weights put in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.errors import CheckpointError, ConfigError, nearest
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.vfm.table import TABLE
from vfmlab.weights import io, statistics
from vfmlab.weights.families.rae_decoder import adopt

STATISTICS = ("stat_mean", "stat_std", "stat_count")
VFMS = {  # names of vision models in releases' configs -> our table's
    "siglip2-base-patch16-256": "siglip2_b16_256", "siglip2-base-patch16-384": "siglip2_b16_384",
    "siglip2-base-patch16-512": "siglip2_b16_512", "siglip2-large-patch16-256": "siglip2_l16_256",
    "siglip2-large-patch16-384": "siglip2_l16_384", "siglip2-large-patch16-512": "siglip2_l16_512",
    "dinov2-small": "dinov2_s14", "dinov2-base": "dinov2_b14", "dinov2-large": "dinov2_l14", "dinov2-giant": "dinov2_g14",
    "vit-mae-base": "mae_b16", "vit-mae-large": "mae_l16",
}  # fmt: skip


@dataclass(frozen=True)
class Landing:
    """Of one family.

    sections: (module, release's config) -> {"tokenizer", "vfm" (or None), "size"} of a run. put: (tokenizer of that run,
    module, released (mean, std) or None, batches of images) -> the (mean, std) that are left for the tokenizer.
    """

    sections: Callable[[nn.Module, dict[str, Any]], dict[str, Any]]
    put: Callable[..., tuple[Tensor, Tensor] | None]


def landing(family: str) -> Landing:
    return {"vfm-vae": Landing(_vfm_vae, _put_vfm_vae), "rae-decoder": Landing(_rae, _put_rae)}.get(family, Landing(_plain, _put))


def agree(asked: Any, found: Any, where: str) -> None:
    """:class:`ConfigError` with the first field in which the run's section differs from what the release needs."""
    mine, theirs = asked.model_dump(mode="json"), found.model_dump(mode="json")
    for field in ("pretrained", "size"):  # where weights come from; a preset's name, whose numbers are compared
        mine.pop(field, None), theirs.pop(field, None)
    if hasattr(asked, "sizes") and asked.sizes == found.sizes:
        for field in ("width", "depth", "heads"):
            mine.pop(field), theirs.pop(field)
    difference = next((key for key in theirs if mine.get(key) != theirs[key]), None)
    if difference is not None:
        raise ConfigError(
            f"{where}.{difference} = {mine.get(difference)!r}, but the imported weights were made with "
            f"{theirs[difference]!r}; leave the field to the release"
        )


def _plain(module: Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    return {"tokenizer": module.config.model_dump(mode="json"), "vfm": None, "size": module.size}


def _put(
    tokenizer: Tokenizer, module: Tokenizer, known: tuple[Tensor, Tensor] | None, batches: Callable[[], Iterable[Tensor]]
) -> tuple[Tensor, Tensor] | None:
    agree(tokenizer.config, module.config, "tokenizer")
    state = {key: value for key, value in module.state_dict().items() if key not in STATISTICS}
    io.load(tokenizer, state, f"imported '{module.config.method}'", keep=STATISTICS)
    return known


def _vfm_vae(module: Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    arguments = config.get("G_kwargs", config)
    called = str(arguments.get("vfm_name", "")).rstrip("/").rpartition("/")[2]
    name = VFMS.get(called, called)
    if name not in TABLE and not name.startswith("timm:"):
        raise ConfigError(
            f"vfm-vae config: vfm_name '{called}' is not a known vision model{nearest(called, [*VFMS, *TABLE])}; "
            "write a name of vfmlab's table, or timm:NAME, into the config"
        )
    vfm = {"name": name, "layers": list(module.layers), "upscale": arguments.get("scale_factor", 1.0)}
    return {**_plain(module, config), "vfm": vfm}


def _put_vfm_vae(
    tokenizer: Tokenizer, module: Tokenizer, known: tuple[Tensor, Tensor] | None, batches: Callable[[], Iterable[Tensor]]
) -> tuple[Tensor, Tensor] | None:
    if tokenizer.layers != module.layers:
        raise ConfigError(f"vfm.layers {list(tokenizer.layers)}, but the imported weights read {list(module.layers)}")
    module.attach(tokenizer.vfm)  # raises if widths or grids are others
    return _put(tokenizer, module, known, batches)


def _rae(module: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    decoder = module.decoder
    channels = decoder.embed.in_features
    method = {"method": "rae", "channels": channels, "factor": decoder.patch, "decoder": decoder.config.model_dump(mode="json")}
    return {"tokenizer": method, "vfm": None, "size": decoder.side * decoder.patch}


@torch.no_grad()
def _put_rae(
    tokenizer: Tokenizer, module: nn.Module, known: tuple[Tensor, Tensor] | None, batches: Callable[[], Iterable[Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """RAE's latent is standardised per channel inside the tokenizer; the outer statistics do the rest."""
    agree(tokenizer.config.decoder, module.decoder.config, "tokenizer.decoder")
    if module.decoder.side != tokenizer.decoder.side or module.decoder.patch != tokenizer.decoder.patch:
        raise CheckpointError(
            f"rae-decoder is for a {module.decoder.side} x {module.decoder.side} grid of {module.decoder.patch} px patches, "
            f"the run has {tokenizer.decoder.side} x {tokenizer.decoder.side} of {tokenizer.decoder.patch} px; "
            f"set data.size={module.decoder.side * module.decoder.patch}"
        )
    if known is None:
        tokenizer.begin(list(batches()))
    else:
        center, spread = statistics.per_channel(*known)
        tokenizer.standardise.mean.copy_(center)
        tokenizer.standardise.std.copy_(spread)
    encoder = tokenizer.vfm
    adopt(tokenizer, module, encoder.mean.flatten().tolist(), encoder.std.flatten().tolist())
    if known is None:
        return None
    mean, std = known  # per place, where the release has them so: what standardising by channel leaves to do
    center, spread = (value if mean.ndim == 1 else value.view(-1, 1, 1) for value in (center, spread))
    return (mean - center) / spread, std / spread
