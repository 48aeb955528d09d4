"""LPIPS (Zhang et al., arXiv 1801.03924) through torchmetrics, with its ImageNet backbone frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.losses.base import Loss, LossContext, Reconstruction
from vfmlab.registry import LOSSES

SMALLEST = 32  # pixels: below, the backbones' pooling leaves nothing
WEIGHTS = {"vgg": "VGG16_Weights", "alex": "AlexNet_Weights", "squeeze": "SqueezeNet1_1_Weights"}


@LOSSES.register("lpips")
class LPIPS(Loss):
    """LPIPS distance, averaged over the batch; images in [-1, 1]. Images under 32 px are enlarged to 32 px
    first.

    torchvision downloads the backbone (vgg: 528 MB) on first use. Where it cannot, :class:`ConfigError` names
    the file and the folder to put it in, and the offline alternative: the loss `perceptual`.
    """

    autocast = True

    class Config(config.LossConfig):
        network: Literal["vgg", "alex", "squeeze"] = Field("vgg",
                                                           description="backbone; the papers train with vgg")

    def __init__(self, config: LPIPS.Config, context: LossContext):
        super().__init__(config, context)
        import torchvision
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            metric = LearnedPerceptualImagePatchSimilarity(net_type=config.network)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a broken download has a wrong hash
            url = getattr(torchvision.models, WEIGHTS[config.network]).DEFAULT.url
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"losses.lpips.network '{config.network}': its backbone could not be "
                              f"downloaded ({why}); put {url} into {folder}, or use losses.perceptual, which "
                              "needs no download") from None
        self.hidden.freeze("network", metric.net)

    def value(self, r: Reconstruction) -> Tensor:
        image, target = r.images[0], r.target
        side = min(image.shape[-2:])
        if side < SMALLEST:
            image, target = (F.interpolate(x.float(), scale_factor=SMALLEST / side, mode="bilinear",
                                           align_corners=False)
                             for x in (image, target))
        return self.hidden["network"](image, target).mean()
