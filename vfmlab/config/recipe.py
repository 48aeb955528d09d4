"""The configuration of a run: frozen pydantic models, one section per part, nothing unknown allowed.

A :class:`Run` describes a whole pipeline: images -> tokenizer (in one or several stages) -> latents -> diffusion ->
samples. It is plain JSON, and the same JSON always gives the same id. `run.phases()` splits it into what is trained one
after the other, so that two pipelines that differ only in their diffusion section, or in a later stage, share what comes
before. The sections are in `vfmlab/config/schema.py`; all of them are to be had from here.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, model_validator

from vfmlab.config.schema import (
    VFM,
    Alignment,
    AnyDecoder,
    ClassToken,
    Data,
    DecoderConfig,
    Diffusion,
    Equivariance,
    Guidance,
    Imported,
    LossConfig,
    Losses,
    NetworkConfig,
    Pretrain,
    Protocol,
    Sampler,
    Section,
    TimeSampling,
    TokenizerConfig,
    Train,
    Tune,
    by_name,
    loss_config,
    under,
)
from vfmlab.errors import ConfigError, nearest
from vfmlab.registry import DECODERS, LOSSES, NETWORKS, TOKENIZERS

__all__ = [
    "VFM", "Alignment", "AnyDecoder", "ClassToken", "Data", "DecoderConfig", "Diffusion", "Equivariance", "Guidance", "Imported", "LossConfig", "Losses",
    "NetworkConfig", "Pretrain", "Protocol", "Run", "Sampler", "Section", "Stage", "TimeSampling", "TokenizerConfig", "Train", "Tune", "digest", "explain",
    "override", "parse", "parse_assignments",
]  # fmt: skip


class Stage(Section):
    """One stage of a recipe: its name, and only what differs from the stage before (the first: from the run's own fields).

    Each stage is a run `<name>_<stage>` with the stage before as parent; it starts from that run's averaged weights, with
    a fresh optimiser. Recipes with the same first stages share the runs of these.
    """

    name: str = Field(..., pattern=r"^[a-z][a-z0-9]*$")
    trains: tuple[str, ...] | None = Field(None, description="globs on parameter names; null: as before")
    losses: dict[str, Any] = Field({}, description="term -> weight, or the term's fields that change; weight 0 removes the term")
    equivariance: dict[str, Any] = Field({}, description="fields that change")
    train: dict[str, Any] = Field({}, description="fields that change; counts are images of this stage")


class Run(Section):
    """One run, or a pipeline of them. `kind` is the last phase; `phases()` lists all."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9_.]*$")
    tier: Literal["tiny", "pocket", "small", "paper"] = "pocket"
    seed: int = 0
    data: Data = Data()
    vfm: VFM | None = None
    tokenizer: Annotated[SerializeAsAny[TokenizerConfig], by_name(TOKENIZERS, "method")] | None = None
    losses: Losses = Field({})
    equivariance: Equivariance = Equivariance()
    trains: tuple[str, ...] = Field(("*",), description="globs on parameter names; the VFM is always frozen")
    train: Train | None = None
    stages: tuple[Stage, ...] = Field((), description="what the tokenizer's training consists of; none: a single stage, the fields above")
    stage: int | None = Field(None, ge=0, description="the one of `stages` that this run is; null: the whole recipe")
    imported: Imported | None = None
    diffusion: Diffusion | None = None
    pretrain: Pretrain | None = None
    protocol: Protocol = Protocol()

    @model_validator(mode="after")
    def _complete(self) -> Run:
        if self.imported is not None and self.train is not None and not self.stages:
            raise ValueError("imported weights are trained further in stages: move 'train' into one of 'stages', or leave it out")
        if self.train is None and self.imported is None:
            raise ValueError("field 'train' is missing: every run needs a training budget")
        if (self.tokenizer is None) == (self.pretrain is None):
            raise ValueError("a run has either a 'tokenizer' section (tokenizer, diffusion) or a 'pretrain' section (vfm, judge)")
        if self.tokenizer is not None and self.data.size % self.tokenizer.factor:
            raise ValueError(
                f"data.size {self.data.size} is not divisible by tokenizer.factor {self.tokenizer.factor}; "
                f"use {self.data.size - self.data.size % self.tokenizer.factor} or {self.data.size + (-self.data.size) % self.tokenizer.factor}"
            )
        called = [stage.name for stage in self.stages]
        for name in called:
            if called.count(name) > 1 or name in ("tokenizer", "imported", "diffusion"):
                raise ValueError(f"stages {called}: '{name}' is taken; give each stage a name of its own")
        if self.stage is not None and self.stage != len(self.stages) - 1:
            raise ValueError(f"field 'stage' = {self.stage}: a stage's run lists the stages up to itself, here {len(self.stages)}")
        for i in range(len(self.stages)):
            self._settings(i)  # so that a stage that does not fit is refused before the first one is trained
        return self

    def _settings(self, last: int) -> dict[str, Any]:
        """trains, losses, equivariance, train with the changes of stages 0 ... last applied."""
        found = {"trains": self.trains, "equivariance": self.equivariance.model_dump(), "train": {} if self.train is None else self.train.model_dump()}
        losses = {name: term.model_dump() for name, term in self.losses.items()}
        for i, stage in enumerate(self.stages[: last + 1]):
            for name, change in stage.losses.items():
                change = change if isinstance(change, dict) else {"weight": change}
                losses[name] = {**losses.get(name, {}), **change}
            found["trains"] = found["trains"] if stage.trains is None else stage.trains
            found["equivariance"] = {**found["equivariance"], **stage.equivariance}
            found["train"] = {**found["train"], **stage.train}
            try:
                valid = _Settings.model_validate({**found, "losses": losses})
            except ValidationError as error:
                raise under("stages", under(str(i), error)) from None
            losses = {name: term for name, term in losses.items() if name in valid.losses}  # a removed term begins anew, with its defaults
        return dict(valid)

    @property
    def kind(self) -> Literal["pretrain", "tokenizer", "diffusion"]:
        if self.pretrain is not None:
            return "pretrain"
        return "tokenizer" if self.diffusion is None else "diffusion"

    @property
    def id(self) -> str:
        """`<name>-<hash8>`. The protocol is left out of the hash: it decides numbers, not weights.

        So is what is null: a field that a later version adds as null by default leaves the ids of earlier runs alone.
        """
        what = self.model_dump(mode="json", exclude={"protocol"}, exclude_none=True)
        return f"{self.name}-{digest(what)}"

    def settled(self) -> Run:
        """This run with `trains, losses, equivariance, train` as they hold in its stage; itself when it is not a stage."""
        return self if self.stage is None else self.model_copy(update=self._settings(self.stage))

    def phases(self) -> list[Run]:
        """The runs to be trained, first to last; the last is this run (or its last stage): [imported], stages, [diffusion]."""
        if self.pretrain is not None:
            return [self]
        bare = self.model_copy(update={"diffusion": None})
        name = self.name if self.stage is None else self.name.removesuffix(f"_{self.stages[-1].name}")
        if self.diffusion is not None and self.diffusion.tokenizer_of is not None:
            name = self.diffusion.tokenizer_of
        found: list[Run] = []
        if self.imported is not None:
            fresh = {"trains": ("*",), "losses": {}, "equivariance": Equivariance(), "train": None, "stages": (), "stage": None}
            found.append(bare.model_copy(update={"name": f"{name.removesuffix('_imported')}_imported", **fresh}))
        for i, stage in enumerate(self.stages):
            found.append(bare.model_copy(update={"name": f"{name}_{stage.name}", "stages": self.stages[: i + 1], "stage": i}))
        if not found:
            found.append(bare if self.diffusion is None else bare.model_copy(update={"name": f"{name}_tokenizer"}))
        return found if self.diffusion is None else [*found, self]

    @property
    def tokenizer_run(self) -> Run:
        """The run that ends with this pipeline's tokenizer: its last stage, imported weights, or the one tokenizer run."""
        phases = self.phases()
        return phases[-2] if self.kind == "diffusion" else phases[-1]

    @property
    def phase(self) -> str:
        """What this run is within its recipe: a stage's name, "imported", "tokenizer", "diffusion" or "pretrain"."""
        if self.stage is not None:
            return self.stages[self.stage].name
        return "imported" if self.kind == "tokenizer" and self.imported is not None and not self.stages else self.kind

    @property
    def parent(self) -> str | None:
        """Id of the run this one builds on, or None."""
        phases = self.phases()
        return phases[-2].id if len(phases) > 1 else None

    @property
    def budget(self) -> Train | None:
        """The training section of this run's own (last) phase; None for imported weights."""
        return self.diffusion.train if self.diffusion is not None else self.settled().train


