"""Contrast of captions and images: how the text tower that is bundled was trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab import config, vfm
from vfmlab.data import Batch, ImageSource, captions, to_float
from vfmlab.errors import ConfigError
from vfmlab.nn.frozen import Frozen
from vfmlab.seeding import StepRandom
from vfmlab.vfm.pocket_text import TextNet
from vfmlab.vfm.text import known, numbered

NEVER = -1e4  # in place of -inf, whose product with a share of 0 is NaN


class ContrastObjective(nn.Module):
    """CLIP's loss (arXiv 2103.00020, figure 3) with the image side frozen: the last map of the pocket VFM.

    Each caption finds its image in the batch, and each image its caption; where captions are equal, each of
    their images is right. Words alone find nearly all of them, so an image also has to refuse its own caption
    with the two groups exchanged (as NegCLIP's negatives, 2210.01936).
    """

    def __init__(self, source: ImageSource):
        super().__init__()
        if source.captions(torch.arange(1)) is None:
            raise ConfigError(f"pretrain.objective 'contrast' needs captions, which '{source.what}' does not "
                              "have; set data.source=scenes:groups")
        self.source, self.net, self.frozen = source, TextNet(), Frozen()
        self.frozen.freeze("vfm", vfm.build(config.VFM(name="pocket", layers=[-1]), source.size))

    def read(self, net: TextNet, batch: Batch, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Which captions of a batch are equal (bool B B), likeness of captions and images (B B), and of each
        image with its caption turned (B; NEVER where it cannot be turned)."""
        other = [turned(text) for text in texts]
        rows = self.rows(net, [*texts, *(text or "" for text in other)])
        maps = self.frozen["vfm"].features(to_float(batch.images).to(rows.device)).maps[-1]
        likeness, against = net.likeness(rows, maps).split(len(texts))
        none = torch.tensor([text is None for text in other], device=rows.device)
        captions = rows[: len(texts)]
        return ((captions[:, None] == captions).all(-1), likeness,
                against.diagonal().masked_fill(none, NEVER))

    def rows(self, net: TextNet, texts: list[str]) -> Tensor:
        """Numbers of their words, long B L. Raises ConfigError for captions that the tower does not take."""
        length = net.spec["length"]
        if any(len(known(text, net.numbers)) > length for text in texts):
            raise ConfigError(f"pretrain.objective 'contrast': a caption has more than {length} words")
        return numbered(texts, net.numbers, length).to(net.places.device)

    def forward(self, batch: Batch, rng: StepRandom, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        same, likeness, against = self.read(self.net, batch, self.source.captions(batch.indices.cpu()))
        shares = same / same.sum(1, keepdim=True)
        choices = torch.cat([likeness.T, against[:, None]], 1)  # of an image
        loss = (F.cross_entropy(likeness, shares) + F.cross_entropy(choices, F.pad(shares, (0, 1)))) / 2
        return loss, {"captions_found": retrieved(same, likeness.detach()).float().mean()}

    @torch.no_grad()
    def measure(self, net: TextNet, held_out: ImageSource, batch: int = 64) -> dict[str, float]:
        """Of held-out images, in how many the caption is the likest of those of `batch` images; and in how
        many of those with two groups it is liker than the caption with the groups exchanged."""
        right: dict[str, list[bool]] = {"captions_found": [], "order_right": []}
        for indices in torch.arange(len(held_out)).split(batch):
            same, likeness, against = self.read(net, held_out.batch(indices), held_out.captions(indices))
            if len(indices) == min(batch, len(held_out)):  # among fewer it is easier
                right["captions_found"] += retrieved(same, likeness).tolist()
            right["order_right"] += (likeness.diagonal() > against)[against > NEVER].tolist()
        return {name: sum(values) / len(values) for name, values in right.items() if values}


def turned(text: str) -> str | None:
    """A caption with its two groups exchanged; None where there is one group, or two alike.

    Raises:
        ConfigError: no caption of drawn scenes.
    """
    scene = captions.parse(text)
    if scene.second in (None, scene.first):
        return None
    return str(captions.Scene(scene.second, scene.side, scene.first))


def retrieved(same: Tensor, likeness: Tensor) -> Tensor:
    """Whether the likest caption of each image is one of its own, bool B."""
    return same.gather(1, likeness.argmax(0)[:, None]).squeeze(1)
