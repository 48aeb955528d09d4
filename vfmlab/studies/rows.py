"""Rows of a comparison: a label, a setting, a seed.

A row is written `[LABEL=]NAME[:field=value,...]`, for example `"no VF=pocket_vfm_vae:losses.vf.weight=0"`,
`pocket_vfm_vae+plain_decoder` or `pocket_rae@pocket_plain_vae`; names of recipes: see `vfmlab.presets.table`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vfmlab import api, config
from vfmlab.errors import ConfigError

Until = Literal["first_stage", "tokenizer"] | None


@dataclass(frozen=True)
class Row:
    """One setting with one seed. until: leave out what comes after the tokenizer, its first stage, or the
    stage of that name."""

    label: str
    seed: int
    run: config.Recipe
    until: Until | str = None

    @property
    def tokenizers(self) -> list[config.Phase]:
        """The stages of the tokenizer; the last one is what diffusion is trained on."""
        stages = [phase for phase in self.run.phases() if phase.generator is None]
        named = [i + 1 for i, phase in enumerate(stages) if phase.stage == self.until]
        return stages[:1] if self.until == "first_stage" else stages[: named[0] if named else None]

    @property
    def phases(self) -> list[config.Phase]:
        """What is trained, first to last: stages of the tokenizer, then the diffusion model."""
        return self.tokenizers if self.until else self.run.phases()


def listed(names: str | Sequence[str]) -> list[str]:
    """Names as a notebook's parameter has them, separated by commas, or a list of them."""
    names = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in names if name.strip()]


def parse(specs: Sequence[str], seeds: Sequence[int], overrides: dict[str, Any] | str | None = None,
          until: Until = None) -> list[Row]:
    """All rows, seeds outermost, so that the first seed is complete before the second begins.

    Raises:
        ConfigError: a row that is no setting, two rows with one label or config, no seed or one that is
        named twice, an unknown `until`.
    """
    if until not in (None, "first_stage", "tokenizer"):
        raise ConfigError(f"until = '{until}': a comparison goes to the end, or stops after the 'tokenizer' "
                          "or its 'first_stage'")
    check_seeds(seeds)
    rows, common = [], config.parse_overrides(overrides)
    for seed in seeds:
        for spec in specs:
            label, name, fields = _read(spec)
            if "seed" in {**common, **fields}:
                raise ConfigError(f"row '{spec}': its seeds are {', '.join(map(str, seeds))}; leave 'seed' "
                                  "out of the fields and of --set")
            run = api.resolve(name, {**common, **fields}, seed=seed)
            if run.tokenizer is None:
                raise ConfigError(f"row '{spec}': '{name}' trains no tokenizer; name a preset that does")
            rows.append(Row(label, seed, run, until))
    labels, ids = [(row.label, row.seed) for row in rows], [row.phases[-1].id for row in rows]
    for what, keys in (("label", labels), ("config", ids)):
        twice = [row.label for row, key in zip(rows, keys, strict=True) if keys.count(key) > 1]
        if twice:
            raise ConfigError(f"rows '{twice[0]}' and '{twice[1]}' have the same {what}; rows must differ in "
                              "preset, variant, fields or seed, and in label")
    return rows


def check_seeds(seeds: Sequence[int]) -> None:
    """ConfigError where no seed is named, or one twice."""
    if not len(seeds):
        raise ConfigError("seeds: none is named; give at least one, for example 0 1")
    again = next((seed for seed in seeds if list(seeds).count(seed) > 1), None)
    if again is not None:
        raise ConfigError(f"seeds {', '.join(map(str, seeds))}: {again} is named twice; name each seed once")


def _read(spec: str) -> tuple[str, str, dict[str, Any]]:
    """label, name of the recipe, fields. The label is what stands before a '=' that comes before the ':'."""
    head, _, tail = spec.partition(":")
    label, _, name = head.rpartition("=")
    fields = [f for f in re.split(r",(?=[\w.]+=)", tail) if f]  # not commas inside of lists and objects
    return label or spec, name, config.parse_assignments(fields)
