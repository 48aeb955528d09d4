"""How much of the velocity no network can know: the irreducible part of the flow's training loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vfmlab.errors import DataError
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.number import LATENT, LOWER, TOKENIZERS, Draft, Published, Quantity
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS


def gaussian_variance(eigenvalues: Tensor) -> float:
    """Integral over t of Var(noise - data | x_t) for Gaussian data with these covariance eigenvalues.

    Closed form (pi / 2) sum sqrt(eigenvalue) (arXiv 2606.03578): each direction gives the integral of
    lambda / ((1 - t)^2 lambda + t^2).
    """
    return math.pi / 2 * float(eigenvalues.double().clamp_min(0).sqrt().sum())


def kronecker(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the channels' and of the places' covariance of centred maps N C h w, with the trace of
    the whole: the covariance of all C h w values is taken as their Kronecker product."""
    x = x.double().flatten(2)
    channels = torch.einsum("ncp,ndp->cd", x, x) / len(x)
    space = torch.einsum("ncp,ncq->pq", x, x) / len(x)
    trace = channels.trace()
    if not trace > 0:
        raise DataError("latents are constant within every class; their velocity has no variance")
    scale = trace.sqrt()
    return torch.linalg.eigvalsh(channels / scale), torch.linalg.eigvalsh(space / scale)


@INSTRUMENTS.register("velocity_variance")
class VelocityVariance(Instrument):
    """Irreducible variance of the velocity (VIV, arXiv 2606.03578), a value of the latent.

    Classes are Gaussians around their own means with one covariance, a Kronecker product of channels and
    places. One covariance for all classes is ours: single classes have too few images here.
    """

    kinds = ("tokenizer",)
    quantities = (Quantity("viv", "irreducible velocity variance", LOWER, shown=(LATENT,),
                           definition="part of the flow's training loss that no network can learn, a value of the latent",
                           published=Published(0.87, TOKENIZERS)),)  # fmt: skip

    def measure(self, subject: Subject, report: Draft) -> None:
        held = subject.held_out
        centred = held.maps.double()
        classes = held.labels if subject.source.num_classes > 1 else torch.zeros_like(held.labels)
        for label in classes.unique():
            mine = classes == label
            centred[mine] -= centred[mine].mean(0)
        freedom = len(centred) / max(1, len(centred) - len(classes.unique()))  # class means were fitted
        channels, places = kronecker(centred * freedom**0.5)
        whole = gaussian_variance(torch.outer(channels.clamp_min(0), places))
        section = subject.section({"measure": "viv", "covariance": "kronecker, pooled over classes"})
        report.add("viv", whole / centred[0].numel(), section, len(held))