class _Settings(Section):
    """What a stage can change."""

    trains: tuple[str, ...]
    losses: Losses
    equivariance: Equivariance
    train: Train


def digest(value: Any) -> str:
    """Eight hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def parse(config: dict[str, Any], where: str = "config") -> Run:
    """A :class:`Run` from JSON-like `config`; a single-line :class:`ConfigError` if it does not fit."""
    try:
        return Run.model_validate(config)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, config)}") from None


def override(run: Run, values: dict[str, Any] | str | None) -> Run:
    """`run` with dotted fields replaced, e.g. `{"train.samples": 50000, "tokenizer.channels": 8}`.

    A string is read as JSON (papermill passes one). Unknown fields and values of the wrong type raise
    :class:`ConfigError` with the field, the value and the nearest right name.
    """
    if isinstance(values, str):
        try:
            values = json.loads(values or "{}")
        except json.JSONDecodeError as error:
            raise ConfigError(f"overrides: not JSON ({error}): {values!r}; write for example '{{\"train.samples\": 50000}}'") from None
    if not values:
        return run
    if not isinstance(values, dict):
        raise ConfigError(f"overrides: expected a JSON object of dotted names, got {values!r}")
    tree = run.model_dump(mode="json")
    for dotted, value in values.items():
        *path, last = dotted.split(".")
        node = tree
        for depth, key in enumerate(path):
            if path[max(0, depth - 1) : depth] == ["losses"] and key.partition(":")[0] in LOSSES:
                node.setdefault(key, {})  # a loss term is added by naming it
            if path[:1] == ["stages"] and depth == 1:
                node = {str(i): stage for i, stage in enumerate(node)} | {stage["name"]: stage for stage in node}
            if not isinstance(node, dict) or (key not in node and path[:1] != ["stages"]):
                raise ConfigError(_unknown(dotted, value, ".".join(path[:depth]), node, key))
            if path[:1] == ["stages"] and key not in node:
                if depth < 3:
                    raise ConfigError(_unknown(dotted, value, ".".join(path[:depth]), node, key))
                node[key] = {}  # a stage says only what differs, so what it does not say yet can be added
            if node[key] is None:  # an absent section is opened by naming one of its fields
                node[key] = {}
            elif isinstance(node[key], int | float) and "losses" in path[:depth]:
                node[key] = {"weight": node[key]}
            node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(_unknown(dotted, value, ".".join(path), node, last))
        if isinstance(value, dict) and isinstance(node.get(last), dict):
            node[last] = {**node[last], **value}
        else:
            node[last] = value
    return parse(tree, "overrides")


def parse_assignments(items: list[str]) -> dict[str, Any]:
    """`["a.b=3", "c=x"]` -> `{"a.b": 3, "c": "x"}`; values are JSON where they parse, text otherwise."""
    values: dict[str, Any] = {}
    for item in items:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set: '{item}' is not of the form field=value, for example train.samples=50000")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values


def _unknown(dotted: str, value: Any, above: str, node: Any, key: str) -> str:
    known = [f"{above}.{name}".lstrip(".") for name in node] if isinstance(node, dict) else []
    return f"overrides: unknown field '{dotted}' = {value!r}{nearest(f'{above}.{key}'.lstrip('.'), known)}"


def explain(error: ValidationError, config: Any) -> str:
    """The first problem of a pydantic error as one line: field, value, complaint, nearest right name."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "lax-or", "SerializeAsAny"))]
    field, value = ".".join(place), first.get("input")
    shown = repr(value) if len(repr(value)) < 80 else repr(value)[:77] + "..."
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        above = "".join(f"{part}." for part in place[:-1])
        return f"unknown field '{field}' = {shown}{nearest(field, [above + name for name in _fields(place[:-1], config)])}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"field '{field}' is missing{more}"
    if first["type"] == "value_error" and not place:
        return f"{message}{more}"
    return f"field '{field}' = {shown}: {message}{more}"


def _fields(place: list[str], config: Any) -> list[str]:
    """Field names of the section at `place`, for the suggestion after an unknown name."""
    model: Any = Run
    if place[:1] == ["stages"]:
        return list(Stage.model_fields) if len(place) == 2 else _fields(place[2:], {})
    try:
        node = config
        for part in place:
            node = node.get(part, {}) if isinstance(node, dict) else {}
            field = model.model_fields[part] if part in getattr(model, "model_fields", {}) else None
            model = field.annotation if field is not None else None
            registry, key = {"tokenizer": (TOKENIZERS, "method"), "decoder": (DECODERS, "kind"), "network": (NETWORKS, "kind")}.get(part, (None, ""))
            if registry is not None:
                model = registry.get(node[key]).Config
            elif place[-2:-1] == ["losses"] and part == place[-1]:
                model = loss_config(part)
            model = next((a for a in getattr(model, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)), model)
    except (KeyError, TypeError, IndexError, ConfigError):
        return []
    return list(getattr(model, "model_fields", {}))

