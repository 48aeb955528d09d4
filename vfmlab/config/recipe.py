"""What is described and what is trained: a :class:`Recipe` is a whole pipeline, a :class:`Phase` one unit of
its training.

    images -> tokenizer (in one or several stages) -> latents -> diffusion, or codes -> ar -> samples

A recipe is plain JSON, and the same JSON always gives the same id. `recipe.phases()` lists what is trained
one after the other; each phase has an id and a run directory of its own, so that two recipes that differ only
in their generator, or in a later stage, share what comes before. The sections are in
`vfmlab/config/schema.py` and beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from vfmlab.config.data import Data
from vfmlab.config.protocol import CAPTIONS, Guidance, Protocol, Sampler
from vfmlab.config.schema import (
    AR,
    VFM,
    Diffusion,
    Equivariance,
    Imported,
    Losses,
    Pretrain,
    Section,
    TokenizerConfig,
    Train,
    by_name,
    under,
)
from vfmlab.config.section import Part
from vfmlab.errors import ConfigError
from vfmlab.registry import TOKENIZERS

Kind = Literal["pretrain", "tokenizer", "diffusion", "ar"]


class Stage(Section):
    """One stage of a tokenizer's training: its name, and only what differs from the stage before.

    The first differs from the recipe's own fields. Each stage is a phase `<name>_<stage>` whose parent is the
    stage before; it starts from that one's averaged weights, with a fresh optimiser. Recipes with the same
    first stages share the runs of these.
    """

    name: str = Field(..., pattern=r"^[a-z][a-z0-9]*$", max_length=40)
    trains: tuple[str, ...] | None = Field(None, description="globs on parameter names; null: as before")
    losses: dict[str, Any] = Field(
        {}, description="term -> weight, or its fields that change; weight 0 removes the term"
    )
    equivariance: dict[str, Any] = Field({}, description="fields that change")
    train: dict[str, Any] = Field({}, description="fields that change; counts are images of this stage")


class Recipe(Section):
    """A whole pipeline; `phases()` lists what is trained, first to last."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9_.]*$", max_length=160)
    tier: Literal["tiny", "pocket", "photo", "small", "paper"] = "pocket"
    seed: int = 0
    data: Data = Data()
    vfm: VFM | None = None
    tokenizer: Annotated[SerializeAsAny[TokenizerConfig], by_name(TOKENIZERS, "method")] | None = None
    losses: Losses = Field({})
    equivariance: Equivariance = Equivariance()
    trains: tuple[str, ...] = Field(("*",), description="globs on parameter names; the VFM is always frozen")
    train: Train | None = None
    stages: tuple[Stage, ...] = Field((),
                                      description="of the tokenizer's training; none: one, the fields above")
    stage: int | None = Field(None, ge=0,
                              description="in a run's config: the last of `stages`; null: a whole recipe")
    imported: Imported | None = None
    diffusion: Diffusion | None = None
    ar: AR | None = None
    pretrain: Pretrain | None = None
    protocol: Protocol = Protocol()
    parts: dict[str, Part] | None = Field(None, description="given from a notebook's cell; name -> its hash")

    @model_validator(mode="before")
    @classmethod
    def _drawn(cls, value: Any) -> Any:
        """An ar generator's protocol says how tokens are drawn, that of one that reads text for which
        prompts."""
        protocol = value.get("protocol", {}) if isinstance(value, dict) else None
        if isinstance(protocol, Protocol):
            protocol = protocol.model_dump()
        if not isinstance(protocol, dict):
            return value
        diffusion, more = value.get("diffusion"), {}
        if value.get("ar") is not None:
            more["token_sampler"] = protocol.get("token_sampler") or {}
        text = diffusion.get("text") if isinstance(diffusion, dict) else getattr(diffusion, "text", None)
        if text is not None:
            more["prompts"] = protocol.get("prompts") or CAPTIONS
        return value | {"protocol": protocol | more} if more else value

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        if self.imported is not None and self.train is not None and not self.stages:
            raise ValueError("imported weights are trained further in stages: move 'train' into one of "
                             "'stages', or leave it out")
        if self.train is None and self.imported is None:
            raise ValueError("field 'train' is missing: every run needs a training budget")
        if (self.tokenizer is None) == (self.pretrain is None):
            raise ValueError("a run has either a 'tokenizer' section (tokenizer, generator) or a 'pretrain' "
                             "section (vfm, judge)")
        if self.diffusion is not None and self.tokenizer is not None and self.tokenizer.quantised:
            raise ValueError(f"diffusion: the latent of tokenizer '{self.tokenizer.method}' is codes, which "
                             "diffusion does not make; use the 'ar' section, the generator of tokens in "
                             "order, in its place")
        if self.tokenizer is not None and self.data.size % self.tokenizer.factor:
            size, over = self.data.size, self.data.size % self.tokenizer.factor
            raise ValueError(f"data.size {size} is not divisible by tokenizer.factor "
                             f"{self.tokenizer.factor}; use {size - over} or "
                             f"{size - over + self.tokenizer.factor}")
        if self.tokenizer is not None and self.diffusion is not None:
            self._on_one_path(self.tokenizer, self.diffusion)
        self._one_generator()
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1 or name in ("tokenizer", "imported", "diffusion", "ar"):
                raise ValueError(f"stages {names}: '{name}' is taken; give each stage a name of its own")
        if self.stage is not None and self.stage != len(self.stages) - 1:
            raise ValueError(f"field 'stage' = {self.stage}: a stage's run lists the stages up to itself, "
                             f"here {len(self.stages)}")
        for i in range(len(self.stages)):
            self.settings(i)  # so that a stage that does not fit is refused before the first one is trained
        return self

    @staticmethod
    def _on_one_path(tokenizer: TokenizerConfig, diffusion: Diffusion) -> None:
        kind = "linear" if diffusion.path is None else diffusion.path.kind
        if tokenizer.radius is not None and kind == "linear":
            raise ValueError(f"tokenizer.radius {tokenizer.radius:g} puts latents on a sphere, which the "
                             "linear path leaves; set diffusion.path=sphere, or tokenizer.radius=null")
        if tokenizer.radius is None and kind == "sphere":
            raise ValueError("diffusion.path 'sphere' needs latents on a sphere, but tokenizer.radius is "
                             f"null; set tokenizer.radius, for example to {tokenizer.channels**0.5:.4g} = "
                             "sqrt(channels), or diffusion.path=null")
        if tokenizer.places and diffusion.tune is not None:
            raise ValueError("tokenizer.places: a tuned tokenizer's running statistics are per channel; set "
                             "tokenizer.places or diffusion.tune to null")

    def _one_generator(self) -> None:
        protocol, guidance = self.protocol, self.protocol.guidance
        if self.ar is not None and self.diffusion is not None:
            raise ValueError("a recipe has one generator: leave out 'diffusion' or 'ar'")
        if self.ar is not None and self.tokenizer is None:
            raise ValueError("'ar' draws a tokenizer's codes; add a 'tokenizer' section")
        if self.ar is not None and not self.tokenizer.quantised:
            raise ValueError(f"ar: tokenizer '{self.tokenizer.method}' has a continuous latent and no codes; "
                             "use the 'diffusion' section in its place")
        if self.generator is not None and protocol.prompts is not None and getattr(
            self.generator, "text", None) is None:
            raise ValueError(f"protocol.prompts '{protocol.prompts}': this generator reads no text but "
                             "classes; set diffusion.text, or prompts=null")
        drawn = self.data.source.partition(":")[0] == "scenes"
        if drawn and self.data.flip and getattr(self.diffusion, "text", None) is not None:
            raise ValueError("data.flip True: captions of drawn scenes say left and right, and are not "
                             "mirrored with the images; set data.flip=false")
        if self.diffusion is not None and protocol.token_sampler is not None:
            raise ValueError("protocol.token_sampler is the ar generator's; diffusion samples as "
                             "protocol.sampler says")
        if self.diffusion is not None and guidance.kind == "internal" and not getattr(
            self.diffusion.network, "base_depth", None):
            raise ValueError(f"protocol.guidance.kind 'internal': network '{self.diffusion.network.kind}' "
                             "has no second read-out; use network.kind=raev2 with base_depth, or kind=null")
        if self.ar is not None and protocol.sampler != Sampler():
            raise ValueError("protocol.sampler is diffusion's; the ar generator draws as "
                             "protocol.token_sampler says, one step a token")
        if self.ar is not None and guidance != Guidance(scale=guidance.scale):
            raise ValueError("protocol.guidance: of its fields the ar generator knows 'scale'; its course "
                             "over the tokens is token_sampler.guidance_power and token_sampler.guided")

    @property
    def generator(self) -> Diffusion | AR | None:
        """The section of what is trained on the tokenizer: `diffusion` or `ar`."""
        return self.ar if self.diffusion is None else self.diffusion

    def settings(self, stage: int | None) -> Settings:
        """`trains, losses, equivariance, train` as they hold in a stage (by number); None: before the
        first."""
        settings = {"trains": self.trains, "equivariance": self.equivariance, "train": self.train,
                    "losses": self.losses}
        if stage is None:
            return Settings.model_construct(**settings)
        tree = {name: part.model_dump() for name, part in settings.items() if isinstance(part, Section)}
        losses = {name: term.model_dump() for name, term in self.losses.items()}
        settings |= {"train": {}} | tree
        for i, change in enumerate(self.stages[: stage + 1]):
            for name, term in change.losses.items():
                losses[name] = losses.get(name, {}) | (term if isinstance(term, dict) else {"weight": term})
            settings["trains"] = settings["trains"] if change.trains is None else change.trains
            settings["equivariance"] = {**settings["equivariance"], **change.equivariance}
            settings["train"] = {**settings["train"], **change.train}
            try:
                valid = Settings.model_validate(settings | {"losses": losses})
            except ValidationError as error:
                raise under("stages", under(str(i), error)) from None
            # a removed term begins anew
            losses = {name: term for name, term in losses.items() if name in valid.losses}
        return valid

    @property
    def id(self) -> str:
        """`<name>-<hash8>`. The protocol is left out of the hash: it decides numbers, not weights.

        So is what is null: a field that a later version adds as null by default leaves the ids of earlier
        runs alone.
        """
        return f"{self.name}-{digest(self.model_dump(mode='json', exclude={'protocol'}, exclude_none=True))}"

    def phases(self) -> list[Phase]:
        """What is trained, first to last: [imported weights], the tokenizer's stages, [the generator]; or a
        pretraining.
        """
        if self.pretrain is not None:
            return [PretrainPhase(self)]
        generator = self.generator
        own = {k: part for k, part in (self.parts or {}).items() if k.partition(".")[0] != "network"}
        bare = self.model_copy(update={"diffusion": None, "ar": None, "parts": own or None})
        name = self.name if self.stage is None else self.name.removesuffix(f"_{self.stages[-1].name}")
        if generator is not None and generator.tokenizer_of is not None:
            name = generator.tokenizer_of
        parts: list[Recipe] = []
        if self.imported is not None:
            fresh = {"trains": ("*",), "losses": {}, "equivariance": Equivariance(), "train": None,
                     "stages": (), "stage": None, "name": f"{name.removesuffix('_imported')}_imported"}
            parts.append(bare.model_copy(update=fresh))
        for i, stage in enumerate(self.stages):
            update = {"name": f"{name}_{stage.name}", "stages": self.stages[: i + 1], "stage": i}
            parts.append(bare.model_copy(update=update))
        if not parts:
            alone = name if self.diffusion is None else f"{name}_tokenizer"
            parts.append(bare.model_copy(update={"name": alone}))
        phases: list[Phase] = []
        for part in parts:
            phases.append(TokenizerPhase(part, phases[-1] if phases else None))
        if generator is None:
            return phases
        kind = ARPhase if self.diffusion is None else DiffusionPhase
        return [*phases, kind(self, phases[-1])]

    @property
    def last(self) -> Phase:
        """The phase that this recipe ends with."""
        return self.phases()[-1]

    @property
    def tokenizer_phase(self) -> Phase | None:
        """The phase that ends with this pipeline's tokenizer: its last stage, or imported weights; None: a
        pretraining.
        """
        return self.last.tokenizer_phase


