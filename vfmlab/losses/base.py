"""What every term of a tokenizer's training loss is: a module from a :class:`Reconstruction` to one fp32
number.

Every term is a mean over the images of the batch. Gradients of two processes with half the batch each,
averaged, are then those of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vfmlab.config import LossConfig
from vfmlab.decoders.diffusion import Denoised
from vfmlab.errors import ConfigError
from vfmlab.nn.frozen import Frozen
from vfmlab.nn.teacher import Taught
from vfmlab.registry import LOSSES

if TYPE_CHECKING:  # the tokenizers are a floor above
    from vfmlab.tokenizers.base import Posterior


@dataclass(frozen=True)
class LossContext:
    """What a loss may depend on when it is built.

    size: side of the images in pixels. channels, latent_side: the latent is channels x latent_side x
    latent_side. vfm: the run's frozen VisionModel, or None.
    """

    size: int
    channels: int
    latent_side: int
    vfm: nn.Module | None = None


@dataclass(frozen=True)
class Reconstruction:
    """One batch on its way through the tokenizer.

    target: B 3 H W in [-1, 1], what `images[0]` should be (already scaled / rotated on the latent path).
    images: outputs of the decoder, largest first; images[0] has the target's shape.
    posterior: raw posterior of the encoded images. z: raw sampled latent B C h w, before any equivariance
    transform.
    features: maps of the VFM for the *encoded* images by layer, B D h' w'.
    discriminated: adversarial term -> outputs of its discriminator
    (:class:`vfmlab.losses.adversarial.Discriminated`).
    encoded: what enters the adapter of a tokenizer with an encoder of its own, B D h w; None for others.
    reference: of the parent stage's frozen copy, for the same images: "after" the adapter (raw posterior
    mode) and "before".
    rebuilt: VFM maps rebuilt from z by tokenizers that do, by layer, B D h' w'.
    taught: code and maps of the tokenizer's teacher, of those that have one.
    denoising: velocity's squared error and noisy state of decoders that denoise.
    labels: long B, the images' classes.
    perturbed: images decoded from perturbed latents, ever more so, for terms that ask for them.
    """

    target: Tensor
    images: list[Tensor]
    posterior: Posterior
    z: Tensor
    features: dict[int, Tensor] = field(default_factory=dict)
    discriminated: dict[str, Any] = field(default_factory=dict)
    encoded: Tensor | None = None
    reference: dict[str, Tensor] = field(default_factory=dict)
    rebuilt: dict[int, Tensor] | None = None
    taught: Taught | None = None
    perturbed: list[Tensor] = field(default_factory=list)
    denoising: Denoised | None = None
    labels: Tensor | None = None


class Loss(nn.Module):
    """Base of all terms: `forward(r) -> scalar, fp32`, unweighted. A term implements `value`.

    Attributes:
        layers: VFM layers whose maps the term needs in `r.features`.
        adaptive: scale the term's weight by the gradient-norm ratio of reconstruction and term at the
            tokenizer's last encoder layer, or, where `adaptive_at` says so, its last decoder layer; see
            :func:`vfmlab.losses.adaptive.adaptive_weight`.
        on_images: part of the reconstruction that adaptive terms are weighed by; False for terms on latents
            and for those of a discriminator.
        autocast: whether `value` may run under the caller's autocast. Only terms that are networks of their
            own do; sums over pixels and latents are taken in fp32.
    """

    Config: type[LossConfig] = LossConfig
    registered_name: ClassVar[str] = "loss"
    layers: tuple[int, ...] = ()
    adaptive: bool = False
    adaptive_at: ClassVar[Literal["encoder", "decoder"]] = "encoder"
    on_images: ClassVar[bool] = True
    autocast: ClassVar[bool] = False

    def __init__(self, config: LossConfig, context: LossContext):
        super().__init__()
        self.config, self.context = config, context
        self.name = self.registered_name  # `build` gives the name under which the term stands in its recipe
        self.hidden = Frozen()

    def value(self, r: Reconstruction) -> Tensor:
        """The term for one batch: a mean over its images."""
        raise NotImplementedError

    def forward(self, r: Reconstruction) -> Tensor:
        if self.autocast:
            return self.value(r).float()
        with torch.autocast(r.target.device.type, enabled=False):
            return self.value(r).float()

    def need_vfm(self) -> nn.Module:
        """The run's VFM; :class:`ConfigError` when the run has none."""
        if self.context.vfm is None:
            raise ConfigError(f"loss '{self.registered_name}' compares with a VFM's features but the run has "
                              "no 'vfm' section; add vfm.name=pocket")
        return self.context.vfm

    def width_of(self, layer: int) -> int:
        """Channels of the layer of the run's VFM that `losses.NAME.layer` names."""
        try:
            return self.need_vfm().width(layer)
        except ConfigError as error:  # the line speaks of the layers that the tokenizer reads
            raise ConfigError(str(error).replace(f"vfm.layers [{layer}]",
                                                 f"losses.{self.registered_name}.layer {layer}")) from None


def build(terms: Mapping[str, LossConfig], context: LossContext) -> dict[str, Loss]:
    """The terms of a recipe by name. A label behind a colon makes a second term of one kind:
    "adversarial:patch"."""
    built: dict[str, Loss] = {}
    for name, config in terms.items():
        built[name] = LOSSES.get(name.partition(":")[0])(config, context)
        built[name].name = name
    return built
