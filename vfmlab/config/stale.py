"""One encoding for several times in training, as in sampling with `protocol.sampler.reuse`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from vfmlab.config.section import Section


class Stale(Section):
    """The encoder of a split network sees the state at time t; its head learns at `heads` times of the same
    way from data to noise, drawn between (1 - span) t and t.

    The sharing is that of TiUE (arXiv 2505.21960), which distils; here the loss is flow matching as ever
    (ours).
    """

    heads: int = Field(4, ge=1, le=64, description="times of the head for one encoding; 4 in TiUE")
    span: float = Field(1.0, gt=0, le=1, description="share of the way to the data that an encoding serves")

    def check(self, diffusion: Any) -> None:
        """ValueError where the diffusion section has no split network, or parts that read it whole."""
        network = diffusion.network
        fields = type(network).model_fields
        if "head_depth" not in fields or "least_time" in fields:
            raise ValueError(f"stale: network '{network.kind}' does not predict velocities by an encoder and "
                             "a head; use network.kind=ddt, or stale=null")
        for field in ("class_token", "alignment", "tune"):
            if getattr(diffusion, field) is not None:
                raise ValueError(f"stale: {field} reads the whole network at one time; set {field} or stale "
                                 "to null")
