"""The captions of a run's training images as the conditions of its network; their tokens are computed once.

    <directory>/meta.json             encoder, texts
                text-00000.safetensors `tokens` L D of each text, the empty one last, fp16
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmlab.config import Diffusion, digest
from vfmlab.data import ImageSource
from vfmlab.diffusion import latents, shards
from vfmlab.diffusion.prompts import Prompts, blank, captions, encoder_of

FORMAT = "vfmlab-text/1"
WHAT = shards.What("text", "encoder", "cache of captions", FORMAT)
CHECKED = 10_000  # captions that are looked at before anything is trained


class Captioned:
    """The captions of a run's training images as the conditions of its network.

    Attributes:
        texts: the different ones. of_image: long N, the condition of each image. prompts: set by
        :meth:`prepare`.

    Raises:
        DataError: images without captions. ConfigError: an encoder that does not fit, captions that it does
        not take.
    """

    def __init__(self, cfg: Diffusion, source: ImageSource):
        self.encoder, texts = encoder_of(cfg), captions(source)
        source.texts = digest(texts)
        self.texts = list(dict.fromkeys(texts))
        self.encoder.check(self.texts[:CHECKED])  # fails here and now
        number = {text: i for i, text in enumerate(self.texts)}
        self.of_image = torch.tensor([number[text] for text in texts])
        self.prompts = blank(cfg.network.text)

    def prepare(self, root: Path, device: torch.device | str, rank: int = 0,
                world: int = 1) -> Iterator[tuple[int, int]]:
        """Encode the captions into a folder below `root`, or find them encoded; yields (done, in all)."""
        encoder, texts = self.encoder.to(device), [*self.texts, ""]
        wanted = shards.fingerprint(FORMAT, encoder.fingerprint, encoder.length, texts)
        folder = root / f"text-{wanted}"
        meta = shards.begun(folder, WHAT, wanted, count=len(texts), shard=latents.SHARD, encoder=encoder.name,
                            shape=[encoder.length, encoder.width])

        def read(indices: Tensor) -> list[str]:
            return [texts[i] for i in indices.tolist()]

        def encode(_: Tensor, lines: list[str]) -> dict[str, Tensor]:
            return {"tokens": encoder(lines).half().cpu()}

        yield from shards.write(folder, "text", meta, read, encode, 64, rank, world)
        stored = shards.Shards(folder, "text", meta, rank, world)
        self.prompts = Prompts(self.texts, lambda conditions: stored.rows("tokens", conditions), encoder)

    def labelled(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Each of `batches` with the conditions of its images in place of their classes."""
        return shards.mapped(lambda batch: batch._replace(
            labels=self.of_image[batch.indices.cpu()].to(batch.labels.device)), batches)
