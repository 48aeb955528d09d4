"""The configuration: frozen pydantic models, one section per part, nothing unknown allowed; recipes and their
phases."""

from vfmlab.config.data import Data
from vfmlab.config.override import explain, located, override, parse, parse_assignments, parse_overrides
from vfmlab.config.permuted import Permuted
from vfmlab.config.protocol import CAPTIONS, Guidance, Protocol, Sampler, TokenSampler
from vfmlab.config.recipe import Kind, Phase, Recipe, Stage, TokenizerPhase, digest, kind_of
from vfmlab.config.schema import (
    AR,
    VFM,
    Alignment,
    AnyDecoder,
    AnyQuantizer,
    ClassToken,
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
    SizedConfig,
    TimeSampling,
    TokenizerConfig,
    Train,
    Tune,
)
from vfmlab.config.section import Part, Section

__all__ = [
    "AR", "CAPTIONS", "VFM", "Alignment", "AnyDecoder", "AnyQuantizer", "ClassToken", "Data", "DecoderConfig",
    "Diffusion", "Equivariance", "Guidance", "Imported", "Kind", "LossConfig", "Losses", "NetworkConfig",
    "Part", "PathConfig", "Permuted", "Phase", "Pretrain", "Protocol", "QuantizerConfig", "Recipe", "Sampler",
    "Section", "SizedConfig", "Stage", "TimeSampling", "TokenSampler", "TokenizerConfig", "TokenizerPhase", "Train", "Tune",
    "digest", "explain", "kind_of", "located", "override", "parse", "parse_assignments", "parse_overrides",
]  # fmt: skip
