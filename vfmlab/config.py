"""The configuration of a run: frozen pydantic models, one section per part, nothing unknown allowed.

A :class:`Run` describes a whole pipeline: images -> tokenizer -> latents -> diffusion -> samples. It is plain JSON, and the
same JSON always gives the same id. `run.phases()` splits it into what is trained one after the other, so that two
pipelines that differ only in their diffusion section share one trained tokenizer.

Budgets (`samples`, `*_every`, `warmup`, `ema_halflife`) are counted in training images seen, never in steps, so that
batch size and number of devices do not change what a config means.

Parts that bring their own options (tokenizers, decoders, losses, diffusion networks) declare a nested `Config` derived
from the section here; the registry picks it by name, and an unknown option is refused like any unknown field.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from vfmlab.errors import ConfigError, nearest
from vfmlab.registry import DECODERS, LOSSES, NETWORKS, TOKENIZERS, Registry


class Section(BaseModel):
    """Base of every config section: frozen, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _by_name(registry: Registry, key: str) -> BeforeValidator:
    """Validate a section with the `Config` of the registered part that its field `key` names."""

    def choose(value: Any) -> Any:
        if isinstance(value, str):
            value = {key: value}
        if not isinstance(value, dict):
            return value
        if key not in value:
            raise ValueError(f"needs the field '{key}' (choose from: {', '.join(registry.names())})")
        return registry.get(value[key]).Config.model_validate(value)

    return BeforeValidator(choose)


class Data(Section):
    """Where images come from and how they are cut.

    `source` is one string: `scenes:easy|medium|hard` (procedural), `folder:PATH`, `hf:NAME`, `parquet:PATH`, `wds:PATTERN`.
    """

    source: str = "scenes:medium"
    size: int = Field(32, ge=8, description="images are size x size after ADM's centre crop")
    train: int | None = Field(None, ge=1, description="cap on training images; scenes need it")
    val: int = Field(1000, ge=1, description="held-out images, taken from the source's own split where it has one")
    flip: bool = Field(False, description="random horizontal flips in training")
    image_column: str | None = Field(None, description="parquet / hf column with the image; None: found by type")
    label_column: str | None = Field(None, description="parquet / hf column with the class; None: found by name")
    seed: int = 0
    workers: int = Field(0, ge=0, description="loader processes; 0 decodes in the training process (and caches small sets)")


class VFM(Section):
    """A frozen vision foundation model: a row of `vfmlab.vfm`'s table, or `timm:NAME` for any timm model."""

    name: str = "pocket"
    layers: tuple[int, ...] | None = Field(None, description="0 patch embedding, k after block k, -1 after the final norm; None: the row's default")
    weights: str = Field("pretrained", description="'pretrained', 'random', or a safetensors file")
    upscale: float = Field(1.0, gt=0, description="images are resized by this factor before they enter the VFM")
    seed: int = Field(0, description="initialisation of random weights")


class DecoderConfig(Section):
    """Latent -> image. Each registered decoder extends this."""

    kind: str


class TokenizerConfig(Section):
    """Image -> latent -> image. Each registered tokenizer extends this."""

    method: str
    channels: int = Field(8, ge=1, description="latent channels (d in f16d32)")
    factor: int = Field(4, ge=1, description="spatial down-sampling (f in f16d32)")


class LossConfig(Section):
    """One term of the training loss. Each registered loss extends this."""

    weight: float = Field(1.0, ge=0)
    until: int | None = Field(None, ge=0, description="switched off after so many samples")


