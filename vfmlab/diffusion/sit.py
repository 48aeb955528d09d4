"""SiT: DiT's network trained on `vfmlab.diffusion.path` (arXiv 2401.08740), and its form with representation
entanglement.

SiT is LightningDiT without its improvements, so it is the same module with these switches off. REG (arXiv
2507.01467) denoises the class token of a frozen VFM beside the latents (`token`, as in LightningDiT);
:class:`RegSiT` is REG's release, which carries the read-out of REPA (arXiv 2410.06940) inside the network.
Networks trained here have none: the read-out belongs to the training objective
(:mod:`vfmlab.diffusion.alignment`).
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field
from torch import Tensor, nn

from vfmlab.diffusion.dit import LightningDiT
from vfmlab.registry import NETWORKS


class Plain(LightningDiT.Config):
    """LightningDiT's options with SiT's values."""

    kind: str = "sit"
    qk_norm: bool = Field(False, description="layer norm of queries and keys, with weights; REG with "
                                             "VFM-VAE's latents needs it")
    swiglu: bool = False
    rope: bool = False
    rmsnorm: bool = False


@NETWORKS.register("sit")
class SiT(LightningDiT):
    """Velocity network on latents; arguments and contract as :class:`vfmlab.diffusion.dit.LightningDiT`."""

    Config = Plain


class Prediction(NamedTuple):
    """Velocities of the latents (v: B C h w) and of the class token (v_class: B K), and the tokens after
    block `align_after` read out to each VFM's width (aligned: B (1 + N) K_i, the class token first)."""

    v: Tensor
    v_class: Tensor
    aligned: list[Tensor]


class RegSiT(LightningDiT):
    """REG's release: SiT on latents and a class token, with REPA's read-out inside; no entry of the registry.

    Args:
        config: see :class:`Config`. latent_shape: (C, h, w). num_classes: also the null label.
    """

    class Config(Plain):
        kind: str = "sit_reg"
        qk_norm: bool = True
        aligned: tuple[int, ...] = Field((768,),
                                         description="widths of the VFMs' tokens, the class token's first")
        projector: int = Field(2048, ge=1, description="hidden width of the read-out")
        align_after: int = Field(8, ge=1, description="block after which tokens are read out")

    def __init__(self, config: Config, latent_shape: tuple[int, int, int], num_classes: int):
        super().__init__(config.model_copy(update={"token": config.aligned[0]}), latent_shape, num_classes)
        width = self.width_at(config.align_after)
        self.projectors = nn.ModuleList(readout(width, config.projector, k) for k in config.aligned)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, token: Tensor,
                features_at: tuple[int, ...] = ()) -> Prediction | tuple[Prediction, dict[int, Tensor]]:
        """Velocities and read-outs at noisy latents and class token (B K); the rest as LightningDiT's."""
        after = self.config.align_after
        joint, hidden = super().forward(x, t, y, (*features_at, after), token)
        out = Prediction(*joint, [project(hidden[after]) for project in self.projectors])
        return out if not features_at else (out, {k: hidden[k] for k in features_at})


def readout(width: int, hidden: int, out: int) -> nn.Sequential:
    """REPA's three-layer read-out; initialised as DiT's linear layers are."""
    layers = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                           nn.Linear(hidden, out))
    for layer in layers[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layers
