"""Config files of releases -> the arguments that an importer takes. One function per layout; nothing is guessed.

A file may also hold these arguments themselves, flat; then they pass as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vfmlab.diffusion.dit import SIZES
from vfmlab.errors import ConfigError


def read_config(path: str | Path) -> dict[str, Any]:
    """A config file (.yaml, .yml, .json) as plain data; nothing in it is run. :class:`ConfigError` for anything else."""
    import yaml

    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"--config: '{path}' cannot be read: {reason}; give the release's YAML or JSON") from None
    try:
        tree = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: '{path}' is not YAML or JSON ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--config: '{path}' holds a {type(tree).__name__}; it must hold fields")
    return tree


def arguments(family: str, tree: dict[str, Any]) -> dict[str, Any]:
    """The importer's arguments in a release's config file.

    Args:
        family: an entry of `IMPORTERS`. tree: the file as plain data.

    Raises:
        ConfigError: the file is not of that family.
    """
    reader = {
        "vfm-vae": _vfm_vae, "va-vae": _ldm, "lightningdit": _lightningdit, "dit-dh": _rae, "rae-decoder": _decoder,
        "sd-vae": _diffusers, "sit": _sit, "repa": _sit,
    }.get(family)  # fmt: skip
    return reader(tree) if reader else tree


def _find(tree: Any, *keys: str) -> dict[str, Any] | None:
    """The first mapping, outermost first, that has all `keys`."""
    return next((found for found in _mappings(tree) if all(key in found for key in keys)), None)


def _mappings(tree: Any) -> Iterator[dict[str, Any]]:
    level, known = [tree], set()
    while level:
        # By identity: an alias of YAML may repeat a node, or lead in a circle.
        new = {id(node): node for node in level if isinstance(node, dict | list) and id(node) not in known}
        known |= set(new)
        level = list(new.values())
        yield from (node for node in level if isinstance(node, dict))
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]


def _value(tree: Any, *names: str) -> Any:
    """The first scalar called one of `names`, outermost first; None if there is none."""
    for name in names:
        for found in _mappings(tree):
            if name in found and not isinstance(found[name], dict | list):
                return found[name]
    return None


def _vfm_vae(tree: dict[str, Any]) -> dict[str, Any]:
    """The generator's arguments, wherever they stand; the resolution may stand with the data."""
    found = _find(tree, "z_dimension", "patch_from_layers")
    if found is None:
        raise ConfigError("vfm-vae config: no section has 'z_dimension' and 'patch_from_layers'; give the release's YAML")
    found = dict(found)
    if "synthesis_kwargs" not in found and (inner := _find(tree, "channel_base", "channel_max")) is not None:
        found["synthesis_kwargs"] = inner
    if "img_resolution" not in found:
        size = _value(tree, "img_resolution", "resolution", "image_size", "img_size")
        if size is None:
            raise ConfigError("vfm-vae config: no 'img_resolution'; add it to the YAML, for example img_resolution: 256")
        found["img_resolution"] = int(size)
    return found


def _ldm(tree: dict[str, Any]) -> dict[str, Any]:
    """LDM's YAML: `model.params` with `embed_dim` and `ddconfig`."""
    found = _find(tree, "embed_dim", "ddconfig") or _find(tree, "embed_dim", "ch_mult")
    if found is None:
        raise ConfigError("va-vae config: no section has 'embed_dim' and 'ddconfig'; give the release's YAML")
    return {"embed_dim": found["embed_dim"], **found.get("ddconfig", found)}


def _lightningdit(tree: dict[str, Any]) -> dict[str, Any]:
    """LightningDiT's YAML: `model.model_type` and switches, `data.image_size`, `vae.downsample_ratio`."""
    model = tree.get("model")
    if not isinstance(model, dict):
        return tree
    ours = {"in_channels" if key == "in_chans" else key: value for key, value in model.items() if key != "model_type"}
    if "model_type" in model:
        ours = {**_sizes(model["model_type"]), **ours}
    data, vae = tree.get("data", {}), tree.get("vae", {})
    if "num_classes" in data:
        ours.setdefault("num_classes", data["num_classes"])
    if "image_size" in data:
        ours.setdefault("input_size", data["image_size"] // vae.get("downsample_ratio", 16))
    return ours


def _rae(tree: dict[str, Any]) -> dict[str, Any]:
    """RAE's YAML: `stage_2.params`."""
    section = tree.get("stage_2", tree)
    return section.get("params", section)


def _decoder(tree: dict[str, Any]) -> dict[str, Any]:
    """The decoder's config.json; sizes that are filled in by code in the release ("SHOULD BE RELOADED") are left out."""
    return {key: value for key, value in tree.items() if value != "SHOULD BE RELOADED"}


def _diffusers(tree: dict[str, Any]) -> dict[str, Any]:
    """diffusers' config.json without its bookkeeping."""
    return {key: value for key, value in tree.items() if not key.startswith("_")}


def _sit(tree: dict[str, Any]) -> dict[str, Any]:
    """Flat arguments; `model` may name a size, as on the releases' command line."""
    ours = {key: value for key, value in tree.items() if key != "model"}
    return {**_sizes(tree["model"]), **ours} if isinstance(tree.get("model"), str) else ours


def _sizes(name: str) -> dict[str, Any]:
    """"LightningDiT-XL/1", "SiT-B/2" -> sizes and patch."""
    size, _, patch = name.rpartition("-")[2].partition("/")
    if size not in SIZES or not patch.isdigit():
        raise ConfigError(f"config: model '{name}' has no known size; sizes are {', '.join(SIZES)}, for example SiT-XL/2")
    width, depth, heads = SIZES[size]
    return {"hidden_size": width, "depth": depth, "num_heads": heads, "patch_size": int(patch)}