def _losses(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    chosen = {}
    for name, term in value.items():
        config = LOSSES.get(name).Config
        if not isinstance(term, Section):
            term = config.model_validate({"weight": term} if isinstance(term, int | float) else term)
        if term.weight > 0:  # a term of weight 0 is the same run as one without it, so it gets the same id
            chosen[name] = term
    return chosen


Losses = Annotated[dict[str, SerializeAsAny[LossConfig]], BeforeValidator(_losses)]
AnyDecoder = Annotated[SerializeAsAny[DecoderConfig], _by_name(DECODERS, "kind")]


class Equivariance(Section):
    """Equivariance regularisation of VFM-VAE: per batch either the latent or the prior path (arXiv 2510.18457, released config)."""

    p_latent: float = Field(0.0, ge=0, le=1, description="chance that latent and target are scaled / rotated alike; 0: off")
    p_prior: float = Field(0.0, ge=0, le=1, description="otherwise, chance that the input is down-scaled before encoding")
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)


class Train(Section):
    """One training phase. All budgets are in samples (images) seen."""

    samples: int = Field(..., ge=1)
    batch: int = Field(32, ge=1, description="global batch over all devices and accumulation steps")
    accumulation: int = Field(1, ge=1)
    optimizer: Literal["adam", "adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = Field(0, ge=0)
    clip: float = Field(1.0, gt=0, description="gradient norm is clipped to this")
    ema_halflife: int = Field(10_000, ge=0, description="half-life of the weight average; 0: no average")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    log_every: int = Field(640, ge=1)
    preview_every: int = Field(8_000, ge=1)
    checkpoint_every: int = Field(8_000, ge=1)
    evaluate_at: tuple[int, ...] = Field((), description="sample counts at which the protocol is run on the EMA weights")
    guard_patience: int = Field(3, ge=1, description="bad steps in a row that end the run")
    guard_explode: float = Field(1e3, gt=1, description="a loss this many times its running median is a bad step")
    logger: Literal["none", "tensorboard", "trackio", "wandb"] = "none"


class TimeSampling(Section):
    """How t is drawn in training; t = 0 is data, t = 1 is noise."""

    kind: Literal["uniform", "lognormal"] = "lognormal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0, description="t -> s t / (1 + (s - 1) t); > 1 spends more time near noise")


class NetworkConfig(Section):
    """The network that predicts the velocity. Each registered network extends this."""

    kind: str


class Diffusion(Section):
    """Latent diffusion (flow matching, linear path, velocity) on a tokenizer's normalised latents."""

    network: Annotated[SerializeAsAny[NetworkConfig], _by_name(NETWORKS, "kind")]
    train: Train
    time: TimeSampling = TimeSampling()
    cosine_loss: float = Field(0.0, ge=0, description="weight of 1 - cos(v, v_target), LightningDiT's option")
    class_dropout: float = Field(0.1, ge=0, le=1)
    sample_posterior: bool = Field(True, description="cache mean and std and draw z anew each time; False: the mode")
    cache: bool = Field(True, description="train on cached latents; False encodes on the fly")


class Guidance(Section):
    """Classifier-free guidance v = v_null + scale (v_cond - v_null), inside `interval` of t and on `channels`."""

    scale: float = Field(1.0, ge=0)
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = Field(None, ge=1, description="guide only the first so many channels (legacy modes); None: all")


class Sampler(Section):
    """How the probability-flow ODE (or the SDE) is integrated from t = 1 to t = 0."""

    solver: Literal["euler", "heun", "dopri5", "sde"] = "euler"
    steps: int = Field(25, ge=1, description="intervals; network evaluations for euler, twice that for heun")
    shift: float = Field(1.0, gt=0, description="time shift of the grid, as in TimeSampling")


class Protocol(Section):
    """Everything that decides a number. Its hash stands beside each number; different hashes are never ranked together."""

    n: int = Field(1000, ge=2, description="images (reconstruction) and samples (generation)")
    features: str = Field("judge", description="feature space of the Frechet and kernel distances")
    sampler: Sampler = Sampler()
    guidance: Guidance = Guidance()
    ema: bool = True
    batch: int = Field(100, ge=1, description="compute only; does not enter the hash because it cannot change a result")
    seed: int = 0
    version: int = Field(1, description="of the metric code; raised whenever a metric changes")


class Pretrain(Section):
    """Pretraining of the small offline networks (pocket VFM, judge); see `vfmlab.training.pretrain`."""

    objective: str = "factors+mae"
    mask: float = Field(0.5, ge=0, le=1)


class Run(Section):
    """One run, or a pipeline of them. `kind` is the last phase; `phases()` lists all."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9_.]*$")
    tier: Literal["tiny", "pocket", "small", "paper"] = "pocket"
    seed: int = 0
    data: Data = Data()
    vfm: VFM | None = None
    tokenizer: Annotated[SerializeAsAny[TokenizerConfig], _by_name(TOKENIZERS, "method")] | None = None
    losses: Losses = {}
    equivariance: Equivariance = Equivariance()
    trains: tuple[str, ...] = Field(("*",), description="globs on parameter names; the VFM is always frozen")
    train: Train | None = None
    diffusion: Diffusion | None = None
    pretrain: Pretrain | None = None
    protocol: Protocol = Protocol()

    @model_validator(mode="after")
    def _complete(self) -> Run:
        if self.train is None:
            raise ValueError("field 'train' is missing: every run needs a training budget")
        if (self.tokenizer is None) == (self.pretrain is None):
            raise ValueError("a run has either a 'tokenizer' section (tokenizer, diffusion) or a 'pretrain' section (vfm, judge)")
        if self.tokenizer is not None and self.data.size % self.tokenizer.factor:
            raise ValueError(
                f"data.size {self.data.size} is not divisible by tokenizer.factor {self.tokenizer.factor}; "
                f"use {self.data.size - self.data.size % self.tokenizer.factor} or {self.data.size + (-self.data.size) % self.tokenizer.factor}"
            )
        return self

    @property
    def kind(self) -> Literal["pretrain", "tokenizer", "diffusion"]:
        if self.pretrain is not None:
            return "pretrain"
        return "tokenizer" if self.diffusion is None else "diffusion"

    @property
    def id(self) -> str:
        """`<name>-<hash8>`. The protocol is left out of the hash: it decides numbers, not weights."""
        what = self.model_dump(mode="json", exclude={"protocol"})
        return f"{self.name}-{digest(what)}"

    def phases(self) -> list[Run]:
        """The runs to be trained, first to last; the last is this run."""
        if self.kind != "diffusion":
            return [self]
        return [self.model_copy(update={"name": f"{self.name}_tokenizer", "diffusion": None}), self]

    @property
    def parent(self) -> str | None:
        """Id of the run this one builds on, or None."""
        phases = self.phases()
        return phases[-2].id if len(phases) > 1 else None

    @property
    def budget(self) -> Train:
        """The training section of this run's own (last) phase."""
        return self.diffusion.train if self.diffusion is not None else self.train


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
            if path[:depth] == ["losses"] and key in LOSSES:
                node.setdefault(key, {})  # a loss term is added by naming it
            if not isinstance(node, dict) or key not in node:
                raise ConfigError(_unknown(dotted, value, ".".join(path[:depth]), node, key))
            if node[key] is None:  # an absent section is opened by naming one of its fields
                node[key] = {}
            elif isinstance(node[key], int | float) and path[0] == "losses":
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
    try:
        node = config
        for part in place:
            node = node[part]
            field = model.model_fields[part] if part in getattr(model, "model_fields", {}) else None
            model = field.annotation if field is not None else None
            registry, key = {"tokenizer": (TOKENIZERS, "method"), "decoder": (DECODERS, "kind"), "network": (NETWORKS, "kind")}.get(part, (None, ""))
            if registry is not None:
                model = registry.get(node[key]).Config
            elif place[-2:-1] == ["losses"] and part == place[-1]:
                model = LOSSES.get(part).Config
            model = next((a for a in getattr(model, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)), model)
    except (KeyError, TypeError, IndexError, ConfigError):
        return []
    return list(getattr(model, "model_fields", {}))