class Settings(Section):
    """What a stage can change."""

    trains: tuple[str, ...]
    losses: Losses
    equivariance: Equivariance
    train: Train


@dataclass(frozen=True)
class Phase:
    """What is trained at one go, into one run directory.

    Args:
        recipe: the pipeline as far as this phase. Its JSON is the run's config.json, its hash the id.
        before: the phase that this one builds on.
    """

    recipe: Recipe
    before: Phase | None = None

    kind: ClassVar[Kind]

    id = property(attrgetter("recipe.id"))
    name = property(attrgetter("recipe.name"))
    tier = property(attrgetter("recipe.tier"))
    seed = property(attrgetter("recipe.seed"))
    data = property(attrgetter("recipe.data"))
    vfm = property(attrgetter("recipe.vfm"))
    tokenizer = property(attrgetter("recipe.tokenizer"))
    diffusion = property(attrgetter("recipe.diffusion"))
    ar = property(attrgetter("recipe.ar"))
    generator = property(attrgetter("recipe.generator"))
    pretrain = property(attrgetter("recipe.pretrain"))
    protocol = property(attrgetter("recipe.protocol"))

    @property
    def stage(self) -> str:
        """Its name within the recipe: a stage's, "imported", "tokenizer", "diffusion", "ar" or "pretrain"."""
        return self.kind

    @property
    def parent(self) -> str | None:
        """Id of the run that this one builds on."""
        return None if self.before is None else self.before.id

    @property
    def tokenizer_phase(self) -> Phase | None:
        """The phase whose tokenizer this one is, or is trained on."""
        return None

    @property
    def imported(self) -> Imported | None:
        """Weights released by others, where this phase is not trained."""
        return None

    @property
    def train(self) -> Train | None:
        """How it is trained; None: imported weights."""
        return self.recipe.train

    @property
    def budget(self) -> int:
        """Images seen at its end; 0: imported weights."""
        return 0 if self.train is None else self.train.samples

    @property
    def losses(self) -> Losses:
        """The tokenizer's losses, as settled by its stages."""
        return {}

    @property
    def trains(self) -> tuple[str, ...]:
        """Globs on the names of the parameters that train."""
        return self.recipe.trains

    @property
    def tuned(self) -> bool:
        """Whether the tokenizer learns on in a diffusion training (REPA-E)."""
        return False

    def check_guidance(self, guidance: Guidance) -> None:
        """:class:`ConfigError` for guidance away from a null label that is not trained."""
        if self.generator is None or self.generator.null_label or guidance.kind is not None:
            return
        changes = guidance.scale > 1 if self.ar is not None else guidance.scale != 1
        if changes or guidance.token not in (None, 1):
            raise ConfigError(f"protocol.guidance.scale = {guidance.scale:g}: it leads away from the null "
                              f"label, which {self.kind}.class_dropout = 0 never trains; set the scale to 1, "
                              f"or train with {self.kind}.class_dropout above 0, such as 0.1")


