"""The configuration of a run: frozen pydantic models, one section per part, nothing unknown allowed."""

from vfmlab.config.recipe import (
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
    Run,
    Sampler,
    Section,
    Stage,
    TimeSampling,
    TokenizerConfig,
    Train,
    Tune,
    digest,
    explain,
    override,
    parse,
    parse_assignments,
)

__all__ = [
    "VFM", "Alignment", "AnyDecoder", "ClassToken", "Data", "DecoderConfig", "Diffusion", "Equivariance", "Guidance", "Imported", "LossConfig", "Losses",
    "NetworkConfig", "Pretrain", "Protocol", "Run", "Sampler", "Section", "Stage", "TimeSampling", "TokenizerConfig", "Train", "Tune", "digest", "explain",
    "override", "parse", "parse_assignments",
]  # fmt: skip
