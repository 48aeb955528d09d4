"""A family of released checkpoints: how its files are read and become a tokenizer of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.errors import ConfigError, nearest
from vfmlab.registry import IMPORTERS
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.weights import io

STATISTICS = ("stat_mean", "stat_std", "stat_count")
Config = dict[str, Any]
State = dict[str, Tensor]
Moments = tuple[Tensor, Tensor]  # latent mean and std
Batches = Callable[[], Iterable[Tensor]]  # of images of the run, B 3 H W in [-1, 1]


def plain_sections(module: Tokenizer, config: Config) -> Config:
    return {"tokenizer": module.config.model_dump(mode="json"), "vfm": None, "size": module.size}


def plain_put(tokenizer: Tokenizer, module: Tokenizer, known: Moments | None,
              batches: Batches) -> Moments | None:
    agree(tokenizer.config, module.config, "tokenizer")
    state = {key: value for key, value in module.state_dict().items() if key not in STATISTICS}
    io.load(tokenizer, state, f"imported '{module.config.method}'", keep=STATISTICS)
    return known


def layers_put(tokenizer: Tokenizer, module: Tokenizer, known: Moments | None,
               batches: Batches) -> Moments | None:
    """Of tokenizers that read several layers of their VFM."""
    if tokenizer.layers != module.layers:
        raise ConfigError(f"vfm.layers {list(tokenizer.layers)}, but the imported weights read "
                          f"{list(module.layers)}")
    module.attach(tokenizer.vfm)  # raises if widths or grids are others
    return plain_put(tokenizer, module, known, batches)


@dataclass
class Family:
    """Released checkpoints of one kind; an entry of `IMPORTERS`.

    build: (state dict in the release's names, its configuration) -> module. arguments: the release's config
    file as plain data -> that configuration; a file may also hold it flat. path: of networks that were not
    trained on the linear one. The other two are for tokenizers. sections: (module, configuration) ->
    {"tokenizer", "vfm" (or None), "size"} of a run. put: (tokenizer of that run, module, released (mean, std)
    or None, batches of images) -> the (mean, std) that are left for the tokenizer.
    """

    build: Callable[[dict[str, Tensor], Config], nn.Module]
    arguments: Callable[[Config], Config] = dict
    sections: Callable[[Any, Config], Config] = plain_sections
    put: Callable[[Tokenizer, Any, Moments | None, Batches], Moments | None] = plain_put
    path: str | None = None

    def __call__(self, state_dict: dict[str, Tensor], config: Config) -> nn.Module:
        return self.build(state_dict, config)


def family(name: str, **parts: Any) -> Callable:
    """Decorator of an importer: register it as :class:`Family` `name`, with these parts."""

    def register(build: Callable) -> Callable:
        IMPORTERS.register(name)(Family(build, **parts))
        return build

    return register


# Where weights come from; a preset's name: numbers are compared; how latents are normalised around them.
FREE = ("pretrained", "size", "radius", "decode_length", "places")


def agree(run: Any, release: Any, where: str) -> None:
    """ConfigError with the first field in which the run's section differs from the release's."""
    mine, theirs = run.model_dump(mode="json"), release.model_dump(mode="json")
    for field in FREE:
        mine.pop(field, None), theirs.pop(field, None)
    if hasattr(run, "sizes") and run.sizes == release.sizes:
        for field in ("width", "depth", "heads"):
            mine.pop(field), theirs.pop(field)
    difference = next((key for key in theirs if mine.get(key) != theirs[key]), None)
    if difference is not None:
        raise ConfigError(f"{where}.{difference} = {mine.get(difference)!r}, but the imported weights were "
                          f"made with {theirs[difference]!r}; leave the field to the release")


# -- names of tensors --------------------------------------------------------------------------------------


def headed(key: str, table: dict[str, str]) -> str:
    """`key` with the first of the table's prefixes that it has replaced."""
    head = next((head for head in table if key.startswith(head)), "")
    return table.get(head, "") + key.removeprefix(head)


def rewritten(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """`key` after one substitution after the other: (pattern, replacement)."""
    for pattern, new in rules:
        key = re.sub(pattern, new, key)
    return key


def fused(state: State, pattern: str, ours: str, parts: Sequence[str] = "qkv") -> State:
    """Layers that the release holds apart as the one we have; a missing one is left to the strict loader.

    pattern: of a whole key, with the name of the part as the group `part`. ours: the joint key, which `re`
    fills in. parts: their names, in the order in which they are joined.
    """
    out = {}
    for key, value in state.items():
        match = re.fullmatch(pattern, key)
        whole = match and [key[:match.start("part")] + name + key[match.end("part"):] for name in parts]
        if not whole or any(part not in state for part in whole):
            out[key] = value
        elif match["part"] == parts[0]:
            out[match.expand(ours)] = torch.cat([state[part] for part in whole])
    return out


# -- config files ------------------------------------------------------------------------------------------


def settings(config: Config, defaults: Config, what: str, unread: Collection[str] = ()) -> Config:
    """`defaults` with `config` over them; :class:`ConfigError` for an argument the release does not know.

    unread: arguments without an effect here.
    """
    for key, value in config.items():
        if key not in defaults and key not in unread:
            raise ConfigError(f"{what}: unknown argument '{key}' = {value!r}{nearest(key, defaults)}")
    return defaults | {key: value for key, value in config.items() if key in defaults}


def needed(config: Config, names: Iterable[str], what: str) -> None:
    """:class:`ConfigError` for a config without one of `names`."""
    if missing := [name for name in names if name not in config]:
        raise ConfigError(f"{what} config has no field '{missing[0]}'; give the release's own")


def check_fixed(config: Config, fixed: Config, what: str) -> None:
    """:class:`ConfigError` for an argument that has another value than the only one supported."""
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ConfigError(f"{what}: {name} = {config[name]!r} is not supported, only {value!r}")


def chosen(config: Config, name: str, table: Config, what: str) -> Any:
    """What `table` has for the argument `name`; :class:`ConfigError` for a value that it does not have."""
    if config[name] not in table:
        raise ConfigError(f"{what}: {name} = {config[name]!r} is not supported, only "
                          f"{', '.join(map(repr, table))}")
    return table[config[name]]


def find(tree: Any, *keys: str) -> dict[str, Any] | None:
    """The first mapping, outermost first, that has all `keys`."""
    return next((node for node in mappings(tree) if all(key in node for key in keys)), None)


def section(name: str, *keys: str) -> Callable[[Config], Config]:
    """The `arguments` of a family whose configs have them in the first mapping with all `keys`."""

    def arguments(tree: Config) -> Config:
        value = find(tree, *keys)
        if value is None:
            listed = " and ".join([", ".join(f"'{key}'" for key in keys[:-1]), f"'{keys[-1]}'"])
            raise ConfigError(f"{name} config: no section has {listed}; give the release's")
        return value

    return arguments


def scalar(tree: Any, *names: str) -> Any:
    """The first scalar called one of `names`, outermost first; None if there is none."""
    for name in names:
        for node in mappings(tree):
            if name in node and not isinstance(node[name], dict | list):
                return node[name]
    return None


def mappings(tree: Any) -> Iterator[dict[str, Any]]:
    """All mappings in plain data, outermost first."""
    level, known = [tree], set()
    while level:
        # By identity: an alias of YAML may repeat a node, or lead in a circle.
        new = {id(node): node for node in level if isinstance(node, dict | list) and id(node) not in known}
        known |= set(new)
        level = list(new.values())
        yield from (node for node in level if isinstance(node, dict))
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