@dataclass(frozen=True)
class PretrainPhase(Phase):
    """Pretraining of a small network: the pocket VFM or a judge."""

    kind = "pretrain"


@dataclass(frozen=True)
class TokenizerPhase(Phase):
    """A stage of a tokenizer's training, its whole training, or the import of a released one."""

    kind = "tokenizer"

    @property
    def stage(self) -> str:
        if self.recipe.stage is not None:
            return self.recipe.stages[self.recipe.stage].name
        return self.kind if self.imported is None else "imported"

    @property
    def tokenizer_phase(self) -> Phase:
        return self

    @property
    def imported(self) -> Imported | None:
        return None if self.recipe.stages else self.recipe.imported

    @cached_property
    def _settings(self) -> Settings:
        return self.recipe.settings(self.recipe.stage)

    train = property(attrgetter("_settings.train"))
    losses = property(attrgetter("_settings.losses"))
    trains = property(attrgetter("_settings.trains"))
    equivariance = property(attrgetter("_settings.equivariance"))


@dataclass(frozen=True)
class GeneratorPhase(Phase):
    """Training, or import, of what is trained on a tokenizer."""

    tokenizer_phase = property(attrgetter("before"))
    losses = property(attrgetter("before.losses"))
    trains = ("*",)
    train = property(attrgetter("recipe.generator.train"))
    imported = property(attrgetter("recipe.generator.imported"))


@dataclass(frozen=True)
class DiffusionPhase(GeneratorPhase):
    """A diffusion network on a tokenizer's latents."""

    kind = "diffusion"

    @property
    def tuned(self) -> bool:
        return self.recipe.diffusion.tune is not None


@dataclass(frozen=True)
class ARPhase(GeneratorPhase):
    """A network that draws a quantised tokenizer's codes."""

    kind = "ar"


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The kind of phase that a run's config.json describes, read without validation."""
    if config.get("pretrain") is not None:
        return PretrainPhase.kind
    if config.get("ar") is not None:
        return ARPhase.kind
    return TokenizerPhase.kind if config.get("diffusion") is None else DiffusionPhase.kind


def digest(value: Any) -> str:
    """Eight hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
