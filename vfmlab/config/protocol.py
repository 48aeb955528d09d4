"""The sections of a protocol: guidance, sampler, and everything else that decides a number."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vfmlab.config.section import Section

CAPTIONS = "captions"  # the protocol's own prompts


class Guidance(Section):
    """Guidance v = v_weak + scale (v - v_weak), inside `interval` of t and on `channels`. `kind` says what is
    weak: the null label (classifier-free), a second read-out, or a weaker model.
    """

    scale: float = Field(1.0, ge=0)
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = Field(None, ge=1, description="guide only the first so many channels (legacy "
                                                         "modes); None: all")
    token: float | None = Field(None, ge=0, description="scale for the class token of networks that have "
                                                        "one; None: as the latents")
    kind: Literal["internal", "auto"] | None = Field(None, description="internal: against the network's "
        "second read-out; auto: against the weaker model `weaker`; None: against the null label")
    weaker: str | None = Field(None, description="run of the weaker model, for kind auto")

    @model_validator(mode="after")
    def _forward(self) -> Guidance:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"interval [{low:g}, {high:g}]: needs 0 <= low <= high <= 1 (t = 0: data, 1: "
                             "noise)")
        if (self.kind == "auto") != (self.weaker is not None):
            raise ValueError(f"kind {self.kind!r} with weaker {self.weaker!r}: auto-guidance needs the run "
                             "of a weaker model, the other kinds none; set both or neither")
        if self.kind is not None and (self.channels is not None or self.token is not None):
            raise ValueError(f"kind '{self.kind}' guides the whole state; leave channels and token null")
        return self


class Sampler(Section):
    """How the probability-flow ODE (or the SDE) is integrated from t = 1 to t = 0."""

    solver: Literal["euler", "heun", "dopri5", "sde"] = "euler"
    steps: int = Field(25, ge=1, description="intervals, not times: 250 steps are a grid of 251 times, "
                       "with 250 network evaluations for euler and sde, 500 for heun")
    shift: float = Field(1.0, gt=0, description="time shift of the grid, as in TimeSampling")
    reuse: Annotated[int, Field(ge=1)] | tuple[int, ...] | None = Field(
        None, description="run the encoder of a split network only at every so many-th evaluation, or at the "
                          "evaluations listed, from 0; None: always")
    parallel: bool | None = Field(None, description="with reuse: the head's evaluations up to the next "
        "encoding run as one batch on the state at that encoding (Faster Diffusion); null: one by one")
    prior_noise: float | None = Field(None, gt=0, le=1, description="with reuse: so much of the first noise "
        "is added at every step from t = 1/2 on, which restores detail (Faster Diffusion: 0.003); null: none")

    @model_validator(mode="after")
    def _reused(self) -> Sampler:
        keys = self.reuse
        if isinstance(keys, tuple) and (keys[:1] != (0,) or list(keys) != sorted(set(keys))):
            raise ValueError(f"reuse {list(keys)}: key steps rise from 0, for example [0, 1, 2, 3, 5, 10, "
                             "15]")
        if self.parallel and (self.reuse is None or self.solver != "euler"):
            raise ValueError(f"parallel: runs the steps that share an encoding as one batch of euler's, here "
                             f"reuse is {self.reuse} and solver '{self.solver}'; set reuse and solver=euler, "
                             "or parallel=null")
        if self.prior_noise is not None and (self.reuse is None or self.solver != "euler"):
            raise ValueError(f"prior_noise {self.prior_noise:g}: makes up for detail that reuse loses, step "
                             f"by step of euler's, here reuse is {self.reuse} and solver '{self.solver}'; "
                             "set reuse and solver=euler, or prior_noise=null")
        return self

    @field_validator("parallel")
    @classmethod
    def _off(cls, parallel: bool | None) -> bool | None:
        return parallel or None  # one hash for what is the same


class TokenSampler(Section):
    """How codes are drawn. guidance.scale says how strongly they are guided; 1 or less means not at all."""

    temperature: float = Field(1.0, ge=0, description="logits are divided by it; 0: the most probable code")
    top_k: int = Field(0, ge=0, description="draw among the so many most probable codes; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the most probable codes that together "
                                                      "have this probability; 1: all")
    guidance_power: float | None = Field(None, gt=0, description="RAR's course: guidance grows over the "
        "sequence, the later the larger this is; null: the same for all tokens")
    guided: int | None = Field(None, ge=1, description="guide the first so many tokens; null: all")


class Protocol(Section):
    """Everything that decides a number. Its hash stands beside each number; different hashes are never ranked
    together.
    """

    n: int = Field(1000, ge=2, description="images (reconstruction) and samples (generation)")
    features: str = Field("judge", description="feature space of the Frechet and kernel distances")
    sampler: Sampler = Sampler()
    guidance: Guidance = Guidance()
    token_sampler: TokenSampler | None = Field(None, description="of the ar generator, in place of `sampler`")
    labels: Literal["balanced", "random"] = Field("balanced", description="of samples: every class in turn, "
        "or one drawn for each sample")
    prompts: str | None = Field(None, description="of a generator that reads text: 'captions', those of the "
        "held-out images in turn, or a text file with one prompt a line; null: classes")
    reference: str | None = Field(None, description="what samples are compared with: npz file of ADM's "
        "evaluator, or 'train', the training images; null: the held-out images")
    precision: Literal["fp32", "tf32", "bf16"] = Field("fp32", description="of encoding, sampling and "
        "decoding; features and statistics are fp32")
    ema: bool = True
    decoder: str | None = Field(None, description="tokenizer run whose decoder makes the images, where a "
                                                  "stage was trained after diffusion; null: the run's own")
    batch: int = Field(100, ge=1,
                       description="compute only; does not enter the hash because it cannot change a result")
    seed: int = 0
    noise: Literal["protocol", "run"] = Field(
        "protocol", description="whose seed the samples' noise follows: the protocol's, or each run's own")
    version: int = Field(1, description="of the metric code; raised whenever a metric changes")
