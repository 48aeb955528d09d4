"""The configuration: frozen pydantic models, one section per part, nothing unknown allowed; recipes and their
phases."""

from vfmlab.config.override import explain, located, override, parse, parse_assignments, parse_overrides
from vfmlab.config.protocol import Guidance, Protocol, Sampler
from vfmlab.config.recipe import Kind, Phase, Recipe, Stage, TokenizerPhase, digest, kind_of
from vfmlab.config.schema import (
    VFM,
    Alignment,
    AnyDecoder,
    AnyQuantizer,
    ClassToken,
    Data,
    DecoderConfig,
    Diffusion,
    Equivariance,
    Imported,
    LossConfig,
    Losses,
    NetworkConfig,
    PathConfig,
    Pretrain,
    QuantizerConfig,
    TimeSampling,
    TokenizerConfig,
    Train,
    Tune,
)
from vfmlab.config.section import Section

__all__ = [
    "VFM", "Alignment", "AnyDecoder", "AnyQuantizer", "ClassToken", "Data", "DecoderConfig", "Diffusion", "Equivariance", "Guidance",
    "Imported", "Kind", "LossConfig", "Losses", "NetworkConfig", "PathConfig", "Phase", "Pretrain", "Protocol", "QuantizerConfig", "Recipe", "Sampler",
    "Section", "Stage", "TimeSampling", "TokenizerConfig", "TokenizerPhase", "Train", "Tune", "digest", "explain", "kind_of", "located", "override",
    "parse", "parse_assignments", "parse_overrides",
]  # fmt: skip
